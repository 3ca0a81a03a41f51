"""Ingest on Ray Data: pairs -> probed sources, slides -> manifests and summaries, shards -> receipts.

Pixels stay in the tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from typing import Any

import pyarrow as pa

from apacs_ray.data.folders import Pair
from apacs_ray.data.image_tiles import ShardTask, Source, probe_pair, write_shard
from apacs_ray.data.rejects import REJECT_SCHEMA, Reject
from apacs_ray.data.shards import Receipt
from apacs_ray.distributed.cluster import joined_cluster, joined_machines
from apacs_ray.distributed.tasks import map_blocks, map_numbers
from apacs_ray.slides.manifest import SlideSummary, SlideTask, inspect_slide
from apacs_ray.slides.slide_files import SlideFiles
from apacs_ray.slides.slide_tiles import SlideShard, write_slide_shard
from apacs_ray.storage import Entry, Store
from apacs_ray.synthetic.slide import SlideSpec
from apacs_ray.synthetic.write import write_smear

PROBES_A_TASK = 64  # headers: mostly waiting for the store


def render_smears(store: Store, specs: Sequence[SlideSpec]) -> None:
    """Render the synthetic slides that are not there yet, one task each."""

    def render(block: pa.Table) -> pa.Table:
        for index in block["index"].to_pylist():
            write_smear(store, specs[index], index)
        return block

    for _ in map_blocks(render, [pa.table({"index": [index]}) for index in range(len(specs))]):
        pass


def probe_pairs(
    store: Store, pairs: Sequence[Pair], max_pixels: int, on_done: Callable[[int], None]
) -> tuple[list[Source], list[Reject]]:
    """Read every pair's headers, in tasks of `PROBES_A_TASK`; `on_done` hears how many are read."""

    def probe(block: pa.Table) -> pa.Table:
        rows = []
        for row in block.to_pylist():
            pair = Pair(row["split"], row["stem"], Entry(**row["image"]), Entry(**row["mask"]), row["slide_id"])
            found = probe_pair(store, pair, max_pixels)
            row = {"index": row["index"], "width": None, "height": None, "reject": None}
            if isinstance(found, Source):
                row |= {"width": found.width, "height": found.height}
            else:
                row["reject"] = asdict(found)
            rows.append(row)
        return pa.Table.from_pylist(rows, PROBE_SCHEMA)

    rows = [{"index": index, **asdict(pair)} for index, pair in enumerate(pairs)]
    blocks = [pa.Table.from_pylist(rows[i : i + PROBES_A_TASK]) for i in range(0, len(rows), PROBES_A_TASK)]
    sources: list[Source] = []
    rejects: list[Reject] = []
    for row in map_blocks(probe, blocks, cpus=0.5):
        if row["reject"] is None:
            sources.append(Source(pairs[row["index"]], row["width"], row["height"]))
        else:
            rejects.append(Reject(**row["reject"]))
        on_done(len(sources) + len(rejects))
    return sources, rejects


def write_shards(task: ShardTask, shards: Sequence[pa.Table], on_done: Callable[[int], None]) -> list[Receipt]:
    """Write every shard, one task each, and return their receipts."""
    return receipts_of(lambda plan: [write_shard(task, plan)], shards, on_done)


def receipts_of(
    write: Callable[[pa.Table], list[Receipt]], blocks: Sequence[pa.Table], on_done: Callable[[int], None]
) -> list[Receipt]:
    """Return what `write` returns for all blocks, in order; `on_done` hears how many tiles are settled."""
    receipts: list[Receipt] = []
    settled = 0
    for row in map_blocks(lambda block: _receipt_table(write(block)), blocks):
        receipts.append(_receipt(row))
        settled += receipts[-1].rows_in
        on_done(settled)
    return receipts


def inspect_slides(task: SlideTask, slides: Sequence[SlideFiles], on_done: Callable[[int], None]) -> list[SlideSummary]:
    """Return the summary of every slide, in order; manifests are in the run."""
    summaries: list[SlideSummary] = []
    for text in map_numbers(lambda number: inspect_slide(task, number, slides[number]).to_json(), len(slides)):
        summaries.append(SlideSummary.from_json(text))
        on_done(len(summaries))
    return summaries


def write_slide_shards(
    task: SlideTask, summaries: Sequence[SlideSummary], shards: Sequence[SlideShard], on_done: Callable[[int], None]
) -> list[Receipt]:
    """Write every shard and return their receipts, in order.

    A task writes a shard, or several of a slide that has to be fetched: each node that cuts a slide fetches all of it.

    Returns:
        A receipt for each shard.
    """
    alone = task.data.is_local or joined_machines() == 1
    most = 1 if alone else shards_a_task(len(shards), joined_cluster().tiling_cpus)
    blocks = [shard_rows(summaries, group) for group in of_one_slide(shards, most)]
    return receipts_of(partial(write_rows, task), blocks, on_done)


def shard_rows(summaries: Sequence[SlideSummary], shards: Sequence[SlideShard]) -> pa.Table:
    """Return what a task needs to know of the shards it writes, a row each."""
    return pa.Table.from_pylist([{**asdict(shard), "summary": summaries[shard.slide].to_json()} for shard in shards])


def write_rows(task: SlideTask, block: pa.Table) -> list[Receipt]:
    """Write the shards of `shard_rows`, one after the other, and return their receipts."""
    return [
        write_slide_shard(
            task,
            SlideSummary.from_json(row["summary"]),
            SlideShard(row["split"], row["number"], row["slide"], tuple(row["rows"])),
        )
        for row in block.to_pylist()
    ]


def shards_a_task(shards: int, cpus: float) -> int:
    """Return how many shards of a fetched slide one task may write.

    Fetching takes longer than cutting, so that a task for every fourth CPU keeps disks and network busy.

    Args:
        shards: Of the run.
        cpus: For work that needs no GPU.

    Returns:
        At least 1.
    """
    return max(1, int(4 * shards / cpus))


def of_one_slide(shards: Sequence[SlideShard], most: int) -> Iterator[list[SlideShard]]:
    """Yield neighboring shards of the same slide, at most `most` together."""
    for _, same in groupby(shards, key=lambda shard: shard.slide):
        part = list(same)
        yield from (part[start : start + most] for start in range(0, len(part), most))


_REJECT = pa.struct(list(REJECT_SCHEMA))
PROBE_SCHEMA = pa.schema([("index", pa.int64()), ("width", pa.int32()), ("height", pa.int32()), ("reject", _REJECT)])
RECEIPT_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("rows_in", pa.int64()),
        ("rows_out", pa.int64()),
        ("skipped", pa.map_(pa.string(), pa.int64())),
        ("rejects", pa.list_(_REJECT)),
        ("reused", pa.bool_()),
        ("index", pa.string()),
    ]
)


def _receipt_table(receipts: Sequence[Receipt]) -> pa.Table:
    rows = [{**asdict(receipt), "skipped": list(receipt.skipped.items())} for receipt in receipts]
    return pa.Table.from_pylist(rows, RECEIPT_SCHEMA)


def _receipt(row: dict[str, Any]) -> Receipt:
    return Receipt(**{**row, "skipped": dict(row["skipped"] or ()), "rejects": list(row["rejects"] or ())})
