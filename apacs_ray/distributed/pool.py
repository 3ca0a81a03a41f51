"""A pool of actors, each holding loaded networks, that turns tile shards into results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from apacs_ray.distributed.resource_plan import Cluster
from apacs_ray.distributed.session import KEEP_MEMORY, configure_data
from apacs_ray.runs.provenance import require_source, source_hash


@dataclass(frozen=True)
class PoolPlan:
    """How many actors, and what each asks for."""

    actors: int
    cpus: float
    gpus: float


def plan_pool(cluster: Cluster, shards: int) -> PoolPlan:
    """An actor a GPU, else an actor a CPU; never more than there are shards."""
    gpus = int(cluster.gpus)
    if gpus:
        return PoolPlan(max(1, min(gpus, shards)), min(1.0, cluster.cpus / (2 * gpus)), 1.0)
    return PoolPlan(max(1, min(int(cluster.cpus), shards)), min(1.0, cluster.cpus), 0.0)


def map_shards(
    work: Callable[[], Callable[[str], pa.Table]], paths: Sequence[str], plan: PoolPlan
) -> Iterator[dict[str, Any]]:
    """Rows of the tables that `work()(path)` returns for every path; `work()` runs once in each actor.

    Results come in the order of `paths`, one table at a time.
    """
    import ray

    expected = source_hash()

    class Worker:
        def __init__(self) -> None:
            require_source(expected)
            self._work = work()

        def __call__(self, block: pa.Table) -> pa.Table:
            return pa.concat_tables([self._work(path) for path in block["path"].to_pylist()])

    configure_data()
    blocks = [pa.table({"path": [path]}) for path in paths]
    dataset = ray.data.from_arrow(blocks).map_batches(
        Worker,
        batch_size=1,  # a path; Ray Data wants a number where there are GPUs
        batch_format="pyarrow",
        num_cpus=plan.cpus,
        num_gpus=plan.gpus or None,
        compute=ray.data.ActorPoolStrategy(size=plan.actors),
        runtime_env=KEEP_MEMORY,
    )
    yield from dataset.iter_rows()
