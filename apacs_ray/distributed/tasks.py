"""Work on Ray: functions as tasks over blocks of rows, as a pool of actors over shards, or as one task.

Every process is held to the driver's copy of the source.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, AnyStr, ParamSpec, TypeVar

import pyarrow as pa

from apacs_ray.config.settings import Settings
from apacs_ray.distributed.cluster import joined_cluster
from apacs_ray.distributed.ray_internals import dataset_from_blocks, start_datasets_soon
from apacs_ray.distributed.resource_plan import Cluster, share_of_gpu
from apacs_ray.distributed.waiting import OneAsk, told_of_waits
from apacs_ray.inference.memory import tiles_a_batch, workers_a_gpu
from apacs_ray.runs.provenance import require_source, source_hash

P = ParamSpec("P")
T = TypeVar("T")

# For processes that run networks: glibc keeps large freed blocks instead of giving them back, so that a step does not
# wait for the kernel to clear the pages of every tensor anew (a quarter of a CPU step). One arena: the others always
# give back.
GPU_MEMORY = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}  # tiles of many sizes leave no holes in it
KEEP_MEMORY = {
    "env_vars": {
        **GPU_MEMORY,
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**31 - 1),
        "MALLOC_TRIM_THRESHOLD_": str(2**63 - 1),
    }
}


MOST_THREADS = 8  # of an actor that decode, and that count or encode: each holds a tile's logits, 64 MB of 2000 px


def held_to_source(work: Callable[P, T]) -> Callable[P, T]:
    """Return `work` for another process, which is held there to this process's source."""
    expected = source_hash()

    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        require_source(expected)
        return work(*args, **kwargs)

    return checked


def pool_worker(prepare: Callable[[], Callable[[pa.Table], pa.Table]]) -> type:
    """Return the class of an actor for `map_batches`: `prepare` runs there once, and gives what is done with blocks.

    It runs with the first block and not at the actor's start: what is raised there Ray prints, and starts it again.
    """
    prepare = held_to_source(prepare)

    class Worker:
        _work: Callable[[pa.Table], pa.Table] | None = None

        def __call__(self, block: pa.Table) -> pa.Table:
            if self._work is None:
                self._work = prepare()
            return self._work(block)

    return Worker


def map_blocks(
    work: Callable[[pa.Table], pa.Table], blocks: Sequence[pa.Table], *, cpus: float = 1
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the tables that `work(block)` returns, in the order of `blocks`; one Ray Data task a block.

    No more tasks at a time, of `cpus` CPUs each, than nodes without GPUs hold: for more, an autoscaler would start GPU
    nodes, too.

    Yields:
        A row as a dict, column -> value.
    """
    import ray

    configure_data()
    places = int(joined_cluster().tiling_cpus / cpus)
    at_once = ray.data.TaskPoolStrategy(size=max(1, min(places, len(blocks))))
    dataset = dataset_from_blocks(blocks).map_batches(
        held_to_source(work), batch_size=None, batch_format="pyarrow", num_cpus=cpus, compute=at_once
    )
    with told_of_waits({"a task": OneAsk(cpus)}) as went_on:
        for row in dataset.iter_rows():
            went_on()
            yield row


def map_numbers(work: Callable[[int], AnyStr], count: int) -> Iterator[AnyStr]:
    """Yield the texts or bytes that `work` returns for the numbers from 0 to `count` - 1, a task each, in order."""

    def block_of(block: pa.Table) -> pa.Table:
        return pa.table({"result": [work(number) for number in block["number"].to_pylist()]})

    for row in map_blocks(block_of, [pa.table({"number": [number]}) for number in range(count)]):
        yield row["result"]


@dataclass(frozen=True)
class PoolPlan:
    """A pool of actors that predict.

    Attributes:
        actors: How many.
        cpus: That each asks for.
        gpus: Likewise.
        threads: Of each that decode beside the networks, and as many that count or encode.
        batch: Tiles of one size, at most, that pass the networks together. On CPUs one: equal bits, however many.
    """

    actors: int
    cpus: float
    gpus: float
    threads: int = field(default=1, kw_only=True)
    batch: int = field(default=1, kw_only=True)


def plan_pool(cluster: Cluster, shards: int, *, a_gpu: int = 1, batch: int = 1) -> PoolPlan:
    """Plan the actors that predict: never more than there are shards, and without GPUs one a CPU.

    With GPUs there are several beside each other on one, as many as its CPUs can feed: a tile keeps a CPU at work for
    ten times as long as the GPU, with decoding, counting and encoding. Where CPUs are left, each has more threads.

    Args:
        cluster: What there is.
        shards: That they work on.
        a_gpu: How many one GPU's memory holds.
        batch: Tiles that pass the networks together on a GPU.

    Returns:
        The plan.
    """
    gpus = int(cluster.gpus)
    if gpus:
        node_cpus = cluster.gpu_cpus or cluster.cpus / gpus  # an actor lies on a node with a GPU
        together = max(1, min(a_gpu, int(node_cpus), -(-shards // gpus)))
        cpus = min(1.0, node_cpus / (2 * together))
        threads = max(1, min(MOST_THREADS, int(node_cpus / together)))
        actors = max(1, min(gpus * together, shards))
        return PoolPlan(actors, cpus, share_of_gpu(together), threads=threads, batch=batch)
    return PoolPlan(max(1, min(int(cluster.cpus), shards)), min(1.0, cluster.cpus), 0.0)


def ensembles_held(folds: int) -> int:
    """Return how many sets of members an actor of the heatmaps comes to hold: one a fold, and that of all tiles."""
    return 1 if folds == 1 else folds + 1


def plan_predictors(cluster: Cluster, settings: Settings, shards: int, *, ensembles: int = 1) -> PoolPlan:
    """Plan the actors that predict the tiles of a run: on GPUs as many beside each other as memory holds.

    Args:
        cluster: What there is.
        settings: Of the run.
        shards: That they work on.
        ensembles: That each of them comes to hold.

    Returns:
        The plan.
    """
    if not cluster.gpus:
        return plan_pool(cluster, shards)
    tiles = (settings.tiles.size, settings.members.width, settings.evaluate.precision)
    batch = tiles_a_batch(*tiles, ensembles=ensembles)
    return plan_pool(cluster, shards, a_gpu=workers_a_gpu(*tiles, batch, ensembles=ensembles), batch=batch)


@dataclass(frozen=True)
class SegmentPool(PoolPlan):
    """Actors that run networks, and the tasks before and behind them.

    Attributes:
        tasks: Most that read windows at a time, and most that find objects.
        writers: Slides whose files are written at a time.
    """

    tasks: int
    writers: int


def plan_segment_pool(cluster: Cluster) -> SegmentPool:
    """Plan the actors that segment: a GPU each, else half a CPU; the other CPUs are for the tasks.

    Beside GPUs the tasks that read, those that find objects and those that write get a third of these each.

    Returns:
        The plan.
    """
    pool = plan_pool(cluster, max(1, int(max(cluster.cpus, cluster.gpus))))
    tasks = 2 * pool.actors  # one at work, and one whose block is on its way
    if not pool.gpus:
        return SegmentPool(pool.actors, pool.cpus / 2, 0.0, tasks, pool.actors)
    third = int((cluster.cpus - pool.actors * pool.cpus) / 3)
    return SegmentPool(pool.actors, pool.cpus, pool.gpus, max(tasks, third), max(pool.actors, third))


def map_shards(
    work: Callable[[], Callable[[str], pa.Table]], paths: Sequence[str], plan: PoolPlan
) -> Iterator[pa.Table]:
    """Yield the tables that `work()(path)` returns for every path; `work()` runs once in each actor.

    Yields:
        A table, in the order of `paths`; those without rows may be left out.
    """
    import ray

    def of_block() -> Callable[[pa.Table], pa.Table]:
        on_path = work()
        return lambda block: pa.concat_tables([on_path(path) for path in block["path"].to_pylist()])

    configure_data()
    blocks = [pa.table({"path": [path]}) for path in paths]
    dataset = dataset_from_blocks(blocks).map_batches(
        pool_worker(of_block),
        batch_size=1,  # a path; Ray Data wants a number where there are GPUs
        batch_format="pyarrow",
        num_cpus=plan.cpus,
        num_gpus=plan.gpus or None,
        compute=ray.data.ActorPoolStrategy(size=plan.actors),
        runtime_env=KEEP_MEMORY,
    )
    with told_of_waits({"a process that predicts": OneAsk(plan.cpus, plan.gpus)}) as went_on:
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            went_on()
            yield table


def run_in_task(work: Callable[[], T], *, cpus: float, gpus: float) -> T:
    """Return what `work()` returns in a task: on a node, with the resources and in a process such as a run would use.

    `work` takes its own time; a task that fails is not tried again.

    Returns:
        What `work()` returned.
    """
    import ray

    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, runtime_env=KEEP_MEMORY, max_retries=0)(held_to_source(work))
    with told_of_waits({"a task": OneAsk(cpus, gpus)}):
        result: T = ray.get(remote.remote())
    return result


def start_task(work: Callable[[], T], *, cpus: float) -> Any:
    """Start `work` in a task, which Ray does again where its node is lost; returns Ray's reference to the result."""
    import ray

    return ray.remote(num_cpus=cpus)(held_to_source(work)).remote()


def configure_data() -> None:
    """Set Ray Data up for this process: in order, quiet, nothing dropped. Before any dataset is built."""
    from ray.data import DataContext

    start_datasets_soon()
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.print_on_execution_start = False
    context.max_errored_blocks = 0
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors reach the user as exceptions
