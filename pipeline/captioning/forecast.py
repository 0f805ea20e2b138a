"""What `caption --plan` says: how many clips and requests, and about how many tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unimodal.pipeline.captioning import describe
from unimodal.pipeline.captioning.answers import OK
from unimodal.pipeline.captioning.store import Store
from unimodal.pipeline.errors import UsageError

if TYPE_CHECKING:
    from unimodal.pipeline.presets import CurateSettings
    from unimodal.pipeline.run import Run

PATCH = 28
"""Pixels on a side that Qwen-VL makes one token of; other models take about as many tokens."""


def forecast(run: Run, settings: CurateSettings, retry_failed: bool = False) -> dict[str, Any]:
    """What would be asked of a model for the clips of `run`; nothing is asked or written."""
    from unimodal.pipeline.work import to_describe

    own = settings.caption
    if not own.by_model:
        raise UsageError("no model is named: --source endpoint, vllm or checkpoint, and --model")
    prompt = describe.prompt_of(own)
    stage = describe.describe_stage(own, settings.keyframes.digest())
    store = Store(run.path / stage.folder)
    clips = run.clips.drop_columns(["verdict", "reasons"])
    wanted, requests = to_describe(clips, settings, store, retry_failed)
    uids = {uid for group in wanted.values() for uid in group}
    pictures = tokens = 0
    side = min(own.short_side or settings.keyframes.short_side, settings.keyframes.short_side)
    names = ["uid", "kind", "duration_s", "width", "height"]
    for row in clips.select(names).to_pylist():
        if row["uid"] not in uids:
            continue
        asks = describe.count_of(row, own)
        most = min(own.frames, settings.keyframes.count)
        length = (row["duration_s"] or 0.0) / asks
        stored = int(length * settings.keyframes.fps)
        each = 1 if row["kind"] == "image" else max(1, min(most, stored))
        scale = min(1.0, side / max(1, min(row["width"], row["height"])))
        area = row["width"] * row["height"] * scale * scale
        words = len(prompt.words["system"]) + len(prompt.before(row["kind"], own.form))
        pictures += asks * each
        tokens += asks * (each * max(1, round(area / PATCH**2)) + words // 4 + 40)
    failed = [status for status in store.statuses.values() if status != OK]
    return {
        "model": own.model,
        "prompt": f"{prompt.name} {prompt.version} ({prompt.language}, {prompt.hash})",
        "clips": len(uids),
        "requests": requests,
        "pictures": pictures,
        # A checkpoint sees pictures of the size that it was trained on, whatever theirs is.
        **({} if own.source == "checkpoint" else {"prompt_tokens_about": int(tokens)}),
        "output_tokens_at_most": requests * own.max_tokens,
        "described_before": len(store.statuses) - len(failed),
        "failed_before": len(failed),
    }
