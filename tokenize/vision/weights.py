"""Names of the tokenizer's tensors: ours are the original release's; transformers' map one to one.

The original naming is that of BAAI/Emu3-VisionTokenizer, the other that of transformers'
`Emu3VQVAE` (alone, or below `vqmodel.` in a multimodal checkpoint).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# (transformers, original), applied in order; each pattern matches whole name parts.
_RENAMES = [
    ("down_block.down", "down"),
    ("up_block.up", "up"),
    ("middle_block", "mid"),
    ("attn_norm", "attn_1.norm"),
    ("q_proj", "q"),
    ("k_proj", "k"),
    ("v_proj", "v"),
    ("out_proj", "proj_out"),
]
_PREFIX = re.compile(r"^(model\.)?vqmodel\.")


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename transformers' tensors to the original names; Linear weights become 1x1 convolutions.

    Tensors of other parts of a multimodal checkpoint are left out.
    """
    multimodal = any(_PREFIX.match(name) for name in state)
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if multimodal and not _PREFIX.match(name):
            continue
        new = "." + _PREFIX.sub("", name)
        new = re.sub(r"\.attn_norms\.(\d+)\.", r".attn.\1.norm.", new)
        for theirs, ours in _RENAMES:
            new = new.replace(f".{theirs}.", f".{ours}.")
        projection = re.search(r"\.(q|k|v|proj_out)\.weight$", new)
        renamed[new[1:]] = tensor[:, :, None, None] if projection and tensor.ndim == 2 else tensor
    return renamed


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_transformers`, without a prefix."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = "." + name
        new = re.sub(r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1.", new)
        for theirs, ours in _RENAMES:
            new = new.replace(f".{ours}.", f".{theirs}.")
        if re.search(r"\.(q|k|v|out)_proj\.weight$", new):
            tensor = tensor.flatten(1)
        renamed[new[1:]] = tensor
    return renamed


def is_transformers(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of transformers."""
    return any(".down_block." in name or ".middle_block." in name for name in state)
