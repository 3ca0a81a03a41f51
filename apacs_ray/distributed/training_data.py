"""Training samples through Ray Data: the refs of a rank, in order, become blocks; tasks read, decode and augment them.

Datasets run on across epoch ends and validation tiles, so that training never waits for one to start. The order is
ours; Ray Data only keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice
from typing import Any

import numpy as np
import pyarrow as pa

from apacs_ray.data.ahead import ahead
from apacs_ray.data.columns import bytes_in
from apacs_ray.data.portions import portions
from apacs_ray.data.shards import Place, TileIndex
from apacs_ray.distributed.ray_internals import dataset_from_blocks
from apacs_ray.distributed.resource_plan import NetworkPlan
from apacs_ray.distributed.tasks import configure_data
from apacs_ray.runs.provenance import require_source
from apacs_ray.training.batch import Sample
from apacs_ray.training.dataset import TileDataset
from apacs_ray.training.sampler import SampleRef

BLOCK_BYTES = 32 * 2**20  # of decoded pixels a task returns
DATASET_BYTES = 256 * 2**20  # of decoded pixels a dataset holds in the object store, at least
BLOCKS_A_TASK = 2  # that a dataset has, so that no task is without work before its end
MOST_ROWS = 32  # samples of a block
LARGEST_DATASET = 2**30  # bytes of decoded pixels
AHEAD = 2  # datasets that are computed while one is consumed: the first tasks of one beside the last of the other


def ray_samples(
    dataset: TileDataset, indices: Mapping[str, TileIndex], refs: Iterator[SampleRef], plan: NetworkPlan, source: str
) -> Iterator[Sample]:
    """Yield samples for `refs`, in order, decoded by Ray Data's tasks on this node.

    The tasks ask for no CPUs, as this worker has reserved theirs with its own: tasks that had to ask would wait forever
    when workers have taken all CPUs of a cluster that lost a node (`ray_internals.dataset_from_blocks`).
    The next datasets are computed while this one is consumed. Each is small enough to be computed to its end: a
    streaming dataset whose consumer is slower than its tasks spins in the consumer's process and takes half of it.

    Yields:
        A sample for each of `refs`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)  # a drained node refuses
    sizes = sample_bytes(dataset, indices)
    most = min(LARGEST_DATASET, max(DATASET_BYTES, BLOCKS_A_TASK * plan.data_tasks * BLOCK_BYTES))
    parts = datasets_of(blocks_of(refs, sizes), sizes, most)

    def load(block: pa.Table) -> pa.Table:
        require_source(source)
        return _pack(dataset.load([_unref(row) for row in block.to_pylist()]))

    def compute(part: list[list[SampleRef]]) -> list[Any]:
        blocks = [
            pa.Table.from_pylist([_ref_row(ref, indices[ref.phase].place(ref.row)) for ref in block]) for block in part
        ]
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
    for computed in ahead(compute, parts, AHEAD, AHEAD):
        for block in computed:
            yield from _unpack(ray.get(block))


def sample_bytes(dataset: TileDataset, indices: Mapping[str, TileIndex]) -> dict[str, int]:
    """Return the bytes of the largest decoded sample of each phase: inputs and mask, cropped in training."""
    channels = 3 + (len(dataset.heatmaps.members) if dataset.heatmaps else 0)
    side = dataset.augmentation.crop
    pixels = {phase: index.largest for phase, index in indices.items()}
    pixels["train"] = min(pixels["train"], side * side or pixels["train"])
    return {phase: max(1, count * (channels + 1)) for phase, count in pixels.items()}


def blocks_of(refs: Iterable[SampleRef], sizes: Mapping[str, int]) -> Iterator[list[SampleRef]]:
    """Yield neighboring samples that one task decodes: of one phase, `BLOCK_BYTES` and `MOST_ROWS` at most."""
    for phase, same in groupby(refs, key=lambda ref: ref.phase):
        rows = max(1, min(MOST_ROWS, BLOCK_BYTES // sizes[phase]))
        while block := list(islice(same, rows)):
            yield block


def datasets_of(
    blocks: Iterator[list[SampleRef]], sizes: Mapping[str, int], most: int
) -> Iterator[list[list[SampleRef]]]:
    """Return neighboring blocks that are computed together: of `most` bytes, or one block that is larger."""
    return portions(blocks, lambda block: len(block) * sizes[block[0].phase], most)


def _ref_row(ref: SampleRef, place: Place) -> dict[str, Any]:
    return {**vars(place), "place_row": place.row, **vars(ref), "seed": ref.seed.to_bytes(8, "big")}


def _unref(row: dict[str, Any]) -> tuple[SampleRef, Place]:
    seed = int.from_bytes(row["seed"], "big")
    ref = SampleRef(row["epoch"], row["phase"], row["step"], row["row"], row["weight"], seed)
    return ref, Place(row["path"], row["group"], row["place_row"], row["tile_id"])


def _pack(samples: list[Sample]) -> pa.Table:
    """Samples as Arrow rows: pixels as raw bytes, copied once, so that reading them back copies nothing."""
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
            "inputs": np.ascontiguousarray(sample.inputs).data.cast("B"),
            "mask": np.ascontiguousarray(sample.mask).data.cast("B"),
        }
        for sample in samples
    ]
    return pa.Table.from_pylist(rows)


def _unpack(batch: pa.Table) -> Iterator[Sample]:
    pixels = zip(bytes_in(batch.column("inputs")), bytes_in(batch.column("mask")), strict=True)
    others = batch.select(["epoch", "phase", "step", "row", "weight", "seed", "tile_id", "shape"]).to_pylist()
    for row, (inputs, mask) in zip(others, pixels, strict=True):
        assert inputs is not None
        assert mask is not None
        height, width, channels = row["shape"]
        seed = int.from_bytes(row["seed"], "big")
        ref = SampleRef(row["epoch"], row["phase"], row["step"], row["row"], row["weight"], seed)
        yield Sample(ref, row["tile_id"], inputs.reshape(height, width, channels), mask.reshape(height, width))
