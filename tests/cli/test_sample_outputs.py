"""Files tell their origin, are not made twice, and come to the same bytes after a kill."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unimodal.cli import outputs
from unimodal.cli.outputs import Folder, contact_sheet, name_of, read_about, slug_of
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.progress import Progress

ASKED: dict[str, Any] = {"prompt": 'a „kite“\n<b>"', "seed": 3, "guidance": 1.5, "size": [16, 24]}


def _picture(seed: int = 0, size: tuple[int, int] = (16, 24)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def _clip(count: int = 8) -> np.ndarray:
    return np.stack([_picture(seed) for seed in range(count)])


@pytest.mark.parametrize("form", ["png", "webp"])
def test_a_picture_is_exact_and_tells_what_was_asked(tmp_path: Path, form: str) -> None:
    folder = Folder(tmp_path)
    path = folder.write(f"000-a-s3-0.{form}", _picture(), None, ASKED)
    assert read_about(path) == {**ASKED, "pixels": [16, 24]}
    with Image.open(path) as image:
        assert image.format == form.upper() and np.array_equal(np.asarray(image), _picture())
    before = path.read_bytes()
    folder.write(path.name, _picture(), None, ASKED)
    assert path.read_bytes() == before


@pytest.mark.parametrize("form", ["mp4", "gif", "webp"])
def test_a_clip_has_its_frames_its_rate_and_tells_what_was_asked(tmp_path: Path, form: str) -> None:
    from unimodal.pipeline.media import open_video

    path = Folder(tmp_path).write(f"000-a-s3-0.{form}", _clip(), 6.0, ASKED)
    assert read_about(path) == {**ASKED, "pixels": [8, 16, 24]}
    with open_video(path) as video:
        times = [float(frame.pts * video.time_base) for frame in video.frames()]
        assert (video.probe.height, video.probe.width) == (16, 24)
    assert np.allclose(times, np.arange(8) / 6, atol=0.011)  # a GIF counts hundredths
    before = path.read_bytes()
    Folder(tmp_path).write(path.name, _clip(), 6.0, ASKED)
    assert path.read_bytes() == before


def test_a_folder_has_one_writer_who_knows_what_the_one_before_made(tmp_path: Path) -> None:
    second, name = Folder(tmp_path), "000-a-s3-0.png"
    with Folder(tmp_path).held(Progress()):
        Folder(tmp_path).write(name, _picture(), None, ASKED)
        with pytest.raises(UnimodalError, match=f"process {os.getpid()}"), second.held(Progress()):
            pass
    with second.held(Progress()):
        second.finish()
    assert name in (tmp_path / "results.jsonl").read_text()


def test_what_is_there_from_the_same_is_done_and_from_another_is_not(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write("000-a-s3-0.png", _picture(), None, ASKED)
    folder.write("000-a-s3-0.mp4", _clip(), 6.0, ASKED)
    folder.write("000-a-s3-0.txt", "a kite\r\n«yes»", None, ASKED)
    folder.write("000-a-s3-0", ["a", _picture()], None, {**ASKED, "given": 1})
    again = Folder(tmp_path)
    for name in ("000-a-s3-0.png", "000-a-s3-0.mp4", "000-a-s3-0.txt"):
        record = again.done(name, ASKED)
        assert record == folder.records[name]
        assert again.done(name, {**ASKED, "seed": 4}) is None
        assert again.done(name, {**ASKED, "negative": "x"}) is None
        assert again.done(name, {k: v for k, v in ASKED.items() if k != "guidance"}) is None
    assert again.done("000-a-s3-0", {**ASKED, "given": 1}) == folder.records["000-a-s3-0"]
    assert again.done("001-a-s3-0.png", ASKED) is None
    (tmp_path / "000-a-s3-0.txt").write_text("changed")
    assert again.done("000-a-s3-0.txt", ASKED) is None
    (tmp_path / "000-a-s3-0.png").write_bytes(b"\x89PNG half of it")
    assert again.done("000-a-s3-0.png", ASKED) is None


def test_results_come_to_one_order_whatever_happened_before(tmp_path: Path) -> None:
    names = ["010-a-s3-0.png", "002-b-s3-1.png", "002-b-s3-0.png", "1000-c-s3-0.png"]
    whole = Folder(tmp_path / "whole")
    for name in names:
        whole.write(name, _picture(), None, ASKED)
    whole.finish()
    torn = Folder(tmp_path / "torn")
    for name in names[:2]:
        torn.write(name, _picture(), None, ASKED)
    results = tmp_path / "torn" / outputs.RESULTS
    with results.open("ab") as file:
        file.write(b'{"file": "1000-c')  # killed in the middle of a line
    (tmp_path / "torn" / ".010-a-s3-0.png.999999999.tmp").write_bytes(b"half")
    mine = tmp_path / "torn" / f".x.png.{os.getpid()}.tmp"
    mine.write_bytes(b"of a process that is alive")
    again = Folder(tmp_path / "torn")
    for name in names[2:]:
        again.write(name, _picture(), None, ASKED)
    assert all(json.loads(line) for line in results.read_bytes().splitlines()[3:])
    again.finish()
    assert results.read_bytes() == (tmp_path / "whole" / outputs.RESULTS).read_bytes()
    listed = [json.loads(line)["file"] for line in results.read_text().splitlines()]
    assert listed == ["002-b-s3-0.png", "002-b-s3-1.png", "010-a-s3-0.png", "1000-c-s3-0.png"]
    assert mine.exists() and not list((tmp_path / "torn").glob(".*.999999999.tmp"))
    (tmp_path / "torn" / "010-a-s3-0.png").unlink()
    Folder(tmp_path / "torn").finish()
    assert b"010-a" not in results.read_bytes()


def test_failed_lines_are_listed_while_there_are_any(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.finish([{"line": 2, "reason": "no prompt", "given": {"seed": 1}}])
    assert json.loads((tmp_path / outputs.FAILED).read_text())["line"] == 2
    folder.finish()
    assert not (tmp_path / outputs.FAILED).exists()


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file/out cannot be written: .*name another -o"):
        Folder(tmp_path / "file" / "out")
    with pytest.raises(UsageError, match="cannot be written"):
        Folder(Path("/proc"))  # is there, and takes no files


def test_a_full_disk_is_told_of_and_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path)
    folder.write("000-a-s3-0.png", _picture(), None, ASKED)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(outputs, "_put", full)
    with pytest.raises(UnimodalError, match="the disk is full"):
        folder.write("001-a-s3-0.png", _picture(), None, ASKED)
    assert Folder(tmp_path).done("000-a-s3-0.png", ASKED) is not None
    assert [p.name for p in sorted(tmp_path.glob("*.png"))] == ["000-a-s3-0.png"]


def test_a_sheet_holds_pictures_of_any_size_and_the_middle_of_clips(tmp_path: Path) -> None:
    small, large = np.zeros((8, 8, 3), np.uint8), np.full((16, 24, 3), 9, np.uint8)
    sheet = contact_sheet([small, large, small], 2)
    assert sheet.shape == (16 + 2 + 16, 24 + 2 + 24, 3)
    assert not sheet[4:12, 8:16].any() and (sheet[:4] == 255)[:, :24].all()
    assert (sheet[:16, 26:] == 9).all()
    folder = Folder(tmp_path)
    clip = np.stack([np.full((16, 24, 3), 10 * frame, np.uint8) for frame in range(8)])
    folder.write("000-a-s0-0.webp", clip, 8.0, ASKED)
    folder.write("001-a-s0-0.png", large, None, ASKED)
    path = folder.sheet(["000-a-s0-0.webp", "001-a-s0-0.png"], 0, 8, {"prompts": ["a", "b"]})
    shown = np.asarray(Image.open(path))
    assert (shown[:, :24] == 40).all() and (shown[:, 26:] == 9).all()
    assert read_about(path) == {"prompts": ["a", "b"]}


def test_a_document_is_a_folder_that_can_be_read_and_gone_on_with(tmp_path: Path) -> None:
    from unimodal.cli.given import read_document

    asked = {**ASKED, "given": 1}
    path = Folder(tmp_path).write("000-a-s0-0", ["<i>one", _picture(), "two"], None, asked)
    listed = json.loads((path / "document.json").read_text())
    assert listed["document"] == [{"text": "<i>one"}, {"image": "01.png"}, {"text": "two"}]
    assert np.array_equal(np.asarray(Image.open(path / "01.png")), _picture())
    page = (path / "index.html").read_text()
    assert "&lt;i&gt;one" in page and 'src="01.png"' in page and "<i>one" not in page
    pieces, name = read_document("000-a-s0-0/document.json", tmp_path)
    assert name == "document.json"
    assert pieces == [("text", "<i>one"), ("image", str(path / "01.png")), ("text", "two")]


def test_names_are_plain_and_of_bounded_length() -> None:
    assert name_of(3, "a red kite in the sky", 7, 1) == "003-a-red-kite-in-the-sky-s7-1"
    name = name_of(3, "A red kite, in the sky!", 7, 1)
    assert re.fullmatch("003-a-red-kite-in-the-sky-[0-9a-f]{8}-s7-1", name)
    assert name_of(0, "", 0, 0) == "000-empty-s0-0"
    assert re.fullmatch("000-empty-[0-9a-f]{8}-s0-0", name_of(0, "../../…", 0, 0))
    assert len(name_of(0, "word " * 100, 0, 0)) < 64


def test_names_keep_words_of_every_script_and_no_two_prompts_share_one() -> None:
    assert name_of(0, "красный змей", 0, 0) == "000-красный-змей-s0-0"
    assert name_of(0, "一只红色的风筝", 0, 0) == "000-一只红色的风筝-s0-0"
    assert name_of(0, "लाल पतंग", 0, 0) == "000-लाल-पतंग-s0-0"  # vowel signs are of the word
    prompts = ["", "empty", "a cat", "A cat", "a cat!", "a  cat", "a-cat", "!", "?", "é", "e\u0301"]
    prompts += ["猫" * 40, "猫" * 41, "猫" * 80, "word " * 20, "word " * 21, "\ud800"]
    slugs = [slug_of(prompt) for prompt in prompts]
    assert len(set(slugs)) == len(prompts)
    assert all(len(one) <= 48 and len(one.encode()) <= 120 and "/" not in one for one in slugs)


def test_only_temporary_files_of_ours_are_swept_away(tmp_path: Path) -> None:
    theirs = [".database.999999999.tmp", ".x.png.999999999.tmp", ".results.csv.999999999.tmp"]
    ours = ["000-a-s0-0.png", "000-ж-s0-0.partial.png", "1000-b-s1-12.mp4", "sheet-s0.png"]
    ours = [f".{one}.999999999.tmp" for one in [*ours, "results.jsonl", "failed.jsonl"]]
    for name in [*theirs, *ours]:
        (tmp_path / name).write_bytes(b"half")
    Folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(theirs)
