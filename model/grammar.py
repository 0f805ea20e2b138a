"""The sampler's constraint: a document's description, read forward.

`unimodal.tokenize.document.block_template` says which ids of a vision block are given and where
a code is free. Here that becomes a schedule of a decoding loop: draw a code, feed it together
with the given ids behind it, draw the next. Given ids cost neither a draw, nor a head, nor a
forward pass of their own; a mask over the vocabulary is never built.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unimodal.tokenize.document import FREE, block_template
from unimodal.tokenize.vocabulary import Vocabulary


class BlockGrammar:
    """The schedule of one vision block."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        height: int,
        width: int,
        frames: int | None = None,
        fps: float | None = None,
    ) -> None:
        """Sizes in codes, as for `block_template`."""
        self.template = block_template(vocabulary, height, width, frames, fps)
        self.shape = (height, width) if frames is None else (frames, height, width)
        self.vision = slice(
            vocabulary.vision_start, vocabulary.vision_start + vocabulary.codebook_size
        )
        """The ids that a free position may take: the rows of the head that are computed."""
        free = np.flatnonzero(self.template == FREE)
        self.opening: list[int] = self.template[: free[0]].tolist()
        """BOI, meta and IMG."""
        ends = [*free[1:].tolist(), len(self.template)]
        self.behind: list[list[int]] = [
            self.template[start + 1 : end].tolist() for start, end in zip(free, ends, strict=True)
        ]
        """For each free position the given ids between it and the next, often none; behind the
        last one EOL, EOF and EOI."""

    def __len__(self) -> int:
        """Number of free positions."""
        return len(self.behind)

    def ids(self, codes: np.ndarray) -> np.ndarray:
        """The whole block with these codes, int64."""
        block = self.template.copy()
        block[block == FREE] = np.asarray(codes, np.int64).reshape(-1) + self.vision.start
        return block


class TextGrammar:
    """A stretch of text that ends with EOS."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos = vocabulary.text.size
        """Column of EOS among `allowed`."""
        self.allowed: Tensor = torch.tensor([*range(vocabulary.text.size), vocabulary.eos])
        """The ids that may come next, int64: text ids at their own columns, then EOS."""
