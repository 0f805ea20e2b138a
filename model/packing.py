"""Which documents travel together in a step: best-fit packing, planned from lengths alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LARGE = 8
"""Documents above 1/8 of the capacity are placed first, the longest first; see `best_fit`."""


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Group documents of `lengths` tokens into packs of at most `capacity`, none split.

    Returns indices into `lengths`; every document is in exactly one pack. Each document goes to
    the fullest pack that still has room. Large documents go first in decreasing order: small
    ones then fill the gaps. Small ones keep the order given, so that a shuffled epoch also
    shuffles who shares a pack; sorting them too would put the same neighbours together for ever.
    Raises `ValueError` for a document longer than `capacity`.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and sizes.max() > capacity:
        raise ValueError(f"a document of {sizes.max()} tokens exceeds a pack of {capacity}")
    is_large = sizes * LARGE > capacity
    large = np.flatnonzero(is_large)
    large = large[np.argsort(-sizes[large], kind="stable")]
    packs: list[list[int]] = []
    # open_by_room[r]: packs with exactly r tokens of room. Bit r of `rooms` says whether any is,
    # so that "the smallest room that suffices" is one shift and one lowest set bit.
    open_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for index in [*large.tolist(), *np.flatnonzero(~is_large).tolist()]:
        size = int(sizes[index])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            pack = open_by_room[room].pop()
            if not open_by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(index)
        left = room - size
        open_by_room[left].append(pack)
        rooms |= 1 << left
    return packs
