"""Plans on clusters of all shapes: a scheduler places every worker that is asked for, and gradients travel by NCCL."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from apacs_ray.distributed.resource_plan import Nodes, TrainingPlan, cluster_of, plan_training
from apacs_ray.distributed.tasks import plan_pool
from apacs_ray.distributed.trial_plan import plan_trials
from apacs_ray.models.registry import MEMBERS

SHAPES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4), (16, 2), (16, 4)]  # GPUs, nodes
CPUS_A_GPU = {"L4": 12.0, "H100": 26.0, "poor": 1.0, "poorer": 0.5}
HEADS = {
    "no head": [],
    "head without CPUs": [Nodes(0, 0, 1)],
    "head with CPUs": [Nodes(8, 0, 1)],
    "head with GPUs and no CPUs": [Nodes(0, 4, 1)],  # as of `ray start --head --num-cpus=0` on a GPU machine
    "head and plain nodes": [Nodes(0, 0, 1), Nodes(32, 0, 8)],
}
CLUSTERS = [
    pytest.param([*head, Nodes(per_gpu * gpus / nodes, gpus / nodes, nodes)], id=f"{gpus} {kind} on {nodes}, {name}")
    for (gpus, nodes), (kind, per_gpu), (name, head) in itertools.product(SHAPES, CPUS_A_GPU.items(), HEADS.items())
]


@dataclass
class Node:
    """What is free on it."""

    cpus: float
    gpus: list[float]


class Scheduler:
    """Places one ask after the other, on a node and a GPU drawn from all that have room for it."""

    def __init__(self, kinds: Sequence[Nodes], seed: int) -> None:
        self.nodes = [Node(kind.cpus, [1.0] * int(kind.gpus)) for kind in kinds for _ in range(kind.count)]
        self._random = random.Random(seed)

    def place(self, cpus: float, gpus: float) -> tuple[int, int | None] | None:
        """Take the room; None when the ask would wait."""
        able = [
            (number, index)
            for number, node in enumerate(self.nodes)
            if node.cpus >= cpus - 1e-9
            for index in ([i for i, free in enumerate(node.gpus) if free >= gpus - 1e-9] if gpus else [None])
        ]
        if not able:
            return None
        number, index = self._random.choice(able)
        self.nodes[number].cpus -= cpus
        if index is not None:
            self.nodes[number].gpus[index] -= gpus
        return number, index


def orders(plan: TrainingPlan) -> Iterator[tuple[int, list[list[tuple[str, float, float]]]]]:
    """Seeds, and the asks of networks that train at a time, in some order."""
    asks = [[(one.name, one.cpus, one.gpus)] * one.workers for one in plan.networks]
    groups = [[ask for network in asks for ask in network]] if plan.mode == "parallel" else asks
    for seed in range(4):
        shuffled = [list(group) for group in groups]
        for group in shuffled:
            random.Random(seed).shuffle(group)
        yield seed, shuffled


@pytest.mark.parametrize("kinds", CLUSTERS)
def test_every_worker_finds_its_place_in_any_order(kinds: list[Nodes]) -> None:
    cluster = cluster_of(kinds, [])
    usable = sum(nodes.gpus * nodes.count for nodes in kinds if nodes.cpus)
    assert cluster.gpus == usable
    for names, workers, batch in itertools.product((MEMBERS, ("fusion", "fusion_published")), (0, 1, 2, 8), (4, 8)):
        plan = plan_training(names, cluster, workers=workers, batch_size=batch)
        backends = {one.name: one.backend for one in plan.networks}
        for one in plan.networks:
            assert one.gpus > 0
            assert one.workers == (min(workers, batch) or one.workers)
            if one.workers > 1:
                assert one.backend == ("nccl" if one.workers <= usable else "gloo"), plan.describe()
        for seed, groups in orders(plan):
            for group in groups:
                scheduler, places = Scheduler(kinds, seed), []
                for name, cpus, gpus in group:
                    place = scheduler.place(cpus, gpus)
                    assert place is not None, f"{name} waits for {cpus} CPU + {gpus} GPU: {plan.describe()}"
                    places.append((name, *place))
                ranks = [place for place in places if backends[place[0]] == "nccl"]
                assert len(ranks) == len(set(ranks)), f"two ranks of a network on one GPU: {plan.describe()}"


@pytest.mark.parametrize("kinds", CLUSTERS)
def test_trials_and_actors_find_their_places(kinds: list[Nodes]) -> None:
    cluster = cluster_of(kinds, [])
    for workers, cpu, gpu in itertools.product((1, 2), (1.0, 4.0), (0.0, 0.25, 0.5, 1.0)):
        if gpu and cluster.gpus * int(1 / gpu) < workers:
            continue  # refused, in a line
        each, at_once = plan_trials(cluster, workers=workers, cpu=cpu, gpu=gpu, batch_size=8, trials=1000)
        able = [kind for kind in kinds if kind.cpus and (kind.gpus or not gpu)]
        if gpu and min(kind.cpus for kind in able) >= cpu * 4:  # and with it the GPUs are full
            mine = min(kind.cpus / kind.gpus for kind in able) / int(1 / gpu)
            assert each.cpus >= max(cpu if workers == 1 else 0.9 * cpu, 0.95 * mine - 0.01)
            asked = min(cpu, each.cpus)
            full = [min(kind.gpus * int(1 / gpu), 0.95 * kind.cpus // asked) * kind.count for kind in able]
            assert at_once >= sum(full) // workers
        for seed in range(3):
            scheduler = Scheduler(kinds, seed)
            waits = [None for _ in range(at_once * workers) if scheduler.place(each.cpus, each.gpus) is None]
            assert not waits, f"{at_once} trials of {workers} x {each.cpus} CPU + {each.gpus} GPU: {len(waits)} wait"
    pool, scheduler = plan_pool(cluster, 1000), Scheduler(kinds, 0)
    assert pool.actors == cluster.gpus
    for _ in range(pool.actors):
        assert scheduler.place(pool.cpus, pool.gpus) is not None


@pytest.mark.parametrize(
    ("gpus", "nodes", "batch", "workers", "share"),
    [
        (1, 1, 4, (1, 1, 1), 0.33),
        (2, 1, 4, (1, 1, 1), 0.8),
        (4, 1, 4, (1, 2, 2), 0.8),
        (4, 1, 8, (1, 2, 2), 0.8),
        (8, 2, 4, (1, 4, 4), 0.8),
        (8, 2, 8, (1, 3, 3), 1.0),
        (16, 4, 4, (1, 4, 4), 1.0),
        (16, 4, 8, (1, 4, 4), 1.0),
        (16, 2, 8, (1, 4, 4), 1.0),
    ],
)
def test_the_usual_plans(gpus: int, nodes: int, batch: int, workers: tuple[int, ...], share: float) -> None:
    """FCN-32 costs a seventh of each of the others, and may lie beside one worker of them."""
    plan = plan_training(MEMBERS, cluster_of([Nodes(12 * gpus / nodes, gpus / nodes, nodes)], []), batch_size=batch)
    assert tuple(one.workers for one in plan.networks) == workers, plan.describe()
    assert plan.networks[2].gpus == share
    assert ("over NCCL" in plan.describe()) == (max(workers) > 1)


def test_more_workers_than_fit_a_batch_take_no_room() -> None:
    plan = plan_training(MEMBERS, cluster_of([Nodes(144, 12, 1)], []), workers=8, batch_size=4)
    assert plan.mode == "parallel"
    assert [(one.workers, one.gpus, one.cpus) for one in plan.networks] == [(4, 1.0, 12.0)] * 3


def test_workers_that_must_share_gpus_say_so() -> None:
    plan = plan_training(("fusion",), cluster_of([Nodes(24, 2, 1)], []), workers=4, batch_size=4)
    assert "4 workers x 0.5 GPU + 6 CPU over gloo, as they share GPUs" in plan.describe()


def test_gradients_that_travel_between_nodes_cost_more() -> None:
    """Eight ranks would be faster by arithmetic alone, but not when a node has two GPUs."""
    one_node = plan_training(("fusion",), cluster_of([Nodes(96, 8, 1)], []), batch_size=8)
    four = plan_training(("fusion",), cluster_of([Nodes(24, 2, 4)], []), batch_size=8)
    assert one_node.networks[0].workers > four.networks[0].workers


@pytest.mark.parametrize(
    ("kinds", "workers", "gpu", "cpus", "at_once"),
    [
        ([Nodes(48, 4, 1)], 1, 0.25, 3, 16),  # g6.12xlarge
        ([Nodes(48, 4, 1)], 1, 1.0, 12, 4),
        ([Nodes(48, 4, 1)], 2, 1.0, 11.4, 2),
        ([Nodes(48, 4, 1), Nodes(192, 8, 1)], 1, 0.25, 3, 48),  # the poorer node says
        ([Nodes(2, 4, 1)], 1, 0.25, 1, 2),  # what it asks for, at least
        ([Nodes(48, 0, 4)], 1, 0.25, 1, 192),
    ],
)
def test_a_trial_has_the_cpus_of_its_share_of_a_gpu(
    kinds: list[Nodes], workers: int, gpu: float, cpus: float, at_once: int
) -> None:
    each, count = plan_trials(cluster_of(kinds, []), workers=workers, cpu=1, gpu=gpu, batch_size=8, trials=1000)
    assert (each.cpus, each.threads, count) == (cpus, int(cpus), at_once)


def test_trials_on_gpus_do_not_count_cpus_of_plain_nodes() -> None:
    cluster = cluster_of([Nodes(32, 0, 8), Nodes(4, 4, 1)], [])
    each, at_once = plan_trials(cluster, workers=1, cpu=2, gpu=0.5, batch_size=4, trials=100)
    assert (each.cpus, at_once) == (2, 2)
    each, at_once = plan_trials(cluster, workers=1, cpu=2, gpu=0.0, batch_size=4, trials=1000)
    assert at_once == 8 * 16 + 2
