"""Training samples through Ray Data: the refs of a rank, in order, become blocks; tasks read, decode and augment them.

Datasets run on across epoch ends and validation tiles, so that training never waits for one to start. The order is
ours; Ray Data only keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from apacs_ray.data.shards import Place, TileIndex
from apacs_ray.distributed.ray_internals import dataset_from_blocks
from apacs_ray.distributed.resource_plan import NetworkPlan
from apacs_ray.distributed.tasks import configure_data
from apacs_ray.runs.provenance import require_source
from apacs_ray.training.batch import Sample
from apacs_ray.training.dataset import TileDataset
from apacs_ray.training.sampler import SampleRef

BLOCK_BYTES = 32 * 2**20  # of decoded pixels a task returns
DATASET_BYTES = 256 * 2**20  # of decoded pixels a dataset holds in the object store; two of them a rank


def ray_samples(
    dataset: TileDataset, indices: Mapping[str, TileIndex], refs: Iterator[SampleRef], plan: NetworkPlan, source: str
) -> Iterator[Sample]:
    """Yield samples for `refs`, in order, decoded by Ray Data's tasks on this node.

    The tasks ask for no CPUs, as this worker has reserved theirs with its own: tasks that had to ask would wait forever
    when workers have taken all CPUs of a cluster that lost a node (`ray_internals.dataset_from_blocks`).
    The next dataset is computed while this one is consumed. Each is small enough to be computed to its end: a
    streaming dataset whose consumer is slower than its tasks spins in the consumer's process and takes half of it.

    Yields:
        A sample for each of `refs`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)  # a drained node refuses
    channels = 3 + (len(dataset.heatmaps.members) if dataset.heatmaps else 0)
    side = dataset.augmentation.crop
    largest = {split: index.largest for split, index in indices.items()}
    pixels = max(min(largest["train"], side * side or largest["train"]), largest["val"])
    rows = max(1, min(32, BLOCK_BYTES // (pixels * (channels + 1))))
    rows_ahead = max(rows, DATASET_BYTES // (pixels * (channels + 1)))

    def load(block: pa.Table) -> pa.Table:
        require_source(source)
        return _pack(dataset.load([_unref(row) for row in block.to_pylist()]))

    def compute() -> list[Any]:
        blocks = _blocks(indices, islice(refs, rows_ahead), rows)
        if not blocks:
            return []
        computed = dataset_from_blocks(blocks).map_batches(
            load,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,
            scheduling_strategy=here,
            compute=ray.data.TaskPoolStrategy(size=plan.data_tasks),
        )
        return list(computed.materialize().to_arrow_refs())

    configure_data()
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(compute)
        while computed := ahead.result():
            ahead = pool.submit(compute)
            for block in computed:
                yield from _unpack(ray.get(block))


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
