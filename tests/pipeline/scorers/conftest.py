"""Clips made of photographs, and a CLIP small enough to have random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from unimodal.pipeline.frames import Clip, Sample

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
    },
}


@pytest.fixture(scope="session")
def jpegs(photos: Path) -> list[bytes]:
    """Four photographs as the pipeline stores them."""
    import cv2

    found = []
    for name in ("coffee.png", "chelsea.png", "astronaut.png", "rocket.jpg"):
        image = cv2.resize(cv2.imread(str(photos / name)), (320, 240))
        found.append(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
    return found


@pytest.fixture(scope="session")
def clip_of() -> Callable[..., Clip]:
    """Function that makes a clip of JPEGs; of those in `unseen` scorers are not to look at."""

    def make(*seen: bytes, unseen: tuple[bytes, ...] = ()) -> Clip:
        times = [(jpeg, True) for jpeg in seen] + [(jpeg, False) for jpeg in unseen]
        samples = [Sample(i / 2, True, look, 0, jpeg) for i, (jpeg, look) in enumerate(times)]
        return Clip({"uid": "u", "kind": "video"}, tuple(samples))

    return make


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with small.json, a model config of open_clip's, and small.pt, weights for it."""
    import open_clip
    import torch

    folder = tmp_path_factory.mktemp("clip")
    (folder / "small.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG)  # type: ignore[arg-type]
    for weights in model.parameters():  # its own initial weights hardly tell pictures apart
        if weights.ndim > 1:
            torch.nn.init.normal_(weights, std=weights.shape[-1] ** -0.5)
    torch.save(model.state_dict(), folder / "small.pt")
    return folder
