"""Learning from preferences: of two samples of one prompt, more like the better one.

Legend: P pairs, T packed tokens, V vocabulary; w the chosen sample, l the rejected one.

    loss = mean over pairs of  -log sigmoid(margin) + next_token * mean NLL of the chosen ids
    margin = beta * [(log p(w) - log p_ref(w)) - (log p(l) - log p_ref(l))]

The first term is DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), the sum of both is what Emu3
trains with (arXiv 2409.18869, §2.5). Emu3 publishes neither beta, nor the weight of the second
term, nor which ids count: here 0.1, 1, and the vision codes alone, since all other ids of a block
are given to the sampler. The mean of the second term is taken per pair, as in Pang et al. 2024
(arXiv 2404.19733), so that a pair counts the same whatever its size. The reference is the decoder
that training starts from; its log-probabilities are computed once, before the first step: that
costs a third of one epoch, where a frozen copy costs a third of every epoch and its memory.

Nothing of [T, V] exists: log-probabilities come from one pass through the head without gradients.
They give each pair's sigmoid(-margin), and with it the weight of every target in the gradient:

    d loss / d NLL(t) = +beta * sigmoid(-margin) (+ next_token / ids of w)    for t of w
                        -beta * sigmoid(-margin)                               for t of l

so the second pass is the same chunked cross-entropy as everywhere, with these weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from unimodal.model.checkpoint import find
from unimodal.model.data import KINDS, Batch, DataSettings
from unimodal.model.decoder import Decoder
from unimodal.model.loss import LossByKind, weighted_cross_entropy
from unimodal.model.packing import pack
from unimodal.model.records import read_about
from unimodal.pipeline.errors import UnimodalError, UsageError, first_line
from unimodal.pipeline.files import atomic
from unimodal.pipeline.settings import Settings
from unimodal.tokenize.vocabulary import Vocabulary

if TYPE_CHECKING:
    from unimodal.model.parallel import Mesh

FILE = "triplets.parquet"
COLUMNS = ("prompt", "prompt_ids", "chosen_ids", "rejected_ids", "vocabulary")
"""What training reads of a triplet; `unimodal.model.prefer` documents them all."""
MEANS = ("dpo", "misranked")
"""Reported beside the losses of KINDS: the first term, and the share of pairs of margin < 0."""


class DPOSettings(Settings):
    """The preference objective. None of it is published for Emu3."""

    beta: float = Field(default=0.1, gt=0)
    """How much a difference in log-probability counts: lower lets the decoder move further."""
    next_token: float = Field(default=1.0, ge=0)
    """Weight of the mean next-token loss on the chosen ids."""
    over: Literal["vision", "answer"] = "vision"
    """Ids whose log-probabilities are summed: vision codes, or all ids behind the prompt."""


@dataclass(frozen=True)
class PairBatch(Batch):
    """A pack of pairs. Documents come in twos: chosen, rejected.

    `weights` share out 1 over the ids of each chosen document that count, so that their sum is
    the number of pairs: what the sum of losses is divided by.
    """

    counted: Tensor
    """float32 [T]: 1 where an id of either document counts."""
    document: Tensor
    """int64 [T]: number of each token's document."""
    reference: np.ndarray
    """float64 [P, 2]: log-probability of chosen and rejected under the reference."""

    def to(self, device: torch.device | str) -> PairBatch:
        """The same batch with its tensors on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("counted", "document")}
        return replace(super().to(device), **moved)  # type: ignore[return-value]


def log_probabilities(decoder: Decoder, losses: Tensor, batch: PairBatch) -> Tensor:
    """Of chosen and rejected, float64 [P, 2], from each token's loss float32 [T]."""
    # Float64: a margin is a small difference of sums over thousands of ids.
    sums = torch.zeros(batch.reference.size, dtype=torch.float64, device=losses.device)
    sums.index_add_(0, batch.document, (losses * batch.counted).double())
    if decoder.share is not None:  # the other tokens of the pack are with other processes
        sums = decoder.share.gather(sums[None]).sum(0)
    return -sums.view(-1, 2)


def pair_loss(
    decoder: Decoder, batch: PairBatch, tally: LossByKind, settings: DPOSettings
) -> Tensor:
    """Sum over the batch's pairs of the loss above; float32 scalar that backpropagates.

    Adds to `tally`, which has KINDS + MEANS as names.
    """
    hidden = decoder.hidden(batch.ids, batch.positions, decoder.packed(batch.lengths))
    head = decoder.lm_head.weight
    with torch.no_grad():
        _, losses = weighted_cross_entropy(hidden, head, batch.targets, batch.counted)
        reference = torch.from_numpy(batch.reference).to(losses.device)
        ratios = log_probabilities(decoder, losses, batch) - reference
        margins = settings.beta * (ratios[:, 0] - ratios[:, 1])  # [P]
        preference = -F.logsigmoid(margins)
        pull = settings.beta * torch.sigmoid(-margins).float()
        signed = torch.stack([pull, -pull], 1).flatten()[batch.document] * batch.counted
        value = settings.next_token * (losses * batch.weights).sum()
        tally.add(losses, batch.kinds, batch.weights)
        if decoder.share is None or decoder.share.rank == 0:  # pairs are known to all who share
            value = value + preference.sum().float()
            for name, values in zip(MEANS, (preference, (margins < 0).double()), strict=True):
                kinds = torch.full((len(values),), tally.names.index(name))
                tally.add(values, kinds, torch.ones_like(values))
    weights = signed + settings.next_token * batch.weights
    surrogate, _ = weighted_cross_entropy(hidden, head, batch.targets, weights)
    return value + (surrogate - surrogate.detach())


@dataclass(frozen=True)
class Position:
    """Of the next pack. All that a resumed run needs to know of the pairs."""

    epoch: int = 0
    pack: int = 0


class Triplets:
    """Pairs of sampled token ids behind one prompt, from files that `unimodal prefer` wrote."""

    @classmethod
    def behind(cls, init: Path | None, paths: Sequence[Path]) -> Triplets:
        """Triplets for the checkpoint that training starts from, whose vocabulary they are of."""
        if init is None:
            raise UsageError("the objective dpo starts from a trained checkpoint: give --init DIR")
        top, _ = find(init)
        if not (top / "data.json").is_file() or not (top / "vocabulary").is_dir():
            raise UnimodalError(
                f"{top} has no vocabulary or no data.json: copy those of the checkpoint that the "
                "triplets were sampled from into it"
            )
        made = cls(paths, Vocabulary.load(top / "vocabulary"))
        made.path = top
        made.about = {**read_about(top), "triplets": made.digest()}
        return made

    def __init__(self, paths: Sequence[Path], vocabulary: Vocabulary) -> None:
        """Read Parquet files, or directories with one; raises `UnimodalError` for a file that is
        none, another vocabulary, or ids outside it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = Path()
        """Directory with `vocabulary` and `vision_tokenizer`, as of shards."""
        self.about: dict[str, Any] = {}
        """What the checkpoint remembers of its data."""
        self.vocabulary = vocabulary
        tables = []
        for path in paths:
            file = path / FILE if path.is_dir() else path
            try:
                tables.append(pq.read_table(file, columns=list(COLUMNS)))
            except (OSError, pa.ArrowException) as error:
                reason = first_line(error)
                raise UnimodalError(
                    f"{file} holds no triplets ({reason}): make them with unimodal prefer"
                ) from error
        self.table = pa.concat_tables(tables)
        others = set(self.table.column("vocabulary").unique().to_pylist()) - {vocabulary.digest()}
        if others:
            raise UnimodalError(
                "the triplets' ids are of another vocabulary than the checkpoint's: sample them "
                "from a checkpoint of the same family"
            )
        self._ids = {name: _lists(self.table.column(name)) for name in COLUMNS[1:4]}
        for name, (_, ids) in self._ids.items():
            if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary.size:
                raise UnimodalError(f"the triplets' {name} are outside the vocabulary: make again")

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def prompts(self) -> list[str]:
        """Their texts, each once, in order."""
        return list(dict.fromkeys(self.table.column("prompt").to_pylist()))

    def digest(self) -> str:
        """Of all ids, 16 hex digits: tells whether a run is resumed with the same pairs."""
        import hashlib

        found = hashlib.sha256()
        for starts, ids in self._ids.values():
            found.update(starts.tobytes() + ids.tobytes())
        return found.hexdigest()[:16]

    def ids(self, pair: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64: prompt, chosen, rejected."""
        found = [ids[starts[pair] : starts[pair + 1]] for starts, ids in self._ids.values()]
        prompt, chosen, rejected = (one.astype(np.int64) for one in found)
        return prompt, chosen, rejected

    def lengths(self) -> np.ndarray:
        """Tokens that each pair takes in a pack, int64 [pairs]."""
        prompt, chosen, rejected = (np.diff(starts) for starts, _ in self._ids.values())
        return 2 * (prompt - 1) + chosen + rejected


def _lists(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Starts int64 [rows + 1] and all values of a column of lists."""
    import pyarrow as pa

    try:
        one = pa.concat_arrays([chunk.cast(pa.large_list(pa.int32())) for chunk in column.chunks])
        starts = one.offsets.to_numpy().astype(np.int64)
        return starts - starts[0], one.flatten().to_numpy(zero_copy_only=False)
    except (pa.ArrowException, ValueError) as error:
        raise UnimodalError(f"triplets' ids are no lists of whole numbers ({error})") from error


class Pairs:
    """The endless stream of packs of pairs from a position on; stands where `data.Loader` does.

    The order is a pure function of (seed, epoch). Both documents of a pair are in one pack, each
    with attention of its own.
    """

    def __init__(
        self,
        triplets: Triplets,
        settings: DPOSettings,
        data: DataSettings,
        seed: int,
        cursor: Position | None = None,
    ) -> None:
        """Raises `UnimodalError` if no pair fits in `data.context`."""
        self.samples = triplets
        self.settings = settings
        self.context = data.context
        self.seed = seed
        self.cursor = cursor or Position()
        self.reference = np.zeros((len(triplets), 2))
        """Log-probabilities under the reference; `measure` fills it."""
        lengths = triplets.lengths()
        self.fitting = np.flatnonzero(lengths <= self.context)
        self.skipped = len(lengths) - len(self.fitting)
        """Pairs longer than the context, which are left out whole."""
        self.lengths = lengths[self.fitting]
        if not len(self.fitting):
            raise UnimodalError(
                f"no pair of the triplets fits in data.context = {self.context} tokens (the "
                f"shortest of {len(lengths)} takes {min(lengths, default=0)}): raise it"
            )
        self._planned: tuple[int, list[list[int]]] = (-1, [])

    def packs(self, epoch: int) -> list[list[int]]:
        """Pairs of each pack of an epoch, in training order."""
        if self._planned[0] != epoch:
            shuffle = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            order = shuffle.permutation(len(self.fitting))
            packs = pack(self.lengths[order], self.context)
            chosen = [[pair for pair, _, _ in packs[i]] for i in shuffle.permutation(len(packs))]
            self._planned = epoch, [self.fitting[order[pairs]].tolist() for pairs in chosen]
        return self._planned[1]

    def step(self, packs: int, rank: int = 0, world: int = 1) -> list[Batch]:
        """This rank's packs of the next step, which has `packs` over all ranks."""
        mine: list[Batch] = []
        for number in range(packs):
            if self.cursor.pack >= len(self.packs(self.cursor.epoch)):
                self.cursor = Position(self.cursor.epoch + 1)
            if number % world == rank:
                mine.append(self.batch(self.packs(self.cursor.epoch)[self.cursor.pack]))
            self.cursor = replace(self.cursor, pack=self.cursor.pack + 1)
        return mine

    def batch(self, pairs: Sequence[int]) -> PairBatch:
        """The documents of these pairs, chosen before rejected."""
        vocabulary = self.samples.vocabulary
        ids, targets, weights, counted = [], [], [], []
        for pair in pairs:
            prompt, *answers = self.samples.ids(pair)
            for chosen, answer in zip((1, 0), answers, strict=True):
                whole = np.concatenate([prompt, answer])
                on = np.arange(1, len(whole)) >= len(prompt)
                if self.settings.over == "vision":
                    on &= vocabulary.is_vision(whole[1:])
                if not on.any():
                    raise UnimodalError(f"pair {pair} of the triplets has no ids that count")
                ids.append(whole[:-1])
                targets.append(whole[1:])
                counted.append(on.astype(np.float32))
                weights.append(counted[-1] * chosen / on.sum())
        lengths = [len(one) for one in ids]
        vision = vocabulary.is_vision(target := np.concatenate(targets))
        kinds = [KINDS.index(name) for name in ("generation/vision", "structure")]
        return PairBatch(
            ids=torch.from_numpy(np.concatenate(ids)),
            targets=torch.from_numpy(target),
            weights=torch.from_numpy(np.concatenate(weights).astype(np.float32)),
            kinds=torch.from_numpy(np.where(vision, *kinds)),
            positions=torch.cat([torch.arange(length) for length in lengths]),
            lengths=lengths,
            keys=[f"pair {pair}" for pair in pairs],
            counted=torch.from_numpy(np.concatenate(counted)),
            document=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
            reference=self.reference[list(pairs)],
        )

    def __str__(self) -> str:
        left_out = f" ({self.skipped} longer than data.context skipped)" if self.skipped else ""
        packs = self.packs(self.cursor.epoch)
        full = self.lengths.sum() / (len(packs) * self.context)
        return f"{len(self.fitting)} pairs{left_out}; packs {full:.1%} full"

    def refer(self, decoder: Decoder, file: Path, mesh: Mesh, resumed: bool) -> None:
        """Measure the reference, which `decoder` still is, and keep it in `file`; a resumed run
        reads it from there."""
        if not resumed:
            self.measure(decoder, mesh)
            if mesh.is_main:
                with atomic(file) as temporary, temporary.open("wb") as out:
                    np.save(out, self.reference)
            return
        try:
            self.reference = np.load(file).reshape(self.reference.shape)
        except (OSError, EOFError, ValueError) as error:
            raise UnimodalError(
                f"{file} does not hold the reference's log-probabilities ({error}): "
                "train anew in another directory"
            ) from error

    @torch.no_grad()
    def measure(self, decoder: Decoder, mesh: Mesh) -> None:
        """Fill `reference` with log-probabilities under `decoder`, as it is now."""
        decoder.eval()
        packs, table = self.packs(0), torch.zeros(self.reference.shape, dtype=torch.float64)
        table = table.to(device := decoder.lm_head.weight.device)
        for first in range(0, len(packs), mesh.data_world):
            number = first + mesh.data_rank
            pairs = packs[min(number, len(packs) - 1)]  # all ranks do alike, the last ones idly
            batch: Any = mesh.split(self.batch(pairs)).to(device)
            hidden = decoder.hidden(batch.ids, batch.positions, decoder.packed(batch.lengths))
            _, losses = weighted_cross_entropy(
                hidden, decoder.lm_head.weight, batch.targets, batch.counted
            )
            found = log_probabilities(decoder, losses, batch)
            if number < len(packs) and (decoder.share is None or decoder.share.rank == 0):
                table[pairs] = found
        self.reference = mesh.sum(table).cpu().numpy()
