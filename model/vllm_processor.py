"""What stock vLLM loads to draw pictures: a logits processor, by class or by name.

    vllm serve EXPORTED --logits-processors unimodal.model.vllm_processor:GuidedProcessor \\
        --no-enable-chunked-prefill

`unimodal.model.paired` has the work; here is only what vLLM calls. It is the interface of vLLM's
first model runner; the second has another one and refuses this class at the start, hence
VLLM_USE_V2_MODEL_RUNNER=0.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from unimodal.model.paired import ARGUMENT, Pairing, Request, Stretch
from unimodal.pipeline.errors import UnimodalError
from unimodal.tokenize.vocabulary import Vocabulary

try:
    from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality
except ImportError:  # this module can be read without vLLM, though not used
    LogitsProcessor = object

log = logging.getLogger(__name__)


def check_config(config: Any) -> None:
    """Raise `UnimodalError` for settings of an engine under which requests cannot run in step."""
    scheduler, parallel = config.scheduler_config, config.parallel_config
    # A prompt in parts has logits that mean nothing, and nobody tells the processor.
    if scheduler.enable_chunked_prefill or getattr(scheduler, "long_prefill_token_threshold", 0):
        raise UnimodalError(
            "vLLM computes prompts in chunks, so that guidance cannot know whose logits are "
            "ready: start it with --no-enable-chunked-prefill"
        )
    for name in ("data_parallel_size", "pipeline_parallel_size"):
        if getattr(parallel, name) > 1:
            raise UnimodalError(
                f"vLLM's {name} is {getattr(parallel, name)}, which would part the requests that "
                "guidance pairs: use tensor_parallel_size, or one server for each GPU"
            )


class GuidedProcessor(LogitsProcessor):
    """Grammar, guidance and draw for the requests that carry a `Stretch`; others stay as they
    are."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises `ValueError`, which a server answers with status 400."""
        text = (sampling_params.extra_args or {}).get(ARGUMENT)
        if text is None:
            return
        Stretch.parse(text)
        if sampling_params.temperature != 0:
            raise ValueError(
                f"requests with {ARGUMENT} take temperature 0: their own choice is in it"
            )

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        """Raises `UnimodalError` if the model directory or the engine's settings do not serve."""
        check_config(vllm_config)
        model = vllm_config.model_config
        if not (Path(model.model) / "vocabulary").is_dir():
            raise UnimodalError(
                f"{model.model} has no vocabulary/: serve what `unimodal export model` wrote"
            )
        vocabulary = Vocabulary.load(Path(model.model) / "vocabulary")
        self.pairing = Pairing(vocabulary, model.max_model_len, device)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the rows of the batch; removed, added, moved, in this order."""
        if batch_update is None:
            return
        requests = self.pairing.requests
        for place in batch_update.removed:
            requests.pop(place, None)
        for place, params, prompt, written in batch_update.added:
            requests.pop(place, None)
            text = (params.extra_args or {}).get(ARGUMENT)
            if text is None:
                continue
            try:
                requests[place] = Request(Stretch.parse(text), prompt or [], written)
            except ValueError as error:  # `validate_params` has seen it, unless vLLM was changed
                log.warning("%s", error)
        for one, other, direction in batch_update.moved:
            first, second = requests.pop(one, None), requests.pop(other, None)
            if first is not None:
                requests[other] = first
            if second is not None and direction == MoveDirectionality.SWAP:
                requests[one] = second
        self.pairing.regroup()

    def apply(self, logits: Tensor) -> Tensor:
        return self.pairing.apply(logits)
