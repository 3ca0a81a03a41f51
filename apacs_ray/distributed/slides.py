"""Whole slides on Ray Data: slides -> manifests and summaries, and shards -> receipts. Pixels stay in the tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby

import pyarrow as pa

from apacs_ray.data.shards import Receipt
from apacs_ray.distributed.data import receipts_of
from apacs_ray.distributed.session import joined_cluster, joined_machines, map_blocks
from apacs_ray.slides.manifest import SlideSummary, SlideTask, inspect_slide
from apacs_ray.slides.slide_files import SlideFiles
from apacs_ray.slides.slide_tiles import SlideShard, write_slide_shard


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
    """Write every shard; only receipts come back, in order.

    A task writes a shard, or several of a slide that has to be fetched: each node that cuts a slide fetches all of it.
    """

    alone = task.data.is_local or joined_machines() == 1
    most = 1 if alone else shards_a_task(len(shards), joined_cluster().tiling_cpus)
    blocks = [shard_rows(summaries, group) for group in of_one_slide(shards, most)]
    return receipts_of(partial(write_rows, task), blocks, on_done)


def shard_rows(summaries: Sequence[SlideSummary], shards: Sequence[SlideShard]) -> pa.Table:
    """What a task is told of the shards it writes."""
    return pa.Table.from_pylist([{**asdict(shard), "summary": summaries[shard.slide].to_json()} for shard in shards])


def write_rows(task: SlideTask, block: pa.Table) -> list[Receipt]:
    """Write the shards of `shard_rows`, one after the other."""
    return [
        write_slide_shard(
            task,
            SlideSummary.from_json(row["summary"]),
            SlideShard(row["split"], row["number"], row["slide"], tuple(row["rows"])),
        )
        for row in block.to_pylist()
    ]


def shards_a_task(shards: int, cpus: float) -> int:
    """How many shards of a fetched slide one task may write: fetching takes longer than cutting, so that a task for
    every fourth CPU is enough to keep disks and network busy.
    """
    return max(1, int(4 * shards / cpus))


def of_one_slide(shards: Sequence[SlideShard], most: int) -> Iterator[list[SlideShard]]:
    """Neighboring shards of the same slide, at most so many together."""
    for _, same in groupby(shards, key=lambda shard: shard.slide):
        part = list(same)
        yield from (part[start : start + most] for start in range(0, len(part), most))
