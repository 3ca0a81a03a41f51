"""Whole slides on Ray Data: slides -> manifests and summaries, and shards -> receipts. Pixels stay in the tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from apacs_ray.adapters.ingest import receipts_of
from apacs_ray.adapters.session import map_blocks
from apacs_ray.data.shards import Receipt
from apacs_ray.slides.find import SlideFiles
from apacs_ray.slides.plan import SlideSummary, SlideTask, inspect_slide
from apacs_ray.slides.shards import SlideShard, write_slide_shard


def inspect_slides(task: SlideTask, slides: Sequence[SlideFiles], on_done: Callable[[int], None]) -> list[SlideSummary]:
    """The summary of every slide, in order; manifests are in the run."""

    def inspect(block: pa.Table) -> pa.Table:
        found = [inspect_slide(task, number, slides[number]) for number in block["number"].to_pylist()]
        return pa.table({"summary": [summary.to_json() for summary in found]})

    summaries: list[SlideSummary] = []
    for row in map_blocks(inspect, [pa.table({"number": [number]}) for number in range(len(slides))]):
        summaries.append(SlideSummary.from_json(row["summary"]))
        on_done(len(summaries))
    return summaries


def write_slide_shards(
    task: SlideTask, summaries: Sequence[SlideSummary], shards: Sequence[SlideShard], on_done: Callable[[int], None]
) -> list[Receipt]:
    """Write every shard, one task each; only receipts come back, in order."""

    def write(block: pa.Table) -> Receipt:
        (row,) = block.to_pylist()
        shard = SlideShard(row["split"], row["number"], row["slide"], tuple(row["rows"]))
        return write_slide_shard(task, SlideSummary.from_json(row["summary"]), shard)

    blocks = [
        pa.table(
            {
                "split": [shard.split],
                "number": [shard.number],
                "slide": [shard.slide],
                "rows": [list(shard.rows)],
                "summary": [summaries[shard.slide].to_json()],
            }
        )
        for shard in shards
    ]
    return receipts_of(write, blocks, on_done)
