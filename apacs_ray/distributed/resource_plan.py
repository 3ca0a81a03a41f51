"""Who trains where: the resources of each network's training run, from what the cluster has. Pure arithmetic.

FCN-16 and FCN-8 cost 7 times FCN-32 (`models.registry.cost`), so an equal split of GPUs wastes them. Nothing is asked
for that cannot come. A worker reserves the CPUs of the tasks that decode for it with its own (on a small part of a GPU
of some of them), and they run on its node: whoever has a worker can decode, also when nodes were lost since.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from apacs_ray.models.registry import cost

TOGETHER = "together"
TRAINING_PER_DECODING = 8  # CPUs: a core decodes tiles faster than 8 train on them
SHARED_GPU = 0.2  # of a GPU, for a small network that shares it with a larger one
LEAST_DATA_TASKS = 3  # of a worker on a GPU, where there are so many CPUs for each GPU
SMALL = 0.25  # share of the cost of the largest network, below which one is small
# What a step of several workers waits for their gradients to be summed, in the unit of `models.registry.cost`: by ring,
# each sends 2 (n - 1) / n of 537 MB. At 8 GB/s between GPUs of a node without NVLink, and 3 GFLOP a GFLOP of a forward
# pass at 40 TFLOP/s (an L4), that is 0.067 s, as long as 900; half of it is hidden behind the backward pass. An H100
# with NVLink computes nine times and sends twenty times as fast.
ALL_REDUCE = 450.0
BETWEEN_NODES = 3.0  # times as long, by 25 Gbit/s


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind: how many there are, or how many an autoscaler may start."""

    cpus: float
    gpus: float
    count: int


@dataclass(frozen=True)
class Cluster:
    """Logical resources of all nodes together; of those that train how many there are, and what the poorest has.

    GPUs of nodes without CPUs are not counted: whatever runs on a GPU asks for some of a CPU beside it.
    """

    cpus: float
    gpus: float
    nodes: int
    node_cpus: float
    gpu_cpus: float = 0.0  # CPUs for each GPU
    plain_cpus: float = 0.0  # of nodes without GPUs
    kinds: tuple[Nodes, ...] = field(default=(), compare=False)  # nodes with CPUs; empty: all are alike

    @property
    def tiling_cpus(self) -> float:
        """CPUs for work that needs no GPU: nodes with one are left alone while there are others."""
        return self.plain_cpus or self.cpus

    def nodes_with(self, gpus: bool) -> tuple[Nodes, ...]:
        """Return the nodes that can be asked for CPUs, or for GPUs and CPUs."""
        kinds = self.kinds or (Nodes(self.node_cpus, self.gpus / self.nodes, self.nodes),)
        return tuple(nodes for nodes in kinds if nodes.gpus or not gpus)


def cluster_of(alive: Sequence[Nodes], startable: Sequence[Nodes]) -> Cluster:
    """Return what can be planned with: the nodes there are, or all that an autoscaler may start, where that is more.

    Kinds of equal resources are stand-ins for each other (spot and on demand) and counted once.

    Args:
        alive: The nodes there are.
        startable: Those that an autoscaler may start.

    Returns:
        Their resources together.
    """
    most: dict[tuple[float, float], int] = {}
    for nodes in startable:
        most[nodes.cpus, nodes.gpus] = max(nodes.count, most.get((nodes.cpus, nodes.gpus), 0))
    planned = [Nodes(cpus, gpus, count) for (cpus, gpus), count in most.items()]
    groups = [tuple(nodes for nodes in group if nodes.cpus) for group in (alive, planned)]
    totals = [(_total(group, "gpus"), _total(group, "cpus")) for group in groups]
    gpus, cpus = (max(values) for values in zip(*totals, strict=True))
    count, node_cpus, gpu_cpus = 1, math.inf, math.inf
    for group in groups:
        training = [nodes for nodes in group if nodes.gpus or not gpus]
        count = max(count, sum(nodes.count for nodes in training))
        node_cpus = min([node_cpus, *(nodes.cpus for nodes in training)])
        gpu_cpus = min([gpu_cpus, *(nodes.cpus / nodes.gpus for nodes in training if gpus)])
    return Cluster(
        cpus or 1.0,
        gpus,
        count,
        min(node_cpus, cpus or 1.0),
        gpu_cpus if gpus else 0.0,
        max(_total([nodes for nodes in group if not nodes.gpus], "cpus") for group in groups),
        groups[totals.index(max(totals))],
    )


def _total(group: Sequence[Nodes], what: Literal["cpus", "gpus"]) -> float:
    return sum(getattr(nodes, what) * nodes.count for nodes in group)


def amounts(cpus: float, gpus: float) -> str:
    """Return them for a person, as in `0.8 GPU + 9.6 CPU`."""
    return f"{gpus:g} GPU + {cpus:g} CPU" if gpus else f"{cpus:g} CPU"


@dataclass(frozen=True)
class NetworkPlan:
    """One training run: DDP workers, and the resources of each, those of the tasks that feed it included."""

    name: str
    workers: int
    cpus: float
    gpus: float
    threads: int
    data_tasks: int  # for each worker; 0: it decodes alone

    @property
    def backend(self) -> Literal["nccl", "gloo"] | None:
        """What carries gradients between workers; None for one alone.

        NCCL refuses two workers of a network on one GPU, where those of up to half of one may lie.
        """
        if self.workers == 1:
            return None
        return "nccl" if self.gpus > 0.5 else "gloo"

    def ask(self) -> str:
        """Return what is asked of the cluster, as in `2 workers x 0.8 GPU + 9.6 CPU over NCCL`."""
        device = amounts(self.cpus, self.gpus)
        if self.gpus and self.backend:
            device += " over NCCL" if self.backend == "nccl" else " over gloo, as they share GPUs"
        return f"{self.workers} worker{'s' * (self.workers > 1)} x {device}"

    def describe(self) -> str:
        """Return this for a person, as in `fcn8: 1 worker x 0.66 CPU (1 torch thread, 1 data task)`."""
        threads = f"{self.threads} torch thread{'s' * (self.threads > 1)}"
        return f"{self.name}: {self.ask()} ({threads}, {self.data_tasks} data task{'s' * (self.data_tasks > 1)})"


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
    of a node's CPUs what a worker gets of its GPUs. A worker gets at least one tile of a batch. Where more workers are
    asked for than all networks have GPUs for, these train in turn, each on whole GPUs while there are enough.

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
    gpus, workers = math.floor(cluster.gpus), min(workers, batch_size)
    if gpus >= 1:
        # workers of a network on parts of GPUs would send their gradients through the host
        in_turn = workers > 1 and len(names) * workers > gpus
        shares = (
            _asked_shares(names, gpus, workers, in_turn) if workers else _gpu_shares(names, gpus, batch_size, cluster)
        )
        return TrainingPlan(_on_gpus(shares, cluster), "in turn" if in_turn else "parallel")
    parallel = cluster.cpus >= 2
    count = workers or 1
    on_node = math.ceil(count * (len(names) if parallel else 1) / cluster.nodes)
    cpus = floor_share(cluster.node_cpus / on_node)
    threads, tasks = max(1, int(cpus)), max(1, int(cpus / TRAINING_PER_DECODING))
    networks = tuple(NetworkPlan(name, count, cpus, 0.0, threads, tasks) for name in names)
    return TrainingPlan(networks, "parallel" if parallel else "in turn")


Shares = Mapping[str, tuple[int, float]]  # workers and GPUs a worker, by network


def _on_gpus(shares: Shares, cluster: Cluster) -> tuple[NetworkPlan, ...]:
    """Plans of networks by their shares of GPUs."""
    cpus = {name: floor_share(gpu * cluster.gpu_cpus) for name, (_, gpu) in shares.items()}
    # The tasks that decode for a worker ask for no CPUs: it has one less than its CPUs. A cheap network on a small part
    # of a GPU takes as many tiles a second as the dearest: it has what those beside it leave of the GPU's CPUs, too.
    most = max(1, int(cluster.gpu_cpus) - 1)
    own = {name: max(1, int(cpus[name]) - 1) for name in shares}
    dear = max(shares, key=cost)
    tasks = {}
    for name, (_, gpu) in shares.items():
        wanted = round(own[dear] * (gpu / cost(name)) / (shares[dear][1] / cost(dear)))
        beside = int((1 - gpu) / shares[dear][1] + 1e-6) * own[dear]
        tasks[name] = min(most, max(LEAST_DATA_TASKS, own[name], min(wanted, most - beside)))
    return tuple(
        NetworkPlan(name, count, cpus[name], gpu, max(1, int(cpus[name] / 2)), tasks[name])
        for name, (count, gpu) in shares.items()
    )


def _asked_shares(names: Sequence[str], gpus: int, workers: int, in_turn: bool) -> Shares:
    at_once = workers if in_turn else workers * len(names)
    return {name: (workers, _gpu_share(at_once, gpus)) for name in names}


def _gpu_shares(names: Sequence[str], gpus: int, batch_size: int, cluster: Cluster) -> Shares:
    """Split GPUs so that the slowest network ends first; of equal splits take the one of fewer GPUs.

    Either whole GPUs for each, or a small network (FCN-32) on the side of a larger one. A step takes a worker as long
    as its largest part of a batch: four tiles take three workers as long as two. Then gradients travel.

    Returns:
        Workers and GPUs a worker, by network.
    """
    useful = sorted({-(-batch_size // part) for part in range(1, batch_size + 1)})
    on_node = min(kind.gpus for kind in cluster.nodes_with(gpus=True))

    def steps(name: str, count: int) -> float:
        sums = ALL_REDUCE * 2 * (count - 1) / count * (BETWEEN_NODES if count > on_node else 1)
        return cost(name) * math.ceil(batch_size / count) + sums

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
    return floor_share(1 / together)


def _gpu_share(workers: int, gpus: int) -> float:
    """What each worker gets of a GPU; no worker has parts of two."""
    return share_of_gpu(math.ceil(workers / gpus))


def floor_share(value: float) -> float:
    """Round down to a hundredth, at least one: rounding up would ask for more than there is."""
    return max(0.01, math.floor(value * 100 + 1e-9) / 100)
