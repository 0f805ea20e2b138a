"""`unimodal sample` as a command: every direction, batches, what is kept, and clear refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from unimodal.cli.outputs import read_about
from unimodal.pipeline.errors import harmless
from unimodal.pipeline.lock import run_lock
from unimodal.pipeline.progress import Progress

Call = Callable[..., tuple[int, str, str]]


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def _bytes(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


# --- directions ----------------------------------------------------------------------------


def test_pictures_of_a_prompt_with_their_origin_and_a_sheet(
    sample: Call, drawer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o"
    code, said, told = sample(drawer, "a red kite", "a cat", "-n", 2, "-o", out, "--seed", 5)
    names = [f"{stem}-s5-{copy}.png" for stem in ("000-a-red-kite", "001-a-cat") for copy in (0, 1)]
    assert code == 0 and said.splitlines() == [str(out / n) for n in [*names, "sheet-s5.png"]]
    assert re.search(r"sample: 4 done, 48 tokens in .* tokens/s\)", told)
    records = _records(out)
    assert [record["file"] for record in records] == names
    assert all(record["pixels"] == [24, 32] for record in records)  # as trained: 3x4 codes
    about = read_about(out / names[1])
    assert about == {key: value for key, value in records[1].items() if key != "file"}
    assert about["prompt"] == "a red kite" and (about["seed"], about["copy"]) == (5, 1)
    assert about["guidance"] == 3.0 and about["checkpoint"] and about["unimodal"]
    assert Image.open(out / "sheet-s5.png").size == (2 * 32 + 2, 2 * 24 + 2)


def test_the_pictures_are_the_samplers_own(sample: Call, drawer: Path, tmp_path: Path) -> None:
    from unimodal.model.sample import Sampler

    wanted = Sampler.load(drawer, "cpu").images(["a", "b"], n=2, seed=3, guidance=2.0)
    sample(drawer, "a", "b", "-n", 2, "--seed", 3, "--guidance", 2, "-o", tmp_path)
    for number, copies in enumerate(wanted):
        for copy, picture in enumerate(copies):
            name = f"{number:03d}-{'ab'[number]}-s3-{copy}.png"
            assert np.array_equal(np.asarray(Image.open(tmp_path / name)), picture)


def test_sizes_by_sides_by_ratio_and_free(sample: Call, drawer: Path, tmp_path: Path) -> None:
    def size(*more: str | int) -> tuple[int, int]:
        code, said, _ = sample(drawer, "a", "-o", tmp_path, *more)
        assert code == 0
        return Image.open(said.strip()).size

    assert size("--size", "16x40") == (40, 16)
    assert size("--ratio", "2:1", "--area", 2048) == (64, 32)
    assert size("--ratio", "1:3") == (16, 48)  # the area that training saw
    wide, high = size("--size", "free", "--seed", 1)
    assert wide % 8 == 0 and high % 8 == 0
    assert _records(tmp_path)[-1]["size"] == "free"


@pytest.mark.parametrize("form", ["mp4", "gif", "webp"])
def test_a_clip_of_a_prompt(sample: Call, drawer: Path, tmp_path: Path, form: str) -> None:
    more = ("--frames", 8, "--format", form, "--set", "fps=4")
    code, said, _ = sample(drawer, "a kite", "-o", tmp_path, *more)
    assert code == 0
    about = read_about(Path(said.strip()))
    assert about is not None and about["pixels"] == [8, 24, 32]
    assert (about["frames"], about["fps"]) == (8, 4.0)


def test_a_clip_goes_on_from_a_file_and_from_codes(
    sample: Call, drawer: Path, drawn_shards: Path, tmp_path: Path
) -> None:
    clip = f"{drawn_shards}#clip0004"
    code, said, _ = sample(drawer, "--continue", clip, "--frames", 8, "-o", tmp_path)
    assert code == 0 and said.strip() == str(tmp_path / "000-clip0004-s0-0.mp4")
    frames = _frames(Path(said.strip()))
    assert len(frames) == 12 + 8
    (record,) = _records(tmp_path)
    assert record["fps"] == 6.0 and record["inputs"][0]["name"] == "clip0004"
    code, said, _ = sample(
        *(drawer, "it goes on", "--continue", said.strip(), "--frames", 4, "-o", tmp_path / "b"),
    )
    assert code == 0 and len(_frames(Path(said.strip()))) == 20 + 4


def test_an_edit_needs_a_picture_and_warns_who_never_learned_it(
    sample: Call, drawer: Path, drawn_shards: Path, tmp_path: Path
) -> None:
    sample(drawer, "a", "-o", tmp_path)
    picture = tmp_path / "000-a-s0-0.png"
    for source in (picture, f"{drawn_shards}#picture0001"):
        more = ("--set", "image_guidance=1.5")
        code, said, told = sample(
            drawer, "make it red", "--edit", source, "-o", tmp_path / "e", *more
        )
        assert code == 0 and "never trained on edits" in told
        about = read_about(Path(said.strip()))
        assert about is not None and about["pixels"] == [24, 32]
        assert about["image_guidance"] == 1.5 and about["prompt"] == "make it red"
        assert not {"negative", "suffix"} & about.keys()  # they have no effect
    code, _, told = sample(drawer, "x", "--edit", f"{drawn_shards}#clip0004", "-o", tmp_path / "f")
    assert (code, told.splitlines()[-1]) == (
        2,
        "unimodal: clip0004 is a clip: edit takes pictures",
    )


def test_words_of_pictures_clips_and_codes(
    sample: Call, drawer: Path, drawn_shards: Path, tmp_path: Path
) -> None:
    sample(drawer, "a", "-o", tmp_path)
    picture, clip = tmp_path / "000-a-s0-0.png", f"{drawn_shards}#clip0004"
    more = ("--set", "max_tokens=6", "--json")
    code, said, _ = sample(drawer, "--describe", picture, clip, *more)
    assert code == 0
    described = [json.loads(line) for line in said.splitlines()]
    assert [one["inputs"][0]["name"] for one in described] == [picture.name, "clip0004"]
    assert all(isinstance(one["text"], str) for one in described)
    code, said, told = sample(drawer, "--ask", "which is red?", picture, clip, *more)
    assert code == 0 and len(json.loads(said)["inputs"]) == 2 and "never trained on q" in told
    code, said, _ = sample(drawer, "once upon", "--format", "text", *more)
    assert code == 0 and json.loads(said)["text"].startswith("once upon")
    code, said, _ = sample(drawer, "--describe", picture, "-o", tmp_path / "t", *more)
    assert (tmp_path / "t" / "000-000-a-s0-0-s0-0.txt").read_text() == json.loads(said)["text"]


def test_records_say_all_that_words_depend_on(
    sample: Call, drawer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unimodal.model.recipe import SamplingSettings
    from unimodal.model.sample import Sampler

    sample(drawer, "a", "-o", tmp_path)
    picture = tmp_path / "000-a-s0-0.png"
    about = json.loads((drawer / "data.json").read_text())
    assert _records(tmp_path)[0]["vision_tokenizer"] == about["vision_tokenizer"]["digest"]
    asked = (drawer, "--describe", picture, "--json", "-q")
    plain = json.loads(sample(*asked)[1])
    assert plain["max_tokens"] == 256 and plain["temperature"] == 0 and "ask" not in plain
    assert json.loads(sample(*asked, "--temperature", 0)[1]) == plain
    real = Sampler.load

    def load(*arguments: Any, **more: Any) -> Sampler:
        made = real(*arguments, **more)
        made.defaults = SamplingSettings(describe="what is it?", max_tokens=7, text_temperature=2)
        made.kind = "chat"
        return made

    monkeypatch.setattr(Sampler, "load", load)
    told = json.loads(sample(*asked)[1])
    assert told["ask"] == "what is it?" and told["max_tokens"] == 7 and told["kind"] == "chat"
    assert told["temperature"] == 2 and told["text"] != plain["text"]
    assert json.loads(sample(*asked, "--temperature", 0)[1])["temperature"] == 0


def test_of_a_longer_clip_it_is_said_once_what_is_looked_at(
    sample: Call, drawer: Path, drawn_shards: Path, tmp_path: Path
) -> None:
    """The checkpoint saw clips of twelve frames at six a second."""
    clip = f"{drawn_shards}#clip0004"
    said = sample(drawer, "--continue", clip, "--frames", 8, "-o", tmp_path)[1].strip()
    more = ("--set", "max_tokens=4")
    code, _, told = sample(drawer, "--describe", said, said, *more)
    assert code == 0
    assert told.count("of a clip the first 12 frames are looked at (2 s)") == 1
    short = sample(drawer, "a", "--frames", 12, "-o", tmp_path / "b")[1].strip()
    assert "looked at" not in sample(drawer, "--describe", short, *more)[2]


def test_a_described_picture_is_that_of_the_sampler(
    sample: Call, drawer: Path, drawn_shards: Path
) -> None:
    """Codes of shards are described as they are: pixels are never made of them."""
    from unimodal.model.sample import Sampler
    from unimodal.tokenize.shards import Shards

    shards = Shards.open(drawn_shards)
    codes = shards.codes(shards.row("picture0001"))[0].astype(np.int64)
    (wanted,) = Sampler.load(drawer, "cpu").describe([codes], max_tokens=8)
    more = ("--set", "max_tokens=8", "--json", "-q")
    code, said, told = sample(drawer, "--describe", f"{drawn_shards}#picture0001", *more)
    assert (code, told) == (0, "") and json.loads(said)["text"] == wanted


def test_a_document_goes_on_with_words_and_pictures(
    sample: Call, drawer: Path, tmp_path: Path
) -> None:
    sample(drawer, "a", "-o", tmp_path)
    document = tmp_path / "story.json"
    document.write_text(json.dumps([{"text": "first a kite"}, {"image": "000-a-s0-0.png"}]))
    more = ("--set", "images=1", "--set", "max_tokens=120", "--size", "16x16", "--temperature", 2)
    code, said, _ = sample(
        drawer, "--prompts", document, "-o", tmp_path / "o", *more, "--set", "text.temperature=5"
    )
    assert code == 0
    folder = Path(said.strip())
    made = json.loads((folder / "document.json").read_text())
    assert made["document"][0] == {"text": "first a kite"} and len(made["document"]) > 2
    assert made["document"][1] == {"image": "01.png"}
    assert made["unimodal"]["given"] == 2 and (folder / "index.html").is_file()
    code, _, _ = sample(drawer, "--prompts", folder / "document.json", "-o", tmp_path / "p", *more)
    assert code == 0


# --- batches -------------------------------------------------------------------------------


def test_a_file_of_prompts_is_drawn_but_for_its_bad_lines(
    sample: Call, drawer: Path, tmp_path: Path
) -> None:
    sample(drawer, "a", "-o", tmp_path)
    lines: list[dict[str, Any] | str] = [
        {"prompt": "one", "seed": 3},
        {"prompt": "two", "guidence": 1},
        {"prompt": "three", "size": "16x16", "guidance": 1.5, "n": 2},
        {"prompt": "no such picture", "edit": "none.png"},
        {"prompt": "far too long " * 30},
        {"prompt": "red", "edit": "000-a-s0-0.png"},
        {"describe": "000-a-s0-0.png", "max_tokens": 4},
        {"prompt": "clip", "frames": 8},
        "nonsense",
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines))
    out = tmp_path / "o"
    code, said, told = sample(drawer, "--prompts", file, "-o", out, "--seed", 7)
    assert code == 0
    records = _records(out)
    assert [(record["number"], record["copy"], record["seed"]) for record in records] == [
        *[(0, 0, 3), (2, 0, 7), (2, 1, 7), (5, 0, 7), (6, 0, 7), (7, 0, 7)]
    ]
    assert records[1]["pixels"] == [16, 16] and records[1]["guidance"] == 1.5
    assert len(said.splitlines()) == 6 + 1  # and the sheet
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert [one["line"] for one in failed] == [2, 4, 5, 9]
    assert failed[1]["given"] == lines[3] and "none.png" in failed[1]["reason"]
    assert "over the context" in failed[2]["reason"]
    for number in (2, 4, 5, 9):
        assert f"{file}, line {number}: " in told
    assert told.splitlines()[-1] == f"4 of 9 lines could not be used: {out}/failed.jsonl says why"


def test_one_line_does_not_change_what_others_come_to(
    sample: Call, drawer: Path, tmp_path: Path
) -> None:
    """A bad line among them, other seeds, other sizes: each is as it is alone in its place."""
    lines = [{"prompt": "a"}, {"prompt": "b", "seed": 9}, {"bad": 1}, {"prompt": "c"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sample(drawer, "--prompts", tmp_path / "p.jsonl", "-o", tmp_path / "file")
    sample(drawer, "a", "x", "y", "c", "-o", tmp_path / "line")
    for name in ("000-a-s0-0.png", "003-c-s0-0.png"):
        pictures = [np.asarray(Image.open(tmp_path / f / name)) for f in ("file", "line")]
        assert np.array_equal(*pictures)
    sample(drawer, "x", "b", "--seed", 9, "-o", tmp_path / "seed")
    pictures = [np.asarray(Image.open(tmp_path / f / "001-b-s9-0.png")) for f in ("file", "seed")]
    assert np.array_equal(*pictures)


def test_what_is_there_is_not_drawn_again(
    sample: Call, drawer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unimodal.model.generate import TorchBackend

    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    arguments = (drawer, "--prompts", tmp_path / "p.txt", "-o", tmp_path / "o")
    code, first, _ = sample(*arguments)
    before = _bytes(tmp_path / "o")
    drawn: list[int] = []
    real = TorchBackend.generate

    def counted(self: Any, drafts: Any, *rest: Any) -> Any:
        drawn.append(len(drafts))
        return real(self, drafts, *rest)

    monkeypatch.setattr(TorchBackend, "generate", counted)
    code, again, told = sample(*arguments)
    assert (code, again) == (0, first) and not drawn and "3 were there already" in told
    assert _bytes(tmp_path / "o") == before
    (tmp_path / "o" / "001-b-s0-0.png").unlink()
    assert sample(*arguments)[1] == first and drawn == [3]  # its call, whole: see cli/drawing.py
    assert _bytes(tmp_path / "o") == before
    assert sample(*arguments, "--guidance", 1.5)[0] == 0 and drawn == [3, 3]
    assert _bytes(tmp_path / "o")["000-a-s0-0.png"] != before["000-a-s0-0.png"]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(drawer: Path, tmp_path: Path, sample: Call) -> None:
    file = tmp_path / "p.jsonl"
    lines: list[dict[str, Any]] = [{"prompt": f"kite {i}", "n": 2} for i in range(12)]
    lines += [{"prompt": "clip", "frames": 8}, {"bad": 1}, {"describe": "x.png"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    options = ["--prompts", str(file), "--set", "load.batch=2"]
    assert sample(drawer, *options, "-o", tmp_path / "whole")[0] == 0
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "unimodal.cli", "sample", str(drawer), *options, "-o"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(out)], stdout=subprocess.PIPE, env=env, text=True)
    assert process.stdout is not None
    for _ in range(5):  # paths that were printed
        assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert 5 <= len(there) < 24 and not (out / "sheet-s0.png").exists()
    code, _, told = sample(drawer, *options, "-o", out)
    assert code == 0 and re.search(r"\d+ were there already", told)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert all(after[name] == when for name, when in there.items())
    assert _bytes(out) == _bytes(tmp_path / "whole")


# --- streaming -----------------------------------------------------------------------------


def test_words_are_streamed_and_printed_once(
    sample: Call, drawer: Path, drawn_shards: Path
) -> None:
    more = ("--set", "max_tokens=5", "--format", "text", "--temperature", 5)
    code, said, told = sample(drawer, "kite", *more, "--stream", "-q")
    written = said.rstrip("\n").removeprefix("kite")
    assert code == 0 and said.startswith("kite") and told == written.rstrip("\ufffd")
    assert sample(drawer, "kite", *more, "-q")[1] == said


def test_words_that_are_there_already_are_printed_though_nothing_streams(
    sample: Call, drawer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal the prompt stands in front of the words that grow, too, and what would steer
    it is spelled out."""
    more = ("--set", "max_tokens=5", "--format", "text", "-o", tmp_path, "-q")
    first = sample(drawer, "kite", *more)[1]
    monkeypatch.setattr("_pytest.capture.CaptureIO.isatty", lambda _: True)
    seen = harmless(first, "\n\t")
    assert first != seen and sample(drawer, "kite", *more, "--stream")[1] == seen
    (tmp_path / "000-kite-s0-0.txt").unlink()
    code, said, told = sample(drawer, "kite", *more, "--stream")
    assert code == 0 and not told  # nothing went to stderr: they grew on stdout
    assert said.startswith("kite") and said == f"{seen.rstrip().rstrip(chr(0xFFFD))}\n"


def test_a_streamed_picture_is_the_same_picture(sample: Call, drawer: Path, tmp_path: Path) -> None:
    sample(drawer, "a", "b", "-o", tmp_path / "plain")
    code, _, told = sample(drawer, "a", "b", "-o", tmp_path / "live", "--stream")
    assert code == 0 and "stderr is no terminal" in told.splitlines()[0]
    assert _bytes(tmp_path / "live") == _bytes(tmp_path / "plain")


def test_rows_appear_in_a_terminal_and_in_a_growing_file(drawer: Path, tmp_path: Path) -> None:
    import pty

    master, slave = pty.openpty()
    command = [sys.executable, "-m", "unimodal.cli", "sample", str(drawer), "a kite", "--stream"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "60"}
    env |= {"LINES": "30", "COLORTERM": "truecolor"}
    process = subprocess.Popen(
        [*command, "-o", str(tmp_path), "--size", "80x80"],
        stdout=subprocess.PIPE,
        stderr=slave,
        env=env,
        text=True,
    )
    os.close(slave)
    seen, grown, deadline = b"", False, time.monotonic() + 200
    while time.monotonic() < deadline:
        try:
            data = os.read(master, 65536)
        except OSError:
            break
        seen += data
        grown = grown or bool(list(tmp_path.glob("*.partial.png")))
    os.close(master)
    said = process.communicate()[0]
    assert process.returncode == 0
    assert said.split() == [str(tmp_path / "000-a-kite-s0-0.png")]  # data, and nothing else
    assert seen.count("▀".encode()) > 1000 and b"tokens/s" in seen and b"left" in seen
    assert grown and not list(tmp_path.glob("*.partial.png"))


# --- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["a " * 200], 1, "over the context"),
        (["a", "--size", "800x800"], 1, "the context of this checkpoint holds 256: choose a sm"),
        (["a", "--guidance", "0"], 2, "guidance = 0.0: Input should be greater than 0"),
        (["a", "--temperature", "-1"], 2, "temperature = -1.0: Input should be greater than 0"),
        (["a", "--frames", "6"], 2, "frames 6 must be a multiple of 4: try 8"),
        (["--describe", "pyproject.toml"], 1, "pyproject.toml: not a video"),
        (["--describe", "none.png"], 1, "none.png: no such file"),
        (["x", "--edit", "none.png"], 1, "none.png: no such file"),
        (["--continue", "SHARDS#nokey"], 1, "no sample nokey in"),
        (["--continue", "SHARDS#picture0000"], 2, "picture0000 is a picture: --continue takes a c"),
        (["--prompts", "none.txt"], 2, "none.txt: cannot be read (No such file"),
        (["a", "--prompts", "p.txt"], 2, "not in both"),
        (["a", "--set", "gidance=2"], 2, "did you mean guidance?"),
        (["a", "--backend", "jax"], 2, "backend jax: torch or vllm"),
        (["a", "--backend", "vllm", "--set", "load.compile=true"], 2, "vLLM compiles by itself"),
        (["a", "--temperature", "0"], 2, "it is of words alone"),
        (["--describe", "none.png", "--set", "text.temperature=1"], 2, "takes no --set text."),
        (["a", "-o", "pyproject.toml/x"], 2, "pyproject.toml/x cannot be written"),
    ],
)
def test_refusals_are_one_line(
    sample: Call,
    drawer: Path,
    drawn_shards: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    given = [one.replace("SHARDS", str(drawn_shards)) for one in arguments]
    out = [] if "-o" in given else ["-o", tmp_path]
    ended, said, told = sample(drawer, *given, *out)
    assert (ended, said) == (code, "")
    assert says in told and len(told.strip().splitlines()) == 1


def test_an_unwritable_folder_is_refused_before_anything_is_loaded(
    sample: Call, drawer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unimodal.model.sample import Sampler

    monkeypatch.setattr(Sampler, "load", lambda *_, **__: pytest.fail("it was loaded"))
    code, _, told = sample(drawer, "a", "-o", "/proc/samples")
    assert code == 2 and "cannot be written" in told


def test_codes_of_another_tokenizer_are_refused(
    sample: Call, drawer: Path, drawn_shards: Path, tmp_path: Path
) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(drawn_shards, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["vision_tokenizer"]["digest"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    code, said, told = sample(drawer, "--describe", f"{other}#picture0000")
    assert (code, said) == (1, "") and "are of another vision tokenizer (000000000000)" in told


def test_a_checkpoint_that_never_saw_video_says_so(
    sample: Call, drawer: Path, drawn_shards: Path, tmp_path: Path
) -> None:
    import shutil

    still = tmp_path / "still"
    shutil.copytree(drawer, still)
    about = json.loads((still / "data.json").read_text())
    about["grids"] = [grid for grid in about["grids"] if grid["kind"] == "image"]
    (still / "data.json").write_text(json.dumps(about))
    for asked in (["a", "--frames", "8"], ["--describe", f"{drawn_shards}#clip0004"]):
        code, _, told = sample(still, *asked, "-o", tmp_path / "o")
        assert code == 2 and "was never trained on video" in told
    code, _, told = sample(still, "a", "--frames", 4, "--size", "16x16", "-o", tmp_path / "o")
    assert code == 0 and "never trained on video: what comes will mean little" in told
    assert "video" not in sample(still, "a", "-o", tmp_path / "o")[2]


def test_one_prompt_that_fails_does_not_stop_the_others(
    sample: Call, drawer: Path, tmp_path: Path
) -> None:
    code, said, told = sample(drawer, "a", "b " * 300, "c", "-o", tmp_path)
    assert code == 1 and "over the context" in told
    assert [Path(line).name for line in said.splitlines()] == [
        "000-a-s0-0.png",
        "002-c-s0-0.png",
        "sheet-s0.png",
    ]


def test_a_disk_that_fills_keeps_what_is_there(
    sample: Call, drawer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from unimodal.cli import outputs

    real, written = outputs._put, []

    def put(path: Path, data: bytes) -> None:
        if len(written) == 2 and path.suffix == ".png":
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        real(path, data)

    monkeypatch.setattr(outputs, "_put", put)
    code, said, told = sample(drawer, "a", "b", "c", "-o", tmp_path, "-q")
    assert code == 1 and len(said.splitlines()) == 2
    assert told == f"unimodal: {tmp_path}: the disk is full; free some space and run the same " + (
        "command again\n"
    )
    assert [record["prompt"] for record in _records(tmp_path)] == ["a", "b"]


def test_there_are_at_most_25_options_and_help_is_instant() -> None:
    from typer.main import get_command

    from unimodal.cli.app import app

    command = get_command(app).commands["sample"]  # type: ignore[attr-defined]
    options = [one for one in command.params if one.param_type_name == "option"]
    assert len([one for one in options if one.name != "help"]) <= 25
    assert all(getattr(one, "help", None) for one in options)
    heavy = "[m for m in ('torch', 'numpy', 'pydantic', 'PIL', 'av') if m in sys.modules]"
    code = f"import sys, unimodal.cli.app, unimodal.cli.sample; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_second_command_is_refused_while_one_writes_to_the_folder(
    sample: Call, drawer: Path, tmp_path: Path
) -> None:
    with run_lock(tmp_path, Progress()):
        code, said, told = sample(drawer, "a cat", "-o", tmp_path)
        assert code == 1 and not said and f"process {os.getpid()}" in told
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    assert sample(drawer, "a cat", "-o", tmp_path)[0] == 0
    assert not (tmp_path / "run.lock").exists()
