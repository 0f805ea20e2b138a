"""What may be asked of `unimodal serve`: limits, and requests in the form of OpenAI's.

Sizes in requests are width x height, as OpenAI writes them; the rest of unimodal says height
first. Fields that OpenAI does not have are marked "ours".
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from unimodal.pipeline.settings import Settings
from unimodal.tokenize.document import SPATIAL


class Limits(Settings):
    """Bounds on what one request may ask for, and on how many may wait."""

    pixels: int = Field(default=1 << 20, ge=64)
    """Width times height of what is drawn."""
    frames: int = Field(default=64, ge=4)
    """Pictures of a clip."""
    pictures: int = Field(default=8, ge=1)
    """Pictures or clips of one request (`n`)."""
    prompt: int = Field(default=4000, ge=1)
    """Characters of a prompt, and of all texts of a chat."""
    tokens: int = Field(default=1024, ge=1)
    """Tokens of an answer."""
    upload: int = Field(default=20_000_000, ge=1000)
    """Bytes of a request, with all that is uploaded in it."""
    decoded: int = Field(default=40_000_000, ge=64)
    """Width times height of an uploaded picture or video."""
    media: int = Field(default=8, ge=1)
    """Pictures and clips in a chat."""
    waiting: int = Field(default=32, ge=1)
    """Requests that wait, or are read for it; one more is answered with 429."""
    given: int = Field(default=4096, ge=4)
    """Pictures of a clip that is continued, at the rate that training saw most."""
    volume: int = Field(default=1 << 25, ge=64)
    """Width times height times pictures of such a clip, as the sampler scales it."""
    seconds: float = Field(default=20.0, gt=0)
    """That reading one upload may take."""


class Refused(Exception):
    """A request that is answered with an error, in OpenAI's form."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str = "",
        retry: int | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.kind = kind
        self.code = code
        self.retry = retry  # seconds until it is worth asking again


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = None
    user: str | None = None  # told by clients, of no use here
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)  # ours for pictures
    stream: bool = False
    temperature: float | None = Field(default=None, gt=0, le=100)
    top_k: int | None = Field(default=None, ge=1)  # ours
    top_p: float | None = Field(default=None, gt=0, le=1)
    progress: bool = False
    """Ours: tell place in the queue and pace, as events of a stream."""


class _Drawn(_Asked):
    """What pictures and clips have in common."""

    prompt: str
    n: int = Field(default=1, ge=1)
    size: str = "auto"
    response_format: Literal["b64_json", "url"] | None = None
    partial_images: int | None = Field(default=None, ge=0, le=1000)
    """At most so many while it is drawn; by default as many as cost little time."""
    guidance: float | None = Field(default=None, gt=0, le=1000)  # ours
    negative: str | None = None  # ours
    # What OpenAI's service offers beyond; only the values that say nothing are taken.
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    quality: Literal["auto", "standard"] | None = None


class ImageAsked(_Drawn):
    """POST /v1/images/generations"""

    output_format: Literal["png", "webp", "jpeg"] = "png"


class EditAsked(ImageAsked):
    """POST /v1/images/edits, beside its file `image`"""

    image_guidance: float | None = Field(default=None, gt=0, le=1000)  # ours


class VideoAsked(_Drawn):
    """POST /v1/videos/generations (ours)"""

    frames: int | None = Field(default=None, ge=4)
    fps: float | None = Field(default=None, gt=0, le=240)
    output_format: Literal["webp", "mp4", "gif"] = "mp4"


class ExtendAsked(_Drawn):
    """POST /v1/videos/extensions (ours), beside its file `video`"""

    prompt: str = ""
    frames: int | None = Field(default=None, ge=4)
    """New ones."""
    output_format: Literal["webp", "mp4", "gif"] = "mp4"


class ChatAsked(_Asked):
    """POST /v1/chat/completions"""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stream_options: dict[str, Any] | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)  # 0: the likeliest
    # What OpenAI's service offers beyond; only the values that say nothing are taken.
    n: Literal[1] = 1
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None


def size_of(text: str, limits: Limits) -> tuple[int, int] | None:
    """(height, width) in pixels of OpenAI's `WIDTHxHEIGHT`, None for `auto`: as training saw most.
    Raises `Refused`."""
    if text == "auto":
        return None
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if not match:
        raise Refused(f"size {text[:40]}: write width x height in pixels, as 256x256", "size")
    width, height = int(match[1]), int(match[2])
    if width * height > limits.pixels:
        raise Refused(f"size {text} is over the limit of {limits.pixels:,} pixels", "size")
    if width % SPATIAL or height % SPATIAL:
        near = "x".join(str(max(SPATIAL, round(s / SPATIAL) * SPATIAL)) for s in (width, height))
        raise Refused(f"size {text}: both sides must be multiples of {SPATIAL}: try {near}", "size")
    return height, width


def within(limits: Limits, asked: _Drawn) -> None:
    """Raise `Refused` for what is over a limit, or of no use."""
    for name in ("prompt", "negative"):
        if len(getattr(asked, name) or "") > limits.prompt:
            raise Refused(f"{name} is over the limit of {limits.prompt:,} characters", name)
    if asked.n > limits.pictures:
        raise Refused(f"n {asked.n} is over the limit of {limits.pictures}", "n")
    if asked.response_format == "url":
        raise Refused("this server keeps no files: ask for b64_json", "response_format")
    frames = getattr(asked, "frames", None)
    if frames is not None:
        if frames > limits.frames:
            raise Refused(f"frames {frames} is over the limit of {limits.frames}", "frames")
        if frames % 4:
            near = round(frames / 4) * 4
            raise Refused(f"frames {frames} must be a multiple of 4: try {near}", "frames")


def conversation(messages: list[dict[str, Any]], limits: Limits) -> tuple[list[str], list[str]]:
    """Questions and answers of a chat in turn, the last one a question; and the data: URLs of the
    pictures and clips that it begins with. Raises `Refused`.

    Nothing is ever fetched: a URL that is none of data: is an error. What the system says stands
    before the first question, for the model's own template has no place for it.
    """
    turns: list[str] = []
    urls: list[str] = []
    system: list[str] = []
    last = ""
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "developer", "user", "assistant"):
            raise Refused(f"{where}.role must be system, user or assistant", f"{where}.role")
        texts: list[str] = []
        for place, part in enumerate(_parts(content, where)):
            kind, value = _part(part, f"{where}.content[{place}]")
            if kind == "text":
                texts.append(value)
                continue
            if role != "user" or len(turns) > 1 or last == "assistant":
                at = f"{where}.content[{place}]"
                raise Refused(f"{at}: pictures belong into the first message of the user", at)
            urls.append(value)
        text = "\n".join(texts)
        if role in ("system", "developer"):
            system.append(text)
        elif role == last:  # of several messages on end, one
            turns[-1] += f"\n{text}"
        elif role == "assistant" and not turns:
            raise Refused("the first message must be the user's", where)
        else:
            turns.append(text)
            last = role
    if last != "user":
        raise Refused("the last message must be the user's", "messages")
    turns = [turn.strip() for turn in turns]
    turns[0] = "\n".join([*system, turns[0]]).strip()
    if sum(map(len, turns)) > limits.prompt:
        raise Refused(f"the chat is over the limit of {limits.prompt:,} characters", "messages")
    if len(urls) > limits.media:
        raise Refused(f"{len(urls)} pictures are over the limit of {limits.media}", "messages")
    if not turns[-1] and len(urls) != 1:
        raise Refused("ask something, or send one picture to be described", "messages")
    return turns, urls


def _parts(content: Any, where: str) -> list[Any]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise Refused(f"{where}.content must be a text or a list of parts", f"{where}.content")
    return content


def _part(part: Any, at: str) -> tuple[str, str]:
    """What a part of a message is, and its text or data: URL."""
    kind = part.get("type") if isinstance(part, dict) else None
    value = part.get(kind) if kind in ("text", "image_url", "video_url") else None
    if isinstance(value, dict):
        value = value.get("url")
    if not isinstance(value, str):
        raise Refused(f"{at} must be a text, an image_url or a video_url", at)
    if kind != "text" and not value.startswith("data:"):
        raise Refused(f"{at}: only data: URLs are read, this server fetches nothing", at)
    return str(kind), value


def data_url(url: str) -> bytes:
    """The bytes of a data: URL in base64; raises `Refused`."""
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise Refused("a data: URL must be in base64: data:image/png;base64,…", "messages")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise Refused("a data: URL is not valid base64", "messages") from error


def refusal(errors: Sequence[Any]) -> Refused:
    """The first problem that validation found, in words and with its field."""
    error = errors[0]
    place = [str(part) for part in error["loc"] if part != "body"]
    param = ".".join(place)[:80] or None
    message = error["msg"]
    if error["type"] == "extra_forbidden":
        message = "there is no such field"
    elif error["type"] == "missing":
        message = "is missing"
    elif error["type"] in ("json_invalid", "model_attributes_type"):
        return Refused("the body must be a JSON object, sent as application/json")
    return Refused(f"{param}: {message}" if param else message, param)
