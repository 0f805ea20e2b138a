"""`unimodal why`: everything that is known of one clip, or of one source."""

from __future__ import annotations

from typing import Annotated

import typer

from unimodal.cli import options


def why(
    run: options.Run,
    what: Annotated[str, typer.Argument(help="Beginning of a clip's uid, or a source's path.")],
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Explain a clip: its cuts, scores against thresholds, duplicates, captions and lineage."""
    import json as codec

    from unimodal.cli import console
    from unimodal.pipeline.run import Run
    from unimodal.pipeline.why import text
    from unimodal.pipeline.why import why as explain

    found = explain(Run.open(console.from_stdin(run)), what)
    print(codec.dumps(found, ensure_ascii=False) if json else text(found))
