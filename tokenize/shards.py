"""Tokens on disk: WebDataset tars that anyone can open, and a Parquet index beside each.

    shards/
      shard-00000.tar       per sample {key}.json (captions, metadata), {key}.vision.npy (codes);
                            of a document each text, {key}.N.txt, and further {key}.vision.N.npy
      shard-00000.parquet   one row per sample: where its codes are, what it is, its captions
      manifest.json         which tokenizer, vocabulary and settings; what there is
      quarantine.parquet    what could not be tokenized, and why
      vocabulary/  vision_tokenizer/    copies, so that everything downstream is self-contained

Equal input gives equal bytes: members carry no time and no owner, and everything is sorted. Our
own reader never walks a tar: the index says at which byte the codes of a sample lie. Nothing is
unpickled, and no name inside a tar or an index becomes a path.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unimodal.pipeline import large
from unimodal.pipeline.clips import QUARANTINE, read_parquet, write_parquet
from unimodal.pipeline.errors import UnimodalError, UsageError, full_disk
from unimodal.pipeline.files import atomic
from unimodal.pipeline.kinds import mistaken
from unimodal.tokenize.document import Image, Piece, Text, Video
from unimodal.tokenize.shard import (
    GRID,
    INDEX,
    Sample,
    read_codes,
    read_text,
    shard_paths,
    unit_in,
    unit_of,
    write_shard,
)
from unimodal.tokenize.vocabulary import Vocabulary

__all__ = ["INDEX", "Sample", "ShardWriter", "Shards"]

FORMAT = 2
HEADER = ("format", "vision_tokenizer", "vocabulary", "settings")
"""What of a manifest decides the bytes of shards."""

PLACE = ("offset", "nbytes", *GRID)
"""Columns of the index that tell where the codes of a row are, and their size."""
_SHARD = re.compile(r"shard-[0-9]{5,9}\.tar")
HELD = 1 << 13
"""Samples of which the index is held in memory."""
MAX_OPEN = 256
"""Tars that are kept open for reading."""


class VisionTokenizer(Protocol):
    """What a shard directory keeps of the vision tokenizer."""

    @property
    def codebook_size(self) -> int: ...

    @property
    def spatial_factor(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def save(self, directory: Path) -> None: ...


class ShardWriter:
    """Writes a shard directory, shard by shard; finished shards survive an interruption.

    A shard is the result of one unit of work, known by a digest. `has` tells whether the unit
    is done already, `write` does it, `finish` makes the directory readable. Until then the
    manifest says "writing". The caller sees to it that there is one writer at a time. With
    `look_only`, nothing may be written, and nothing is.

    Raises `UnimodalError` if `out` holds shards of another tokenizer, vocabulary or settings.
    """

    def __init__(
        self,
        out: Path,
        tokenizer: VisionTokenizer,
        vocabulary: Vocabulary,
        settings: Mapping[str, Any],
        scores: Sequence[str] = (),
        look_only: bool = False,
    ) -> None:
        self.out = out
        self.scores = scores
        self.codes: list[int] = []
        """Vision codes of each shard; known when finished."""
        self.header: dict[str, Any] = {
            "format": FORMAT,
            "vision_tokenizer": {
                "digest": tokenizer.digest,
                "codebook_size": tokenizer.codebook_size,
                "spatial_factor": tokenizer.spatial_factor,
            },
            "vocabulary": {"digest": vocabulary.digest(), "size": vocabulary.size},
            "settings": dict(settings),
        }
        if vocabulary.codebook_size != tokenizer.codebook_size:
            raise UnimodalError(
                f"the vocabulary has room for {vocabulary.codebook_size} vision codes, the "
                f"tokenizer has {tokenizer.codebook_size}: choose a vocabulary made for it"
            )
        check_ours(out)
        if (out / "manifest.json").exists():
            self._same(_manifest(out))
        if look_only:
            return
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "manifest.json").exists():
            _fill(out / "vocabulary", vocabulary)
            _fill(out / "vision_tokenizer", tokenizer)
            self._write_manifest({"state": "writing"})
        for stale in out.glob(".*.tmp"):  # of a writer that was killed
            stale.unlink()

    def has(self, number: int, digest: str) -> bool:
        """Whether shard `number` is there, and is the result of unit `digest`."""
        tar, index = shard_paths(self.out, number)
        if not (tar.is_file() and index.is_file()):
            return False
        try:
            unit = unit_of(index)
        except (OSError, ValueError, pa.ArrowException):
            return False
        return unit["digest"] == digest and unit["tar_bytes"] == tar.stat().st_size

    def lost(self, number: int) -> list[dict[str, str]]:
        """Rows {uri, reason} of what finished shard `number` had to leave out."""
        return list(unit_of(shard_paths(self.out, number)[1])["quarantine"])

    def begin(self, numbers: Iterable[int]) -> None:
        """From here on the directory is unfinished, and these shards are to be written."""
        if json.loads((self.out / "manifest.json").read_text())["state"] != "writing":
            self._write_manifest({"state": "writing"})
        for number in numbers:
            shard_paths(self.out, number)[1].unlink(missing_ok=True)

    def write(
        self,
        number: int,
        digest: str,
        samples: Iterable[Sample],
        quarantine: Sequence[Mapping[str, str]] = (),
    ) -> None:
        """Write one shard here and now, see `write_shard`."""
        self.begin([number])
        write_shard(self.out, number, self.header, self.scores, digest, samples, quarantine)

    def complete(self, made_of: str) -> Shards | None:
        """The shards, if they are finished and were made of the same."""
        manifest = _manifest(self.out)
        if manifest["state"] != "complete" or manifest.get("made_of") != made_of:
            return None
        try:
            return Shards.open(self.out)
        except UnimodalError:  # a shard is gone or cut: it is made again
            return None

    def finish(self, count: int, made_of: str = "") -> Shards:
        """Make the directory of shards 0..count-1 complete and open it.

        `made_of` is the digest of what they were made of, for `complete`. Shards of an earlier,
        longer run are removed. Nothing is touched if all is as it was. Raises `UnimodalError` if
        there is not a single sample.
        """
        for path in sorted(self.out.glob("shard-*")):
            digits = path.stem.removeprefix("shard-")
            if path.suffix in (".tar", ".parquet") and digits.isdigit() and int(digits) >= count:
                path.unlink()
        shards, lost, self.codes = [], [], []
        totals = dict.fromkeys(("samples", "train", "val"), 0)
        for number in range(count):
            tar, index = shard_paths(self.out, number)
            unit = unit_of(index)
            lost += unit["quarantine"]
            rows = read_parquet(index, columns=["split", *GRID, "segments"])
            inner = pa.Table.from_struct_array(pc.list_flatten(rows["segments"]))
            self.codes.append(_codes_in(rows) + _codes_in(inner))
            splits = rows["split"].to_pylist()
            totals["samples"] += len(splits)
            totals["train"] += splits.count("train")
            totals["val"] += splits.count("val")
            shards.append({"name": tar.name, "samples": len(splits), "bytes": unit["tar_bytes"]})
        lost = [{"stage": "tokenize", **row} for row in lost]
        why = self.out / "quarantine.parquet"
        write_parquet(pa.Table.from_pylist(lost, schema=QUARANTINE), why)
        if not totals["samples"]:
            raise UnimodalError(
                f"none of the clips or rows could be tokenized: {why} says why"
                + (f" (first: {lost[0]['reason']})" if lost else "")
            )
        totals |= {"vision_codes": sum(self.codes), "quarantined": len(lost)}
        rest = {"state": "complete", "shards": shards, "totals": totals}
        self._write_manifest(rest | ({"made_of": made_of} if made_of else {}))
        return Shards.open(self.out)

    def _write_manifest(self, rest: Mapping[str, Any]) -> None:
        text = json.dumps(self.header | dict(rest), indent=2, sort_keys=True) + "\n"
        path = self.out / "manifest.json"
        if not path.exists() or path.read_text() != text:
            with atomic(path) as temporary:
                temporary.write_text(text)

    def _same(self, there: Mapping[str, Any]) -> None:
        remedy = f"choose another --out, or delete {self.out} to make it anew"
        for key in ("vision_tokenizer", "vocabulary"):
            old, new = there[key]["digest"], self.header[key]["digest"]
            if old != new:
                raise UnimodalError(
                    f"the shards in {self.out} are of another {key.replace('_', ' ')} "
                    f"({str(old)[:12]}, now {new[:12]}): {remedy}"
                )
        old, new = there["settings"], self.header["settings"]
        changed = [
            f"{key} was {old.get(key)!r}, now {new.get(key)!r}"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
        ]
        if changed:
            raise UnimodalError(
                f"the shards in {self.out} have other settings: {'; '.join(changed)}; {remedy}"
            )


class Shards:
    """A finished shard directory, opened for reading. Made by `Shards.open`."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.rates: dict[str, float] = {}
        """What the run that made them did in a second: clips, codes; empty if nothing was done."""
        self._open: dict[int, int] = {}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    @classmethod
    def open(cls, directory: str | Path) -> Shards:
        """Open a directory that `unimodal tokenize` wrote.

        Raises `UnimodalError` if it is unfinished, of another format, or if a shard is missing
        or has another size than when it was written.
        """
        path = Path(directory)
        manifest = _manifest(path)
        if manifest["state"] != "complete":
            raise UnimodalError(f"{path} is unfinished: run the same unimodal tokenize again")
        for shard in manifest["shards"]:
            tar = path / shard["name"]
            for file in (tar, tar.with_suffix(".parquet")):
                if not file.is_file():
                    raise UnimodalError(f"{file} is missing: {_remedy(tar)}")
            if tar.stat().st_size != shard["bytes"]:
                raise UnimodalError(
                    f"{tar} has {tar.stat().st_size} bytes instead of {shard['bytes']}: "
                    f"{_remedy(tar)}"
                )
        return cls(path, manifest)

    @cached_property
    def index(self) -> pa.Table:
        """All rows of all shards, sorted by key: the columns of `INDEX`, then the scores.

        Of more than `HELD` samples they are not held in memory, but mapped: see `write_index`.
        """
        if len(self) > HELD:
            with tempfile.TemporaryDirectory(prefix="unimodal-") as folder:
                return large.mapped(self.write_index(Path(folder) / "index.arrow"))
        tables = list(self._indexes())
        try:
            return large.one_piece(large.sort_by(pa.concat_tables(tables), ["key"]))
        except pa.ArrowException as error:
            raise self._unequal(error) from error
        finally:
            pa.default_memory_pool().release_unused()

    def write_index(self, file: Path) -> Path:
        """Write `index` into an Arrow IPC file, for `large.mapped`; returns the file.

        Raises `UnimodalError` where there is no room for it.
        """
        try:
            tables = self._indexes()
            first = next(tables, INDEX.empty_table())
            large.write_sorted(chain([first], tables), first.schema, "key", file)
        except pa.ArrowException as error:
            raise self._unequal(error) from error
        except OSError as error:
            raise full_disk(error, file.parent) or error from error
        return file

    def _unequal(self, error: Exception) -> UnimodalError:
        return UnimodalError(
            f"the shards in {self.path} have different columns ({error}): "
            "delete it and run the same unimodal tokenize again"
        )

    def _indexes(self) -> Iterator[pa.Table]:
        """The index of each shard."""
        return (self.part(number)[0] for number in range(len(self.manifest["shards"])))

    def part(self, number: int) -> tuple[pa.Table, dict[str, Any]]:
        """The index of one shard, and what its writer noted, see `unit_of`.

        Raises `UnimodalError` for a file that cannot be read or is another's.
        """
        shard = self.manifest["shards"][number]
        tar = self.path / shard["name"]
        file = tar.with_suffix(".parquet")
        try:
            table = pq.read_table(file)
            columns = pa.schema(list(table.schema)[: len(INDEX)])
            unit = unit_in(table.schema)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UnimodalError(f"{file} cannot be read ({error}): {_remedy(tar)}") from error
        foreign = set(table["shard"].to_pylist()) - {tar.name} if columns == INDEX else {"?"}
        if foreign or len(table) != shard["samples"]:
            raise UnimodalError(f"{file} is not the index of {tar.name}: {_remedy(tar)}")
        return table.replace_schema_metadata(), unit

    def row(self, key: str) -> int:
        """Row of the index of the sample called `key`; raises `UnimodalError` that names those
        with the nearest names."""
        keys = self.index["key"].to_pylist()
        at = bisect_left(keys, key)
        if keys[at : at + 1] == [key]:
            return at
        near = difflib.get_close_matches(key, keys[max(0, at - 2000) : at + 2000], n=3, cutoff=0)
        more = f" (then {', '.join(near[1:])})" if near[1:] else ""
        raise UnimodalError(f"no sample {key} in {self.path}: the nearest is {near[0]}{more}")

    def codes(self, row: int) -> np.ndarray:
        """Codes of one row of the index, of a sample with captions: uint16 or uint32 [T, H, W].

        Raises `UnimodalError` naming the shard if its bytes are not what the index says.
        """
        number, offset, nbytes, *shape = self._place(row)
        try:
            tar = self._tar(number)
            return read_codes(tar, offset, nbytes, tuple(shape), self.codebook_size)
        except Exception as error:  # numpy's header parser lets many kinds through
            raise self._bad(row, "the codes of", error) from error

    def segments(self, row: int) -> list[Piece]:
        """Pieces of one row of the index, of a document (not of a sample with captions).

        Raises `UnimodalError` naming the shard if its bytes are not what the index says.
        """
        pieces: list[Piece] = []
        try:
            tar = self._tar(self._place(row)[0])
            for told in self.index["segments"][row].as_py() or []:
                place = (tar, told["offset"], told["nbytes"])
                if told["kind"] == "text":
                    pieces.append(Piece(Text(read_text(*place)), told["role"]))
                    continue
                shape = tuple(told[name] for name in GRID)
                codes = read_codes(*place, shape, self.codebook_size)
                vision = Image(codes[0]) if told["kind"] == "image" else Video(codes, told["fps"])
                pieces.append(Piece(vision, told["role"]))
        except Exception as error:
            raise self._bad(row, "the document", error) from error
        return pieces

    def _tar(self, number: int) -> int:
        """A descriptor of a tar."""
        if number not in self._open:
            if len(self._open) >= MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            tar = self.path / self.manifest["shards"][number]["name"]
            self._open[number] = os.open(tar, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return self._open[number]

    def _bad(self, row: int, what: str, error: Exception) -> UnimodalError:
        tar, key = (self.index[name][row].as_py() for name in ("shard", "key"))
        path = self.path / tar
        return UnimodalError(f"{path} does not hold {what} {key} ({error}): {_remedy(path)}")

    def _place(self, row: int) -> list[int]:
        """Of a row: number of the shard, offset, nbytes, T, H, W."""
        firsts, places = self._places
        number = bisect_right(firsts, row) - 1
        return [int(column[row - firsts[number]]) for column in places[number]]

    @cached_property
    def _places(self) -> tuple[list[int], list[list[np.ndarray]]]:
        """First row of each batch of the index, and the columns of `_place` in it: values of Arrow,
        one by one, take as long as all the rest of reading."""
        names = pa.array([shard["name"] for shard in self.manifest["shards"]], pa.string())
        firsts, places = [0], []
        for batch in self.index.to_batches():
            numbers = pc.index_in(batch["shard"], names).to_numpy()
            places.append([numbers, *(batch[name].to_numpy() for name in PLACE)])
            firsts.append(firsts[-1] + len(batch))
        return firsts, places

    @property
    def codebook_size(self) -> int:
        """Number of different codes."""
        return int(self.manifest["vision_tokenizer"]["codebook_size"])

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary that captions were counted with."""
        vocabulary = Vocabulary.load(self.path / "vocabulary")
        if vocabulary.digest() != self.manifest["vocabulary"]["digest"]:
            raise UnimodalError(
                f"{self.path / 'vocabulary'} is not the one of the manifest: copy it again"
            )
        return vocabulary

    @property
    def vision_tokenizer_dir(self) -> Path:
        """Where the weights lie that made the codes."""
        return self.path / "vision_tokenizer"

    def __len__(self) -> int:
        return int(self.manifest["totals"]["samples"])


def _codes_in(rows: pa.Table) -> int:
    """Codes of all rows together, which have the sizes `GRID`."""
    sizes = [pc.fill_null(rows[name], 0).to_numpy().astype(np.int64) for name in GRID]
    return int(np.prod(np.stack(sizes), axis=0).sum())


def check_ours(out: Path) -> None:
    """Raise `UnimodalError` if `out` is something else than a shard directory, or a new one."""
    if out.exists() and not out.is_dir():
        raise UnimodalError(f"{out} is a file: choose another --out")
    if out.is_dir() and not (out / "manifest.json").exists():
        begun = {"vocabulary", "vision_tokenizer", "run.lock"}
        if any(p.name not in begun and not p.name.endswith(".tmp") for p in out.iterdir()):
            raise UnimodalError(
                f"{out} is not empty and not a shards directory: choose another --out"
            )


def _fill(directory: Path, thing: Vocabulary | VisionTokenizer) -> None:
    """`thing.save(directory)`, whole or not at all."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    for old in (temporary, directory):
        shutil.rmtree(old, ignore_errors=True)
    thing.save(temporary)
    temporary.rename(directory)


def _manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    if not file.is_file():
        raise UsageError(
            mistaken(path, "shards")
            or f"no shards at {path}: unimodal curate makes a run of media, unimodal tokenize "
            "makes shards of that"
        )
    try:
        manifest = json.loads(file.read_text())
        if manifest["format"] != FORMAT:
            raise UnimodalError(
                f"{path} has shard format {manifest['format']}, this version reads {FORMAT}: "
                "install the version that wrote it, or tokenize again into a new folder"
            )
        tokenizer = manifest["vision_tokenizer"]
        int(tokenizer["codebook_size"]) + int(tokenizer["spatial_factor"])
        str(tokenizer["digest"] + manifest["vocabulary"]["digest"])
        dict(manifest["settings"])
        for shard in manifest["shards"] if manifest["state"] == "complete" else []:
            if not _SHARD.fullmatch(shard["name"]):
                raise ValueError(f"{shard['name']!r} is no name of a shard")
            int(shard["bytes"]) + int(shard["samples"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UnimodalError(
            f"{file} is damaged ({error!r}): run the same unimodal tokenize into a new folder"
        ) from error
    return manifest


def _remedy(tar: Path) -> str:
    return f"delete {tar.stem}.* and run the same unimodal tokenize again"
