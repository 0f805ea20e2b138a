"""The plan: windows tile a clip, fit the context, and shards are cut the same way every time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimodal.pipeline.clips import CLIPS, table, write_parquet
from unimodal.pipeline.errors import MediaError, UnimodalError, UsageError
from unimodal.tokenize.document import Image, block_length, serialize
from unimodal.tokenize.plan import (
    PRESETS,
    TokenizeSettings,
    Window,
    captions_of,
    estimate,
    kept_clips,
    score_columns,
    split_of,
    units,
    windows,
)
from unimodal.tokenize.vocabulary import Vocabulary

VOCABULARY = Vocabulary.bytes(256)
SMALL = TokenizeSettings(area=64 * 64, fps=8, seconds=2)


def image(uid: str = "a", **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(CLIPS.names)
    return row | {
        "part": "p",
        "uid": uid,
        "uri": f"/{uid}.png",
        "source_sha256": uid * 8,
        "kind": "image",
        "width": 100,
        "height": 50,
        "verdict": "keep",
        **changes,
    }


def video(uid: str = "v", seconds: Fraction | float = 5, **changes: Any) -> dict[str, Any]:
    ticks = round(Fraction(seconds) * 1000)
    row = image(uid, kind="video", start_pts=500, end_pts=500 + ticks, time_base="1/1000")
    return row | {"start_s": 0.5, "end_s": 0.5 + float(seconds), **changes}


@settings(max_examples=80, deadline=None)
@given(
    seconds=st.fractions(Fraction(1, 100), 40, max_denominator=1000),
    fps=st.sampled_from([2.0, 7.5, 8.0, 23.976, 24.0]),
    longest=st.sampled_from([2.0, 5.0]),
    max_tokens=st.sampled_from([100, 300, 5000]),
)
def test_windows_tile_a_clip_in_groups_of_four_and_fit(
    seconds: Fraction, fps: float, longest: float, max_tokens: int
) -> None:
    config = TokenizeSettings(area=64 * 64, fps=fps, seconds=longest, max_tokens=max_tokens)
    row = video(seconds=seconds)
    duration = Fraction(row["end_pts"] - row["start_pts"], 1000)
    try:
        found = windows(row, config, VOCABULARY)
    except MediaError as error:
        assert "span is empty" in error.reason and duration == 0
        return
    if duration * Fraction(str(fps)) <= 3:  # fewer than four pictures: the last is shown again
        assert [(w.first, w.pictures) for w in found] == [(0, 4)]
        assert found[0].span() == (0.5, round(0.5 + float(duration), 6))
        return
    position = 0
    for window in found:
        assert window.first == position
        assert window.pictures % 4 == 0 and 0 < window.pictures <= longest * fps
        position += window.pictures
        grid = (window.size[0] // 8, window.size[1] // 8)
        assert 2 + block_length(VOCABULARY, *grid, window.pictures // 4, fps) <= max_tokens
    # The last picture is inside the clip, and fewer than four of them are left over.
    assert Fraction(position - 1) / Fraction(str(fps)) < duration
    assert Fraction(position + 3) / Fraction(str(fps)) >= duration
    assert len({w.key for w in found}) == len(found)


def test_a_window_knows_its_moments_in_the_source() -> None:
    found = windows(video(seconds=5), SMALL, VOCABULARY)
    assert [w.span() for w in found] == [(0.5, 2.5), (2.5, 4.5), (4.5, 5.5)]
    assert [w.key for w in found] == ["v-0000", "v-0001", "v-0002"]


def test_a_picture_keeps_its_aspect_and_its_area() -> None:
    (wide,) = windows(image(width=1600, height=900), SMALL, VOCABULARY)
    (tall,) = windows(image(width=900, height=1600), SMALL, VOCABULARY)
    assert wide.size == tall.size[::-1]
    height, width = wide.size
    assert height % 8 == width % 8 == 0
    assert abs(height * width - 64 * 64) < 0.2 * 64 * 64
    assert wide.codes == height * width // 64


def test_the_letterbox_box_decides_the_size_unless_switched_off() -> None:
    boxed = {"crop_x0": 0, "crop_y0": 25, "crop_x1": 100, "crop_y1": 75}
    row = image(width=100, height=100, **boxed)
    (cropped,) = windows(row, SMALL, VOCABULARY)
    (whole,) = windows(row, SMALL.model_copy(update={"crop": False}), VOCABULARY)
    assert cropped.box == (0, 25, 100, 75) and cropped.size[1] > cropped.size[0]
    assert whole.box is None and whole.size == (64, 64)
    full = {"crop_x0": 0, "crop_y0": 0, "crop_x1": 100, "crop_y1": 100}
    assert windows(row | full, SMALL, VOCABULARY)[0].box is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (image("../../x"), "cannot name a sample"),
        (image(width=None), "size is not known"),
        (image(crop_x0=0, crop_y0=0, crop_x1=101, crop_y1=50), "not inside 100x50"),
        (image(width=1000, height=100), "more than 5 times as long as wide"),
        (video(time_base=None), "no time stamps"),
        (video(time_base="1/0"), "no time stamps"),
        (video(end_pts=500), "span is empty"),
        (image(width=20, height=7), "20x7 pixels: a side is under 8"),
    ],
)
def test_what_cannot_become_a_sample_says_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        windows(row, SMALL, VOCABULARY)


def test_a_picture_over_max_tokens_is_named_with_the_remedy() -> None:
    tight = SMALL.model_copy(update={"max_tokens": 50})
    for row in (image(), video()):
        with pytest.raises(MediaError, match="over max_tokens 50: lower --area"):
            windows(row, tight, VOCABULARY)


def test_settings_without_a_single_latent_frame_are_refused(tmp_path: Path) -> None:
    for few in ({"fps": 2, "seconds": 1}, {"fps": 3, "seconds": 1.3333333333333333}):
        with pytest.raises(UsageError, match="raise --fps, or --set seconds"):
            windows(video(), TokenizeSettings(**few), VOCABULARY)
    with pytest.raises(UsageError, match="raise --fps, or --set seconds"):
        list(
            units(
                clips(tmp_path, [image()]).to_batches(),
                TokenizeSettings(fps=2, seconds=1),
                VOCABULARY,
            )
        )


def clips(folder: Path, rows: list[dict[str, Any]], limit: int | None = None) -> pa.Table:
    write_parquet(table(rows, CLIPS), folder / "clips.parquet")
    found = kept_clips(folder, limit)
    return pa.Table.from_batches(found, found.schema)


def test_only_kept_clips_in_an_order_free_of_their_paths(tmp_path: Path) -> None:
    rows = [image(c) for c in "dbca"] + [image("e", verdict="drop")]
    found = clips(tmp_path, rows)
    assert found["uid"].to_pylist() == ["a", "b", "c", "d"]
    assert "keyframes" not in found.column_names
    renamed = [row | {"uri": f"/elsewhere/{i}.png"} for i, row in enumerate(reversed(rows))]
    assert clips(tmp_path, renamed).drop_columns("uri") == found.drop_columns("uri")
    assert clips(tmp_path, rows, limit=2)["uid"].to_pylist() == ["a", "b"]


def test_scores_are_the_measured_floats(tmp_path: Path) -> None:
    found = score_columns(clips(tmp_path, [image()]).schema)
    assert "contrast" in found and "flow_mean" in found
    assert not {"start_s", "duration_s", "fps", "uid"} & set(found)


def test_missing_and_empty_runs_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UnimodalError, match=r"unimodal curate .* -o run makes them"):
        kept_clips(tmp_path)
    with pytest.raises(UnimodalError, match=r"no clip .* is kept \(2 dropped\)"):
        clips(tmp_path, [image(c, verdict="drop") for c in "ab"])
    (tmp_path / "clips.parquet").write_bytes(b"no parquet")
    with pytest.raises(UnimodalError, match="cannot be read"):
        kept_clips(tmp_path)
    write_parquet(pa.table({"uid": ["a"], "verdict": ["keep"]}), tmp_path / "clips.parquet")
    with pytest.raises(UnimodalError, match="lacks uri"):
        kept_clips(tmp_path)


def test_shards_hold_at_most_their_size_and_keep_a_clip_together(tmp_path: Path) -> None:
    rows = [image("a"), video("b", 5), image("c"), image("d"), video("e", 20), image("f")]
    config = SMALL.model_copy(update={"shard_size": 4})
    cut = list(units(clips(tmp_path, rows).to_batches(), config, VOCABULARY))
    keys = [[window.key for window in unit.windows] for unit in cut]
    assert [unit.number for unit in cut] == list(range(len(cut)))
    assert keys[:2] == [["a", "b-0000", "b-0001", "b-0002"], ["c", "d"]]
    assert [k for group in keys[2:] for k in group] == [f"e-{i:04d}" for i in range(10)] + ["f"]
    assert all(len(group) <= 4 for group in keys)


def test_a_unit_is_planned_again_from_where_it_begins(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        image(f"{i:02x}", width=7 if i % 5 == 0 else 40)
        if i % 3
        else video(f"{i:02x}", float(rng.uniform(0.2, 25)), captions=[caption("a")])
        for i in range(40)
    ]
    config = SMALL.model_copy(update={"shard_size": 6})
    write_parquet(table(rows, CLIPS), tmp_path / "clips.parquet")
    batches = [b.slice(i, 7) for b in kept_clips(tmp_path) for i in range(0, len(b), 7)]
    whole = list(units(batches, config, VOCABULARY))
    assert len(whole) > 10 and any(unit.windows[0].first for unit in whole)
    assert sum(unit.clips for unit in whole) == 40 and any(unit.unfit for unit in whole)
    for unit in whole:
        batch, row, skip = unit.at
        rest = [batches[batch].slice(row), *batches[batch + 1 :]]
        again = next(units(rest, config, VOCABULARY, number=unit.number, skip=skip))
        assert (again.number, again.windows, again.unfit) == (
            unit.number,
            unit.windows,
            unit.unfit,
        )
        assert again.digest({}) == unit.digest({})


def test_many_clips_are_sorted_and_listed_once_whatever_their_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sources = [f"{n:064x}" for n in rng.integers(0, 2**60, 300)]
    names = rng.permutation(3000)
    rows = [
        video(f"{n:05d}", 1, source_sha256=sources[n % 300][::-1], start_pts=int(n) // 300)
        for n in [*names.tolist(), *names[:50].tolist()]
    ]
    found = clips(tmp_path, rows)
    order = [(r["source_sha256"], r["start_pts"], r["uid"]) for r in found.to_pylist()]
    assert order == sorted({(r["source_sha256"], r["start_pts"], r["uid"]) for r in rows})
    assert clips(tmp_path, rows, limit=1500).equals(found.slice(0, 1500))


def test_the_estimate_counts_what_will_be_made(tmp_path: Path) -> None:
    rows = [image("a"), video("b", 5), video("c", 0), image("d", width=64, height=64)]
    total = estimate(clips(tmp_path, rows).to_batches(), SMALL, VOCABULARY)
    wide = windows(image(), SMALL, VOCABULARY)[0].codes
    assert total["images"] == 2 and total["windows"] == 3 and total["unfit"] == 1
    assert total["vision_codes"] == wide + 64 + 10 * wide
    square = Image(np.zeros((8, 8), int))
    film = windows(video(), SMALL, VOCABULARY)
    lengths = [len(serialize([square], VOCABULARY, bos=False, eos=False))]
    for window in [windows(image(), SMALL, VOCABULARY)[0], *film]:
        lengths.append(window.block_length(VOCABULARY))
    assert total["tokens"] == sum(lengths)


def test_a_span_listed_twice_is_tokenized_once(tmp_path: Path) -> None:
    (unit,) = units(clips(tmp_path, [image("a"), image("a")]).to_batches(), SMALL, VOCABULARY)
    assert [w.key for w in unit.windows] == ["a"]


def test_a_digest_follows_what_the_bytes_depend_on(tmp_path: Path) -> None:
    def digest(row: dict[str, Any], config: TokenizeSettings = SMALL, **header: Any) -> str:
        (unit,) = units(clips(tmp_path, [row]).to_batches(), config, VOCABULARY)
        return unit.digest(header)

    base = digest(image())
    assert digest(image(uri="/moved.png")) == base
    others = [
        digest(image("b")),
        digest(image(contrast=1.0)),
        digest(image(captions=[{"style": "given", "text": "x"}])),
        digest(image(), SMALL.model_copy(update={"area": 4096 * 2})),
        digest(image(), tokenizer="another"),
    ]
    assert len({base, *others}) == 6


def caption(text: str, start: float | None = None, end: float | None = None, **more: Any) -> Any:
    return {"style": "given", "lang": "en", "text": text, "start_s": start, "end_s": end, **more}


def said_of(window: Window) -> list[dict[str, Any]]:
    return captions_of(window.clip.get("captions"), *window.span(), VOCABULARY)


def test_a_window_takes_the_caption_of_its_stretch() -> None:
    captions: list[Mapping[str, Any]] = [
        caption("one of the whole"),
        caption("early", 0.5, 3.0),
        caption("late", 3.0, 5.5),
        caption("another of the whole", style="sidecar"),
        caption("failed", status="failed"),
        caption(""),
    ]
    found = windows(video(captions=captions), SMALL, VOCABULARY)
    texts = [[c["text"] for c in said_of(window)] for window in found]
    whole = ["one of the whole", "another of the whole"]
    assert [[t for t in row if t not in whole] for row in texts] == [["early"], ["late"], ["late"]]
    assert all([t for t in row if t in whole] == whole for row in texts)
    assert all(set(c) == {"style", "lang", "text", "tokens"} for c in said_of(found[0]))


def test_an_image_takes_every_caption() -> None:
    (window,) = windows(image(captions=[caption("a"), caption("b")]), SMALL, VOCABULARY)
    assert [c["text"] for c in said_of(window)] == ["a", "b"]


def test_the_split_is_by_source_and_near_its_share() -> None:
    sources = [f"{i:064x}" for i in range(4000)]
    val = [split_of(source, 0.1) for source in sources].count("val")
    assert 330 < val < 470
    assert {split_of(source, 0.0) for source in sources} == {"train"}
    grown = [s for s in sources if split_of(s, 0.1) == "val"]
    assert all(split_of(s, 0.2) == "val" for s in grown)  # a larger share only adds


def test_presets_are_valid_settings() -> None:
    for preset in PRESETS.values():
        assert json.dumps(TokenizeSettings(**preset).model_dump())


def test_the_chat_preset_keeps_sizes_as_the_released_processor_does() -> None:
    config = TokenizeSettings(**PRESETS["emu3-chat"])
    sizes = {(1920, 1080): (768, 1360), (640, 480): (480, 640), (100, 50): (368, 728)}
    for (width, height), expected in sizes.items():
        (window,) = windows(image(width=width, height=height), config, VOCABULARY)
        assert window.size == expected
    with pytest.raises(MediaError, match=r"more than 5 times as long as wide \(max_aspect\)"):
        windows(image(width=510, height=100), config, VOCABULARY)
    wider = config.model_copy(update={"max_aspect": 6.0})
    assert windows(image(width=510, height=100), wider, VOCABULARY)


def test_emu3_windows_are_those_of_the_paper() -> None:
    row = video(seconds=6, width=512, height=512)
    (first, second) = windows(row, TokenizeSettings(**PRESETS["emu3"]), VOCABULARY)
    assert isinstance(first, Window)
    assert (first.pictures, first.codes) == (120, 30 * 64 * 64)
    assert second.pictures == 24
