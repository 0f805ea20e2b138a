"""`curate` from end to end: what is made, what is kept, what is made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from unimodal.pipeline.clips import CLIPS
from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.presets import PRESETS, CurateSettings
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.run import Run, curate
from unimodal.pipeline.settings import build

Tree = Callable[[Path], dict[str, bytes]]
SMALL = build(
    CurateSettings,
    sets=["parts.max_sources=4", "decide.image_min_area=0", 'skip=["text", "quality"]'],
)


@pytest.fixture
def pictures(tmp_path: Path, emoji: list[Path]) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in emoji[:10]:
        shutil.copy(path, folder)
    return folder


def _curate(*inputs: Path, out: Path, settings: CurateSettings = SMALL, **more: object) -> Run:
    return curate(inputs, out, settings, engine="inline", **more)  # type: ignore[arg-type]


def _without_parts(run: Run) -> list[dict[str, object]]:
    return run.clips.drop_columns(["part"]).to_pylist()


def test_a_run_has_the_promised_files(tmp_path: Path, bikes: Path, pictures: Path) -> None:
    (pictures / "bad.mp4").write_text("no video")
    run = _curate(pictures, bikes, out=tmp_path / "run")
    assert run.clips.schema.equals(CLIPS)
    assert run.kept + run.dropped == run.clips.num_rows
    assert run.quarantine.column("reason").to_pylist() == [
        "not a video that can be read (Invalid data found when processing input)"
    ]
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["totals"]["sources"] == 12 and info["totals"]["quarantined"] == 1
    assert info["settings"]["parts"]["max_sources"] == 4
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("run.json", "parts.parquet", "clips.parquet", "quarantine.parquet", "report.html"),
        *info["stages"].values(),
    }
    for part in set(run.clips.column("part").to_pylist()):
        assert run.frames_tar(part).exists()
    order = [(row["uri"], row["start_pts"] or 0) for row in run.clips.to_pylist()]
    assert order == sorted(order)
    uids = run.clips.column("uid").to_pylist()
    assert len(set(uids)) == len(uids)
    assert Run.open(tmp_path / "run").clips.equals(run.clips)


def test_a_run_that_is_repeated_decodes_and_writes_nothing(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    _curate(pictures, out=out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.*") if p.name != "run.json"}

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a source was opened again")

    monkeypatch.setattr("unimodal.pipeline.watch._watch_source", never)
    _curate(pictures, out=out)
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.*") if p.name != "run.json"}


def test_a_changed_threshold_decides_anew_and_decodes_nothing(
    tmp_path: Path, pictures: Path
) -> None:
    out = tmp_path / "run"
    first = _curate(pictures, out=out)
    rows = _without_parts(first)
    watched = {p: p.stat().st_mtime_ns for p in out.glob("watch-*/*")}
    strict = build(CurateSettings, PRESETS["best"], sets=["parts.max_sources=4"])
    second = _curate(pictures, out=out, settings=strict)
    assert (len([r for r in rows if r["verdict"] == "keep"]), second.kept) == (10, 0)
    assert watched == {p: p.stat().st_mtime_ns for p in out.glob("watch-*/*")}
    assert _without_parts(_curate(pictures, out=out)) == rows


def test_a_changed_detector_works_in_a_folder_of_its_own(tmp_path: Path, bikes: Path) -> None:
    out = tmp_path / "run"
    assert _curate(bikes, out=out).clips.num_rows == 5
    settings = build(CurateSettings, PRESETS["emu3"])
    assert _curate(bikes, out=out, settings=settings).clips.num_rows == 6
    assert len(list(out.glob("watch-*"))) == 2


def test_added_removed_and_edited_files_give_what_a_fresh_run_gives(
    tmp_path: Path, pictures: Path, emoji: list[Path]
) -> None:
    out = tmp_path / "run"
    _curate(pictures, out=out)
    names = sorted(path.name for path in pictures.iterdir())
    shutil.copy(emoji[20], pictures / "0000.png")  # sorts first: no part may shift
    (pictures / names[3]).unlink()
    shutil.copy(emoji[21], pictures / names[5])
    shutil.copy(pictures / names[6], pictures / "zz-copy.png")
    before = {p.name for p in out.glob("watch-*/*")}
    changed = _curate(pictures, out=out)
    fresh = _curate(pictures, out=tmp_path / "fresh")
    assert _without_parts(changed) == _without_parts(fresh)
    assert changed.clips.num_rows == 10
    made = {p.name for p in out.glob("watch-*/*")} - before
    assert len({name.split(".")[0] for name in made}) == 1  # the two new pictures, in one part
    assert before < {p.name for p in out.glob("watch-*/*")}


def test_a_moved_file_keeps_its_ids(tmp_path: Path, pictures: Path) -> None:
    first = _curate(pictures, out=tmp_path / "a")
    moved = pictures.rename(tmp_path / "elsewhere")
    second = _curate(moved, out=tmp_path / "b")
    assert first.clips.column("uid").to_pylist() == second.clips.column("uid").to_pylist()


def test_copies_are_one_clip_with_aliases(tmp_path: Path, pictures: Path) -> None:
    names = sorted(path.name for path in pictures.iterdir())
    shutil.copy(pictures / names[0], pictures / "copy.png")
    (pictures / "copy.txt").write_text("a caption of the copy")
    run = _curate(pictures, out=tmp_path / "run")
    assert run.clips.num_rows == 10
    row = run.clips.to_pylist()[0]
    assert [Path(uri).name for uri in row["aliases"]] == ["copy.png"]
    assert [caption["text"] for caption in row["captions"]] == ["a caption of the copy"]


def test_every_copy_of_a_file_that_cannot_be_read_is_in_the_quarantine(
    tmp_path: Path, pictures: Path
) -> None:
    for name in ("broken.png", "copy.png"):
        (pictures / name).write_bytes(b"\x89PNG\r\n\x1a\nno more")
    run = _curate(pictures, out=tmp_path / "run")
    rows = run.quarantine.to_pylist()
    assert [Path(row["uri"]).name for row in rows] == ["broken.png", "copy.png"]
    assert rows[0]["reason"] == rows[1]["reason"] and run.info["totals"]["quarantined"] == 2


def test_captions_come_by_precedence_and_their_edits_cost_no_decoding(
    tmp_path: Path, pictures: Path
) -> None:
    names = sorted(path.stem for path in pictures.iterdir())
    first = pictures / f"{names[0]}.png"
    (pictures / f"{names[0]}.txt").write_text("from the text file")
    (pictures / f"{names[0]}.json").write_text('{"caption": "from json"}')
    (pictures / f"{names[1]}.json").write_text("{broken")
    out = tmp_path / "run"
    run = _curate(pictures, out=out, captions={str(first): "given"})
    rows = run.clips.to_pylist()
    texts = [caption["text"] for caption in rows[0]["captions"]]
    assert texts == ["given", "from json", "from the text file"]
    assert rows[1]["captions"] == []
    (sick,) = run.quarantine.to_pylist()
    assert sick["stage"] == "caption" and Path(sick["uri"]).name == f"{names[1]}.json"

    watched = {p: p.stat().st_mtime_ns for p in out.glob("watch-*/*")}
    (pictures / f"{names[1]}.json").write_text('{"caption": "mended"}')
    run = _curate(pictures, out=out)
    rows = run.clips.to_pylist()
    assert [caption["text"] for caption in rows[1]["captions"]] == ["mended"]
    assert rows[0]["captions"][0]["text"] == "from json"
    assert watched == {p: p.stat().st_mtime_ns for p in out.glob("watch-*/*")}


def test_progress_counts_sources_and_seconds_of_video(
    tmp_path: Path, bikes: Path, pictures: Path
) -> None:
    class Count(Progress):
        def __init__(self) -> None:
            self.totals: dict[str, float] = {}
            self.sums: dict[str, float] = {}
            self.ended: list[str] = []

        def begin(self, task: str, total: float, unit: str) -> None:
            self.totals[task] = total

        def advance(self, task: str, amount: float = 1.0) -> None:
            self.sums[task] = self.sums.get(task, 0) + amount

        def end(self, task: str) -> None:
            self.ended.append(task)

    progress = Count()
    _curate(bikes, pictures, out=tmp_path / "run", progress=progress)
    assert progress.totals["sources"] == progress.sums["sources"] == 11
    assert progress.sums["video"] == pytest.approx(10.0)
    assert sorted(progress.ended) == ["sources", "video"]


def test_limit_takes_the_first_sources(tmp_path: Path, pictures: Path) -> None:
    run = _curate(pictures, out=tmp_path / "run", limit=3)
    assert run.clips.num_rows == 3
    assert _curate(pictures, out=tmp_path / "run").clips.num_rows == 10


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("42")
    with pytest.raises(UsageError, match="not empty and not a run directory"):
        _curate(pictures, out=tmp_path / "home")
    with pytest.raises(UsageError, match="not a finished run"):
        Run.open(tmp_path / "home")
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["thesis.txt"]


def test_a_rule_with_a_typing_error_is_told_before_anything_is_decoded(
    tmp_path: Path, pictures: Path
) -> None:
    settings = build(CurateSettings, sets=['decide.extra=["image: blurr > 3"]'])
    with pytest.raises(UsageError, match=r'decide\.extra "blurr > 3"'):
        _curate(pictures, out=tmp_path / "run", settings=settings)
    assert not (tmp_path / "run").exists()


def test_a_missing_input_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        _curate(tmp_path / "gone", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_nothing_but_broken_files_ends_with_an_empty_table(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("x")
    run = _curate(tmp_path / "a.mp4", out=tmp_path / "run")
    assert (run.clips.num_rows, run.kept, run.quarantined) == (0, 0, 1)
