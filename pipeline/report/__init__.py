"""The report of a run: one HTML file that says what was kept, what was dropped, and by which rule.

    clips.parquet ─┬─ judged ──────> rules, histograms, clips near a threshold
                   ├─ frames tars ─> contact sheets, film strips: only the frames that are shown
                   └─ quarantine.parquet, run.json

    facts      what is said: figures, and which clips of many are shown
    pictures   thumbnails, out of the frames tars        charts   histograms, timelines: inline SVG
    cards      a clip                                     tables   captions, quarantine, settings
    page       all of it in order; style.css, script.js   words    how things are written

The file needs nothing beside it: no network, no other file, and its script only adds comfort. What
is shown of a large run is a sample that depends on nothing but the run: equal runs, equal bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from unimodal.pipeline.files import atomic

if TYPE_CHECKING:
    from unimodal.pipeline.run import Run


def write_report(run: Run, path: Path | None = None) -> Path:
    """Write the report of a finished run, by default to report.html in it; returns its path.

    One file of a few megabytes at most, whatever the run's size, that makes no request. Raises
    `UsageError` if the run's settings are not those of this version.
    """
    from unimodal.pipeline.report.facts import Facts
    from unimodal.pipeline.report.page import page

    path = path or run.path / "report.html"
    text = page(Facts(run))
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return path
