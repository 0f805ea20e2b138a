"""How much of pictures and clips a vision tokenizer keeps: figures over a folder, or over a run.

media or kept clips -> the pixels that `unimodal tokenize` takes -> codes -> painted back
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unimodal.pipeline.clips import CLIPS
from unimodal.pipeline.errors import MediaError, UnimodalError, reason
from unimodal.pipeline.inputs import list_sources
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.run import Run
from unimodal.pipeline.scorers import frechet
from unimodal.tokenize.device import out_of_memory
from unimodal.tokenize.document import TEMPORAL
from unimodal.tokenize.pictures import image_pixels, video_pixels
from unimodal.tokenize.plan import TokenizeSettings, Window, windows
from unimodal.tokenize.unit import exact_arithmetic
from unimodal.tokenize.vocabulary import Vocabulary

if TYPE_CHECKING:
    from unimodal.tokenize.vision.perceptual import LPIPS
    from unimodal.tokenize.vision.tokenizer import VisionTokenizer


PICTURES = 48  # of a video: windows after the first are taken while there are no more in all
TASK = "painted"  # of the progress

Figures = dict[str, Any]


@dataclass
class Eye:
    """Encodes and paints with one tokenizer."""

    tokenizer: VisionTokenizer
    progress: Progress
    lower: str  # where memory is short
    joint: bool = False  # later groups of a video see earlier ones

    def remade(
        self, row: Mapping[str, Any], settings: TokenizeSettings
    ) -> tuple[list[Window], np.ndarray, np.ndarray, np.ndarray]:
        """Of a row of clips.parquet: windows, pictures [F, H, W, 3], codes, and them painted.

        Of a video one window, or `PICTURES`. Raises `MediaError`.
        """
        size, factor = (row["width"], row["height"]), self.tokenizer.spatial_factor
        try:
            if min(size) < factor:
                raise MediaError(f"{size[0]}x{size[1]} is under {factor} pixels on one side")
            vocabulary = Vocabulary.bytes(self.tokenizer.codebook_size)
            found = windows(row, settings, vocabulary, factor)
            most = max(PICTURES, found[0].pictures)
            found = [window for window in found if window.first + window.pictures <= most]
            video = found[0].fps is not None
            shown = video_pixels(found) if video else [image_pixels(found[0])[None]]
            originals, codes = self._encode(shown, TEMPORAL if video else 1, settings.batch)
        except MediaError as error:
            raise MediaError(error.reason, row["uri"]) from error
        return found, originals, codes, self.paint(codes, not video)

    def _encode(
        self, shown: Iterable[np.ndarray], group: int, batch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pictures of all windows, uint8 [F, H, W, 3], and their codes [F / group, H/8, W/8]."""
        from unimodal.tokenize.vision.pixels import to_pixels

        pictures, codes = [], []
        with exact_arithmetic(), out_of_memory(self.lower):
            for pixels in shown:
                groups = pixels.reshape(-1, group, *pixels.shape[1:])
                for at in range(0, len(groups), batch):
                    some = self.tokenizer.encode(to_pixels(groups[at : at + batch]))
                    codes.append(some.cpu().numpy()[:, 0])
                pictures.append(pixels)
        return np.concatenate(pictures), np.concatenate(codes)

    def paint(self, codes: np.ndarray, image: bool) -> np.ndarray:
        """Pictures uint8 [F, H, W, 3] of codes [T, H/8, W/8]: one of an image, else F = 4 T."""
        import torch

        from unimodal.tokenize.vision.pixels import to_uint8

        painted = []
        with out_of_memory(self.lower):
            whole = torch.from_numpy(codes.astype(np.int64))
            for part in whole.split(len(whole) if self.joint else 1):
                seen = self.tokenizer.decode(part[None], image, self.joint)
                painted.append(to_uint8(seen[0]))
                self.progress.advance(TASK, len(painted[-1]))
        return np.concatenate(painted)


@dataclass(frozen=True)
class Remade:
    """A picture or clip, and what its codes give back."""

    row: dict[str, Any]
    """As in clips.parquet."""
    originals: np.ndarray
    """uint8 [F, H, W, 3]; one picture if it is an image."""
    codes: np.ndarray
    painted: np.ndarray
    """Like `originals`."""

    @property
    def name(self) -> str:
        return Path(self.row["uri"]).name


def remade(
    things: Sequence[str],
    settings: TokenizeSettings,
    tokenizer: VisionTokenizer,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Remade]:
    """The kept clips of runs, and media (files, folders, whatever curate takes), encoded and
    painted; of a video one window or 48 pictures, from its beginning.

    What cannot be read is noted and left out. Raises `UnimodalError` if nothing could be.
    """
    progress = progress or Progress()
    eye = Eye(tokenizer, progress, f"area (now {settings.area})")
    runs = [thing for thing in things if (Path(thing) / "clips.parquet").exists()]
    rows = [
        row for run in runs for row in Run.open(run).clips.to_pylist() if row["verdict"] == "keep"
    ]
    media = [thing for thing in things if thing not in runs]
    rows += [source.uri for source in list_sources(media)] if media else []
    read = 0
    progress.begin(TASK, 0, "pictures")
    for row in rows[:limit]:
        uri = row if isinstance(row, str) else row["uri"]
        try:
            row = clip_row(row, settings) if isinstance(row, str) else row
            _, originals, codes, painted = eye.remade(row, settings)
        except (UnimodalError, OSError) as error:
            told = f"{uri}: {reason(error)}" if isinstance(error, OSError) else str(error)
            progress.note(f"left out: {told}")
            continue
        read += 1
        yield Remade(row, originals, codes, painted)
    progress.end(TASK)
    if not read:
        raise UnimodalError(f"{', '.join(things)}: nothing in it could be read")


def clip_row(uri: str, settings: TokenizeSettings) -> Figures:
    """The row of clips.parquet for a whole picture, or for what is looked at of a video."""
    from unimodal.pipeline.fetch import local
    from unimodal.pipeline.media import open_video, probe, read_image

    seconds = max(settings.seconds, PICTURES / settings.fps)
    row: Figures = dict.fromkeys(CLIPS.names) | {"uid": "this", "uri": uri}
    if probe(uri).kind == "image":
        height, width = read_image(uri).shape[:2]
        return row | {"kind": "image", "width": width, "height": height}
    with local(uri, keep=True) as path, open_video(path) as video:
        pts: list[int] = []
        tick, end = video.time_base, None
        step = round(1 / ((video.probe.fps or 25) * tick))
        for frame in video.frames():
            if pts and (frame.pts - pts[0]) * tick >= seconds:
                end = frame.pts
                break
            pts.append(frame.pts)
            step = frame.duration or step
        end = pts[-1] + max(1, step) if end is None else end
        row |= {"kind": "video", "width": video.probe.width, "height": video.probe.height}
    row |= {"start_pts": pts[0], "end_pts": end, "time_base": str(tick), "frames": len(pts)}
    return row | {"start_s": 0.0, "end_s": float((end - pts[0]) * tick)}


def fidelity(originals: np.ndarray, painted: np.ndarray) -> Figures:
    """PSNR in dB and SSIM, means over the pictures; SSIM is None under its window's 11 pixels."""
    from unimodal.tokenize.vision.metrics import planes, psnr, ssim

    each, alike = [], []
    for pair in zip(originals, painted, strict=True):
        a, b = map(planes, pair)
        each.append(float(psnr(a, b)))
        alike.append(float(ssim(a, b)) if min(a.shape[2:]) >= 11 else math.nan)
    mean = None if math.isnan(alike[0]) else float(np.mean(alike))
    return {"psnr": float(np.mean(each)), "ssim": mean} | ({"psnr_each": each} if each[1:] else {})


def usage(counts: np.ndarray) -> tuple[int, float]:
    """How many codes occur by `counts` (one a code of the codebook), and their perplexity."""
    share = counts[counts > 0] / max(1, counts.sum())
    return len(share), float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0


class Fidelity:
    """Figures of what is remade, one thing after the other."""

    def __init__(
        self,
        tokenizer: VisionTokenizer,
        lpips: LPIPS | None = None,
        features: frechet.Features | None = None,
    ) -> None:
        self.book = tokenizer.codebook_size
        self.lpips = lpips
        self.features = features
        self.each: list[dict[str, Any]] = []
        self._counts = np.zeros(self.book, np.int64)
        self._seen: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])

    def measure(self, one: Remade) -> dict[str, Any]:
        """Figures of one thing: PSNR (dB), SSIM, and LPIPS if it is given; means over pictures."""
        import torch

        from unimodal.tokenize.vision.pixels import to_pixels

        size = [one.originals.shape[2], one.originals.shape[1]]
        told = {"uri": one.row["uri"], "uid": one.row["uid"], "kind": one.row["kind"]}
        told |= {"size": size, "pictures": len(one.originals), "codes": one.codes.size}
        told |= fidelity(one.originals, one.painted)
        if self.lpips is not None and min(size) >= 16:
            device = self.lpips.shift.device
            with torch.inference_mode():
                apart = [
                    float(self.lpips(*(to_pixels(side)[None].to(device) for side in pair)))
                    for pair in zip(one.originals, one.painted, strict=True)
                ]
            told["lpips"] = float(np.mean(apart))
        if self.features is not None:
            for kept, pictures in zip(self._seen, (one.originals, one.painted), strict=True):
                kept.append(self.features(pictures))
        self._counts += np.bincount(one.codes.reshape(-1), minlength=self.book)
        self.each.append(told)
        return told

    def totals(self) -> dict[str, Any]:
        """Means over pictures and over clips, rFID of all pictures, and the use of the codebook."""
        found: dict[str, Any] = {}
        for kind in ("image", "video"):
            mine = [one for one in self.each if one["kind"] == kind]
            if mine:
                found[kind] = {"n": len(mine), "pictures": sum(one["pictures"] for one in mine)}
            for name in ("psnr", "ssim", "lpips"):
                values = [one[name] for one in mine if one.get(name) is not None]
                if values:
                    found[kind][name] = float(np.mean(values))
        if self.features is not None:
            found["rfid"] = frechet.distance(*(np.concatenate(side) for side in self._seen))
        used, perplexity = usage(self._counts)
        codes = int(self._counts.sum())
        found["codebook"] = {
            "size": self.book,
            "used": used,
            "perplexity": perplexity,
            "codes": codes,
        }
        return found
