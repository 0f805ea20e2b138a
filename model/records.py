"""What a checkpoint directory says of itself, held against what it must be when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from unimodal.model.naming import read_json
from unimodal.pipeline.errors import UnimodalError


class _Named(BaseModel):
    digest: str


class _Grid(BaseModel):
    kind: Literal["image", "video"]
    size: tuple[int, int, int]
    fps: float | None = None


class _About(BaseModel):
    vocabulary: _Named
    vision_tokenizer: _Named
    grids: list[_Grid] = []
    tasks: dict[str, int] | None = None


class _Saved(BaseModel):
    step: int = Field(ge=0)
    total: int = Field(ge=0)
    tokens: int = Field(ge=0)
    elapsed_s: float = Field(ge=0)
    cursor: dict[str, Any]
    losses: dict[str, list[float]]


def read_about(top: Path) -> dict[str, Any]:
    """`data.json`: what the decoder was trained on; empty if there is none.

    Raises `UnimodalError` for one that is damaged, as `read_saved` does.
    """
    file = top / "data.json"
    return _checked(file, _About) if file.is_file() else {}


def read_saved(step: Path) -> dict[str, Any]:
    """`train.json` of a step: how far the training is."""
    return _checked(step / "train.json", _Saved)


def learned(top: Path) -> dict[str, int] | None:
    """Documents of each task that a checkpoint was trained on, None where it does not say."""
    about = read_about(top)
    # Nothing was noted of captions alone before there was more to tell of.
    return about.get("tasks", {"caption": 1} if about.get("grids") else None)


def _checked(file: Path, kind: type[BaseModel]) -> dict[str, Any]:
    record = read_json(file)
    try:
        kind.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UnimodalError(
            f"{file} is damaged ({where}: {first['msg']}): copy the checkpoint again"
        ) from error
    return record
