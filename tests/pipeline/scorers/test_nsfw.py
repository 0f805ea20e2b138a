from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.frames import Clip
from unimodal.pipeline.scorers import nsfw
from unimodal.pipeline.scorers.nsfw import NsfwSettings

SIDE = 32
PLAIN = NsfwSettings(size=SIDE, stretch=SIDE, scale="unit", output=0)


def _field(number: int, value: int | bytes) -> bytes:
    """One field of a protobuf message: a varint below 128, or bytes with their length."""
    if isinstance(value, int):
        return (
            bytes([number << 3 & 0x7F | (0x80 if number > 15 else 0)])
            + (bytes([number >> 4]) if number > 15 else b"")
            + bytes([value])
        )
    assert len(value) < 1 << 14
    length = [len(value)] if len(value) < 128 else [len(value) & 0x7F | 0x80, len(value) >> 7]
    return bytes([number << 3 | 2, *length]) + value


def _tensor(name: bytes, dims: list[int]) -> bytes:
    """ONNX's ValueInfoProto of a float tensor."""
    shape = b"".join(_field(1, _field(1, dim)) for dim in dims)
    return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, shape)))


@pytest.fixture
def weights(tmp_path: Path) -> Callable[[str], str]:
    """Function that writes a "classifier" with three outputs: the means of the three channels."""

    def write(layout: str) -> str:
        axes = b"".join(_field(8, axis) for axis in ((2, 3) if layout == "nchw" else (1, 2)))
        attributes = _field(5, _field(1, b"axes") + axes + _field(20, 7)) + _field(
            5, _field(1, b"keepdims") + _field(3, 0) + _field(20, 2)
        )
        node = _field(1, b"x") + _field(2, b"y") + _field(4, b"ReduceMean") + attributes
        dims = [1, 3, SIDE, SIDE] if layout == "nchw" else [1, SIDE, SIDE, 3]
        graph = _field(1, node) + _field(2, b"g")
        graph += _field(11, _tensor(b"x", dims)) + _field(12, _tensor(b"y", [1, 3]))
        path = tmp_path / f"{layout}.onnx"
        path.write_bytes(_field(1, 8) + _field(7, graph) + _field(8, _field(2, 13)))
        return str(path)

    return write


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("scale", ["unit", "signed", "imagenet", "caffe"])
def test_every_pixel_is_scaled_as_the_settings_say(
    picture: np.ndarray, layout: str, scale: str
) -> None:
    settings = NsfwSettings.model_validate(
        {"size": SIDE, "stretch": SIDE, "layout": layout, "scale": scale}
    )
    found = nsfw.prepare(picture, settings)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    assert found.shape == ((1, 3, SIDE, SIDE) if layout == "nchw" else (1, SIDE, SIDE, 3))
    for blue_green_red in range(3):
        value = picture[5, 7, blue_green_red].astype(np.float64)
        channel = blue_green_red if scale == "caffe" else 2 - blue_green_red
        wanted = {
            "unit": value / 255,
            "signed": value / 127.5 - 1,
            "imagenet": (value / 255 - [0.485, 0.456, 0.406][channel])
            / [0.229, 0.224, 0.225][channel],
            "caffe": value - [104, 117, 123][channel],
        }[scale]
        at = (0, channel, 5, 7) if layout == "nchw" else (0, 5, 7, channel)
        assert found[at] == pytest.approx(wanted, abs=1e-5)


def test_middle_of_the_stretched_picture_is_seen() -> None:
    wide = np.zeros((40, 640, 3), np.uint8)
    wide[:, 40:600] = 255  # dark margins of 1/16, as much as is cut off: 16 of 256 pixels
    settings = NsfwSettings(scale="unit")
    seen = nsfw.prepare(wide, settings)[0]
    assert seen.shape == (224, 224, 3)
    assert seen[:, 2:-2].min() == 1 and seen[:, 0].max() < 1
    whole = nsfw.prepare(wide, settings.model_copy(update={"stretch": 224}))[0]
    assert whole[:, :12].max() == 0 and whole[:, -12:].max() == 0


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_score_is_the_worst_samples_probability_of_the_class(
    weights: Callable[[str], str], layout: str, jpegs: list[bytes], clip_of: Callable[..., Clip]
) -> None:
    clip = clip_of(*jpegs[:2], unseen=tuple(jpegs[2:]))
    pictures = [nsfw.prepare(sample.bgr(), PLAIN)[0] for sample in clip.scoring]
    means = np.array([picture.mean(axis=(0, 1)) for picture in pictures])  # [2, RGB]
    softmax = np.exp(means) / np.exp(means).sum(axis=1, keepdims=True)
    for output in range(3):
        for logits, wanted in ((False, means), (True, softmax)):
            settings = PLAIN.model_copy(
                update={
                    "weights": weights(layout),
                    "layout": layout,
                    "output": output,
                    "softmax": logits,
                }
            )
            rows = nsfw.load(settings)([clip, clip_of(), clip_of(jpegs[0])])
            assert rows[0]["nsfw"] == pytest.approx(wanted[:, output].max(), abs=1e-5)
            assert rows[1] == {"nsfw": None}
            assert rows[2]["nsfw"] == pytest.approx(wanted[0, output], abs=1e-5)


def test_models_that_do_not_fit_are_named_with_what_is_wrong(
    weights: Callable[[str], str], tmp_path: Path, jpegs: list[bytes], clip_of: Callable[..., Clip]
) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    path = weights("nhwc")
    for update, said in (
        ({"weights": str(tmp_path / "text.onnx")}, r"text\.onnx cannot be run"),
        ({"weights": path, "layout": "nchw"}, r"nhwc\.onnx cannot be run.*nsfw\.layout=nchw"),
        ({"weights": path, "size": 16}, r"nsfw\.size=16"),
        ({"weights": path, "stretch": 16}, r"nsfw\.stretch=16 is less"),
        ({"weights": path, "output": 3}, r"nsfw\.output=3, but .*nhwc\.onnx gives 3 numbers"),
    ):
        with pytest.raises(UsageError, match=said):
            nsfw.load(PLAIN.model_copy(update=update))
    settings = PLAIN.model_copy(update={"weights": path, "scale": "caffe"})
    with pytest.raises(UsageError, match=r"no probability: set nsfw\.softmax=true"):
        nsfw.load(settings)([clip_of(jpegs[0])])


def test_stage_is_absent_without_weights_and_their_contents_tell_them_apart(
    weights: Callable[[str], str],
) -> None:
    assert "set nsfw.weights" in (nsfw.absent(NsfwSettings()) or "")
    assert "nsfw.weights=/nowhere" in (nsfw.absent(NsfwSettings(weights="/nowhere")) or "")
    settings = [NsfwSettings(weights=weights(layout)) for layout in ("nchw", "nhwc")]
    assert [nsfw.absent(own) for own in settings] == [None, None]
    assert nsfw.identity(settings[0]) != nsfw.identity(settings[1])
