"""A stage is a function from a part's rows to columns, and a folder that remembers its results.

    run/watch-3f1c…/<part>.quarantine.parquet   only if something could not be read
    run/watch-3f1c…/<part>.frames.tar           files that later stages read
    run/watch-3f1c…/<part>.parquet              renamed into place last: the part counts as done

The folder's name covers the stage's code version, its settings and the stages it reads. So
resume is "skip what exists", and a changed setting works in a folder of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from unimodal.pipeline.clips import QUARANTINE, table, write_parquet
from unimodal.pipeline.files import atomic


@dataclass(frozen=True)
class Stage:
    """Name and identity of a stage in one configuration."""

    name: str
    version: int  # raised by hand when the code's results change
    settings: str  # digest
    reads: tuple[str, ...] = ()  # folders of the stages before it, or digests of other inputs

    @property
    def folder(self) -> str:
        """Name of the stage's folder in a run directory."""
        text = json.dumps([self.name, self.version, self.settings, sorted(self.reads)])
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class PartFiles:
    """The files of one part in one stage's folder."""

    folder: Path
    part: str

    @property
    def rows(self) -> Path:
        """The commit mark: the part is done if and only if this exists."""
        return self.folder / f"{self.part}.parquet"

    @property
    def quarantine(self) -> Path:
        """What of the part could not be read; absent when all could."""
        return self.folder / f"{self.part}.quarantine.parquet"

    @property
    def frames(self) -> Path:
        """Keyframes, a WebDataset tar."""
        return self.folder / f"{self.part}.frames.tar"

    def done(self) -> bool:
        """Whether the part was committed."""
        return self.rows.exists()

    def commit(
        self,
        rows: pa.Table,
        quarantined: Sequence[dict[str, str]],
        write_frames: Callable[[Path], None] | None = None,
    ) -> None:
        """Write everything of the part, its rows last."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if quarantined:
            write_parquet(table(quarantined, QUARANTINE), self.quarantine)
        else:
            self.quarantine.unlink(missing_ok=True)
        if write_frames is not None:
            with atomic(self.frames) as temporary:
                write_frames(temporary)
        write_parquet(rows, self.rows)
