"""What is lost when commands are killed, media are broken, files are hostile and disks are full.

    python -m benchmarks.reliability -o reliability.json       everything, an hour
    python -m benchmarks.reliability --only kills --kills 3 --commands train,sample
    python -m benchmarks.reliability --only broken --broken 100
    python -m benchmarks.reliability --only hostile --hostile captions,settings --every 5

Writes the JSON and a table of Markdown beside it. Exits 1 if anything was lost. Commands run as
they are, in process groups of their own, see forked.py; what is hostile is in hostile.py, disks
that are full or not ours in disks.py. Nothing but moments is random.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import disks, hostile
from benchmarks.forked import (
    ANY_CLIP,
    PRELOAD,
    Road,
    answers,
    contents,
    emoji,
    film,
    media,
    must,
    once,
    sets,
    table,
    told,
)

# --- (a) kills -----------------------------------------------------------------------------


def kills(folder: Path, count: int, only: list[str], seed: int) -> list[dict[str, Any]]:
    """Kill each command `count` times, each time in a directory of its own, and let it end."""
    server_of_tests = answers()
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
            rows.append(told(row))
    return rows


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
        # Smaller ones x264 encodes in more than one way (libx264 of PyAV 18.1), memory deciding.
        found[suffix] = film(folder / f"base{suffix}", 1, 8).read_bytes()
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
    return [*rows, told(row)]


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
    return told(row)


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
    parser.add_argument("--only", default="kills,broken,hostile,disks", help="kinds of trouble")
    parser.add_argument(
        "--hostile", default=",".join(hostile.KINDS), help="kinds of hostile things"
    )
    parser.add_argument("--every", type=int, default=1, help="take each so-manieth hostile thing")
    parser.add_argument(
        "--commands", default="curate,tokenize,train,train-tokenizer,sample,caption"
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--broken", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="keep the files here")
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    own_mounts = disks.apart()
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
            "hostile": lambda at: hostile.hostile(at, given.hostile.split(","), given.every),
            "disks": lambda at: disks.disks(at, given.commands.split(","), own_mounts),
        }
        for name in given.only.split(","):
            (work / name).mkdir(parents=True)
            result["rows"] += kinds[name](work / name)
            given.out.write_text(json.dumps(result, indent=1) + "\n")
            given.out.with_suffix(".md").write_text(markdown(result))
    return int(any(row["lost"] for row in result["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
