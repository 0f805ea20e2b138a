from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.scorers import match
from unimodal.pipeline.scorers.embed import EmbedSettings

TEXTS = ["a cup of coffee on a table", "", "Ein Raketenstart 🚀", "word " * 500]


@pytest.fixture(scope="module")
def settings(small_clip: Path) -> EmbedSettings:
    return EmbedSettings(
        weights=str(small_clip / "small.pt"), config=str(small_clip / "small.json"), device="cpu"
    )


def test_cosines_are_those_of_open_clips_own_text_vectors(
    settings: EmbedSettings, small_clip: Path
) -> None:
    import open_clip
    import torch

    open_clip.add_model_config(small_clip / "small.json")
    model = open_clip.create_model("small", pretrained=str(small_clip / "small.pt")).eval()
    with torch.no_grad():
        wanted = model.encode_text(open_clip.get_tokenizer("small")(TEXTS), normalize=True).numpy()
    pictures = np.random.default_rng(0).normal(size=(4, 32))
    pictures = (pictures / np.linalg.norm(pictures, axis=1, keepdims=True)).astype(np.float32)
    found = match.load(settings)(TEXTS, pictures)
    np.testing.assert_allclose(found, (wanted * pictures).sum(axis=1), atol=1e-5)
    assert np.ptp(found) > 0.01
    # A text by itself gives the same, and its own vector gives 1.
    assert match.load(settings)(TEXTS[2:3], pictures[2:3]) == found[2:3]
    assert match.load(settings)(TEXTS, wanted) == pytest.approx([1.0] * 4, abs=1e-5)


def test_embeddings_of_another_model_are_refused(settings: EmbedSettings) -> None:
    with pytest.raises(UsageError, match="another model"):
        match.load(settings)(["one"], np.ones((1, 768), np.float32))
    assert match.load(settings)([], np.zeros((0, 0), np.float32)) == []
