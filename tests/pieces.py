"""A plugin of pytest (`-p pieces`) under which every table is too large to be one piece.

Tables are then read, sorted and taken from a few rows at a time, and indexes of shards mapped.
"""

from unimodal.pipeline import clips, large, view, work
from unimodal.pipeline.captioning import describe
from unimodal.tokenize import shards

large.WHOLE, large.SLICE, large.BATCH = 0, 2_000, 3
shards.HELD = 0
for module in (clips, view, work, describe):
    module.BATCH = 5  # type: ignore[attr-defined]
