"""`cluster/capacity.md` says of segmentation what its measured costs add up to, and the nodes have the CPUs for it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from support.programs import load_program

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def capacity() -> ModuleType:
    return load_program(ROOT / "benchmarks/capacity.py")


@pytest.fixture
def costs(capacity: ModuleType) -> dict[str, float]:
    return dict(json.loads(capacity.FILE.read_text())["costs"])


def test_the_document_follows_from_the_costs(capacity: ModuleType, costs: dict[str, float]) -> None:
    text = capacity.DOCUMENT.read_text()
    assert capacity.in_document(text, capacity.section(costs)) == text, "python benchmarks/capacity.py --tables"
    dearer = {**costs, "objects_s_a_Mpx": 10 * costs["objects_s_a_Mpx"]}
    assert capacity.in_document(text, capacity.section(dearer)) != text


def test_the_slides_of_the_plan(capacity: ModuleType) -> None:
    """A fifth of 20 Gpx is wanted; a window has more px than its core only by its halo."""
    work = capacity.workload()
    assert work.pixels == 1000 * 100_000 * 200_000
    assert 0.2 * work.pixels < work.core_pixels < 0.25 * work.pixels
    assert work.cores == work.shards  # a shard holds one window of this size
    assert work.window_pixels < work.cores * (capacity.CORE + 2 * capacity.HALO) ** 2


def test_the_bottleneck_is_the_busiest(capacity: ModuleType, costs: dict[str, float]) -> None:
    for gpu in capacity.GPUS:
        for row in capacity.plan_rows(costs, gpu):
            most = max(capacity.BUSY, key=lambda name: row[name])
            assert row["bottleneck"].startswith(most)
            assert row["in_all"] >= row[most]


@pytest.mark.parametrize("name", ["aws", "gcp", "kuberay"])
def test_the_nodes_have_the_cpus_of_the_plan(capacity: ModuleType, costs: dict[str, float], name: str) -> None:
    config = yaml.safe_load((ROOT / f"cluster/{name}.yaml").read_text())
    if name == "kuberay":
        groups = config["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        (group,) = (one for one in groups if one["groupName"] == "gpu")
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        cpus, gpus = int(limits["cpu"]), int(limits["nvidia.com/gpu"])
    else:
        resources = config["available_node_types"]["segment_spot"]["resources"]
        cpus, gpus = resources["CPU"], resources["GPU"]
        assert gpus == capacity.GPUS_A_NODE["L4"]
        assert cpus == capacity.CPUS_A_NODE["L4"]
    assert cpus / gpus >= capacity.planned_cpus(costs, "L4")
