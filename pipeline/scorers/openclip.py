"""A CLIP in memory, through open_clip; its weights are read by ourselves, as tensors only."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.scorers.weights import state_dict

if TYPE_CHECKING:
    from unimodal.pipeline.scorers.embed import EmbedSettings

HUB = "hub:"

# Pictures or texts of a forward pass, of which what is free is filled up. All passes have one
# shape, so that a vector does not depend on what it was computed along with, in the last bit
# either. A CPU gains nothing from more than one: ViT-L/14 takes 2.25 s of a core for a picture
# alone, and 2.16 s for each of four.
ROOM = {"cpu": 1, "cuda": 12}


@dataclass(frozen=True)
class Model:
    """A CLIP, ready to use."""

    net: Any
    prepare: Callable[[Any], Any]  # PIL image -> float32 [3, H, W]
    tokenize: Callable[[list[str]], Any]  # N texts -> int64 [N, context]
    width: int  # D, of its embeddings
    device: str
    dtype: Any
    threads: int

    def pictures(self, images: Sequence[Any]) -> np.ndarray:
        """Unit vectors of PIL images, float64 [N, D]."""
        return self._units(self.net.encode_image, [self.prepare(image) for image in images])

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of texts, float64 [N, D]; long texts are cut off as open_clip does."""
        return self._units(self.net.encode_text, [self.tokenize([text])[0] for text in texts])

    def _units(self, encode: Callable[[Any], Any], inputs: Sequence[Any]) -> np.ndarray:
        import torch

        room, found = ROOM[self.device], [np.zeros((0, self.width))]
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                for i in range(0, len(inputs), room):
                    some = inputs[i : i + room]
                    batch = torch.stack([*some, *[some[0]] * (room - len(some))]).to(self.device)
                    batch = batch.to(self.dtype) if batch.is_floating_point() else batch
                    found.append(encode(batch)[: len(some)].double().cpu().numpy())
        finally:
            torch.set_num_threads(before)
        vectors = np.concatenate(found)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@lru_cache(maxsize=1)  # embed and match of one process share it
def clip_model(settings: EmbedSettings) -> Model:
    """Load a CLIP; raises `UsageError` if there is none or the weights are not this model's."""
    open_clip = _import()
    import torch

    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    if settings.device == "cuda" and not on_gpu:
        raise UsageError("embed.device=cuda, but torch sees no GPU: set it to auto or cpu")
    device = "cuda" if on_gpu else "cpu"
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = kinds[settings.precision] if on_gpu else torch.float32
    try:
        with _quiet():
            name = _name(open_clip, settings)
            path, prepared = _weights(open_clip, name, settings.weights or "")
            net = open_clip.create_model(
                name, load_weights=False, pretrained_text=False, force_preprocess_cfg=prepared
            )
            tokenize = open_clip.get_tokenizer(name)
            width = open_clip.get_model_config(name)["embed_dim"]
    except UsageError:
        raise
    except Exception as error:
        what = f"config={settings.config}" if settings.config else f"model={settings.model}"
        raise UsageError(f"embed.{what}: open_clip cannot build it: {error}") from error
    tensors = state_dict(path)
    if "positional_embedding" in tensors and not hasattr(net, "positional_embedding"):
        tensors = open_clip.model.convert_to_custom_text_state_dict(tensors)
    try:
        net.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise UsageError(f"{path} holds other weights than {name} has: {lines[:300]}") from error
    cfg = open_clip.transform.PreprocessCfg(**net.visual.preprocess_cfg)
    prepare = open_clip.transform.image_transform_v2(cfg, is_train=False)
    net = net.to(device=device, dtype=dtype).eval()
    return Model(net, prepare, tokenize, width, device, dtype, settings.threads)


def _import() -> Any:
    try:
        import open_clip
    except Exception as error:  # torchvision raises what torch's loader of operators raises
        if "torchvision" in str(error):
            raise UsageError(
                f"torchvision does not go with this torch ({error}): reinstall torch and "
                "torchvision together, from the same index"
            ) from error
        raise UsageError(f"open_clip cannot be imported ({error}): see open-clip-torch") from error
    return open_clip


def _name(open_clip: Any, settings: EmbedSettings) -> str:
    """By which open_clip finds the model's config."""
    if settings.config is None:
        return settings.model
    path = Path(settings.config)
    config = json.loads(path.read_text())
    if "model_cfg" in config:
        if path.name != "open_clip_config.json":
            raise UsageError(f"{path} must be called open_clip_config.json to be found")
        return f"local-dir:{path.parent}"
    open_clip.add_model_config(path)
    return path.stem


def _weights(open_clip: Any, name: str, weights: str) -> tuple[str, dict[str, Any] | None]:
    """The checkpoint's path, downloaded if need be, and how its pictures are prepared if known."""
    if not weights.startswith(HUB):
        return weights, None
    tag = weights.removeprefix(HUB)
    known = open_clip.get_pretrained_cfg(name, tag)
    if not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UsageError(f"embed.weights={weights}: {name} has no such weights; it has {tags}")
    config = open_clip.get_model_config(name)
    if known.get("quick_gelu", False) != config.get("quick_gelu", False):
        raise UsageError(
            f"embed.weights={weights} were not trained with the activation that {name} has: "
            "set embed.model to the name with, or without, -quickgelu"
        )
    return open_clip.download_pretrained(known), known


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip warns of random weights, which are replaced right after."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
