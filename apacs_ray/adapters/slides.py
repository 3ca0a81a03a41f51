"""Whole slides on Ray Data: slides -> manifests and summaries, and shards -> receipts. Pixels stay in the tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from apacs_ray.adapters.ingest import receipt_of, receipt_table
from apacs_ray.adapters.session import configure_data
from apacs_ray.data.shards import Receipt
from apacs_ray.run import require_source, source_hash
from apacs_ray.slides.find import SlideFiles
from apacs_ray.slides.plan import SlideSummary, SlideTask, inspect_slide
from apacs_ray.slides.shards import SlideShard, write_slide_shard


def inspect_slides(task: SlideTask, slides: Sequence[SlideFiles], on_done: Callable[[int], None]) -> list[SlideSummary]:
    """The summary of every slide, in order; manifests are in the run."""
    import ray

    expected = source_hash()

    def inspect(block: pa.Table) -> pa.Table:
        require_source(expected)
        found = [inspect_slide(task, number, slides[number]) for number in block["number"].to_pylist()]
        return pa.table({"summary": [summary.to_json() for summary in found]})

    configure_data()
    blocks = [pa.table({"number": [number]}) for number in range(len(slides))]
    dataset = ray.data.from_arrow(blocks).map_batches(inspect, batch_size=None, batch_format="pyarrow", num_cpus=1)
    summaries: list[SlideSummary] = []
    for row in dataset.iter_rows():
        summaries.append(SlideSummary.from_json(row["summary"]))
        on_done(len(summaries))
    return summaries


def write_slide_shards(
    task: SlideTask, summaries: Sequence[SlideSummary], shards: Sequence[SlideShard], on_done: Callable[[int], None]
) -> list[Receipt]:
    """Write every shard, one task each; only receipts come back, in order."""
    import ray

    expected = source_hash()

    def write(block: pa.Table) -> pa.Table:
        require_source(expected)
        (row,) = block.to_pylist()
        shard = SlideShard(row["split"], row["number"], row["slide"], tuple(row["rows"]))
        return receipt_table(write_slide_shard(task, SlideSummary.from_json(row["summary"]), shard))

    configure_data()
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
    dataset = ray.data.from_arrow(blocks).map_batches(write, batch_size=None, batch_format="pyarrow", num_cpus=1)
    receipts: list[Receipt] = []
    for row in dataset.iter_rows():
        receipts.append(receipt_of(row))
        on_done(sum(receipt.rows_in for receipt in receipts))
    return receipts
