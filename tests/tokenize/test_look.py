"""Looking at media and shards: the pixels, codes and figures are those of tokenizing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unimodal.pipeline.clips import CLIPS, table, write_parquet
from unimodal.pipeline.errors import MediaError, UnimodalError
from unimodal.pipeline.media import iter_frames, open_video, read_image
from unimodal.pipeline.progress import Progress
from unimodal.tokenize.document import Image as ImageSegment
from unimodal.tokenize.document import serialize
from unimodal.tokenize.look import AMPLIFIED, code_colors, difference, look
from unimodal.tokenize.plan import TokenizeSettings
from unimodal.tokenize.run import tokenize
from unimodal.tokenize.shards import Shards
from unimodal.tokenize.vision.pixels import resize, to_pixels, to_uint8
from unimodal.tokenize.vision.tokenizer import VisionTokenizer
from unimodal.tokenize.vocabulary import Vocabulary

SMALL = TokenizeSettings(area=48 * 48, fps=8, seconds=1)
CAPTION = "a <script>alert(1)</script> & ברוך"


class Parts(HTMLParser):
    """What a browser would load, and what it would show as text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "poster")]

    def handle_data(self, data: str) -> None:
        self.text += data


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def panel(sheet: Path, number: int, size: tuple[int, int]) -> np.ndarray:
    """A picture of a sheet of equal ones, by its place; `size` is (height, width)."""
    left = 8 + number * (size[1] + 8)
    pixels = np.asarray(Image.open(sheet))
    return pixels[26 : 26 + size[0], left : left + size[1]]


@pytest.fixture(scope="module")
def picture(photos: Path) -> Path:
    return photos / "coffee.png"


@pytest.fixture(scope="module")
def film(
    tmp_path_factory: pytest.TempPathFactory,
    write_video: Callable[..., Path],
    moving: Callable[..., list[np.ndarray]],
) -> Path:
    """Ten seconds at four frames a second, 128x96."""
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", moving(40), fps=4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, picture: Path, film: Path) -> Path:
    """Shards of the picture and of the film's two first seconds, uncut."""
    folder = tmp_path_factory.mktemp("shards")
    with open_video(film) as video:
        first = next(iter(video.frames())).pts
        base = video.time_base
    span = {
        "start_pts": first,
        "end_pts": first + int(2 / base),
        "time_base": f"{base.numerator}/{base.denominator}",
        "start_s": 0.0,
        "end_s": 2.0,
        "frames": 8,
    }
    rows = []
    for path, kind, size in ((picture, "image", (600, 400)), (film, "video", (128, 96))):
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        row: dict[str, Any] = dict.fromkeys(CLIPS.names) | (span if kind == "video" else {})
        row |= {"part": "p", "uri": str(path), "uid": sha[:16], "kind": kind, "verdict": "keep"}
        row |= {"source_sha256": sha, "width": size[0], "height": size[1]}
        row["captions"] = [{"style": "given", "lang": "en", "text": CAPTION}]
        rows.append(row)
    write_parquet(table(rows, CLIPS), folder / "run" / "clips.parquet")
    return tokenize(folder / "run", folder / "shards", SMALL).path


def keys(shards: Path, kind: str) -> list[str]:
    return [r["key"] for r in Shards.open(shards).index.to_pylist() if r["kind"] == kind]


def test_a_picture_is_resized_encoded_and_painted_as_its_sample_in_shards(
    tmp_path: Path, picture: Path, shards: Path
) -> None:
    _, (seen,) = look([str(picture)], tmp_path / "a", SMALL)
    _, (stored,) = look([f"{shards}#{keys(shards, 'image')[0]}"], tmp_path / "b", SMALL)
    for name in ("size", "grid", "codes", "tokens", "bits", "distinct", "perplexity"):
        assert seen[name] == stored[name], name
    width, height = seen["size"]
    ours, theirs = (next((tmp_path / folder).glob("*.png")) for folder in "ab")
    for mine, other in ((1, 0), (3, 1)):  # reconstruction, codes
        a, b = panel(ours, mine, (height, width)), panel(theirs, other, (height, width))
        np.testing.assert_array_equal(a, b)


def test_a_video_begins_with_the_windows_of_its_samples(
    tmp_path: Path, film: Path, shards: Path
) -> None:
    _, (seen,) = look([str(film)], tmp_path / "a", SMALL)
    samples = [f"{shards}#{key}" for key in keys(shards, "video")]
    assert len(samples) == 2
    _, stored = look(samples, tmp_path / "b", SMALL)
    assert seen["windows"] == 6 and seen["pictures"] == 48  # one window, or as many as 48 hold
    _, (window,) = look([str(film)], tmp_path / "c", SMALL.model_copy(update={"seconds": 6.0}))
    assert window["windows"] == 1 and window["pictures"] == 48
    assert window["grid"] == [12, *stored[0]["grid"][1:]]
    assert seen["tokens"] == 3 * sum(one["tokens"] for one in stored)
    width, height = seen["size"]
    whole, first, _ = (
        next((tmp_path / folder).glob(name))
        for folder, name in (("a", "*.png"), ("b", "01*.png"), ("b", "02*.png"))
    )
    # A column is original, reconstruction, codes; without the original the other two.
    column = panel(whole, 0, (3 * height, width))
    stored_column = panel(first, 0, (2 * height, width))
    np.testing.assert_array_equal(column[height : 2 * height], stored_column[:height])
    shown = resize(next(iter_frames(film))[1], (height, width))
    np.testing.assert_array_equal(column[:height], shown)


def test_a_long_video_is_looked_at_for_one_window(tmp_path: Path, bikes: Path) -> None:
    settings = SMALL.model_copy(update={"area": 16 * 16, "seconds": 7.0})
    _, (seen,) = look([str(bikes)], tmp_path, settings)
    assert (seen["windows"], seen["pictures"]) == (1, 56)
    assert len(seen["psnr_each"]) == 56
    assert seen["psnr"] == pytest.approx(np.mean(seen["psnr_each"]))
    movie = next(tmp_path.glob("*.mp4"))
    frames = [frame for _, frame in iter_frames(movie)]
    assert len(frames) == 56
    # H.264 wants even sides, and blocks here are of 8 pixels: original beside reconstruction.
    assert frames[0].shape == (seen["size"][1], 2 * seen["size"][0], 3)


def test_figures_agree_with_counts_of_their_own(tmp_path: Path, picture: Path) -> None:
    page, (seen,) = look([str(picture)], tmp_path, SMALL)
    trained = VisionTokenizer.load("small")
    width, height = seen["size"]
    original = resize(read_image(picture), (height, width))
    codes = trained.encode(to_pixels(original)[None, None])
    painted = to_uint8(trained.decode(codes, image=True)[0])[0]
    sheet = next(tmp_path.glob("*.png"))
    shown = [panel(sheet, i, (height, width)) for i in range(3)]
    np.testing.assert_array_equal(shown[0], original)
    np.testing.assert_array_equal(shown[1], painted)
    np.testing.assert_array_equal(shown[2], difference(original, painted))
    error = np.mean((original.astype(float) - painted) ** 2)
    assert seen["psnr"] == pytest.approx(10 * np.log10(255**2 / error))
    grid = codes[0, 0].numpy()
    assert seen["grid"] == [1, *grid.shape] and seen["codes"] == grid.size
    assert seen["distinct"] == len(np.unique(grid))
    ids = serialize([ImageSegment(grid)], Vocabulary.bytes(trained.codebook_size), False, False)
    assert seen["tokens"] == len(ids)
    assert seen["bits"] == pytest.approx(grid.size * np.log2(trained.codebook_size))
    assert seen["bits_per_pixel"] == pytest.approx(seen["bits"] / (width * height))
    text = Parts(page).text
    assert f"{seen['psnr']:.2f} dB" in text and f"{seen['codes']:,} codes" in text


def test_equal_codes_have_equal_colors_and_frequent_ones_are_vivid() -> None:
    codes = np.array([[5, 5, 5, 5], [9, 7, 8, 6]])
    colors = code_colors(codes, np.bincount(codes.reshape(-1), minlength=16), factor=2)
    assert colors.shape == (4, 8, 3)
    assert (colors[:2] == colors[0, 0]).all()
    singles = {tuple(colors[2, 2 * i]) for i in range(4)}
    assert len(singles) == 4
    assert np.ptp(colors[0, 0].astype(int)) > max(np.ptp(np.array(c, int)) for c in singles)
    # The same code has the same hue in another picture, where it is as rare.
    alone = code_colors(np.array([[5, 1]]), np.bincount([5, 1], minlength=16))
    hues = [Image.fromarray(c[:1, :1]).convert("HSV").getpixel((0, 0))[0] for c in (colors, alone)]
    assert abs(hues[0] - hues[1]) <= 2


def test_differences_are_amplified_and_do_not_wrap() -> None:
    a = np.array([[[0, 100, 255]]], np.uint8)
    b = np.array([[[255, 90, 250]]], np.uint8)
    assert difference(a, b).tolist() == [[[255, 10 * AMPLIFIED, 5 * AMPLIFIED]]]


def test_the_page_escapes_what_strangers_wrote_and_asks_for_nothing(
    tmp_path: Path, emoji: list[Path], shards: Path
) -> None:
    evil = tmp_path / "<img src=x onerror=alert(1)>#1.png"
    evil.write_bytes(emoji[0].read_bytes())
    samples = [f"{shards}#{key}" for kind in ("image", "video") for key in keys(shards, kind)]
    page, records = look([str(evil), str(shards), *samples[:1]], tmp_path / "o", SMALL)
    parts = Parts(page)
    assert not any("error" in record for record in records)
    assert "script" not in parts.tags and parts.text.count(CAPTION) >= 2
    assert evil.name in parts.text
    assert parts.sources and all(source.startswith("data:") for source in parts.sources)
    assert "prefers-color-scheme: dark" in page.read_text()
    json.dumps(records)  # all of it is for programs too


def test_shards_are_counted_by_their_index(tmp_path: Path, shards: Path) -> None:
    _, (seen,) = look([str(shards)], tmp_path, SMALL)
    opened = Shards.open(shards)
    codes = [opened.codes(row) for row in range(len(opened))]
    assert (seen["samples"], seen["images"], seen["windows"], seen["shards"]) == (3, 1, 2, 1)
    assert seen["codes"] == seen["counted"] == sum(c.size for c in codes)
    assert seen["distinct"] == len(np.unique(np.concatenate([c.reshape(-1) for c in codes])))
    assert seen["train"] + seen["val"] == 3 and seen["uncaptioned"] == 0
    (caption,) = seen["captions"]
    each = len(opened.vocabulary.text.encode(CAPTION))
    assert (caption["style"], caption["lang"], caption["count_all"]) == ("given", "en", 3)
    assert caption["tokens_sum"] == 3 * each
    samples = [f"{shards}#{r['key']}" for r in opened.index.to_pylist()]
    _, each_one = look(samples, tmp_path, SMALL)  # a page of ours is written again
    assert seen["tokens"] == sum(one["tokens"] for one in each_one)


def test_documents_are_counted_and_shown_piece_by_piece(tmp_path: Path, picture: Path) -> None:
    rows: list[dict[str, Any]] = [{"content": ["A cup <b>", {"image": str(picture)}, "of coffee"]}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    (tmp_path / "b.txt").write_text("words alone")
    both = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    made = tokenize(both, tmp_path / "s", SMALL, engine="inline")
    page, (seen,) = look([str(made.path)], tmp_path / "o", SMALL)
    assert (seen["samples"], seen["images"], seen["uncaptioned"]) == (2, 1, 0)
    assert [(t["task"], t["count_all"]) for t in seen["tasks"]] == [("interleaved", 1), ("text", 1)]
    assert seen["counted"] == seen["codes"] == made.manifest["totals"]["vision_codes"]
    things = [f"{made.path}#{key}" for key in made.index["key"].to_pylist()]
    page, each = look(things, tmp_path / "o", SMALL)
    assert seen["tokens"] == sum(one["tokens"] for one in each)
    assert sorted(one["pictures"] for one in each) == [0, 1]
    text = Parts(page).text
    assert "A cup <b>" in text and text.index("A cup") < text.index("of coffee")
    assert "words alone" in text
    alone = tokenize(tmp_path / "b.txt", tmp_path / "t", SMALL, engine="inline")  # without a code
    _, (words,) = look([str(alone.path)], tmp_path / "q", SMALL)
    assert (words["codes"], words["distinct"], words["tokens"]) == (0, 0, 13)


def test_shards_without_weights_are_counted_but_not_painted(
    tmp_path: Path, shards: Path, film: Path
) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(shards, bare)
    (bare / "vision_tokenizer" / "model.safetensors").unlink()
    told = Notes()
    page, (seen,) = look([str(bare)], tmp_path / "o", SMALL, progress=told)
    assert seen["samples"] == 3 and "img" not in Parts(page).tags
    assert len(told.notes) == 1 and "--tokenizer DIR" in told.notes[0]
    key = keys(shards, "image")[0]
    with pytest.raises(UnimodalError, match=r"cannot be painted .*--tokenizer DIR"):
        look([f"{bare}#{key}"], tmp_path / "o", SMALL)
    look([f"{bare}#{key}"], tmp_path / "o", SMALL, tokenizer="small")  # which made them
    trained = VisionTokenizer.load("small")
    trained.model.quantize.embedding.weight.data[0] += 1
    trained.save(bare / "vision_tokenizer")
    with pytest.raises(UnimodalError, match="another tokenizer's"):
        look([f"{bare}#{key}"], tmp_path / "o", SMALL)


def test_a_wrong_key_names_the_nearest(tmp_path: Path, shards: Path) -> None:
    key = keys(shards, "video")[1]
    with pytest.raises(UnimodalError, match=f"no sample {key[:-1]}7 .*nearest is {key[:-1]}"):
        look([f"{shards}#{key[:-1]}7"], tmp_path, SMALL)


def test_what_cannot_be_shown_is_one_clear_error(tmp_path: Path, photos: Path) -> None:
    Image.new("RGB", (40, 4)).save(tmp_path / "low.png")
    Image.new("RGB", (200, 20)).save(tmp_path / "long.png")
    out = tmp_path / "out"
    for name, said in (
        ("low.png", "low.png: 40x4 is under 8 pixels"),
        ("long.png", "more than 5 times as long as wide"),
        ("none.png", "none.png: no such file"),
    ):
        with pytest.raises(MediaError, match=said):
            look([str(tmp_path / name)], out, SMALL)
    with pytest.raises(UnimodalError, match="no shards at"):
        look([str(photos)], out, SMALL)
    assert not out.exists()


def test_one_of_several_that_cannot_be_read_is_left_out_and_said(
    tmp_path: Path, picture: Path
) -> None:
    told = Notes()
    things = [str(tmp_path / "none.png"), str(picture)]
    page, records = look(things, tmp_path / "o", SMALL, progress=told)
    assert [("error" in record) for record in records] == [True, False]
    assert "no such file" in told.notes[0] and "no such file" in Parts(page).text
    with pytest.raises(UnimodalError, match="none of 2"):
        look(things[:1] * 2, tmp_path / "o", SMALL)


def test_nobody_elses_files_are_overwritten(tmp_path: Path, picture: Path) -> None:
    (tmp_path / "index.html").write_text("<title>my site</title>")
    with pytest.raises(UnimodalError, match="choose another -o"):
        look([str(picture)], tmp_path, SMALL)
    assert (tmp_path / "index.html").read_text() == "<title>my site</title>"
