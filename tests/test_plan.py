"""Resources: never more than there is, CPUs left for data, GPUs by cost."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from apacs_ray.models.spec import MEMBERS
from apacs_ray.plan import Cluster, TrainingPlan, plan_training


def used(plan: TrainingPlan) -> tuple[float, float]:
    """CPUs and GPUs asked for at one time."""
    cpus = [network.cpus * network.workers for network in plan.networks]
    gpus = [network.gpus * network.workers for network in plan.networks]
    return (sum(cpus), sum(gpus)) if plan.parallel else (max(cpus), max(gpus))


@given(
    cpus=st.integers(1, 256),
    gpus=st.integers(0, 16),
    workers=st.integers(0, 4),
    batch=st.integers(1, 16),
    names=st.sampled_from([MEMBERS, ("fusion",), ("fusion", "fusion_published"), ("fcn16", "fcn8")]),
)
@example(cpus=1, gpus=13, workers=0, batch=6, names=MEMBERS)  # far more GPUs than CPUs
def test_a_plan_is_feasible(cpus: int, gpus: int, workers: int, batch: int, names: tuple[str, ...]) -> None:
    plan = plan_training(names, Cluster(cpus, gpus, cpus), workers=workers, batch_size=batch)
    asked_cpus, asked_gpus = used(plan)
    assert asked_cpus <= cpus / 2 + 1e-9 or asked_cpus <= 0.01 * 16 * len(names)
    assert asked_gpus <= gpus + 1e-9
    for network in plan.networks:
        assert 1 <= network.workers <= batch
        assert network.cpus > 0
        assert network.data_tasks >= 1
        assert 0 < network.data_cpus <= 1
        assert network.gpus in (0.0, 1.0) or network.gpus < 1
    data = [network.data_cpus * network.workers for network in plan.networks]
    assert asked_cpus + (sum(data) if plan.parallel else max(data)) <= max(cpus, 1) + 0.2 * len(names) * max(1, workers)


def test_two_cpus_train_all_three_at_once_on_half_of_them() -> None:
    plan = plan_training(MEMBERS, Cluster(2, 0, 2))
    assert plan.parallel
    assert used(plan)[0] <= 1.0
    assert [network.threads for network in plan.networks] == [1, 1, 1]
    assert "fcn8: 1 worker x 0.33 CPU" in plan.describe()


def test_one_cpu_trains_in_turn() -> None:
    assert not plan_training(MEMBERS, Cluster(1, 0, 1)).parallel


@pytest.mark.parametrize(
    ("gpus", "workers"),
    [(1, (1, 1, 1)), (2, (1, 1, 1)), (3, (1, 1, 1)), (4, (1, 2, 2)), (8, (1, 3, 3))],
)
def test_gpus_go_where_the_work_is(gpus: int, workers: tuple[int, ...]) -> None:
    plan = plan_training(MEMBERS, Cluster(8 * gpus, gpus, 8), batch_size=8)
    assert tuple(network.workers for network in plan.networks) == workers
    assert used(plan)[1] <= gpus + 1e-9
