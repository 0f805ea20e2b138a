"""How much of pictures and clips a vision tokenizer keeps: figures over a folder, or over a run.

media or kept clips -> the pixels that `unimodal tokenize` takes -> codes -> painted back
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unimodal.pipeline.errors import UnimodalError, reason
from unimodal.pipeline.inputs import list_sources
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.run import Run
from unimodal.pipeline.scorers import frechet
from unimodal.tokenize.look import TASK, Eye, clip_row, fidelity
from unimodal.tokenize.plan import TokenizeSettings

if TYPE_CHECKING:
    from unimodal.tokenize.vision.perceptual import LPIPS
    from unimodal.tokenize.vision.tokenizer import VisionTokenizer


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
    eye = Eye(tokenizer, Path(), progress, f"area (now {settings.area})")
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
            told = str(error) if isinstance(error, UnimodalError) else f"{uri}: {reason(error)}"
            progress.note(f"left out: {told}")
            continue
        read += 1
        yield Remade(row, originals, codes, painted)
    progress.end(TASK)
    if not read:
        raise UnimodalError(f"{', '.join(things)}: nothing in it could be read")


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
        share = self._counts[self._counts > 0] / max(1, self._counts.sum())
        found["codebook"] = {
            "size": self.book,
            "used": len(share),
            "perplexity": float(np.exp(-(share * np.log(share)).sum())),
            "codes": int(self._counts.sum()),
        }
        return found
