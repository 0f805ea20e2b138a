"""`unimodal serve` as a command: its address on stdout, words on stderr, and how it ends."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from safetensors.torch import save_file

from tests.model.served import GRIDS, small_sampler
from unimodal.cli.app import main
from unimodal.model.naming import WEIGHTS, config_record

Start = Callable[..., "subprocess.Popen[str]"]
Call = Callable[..., tuple[int, str, str]]
PROMPT = {"prompt": "a kite"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory like one of `unimodal train`, of random weights."""
    out = tmp_path_factory.mktemp("checkpoint") / "kites"
    sampler, _ = small_sampler()
    step = out / "step-00000001"
    step.mkdir(parents=True)
    save_file(sampler.decoder.state_dict(), step / WEIGHTS)
    (step / "config.json").write_text(json.dumps(config_record(sampler.decoder.config)))
    (out / "latest").write_text(step.name)
    sampler.vocabulary.save(out / "vocabulary")
    sampler.tokenizer.save(out / "vision_tokenizer")  # type: ignore[attr-defined]
    about = {
        "vision_tokenizer": {"digest": sampler.tokenizer.digest},  # type: ignore[attr-defined]
        "vocabulary": {"digest": sampler.vocabulary.digest()},
        "grids": GRIDS,
    }
    (out / "data.json").write_text(json.dumps(about))
    return out


@pytest.fixture
def start(checkpoint: Path) -> Iterator[Start]:
    """Function that starts the command on the checkpoint with more arguments."""
    running: list[subprocess.Popen[str]] = []

    def run(*arguments: str, given: str | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "unimodal.cli", "serve", given or str(checkpoint)]
        environment = {k: v for k, v in os.environ.items() if k != "UNIMODAL_API_KEY"}
        process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"OMP_NUM_THREADS": "1"},
        )
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


def address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:"), process.communicate()[1]
    return url


def closing(url: str) -> bool:
    """Whether a server says that it takes no more, or takes no more."""
    try:
        return httpx.get(f"{url}health", timeout=60).status_code != 200
    except httpx.TransportError:
        return True


def drawn(
    url: str, process: subprocess.Popen[str], presses: int, headers: dict[str, str] | None = None
) -> str:
    """Events of a long request behind its first progress, Ctrl-C having been pressed there."""
    # Pictures of 144 codes, one after the other: there is time to press, however late we are.
    asked = PROMPT | {"n": 4 * presses, "size": "96x96", "stream": True, "progress": True}
    where = f"{url}v1/images/generations"
    with httpx.stream("POST", where, json=asked, headers=headers, timeout=120) as stream:
        lines = stream.iter_lines()
        while "unimodal.progress" not in next(lines):
            pass
        process.send_signal(signal.SIGINT)
        if presses > 1:
            # Signals that come at once count as one: the first must have been heard.
            end = time.monotonic() + 60
            while not closing(url):
                assert time.monotonic() < end, "it was never heard"
            process.send_signal(signal.SIGINT)
        return "\n".join(lines)


def test_the_address_is_printed_and_ctrl_c_waits_for_what_is_drawn(start: Start) -> None:
    process = start("--port", "0", "--batch", "1")
    url = address(process)
    assert httpx.get(url).status_code == 200
    (card,) = httpx.get(f"{url}v1/models").json()["data"]
    assert card["id"] == "kites" and card["unimodal"]["can"]["images"]
    assert card["unimodal"]["can"]["edit"] is False  # learned from captions alone
    assert drawn(url, process, 1).count("event: image_generation.completed") == 4
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "")
    assert "Ctrl-C ends" in err and "finishing what is drawn" in err and "Traceback" not in err


@pytest.mark.slow
def test_a_path_from_a_pipe_a_name_a_key_and_a_second_ctrl_c(
    start: Start, checkpoint: Path
) -> None:
    process = start(
        *("--port", "0", "--batch", "1", "--name", "k", "--api-key", "s", "--max-prompt", "6"),
        *("--allow-host", "gpu.example", "--quiet"),
        given="-",
    )
    assert process.stdin is not None
    process.stdin.write(f"{checkpoint}\n")
    process.stdin.close()
    process.stdin = None
    url = address(process)
    assert httpx.get(f"{url}v1/models").status_code == 401
    key = {"authorization": "Bearer s"}
    named = key | {"host": "gpu.example"}
    (card,) = httpx.get(f"{url}v1/models", headers=named).json()["data"]
    assert card["id"] == "k" and card["unimodal"]["limits"]["prompt"] == 6
    rest = drawn(url, process, 2, key)
    assert "image_generation.completed" not in rest and '"code": "shutting_down"' in rest
    assert process.communicate(timeout=120) == ("", "") and process.returncode == 0


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Function that runs the command in this process: exit code, stdout, stderr."""
    monkeypatch.delenv("UNIMODAL_API_KEY", raising=False)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unimodal", "serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--host", "0.0.0.0"], 2, "--api-key KEY (or set UNIMODAL_API_KEY), or --insecure"),
        (["--host", "::"], 2, "--insecure"),
        (["--max-pixels", "1"], 2, "pixels"),
        (["--device", "abacus"], 2, "device abacus"),
        (["--host", "nowhere.invalid", "--insecure"], 2, "cannot be listened on"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    call: Call, checkpoint: Path, arguments: list[str], code: int, words: str
) -> None:
    returned, out, err = call(checkpoint, "--port", "0", *arguments)
    assert (returned, out) == (code, "")
    assert words in err and err.count("\n") == 1


def test_a_port_that_is_taken_and_a_checkpoint_that_is_none(call: Call, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = call(tmp_path, "--port", str(port))
        assert code == 2 and f"127.0.0.1:{port} cannot be listened on" in err
    code, _, err = call(tmp_path / "none", "--port", "0")
    assert code == 2 and "no checkpoint at" in err


def test_a_package_that_is_missing_is_named(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "uvicorn" else real(n))
    code, _, err = call(tmp_path, "--port", "0")
    assert code == 2 and "needs uvicorn: pip install 'unimodal[serve]'" in err


def test_what_sample_can_load_serve_can_too(
    call: Call, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unimodal.model import serve
    from unimodal.model.sample import Sampler

    told: list[Any] = []
    real = Sampler.load

    def load(source: str, device: str, batch: int, **more: Any) -> Sampler:
        told.append((batch, more))
        return real(source, device, batch)

    def run(app: Any, listener: socket.socket, say: Any) -> None:
        listener.close()
        app.state.queue.close()

    monkeypatch.setattr(Sampler, "load", load)
    monkeypatch.setattr(serve, "run", run)
    sets = ["weights=int8", "kind=chat", "tokenizer=elsewhere", "compile=true"]
    flags = [part for one in sets for part in ("--set", f"load.{one}")]
    assert call(checkpoint, "--port", "0", "--batch", "3", *flags)[0] == 0
    more = {"weights": "int8", "kind": "chat", "tokenizer": "elsewhere", "compile": True}
    assert told == [(3, more)]
    code, _, err = call(checkpoint, "--port", "0", "--set", "load.wheels=4")
    assert code == 2 and "wheels" in err and len(told) == 1
    code, _, err = call(checkpoint, "--port", "0", "--set", "limits.seconds=0")
    assert code == 2 and "limits.seconds" in err


@pytest.mark.parametrize("more", [[], ["--allow-host", "gpu.example"]])
def test_any_address_of_this_machine_answers_to_its_own_url(
    call: Call, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    from unimodal.model import serve

    status: list[int] = []

    def run(app: Any, listener: socket.socket, say: Any) -> None:
        with listener:
            where = f"http://127.0.0.2:{listener.getsockname()[1]}"
            client = TestClient(app, base_url=where)
            for name in (None, "gpu.example", "evil.example"):
                headers = {"host": name} if name else {}
                status.append(client.get("/v1/models", headers=headers).status_code)
        app.state.queue.close()

    monkeypatch.setattr(serve, "run", run)
    code, out, _ = call(checkpoint, "--port", "0", "--host", "127.0.0.2", *more)
    assert code == 0 and out.startswith("http://127.0.0.2:")
    assert status == [200, 200 if more else 403, 403]


@pytest.mark.parametrize("more", [["--insecure"], ["--api-key", "s"]])
def test_all_addresses_need_a_key_or_daring(
    call: Call, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    from unimodal.model import serve

    began: list[socket.socket] = []

    def run(app: Any, listener: socket.socket, say: Any) -> None:
        began.append(listener)
        assert listener.getsockname()[0] == "0.0.0.0"
        listener.close()
        app.state.queue.close()

    monkeypatch.setattr(serve, "run", run)
    code, out, _ = call(checkpoint, "--port", "0", "--host", "0.0.0.0", *more)
    assert code == 0 and began and out.startswith("http://127.0.0.1:")
