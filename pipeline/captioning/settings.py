"""Where captions come from, and how a model is asked for them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from unimodal.pipeline.scorers.weights import fingerprint
from unimodal.pipeline.settings import Settings

Source = Literal["sidecar", "endpoint", "vllm", "checkpoint"]

ENGINE = ("dtype", "quantization", "revision", "hf_overrides", "mm_processor_kwargs")
"""Of `caption.engine`, what a model's words depend on; memory and batches are none of it."""


class CaptionSettings(Settings):
    """Where captions come from, and how a model is asked for them."""

    sidecar: tuple[str, ...] = ("json", "txt", "vtt")
    """Kinds of files beside the media that are read, in order of precedence."""
    source: Source = "sidecar"
    """Who writes captions: nobody but people (sidecar), a server (endpoint), a vLLM engine of our
    own (vllm), or a model of ours (checkpoint)."""
    first: Literal["model", "people"] = "model"
    """Whose captions come first in a clip's list where it has both."""

    model: str = ""
    """Name of the model at the server; id or folder of one for vllm; a checkpoint's folder."""
    prompt: str | None = None
    """A prompt of the package, or a file.toml; none: dense, and of a checkpoint trained: that says
    what it learned to say, and of a prompt only the style's name and bounds count."""
    language: str = "en"
    """Section of the prompt, and the language that answers must be in."""
    styles: tuple[str, ...] | None = None
    """Which of the prompt's styles to ask for; none: all of them."""
    format: Literal["json", "text"] | None = None
    """One JSON object with all styles, or the words of a single style as they are; none: json, and
    of a checkpoint text."""
    guided: bool = True
    """Have the engine hold the model to the JSON schema; otherwise the prompt alone asks for it."""

    frames: int = Field(default=12, ge=1)
    """Pictures of a clip in a request, at most; there are keyframes.count to choose from."""
    short_side: int | None = Field(default=None, ge=28)
    """Pixels that pictures are shrunk to; none: as they are stored (keyframes.short_side)."""
    piece_s: float = Field(default=20.0, gt=0)
    """Clips of this length and more are described in equal pieces of half to all of it."""

    max_tokens: int = Field(default=768, ge=1)
    """Length of an answer; one that is cut off is asked for again."""
    temperature: float | None = Field(default=None, ge=0)
    """Of the first try, none: 0.2, and of a checkpoint 0, the likeliest words; later ones take at
    least 0.7, or the same answer would come again."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Share of the probability that words are drawn from."""
    seed: int = 0
    """Of the first try; each later one adds 1. Source vllm draws its own."""
    tries: int = Field(default=3, ge=1)
    """How often a clip is asked for until its answer can be believed."""

    in_flight: int = Field(default=64, ge=1)
    """Requests that are under way at a time, for each engine or server."""
    url: str = ""
    """Of the server, up to and with /v1."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key; it is read, and never written anywhere."""
    timeout_s: float = Field(default=300.0, gt=0)
    """For one answer of a server."""
    retries: int = Field(default=6, ge=0)
    """How often a request is repeated that a server fails on, 429 and 5xx, or that is cut off."""
    backoff_s: float = Field(default=1.0, ge=0)
    """Wait before the first repetition; it doubles each time, up to a minute."""
    patience_s: float = Field(default=300.0, ge=0)
    """How long a server may be away before the run stops."""

    backend: Literal["auto", "vllm", "torch"] = "auto"
    """What runs a checkpoint; auto: vLLM, and torch where that does not start, which is said."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that one vLLM engine is spread over."""
    data_parallel: int = Field(default=1, ge=1)
    """vLLM engines side by side, each with its own GPUs."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Tokens of a prompt and its answer; none: what the model was made for."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's engine, by their names there."""

    @field_validator("url")
    @classmethod
    def _without_password(cls, value: str) -> str:
        if value:
            try:
                parts = urlsplit(value)
                host = parts.hostname if parts.port != 0 else None
            except ValueError:  # a port that is none
                host = None
            if not host or parts.scheme not in ("http", "https"):
                raise ValueError("write it as http://host:port/v1")
            if parts.username or parts.password or parts.query:
                raise ValueError("a key does not belong in it: settings are kept in the run")
        return value

    @model_validator(mode="after")
    def _complete(self) -> CaptionSettings:
        if self.source != "sidecar" and not self.model:
            raise ValueError(f"source {self.source} needs caption.model")
        if self.source == "endpoint" and not self.url:
            raise ValueError("source endpoint needs caption.url, as http://localhost:8000/v1")
        if self.source == "checkpoint" and self.format == "json":
            raise ValueError("source checkpoint answers in plain text: leave out caption.format")
        return self

    @property
    def handed(self) -> int:
        """Requests that a vLLM engine is handed: more than it works at, so that it never waits.

        At 8 in flight on two busy cores, captions came at 0.95 of the rate of vLLM's own benchmark
        without them and at 1.04 with them (medians of 10 pairs); at 16 there was no difference.
        """
        return self.in_flight + self.in_flight // 4

    @property
    def by_model(self) -> bool:
        """Whether a model writes captions, beside those of people."""
        return self.source != "sidecar"

    @property
    def asked(self) -> str:
        """The prompt, by its name or file."""
        return self.prompt or ("trained" if self.source == "checkpoint" else "dense")

    @property
    def form(self) -> Literal["json", "text"]:
        """What an answer is."""
        return self.format or ("text" if self.source == "checkpoint" else "json")

    def warmth(self, attempt: int) -> float:
        """Temperature of a try, 0 for the first."""
        own = self.temperature
        first = (0.0 if self.source == "checkpoint" else 0.2) if own is None else own
        return max(first, 0.7) if attempt else first

    def beside(self) -> str:
        """Digest of what captions of people depend on."""
        return hashlib.sha256(json.dumps(self.sidecar).encode()).hexdigest()[:16]

    def words(self, prompt_hash: str) -> str:
        """Digest of what a model's words depend on: not where it runs, or how patient we are."""
        names = (
            *("model", "language", "styles", "guided", "frames", "short_side"),
            *("piece_s", "max_tokens", "top_p", "seed"),
        )
        values = {name: getattr(self, name) for name in names}
        values |= {"format": self.form, "temperature": self.warmth(0)}
        values |= {name: self.engine[name] for name in ENGINE if name in self.engine}
        text = json.dumps([values, prompt_hash, weights_in(self.model)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_in(model: str) -> list[tuple[str, str]]:
    """Names and fingerprints of the files of a model that is a folder here; others go by their
    name.

    Of a checkpoint of ours the weights of its newest step: files beside the steps change with
    every use.
    """
    folder = Path(model)
    if not model or not folder.is_dir():
        return []
    if (newest := folder / "latest").is_file():
        files = (folder / newest.read_text().strip()).glob("model*.safetensors")
    else:
        files = (file for file in folder.iterdir() if file.is_file())
    return [(file.name, fingerprint(str(file))) for file in sorted(files)]
