"""Writing sequences: contexts and a grammar in, ids out.

Legend: P sequences that are written at once, G rows of each (1 to 3), R = G P rows of the batch,
        K ids out of which one is chosen, D width.

Every sequence has a conditional row and, with guidance, up to two more, all in one batch out of
one static cache, each row at its own positions. At every step each sequence makes one free choice,
whatever it is in the middle of, and is fed that id together with the given ones behind it. Three
savings, all exact: only the rows of the head that may come next are computed; given ids cost no
head; they cost no step of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from unimodal.model.choice import Choice, Noise
from unimodal.model.decode import Decoding, Layout, Matrix
from unimodal.model.decoder import Decoder
from unimodal.model.grammar import Allowed, Grammar, Taken, Walk


@dataclass(frozen=True)
class Draft:
    """One sequence to be written."""

    contexts: tuple[Sequence[int], ...]
    """Ids of its rows: the conditional one, then those of guidance, see `Choice.guide`."""
    grammar: Grammar
    guidance: tuple[float, ...] = ()
    """A scale for each row but the first."""
    key: tuple[int, ...] = (0, 0)
    """Of its noise: prompt, sample, and what else tells it apart."""
    seed: int | None = None
    """Of its noise; None: as `Drawing` says."""


@dataclass(frozen=True)
class Drawing:
    """How ids are chosen."""

    vision: Choice
    text: Choice
    """Of text, and of sizes that the model writes."""
    seed: int = 0


class Watch(Protocol):
    """What is told of sequences while they are written. An exception raised here ends it all."""

    def __call__(self, done: Mapping[int, list[int]], steps: int) -> None:
        """`done`: by number of the draft, its ids so far, where a row of codes or an id of text
        was added; `steps`: free choices made since the last call, in all drafts."""


class Backend(Protocol):
    """What writes."""

    def generate(
        self, drafts: Sequence[Draft], drawing: Drawing, watch: Watch | None = None
    ) -> list[list[int]]:
        """The ids behind each draft's context, chosen and given, EOS too if it came."""


@dataclass
class TorchBackend:
    """Our own decoder."""

    decoder: Decoder
    batch: int = 32
    """Sequences that are written at once; results do not depend on it."""
    compile: bool = False

    def generate(
        self, drafts: Sequence[Draft], drawing: Drawing, watch: Watch | None = None
    ) -> list[list[int]]:
        """See `Backend`. Drafts with equally many rows share batches, in their order."""
        written: list[list[int]] = [[] for _ in drafts]
        for rows in sorted({len(draft.contexts) for draft in drafts}):
            numbers = [i for i, draft in enumerate(drafts) if len(draft.contexts) == rows]
            layout = Layout(self.decoder, rows * min(self.batch, len(numbers)), self.compile)
            heads: dict[Allowed, tuple[Matrix, Tensor]] = {}
            for start in range(0, len(numbers), self.batch):
                mine = numbers[start : start + self.batch]
                batch = _Batch(layout, [drafts[i] for i in mine], drawing, heads)
                batch.run(mine, watch)
                for number, ids in zip(mine, batch.ids, strict=True):
                    written[number] = ids
        return written


@dataclass
class _Batch:
    """Sequences of equally many rows, written together."""

    layout: Layout
    drafts: Sequence[Draft]
    drawing: Drawing
    heads: dict[Allowed, tuple[Matrix, Tensor]]
    """Of each set of ids, its rows of the head [K, D] and the ids, int64 [K]."""
    ids: list[list[int]] = field(init=False)
    """Of each draft, as far as they have been brought over from the device."""

    def __post_init__(self) -> None:
        device = self.layout.decoder.lm_head.weight.device
        count, self.rows = len(self.drafts), len(self.drafts[0].contexts)
        self.walks: list[Walk] = [draft.grammar.start() for draft in self.drafts]
        shared = self.drawing.seed
        seeds = [shared if draft.seed is None else draft.seed for draft in self.drafts]
        self.noise = Noise(seeds, [draft.key for draft in self.drafts], device)
        scales = torch.tensor([draft.guidance for draft in self.drafts], dtype=torch.float32)
        self.scales = scales.T[:, :, None].to(device)  # [G - 1, P, 1]
        self.ids = [[] for _ in self.drafts]
        self.taken: list[list[Sequence[int]]] = [[] for _ in self.drafts]
        """Given ids behind each choice."""
        most = max(draft.grammar.most for draft in self.drafts)
        self.chosen = torch.zeros(count, most, dtype=torch.int64, device=device)
        self.brought = [0] * count
        self.device = device

    @torch.inference_mode()
    def run(self, numbers: Sequence[int], watch: Watch | None) -> None:
        contexts = [draft.contexts[g] for g in range(self.rows) for draft in self.drafts]
        most = [draft.grammar.most for _ in range(self.rows) for draft in self.drafts]
        length = max(len(one) + more for one, more in zip(contexts, most, strict=True))
        decoding = Decoding(self.layout.decoder, len(contexts), length, self.layout)
        live = [i for i, walk in enumerate(self.walks) if walk.allowed is not None]
        hidden = decoding.prefill(contexts)  # [R, D]
        if len(live) < len(self.drafts):
            hidden = self._drop(decoding, hidden, live, len(self.drafts))
        step, unseen = 0, 0
        while live:
            chosen = self._choose(hidden, live, step)  # int64 [P]
            # By a list of rows only where it must be: that waits for the device.
            self.chosen[live if len(live) < len(self.drafts) else slice(None), step] = chosen
            walks = [self.walks[i] for i in live]
            if all(walk.blind for walk in walks):
                taken = [walk.take(None) for walk in walks]
            else:
                values = chosen.tolist()
                taken = [walk.take(one) for walk, one in zip(walks, values, strict=True)]
            step += 1
            unseen += len(live)
            told = []
            for i, one, walk in zip(live, taken, walks, strict=True):
                self.taken[i].append(one.given)
                if one.given or not walk.blind:
                    told.append(i)
            if watch is not None and told:
                watch({numbers[i]: self._bring(i) for i in told}, unseen)
                unseen = 0
            kept = [place for place, walk in enumerate(walks) if walk.allowed is not None]
            if len(kept) < len(live):
                hidden = self._drop(decoding, hidden, kept, len(live))
                chosen, taken = chosen[kept], [taken[place] for place in kept]
                live = [live[place] for place in kept]
            if live:
                hidden = decoding.feed(*self._fed(chosen, taken))
        for i in range(len(self.drafts)):
            self._bring(i)

    def _drop(self, decoding: Decoding, hidden: Tensor, kept: list[int], count: int) -> Tensor:
        """Go on with the `kept` of `count` sequences."""
        rows = [g * count + place for g in range(self.rows) for place in kept]
        if rows:
            decoding.keep(rows)
        return hidden[rows]

    def _choose(self, hidden: Tensor, live: list[int], step: int) -> Tensor:
        """The next id of each live sequence, int64 [P], from hidden states [R, D]."""
        groups: dict[Allowed, list[int]] = {}
        for place, i in enumerate(live):
            allowed = self.walks[i].allowed
            assert allowed is not None
            groups.setdefault(allowed, []).append(place)
        states = hidden.unflatten(0, (self.rows, -1))  # [G, P, D]
        if len(groups) == 1:
            (allowed,) = groups
            return self._pick(allowed, states, live, step)
        chosen = torch.empty(len(live), dtype=torch.int64, device=self.device)
        for allowed, places in groups.items():
            mine = [live[place] for place in places]
            chosen[places] = self._pick(allowed, states[:, places], mine, step)
        return chosen

    def _pick(self, allowed: Allowed, states: Tensor, which: list[int], step: int) -> Tensor:
        """The next id of sequences out of one set, int64 [P], from states [G, P, D]."""
        head, ids = self._head(allowed)
        guided = allowed.kind == "vision"
        choice = self.drawing.vision if guided else self.drawing.text
        if guided and self.rows > 1:
            scales = list(self.scales if len(which) == len(self.drafts) else self.scales[:, which])
            if choice.plausible:
                logits = head(states.flatten(0, 1)).float().unflatten(0, states.shape[:2])
                combined = choice.guide(list(logits), scales)
            else:
                # Guidance and the head are both linear: the states are combined, and the head
                # has one row for each sequence.
                mixed = choice.guide(list(states.float()), scales)
                combined = head(mixed.to(states.dtype)).float()
        else:
            combined = head(states[0]).float()
        rows = None if len(which) == len(self.drafts) else which

        def noise(columns: Tensor) -> Tensor:
            return self.noise.exponential(step, ids[columns], rows)

        return ids[choice.pick(combined, noise)]

    def _head(self, allowed: Allowed) -> tuple[Matrix, Tensor]:
        if allowed not in self.heads:
            self.heads[allowed] = self.layout.head(allowed.rows), allowed.ids.to(self.device)
        return self.heads[allowed]

    def _fed(self, chosen: Tensor, taken: list[Taken]) -> tuple[Tensor, list[int] | None]:
        """Ids [R, K] to feed, and how many of them count in each row; None: all."""
        given = taken[0].given
        if all(one.shared and one.given == given for one in taken):
            ids = chosen[:, None]
            if given:
                behind = torch.tensor(given, device=self.device).expand(len(taken), -1)
                ids = torch.cat([ids, behind], dim=1)
            return ids.repeat(self.rows, 1), None
        longest = 1 + max(len(one.given) for one in taken)
        ids = torch.zeros(len(taken), longest, dtype=torch.int64)
        for place, one in enumerate(taken):
            ids[place, 1 : 1 + len(one.given)] = torch.tensor(one.given, dtype=torch.int64)
        ids = ids.to(self.device)
        ids[:, 0] = chosen
        own = [1 + len(one.given) for one in taken]
        others = [1 + len(one.given) if one.shared else 0 for one in taken]
        return ids.repeat(self.rows, 1), [*own, *others * (self.rows - 1)]

    def _bring(self, i: int) -> list[int]:
        """Ids of a draft so far, on the host."""
        start, taken = self.brought[i], self.taken[i]
        new = self.chosen[i, start : len(taken)].tolist()
        for one, given in zip(new, taken[start:], strict=True):
            self.ids[i].append(one)
            self.ids[i] += given
        self.brought[i] = len(taken)
        return self.ids[i]
