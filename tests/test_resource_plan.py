"""Resources: never more than there is, GPUs by cost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from apacs_ray.distributed.resource_plan import Cluster, Nodes, TrainingPlan, cluster_of, plan_training
from apacs_ray.distributed.trial_plan import plan_trials
from apacs_ray.errors import ApacsError
from apacs_ray.models.registry import MEMBERS

COUNT = st.integers(1, 64)


def machine(cpus: float, gpus: float = 0) -> Cluster:
    return cluster_of([Nodes(cpus, gpus, 1)], [])


def used(plan: TrainingPlan) -> tuple[float, float]:
    """CPUs and GPUs asked for at one time."""
    cpus = [network.cpus * network.workers for network in plan.networks]
    gpus = [network.gpus * network.workers for network in plan.networks]
    return (sum(cpus), sum(gpus)) if plan.mode == "parallel" else (max(cpus), max(gpus))


@given(
    cpus=st.integers(1, 256),
    gpus=st.integers(0, 16),
    workers=st.integers(0, 4),
    batch=st.integers(1, 16),
    mode=st.sampled_from(["auto", "parallel", "together"]),
    names=st.sampled_from([MEMBERS, ("fusion",), ("fusion", "fusion_published"), ("fcn16", "fcn8")]),
)
@example(cpus=1, gpus=13, workers=0, batch=6, mode="parallel", names=MEMBERS)  # far more GPUs than CPUs
def test_a_plan_is_feasible(cpus: int, gpus: int, workers: int, batch: int, mode: Any, names: tuple[str, ...]) -> None:
    plan = plan_training(names, machine(cpus, gpus), workers=workers, batch_size=batch, mode=mode)
    assert [name for group, _ in plan.runs(names) for name in group] == list(names)
    asked_cpus, asked_gpus = used(plan)
    assert asked_cpus <= max(cpus, 0.01 * 16 * len(names)) + 1e-9
    assert asked_gpus <= gpus + 1e-9
    for network in plan.networks:
        assert 1 <= network.workers <= batch
        assert network.cpus > 0
        assert network.data_tasks >= 1
        assert network.gpus in (0.0, 1.0) or network.gpus < 1


@given(node=st.tuples(st.integers(1, 64), st.integers(1, 8)), count=st.integers(1, 4), batch=st.integers(1, 16))
def test_a_cheap_network_is_fed_by_what_those_beside_it_leave(node: tuple[int, int], count: int, batch: int) -> None:
    """FCN-32 on a fifth of a GPU takes more tiles a second than FCN-8 on the rest of it."""
    cpus, gpus = node
    plan = plan_training(MEMBERS, cluster_of([Nodes(cpus, gpus, count)], []), batch_size=batch)
    most, dear = max(1, int(cpus / gpus) - 1), plan.networks[-1]
    for network in plan.networks:
        assert min(3, most) <= network.data_tasks <= most
        assert network.data_tasks >= int(network.cpus) - 1
        together = [network, *([dear] * int((1 - network.gpus) / dear.gpus + 1e-6) if network.gpus < dear.gpus else [])]
        assert sum(one.data_tasks for one in together) <= most + 3 * (len(together) - 1)


def test_fcn32_beside_a_larger_network_has_three_tasks_of_twelve_cpus() -> None:
    plan = plan_training(MEMBERS, cluster_of([Nodes(48, 4, 2)], []), batch_size=4)
    assert [network.data_tasks for network in plan.networks] == [3, 8, 8]


def test_two_cpus_train_all_three_at_once() -> None:
    plan = plan_training(MEMBERS, machine(2))
    assert plan.mode == "parallel"
    assert [network.threads for network in plan.networks] == [1, 1, 1]
    assert "fcn8: 1 worker x 0.66 CPU (1 torch thread, 1 data task)" in plan.describe()


def test_one_cpu_trains_in_turn() -> None:
    assert plan_training(MEMBERS, machine(1)).mode == "in turn"


@pytest.mark.parametrize(
    ("gpus", "workers"),
    [(1, (1, 1, 1)), (2, (1, 1, 1)), (3, (1, 1, 1)), (4, (1, 2, 2)), (8, (1, 3, 3))],
)
def test_gpus_go_where_the_work_is(gpus: int, workers: tuple[int, ...]) -> None:
    plan = plan_training(MEMBERS, machine(8 * gpus, gpus), batch_size=8)
    assert tuple(network.workers for network in plan.networks) == workers
    assert used(plan)[1] <= gpus + 1e-9


@pytest.mark.parametrize(
    ("cluster", "mode"),
    [
        (machine(1), "together"),
        (machine(16, 1), "together"),
        (machine(2), "parallel"),
        (machine(32, 4), "parallel"),
    ],
)
def test_one_gpu_or_one_cpu_steps_the_members_together(cluster: Cluster, mode: str) -> None:
    plan = plan_training(MEMBERS, cluster, mode="auto")
    assert plan.mode == mode
    if mode == "together":
        ((names, network),) = plan.runs(MEMBERS)
        assert names == MEMBERS
        assert network.workers == 1
        assert network.threads == (1 if not cluster.gpus else 8)


@given(
    cpus=st.integers(1, 64),
    gpus=st.integers(0, 8),
    workers=st.integers(2, 6),
    cpu=st.sampled_from([0.25, 1.0, 4.0]),
    gpu=st.sampled_from([0.5, 1.0]),
    concurrency=st.integers(0, 5),
)
def test_trials_of_several_workers_never_wait_for_each_other(
    cpus: int, gpus: int, workers: int, cpu: float, gpu: float, concurrency: int
) -> None:
    cluster = machine(cpus, gpus)
    asked = {"workers": workers, "cpu": cpu, "gpu": gpu, "batch_size": 8, "trials": 20}
    if 0 < gpus * int(1 / gpu) < workers:
        with pytest.raises(ApacsError, match="GPUs"):
            plan_trials(cluster, **asked)
        return
    plan, trials = plan_trials(cluster, **asked, concurrency=concurrency)
    assert 1 <= trials <= (concurrency or 20)
    assert trials * plan.workers <= gpus * int(1 / gpu) or not gpus  # no worker has parts of two GPUs
    assert trials * (plan.workers * plan.cpus + 0.01) <= cpus


@pytest.mark.parametrize(
    ("nodes", "workers", "cpu", "gpu", "each", "at_once"),
    [
        ([Nodes(4, 0, 4)], 1, 8, 0, 4, 4),  # no node has 8 CPUs
        ([Nodes(2, 0, 4)], 2, 4, 0, 1.9, 2),  # nor 4, in two places
        ([Nodes(8, 0, 1), Nodes(2, 0, 1)], 1, 1, 0, 1, 10),
        ([Nodes(16, 2, 1)], 1, 1, 0.6, 8, 2),  # each GPU holds one
    ],
)
def test_a_trial_asks_for_no_more_than_a_node_has(
    nodes: list[Nodes], workers: int, cpu: float, gpu: float, each: float, at_once: int
) -> None:
    plan, trials = plan_trials(cluster_of(nodes, []), workers=workers, cpu=cpu, gpu=gpu, batch_size=8, trials=20)
    assert (plan.cpus, trials) == (pytest.approx(each), at_once)


def test_trials_whose_workers_find_no_gpu_are_refused() -> None:
    with pytest.raises(ApacsError, match=r"3 workers with 0\.6 GPU each"):
        plan_trials(machine(16, 2), workers=3, cpu=1, gpu=0.6, batch_size=8, trials=2)


@pytest.mark.parametrize(("gpus", "workers"), [(5, (1, 2, 2)), (8, (1, 4, 4)), (9, (1, 4, 4)), (64, (1, 4, 4))])
def test_no_gpu_is_spent_on_a_part_of_a_batch_that_waits(gpus: int, workers: tuple[int, ...]) -> None:
    """Of a batch of 4, three workers take two turns, as two do; four take one."""
    plan = plan_training(MEMBERS, machine(8 * gpus, gpus), batch_size=4)
    assert tuple(network.workers for network in plan.networks) == workers


def test_an_autoscaler_is_planned_with_before_its_nodes_are_there() -> None:
    head = Nodes(0, 0, 1)
    kinds = [Nodes(32, 0, 8), Nodes(48, 4, 2), Nodes(48, 4, 2)]  # the last two: spot, and on demand in its place
    cluster = cluster_of([head], kinds)
    assert cluster == Cluster(8 * 32 + 2 * 48, 8, 2, 48, 12, 8 * 32)
    assert cluster.tiling_cpus == 8 * 32  # no GPU node is started for tiles
    assert machine(48, 4).tiling_cpus == 48
    plan = plan_training(MEMBERS, cluster, batch_size=8)
    assert [network.gpus for network in plan.networks] == [1.0, 1.0, 1.0]
    assert all(network.threads * 4 <= 48 for network in plan.networks)  # four workers on a node
    assert cluster_of([head, Nodes(48, 4, 3)], kinds).gpus == 12
    assert cluster_of([Nodes(2, 0, 1)], []) == Cluster(2, 0, 1, 2, plain_cpus=2)
    assert cluster_of([head], []) == Cluster(1.0, 0, 1, 1.0)


@given(
    kinds=st.lists(st.builds(Nodes, COUNT, st.integers(0, 8), st.integers(1, 4)), min_size=1, max_size=3),
    workers=st.integers(0, 6),
    names=st.sampled_from([MEMBERS, ("fusion",)]),
)
@example(kinds=[Nodes(4, 0, 1), Nodes(7, 0, 2)], workers=4, names=("fusion",))  # 18 CPUs, but no 4 on 4 nodes
@example(kinds=[Nodes(8, 1, 1), Nodes(16, 4, 1)], workers=0, names=("fusion",))  # few CPUs a GPU on the larger node
@example(kinds=[Nodes(4, 1, 2)], workers=3, names=("fusion",))  # 2/3 of a GPU fits each once
def test_the_workers_of_a_network_find_their_places_on_real_nodes(
    kinds: list[Nodes], workers: int, names: tuple[str, ...]
) -> None:
    plan = plan_training(names, cluster_of(kinds, []), workers=workers, batch_size=8)
    groups = [plan.networks] if plan.mode == "parallel" else [[network] for network in plan.networks]
    for group in groups:
        nodes = [(node.cpus, [1.0] * int(node.gpus)) for node in kinds for _ in range(node.count)]
        cpus, gpus = [cpu for cpu, _ in nodes], [gpu for _, gpu in nodes]
        for network in sorted(group, key=lambda network: -network.gpus):
            for _ in range(network.workers):
                able = [number for number, cpu in enumerate(cpus) if cpu >= network.cpus - 1e-9]
                if not network.gpus:
                    cpus[able[0]] -= network.cpus
                    continue
                places = [(number, i) for number in able for i, free in enumerate(gpus[number]) if free >= network.gpus]
                number, index = places[0]
                cpus[number] -= network.cpus
                gpus[number][index] = round(gpus[number][index] - network.gpus, 6)
