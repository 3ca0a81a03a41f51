"""Who trains where: the resources of each network's training run, from what the cluster has. Pure arithmetic.

FCN-16 and FCN-8 cost 7 times FCN-32 (`models.registry.cost`), so an equal split of GPUs wastes them. Nothing is asked
for that cannot come. A worker reserves the CPUs of the tasks that decode for it with its own, and they run on its node:
whoever has a worker can decode, also when nodes were lost since.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from apacs_ray.config.sweep import Sweep
from apacs_ray.errors import ApacsError
from apacs_ray.models.registry import cost

TOGETHER = "together"
TRAINING_PER_DECODING = 8  # CPUs: a core decodes tiles faster than 8 train on them
SHARED_GPU = 0.2  # of a GPU, for a small network that shares it with a larger one
SMALL = 0.25  # share of the cost of the largest network, below which one is small


@dataclass(frozen=True)
class Cluster:
    """Logical resources of all nodes together; of those that train how many there are, and what the poorest has."""

    cpus: float
    gpus: float
    nodes: int
    node_cpus: float
    gpu_cpus: float = 0.0  # CPUs for each GPU
    plain_cpus: float = 0.0  # of nodes without GPUs

    @property
    def tiling_cpus(self) -> float:
        """CPUs for work that needs no GPU: nodes with one are left alone while there are others."""
        return self.plain_cpus or self.cpus


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind: how many there are, or how many an autoscaler may start."""

    cpus: float
    gpus: float
    count: int


def cluster_of(alive: Sequence[Nodes], startable: Sequence[Nodes]) -> Cluster:
    """Return what can be planned with: the nodes there are, or all that an autoscaler may start, where that is more.

    Kinds of equal resources are stand-ins for each other (spot and on demand) and counted once.

    Args:
        alive: The nodes there are.
        startable: Those that an autoscaler may start.

    Returns:
        Their resources together.
    """
    kinds: dict[tuple[float, float], int] = {}
    for nodes in startable:
        kinds[nodes.cpus, nodes.gpus] = max(nodes.count, kinds.get((nodes.cpus, nodes.gpus), 0))
    planned = [Nodes(cpus, gpus, count) for (cpus, gpus), count in kinds.items()]
    cpus, gpus = (
        max(sum(getattr(nodes, what) * nodes.count for nodes in group) for group in (alive, planned))
        for what in ("cpus", "gpus")
    )
    count, node_cpus, gpu_cpus = 1, math.inf, math.inf
    for group in (alive, planned):
        training = [nodes for nodes in group if nodes.cpus and (nodes.gpus or not gpus)]
        count = max(count, sum(nodes.count for nodes in training))
        node_cpus = min([node_cpus, *(nodes.cpus for nodes in training)])
        gpu_cpus = min([gpu_cpus, *(nodes.cpus / nodes.gpus for nodes in training if gpus)])
    plain_cpus = max(sum(nodes.cpus * nodes.count for nodes in group if not nodes.gpus) for group in (alive, planned))
    return Cluster(cpus or 1.0, gpus, count, min(node_cpus, cpus or 1.0), gpu_cpus if gpus else 0.0, plain_cpus)


@dataclass(frozen=True)
class NetworkPlan:
    """One training run: DDP workers, and the resources of each, those of the tasks that feed it included."""

    name: str
    workers: int
    cpus: float
    gpus: float
    threads: int
    data_tasks: int  # for each worker; 0: it decodes alone

    def describe(self) -> str:
        """Return this for a person, as in `fcn8: 1 worker x 0.66 CPU (1 torch thread, 1 data task)`."""
        device = f"{self.gpus:g} GPU + {self.cpus:g} CPU" if self.gpus else f"{self.cpus:g} CPU"
        workers = f"{self.workers} worker{'s' * (self.workers > 1)}"
        threads = f"{self.threads} torch thread{'s' * (self.threads > 1)}"
        return (
            f"{self.name}: {workers} x {device} ({threads}, {self.data_tasks} data task{'s' * (self.data_tasks > 1)})"
        )


Mode = Literal["parallel", "in turn", "together"]
T = TypeVar("T")


@dataclass(frozen=True)
class TrainingPlan:
    """Runs of Ray Train: a network each (at the same time, or one after the other), or one that steps them together."""

    networks: tuple[NetworkPlan, ...]
    mode: Mode

    def runs(self, items: Sequence[T]) -> list[tuple[Sequence[T], NetworkPlan]]:
        """Return what each run trains, of `items` in the order of the names that were planned, and its resources."""
        if self.mode == "together":
            return [(items, self.networks[0])]
        return [([item], network) for item, network in zip(items, self.networks, strict=True)]

    def describe(self) -> str:
        """Return this for a person, in a line."""
        how = {"parallel": "at the same time", "in turn": "in turn", "together": "together"}[self.mode]
        return f"training {how}: " + "; ".join(network.describe() for network in self.networks)


def plan_training(
    names: Sequence[str],
    cluster: Cluster,
    *,
    workers: int = 0,
    batch_size: int = 4,
    mode: Literal["auto", "parallel", "together"] = "parallel",
) -> TrainingPlan:
    """Plan resources for training `names` on `cluster`.

    On CPUs each worker gets an equal fraction of a node; on GPUs the split that ends first by the networks' costs, and
    of a node's CPUs what a worker gets of its GPUs. A worker gets at least one tile of a batch.

    Args:
        names: Of the networks, as in `models.registry`.
        cluster: What there is.
        workers: DDP workers of each network; 0: as the cluster allows.
        batch_size: Tiles a step, over all workers.
        mode: `together`: one run for all of them, which decodes each batch once; `auto`: that on one GPU or one CPU,
            which runs of their own would only fight for. On two CPUs it would save 16 s and 38 CPU seconds, mostly of
            starting processes (`benchmarks/modes.py`); but its threads wait for each other: beside another busy
            program, tried once, an epoch took some ten times as long.

    Returns:
        The runs of Ray Train, and the resources of each.
    """
    if mode == "auto":
        mode = "together" if math.floor(cluster.gpus) == 1 or cluster.cpus < 2 else "parallel"
    if mode == "together" and len(names) > 1:
        (one,) = plan_training([TOGETHER], cluster, workers=workers, batch_size=batch_size).networks
        return TrainingPlan((replace(one, name=" + ".join(names)),), "together")
    gpus = math.floor(cluster.gpus)
    if gpus >= 1:
        return TrainingPlan(_on_gpus(names, gpus, cluster, workers, batch_size), "parallel")
    parallel = cluster.cpus >= 2
    count = min(workers or 1, batch_size)
    on_node = math.ceil(count * (len(names) if parallel else 1) / cluster.nodes)
    cpus = _floor(cluster.node_cpus / on_node)
    threads, tasks = max(1, int(cpus)), max(1, int(cpus / TRAINING_PER_DECODING))
    networks = tuple(NetworkPlan(name, count, cpus, 0.0, threads, tasks) for name in names)
    return TrainingPlan(networks, "parallel" if parallel else "in turn")


def plan_trials(
    cluster: Cluster, *, workers: int, cpu: float, gpu: float, batch_size: int, trials: int, concurrency: int = 0
) -> tuple[NetworkPlan, int]:
    """Plan the resources of each worker of a trial, and how many of `trials` may run at a time.

    A trial of one worker is a process of Ray Tune's own. One of several starts them with Ray Train, one after the
    other: more such trials than fit would wait for each other forever. Their workers decode for themselves, as Ray Data
    would heed what trials that were stopped had reserved for minutes after. A worker lies on one node and one GPU;
    where it asks for more CPUs than a node has, it gets those.

    Returns:
        Resources of each worker of a trial, and how many trials run at a time.

    Raises:
        ApacsError: The GPUs are too few.
    """
    workers = min(workers, batch_size)
    gpu = gpu if cluster.gpus else 0.0
    if workers == 1:
        cpu = min(cpu, cluster.node_cpus)
        places = math.floor(cluster.cpus / cpu + 1e-9)
    else:
        node_cpus = 0.95 * cluster.node_cpus  # the rest is for the processes that start workers
        cpu = min(cpu, _floor(node_cpus / math.ceil(workers / cluster.nodes)))
        places = cluster.nodes * math.floor(node_cpus / cpu + 1e-9)
    if gpu:
        places = min(places, math.floor(cluster.gpus) * math.floor(1 / gpu + 1e-9))
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


def _on_gpus(
    names: Sequence[str], gpus: int, cluster: Cluster, workers: int, batch_size: int
) -> tuple[NetworkPlan, ...]:
    shares = _gpu_shares(names, gpus, batch_size)
    if workers:
        shares = {name: (workers, _gpu_share(workers * len(names), gpus)) for name in names}
    plans = []
    for name, (count, gpu) in shares.items():
        cpus = _floor(gpu * cluster.gpu_cpus)
        plans.append(NetworkPlan(name, min(count, batch_size), cpus, gpu, max(1, int(cpus / 2)), max(1, int(cpus) - 1)))
    return tuple(plans)


def _gpu_shares(names: Sequence[str], gpus: int, batch_size: int) -> dict[str, tuple[int, float]]:
    """Split GPUs so that the slowest network ends first; of equal splits take the one of fewer GPUs.

    Either whole GPUs for each, or a small network (FCN-32) on the side of a larger one. A step takes a worker as long
    as its largest part of a batch: four tiles take three workers as long as two.

    Returns:
        Workers and GPUs a worker, by network.
    """
    useful = sorted({-(-batch_size // part) for part in range(1, batch_size + 1)})

    def steps(name: str, count: int) -> float:
        return cost(name) * math.ceil(batch_size / count)

    def best(among: Sequence[str]) -> tuple[float, int, tuple[int, ...]] | None:
        """When the slowest ends, GPUs, and workers of each."""
        choices = itertools.product([count for count in useful if count <= gpus], repeat=len(among))
        ends = ((max(map(steps, among, counts)), sum(counts), counts) for counts in choices if sum(counts) <= gpus)
        return min(ends, default=None)

    whole = best(names)
    large = [name for name in names if cost(name) >= SMALL * max(map(cost, names))]
    small = [name for name in names if name not in large]
    shared = best(large) if len(small) == 1 and gpus > 1 else None
    if shared and (whole is None or shared[0] + steps(small[0], 1) < whole[0]):
        shares = {name: (count, 1 - SHARED_GPU) for name, count in zip(large, shared[2], strict=True)}
        return {name: shares.get(name, (1, SHARED_GPU)) for name in names}
    if whole:
        return {name: (count, 1.0) for name, count in zip(names, whole[2], strict=True)}
    return {name: (1, _gpu_share(len(names), gpus)) for name in names}


def share_of_gpu(together: int) -> float:
    """Return what each of `together` processes gets of the GPU that they share."""
    return _floor(1 / together)


def _gpu_share(workers: int, gpus: int) -> float:
    """What each worker gets of a GPU; no worker has parts of two."""
    return share_of_gpu(math.ceil(workers / gpus))


def _floor(value: float) -> float:
    """Down to a hundredth: rounding up would ask for more than there is."""
    return max(0.01, math.floor(value * 100 + 1e-9) / 100)
