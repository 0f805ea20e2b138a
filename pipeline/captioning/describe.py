"""The stage that has a model describe clips: ask, judge, ask again, keep.

    clips to ask for ─> requests ─> a captioner ─> answers ─> store
                            ^                         │ not to be believed: with another seed
                            └─────────────────────────┘

Every answer comes back under the key of its question, and every question has a key of its own,
also when a clip is asked for again. An answer that nobody waits for any more is dropped.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unimodal.pipeline import large
from unimodal.pipeline.captioning.answers import OK, read_answer, reasons
from unimodal.pipeline.captioning.captioner import NO_FRAMES, Answer, Captioner, Failure
from unimodal.pipeline.captioning.prompt import Prompt, load_prompt
from unimodal.pipeline.captioning.requests import (
    Request,
    ask_of,
    count_of,
    prepared,
    requests_in,
)
from unimodal.pipeline.captioning.settings import CaptionSettings
from unimodal.pipeline.captioning.store import Store
from unimodal.pipeline.clips import BATCH, CAPTION
from unimodal.pipeline.errors import UnimodalError, UsageError, full_disk
from unimodal.pipeline.progress import Progress
from unimodal.pipeline.stage import Stage
from unimodal.pipeline.supervise import Patience

VERSION = 1
TASK = "captions"
Open = Callable[[CaptionSettings], Captioner]


@dataclass
class _Asked:
    """A request that a model is at."""

    request: Request
    said: dict[str, tuple[str, str]]  # by style: status and text, the best so far
    left: int  # tries that it still has
    tries: int = 0
    repeats: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    since: float = field(default_factory=time.monotonic)


@dataclass
class Pass:
    """What one pass did."""

    requests: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    tries: int = 0
    retried: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Output tokens a second."""
        return self.output_tokens / self.seconds if self.seconds else 0.0

    def record(self) -> dict[str, Any]:
        """As run.json has it."""
        return {
            "requests": self.requests,
            "failed": sum(self.failed.values()),
            "retried": self.retried,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "seconds": round(self.seconds, 3),
            "output_tokens_per_s": round(self.rate, 1),
        }


def prompt_of(settings: CaptionSettings) -> Prompt:
    """The prompt that the settings name; raises `UsageError`."""
    return load_prompt(settings.asked, settings.language, settings.styles, settings.form)


def describe_stage(settings: CaptionSettings, keyframes: str) -> Stage:
    """The stage that asks a model; `keyframes` is the digest of how pictures were chosen.

    Not of what cut or measured them: a clip that is the same clip has its captions already.
    """
    return Stage("describe", VERSION, settings.words(prompt_of(settings).hash), (keyframes,))


def describe(
    store: Store,
    watched: Path,
    wanted: Mapping[str, Sequence[str]],
    requests: int,
    settings: CaptionSettings,
    opened: Open,
    patience: Patience,
    progress: Progress,
    retry_failed: bool = False,
    limit: int | None = None,
) -> Pass:
    """Ask for all clips `wanted` (uids by part) that the store lacks; see `answered`.

    `watched` is the watch stage's folder, `requests` about how many there will be. Raises
    `UnimodalError` if the source is gone, the disk is full, or most answers cannot be believed.
    """
    prompt = prompt_of(settings)
    earlier = {}
    if retry_failed:
        failed = [row for row in store.rows().to_pylist() if row["status"] != OK]
        earlier = {(row["uid"], row["piece"]): row for row in failed}

    def done(key: tuple[str, int]) -> bool:
        return key in store.statuses and not (retry_failed and store.statuses[key] != OK)

    store.note(_noted(settings, prompt))
    made = Pass()
    captioner = opened(settings)
    begun = time.monotonic()
    progress.begin(TASK, requests, "requests")
    try:
        found = prepared(requests_in(watched, wanted, done, settings), settings, 64)
        if limit is not None:
            found = (request for request, _ in zip(found, range(limit), strict=False))
        for row in answered(found, captioner, settings, prompt, earlier):
            store.add(row)
            _count(made, row, earlier.get((row["uid"], row["piece"])))
            made.seconds = time.monotonic() - begun
            _show(progress, made, requests, begun)
            _stop_if_most_fail(made, row, patience)
    except OSError as error:
        raise full_disk(error, store.folder) or error from error
    finally:
        captioner.close()
        progress.end(TASK)
    store.merge()
    return made


def answered(
    requests: Iterable[Request],
    captioner: Captioner,
    settings: CaptionSettings,
    prompt: Prompt,
    earlier: Mapping[tuple[str, int], Mapping[str, Any]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of `store.ANSWERS`, as answers come in; one for each request, whatever becomes of it.

    `earlier` rows of the same requests give what was good in them.
    """
    waiting = iter(requests)
    again: deque[_Asked] = deque()
    asked: dict[str, _Asked] = {}
    more = True
    while more or again or asked:
        while len(asked) < captioner.in_flight and (again or more):
            one = again.popleft() if again else None
            if one is None:
                request = next(waiting, None)
                if request is None:
                    more = False
                    break
                one = _begun(request, settings, prompt, (earlier or {}).get(request.key))
                if request.problem:
                    yield _row(one, settings, prompt, NO_FRAMES, request.problem)
                    continue
            ask = ask_of(one.request, settings, prompt, one.tries)
            asked[ask.key] = one
            captioner.submit(ask)
        for key, answer in captioner.collect() if asked else ():
            one = asked.pop(key, None)
            if one is None:
                continue
            status, detail = _judge(one, answer, settings, prompt)
            if status != OK and isinstance(answer, Answer) and one.left:
                again.append(one)
            else:
                yield _row(one, settings, prompt, status, detail)


def missing(
    kept: pa.Table, store: Store, settings: CaptionSettings, retry_failed: bool = False
) -> tuple[dict[str, list[str]], int]:
    """Clips that are to be asked for, uids by part, and how many requests that will be.

    `kept` has uid, part and duration_s. With `retry_failed` those count too that failed.
    """
    wanted: dict[str, list[str]] = {}
    requests = 0
    for row in kept.select(["uid", "part", "duration_s"]).to_pylist():
        lacks = 0
        for piece in range(count_of(row, settings)):
            status = store.statuses.get((row["uid"], piece))
            lacks += status is None or (retry_failed and status != OK)
        if lacks:
            wanted.setdefault(row["part"], []).append(row["uid"])
            requests += lacks
    return wanted, requests


def by_clip(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Captions of answers sorted by uid and piece: rows of `clips.CAPTION` by uid.

    Style by style, in order of time; the prompt's first style is the one to use.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["uid"], []).extend(row["captions"] or [])
    for captions in found.values():
        order = {style: i for i, style in enumerate(dict.fromkeys(c["style"] for c in captions))}
        captions.sort(key=lambda caption: order[caption["style"]])
    return found


def with_descriptions(clips: pa.Table, store: Store, first: str) -> pa.Table:
    """Clips with the store's captions beside those of people; `first` is model or people."""
    answers = store.rows(["uid", "captions"])  # sorted by uid
    runs = pc.run_end_encode(answers.column("uid").combine_chunks(), pa.int64())
    bounds = np.concatenate([[0], runs.run_ends.to_numpy()])
    at = clips.schema.get_field_index("captions")
    columns = []
    for some in clips.select(["uid", "captions"]).to_batches(BATCH):
        numbers = pc.index_in(some["uid"], runs.values).drop_null().to_numpy()
        wanted = [np.arange(*bounds[number : number + 2]) for number in np.unique(numbers)]
        theirs = large.take(answers, np.concatenate([np.zeros(0, np.int64), *wanted]))
        found = by_clip(theirs.to_pylist())
        rows = []
        for row in some.to_pylist():
            own, said = found.get(row["uid"], []), row["captions"] or []
            rows.append(own + said if first == "model" else said + own)
        columns.append(pa.array(rows, type=pa.list_(CAPTION)))
    column = pa.chunked_array(columns, type=pa.list_(CAPTION))
    return clips.set_column(at, pa.field("captions", column.type), column)


def refused(store: Store, clips: pa.Table) -> list[dict[str, str]]:
    """Quarantine rows of the clips that could not be described."""
    answers = store.rows(["uid", "piece", "status", "detail"])
    failed = answers.filter(pc.not_equal(answers.column("status"), OK))
    if not failed.num_rows:
        return []
    places = clips.select(["uid", "uri", "part"])
    places = places.filter(pc.is_in(places.column("uid"), failed.column("uid").combine_chunks()))
    where = {row["uid"]: row for row in places.to_pylist()}
    rows = []
    for row in failed.to_pylist():
        if (clip := where.get(row["uid"])) is not None:
            piece = f", piece {row['piece']}" if row["piece"] else ""
            why = f"clip {row['uid']}{piece}: {row['status']}"
            why += f" ({row['detail']})" if row["detail"] else ""
            rows.append({"uri": clip["uri"], "stage": "caption", "reason": why})
            rows[-1]["part"] = clip["part"]
    return rows


def open_source(
    settings: CaptionSettings, engine: str, address: str | None, entry: str = ""
) -> Captioner:
    """The captioner that the settings name; `entry` ("module:function") is who opens a checkpoint,
    of a room above this one. Raises `UsageError` where nobody is handed in."""
    if settings.source == "endpoint":
        from unimodal.pipeline.captioning.endpoint import Endpoint

        return Endpoint(settings)
    if settings.source == "vllm" or entry:
        from unimodal.pipeline.captioning import fleet

        if engine == "ray":
            return fleet.on_ray(settings, address, entry)
        if settings.data_parallel > 1:
            return fleet.side_by_side(settings, entry)
        return fleet.opener(entry)(settings)
    raise UsageError(f"source {settings.source} is opened by the command line, and not here")


def _begun(
    request: Request,
    settings: CaptionSettings,
    prompt: Prompt,
    before: Mapping[str, Any] | None,
) -> _Asked:
    said = {style.name: ("", "") for style in prompt.of(request.kind)}
    one = _Asked(request, said, settings.tries)
    if before:
        for caption in before["captions"] or []:
            if caption["style"] in one.said and caption["status"] == OK:
                one.said[caption["style"]] = OK, caption["text"]
        # Tries go on counting: other seeds than those that failed.
        one.tries, one.repeats = before["tries"] or 0, before["repeats"] or 0
        one.prompt_tokens = before["prompt_tokens"] or 0
        one.output_tokens = before["output_tokens"] or 0
    return one


def _judge(
    one: _Asked, answer: Answer | Failure, settings: CaptionSettings, prompt: Prompt
) -> tuple[str, str]:
    one.tries, one.left = one.tries + 1, one.left - 1
    one.repeats += answer.repeats
    if isinstance(answer, Failure):
        return answer.status, answer.detail
    one.prompt_tokens += answer.prompt_tokens
    one.output_tokens += answer.output_tokens
    found = read_answer(answer, prompt, one.request.kind, settings.form)
    for style, (status, text) in found.items():
        if one.said[style][0] != OK:
            one.said[style] = status, text
    status = reasons(list(one.said.values()))
    detail = "" if status == OK else " ".join(answer.text[:200].split())
    return status, detail


def _row(
    one: _Asked, settings: CaptionSettings, prompt: Prompt, status: str, detail: str
) -> dict[str, Any]:
    """What is kept of a request; a caption has a text if and only if its status is ok."""
    request = one.request
    captions = [
        {
            "style": style,
            "lang": prompt.language,
            "text": text if said == OK else None,
            "start_s": request.start_s,
            "end_s": request.end_s,
            "model": settings.model,
            "prompt_hash": prompt.hash,
            "status": said or status,
        }
        for style, (said, text) in one.said.items()
    ]
    return {
        "uid": request.uid,
        "piece": request.piece,
        "status": status,
        "detail": detail.encode("utf-8", "replace").decode() or None,
        "captions": captions,
        "tries": one.tries,
        "repeats": one.repeats,
        "prompt_tokens": one.prompt_tokens,
        "output_tokens": one.output_tokens,
        "seconds": round(time.monotonic() - one.since, 3),
    }


def _count(made: Pass, row: Mapping[str, Any], before: Mapping[str, Any] | None) -> None:
    made.requests += 1
    if row["status"] != OK:
        made.failed[row["status"]] += 1
    for name in ("tries", "prompt_tokens", "output_tokens"):
        new = row[name] - ((before or {}).get(name) or 0)
        setattr(made, name, getattr(made, name) + new)
    # What has no frames was never asked.
    made.retried += max(0, row["tries"] - ((before or {}).get("tries") or 0) - 1)


def _show(progress: Progress, made: Pass, requests: int, begun: float) -> None:
    progress.advance(TASK)
    left = max(0, requests - made.requests) * made.seconds / made.requests
    progress.show(
        {
            "output tokens/s": round(made.rate, 1),
            "requests/s": round(made.requests / max(made.seconds, 1e-9), 2),
            "asked again": made.retried,
            "failed": sum(made.failed.values()),
            "left": f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s",
        }
    )


def _stop_if_most_fail(made: Pass, row: Mapping[str, Any], patience: Patience) -> None:
    failed = sum(made.failed.values())
    if failed >= patience.failures_least and failed > patience.failures * made.requests:
        often = ", ".join(f"{status} {count}" for status, count in made.failed.most_common(3))
        raise UnimodalError(
            f"stopped: {failed} of the first {made.requests} requests for captions failed "
            f"({often}); the last one: {row['detail'] or row['status']}. If the model or the "
            "prompt is at fault, change it; what failed is asked for again with --retry-failed"
        )


def _noted(settings: CaptionSettings, prompt: Prompt) -> dict[str, Any]:
    words = {kind: prompt.before(kind, settings.form) for kind in ("image", "video")}
    return {
        "model": settings.model,
        "prompt": prompt.name,
        "version": prompt.version,
        "hash": prompt.hash,
        "language": prompt.language,
        "system": prompt.words["system"],
        **words,
    }
