"""Training samples through Ray Data: the refs of a rank, in order, become blocks; tasks read, decode and augment them.

One dataset runs over many epochs (and their validation tiles), so that its start is paid once and decoding goes on
across epoch ends. The order is ours; Ray Data only keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from apacs_ray.adapters.session import data_context
from apacs_ray.data.shards import Place, TileIndex
from apacs_ray.plan import NetworkPlan
from apacs_ray.run import require_source
from apacs_ray.training.feed import Feed
from apacs_ray.training.order import SampleRef
from apacs_ray.training.samples import Sample

BLOCK_BYTES = 32 * 2**20  # of decoded pixels a task returns
DATASET_ROWS = 50_000  # refs handed to one dataset


def ray_samples(
    feed: Feed, indices: Mapping[str, TileIndex], refs: Iterator[SampleRef], plan: NetworkPlan, source: str
) -> Iterator[Sample]:
    """Samples for `refs`, in order, decoded by Ray Data's tasks with the CPUs that `plan` leaves them."""
    import ray

    channels = 3 + (len(feed.heatmaps.members) if feed.heatmaps else 0)
    side = feed.augmentation.crop
    pixels = max(min(indices["train"].largest, side * side or indices["train"].largest), indices["val"].largest)
    rows = max(1, min(32, BLOCK_BYTES // (pixels * (channels + 1))))

    def load(block: pa.Table) -> pa.Table:
        require_source(source)
        return _pack(feed.load([_unref(row) for row in block.to_pylist()]))

    with data_context():
        while blocks := _blocks(indices, islice(refs, DATASET_ROWS), rows):
            dataset = ray.data.from_arrow(blocks).map_batches(
                load,
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=plan.data_cpus,
                compute=ray.data.TaskPoolStrategy(size=plan.data_tasks),
            )
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
                yield from _unpack(batch)


def _blocks(indices: Mapping[str, TileIndex], refs: Iterator[SampleRef], rows: int) -> list[pa.Table]:
    blocks = []
    while chunk := list(islice(refs, rows)):
        blocks.append(pa.Table.from_pylist([_ref_row(ref, indices[ref.phase].place(ref.row)) for ref in chunk]))
    return blocks


def _ref_row(ref: SampleRef, place: Place) -> dict[str, Any]:
    return {**vars(place), "place_row": place.row, **vars(ref), "seed": ref.seed.to_bytes(8, "big")}


def _unref(row: dict[str, Any]) -> tuple[SampleRef, Place]:
    seed = int.from_bytes(row["seed"], "big")
    ref = SampleRef(row["epoch"], row["phase"], row["step"], row["row"], row["weight"], seed)
    return ref, Place(row["path"], row["group"], row["place_row"], row["tile_id"])


def _pack(samples: list[Sample]) -> pa.Table:
    """Samples as Arrow rows: pixels as raw bytes, so that reading them back copies nothing."""
    rows = [
        {
            "epoch": sample.ref.epoch,
            "phase": sample.ref.phase,
            "step": sample.ref.step,
            "row": sample.ref.row,
            "weight": sample.ref.weight,
            "seed": sample.ref.seed.to_bytes(8, "big"),
            "tile_id": sample.tile_id,
            "shape": list(sample.inputs.shape),
            "inputs": sample.inputs.tobytes(),
            "mask": sample.mask.tobytes(),
        }
        for sample in samples
    ]
    return pa.Table.from_pylist(rows)


def _unpack(batch: pa.Table) -> Iterator[Sample]:
    columns = [batch.column(name).combine_chunks() for name in ("inputs", "mask")]
    others = batch.select(["epoch", "phase", "step", "row", "weight", "seed", "tile_id", "shape"]).to_pylist()
    for number, row in enumerate(others):
        height, width, channels = row["shape"]
        inputs, mask = (np.frombuffer(column[number].as_buffer(), dtype=np.uint8) for column in columns)
        seed = int.from_bytes(row["seed"], "big")
        ref = SampleRef(row["epoch"], row["phase"], row["step"], row["row"], row["weight"], seed)
        yield Sample(ref, row["tile_id"], inputs.reshape(height, width, channels), mask.reshape(height, width))
