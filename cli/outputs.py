"""Files that `unimodal sample` makes: each tells its origin, and is there whole or not at all.

    out/
      000-a-red-kite-s0-0.png      number of the request, its words, seed, number of the copy;
                                   of words that are not all of it a digest too: …-1f0c2a9b-s0-0
      003-a-story-s0-0/            a document: document.json, its pictures, index.html
      sheet-s0.png                 all pictures at a glance; of a clip its middle frame
      results.jsonl                a line for each file, in order
      failed.jsonl                 lines of the file of prompts that could not be used, and why

What a file was made from (prompt, seed, settings, digest of the checkpoint, version) stands in
the file itself: PNG in an iTXt chunk `unimodal`, WebP in its EXIF description, MP4 and GIF in
their comment; of a text in results.jsonl. A file that says what is asked now is not made again.
There is no time of day in any of them: the same command writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimodal.pipeline.errors import UsageError, full_disk
from unimodal.pipeline.files import atomic
from unimodal.pipeline.lock import run_lock
from unimodal.pipeline.progress import Progress

if TYPE_CHECKING:
    import numpy as np

RESULTS, FAILED = "results.jsonl", "failed.jsonl"
PARTIAL = ".partial.png"
"""Ends the name of a picture that is being drawn."""
MADE = ("file", "pixels", "text")
"""What a record has besides what was asked."""
CELL = 256
"""Pixels of the longer side of a picture on the sheet, at most."""
MOST_ON_SHEET = 400

STYLE = (
    "body{font:1.05rem/1.5 system-ui,sans-serif;max-width:42rem;margin:3rem auto;padding:0 1rem}"
    "img{display:block;margin:1.2rem 0;min-width:12rem;max-width:100%;image-rendering:pixelated}"
    ".given{opacity:.6}"
)

_NAME = re.compile(r"(\d+)-.*-s\d+-(\d+)(\.[a-z0-9]+)?")
# A file of ours that was being written: any other .tmp in the folder is somebody else's.
_STALE = re.compile(
    r"\.(?:\d{3,}-.+-s\d+-\d+(?:\.[a-z0-9]+|\.partial\.png)|sheet-s\d+\.png|results\.jsonl"
    r"|failed\.jsonl)\.(\d+)\.tmp"
)
LONGEST_SLUG = 48, 120
"""Characters and bytes of a prompt in the name of a file."""


def name_of(number: int, title: str, seed: int, copy: int) -> str:
    """What the files of a request are called, without suffix."""
    return f"{number:03d}-{slug_of(title)}-s{seed}-{copy}"


def slug_of(title: str) -> str:
    """The words of a prompt, in any script. Where it is not all of it (capitals, commas, what is
    too long), a digest follows: no two prompts have the same."""
    words = unicodedata.normalize("NFC", unicodedata.normalize("NFC", title).casefold())
    kept = (
        c if c.isalnum() or c == "_" or unicodedata.category(c)[0] == "M" else "-" for c in words
    )
    slug = re.sub("-+", "-", "".join(kept)).strip("-")
    characters, most = LONGEST_SLUG
    if not title:
        return "empty"
    whole = slug.replace("-", " ") == title != "empty"
    if whole and len(slug) <= characters and len(slug.encode()) <= most:
        return slug
    digest = hashlib.sha256(title.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    slug = slug[: characters - 9].encode()[: most - 9].decode("utf-8", "ignore").strip("-")
    return f"{slug or 'empty'}-{digest}"


class Folder:
    """The directory of results. Checked to be writable when it is made; raises `UsageError`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        try:
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=out):
                pass
        except OSError as error:
            reason = error.strerror or str(error)
            raise UsageError(f"{out} cannot be written: {reason}; name another -o") from error
        for path in out.glob(".*.tmp"):  # of a process that was killed
            match = _STALE.fullmatch(path.name)
            if match and not _alive(int(match[1])):
                path.unlink(missing_ok=True)
        self.records = _records(out)
        """By name of the file, what results.jsonl says."""

    @contextmanager
    def held(self, progress: Progress) -> Iterator[None]:
        """Let nobody else write here while the block runs; raises `UnimodalError` if one does."""
        with run_lock(self.out, progress):
            self.records = _records(self.out)  # another may have written them until now
            yield

    def done(self, name: str, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of file `name` if it is there and was made from what is `asked` now."""
        path = self.out / name
        if not path.exists():
            return None
        if path.suffix == ".txt":
            record = self.records.get(name)
            if record is None or str(record.get("text")).encode() != path.read_bytes():
                return None
        else:
            record = read_about(path)
        if record is None:
            return None
        told = {key: value for key, value in record.items() if key not in MADE}
        if told != json.loads(json.dumps(dict(asked))):
            return None
        return {"file": name, **record}

    def write(self, name: str, made: Any, fps: float | None, asked: Mapping[str, Any]) -> Path:
        """Write what was made under `name` and note it in results.jsonl: uint8 pixels [H, W, 3]
        or [F, H, W, 3], a text, or a document, see `document`. Raises `UnimodalError` if the disk
        is full.
        """
        from unimodal.model import media

        path = self.out / name
        record: dict[str, Any] = dict(asked)
        try:
            if isinstance(made, str):
                record["text"] = made
                _put(path, made.encode())
            elif isinstance(made, list):
                record["pixels"] = [list(one.shape[:2]) for one in made if not isinstance(one, str)]
                document(path, made, record)
            else:
                record["pixels"] = list(made.shape[:-1])
                form = path.suffix[1:]
                if fps is None:
                    _put(path, media.picture(made, form, record))
                else:
                    _put(path, media.clip(made, fps, form, record))
            self.note({"file": name, **record})
        except OSError as error:
            raise full_disk(error, self.out) or error from error
        return path

    def note(self, record: dict[str, Any]) -> None:
        """Append a record, unless it is there; see `finish`."""
        if self.records.get(record["file"]) == record:
            return
        self.records[record["file"]] = record
        with (self.out / RESULTS).open("ab") as file:
            # What a killed process left of a line ends here.
            file.write(b"\n" * _torn(file) + _line(record))

    def finish(self, failed: Sequence[Mapping[str, Any]] = ()) -> None:
        """Put results.jsonl in order, without files that are gone, and write failed.jsonl."""
        kept = [one for one in self.records.values() if (self.out / one["file"]).exists()]
        try:
            _keep(self.out / RESULTS, sorted(kept, key=_place))
            _keep(self.out / FAILED, failed)
        except OSError as error:
            raise full_disk(error, self.out) or error from error

    def sheet(
        self, names: Sequence[str], seed: int, columns: int, about: Mapping[str, Any]
    ) -> Path:
        """The pictures and middle frames of these files side by side.

        They are read from the files, so that a run that was interrupted makes the same sheet.
        """
        from unimodal.model import media

        pictures = [_fit(_middle(self.out / name), CELL) for name in names[:MOST_ON_SHEET]]
        path = self.out / f"sheet-s{seed}.png"
        try:
            _put(path, media.picture(contact_sheet(pictures, columns), "png", about))
        except OSError as error:
            raise full_disk(error, self.out) or error from error
        return path


def contact_sheet(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures uint8 [H, W, 3] of any sizes, each in the middle of its cell."""
    import numpy as np

    from unimodal.model.canvas import contact_sheet as side_by_side

    height, width = (max(one.shape[side] for one in pictures) for side in (0, 1))
    cells = []
    for one in pictures:
        cell = np.full((height, width, 3), 255, np.uint8)
        top, left = (height - one.shape[0]) // 2, (width - one.shape[1]) // 2
        cell[top : top + one.shape[0], left : left + one.shape[1]] = one
        cells.append(cell)
    return side_by_side(cells, columns)


def document(folder: Path, pieces: Sequence[Any], about: Mapping[str, Any]) -> None:
    """Texts and pictures uint8 [H, W, 3] as a folder; document.json, written last, makes it whole.

    Its list of pieces is what `--prompts document.json` reads, so that it can be gone on with.
    """
    from unimodal.model import media
    from unimodal.pipeline.markup import h

    listed: list[dict[str, str]] = []
    shown: list[Any] = []
    for number, piece in enumerate(pieces):
        kind = "given" if number < int(about.get("given", 0)) else None
        if isinstance(piece, str):
            listed.append({"text": piece})
            shown += [h("p", line, class_=kind) for line in piece.splitlines() if line.strip()]
        else:
            name = f"{number:02d}.png"
            _put(folder / name, media.picture(piece, "png", about))
            listed.append({"image": name})
            shown.append(h("img", src=name, alt="", class_=kind))
    head = h("head", h("meta", charset="utf-8"), h("title", folder.name), h("style", STYLE))
    body = h("body", shown, dir="auto")
    _put(folder / "index.html", f"<!doctype html>\n{h('html', head, body)}\n".encode())
    text = json.dumps({"document": listed, "unimodal": dict(about)}, indent=1, ensure_ascii=False)
    _put(folder / "document.json", f"{text}\n".encode())


def read_about(path: Path) -> dict[str, Any] | None:
    """What a file of ours says it was made from; None if it says nothing."""
    try:
        if path.is_dir():
            found = json.loads((path / "document.json").read_text("utf-8"))["unimodal"]
        else:
            found = json.loads(_comment(path))
    except Exception:  # somebody else's file, or half of one: libraries raise of every kind
        return None
    return found if isinstance(found, dict) else None


def _comment(path: Path) -> str:
    if path.suffix == ".mp4":
        import av

        with av.open(str(path)) as container:
            return container.metadata["comment"]
    from PIL import Image

    from unimodal.model.media import EXIF_DESCRIPTION

    with Image.open(path, formats=["PNG", "WEBP", "GIF"]) as image:
        if image.format == "WEBP":
            return str(image.getexif()[EXIF_DESCRIPTION])
        if image.format == "GIF":
            return image.info["comment"].decode()
        return str(image.info["unimodal"])


def _middle(path: Path) -> np.ndarray:
    """A picture, the middle frame of a clip, or the first picture of a document."""
    from unimodal.pipeline.media import iter_frames, probe, read_image

    if path.is_dir():
        path = min(path.glob("*.png"))
    if probe(path).kind == "image":
        return read_image(path)
    frames = [picture for _, picture in iter_frames(path)]
    return frames[len(frames) // 2]


def _fit(picture: np.ndarray, most: int) -> np.ndarray:
    from unimodal.tokenize.vision.pixels import resize

    height, width = picture.shape[:2]
    scale = min(1.0, most / max(height, width))
    return resize(picture, (max(1, round(height * scale)), max(1, round(width * scale))))


def _put(path: Path, data: bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def _keep(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """The file with these records, or no file; untouched if it is so already."""
    data = b"".join(map(_line, records))
    if not data:
        path.unlink(missing_ok=True)
    elif not path.is_file() or path.read_bytes() != data:
        _put(path, data)


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _lines(path: Path) -> list[dict[str, Any]]:
    """Records of a file of ours; a line that a killed process left unfinished is passed over."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _records(out: Path) -> dict[str, dict[str, Any]]:
    lines = (line for line in _lines(out / RESULTS) if isinstance(line.get("file"), str))
    return {line["file"]: line for line in lines}


def _torn(file: Any) -> bool:
    """Whether a file opened for appending ends in the middle of a line."""
    if not file.tell():
        return False
    with Path(file.name).open("rb") as read:
        read.seek(-1, os.SEEK_END)
        return read.read(1) != b"\n"


def _place(record: Mapping[str, Any]) -> tuple[int, int, str]:
    match = _NAME.fullmatch(record["file"])
    return (int(match[1]), int(match[2]), record["file"]) if match else (0, 0, record["file"])


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
