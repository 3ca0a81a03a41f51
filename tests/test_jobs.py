"""Runs submitted as Ray jobs: stopped and resumed, watched by Prometheus, on nodes that an autoscaler starts."""

from __future__ import annotations

import fcntl
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.runs import SMALL

from apacs_ray.testing.cluster import DEFAULT_PORT, RayCluster, processes
from apacs_ray.testing.jobs import Job
from apacs_ray.testing.runs import SLOWLY, TIMEOUT, read_json

ROOT = Path(__file__).resolve().parent.parent


def measured(cluster: RayCluster) -> dict[str, float]:
    """Our metrics on the head's endpoint, as Prometheus reads them: name and tags that are ours -> value."""
    text = urllib.request.urlopen(cluster.metrics).read().decode()
    found = {}
    for line in text.splitlines():
        if line.startswith("ray_apacs_ray_"):
            name, _, rest = line.partition("{")
            tags = [tag for tag in rest.partition("}")[0].split(",") if tag.startswith(("stage=", "what="))]
            found[f"{name}{{{','.join(sorted(tags))}}}"] = float(line.rpartition(" ")[2])
    return found


def test_a_job_is_stopped_and_goes_on_when_submitted_again(
    undisturbed: Path, cells: Path, untrained: Path, tmp_path: Path
) -> None:
    cluster = RayCluster(tmp_path)
    options = ["--data", str(cells), "--output", str(untrained), *SMALL]
    try:
        job = Job(cluster, "pipelines/full.py", *options, env=SLOWLY)
        job.until(lambda: any(untrained.glob("members/fcn8/.state-*/attempt-1/epoch_00000/state.json")))
        wanted = {
            'ray_apacs_ray_stage_running{stage="train_members"}',
            'ray_apacs_ray_rows_total{stage="train_members",what="fcn8"}',
        }
        seen = job.until(lambda: found if wanted <= (found := measured(cluster)).keys() else None)
        assert seen['ray_apacs_ray_stage_running{stage="train_members"}'] == 1
        assert seen['ray_apacs_ray_rows_total{stage="train_members",what="fcn8"}'] > 0
        job.stop()
        assert job.end() == "STOPPED"
        assert "the same command goes on from here" in job.logs()
        assert not (untrained / "run.lock").exists()
        assert not [title for title in processes(cluster.head).values() if title.startswith("ray::RayTrainWorker")]
        assert not (untrained / "members/_committed.json").exists()
        again = Job(cluster, "pipelines/train_members.py", *options)
        nowhere = str(tmp_path / "nowhere")
        missing = Job(cluster, "pipelines/full.py", "--data", nowhere, "--output", str(tmp_path / "none"))
        assert missing.end() == "FAILED"
        assert nowhere in missing.logs()
        assert again.end() == "SUCCEEDED", again.logs()[-3000:]
        assert "ingest: starts" not in again.logs()
    finally:
        cluster.stop()
    for path in undisturbed.glob("members/*/model.safetensors"):
        assert (untrained / path.relative_to(undisturbed)).read_bytes() == path.read_bytes()


@pytest.fixture
def default_port() -> Iterator[None]:
    """Ray's default port, for this test alone: nodes that the fake provider starts dial it."""
    with open(f"/tmp/apacs_ray-port-{DEFAULT_PORT}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("0.0.0.0", DEFAULT_PORT))
        except OSError:
            pytest.skip(f"port {DEFAULT_PORT} is taken, which fake nodes need")
        yield


@pytest.mark.usefixtures("default_port")
def test_nodes_come_for_a_stage_and_go(undisturbed: Path, cells: Path, tmp_path: Path) -> None:
    """CPU nodes for tiling, a GPU node (a number: nothing trains faster on it) for training, and none at the end.

    The published fusion is trained as well, so that two networks want the one GPU.
    """
    config = yaml.safe_load((ROOT / "cluster/local.yaml").read_text()) | {"idle_timeout_minutes": 0.05}
    given = tmp_path / "local.yaml"
    given.write_text(yaml.safe_dump(config))
    output = tmp_path / "run"
    cluster = RayCluster(tmp_path, head_cpus=0, autoscaling=given)

    options = ["--data", str(cells), "--output", str(output), *SMALL, "--fusion.compare", "true"]

    def nodes() -> list[str]:
        """`CPU` or `GPU` for each node beside the head."""
        raylets = [title for title in processes(cluster.head).values() if "/raylet " in title]
        return ["GPU" if ",GPU,1" in title else "CPU" for title in raylets if ",CPU,1," in title]

    try:
        assert nodes() == []
        job = Job(cluster, "pipelines/full.py", *options)
        seen: set[str] = set()

        def cut() -> bool:
            there = nodes()
            ended = (output / "tiles/_committed.json").exists()
            seen.update(() if ended else there)  # what was there while tiles were cut
            return ended

        job.until(cut)
        assert seen == {"CPU"}
        job.until(lambda: any(output.glob("members/fcn8/.state-*/attempt-1/epoch_00000/state.json")))
        assert "GPU" in nodes()
        assert job.end() == "SUCCEEDED", job.logs()[-3000:]
        assert "training together: fcn32 + fcn16 + fcn8: 1 worker x 1 GPU" in job.logs()
        listed = cluster.ask("api/v0/tasks?limit=10000")["data"]["result"]["result"]
        tasks = {task["name"] for task in listed if task["type"] == "NORMAL_TASK"}
        assert "MapBatches(checked)" in tasks
        # none of Ray's own, for which the autoscaler starts nodes, too
        assert not {name for name in tasks if "checked" not in name and "MapBatches" not in name}
        deadline = time.monotonic() + TIMEOUT
        while nodes():  # the job has ended, and they go when they have been idle for a while
            assert time.monotonic() < deadline, nodes()
            time.sleep(0.2)
    finally:
        cluster.stop()
    stages = [read_json(run / "run.json")["stages"] for run in (undisturbed, output)]
    counts = [{name: (stage["rows_in"], stage["rows_out"]) for name, stage in run.items()} for run in stages]
    assert counts[1] == counts[0] | {"train_fusion": (2, 2)}
    metrics = [read_json(run / "evaluation/metrics.json").keys() for run in (undisturbed, output)]
    assert metrics[1] == metrics[0] | {"fusion_published"}
