"""Ingest on Ray Data: pairs -> probed sources, and manifest shards -> receipts. Pixels stay in the tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from apacs_ray.data.folders import Pair
from apacs_ray.data.image_tiles import ShardTask, Source, probe_pair, write_shard
from apacs_ray.data.rejects import Reject
from apacs_ray.data.shards import Receipt
from apacs_ray.distributed.session import map_blocks
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
    """Read every pair's headers, in tasks of `PROBES_A_TASK`."""

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
    """Write every shard, one task each; only receipts come back."""
    return receipts_of(lambda plan: [write_shard(task, plan)], shards, on_done)


def receipts_of(
    write: Callable[[pa.Table], list[Receipt]], blocks: Sequence[pa.Table], on_done: Callable[[int], None]
) -> list[Receipt]:
    """What `write` returns for all blocks, in order; `on_done` hears how many tiles are settled."""
    receipts: list[Receipt] = []
    settled = 0
    for row in map_blocks(lambda block: _receipt_table(write(block)), blocks):
        receipts.append(_receipt(row))
        settled += receipts[-1].rows_in
        on_done(settled)
    return receipts


REJECT_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("slide_id", pa.string()),
        ("x", pa.int64()),
        ("y", pa.int64()),
        ("stage", pa.string()),
        ("code", pa.string()),
        ("reason", pa.string()),
    ]
)
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
    ]
)


def _receipt_table(receipts: Sequence[Receipt]) -> pa.Table:
    rows = [{**asdict(receipt), "skipped": list(receipt.skipped.items())} for receipt in receipts]
    return pa.Table.from_pylist(rows, RECEIPT_SCHEMA)


def _receipt(row: dict[str, Any]) -> Receipt:
    return Receipt(**{**row, "skipped": dict(row["skipped"] or ()), "rejects": list(row["rejects"] or ())})
