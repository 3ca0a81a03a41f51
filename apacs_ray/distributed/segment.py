"""Segmentation of slides on Ray: tasks read windows, actors run the networks, tasks find objects and write parts.

Each of the three grows by itself with what the cluster has; Ray Data holds back those that are ahead. A slide's files
are made by a task as soon as all of its parts are there, while the networks go on with the next slides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from apacs_ray.distributed.ray_internals import dataset_from_blocks
from apacs_ray.distributed.tasks import KEEP_MEMORY, SegmentPool, configure_data, held_to_source, pool_worker
from apacs_ray.distributed.waiting import OneAsk, told_of_waits
from apacs_ray.inference.segment_steps import PlannedSlide, RunNetworks, SegmentTask, finish_shard, read_windows

LARGEST_BLOCK = 1 << 30  # bytes; a shard of windows stays in one block
TASK_CPUS = 0.25  # what a task asks for, so that some always run beside the networks


@dataclass(frozen=True)
class ShardReceipt:
    """What became of a shard: of which slide (by number), its cores, and seconds of each step."""

    slide: int
    cores: int
    seconds: Mapping[str, float]


def segment_shards(task: SegmentTask, slides: Sequence[PlannedSlide], plan: SegmentPool) -> Iterator[ShardReceipt]:
    """Make every missing shard of the slides, in order.

    Args:
        task: What all have in common.
        slides: By number.
        plan: The actors that run networks, and how many tasks there are beside them.

    Yields:
        A receipt for each shard.
    """
    import ray
    from ray.data import DataContext

    def read(block: pa.Table) -> pa.Table:
        (row,) = block.to_pylist()
        return read_windows(task, slides[row["slide"]], row["slide"], row["shard"])

    blocks = [
        pa.table({"slide": [number], "shard": [shard]}) for number, one in enumerate(slides) for shard in one.missing
    ]
    if not blocks:
        return
    configure_data()
    whole: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}  # a block is a shard
    at_once = ray.data.TaskPoolStrategy(size=max(1, min(plan.tasks, len(blocks))))
    in_tasks = {**whole, "num_cpus": TASK_CPUS, "compute": at_once}
    in_actors = {
        **whole,
        "batch_size": 1,  # a window; Ray Data wants a number where there are GPUs, and puts a block together again
        "num_cpus": plan.cpus,
        "num_gpus": plan.gpus or None,
        "compute": ray.data.ActorPoolStrategy(size=plan.actors),
        "runtime_env": KEEP_MEMORY,
    }
    context = DataContext.get_current()
    before, context.target_max_block_size = context.target_max_block_size, LARGEST_BLOCK
    try:
        dataset = (
            dataset_from_blocks(blocks)
            .map_batches(held_to_source(read), **in_tasks)
            .map_batches(pool_worker(lambda: RunNetworks(task)), **in_actors)
            .map_batches(held_to_source(lambda block: finish_shard(task, slides, block)), **in_tasks)
        )
        asked = {"a task": OneAsk(TASK_CPUS), "a process with the networks": OneAsk(plan.cpus, plan.gpus)}
        with told_of_waits(asked) as went_on:
            for row in dataset.iter_rows():
                went_on()
                seconds = {step: row[step] for step in ("read", "networks", "objects")}
                yield ShardReceipt(row["slide"], row["cores"], seconds)
    finally:
        context.target_max_block_size = before
