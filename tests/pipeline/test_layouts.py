"""Other tools' own loaders read what is exported for them, and find what they are told."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unimodal.pipeline import media
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.layouts import OPEN_SORA, export_dataset
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.run import Run, curate
from unimodal.pipeline.settings import build

SETS = [
    'skip=["text", "quality", "embed", "nsfw", "match", "dedup"]',
    *("decide.image_min_area=0", "decide.video_min_side=0", "decide.flow_min=none", "report=false"),
    *("decide.flow_max=none", "decide.video_min_s=none", "cut.max_clip_s=1.5"),
]
HARD = 'two\nlines, a "quote", naïve\x00 ☃ '
"""A caption that trips readers of lines, of tables and of C strings."""


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    emoji: list[Path],
    moving: Callable[..., list[np.ndarray]],
    write_video: Callable[..., Path],
) -> Path:
    """A video of two clips and one of uneven frame rate, two pictures; captions of all kinds."""
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "even.mp4", moving(60, size=(64, 96)))
    pts = [100 * i + 30 * (i % 3) for i in range(24)]
    write_video(folder / "uneven.mp4", moving(24, size=(96, 64), seed=3), pts=pts)
    (folder / "even.txt").write_text(HARD, encoding="utf-8")
    (folder / "uneven.txt").write_text("None")  # which readers of CSV take for nothing
    for path in emoji[:2]:
        shutil.copy(path, folder)
    (folder / f"{emoji[0].stem}.txt").write_text("a picture")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings = build(CurateSettings, sets=[*SETS, "parts.max_sources=3"])
    return curate([folder], tmp_path_factory.mktemp("run") / "run", settings, engine="inline")


def _truth(run: Run) -> dict[str, dict[str, Any]]:
    """Rows of the clips by uid, with the text that tools should see."""
    said = {HARD.strip(): 'two lines, a "quote", naïve ☃'}
    found = {}
    for row in run.clips.to_pylist():
        text = (row["captions"] or [{"text": ""}])[0]["text"]
        found[row["uid"]] = row | {"said": said.get(text.strip(), text)}
    return found


def _frames(path: Path | str) -> list[np.ndarray]:
    return [pixels for _, pixels in media.iter_frames(Path(path))]


def test_there_are_clips_of_all_kinds(run: Run) -> None:
    truth = _truth(run)
    assert len(truth) == run.kept == 5 and run.quarantined == 0
    assert {row["said"] for row in truth.values()} == {
        'two lines, a "quote", naïve ☃',
        "None",
        "a picture",
        "",
    }


def test_hugging_face_datasets_loads_videos_and_images(run: Run, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    out = tmp_path / "out"
    done = export_dataset(run, out, "huggingface")
    assert done.written == 5 and not done.failed
    truth = _truth(run)

    def load(kind: str) -> Any:
        return datasets.load_dataset(
            f"{kind}folder",
            data_dir=str(out / f"{kind}s"),
            split="train",
            cache_dir=str(tmp_path / "cache"),
        )

    images = load("image")
    assert len(images) == 2
    for row in images:
        assert row["caption"] == truth[row["uid"]]["said"]
        pixels = media.read_image(Path(truth[row["uid"]]["uri"]))
        assert np.array_equal(np.asarray(row["image"]), pixels)
    videos = load("video").cast_column("video", datasets.Video(decode=False))
    assert len(videos) == 3
    for row in videos:
        told = truth[row["uid"]]
        assert row["caption"] == told["said"]
        assert (row["frames"], row["width"]) == (told["frames"], told["width"])
        assert row["flow_mean"] == pytest.approx(told["flow_mean"])
        assert len(_frames(row["video"]["path"])) == row["frames"]
        assert "aesthetic" not in row  # no column of nothing


@pytest.mark.parametrize("kind", ["image", "video"])
def test_hugging_face_knows_by_itself_what_the_folder_holds(
    run: Run, tmp_path: Path, kind: str
) -> None:
    datasets = pytest.importorskip("datasets")
    export_dataset(run, tmp_path / "out", "huggingface", where=f"kind = '{kind}'")
    loaded = datasets.load_dataset(
        str(tmp_path / "out" / f"{kind}s"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert {kind, "caption"} <= set(loaded.column_names)
    assert len(loaded) == len([row for row in _truth(run).values() if row["kind"] == kind])


def test_hugging_face_decodes_the_videos(run: Run, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    try:
        from torchcodec.decoders import VideoDecoder

        VideoDecoder(b"no video")
    except Exception as error:  # it wants FFmpeg's shared libraries, and says so when it is used
        if isinstance(error, ImportError | OSError) or "load libtorchcodec" in str(error):
            pytest.skip(f"torchcodec cannot be used: {error}".splitlines()[0])
    export_dataset(run, tmp_path / "out", "huggingface", where="kind = 'video'")
    data = datasets.load_dataset("videofolder", data_dir=str(tmp_path / "out" / "videos"))
    for row in data["train"]:
        assert row["video"].metadata.num_frames == row["frames"]


def test_a_folder_of_finetrainers_has_one_table_and_captions_in_it(
    run: Run, tmp_path: Path
) -> None:
    export_dataset(run, tmp_path, "huggingface")
    # Its loader takes a folder with exactly one of these for `datasets`' videofolder.
    tables = ["metadata.json", "metadata.jsonl", "metadata.csv"]
    for folder in (tmp_path / "videos", tmp_path / "images"):
        assert [name for name in tables if (folder / name).exists()] == ["metadata.jsonl"]
        for line in (folder / "metadata.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert isinstance(row["caption"], str) and (folder / row["file_name"]).is_file()
        assert not [*folder.glob("*.parquet"), *folder.glob("*.tar")]


def test_video_dataset_scripts_join_by_the_name_of_a_file(run: Run, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    export_dataset(run, tmp_path, "huggingface")
    table = pandas.read_parquet(tmp_path / "videos.parquet")
    there = {path.name for path in (tmp_path / "videos").glob("*.mp4")}
    assert set(table["file"]) == there and len(table) == 3


@pytest.mark.parametrize("file", ["meta.csv", "meta.parquet"])
def test_open_sora_finds_its_columns_and_they_are_true(run: Run, tmp_path: Path, file: str) -> None:
    pandas = pytest.importorskip("pandas")
    export_dataset(run, tmp_path / "out", "open-sora", crop=True)
    path = tmp_path / "out" / file
    table = pandas.read_csv(path) if file.endswith("csv") else pandas.read_parquet(path)
    assert list(table.columns[:8]) == OPEN_SORA and len(table) == 5
    truth = _truth(run)
    for row in table.to_dict("records"):
        told = truth[row["uid"]]
        if file.endswith("parquet"):
            assert row["text"] == told["said"]
        if told["kind"] == "video":
            frames = _frames(row["path"])
            assert row["fps"] == pytest.approx(told["fps"])
        else:
            frames = [media.read_image(Path(row["path"]))]
            assert np.isnan(row["fps"])
        assert len(frames) == row["num_frames"]
        assert frames[0].shape[:2] == (row["height"], row["width"])
        assert row["aspect_ratio"] == pytest.approx(row["height"] / row["width"])
        assert row["resolution"] == row["height"] * row["width"]
    with (tmp_path / "out" / "meta.csv").open(newline="") as stream:
        assert {row["text"] for row in csv.DictReader(stream)} == {
            row["said"] for row in truth.values()
        }


def test_plain_webdataset_reads_clips_and_captions(run: Run, tmp_path: Path) -> None:
    import webdataset

    done = export_dataset(run, tmp_path, "webdataset")
    truth = _truth(run)
    tars = sorted(tmp_path.glob("*.tar"))
    assert done.written == 5 and len(tars) == 2
    sources: list[set[str]] = []
    found = {}
    for tar in tars:
        sources.append(set())
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
            note = json.loads(sample["json"])
            found[sample["__key__"]] = sample
            sources[-1].add(note["uri"])
            told = truth[sample["__key__"]]
            assert note["uid"] == sample["__key__"] and sample["txt"].decode() == told["said"]
            suffix = "mp4" if told["kind"] == "video" else "png"
            (tmp_path / "one").write_bytes(sample[suffix])
            if suffix == "mp4":
                assert len(_frames(tmp_path / "one")) == told["frames"]
            else:
                pixels = media.read_image(Path(told["uri"]))
                assert np.array_equal(media.read_image(tmp_path / "one"), pixels)
    assert set(found) == set(truth)
    assert not sources[0] & sources[1]  # a split by tars is one by sources


def _energon(*arguments: str | Path) -> str:
    code = "from megatron.energon.cli.main import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PREPARE = ["--non-interactive", "--no-progress", "--num-workers", "1", "--sample-type"]


@pytest.mark.slow
def test_energon_prepares_and_loads_clips(run: Run, tmp_path: Path) -> None:
    energon = pytest.importorskip("megatron.energon")
    export_dataset(run, tmp_path, "webdataset")
    split = ["--split-ratio", "1,0,0"]
    _energon("prepare", tmp_path, *PREPARE, "CrudeWebdataset", *split)
    assert (tmp_path / ".nv-meta" / "dataset.yaml").is_file()
    data = energon.get_train_dataset(
        str(tmp_path),
        batch_size=1,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        repeat=False,
        task_encoder=Crude(energon)(),
    )
    truth = _truth(run)
    seen = {}
    for sample in energon.get_loader(data):
        seen[sample["__key__"].split("/")[-1]] = sample
    assert set(seen) == set(truth)
    for uid, sample in seen.items():
        assert sample["txt"] == truth[uid]["said"]
        assert sample["json"]["verdict"] == "keep"


def Crude(energon: Any) -> Any:
    """What a user writes: samples as they are in the tar."""

    @energon.stateless
    def cook(sample: dict[str, Any]) -> dict[str, Any]:
        return sample

    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc]
        cookers = [energon.Cooker(cook)]  # noqa: RUF012

        def batch(self, samples: list[Any]) -> Any:
            return samples[0]

        def encode_batch(self, batch: Any) -> Any:
            return batch

    return Encoder


def _bytes(out: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir() if p.is_file()}


def test_tars_that_are_done_are_kept_and_the_rest_is_made(
    folder: Path, tmp_path: Path, emoji: list[Path]
) -> None:
    source = tmp_path / "in"
    shutil.copytree(folder, source)
    settings = build(CurateSettings, sets=[*SETS, "parts.max_sources=2"])

    def again() -> Run:
        return curate([source], tmp_path / "run", settings, engine="inline")

    out = tmp_path / "out"
    run = again()
    first = export_dataset(run, out, "webdataset")
    before = _bytes(out)
    same = export_dataset(run, out, "webdataset")
    assert (same.written, same.kept) == (0, first.written) and _bytes(out) == before
    for damaged in ("[]", '{"0123456789abcdef": 3}', "{"):
        (out / "tars.json").write_text(damaged)
        assert export_dataset(run, out, "webdataset").written == first.written
        assert _bytes(out).keys() == before.keys()
        assert _bytes(out)["tars.json"][0] == before["tars.json"][0]
    before = _bytes(out)

    (lost, *_) = sorted(out.glob("*.tar"))
    lost.unlink()
    (out / ".killed").mkdir()  # as an interrupted export leaves behind; none of ours is in it
    export_dataset(run, out, "webdataset")
    assert {n: v[0] for n, v in _bytes(out).items()} == {n: v[0] for n, v in before.items()}

    (source / f"{emoji[1].stem}.txt").write_text("it has a caption now")
    changed = export_dataset(again(), out, "webdataset")
    assert 0 < changed.written < first.written  # the tar of that part, not the others
    texts = set()
    for tar in out.glob("*.tar"):
        with tarfile.open(tar) as opened:
            for member in opened:
                if member.name.endswith(".txt"):
                    texts.add(opened.extractfile(member).read().decode())  # type: ignore[union-attr]
    assert "it has a caption now" in texts

    for path in source.glob(f"{emoji[1].stem}*"):
        path.unlink()
    fewer = again()
    export_dataset(fewer, out, "webdataset")
    keys = {member.split(".")[0] for tar in out.glob("*.tar") for member in _members(tar)}
    assert keys == set(_truth(fewer))


def _members(tar: Path) -> list[str]:
    with tarfile.open(tar) as opened:
        return opened.getnames()


def test_a_source_that_is_gone_is_told_and_tried_again(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(folder, source)
    settings = build(CurateSettings, sets=[*SETS, "parts.max_sources=3"])
    run = curate([source], tmp_path / "run", settings, engine="inline")
    (source / "uneven.mp4").rename(tmp_path / "away.mp4")
    done = export_dataset(run, tmp_path / "out", "webdataset")
    assert [Path(row["uri"]).name for row in done.failed] == ["uneven.mp4"]
    assert "no such file" in (tmp_path / "out" / "failed.jsonl").read_text()
    shutil.move(tmp_path / "away.mp4", source / "uneven.mp4")
    done = export_dataset(run, tmp_path / "out", "webdataset")
    assert not done.failed and not (tmp_path / "out" / "failed.jsonl").exists()
    assert done.written + done.kept == run.kept


def test_mistakes_name_what_was_written(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no layout finetrainers: there are huggingface"):
        export_dataset(run, tmp_path / "out", "finetrainers")  # type: ignore[arg-type]
    for layout in ("huggingface", "open-sora", "webdataset"):
        for where in ("nothing > 3", "kind = 'video'); SELECT (1"):
            with pytest.raises(UsageError, match="cannot be evaluated"):
                export_dataset(run, tmp_path / "out", layout, where=where)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    trick = "kind = 'image') OR (kind = 'image' -- only"
    done = export_dataset(run, tmp_path / "out", "huggingface", where=trick)
    assert done.written == 2 and not (tmp_path / "out" / "videos").exists()


def test_a_part_or_kind_that_a_stranger_named_is_no_path(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    clips = run.clips
    for column in ("part", "kind"):
        at = clips.schema.get_field_index(column)
        names = pa.array([f"../{name}" for name in clips.column(column).to_pylist()])
        clips = clips.set_column(at, clips.schema.field(at), names)
    pq.write_table(clips, tmp_path / "run" / "clips.parquet")
    hostile = Run.open(tmp_path / "run")
    with pytest.raises(UnimodalError, match="is no name of a part"):
        export_dataset(hostile, tmp_path / "a" / "out", "webdataset")
    export_dataset(hostile, tmp_path / "b" / "out", "huggingface")
    assert not [*(tmp_path / "a" / "out").iterdir(), *(tmp_path / "b" / "out").iterdir()]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["out"]


def test_the_command_prints_the_folder_and_what_it_did(run: Run, tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "unimodal.cli", "export", "dataset", "-"]
        out = ["-o", str(tmp_path / "out"), *arguments]
        return subprocess.run(
            [*command, *out], input=f"{run.path}\n", capture_output=True, text=True
        )

    done = call("--layout", "open-sora", "--json", "--quiet", "--where", "kind = 'image'")
    assert done.returncode == 0, done.stderr
    record = {"path": str(tmp_path / "out"), "written": 2, "kept": 0, "failed": 0}
    assert json.loads(done.stdout) == record and not done.stderr
    wrong = call("--layout", "finetrainers")
    assert wrong.returncode == 2 and "there are huggingface, open-sora" in wrong.stderr
