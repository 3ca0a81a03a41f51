"""Segmentation of slides on Ray: tasks read windows, actors run the networks, tasks find objects and write parts.

Each of the three grows by itself with what the cluster has; Ray Data holds back those that are ahead. A slide's files
are made by a task as soon as all of its parts are there, while the networks go on with the next slides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from apacs_ray.data.rejects import Reject
from apacs_ray.distributed.tasks import KEEP_MEMORY, PoolPlan, configure_data, map_blocks
from apacs_ray.inference.segment_steps import PlannedSlide, RunNetworks, SegmentTask, finish_shard, read_windows
from apacs_ray.runs.provenance import require_source, source_hash

LARGEST_BLOCK = 1 << 30  # bytes; a shard of windows stays in one block
TASK_CPUS = 0.25  # what a task asks for, so that some always run beside the networks


@dataclass(frozen=True)
class ShardReceipt:
    """What became of a shard: of which slide (by number), its cores, those lost, and seconds of each step."""

    slide: int
    cores: int
    rejects: tuple[Reject, ...]
    seconds: Mapping[str, float]


def segment_shards(
    task: SegmentTask, slides: Sequence[PlannedSlide], plan: PoolPlan, tasks_at_once: int
) -> Iterator[ShardReceipt]:
    """Make every missing shard of the slides, in order.

    Args:
        task: What all have in common.
        slides: By number.
        plan: The actors that run networks.
        tasks_at_once: Most tasks that read, and most that find objects.

    Yields:
        A receipt for each shard.
    """
    import ray
    from ray.data import DataContext

    expected = source_hash()

    def read(block: pa.Table) -> pa.Table:
        require_source(expected)
        (row,) = block.to_pylist()
        return read_windows(task, slides[row["slide"]], row["slide"], row["shard"])

    class Worker:
        def __init__(self) -> None:
            require_source(expected)
            self._work = RunNetworks(task)

        def __call__(self, block: pa.Table) -> pa.Table:
            return self._work(block)

    def finish(block: pa.Table) -> pa.Table:
        require_source(expected)
        return finish_shard(task, slides, block)

    blocks = [
        pa.table({"slide": [number], "shard": [shard]}) for number, one in enumerate(slides) for shard in one.missing
    ]
    if not blocks:
        return
    configure_data()
    context = DataContext.get_current()
    before, context.target_max_block_size = context.target_max_block_size, LARGEST_BLOCK
    try:
        dataset = (
            ray.data.from_arrow(blocks)
            .map_batches(
                read,
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=TASK_CPUS,
                compute=ray.data.TaskPoolStrategy(size=max(1, min(tasks_at_once, len(blocks)))),
            )
            .map_batches(
                Worker,
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=plan.cpus,
                num_gpus=plan.gpus or None,
                compute=ray.data.ActorPoolStrategy(size=plan.actors),
                runtime_env=KEEP_MEMORY,
            )
            .map_batches(
                finish,
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=TASK_CPUS,
                compute=ray.data.TaskPoolStrategy(size=max(1, min(tasks_at_once, len(blocks)))),
            )
        )
        for row in dataset.iter_rows():
            seconds = {step: row[step] for step in ("read", "networks", "objects")}
            yield ShardReceipt(row["slide"], row["cores"], tuple(Reject(**one) for one in row["rejects"]), seconds)
    finally:
        context.target_max_block_size = before


def in_tasks(work: Callable[[int], str], count: int) -> Iterator[str]:
    """Yield what `work` returns for the numbers 0 .. count - 1, a task each, in order."""

    def one(block: pa.Table) -> pa.Table:
        return pa.table({"text": [work(number) for number in block["number"].to_pylist()]})

    for row in map_blocks(one, [pa.table({"number": [number]}) for number in range(count)]):
        yield row["text"]


def start_task(work: Callable[[], str]) -> Any:
    """Start `work` in a task; returns Ray's reference to what it will return."""
    import ray

    expected = source_hash()

    def task() -> str:
        require_source(expected)
        return work()

    return ray.remote(num_cpus=TASK_CPUS)(task).remote()
