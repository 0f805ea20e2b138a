"""Files that `unimodal sample` is given: pictures, clips, and samples of shards (`SHARDS#KEY`).

Codes of shards go to the sampler as they are, without being decoded: the vision tokenizer that
made them must be the checkpoint's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unimodal.pipeline.errors import MediaError, UnimodalError, UsageError

if TYPE_CHECKING:
    from unimodal.tokenize.shards import Shards

SECONDS_SEEN = 5.0
"""Of a video that is described by a checkpoint that does not tell of the clips it saw."""
MOST_FRAMES = 4096
"""Of a clip that is continued; scaled to the size that training saw, they fit in memory."""
MOST_JSON = 64 << 20
"""Bytes of a document."""


@dataclass(frozen=True, eq=False)
class Given:
    """A picture or a clip, as pixels or as codes."""

    name: str
    digest: str
    """SHA-256 of the file's bytes, or of the codes."""
    load: Callable[[], np.ndarray]
    fps: float | None = None
    """Of a clip."""

    @cached_property
    def array(self) -> np.ndarray:
        """uint8 [H, W, 3] or [F, H, W, 3]; codes, of another type, [H, W] or [T, H, W]."""
        return self.load()

    @property
    def moving(self) -> bool:
        return self.fps is not None

    @property
    def told(self) -> dict[str, str]:
        """What is kept of it in the files that are made from it."""
        return {"name": self.name, "sha256": self.digest}


def resolve(path: str, base: Path) -> str:
    """A path of a file of prompts, counted from that file's folder."""
    return str(base / path)


def check(path: str) -> None:
    """Raise `UnimodalError` early, before a checkpoint is loaded, if `path` cannot be used."""
    place = _place(path)
    if place is not None:
        _row(*place)
        return
    from unimodal.pipeline.media import probe

    if not Path(path).is_file():
        raise MediaError("no such file; give a picture, a video or SHARDS#KEY", path)
    probe(path)


def read(
    path: str,
    tokenizer_digest: str,
    area: Callable[[], int],
    rate: Callable[[], float],
    whole: bool,
    most: int | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Given:
    """What lies at `path`: pixels, or codes of shards, which must be of this tokenizer.

    Of a video, pictures of about `area` pixels are taken at `rate` a second: all (`whole`), or
    the first `most`, or those of the first `SECONDS_SEEN`, in groups of four; area and rate are
    asked for only then. Pixels are decoded when they are looked at; `note` is told then if there
    were more. Raises `UnimodalError`.
    """
    place = _place(path)
    if place is not None:
        return _from_shards(*place, tokenizer_digest)
    from unimodal.pipeline.media import probe, read_image

    found, name = probe(path), Path(path).name
    if found.kind == "image":
        return Given(name, _sha256(path), partial(read_image, path))
    if whole:
        most = MOST_FRAMES
    elif most is None:
        most = max(4, int(SECONDS_SEEN * rate()) // 4 * 4)
    frames = partial(_frames, path, area(), rate(), most, note)
    return Given(name, _sha256(path), frames, rate())


def _frames(
    path: str, area: int, rate: float, most: int, note: Callable[[str], None]
) -> np.ndarray:
    """Pictures uint8 [F, H, W, 3] at `rate` a second, F a multiple of four and at most `most`."""
    from unimodal.pipeline.media import open_video
    from unimodal.tokenize.vision.pixels import area_size, resize

    with open_video(Path(path)) as video:
        shown = (video.probe.width, video.probe.height)
        size = area_size(shown[1], shown[0], area)
        if area_size(*size, area) != size:  # the sampler scales it, and once is enough
            size = shown[::-1]
        frames = (
            (one.pts, one.duration, resize(video.upright(one, shown, "rgb24"), size))
            for one in video.frames()
        )
        ticks = 1 / video.time_base / Fraction(rate).limit_denominator(1000)
        kept = list(islice(_on_screen(frames, ticks), most + 1))
    if len(kept) > most:
        kept = kept[:most]
        note(f"of a clip the first {most} frames are looked at ({most / rate:.3g} s)")
    if len(kept) < 4:
        raise MediaError(f"too short: under four frames at {rate:g} a second", path)
    return np.stack(kept[: len(kept) // 4 * 4])


def _on_screen(
    frames: Iterable[tuple[int, int, np.ndarray]], ticks: Fraction
) -> Iterator[np.ndarray]:
    """What is on screen every so many ticks, from the first frame (pts, duration, picture) on."""
    due: Fraction | None = None
    last: tuple[int, int, np.ndarray] | None = None
    for frame in frames:
        due = Fraction(frame[0]) if due is None else due
        while last is not None and due < frame[0]:
            yield last[2]
            due += ticks
        last = frame
    while last is not None and due is not None and due < last[0] + max(1, last[1]):
        yield last[2]
        due += ticks


def read_document(
    asked: str | Sequence[Mapping[str, str]], base: Path
) -> tuple[list[tuple[str, str]], str]:
    """Pieces (kind, text or path) of a document, and its name; paths from its own folder.

    A document is a JSON list of {"text": …} and {"image": "path"}; or `SHARDS#KEY`. Raises
    `UsageError` that names the piece that is neither.
    """
    name, folder, pieces = "document", base, asked
    if isinstance(asked, str):
        path = Path(resolve(asked, base))
        name, folder = path.name, path.parent
        try:
            if path.stat().st_size > MOST_JSON:
                raise UsageError(f"{path}: over {MOST_JSON} bytes, this is no document")
            pieces = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: not JSON ({error})") from error
        if isinstance(pieces, dict):  # what `unimodal sample` wrote
            pieces = pieces.get("document", pieces)
    if not isinstance(pieces, list | tuple) or not pieces:
        raise UsageError(f'{name}: a document is a list, [{{"text": "…"}}, {{"image": "path"}}]')
    read: list[tuple[str, str]] = []
    for number, piece in enumerate(pieces):
        known = isinstance(piece, Mapping) and len(piece) == 1
        kind, value = next(iter(piece.items())) if known else ("", None)
        if kind not in ("text", "image") or not isinstance(value, str):
            raise UsageError(
                f'{name}, piece {number}: neither {{"text": "…"}} nor {{"image": "path"}}'
            )
        read.append((kind, value if kind == "text" else resolve(value, folder)))
    return read, name


# --- shards --------------------------------------------------------------------------------


def _place(path: str) -> tuple[str, str] | None:
    """Shard directory and key, if `path` means a sample of shards."""
    folder, mark, key = path.rpartition("#")
    if mark and Path(folder).is_dir() and not Path(path).exists():
        return folder, key
    return None


@lru_cache(maxsize=8)
def _open(folder: str) -> Shards:
    from unimodal.tokenize.shards import Shards

    return Shards.open(folder)


def _row(folder: str, key: str) -> tuple[Shards, int]:
    shards = _open(folder)
    return shards, shards.row(key)


def _from_shards(folder: str, key: str, tokenizer_digest: str) -> Given:
    from unimodal.tokenize.document import Image, Video

    shards, row = _row(folder, key)
    theirs = shards.manifest["vision_tokenizer"]["digest"]
    if theirs != tokenizer_digest:
        raise UnimodalError(
            f"the codes of {folder} are of another vision tokenizer ({theirs[:12]}) than this "
            f"checkpoint's ({tokenizer_digest[:12]}): tokenize with the checkpoint's, or give "
            "the picture itself"
        )
    if shards.index["task"][row].as_py() == "caption":
        codes, fps = shards.codes(row), shards.index["fps"][row].as_py()
        codes = codes if shards.index["kind"][row].as_py() == "video" else codes[0]
    else:
        seen = [piece.segment for piece in shards.segments(row)]
        vision = next((one for one in seen if isinstance(one, Image | Video)), None)
        if vision is None:
            raise UnimodalError(f"{folder}#{key}: a text; give a sample with a picture or a clip")
        codes, fps = vision.codes, vision.fps if isinstance(vision, Video) else None
    codes = np.ascontiguousarray(codes.astype(np.int64))
    return Given(key, hashlib.sha256(codes.tobytes()).hexdigest(), lambda: codes, fps)


def _sha256(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
