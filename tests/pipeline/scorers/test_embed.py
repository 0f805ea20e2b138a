from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.frames import Clip
from unimodal.pipeline.scorers import embed, openclip
from unimodal.pipeline.scorers.embed import EmbedSettings

WIDTHS = [1024, 128, 64, 16, 1]


@pytest.fixture(scope="module")
def settings(small_clip: Path) -> EmbedSettings:
    return EmbedSettings(
        weights=str(small_clip / "small.pt"), config=str(small_clip / "small.json"), device="cpu"
    )


@pytest.fixture(scope="module")
def direct(small_clip: Path, jpegs: list[bytes]) -> np.ndarray:
    """Unit vectors [4, 32] of the photographs, by open_clip alone."""
    import open_clip
    import torch
    from PIL import Image

    open_clip.add_model_config(small_clip / "small.json")
    model, _, prepare = open_clip.create_model_and_transforms(
        "small", pretrained=str(small_clip / "small.pt")
    )
    with torch.no_grad():
        pictures = [prepare(Image.open(BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs]
        found = model.eval().encode_image(torch.stack(pictures)).double().numpy()
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def _improved(width: int, seed: int = 1) -> Any:
    """The improved head's network, as its training had it."""
    import torch

    torch.manual_seed(seed)
    rates, layers = iter((0.2, 0.2, 0.1)), []
    for i, (into, out) in enumerate(zip([width, *WIDTHS], WIDTHS, strict=False)):
        layers += [torch.nn.Linear(into, out), *([torch.nn.Dropout(next(rates))] if i < 3 else [])]
    return torch.nn.ModuleDict({"layers": torch.nn.Sequential(*layers)}).eval()


def test_embedding_is_the_unit_mean_of_what_open_clip_gives_for_the_scoring_samples(
    settings: EmbedSettings, direct: np.ndarray, jpegs: list[bytes], clip_of: Callable[..., Clip]
) -> None:
    assert np.abs(direct @ direct.T - np.eye(4)).max() < 0.99  # it does tell pictures apart
    clips = [clip_of(*jpegs[:3], unseen=(jpegs[3],)), clip_of(jpegs[3])]
    first, second = (np.asarray(row["embedding"]) for row in embed.load(settings)(clips))
    mean = direct[:3].mean(axis=0)
    # Apart from rounding: the two may decode a JPEG differently by one gray level.
    np.testing.assert_allclose(first, mean / np.linalg.norm(mean), atol=2e-3)
    np.testing.assert_allclose(second, direct[3], atol=2e-3)
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("room", [1, 4])
def test_embedding_does_not_depend_on_the_clips_beside_it(
    settings: EmbedSettings,
    jpegs: list[bytes],
    clip_of: Callable[..., Clip],
    monkeypatch: pytest.MonkeyPatch,
    room: int,
) -> None:
    monkeypatch.setitem(openclip.ROOM, "cpu", room)
    clips = [clip_of(*jpegs[:3]), clip_of(jpegs[3]), clip_of(jpegs[1], jpegs[2])]
    score = embed.load(settings)
    assert score(clips) == [score([clip])[0] for clip in clips]


def test_aesthetic_is_that_of_the_worst_sample_by_either_head(
    settings: EmbedSettings,
    direct: np.ndarray,
    jpegs: list[bytes],
    clip_of: Callable[..., Clip],
    tmp_path: Path,
) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(1)
    linear, improved = torch.nn.Linear(32, 1), _improved(32)
    save_file(linear.state_dict(), tmp_path / "linear.safetensors")
    torch.save(improved.state_dict(), tmp_path / "improved.pth")
    assert set(improved.state_dict()) == {
        f"layers.{i}.{kind}" for i in (0, 2, 4, 6, 7) for kind in ("weight", "bias")
    }
    units = torch.from_numpy(direct).float()
    with torch.no_grad():
        wanted = {
            "linear.safetensors": linear(units).numpy(),
            "improved.pth": improved["layers"](units).numpy(),
        }
    for name, scores in wanted.items():
        own = settings.model_copy(update={"aesthetic": str(tmp_path / name)})
        found = embed.load(own)([clip_of(*jpegs), *map(clip_of, jpegs)])
        each = [row["aesthetic"] for row in found]
        np.testing.assert_allclose(each, [scores.min(), *scores[:, 0]], atol=2e-3)
        assert each[0] == min(each[1:]) < max(each[1:])


def test_head_is_exact_for_a_vector_of_full_width(tmp_path: Path) -> None:
    import torch

    improved = _improved(768).double()
    torch.save(improved.float().state_dict(), tmp_path / "head.pth")
    weight, offset = embed.head(str(tmp_path / "head.pth"), 768)
    unit = np.random.default_rng(0).normal(size=768)
    with torch.no_grad():
        wanted = improved.double()["layers"](torch.from_numpy(unit))
    assert unit @ weight + offset == pytest.approx(float(wanted), abs=1e-12)


def test_without_head_or_scoring_samples_there_is_no_score(
    settings: EmbedSettings, jpegs: list[bytes], clip_of: Callable[..., Clip]
) -> None:
    with_picture, without = embed.load(settings)([clip_of(jpegs[0]), clip_of(unseen=(jpegs[0],))])
    assert with_picture["aesthetic"] is None and with_picture["embedding"] is not None
    assert without == {"aesthetic": None, "embedding": None}


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("key", ["weights", "aesthetic"])
@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_code_in_a_weights_file_is_not_run(
    settings: EmbedSettings, tmp_path: Path, key: str, kind: str
) -> None:
    import torch

    file, ran = tmp_path / "evil.pt", tmp_path / "ran"
    if kind == "torch":
        torch.save({"weight": _Bomb(ran)}, file)
    else:
        file.write_bytes(pickle.dumps(_Bomb(ran), protocol=2))
    with pytest.raises(UsageError, match=r"evil\.pt cannot be read as weights"):
        embed.load(settings.model_copy(update={key: str(file)}))
    assert not ran.exists()
    with contextlib.suppress(Exception):
        torch.load(file, weights_only=False)
    assert ran.exists()  # so the file was a real one


def test_files_that_do_not_fit_are_named_with_what_is_wrong(
    settings: EmbedSettings, small_clip: Path, tmp_path: Path
) -> None:
    import torch

    def refused(file: str, tensors: Any, key: str = "weights") -> str:
        torch.save(tensors, tmp_path / file)
        with pytest.raises(UsageError, match=file) as caught:
            embed.load(settings.model_copy(update={key: str(tmp_path / file)}))
        return str(caught.value)

    good = torch.load(small_clip / "small.pt", weights_only=True)
    fewer = {name: value for name, value in good.items() if name != "visual.proj"}
    assert "visual.proj" in refused("fewer.pt", fewer)
    assert "nothing" in refused("empty.pt", {})
    assert "holds a list" in refused("list.pt", [1, 2])
    assert "epoch" in refused("epoch.pt", {"epoch": 3})
    assert "trained on another CLIP" in refused(
        "wide.pth", torch.nn.Linear(768, 1).state_dict(), "aesthetic"
    )
    assert "2 numbers" in refused("two.pth", torch.nn.Linear(32, 2).state_dict(), "aesthetic")
    assert "no aesthetic head" in refused("clip.pth", good, "aesthetic")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    with pytest.raises(UsageError, match=r"cut\.safetensors cannot be read as weights"):
        embed.load(settings.model_copy(update={"weights": str(tmp_path / "cut.safetensors")}))


def test_checkpoints_of_training_loops_load_like_bare_ones(
    settings: EmbedSettings,
    small_clip: Path,
    jpegs: list[bytes],
    clip_of: Callable[..., Clip],
    tmp_path: Path,
) -> None:
    import torch

    tensors = torch.load(small_clip / "small.pt", weights_only=True)
    wrapped = {f"module.{name}": value for name, value in tensors.items()}
    torch.save({"epoch": 1, "state_dict": wrapped}, tmp_path / "epoch_1.pt")
    other = settings.model_copy(update={"weights": str(tmp_path / "epoch_1.pt")})
    clips = [clip_of(*jpegs)]
    assert embed.load(other)(clips) == embed.load(settings)(clips)


def test_a_repository_config_says_how_pictures_are_prepared(
    settings: EmbedSettings, small_clip: Path, tmp_path: Path
) -> None:
    config = (small_clip / "small.json").read_text()
    path = tmp_path / "open_clip_config.json"
    path.write_text(f'{{"model_cfg": {config}, "preprocess_cfg": {{"mean": [0.5, 0.5, 0.5]}}}}')
    model = embed.clip_model(settings.model_copy(update={"config": str(path)}))
    assert model.net.visual.preprocess_cfg["mean"] == [0.5, 0.5, 0.5]
    assert model.net.visual.preprocess_cfg["size"] == (64, 64)


def test_weights_that_the_model_name_does_not_go_with_are_refused_before_a_download() -> None:
    for model, weights, said in (
        ("ViT-L-14", "hub:openai", "quickgelu"),
        ("ViT-L-14-quickgelu", "hub:nobody", "it has openai"),
        ("ViT-nobody", "hub:openai", "it has none"),
    ):
        with pytest.raises(UsageError, match=said):
            embed.load(EmbedSettings(model=model, weights=weights))


def test_stage_is_absent_without_files_and_says_which(small_clip: Path) -> None:
    pt = str(small_clip / "small.pt")
    assert "set embed.weights" in (embed.absent(EmbedSettings()) or "")
    assert "embed.weights=/nowhere" in (embed.absent(EmbedSettings(weights="/nowhere")) or "")
    missing = EmbedSettings(weights=pt, aesthetic="/none")
    assert "embed.aesthetic=/none" in (embed.absent(missing) or "")
    assert embed.absent(EmbedSettings(weights=pt)) is None
    assert embed.absent(EmbedSettings(weights="hub:openai")) is None


@pytest.mark.parametrize("size", [1000, 40 << 20])
def test_replaced_weights_have_another_identity_and_copies_the_same(
    tmp_path: Path, size: int
) -> None:
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    found = {}
    for name, at in (("a", None), ("copy", None), ("first", 0), ("last", -1), ("longer", None)):
        changed = data.copy()
        if at is not None:
            changed[at] ^= 1
        (tmp_path / name).write_bytes(changed.tobytes() + b"x" * (name == "longer"))
        found[name] = embed.identity(EmbedSettings(weights=str(tmp_path / name)))
    assert found.pop("copy") == found["a"]
    assert len(set(found.values())) == 4
    head = embed.identity(EmbedSettings(weights=str(tmp_path / "a"), aesthetic=str(tmp_path / "a")))
    assert head not in found.values()
