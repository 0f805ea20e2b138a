"""Read back the pictures that the shared decode stored, so that no stage opens a video again."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unimodal.pipeline.clips import read_parquet
from unimodal.pipeline.errors import MediaError, UnimodalError
from unimodal.pipeline.stage import PartFiles


@dataclass(frozen=True)
class Sample:
    """One stored picture of a clip."""

    time_s: float | None  # from the source's first frame; None for an image
    keyframe: bool  # captioners see it
    scoring: bool  # scorers see it
    hash: int
    jpeg: bytes

    @classmethod
    def of(cls, row: Mapping[str, Any], jpeg: bytes) -> Sample:
        """The picture that a row of `clips.SAMPLE` speaks of."""
        return cls(row["time_s"], row["keyframe"], row["scoring"], row["hash"], jpeg)

    def bgr(self) -> np.ndarray:
        """Its pixels, uint8 BGR [H, W, 3]; raises `MediaError` if the JPEG is broken."""
        import cv2

        found = cv2.imdecode(np.frombuffer(self.jpeg, np.uint8), cv2.IMREAD_COLOR)
        if found is None:
            raise MediaError("a stored frame cannot be decoded: remove the part and run again")
        return found


@dataclass(frozen=True)
class Clip:
    """A clip with its pictures, as scorers are given it."""

    row: Mapping[str, Any]  # the columns of `clips.WATCH`
    samples: tuple[Sample, ...]  # in order of time

    @property
    def scoring(self) -> tuple[Sample, ...]:
        """The (at most) 3 samples that scorers look at; the one picture of an image."""
        return tuple(sample for sample in self.samples if sample.scoring)


def read_clips(folder: Path, part: str) -> Iterator[Clip]:
    """Clips of a part, in order of uid, each with its pictures; one clip in memory at a time.

    `folder` is a watch stage's. Raises `UnimodalError` if the tar does not hold what the rows say.
    """
    files = PartFiles(folder, part)
    rows = read_parquet(files.rows).to_pylist()
    try:
        with tarfile.open(files.frames) as tar:
            for row in sorted(rows, key=lambda row: row["uid"]):
                yield Clip(row, tuple(_samples(tar, row, files.frames)))
    except (tarfile.TarError, FileNotFoundError) as error:
        raise UnimodalError(
            f"{files.frames}: cannot be read ({error}); remove {files.rows} and run curate again"
        ) from error


def read_clip(tar: tarfile.TarFile, row: Mapping[str, Any]) -> Clip:
    """One clip by name from an opened frames tar; raises `KeyError` if it is not in there."""
    samples = []
    for sample in row["samples"]:
        file = tar.extractfile(sample["member"])
        if file is None:
            raise KeyError(sample["member"])
        samples.append(Sample.of(sample, file.read()))
    return Clip(row, tuple(samples))


def _samples(tar: tarfile.TarFile, row: Mapping[str, Any], path: Path) -> Iterator[Sample]:
    for sample in row["samples"]:
        member = tar.next()
        while member is not None and member.name != sample["member"]:
            member = tar.next()
        file = tar.extractfile(member) if member is not None else None
        if file is None:
            raise tarfile.ReadError(f"it lacks {sample['member']}")
        yield Sample.of(sample, file.read())
