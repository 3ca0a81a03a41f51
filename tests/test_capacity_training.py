"""`cluster/capacity.md` says of tiles, training and evaluation what their measured costs add up to."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.programs import load_program

from apacs_ray.models.registry import MEMBERS, NETWORKS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def capacity() -> ModuleType:
    return load_program(ROOT / "benchmarks/capacity_training.py")


@pytest.fixture
def costs(capacity: ModuleType) -> dict[str, Any]:
    return dict(capacity.read_costs())


def test_the_document_follows_from_the_costs(capacity: ModuleType, costs: dict[str, Any]) -> None:
    text = capacity.DOCUMENT.read_text()
    assert capacity.in_document(text, capacity.section(costs)) == text, (
        "python benchmarks/capacity_training.py --tables"
    )
    for name, value in costs.items():
        dearer = {key: 10 * one for key, one in value.items()} if isinstance(value, dict) else 10 * value
        assert capacity.in_document(text, capacity.section({**costs, name: dearer})) != text, name


def test_the_margin_of_a_tile_does_not_grow_with_it(capacity: ModuleType) -> None:
    small, large = capacity.tflops(1000), capacity.tflops(2000)
    for name in (*MEMBERS, "fusion"):
        assert round(1000 * small[name], 1) == NETWORKS[name].gflops
        assert 3.4 < large[name] / small[name] < 3.8
    assert round(sum(large[name] for name in MEMBERS), 1) == 8.3


def test_more_gpus_and_larger_batches_are_faster(capacity: ModuleType, costs: dict[str, Any]) -> None:
    for kind in capacity.KINDS:
        minutes = [capacity.epoch_minutes(costs, kind, gpus, batch) for gpus, batch in capacity.RUNS]
        four, forty, forty_wide, many, many_wide = minutes
        assert four > forty > forty_wide > many_wide
        assert many == forty  # a batch of 4 has no work for more
        predicted = [capacity.predict_minutes(costs, kind, gpus, "heatmaps")[0] for gpus in (4, 40, 400)]
        assert predicted[0] / predicted[2] == pytest.approx(100)
