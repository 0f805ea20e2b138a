"""HTML that is escaped unless it says it is HTML: file names and captions are strangers' text.

`h("td", row["uri"], class_="name")` gives `<td class="name">…</td>`; only what `h` itself returned
goes into it as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import Any

VOID = frozenset({"br", "col", "hr", "img", "input", "meta"})

# Not allowed in HTML, and unprintable: C0 but tab and line feed, DEL, C1, lone surrogates.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Inside = str | int | float | None | Iterable["Inside"]


def h(name: str, /, *inside: Inside, **attributes: Any) -> Html:
    """An element. Strings are escaped, None and False leave a child or an attribute out.

    An attribute's trailing underscore is dropped (`class_`), other underscores become hyphens.
    """
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{plain(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(inside)}</{name}>")


def join(inside: Inside) -> Html:
    """Children side by side, without an element around them."""
    if inside is None or inside is False:
        return Html("")
    if isinstance(inside, Html):
        return inside
    if isinstance(inside, str | int | float):
        return Html(plain(inside))
    return Html("".join(join(item) for item in inside))


def plain(value: Any) -> str:
    """Any text, made harmless between tags and in a quoted attribute."""
    return escape(_CONTROL.sub("\ufffd", str(value)), quote=True)
