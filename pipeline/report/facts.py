"""What the report says of a run: its figures, and which of its clips are shown."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unimodal.pipeline import decide, large
from unimodal.pipeline.clips import read_parquet
from unimodal.pipeline.judged import Judged, advice, judge
from unimodal.pipeline.observers.keyframes import even
from unimodal.pipeline.report.pictures import Member, Pictures, draw
from unimodal.pipeline.settings import build
from unimodal.pipeline.stage import PartFiles

if TYPE_CHECKING:
    from unimodal.pipeline.run import Run

KEPT = 25
"""Kept clips that are shown."""
DROPPED = 100
"""Dropped clips that are shown at most, by all rules together; 10 of each rule at most."""
NEAR = 3
"""Clips on each side of a threshold."""
SOURCES = 12
"""Videos whose timeline is shown."""
CELLS = 12
"""Frames in the film strip of a video."""
GROUPS = 12
"""Groups of near-duplicates."""
MEMBERS = 6
"""Clips of such a group."""


@dataclass(frozen=True)
class Sheet:
    """Clips shown of a larger set."""

    shown: tuple[int, ...]  # rows of the run's clips
    of: int


@dataclass(frozen=True)
class Source:
    """A video and its clips, in order."""

    uri: str
    seconds: float
    clips: list[dict[str, Any]]
    strip: tuple[Member | None, ...]


class Facts:
    """What the report says of a run; everything is worked out once, when it is first asked for."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.clips = run.clips
        self.info = run.info
        self.settings = build(decide.DecideSettings, self.info["settings"]["decide"])
        self.rules: list[Judged] = judge(self.clips, self.settings)
        self.kept = pc.equal(self.clips.column("verdict"), "keep").to_numpy(zero_copy_only=False)
        self.video = pc.equal(self.clips.column("kind"), "video").to_numpy(zero_copy_only=False)

    def __len__(self) -> int:
        return self.clips.num_rows

    @cached_property
    def drops(self) -> np.ndarray:
        """Which rule (row) drops which clip (column), bool [R, N]."""
        return np.array([rule.drops for rule in self.rules], bool).reshape(
            len(self.rules), len(self)
        )

    @cached_property
    def advice(self) -> list[str]:
        """What there is to say of rules that drop almost all, or nothing."""
        return advice(self.rules, self.settings)

    @cached_property
    def folder(self) -> str:
        """The folder that all sources lie in, with its slash; names are shown from there on."""
        ends = [pc.min_max(t.column("uri")).as_py() for t in (self.clips, self.run.quarantine)]
        uris = [uri for found in ends for uri in found.values() if uri is not None]
        # What the first and the last share in order, all between them share.
        shared = os.path.commonprefix([min(uris), max(uris)]) if uris else ""  # noqa: RUF071
        return shared[: shared.rfind("/") + 1]

    def name(self, uri: str) -> str:
        """A source's name, short."""
        return uri.removeprefix(self.folder) or uri

    def numbers(self, column: str) -> np.ndarray:
        """A numeric column, float64 [N], NaN where it is null."""
        return pc.fill_null(self.clips.column(column).cast(pa.float64()), np.nan).to_numpy()

    @cached_property
    def kept_sheet(self) -> Sheet:
        """Kept clips, spread evenly."""
        return _spread(np.flatnonzero(self.kept), KEPT)

    @cached_property
    def dropped_sheets(self) -> list[tuple[int, Sheet]]:
        """For each rule (by number) that drops anything, clips that it drops."""
        found = [(i, np.flatnonzero(drops)) for i, drops in enumerate(self.drops)]
        found = [(i, rows) for i, rows in found if len(rows)]
        each = max(2, min(10, DROPPED // max(1, len(found))))
        return [(i, _spread(rows, each)) for i, rows in found[: DROPPED // 2]]

    @cached_property
    def near(self) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
        """For each threshold that drops anything, the nearest clips: dropped ones, passed ones."""
        found = []
        for i, rule in enumerate(self.rules):
            if rule.threshold is not None:
                failed, passed = _nearest(rule, rule.drops), _nearest(rule, rule.passes)
                if failed:
                    found.append((i, failed, passed))
        return found[: DROPPED // 2]

    @cached_property
    def groups(self) -> tuple[list[tuple[int, ...]], list[int]]:
        """The largest groups of near-duplicates, best first; and the sizes of all groups."""
        column = self.clips.column("dup_group")
        rows = np.flatnonzero(pc.is_valid(column).to_numpy(zero_copy_only=False))
        if not len(rows):
            return [], []
        keys = column.take(pa.array(rows)).combine_chunks().dictionary_encode()
        names, codes = keys.dictionary.to_pylist(), keys.indices.to_numpy()
        sizes = np.bincount(codes)
        largest = sorted(range(len(names)), key=lambda i: (-sizes[i], names[i]))[:GROUPS]
        ranks = self.numbers("dup_rank")
        shown = []
        for group in largest:
            members = rows[codes == group]
            order = np.lexsort((members, ranks[members]))
            shown.append(tuple(int(row) for row in members[order][:MEMBERS]))
        return shown, [int(sizes[i]) for i in sorted(range(len(names)), key=lambda i: -sizes[i])]

    @cached_property
    def sources(self) -> tuple[list[Source], int]:
        """The longest videos, in order of name; and how many videos there are."""
        rows = np.flatnonzero(self.video)
        if not len(rows):
            return [], 0
        keys = self.clips.column("uri").filter(pa.array(self.video)).dictionary_encode()
        keys = keys.unify_dictionaries()
        uris = keys.chunk(0).dictionary.to_pylist()
        codes = np.concatenate([chunk.indices.to_numpy() for chunk in keys.chunks])
        seconds = np.zeros(len(uris))
        np.maximum.at(seconds, codes, np.nan_to_num(self.numbers("end_s")[rows]))
        longest = sorted(range(len(uris)), key=lambda i: (-seconds[i], uris[i]))[:SOURCES]
        columns = ["uid", "part", "start_s", "end_s", "starts_at", "verdict", "reasons"]
        found = []
        for source in sorted(longest, key=lambda i: uris[i]):
            mine = rows[codes == source]
            clips = large.take(self.clips.select(columns), mine).to_pylist()
            strip = self._strip(mine, clips, float(seconds[source]))
            found.append(Source(uris[source], float(seconds[source]), clips, strip))
        return found, len(uris)

    def _stored(self, clips: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """The stored samples of clips, none where they are gone; a part is opened once."""
        wanted: dict[str, set[str]] = defaultdict(set)
        for clip in clips:
            wanted[clip["part"]].add(clip["uid"])
        found: dict[str, list[dict[str, Any]]] = {}
        for part, uids in wanted.items():
            files = PartFiles(self.run.path / self.info["stages"]["watch"], part)
            try:
                rows = read_parquet(files.rows, ["uid", "samples"])
            except (OSError, pa.ArrowInvalid):
                continue
            mine = pc.is_in(rows.column("uid"), pa.array(sorted(uids)))
            found |= {row["uid"]: row["samples"] or [] for row in rows.filter(mine).to_pylist()}
        return [found.get(clip["uid"], []) for clip in clips]

    def _strip(
        self, rows: np.ndarray, clips: Sequence[dict[str, Any]], seconds: float
    ) -> tuple[Member | None, ...]:
        """For each of `CELLS` equal spans of a video, a sample near its middle, if there is one."""
        starts, ends = (np.array([clip[at] for clip in clips]) for at in ("start_s", "end_s"))
        middles = [(number + 0.5) * seconds / CELLS for number in range(CELLS)]
        # Of a long film, only the samples of the clips that these moments lie in are looked at.
        near = [int(np.argmin(np.maximum(starts - at, at - ends))) for at in middles]
        samples = self._stored([clips[row] for row in near])
        cells: list[Member | None] = []
        for at, clip, stored in zip(middles, near, samples, strict=True):
            away = [(abs(s["time_s"] - at), s["member"]) for s in stored]
            distance, member = min(away, default=(seconds, ""))
            close = distance < seconds / CELLS
            cells.append((clips[clip]["part"], member) if close else None)
        return tuple(cells)

    @cached_property
    def shown(self) -> dict[int, dict[str, Any]]:
        """All clips of which a picture is shown, by row."""
        rows = {*self.kept_sheet.shown}
        rows.update(row for _, sheet in self.dropped_sheets for row in sheet.shown)
        rows.update(row for _, failed, passed in self.near for row in (*failed, *passed))
        rows.update(row for group in self.groups[0] for row in group)
        order = sorted(rows)
        taken = large.take(self.clips, pa.array(order, pa.int64())).to_pylist()
        for clip, stored in zip(taken, self._stored(taken), strict=True):
            clip["samples"] = stored
        return dict(zip(order, taken, strict=True))

    @cached_property
    def pictures(self) -> Pictures:
        """Pictures of the clips and sources that are shown."""
        strips = {source.uri: source.strip for source in self.sources[0]}
        return draw(self.run, list(self.shown.values()), strips)


def _spread(rows: np.ndarray, count: int) -> Sheet:
    return Sheet(tuple(int(rows[i]) for i in even(len(rows), count)), len(rows))


def _nearest(rule: Judged, side: np.ndarray) -> tuple[int, ...]:
    rows = np.flatnonzero(side & np.isfinite(rule.values))
    distance = np.abs(rule.values[rows] - rule.threshold)
    return tuple(int(row) for row in rows[np.lexsort((rows, distance))][:NEAR])
