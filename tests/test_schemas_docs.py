"""The page of schemas says what the code writes: names, order, types, and what is never null."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest

from unimodal.pipeline import clips, parts
from unimodal.pipeline.captioning import store
from unimodal.tokenize import shards

PAGE = (Path(__file__).parent.parent / "docs" / "schemas.md").read_text()
TABLES = {
    "`clips.parquet`": clips.CLIPS,
    "`quarantine.parquet`": clips.QUARANTINE,
    "`parts.parquet`": parts.SCHEMA,
    "`watch-<hash>/<part>.parquet`": pa.schema(list(clips.SAMPLE)),
    "`describe-<hash>/answers-….parquet`": store.ANSWERS,
    "`shard-NNNNN.parquet`": shards.INDEX,
}


def typed(kind: pa.DataType) -> str:
    """A type as the page writes it."""
    if pa.types.is_map(kind):
        return f"map<{typed(kind.key_type)}, {typed(kind.item_type)}>"
    if pa.types.is_list(kind):
        return f"list<{typed(kind.value_type)}>"
    if pa.types.is_struct(kind):
        return f"struct<{', '.join(f'{field.name}: {typed(field.type)}' for field in kind)}>"
    return str(kind)


@pytest.mark.parametrize("heading", TABLES)
def test_a_table_of_the_page_is_the_schema_of_the_code(heading: str) -> None:
    _, _, below = PAGE.partition(f"## {heading}\n")
    written = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", below.partition("\n## ")[0], re.M)
    assert written == [
        (field.name, typed(field.type) + ("" if field.nullable else " not null"))
        for field in TABLES[heading]
    ]
