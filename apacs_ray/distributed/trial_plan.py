"""How many trials of a sweep run at a time, and what each of their workers gets. Pure arithmetic."""

from __future__ import annotations

import math

from apacs_ray.config.sweep import Sweep
from apacs_ray.distributed.resource_plan import Cluster, NetworkPlan, floor_share
from apacs_ray.errors import ApacsError


def plan_trials(
    cluster: Cluster, *, workers: int, cpu: float, gpu: float, batch_size: int, trials: int, concurrency: int = 0
) -> tuple[NetworkPlan, int]:
    """Plan the resources of each worker of a trial, and how many of `trials` may run at a time.

    A trial of one worker is a process of Ray Tune's own. One of several starts them with Ray Train, one after the
    other: more such trials than fit would wait for each other forever. Their workers decode for themselves, as Ray Data
    would heed what trials that were stopped had reserved for minutes after. A worker lies on one node and one GPU;
    where it asks for more CPUs than a node has, it gets those. With a share of a GPU it gets that of the node's CPUs
    as well, where that is more than it asks for: they read tiles ahead of the GPU.

    Returns:
        Resources of each worker of a trial, and how many trials run at a time.

    Raises:
        ApacsError: The GPUs are too few.
    """
    workers = min(workers, batch_size)
    gpu = gpu if cluster.gpus else 0.0
    nodes = cluster.nodes_with(gpus=gpu > 0)
    share = 1.0 if workers == 1 else 0.95  # the rest is for the processes that start workers
    if gpu:
        on_gpu = math.floor(1 / gpu + 1e-9)
        cpu = max(cpu, floor_share(min(share * kind.cpus / max(1, math.floor(kind.gpus)) for kind in nodes) / on_gpu))
    poorest, count = min(kind.cpus for kind in nodes), sum(kind.count for kind in nodes)
    cpu = min(cpu, poorest if workers == 1 else floor_share(share * poorest / math.ceil(workers / count)))
    places = 0
    for kind in nodes:
        on_node = math.floor(share * kind.cpus / cpu + 1e-9)
        if gpu:
            on_node = min(on_node, math.floor(kind.gpus) * on_gpu)
        places += kind.count * on_node
    if places < workers:
        asked = f"{workers} workers with {gpu:g} GPU each"
        raise ApacsError(f"tune.config: a trial asks for {asked}; the cluster's {cluster.gpus:g} GPUs hold {places}")
    at_once = max(1, min(places // workers, trials, concurrency or trials))
    return NetworkPlan("fusion", workers, cpu, gpu, max(1, int(cpu)), 0), at_once


def plan_sweep(sweep: Sweep, cluster: Cluster, batch_size: int) -> tuple[NetworkPlan, int]:
    """Return `plan_trials` of what the sweep asks for."""
    asked = sweep.resources
    return plan_trials(
        cluster,
        workers=asked.workers,
        cpu=asked.cpu,
        gpu=asked.gpu,
        batch_size=batch_size,
        trials=sweep.trials_in_all,
        concurrency=sweep.concurrency,
    )
