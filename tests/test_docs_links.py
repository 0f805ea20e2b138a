"""Links between the documents lead somewhere: to a file of the house, to a heading in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLACES = ("docs", "tokenize", "model", "pipeline", "benchmarks")
DOCUMENTS = [*ROOT.glob("*.md"), *(one for p in PLACES for one in sorted((ROOT / p).rglob("*.md")))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|^ {4}.*?$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """What a heading is called in a link: its words in small letters, joined by dashes."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for link in LINK.findall(CODE.sub("", document.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, heading = link.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.is_relative_to(ROOT) and path.exists(), f"{link}: no such file"
        if heading:
            assert heading in anchors(path), f"{link}: no such heading"


def test_every_document_is_linked_to() -> None:
    linked = {
        (document.parent / link.partition("#")[0]).resolve()
        for document in DOCUMENTS
        for link in LINK.findall(document.read_text())
    }
    assert not set((ROOT / "docs").rglob("*.md")) - linked
