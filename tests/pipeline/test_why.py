"""`why`: one clip or one file explained, from what the run has written down."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.run import Run, curate
from unimodal.pipeline.settings import build
from unimodal.pipeline.why import stamp, text, why

SETTINGS = build(
    CurateSettings,
    sets=[
        'skip=["text", "quality", "embed", "nsfw", "match"]',
        *("decide.image_min_area=0", "report=false", "cut.max_clip_s=3"),
    ],
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, bikes: Path, emoji: list[Path]) -> Run:
    folder = tmp_path_factory.mktemp("why") / "in"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(bikes, folder)
    for path in emoji[:6]:
        shutil.copy(path, folder)
    shutil.copy(emoji[0], folder / "deep" / "twin.png")
    shutil.copy(emoji[1], folder / "deep" / "same.png")
    shutil.copy(emoji[2], folder / "same.png")
    (folder / f"{emoji[0].stem}.txt").write_text("two\nlines \x1b[31mred\x1b[0m \u202etxet")
    (folder / "broken.mp4").write_text("no video")
    return curate([folder], folder.parent / "run", SETTINGS, engine="inline")


def test_a_clip_is_found_by_the_shortest_beginning_that_names_it(run: Run) -> None:
    uids = run.clips.column("uid").to_pylist()
    for uid in uids:
        short = next(uid[:n] for n in range(1, 33) if sum(u.startswith(uid[:n]) for u in uids) == 1)
        assert why(run, short)["clip"]["uid"] == uid
    many = next(u[0] for u in uids if sum(v[0] == u[0] for v in uids) > 1)
    with pytest.raises(UsageError, match=rf"uids begin with it \({many}"):
        why(run, many)


def test_what_is_said_of_a_clip_is_what_its_row_says(run: Run) -> None:
    for row in run.clips.to_pylist():
        found = why(run, row["uid"])
        assert {name: row[name] for name in found["clip"]} == found["clip"]
        assert found["verdict"] == row["verdict"] and found["reasons"] == row["reasons"]
        failed = {rule["keep"] for rule in found["rules"] if rule["result"] == "fail"}
        assert failed == {reason.split(":", 2)[2] for reason in row["reasons"]}
        for rule in found["rules"]:
            if rule["result"] in ("pass", "fail") and rule["threshold"] is not None:
                holds = rule["value"] >= rule["threshold"]
                assert holds == ((rule["result"] == "pass") == (">" in rule["keep"]))
            if rule["result"].startswith("speaks"):
                assert row["kind"] not in rule["result"]
        assert found["scores"]["luma_mean"] == row["luma_mean"]
        assert found["frames"]["members"] == [
            sample["member"] for sample in run.samples(row["part"])[row["uid"]]
        ]
        assert Path(found["frames"]["tar"]).exists()
        json.dumps(found)


def test_a_clip_names_what_it_was_cut_by_and_the_files_it_is_written_in(run: Run) -> None:
    rows = [row for row in run.clips.to_pylist() if row["kind"] == "video"]
    assert {row["starts_at"] for row in rows} == {"source", "cut", "split"}
    for row in rows:
        found = why(run, row["uid"])
        for side in ("start", "end"):
            told = found["begins" if side == "start" else "ends"]
            assert {"source": "video", "split": "split", "cut": "a cut"}[row[f"{side}s_at"]] in told
            if row[f"{side}_cut"]:
                assert f"{row[f'{side}_cut']['threshold']:.4g}" in told
                assert row[f"{side}_cut"]["detector"] in told
        files = {stage["stage"]: stage.get("file") for stage in found["stages"]}
        assert {"watch", "caption", "decide"} <= files.keys()
        for stage in found["stages"]:
            assert "skipped" in stage or (run.path / stage["file"]).is_file()
        assert row["part"] in files["watch"]
        watch = next(stage for stage in found["stages"] if stage["stage"] == "watch")
        assert watch["settings"]["cut"]["max_clip_s"] == 3
        assert "unimodal" in found["versions"]


def test_a_file_is_found_by_its_path_its_end_and_its_copies(run: Run) -> None:
    folder = run.path.parent / "in"
    uri = str(folder / "bikes.mp4")
    for name in (uri, "bikes.mp4", "in/bikes.mp4"):
        found = why(run, name)
        assert found["source"] == uri
        mine = run.clips.filter(np.array(run.clips.column("uri").to_pylist()) == uri)
        assert [clip["uid"] for clip in found["clips"]] == mine.column("uid").to_pylist()
    twin = why(run, "twin.png")
    assert len(twin["clips"]) == 1 and "stands for it" in twin["note"]
    with pytest.raises(UsageError, match="2 sources end with it"):
        why(run, "same.png")
    assert why(run, "deep/same.png")["clips"]


def test_a_file_that_is_not_in_the_run_is_told_why(run: Run, tmp_path: Path, bikes: Path) -> None:
    found = why(run, "broken.mp4")
    assert found["clips"] == [] and "not a video" in found["quarantine"][0]["reason"]
    assert "quarantined by watch" in text(found)
    (tmp_path / "notes.pdf").write_text("")
    assert "not that of media" in why(run, str(tmp_path / "notes.pdf"))["note"]
    shutil.copy(bikes, tmp_path / "other.mp4")
    assert "not among the inputs" in why(run, str(tmp_path / "other.mp4"))["note"]
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.mp4").write_text("")
    assert "hidden" in why(run, str(tmp_path / ".cache" / "a.mp4"))["note"]
    assert "a folder" in why(run, str(tmp_path))["note"]


def test_a_mistyped_name_or_uid_is_answered_with_the_nearest(run: Run) -> None:
    with pytest.raises(UsageError, match=r"did you mean .*bikes\.mp4"):
        why(run, "bikse.mp4")
    uid = sorted(run.clips.column("uid").to_pylist())[2]
    wrong = uid[:30] + ("00" if uid[30:] != "00" else "11")
    with pytest.raises(UsageError, match=f"the nearest are .*{uid}"):
        why(run, wrong)
    with pytest.raises(UsageError, match="neither a uid nor a source"):
        why(run, "zzz")


def test_near_duplicates_are_listed_with_what_became_of_them(
    tmp_path: Path, photos: Path, write_video: Callable[..., Path]
) -> None:
    from PIL import Image

    picture = Image.open(photos / "astronaut.png").convert("RGB")
    (tmp_path / "in").mkdir()
    picture.save(tmp_path / "in" / "large.png")
    picture.resize((256, 256)).save(tmp_path / "in" / "small.jpg", quality=60)
    run = curate([tmp_path / "in"], tmp_path / "run", SETTINGS, engine="inline")
    verdicts = dict(
        zip(*(run.clips.column(c).to_pylist() for c in ("uid", "verdict")), strict=True)
    )
    for uid, verdict in verdicts.items():
        found = why(run, uid)
        assert {row["uid"]: row["verdict"] for row in found["duplicates"]} == verdicts
        last = found["rules"][-1]
        assert last["settings"] == ["decide.dedup"]
        assert last["result"] == ("pass" if verdict == "keep" else "fail")
        assert "(this one)" in text(found)
    assert sorted(verdicts.values()) == ["drop", "keep"]


def test_no_control_character_of_a_stranger_reaches_the_terminal(run: Run) -> None:
    for uid in run.clips.column("uid").to_pylist():
        lines = text(why(run, uid))
        assert not {c for c in lines if (ord(c) < 32 and c != "\n") or c in "\x7f\x9b\u202e"}
    captioned = next(r["uid"] for r in run.clips.to_pylist() if r["captions"])
    assert "two lines \ufffd[31mred" in text(why(run, captioned))


def test_times_are_written_as_people_write_them() -> None:
    assert [stamp(s) for s in (0, 3.25, 59.999, 61.5, 3723.04)] == [
        *("0:00", "0:03.25", "1:00", "1:01.5", "1:02:03.04")
    ]
