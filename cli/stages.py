"""Every stage of curation as a command of its own.

On a run directory a stage is brought up to date with other settings; without one, the command is
a filter: clip rows as JSON Lines on stdin and stdout, so that `jq` fits between.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unimodal.cli import options
from unimodal.cli.options import Engine

if TYPE_CHECKING:
    from unimodal.pipeline.captioning.describe import Open
    from unimodal.pipeline.decide import Turn
    from unimodal.pipeline.presets import CurateSettings
    from unimodal.pipeline.progress import Progress
    from unimodal.pipeline.run import Run
    from unimodal.pipeline.work import Describing

RunDir = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]",
        help="Run directory, '-' to read its path from stdin; without it, rows come from stdin.",
    ),
]
PresetOption = Annotated[
    str | None, typer.Option("--preset", help="Named set of settings.", metavar="NAME")
]
Rows = Iterable[dict[str, Any]]
Filter = Callable[[Rows, "CurateSettings", "Progress"], Rows]


def cut(
    inputs: Annotated[list[str], typer.Argument(help="Media as for curate, or one run directory.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Make a run directory instead of rows.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Where the pass is kept for later filters.")
    ] = None,
    preset: PresetOption = None,
    sets: options.Sets = None,
    engine: options.On = Engine.auto,
    address: options.Address = None,
    workers: options.Workers = None,
    limit: options.Limit = None,
    strict: options.Strict = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Cut videos into clips: the shared frame pass, without scores and verdicts."""
    from unimodal.cli import console
    from unimodal.pipeline import filter, run
    from unimodal.pipeline.errors import UsageError
    from unimodal.pipeline.stages import SKIPPABLE

    driver = {"engine": engine.value, "workers": workers, "address": address}
    inputs = [console.from_stdin(item) for item in inputs]
    if len(inputs) == 1 and (Path(inputs[0]) / "run.json").exists():
        if out is not None or limit is not None:
            raise UsageError(f"{inputs[0]} is a run directory: --out and --limit are for media")
        made = _update(inputs[0], (), preset, sets, driver, json_, quiet)
        _strictly(made, strict)
        return
    settings = _settings(preset or "best", sets)
    progress = console.progress(quiet)
    if out is not None:
        bare = settings.model_copy(update={"skip": SKIPPABLE, "report": False})
        made = run.curate(inputs, out, bare, progress=progress, limit=limit, **driver)  # type: ignore[arg-type]
        console.result(out, {"clips": made.clips.num_rows, "quarantined": made.quarantined}, json_)
    else:
        rows, made = filter.cut_rows(
            inputs,
            settings,
            cache or filter.cache_folder(),
            progress=progress,
            limit=limit,
            **driver,
        )
        _write(rows)
    _strictly(made, strict)


def _strictly(made: Run, strict: bool) -> None:
    if strict and made.quarantined:
        raise typer.Exit(3)


def _command(text: str, stages: tuple[str, ...], rows: Filter) -> Callable[..., None]:
    """A command that brings `stages` of a run up to date, or passes rows through `rows`."""

    def command(
        run: RunDir = None,
        preset: PresetOption = None,
        sets: options.Sets = None,
        engine: options.On = Engine.auto,
        address: options.Address = None,
        workers: options.Workers = None,
        json_: options.Json = False,
        quiet: options.Quiet = False,
        debug: options.Debug = False,
    ) -> None:
        driver = {"engine": engine.value, "workers": workers, "address": address}
        _run(run, stages, preset, sets, driver, json_, quiet, rows)

    command.__doc__ = text
    return command


def _flow_rows(rows: Rows, settings: CurateSettings, progress: Progress) -> Rows:
    from unimodal.pipeline.filter import flow_rows

    return flow_rows(rows, settings, progress)


def _scored(*scorers: str) -> Filter:
    """A filter that adds the columns of these scorers."""

    def add(rows: Rows, settings: CurateSettings, progress: Progress) -> Rows:
        from unimodal.pipeline.filter import score_rows

        return score_rows(rows, scorers, settings, progress)

    return add


def _dedup_rows(rows: Rows, settings: CurateSettings, progress: Progress) -> Rows:
    from unimodal.pipeline.filter import dedup_rows

    return dedup_rows(rows, settings)


flow = _command("Measure motion: mean optical flow as a share of the short side.", (), _flow_rows)
text = _command(
    "Measure how much writing is in the picture: subtitles, credits, marks in corners.",
    ("text",),
    _scored("text"),
)
score = _command(
    "Score clips: technical quality; aesthetics, embeddings and NSFW where weights are given.",
    ("quality", "embed", "nsfw", "match"),
    _scored("quality", "embed", "nsfw"),
)
dedup = _command("Group near-duplicates, the best of each group first.", ("dedup",), _dedup_rows)


def decide(
    run: RunDir = None,
    preset: PresetOption = None,
    sets: options.Sets = None,
    what_if: Annotated[
        bool, typer.Option("--what-if", help="Say what would change, and change nothing.")
    ] = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Keep or drop: apply thresholds to what was measured. Nothing is decoded.

    Of a preset, its thresholds count; other settings belong to the commands of their stages.
    """
    from unimodal.cli import console
    from unimodal.pipeline import filter
    from unimodal.pipeline.errors import UsageError

    others = [item for item in sets or [] if not item.startswith("decide.")]
    if run is not None and others:
        raise UsageError(f"decide changes decide.… only, not {others[0]}: use that stage's command")
    if what_if:
        if run is None:
            raise UsageError("--what-if compares with a run directory: name one")
        _what_if(console.from_stdin(run), preset, sets, json_)
        return
    only = "decide" if run is not None else None
    rows: Filter = lambda r, s, p: filter.decide_rows(r, s)  # noqa: E731
    _run(run, (), preset, sets, {}, json_, quiet, rows, only)


def caption(
    run: RunDir = None,
    source: Annotated[
        str | None,
        typer.Option("--source", help="sidecar, endpoint, vllm or checkpoint.", metavar="NAME"),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Its name at the server, its id, or its folder.")
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", help="Of the server: http://localhost:8000/v1.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What to ask: a name, or FILE.toml.")
    ] = None,
    language: Annotated[
        str | None, typer.Option("--language", help="Of prompt and answers: en, zh, ….")
    ] = None,
    sets: options.Sets = None,
    captions: Annotated[
        str | None,
        typer.Option(
            "--captions",
            metavar="TABLE",
            help="Table with the columns path and caption (filter only).",
        ),
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again for what failed, and only that too.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", help="At most N requests, to try a model.", min=1)
    ] = None,
    eval_: Annotated[
        bool, typer.Option("--eval", help="Only compare a model's captions with those of people.")
    ] = False,
    references: Annotated[
        str | None,
        typer.Option("--references", help="A table of path or uid, and caption by people."),
    ] = None,
    words: Annotated[
        Path | None, typer.Option("--words", help="Small classes to compare: colour = ['red', …].")
    ] = None,
    engine: options.On = Engine.auto,
    address: options.Address = None,
    plan: options.Plan = False,
    strict: options.Strict = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Have a model describe the kept clips; take up captions that lie beside the media.

    What was described stays so, and is not asked for again; another model or prompt begins anew.
    """
    from unimodal.cli import console
    from unimodal.pipeline import filter
    from unimodal.pipeline.caption import read_given
    from unimodal.pipeline.errors import UsageError
    from unimodal.pipeline.work import Describing

    said = {"source": source, "model": model, "url": url, "prompt": prompt, "language": language}
    given = {"caption": {key: value for key, value in said.items() if value is not None}}
    if eval_:
        from unimodal.cli.caption_scores import evaluate

        if run is None:
            raise UsageError("--eval compares the captions of a run directory: name one")
        evaluate(console.from_stdin(run), references, words, json_)
        return
    if references is not None or words is not None:
        raise UsageError("--references and --words are for --eval")
    if run is None:
        if plan or retry or limit is not None:
            raise UsageError("--plan, --retry-failed and --limit are for a run directory: name one")

        def rows(r: Rows, s: CurateSettings, p: Progress) -> Rows:
            opened = captioner(s, engine.value, address)
            return filter.caption_rows(r, s, read_given(captions), p, opened, engine.value, address)

        _run(None, (), None, sets, {}, json_, quiet, rows, over=given)
        return
    if captions is not None:
        raise UsageError("--captions is for rows on standard input; a run takes it from curate")
    run = console.from_stdin(run)
    if plan:
        _caption_plan(run, sets, given, retry, json_)
        return
    driver = {"engine": engine.value, "address": address}
    asking = Describing(retry_failed=retry, limit=limit)
    made = _update(run, (), None, sets, driver, json_, quiet, over=given, asking=asking)
    _strictly(made, strict)


def captioner(settings: CurateSettings, engine: str, address: str | None) -> Open | None:
    """Who opens the source of captions, where it is one that the pipeline does not know.

    Raises `UnimodalError` for a checkpoint that is none, before hours are spent on clips.
    """
    if settings.caption.source != "checkpoint":
        return None
    from unimodal.model.captioner import ENTRY, check
    from unimodal.pipeline.captioning.describe import open_source
    from unimodal.pipeline.engine import choose

    check(settings.caption)
    return lambda own: open_source(own, choose(engine, address), address, ENTRY)


def _caption_plan(
    path: str, sets: list[str] | None, given: dict[str, Any], retry: bool, as_json: bool
) -> None:
    from unimodal.cli import console
    from unimodal.pipeline.captioning.forecast import forecast
    from unimodal.pipeline.run import Run

    run = Run.open(path)
    found = forecast(run, _changed(run, None, sets, over=given), retry)
    console.plan(f"captions of {path}: what would be asked", found, as_json)


def report(
    run: options.Run,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="HTML file (default: RUN/report.html).")
    ] = None,
    json_: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write the run's page: what was dropped and why, with pictures."""
    from unimodal.cli import console
    from unimodal.pipeline.report import write_report
    from unimodal.pipeline.run import Run

    made = write_report(Run.open(console.from_stdin(run)), out)
    console.result(made, {}, json_)


def _run(
    run: str | None,
    stages: Sequence[str],
    preset: str | None,
    sets: list[str] | None,
    driver: dict[str, Any],
    as_json: bool,
    quiet: bool,
    rows: Filter,
    only: str | None = None,
    over: dict[str, Any] | None = None,
) -> None:
    """A stage on a run directory if one is named, else as a filter; `over` are settings."""
    from unimodal.cli import console
    from unimodal.pipeline import filter
    from unimodal.pipeline.errors import UsageError

    if run is not None:
        _update(console.from_stdin(run), stages, preset, sets, driver, as_json, quiet, only)
        return
    if sys.stdin.isatty():
        raise UsageError("name a run directory, or pipe rows in: unimodal cut videos/ | unimodal …")
    settings = _settings(preset or "best", sets, over)
    _write(rows(filter.read_rows(sys.stdin), settings, console.progress(quiet)))


def _update(
    run: str,
    stages: Sequence[str],
    preset: str | None,
    sets: list[str] | None,
    driver: dict[str, Any],
    as_json: bool,
    quiet: bool,
    only: str | None = None,
    over: dict[str, Any] | None = None,
    asking: Describing | None = None,
) -> Run:
    from dataclasses import replace

    from unimodal.cli import console
    from unimodal.cli.curate import tell_result
    from unimodal.pipeline.errors import UsageError
    from unimodal.pipeline.run import Run, update

    before = Run(Path(run))
    if not (before.path / "run.json").exists():
        raise UsageError(f"{run}: not a finished run directory (it has no run.json)")
    settings = _changed(before, preset, sets, only, over)
    if asking is not None:
        asking = replace(asking, opened=captioner(settings, driver["engine"], driver["address"]))
    skip = tuple(name for name in settings.skip if name not in stages)
    settings = settings.model_copy(update={"skip": skip})
    made = update(run, settings, progress=console.progress(quiet), describing=asking, **driver)
    tell_result(made, as_json, quiet)
    return made


def _changed(
    run: Run,
    preset: str | None,
    sets: list[str] | None,
    only: str | None = None,
    over: dict[str, Any] | None = None,
) -> CurateSettings:
    """The run's settings with a preset's (or one group of it) and the user's changes."""
    from unimodal.pipeline.presets import CurateSettings
    from unimodal.pipeline.settings import build

    settings = run.info["settings"]
    if preset is not None:
        # Whole groups: what the preset does not say is the default, not what the run had.
        own = {"parts", "patience", "limits", "skip", "report"}
        groups = _settings(preset, None).model_dump(mode="json", exclude=own)
        settings = {**settings, **({only: groups[only]} if only else groups)}
    return build(CurateSettings, settings, over or {}, sets=sets or [])


def _settings(
    preset: str, sets: list[str] | None, over: dict[str, Any] | None = None
) -> CurateSettings:
    from unimodal.pipeline.presets import CurateSettings, preset_layer
    from unimodal.pipeline.settings import build

    return build(CurateSettings, preset_layer(preset), over or {}, sets=sets or [])


def _what_if(path: str, preset: str | None, sets: list[str] | None, as_json: bool) -> None:
    from unimodal.cli import console
    from unimodal.pipeline.decide import decide, what_if
    from unimodal.pipeline.run import Run

    run = Run.open(path)
    settings = _changed(run, preset, sets, "decide")
    old = run.clips.select(["uid", "verdict", "reasons"])
    scored = run.clips.drop_columns(["verdict", "reasons"])
    found = what_if(old, decide(scored, settings.decide))
    if as_json:
        print(json.dumps(asdict(found)))
        return
    rows: list[tuple[str, Any]] = [("newly dropped", found.dropped)]
    rows += [(f"  now has to hold {turn.rule}", _some(turn)) for turn in found.dropped_by]
    rows.append(("newly kept", found.kept))
    rows += [(f"  had to hold {turn.rule}", _some(turn)) for turn in found.formerly_by]
    rows.append(("stay as they are", found.same))
    rows.append(("kept", f"{run.kept:,} -> {run.kept + found.kept - found.dropped:,}"))
    console.plan(f"{path}: nothing was changed", dict(rows), False)


def _some(turn: Turn) -> str:
    """A number of clips, and the names of a few."""
    more = ", …" if turn.clips > 3 else ""
    return f"{turn.clips:,}: {', '.join(uid[:12] for uid in turn.examples[:3])}{more}"


def _write(rows: Rows) -> None:
    for row in rows:
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    sys.stdout.flush()
