"""What people see while `unimodal sample` writes: how fast it goes, pictures row by row, words.

    sample ━━━━━━━━━━━━━━━━━━━━━━━          12/64   1,234 tokens/s   0:00:41 left

With `--stream`, pictures also grow in the terminal (two pixels a character: `▀` in the colours of
the upper and the lower one) and as NAME.partial.png in -o, which is replaced as a whole and gone
at the end; words of a text come as they are written. What is not drawn yet is filled with the
code of grey, or of the frame before, and shown dim. Previews may take a tenth of the time: each
waits until the ones before it, and itself, are worth that.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unimodal.cli.outputs import PARTIAL
from unimodal.model.grammar import BlockGrammar
from unimodal.pipeline.errors import harmless, shown

if TYPE_CHECKING:
    from unimodal.model.generate import Backend, Draft, Drawing, Watch
    from unimodal.model.sample import Sampler
    from unimodal.tokenize.vocabulary import Vocabulary

SHARE = 0.1
"""Of the time, what previews may cost."""
MOST_SHOWN = 8
"""Pictures that are shown growing at a time."""
GREY = 127
DIM = 0.35
"""Brightness of what is not drawn yet."""
TALL = 24
"""Rows of the terminal that a finished picture takes, at most."""
EVERY = 30.0
"""Seconds between lines where there is no terminal."""
AGAIN = 0.1
"""Seconds between changes of the display."""


@dataclass
class Meter:
    """How many ids were chosen, how fast, and how long the rest will take."""

    outputs: int
    """That are to be made in all."""
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    """Outputs."""
    tokens: int = 0
    begun: int = 0
    """Outputs that were drafted so far."""
    drafted: int = 0
    """Tokens that they take, at most."""
    started: float | None = None

    def begin(self, most: Sequence[int]) -> None:
        """Sequences of at most so many free choices begin."""
        self.started = self.clock() if self.started is None else self.started
        self.begun += len(most)
        self.drafted += sum(most)

    def skip(self, count: int = 1) -> None:
        """Outputs that need not be made."""
        self.outputs -= count

    @property
    def total(self) -> float:
        """Tokens of all outputs: those to come are taken to be like those that began."""
        each = self.drafted / self.begun if self.begun else 0.0
        return self.drafted + each * max(0, self.outputs - self.begun)

    @property
    def elapsed(self) -> float:
        return 0.0 if self.started is None else self.clock() - self.started

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.elapsed if self.elapsed > 0 else 0.0

    @property
    def left(self) -> float | None:
        """Seconds to go, if that is known."""
        return max(0.0, self.total - self.tokens) / self.rate if self.tokens else None

    def __str__(self) -> str:
        left = "" if self.left is None else f", {_duration(self.left)} left"
        return f"{self.done} of {self.outputs} done, {self.rate:,.0f} tokens/s{left}"


@dataclass(frozen=True)
class Partial:
    """A picture, or the frame of a clip that is being drawn."""

    codes: np.ndarray
    """[H, W], drawn up to `drawn`; before it came, the frame before or -1."""
    drawn: int
    """Codes that are drawn, row by row."""
    frame: int | None = None
    """Latent frame of a clip."""


def partial(ids: Sequence[int], draft: Draft, vocabulary: Vocabulary) -> Partial | None:
    """What a sequence is drawing now, if it is drawing."""
    grammar = draft.grammar
    shape: tuple[int, ...]
    if isinstance(grammar, BlockGrammar):
        block, shape = np.array([*grammar.opening, *ids], np.int64), grammar.shape
    else:
        written = np.array([*grammar.opening, *ids], np.int64)
        (opened,) = np.nonzero(written == vocabulary.img)
        if not len(opened):
            return None
        (boi,) = np.nonzero(written[: opened[-1]] == vocabulary.boi)
        meta = vocabulary.text.decode(written[boi[-1] + 1 : opened[-1]].tolist())
        block, shape = written[opened[-1] :], tuple(int(side) for side in meta.split("*"))
    codes = block - vocabulary.vision_start
    codes = codes[(codes >= 0) & (codes < vocabulary.codebook_size)]
    height, width = shape[-2:]
    cells = height * width
    if not len(codes):
        return None
    frame = (len(codes) - 1) // cells
    canvas = np.full(cells, -1, np.int64)
    if frame:
        canvas[:] = codes[(frame - 1) * cells : frame * cells]
    now = codes[frame * cells :]
    canvas[: len(now)] = now
    return Partial(canvas.reshape(height, width), len(now), frame if len(shape) == 3 else None)


class Painter:
    """Codes of pictures that are not finished, as pixels."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    @cached_property
    def neutral(self) -> int:
        """The code of grey: what stands where nothing is drawn."""
        import torch

        codes = self.sampler.tokenizer.encode(torch.zeros(1, 1, 3, 64, 64))
        return int(np.bincount(codes.flatten().cpu().numpy()).argmax())

    def __call__(self, partials: Sequence[Partial]) -> list[np.ndarray]:
        """uint8 [H, W, 3] of each; of a latent frame the last of its pictures."""
        filled = []
        for one in partials:
            # Rows far below what is drawn are grey anyway: decoding them would cost the most.
            known = np.flatnonzero((one.codes >= 0).any(1))
            codes = one.codes[: known[-1] + 2] if len(known) else one.codes[:1]
            filled.append(np.where(codes < 0, self.neutral, codes)[None])
        painted: list[np.ndarray] = [np.empty(0)] * len(partials)
        for still in (True, False):
            mine = [i for i, one in enumerate(partials) if (one.frame is None) == still]
            made = self.sampler.canvas.pixels([filled[i] for i in mine], still) if mine else []
            for i, frames in zip(mine, made, strict=True):
                painted[i] = _dimmed(frames[-1], partials[i])
        return painted


def _dimmed(top: np.ndarray, part: Partial) -> np.ndarray:
    """A picture of which the `top` was decoded, with what is not drawn yet dim."""
    height, width = part.codes.shape
    mask = np.arange(height * width).reshape(height, width) < part.drawn
    scale = top.shape[1] // width
    picture = np.full((height * scale, width * scale, 3), GREY, np.uint8)
    picture[: len(top)] = top
    light = np.where(mask, 1.0, DIM).repeat(scale, 0).repeat(scale, 1)
    return (picture * light[..., None]).astype(np.uint8)


def half_blocks(picture: np.ndarray, columns: int, rows: int) -> Any:
    """uint8 [H, W, 3] as text of at most so many columns and rows, two pixels a character."""
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    from unimodal.tokenize.vision.pixels import resize

    height, width = picture.shape[:2]
    scale = min(columns / width, 2 * rows / height)
    if scale < 1:
        sides = (max(1, round(height * scale)), max(1, round(width * scale)))
    else:  # small pictures in whole steps, so that their pixels stay square
        sides = (height * int(scale), width * int(scale))
    small = resize(picture, sides)
    if len(small) % 2:
        small = np.concatenate([small, small[-1:]])
    drawn = Text()
    for row in range(0, len(small), 2):
        for upper, lower in zip(small[row].tolist(), small[row + 1].tolist(), strict=True):
            style = Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower))
            drawn.append("▀", style)
        if row + 2 < len(small):
            drawn.append("\n")
    return drawn


class Show:
    """All that is seen of a run. `quiet`: nothing; `stream`: pictures and words as they come."""

    def __init__(
        self,
        outputs: int,
        quiet: bool = False,
        stream: bool = False,
        folder: Path | None = None,
        words: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`folder`: for growing pictures; `words`: the stream that words of a text go to."""
        self.meter = Meter(outputs, clock)
        self.clock = clock
        self.quiet = quiet
        self.stream = stream
        self.folder = folder
        self.words = words
        self.terminal = sys.stderr.isatty() and not quiet
        self.painter: Painter | None = None
        self.vocabulary: Vocabulary | None = None
        self.drafts: Sequence[Draft] = ()
        self.names: Sequence[str] = ()
        self.heads: Sequence[str] = ()
        self.latest: dict[int, list[int]] = {}
        self.told: dict[int, str] = {}
        self.partials: set[Path] = set()
        self.spent = 0.0
        """Seconds that previews took."""
        self.last = 0.0
        """Seconds that the latest one took."""
        self.shown = self.lined = 0.0
        self.live: Any = None
        self.pictures: list[tuple[str, np.ndarray]] = []

    def __enter__(self) -> Show:
        if self.stream and not self.terminal and not self.quiet and self.words is None:
            where = f"; open {self.folder}/*{PARTIAL} to watch" if self.folder else ""
            self.note(f"stderr is no terminal: pictures do not grow here{where}")
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
        for path in self.partials:
            path.unlink(missing_ok=True)
        if not self.quiet and self.meter.tokens:
            meter = self.meter
            self.note(
                f"sample: {meter.done} done, {meter.tokens:,} tokens in {meter.elapsed:.1f} s "
                f"({meter.rate:,.0f} tokens/s)"
            )

    def note(self, message: str) -> None:
        """A line for people."""
        if self.quiet:
            return
        if self.live is not None:
            self.live.console.print(shown(message), style="dim", markup=False, highlight=False)
        else:
            print(shown(message), file=sys.stderr)

    def tell(self, message: str) -> None:
        """A line that is told even if `quiet`: something went wrong."""
        if self.live is not None:
            self.live.console.print(shown(message), style="yellow", markup=False, highlight=False)
        else:
            print(shown(message), file=sys.stderr)

    def finished(self, name: str, made: Any = None) -> None:
        """One more output is there: a finished picture stays on the terminal."""
        self.meter.done += 1
        if self.folder is not None:
            path = self.folder / f"{name}{PARTIAL}"
            path.unlink(missing_ok=True)
            self.partials.discard(path)
        if self.stream and self.terminal and isinstance(made, np.ndarray) and self.live is not None:
            if self.pictures:  # make room: what was growing is finished
                self.pictures = []
                self.live.update(self._display(), refresh=True)
            picture = made if made.ndim == 3 else made[len(made) // 2]
            columns, rows = self._room(1)
            self.live.console.print(half_blocks(picture, columns, min(rows, TALL)))

    # --- while sequences are written -------------------------------------------------------

    def begin(
        self,
        sampler: Sampler,
        drafts: Sequence[Draft],
        names: Sequence[str],
        heads: Sequence[str] = (),
    ) -> None:
        """Sequences begin, which will be files of these names; `heads`: words in front of theirs,
        which a terminal shows first."""
        self.drafts, self.names, self.latest, self.told = drafts, names, {}, {}
        self.heads = heads if self.words is sys.stdout else ()
        self.vocabulary = sampler.vocabulary
        if self.painter is None and self.stream and self.words is None:
            self.painter = Painter(sampler)
            _ = self.painter.neutral  # once, before time is taken
        self.meter.begin([_choices(draft) for draft in drafts])
        if self.terminal and self.live is None and self.words is None:
            from rich.console import Console
            from rich.live import Live

            console = Console(stderr=True)
            # Standard output is data, unless it is the same terminal: then lines go above.
            redirect = sys.stdout.isatty()
            self.live = Live(
                console=console, auto_refresh=False, transient=True, redirect_stdout=redirect
            )
            self.live.start()

    def __call__(self, done: Mapping[int, list[int]], steps: int) -> None:
        """`Watch`."""
        self.meter.tokens += steps
        if self.stream:
            if self.words is not None:
                self._say(done)
            else:
                self.latest.update(done)
                self._preview()
        now = self.clock()
        if self.live is not None and now - self.shown >= AGAIN:
            self.shown = now
            self.live.update(self._display(), refresh=True)
        elif self.live is None and not self.quiet and self.words is None:
            if self.lined == 0.0:
                self.lined = now
            elif now - self.lined >= EVERY:
                self.lined = now
                self.note(f"sample: {self.meter}")

    def _say(self, done: Mapping[int, list[int]]) -> None:
        assert self.vocabulary is not None
        for number, ids in done.items():
            text = self.vocabulary.text.decode([one for one in ids if one != self.vocabulary.eos])
            text = text.rstrip("\ufffd")  # half of a character
            if number not in self.told and self.heads:
                self.words.write(self._spoken(self.heads[number]))
            before = self.told.setdefault(number, "")
            if text.startswith(before):
                self.words.write(self._spoken(text[len(before) :]))
                self.words.flush()
                self.told[number] = text

    def _spoken(self, text: str) -> str:
        return harmless(text, "\n\t") if self.words.isatty() else text

    def _preview(self) -> None:
        if self.spent and self.spent + self.last > SHARE * self.meter.elapsed:
            return
        assert self.vocabulary is not None and self.painter is not None
        started = self.clock()
        growing = [i for i in sorted(self.latest) if not self._whole(i)][:MOST_SHOWN]
        found = [(i, partial(self.latest[i], self.drafts[i], self.vocabulary)) for i in growing]
        parts = [(i, part) for i, part in found if part is not None]
        if parts:
            painted = self.painter([part for _, part in parts])
            self.pictures = [
                (self.names[i], one) for (i, _), one in zip(parts, painted, strict=True)
            ]
            if self.folder is not None:
                for name, picture in self.pictures:
                    self._grow(self.folder / f"{name}{PARTIAL}", picture)
        self.last = self.clock() - started
        self.spent += self.last

    def _whole(self, number: int) -> bool:
        draft = self.drafts[number]
        return isinstance(draft.grammar, BlockGrammar) and len(self.latest[number]) >= (
            draft.grammar.most
        )

    def _grow(self, path: Path, picture: np.ndarray) -> None:
        from PIL import Image

        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            Image.fromarray(picture).save(temporary, format="PNG", compress_level=1)
            temporary.replace(path)
            self.partials.add(path)
        except OSError:  # a full disk is told of when results are written
            temporary.unlink(missing_ok=True)

    def _room(self, pictures: int) -> tuple[int, int]:
        """Columns and rows of the terminal that a picture may take."""
        width, height = self.live.console.size
        return max(4, width // pictures - 2), max(2, height - 5)

    def _display(self) -> Any:
        from rich.columns import Columns
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        meter = self.meter
        line = Table.grid(padding=(0, 2))
        left = "" if meter.left is None else f"{_duration(meter.left)} left"
        line.add_row(
            "sample",
            ProgressBar(total=max(1.0, meter.total), completed=meter.tokens, width=30),
            f"{meter.done}/{meter.outputs}",
            f"{meter.rate:,.0f} tokens/s",
            left,
        )
        if not self.pictures:
            return line
        columns, rows = self._room(min(4, len(self.pictures)))
        rows = rows if len(self.pictures) <= 4 else max(2, rows // 2)
        drawn = [
            Group(half_blocks(picture, columns, rows - 1), Text(name[:columns], style="dim"))
            for name, picture in self.pictures
        ]
        return Group(Columns(drawn, padding=(0, 1)), line)


def _choices(draft: Draft) -> int:
    """Free choices, at most."""
    grammar = draft.grammar
    return len(grammar) if isinstance(grammar, BlockGrammar) else grammar.most


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


@dataclass
class Watched:
    """A backend whose sequences are seen while they are written.

    Their noise is keyed by what they are of the whole run, so that it does not matter with which
    others they share a call.
    """

    backend: Backend
    sampler: Sampler
    show: Show
    keys: Sequence[tuple[int, int, int]] = ()
    """(seed, number of the request, copy) of each prompt of the call."""
    names: Sequence[str] = ()
    """Of each prompt, the file it becomes."""
    heads: Sequence[str] = ()
    """Of each prompt, the words that stand in front of those it is gone on with."""

    def generate(
        self, drafts: Sequence[Draft], drawing: Drawing, watch: Watch | None = None
    ) -> list[list[int]]:
        """See `unimodal.model.generate.Backend`."""
        places = [draft.key[0] for draft in drafts]
        keyed = []
        for draft, place in zip(drafts, places, strict=True):
            seed, *key = self.keys[place]
            keyed.append(replace(draft, key=(*key, *draft.key[2:]), seed=seed))
        heads = [self.heads[place] for place in places] if self.heads else ()
        self.show.begin(self.sampler, keyed, [self.names[place] for place in places], heads)

        def seen(done: Mapping[int, list[int]], steps: int) -> None:
            self.show(done, steps)
            if watch is not None:
                watch(done, steps)

        return self.backend.generate(keyed, drawing, seen)
