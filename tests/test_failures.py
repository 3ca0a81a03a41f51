"""Runs on real raylets while parts of them go: they end as undisturbed runs do. The breadth: `benchmarks/faults.py`."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.runs import SMALL, SWEPT, run, start
from support.segmentation import OneSlide, with_settings, write_ensemble
from support.slide_files import picture, write_tiff

from apacs_ray.outputs.slide_files import GEOJSON, MASK, OVERVIEW, PARQUET, SLIDE_JSON
from apacs_ray.storage import open_store
from apacs_ray.synthetic.slide import slide_specs
from apacs_ray.synthetic.write import write_smear
from apacs_ray.testing.cluster import Node, RayCluster, kill_node, listening, processes
from apacs_ray.testing.runs import SLOWLY, kill_when, read_growing, read_json, read_trials, wait_for
from apacs_ray.training.history import read_history

MEMBERS = ("fcn32", "fcn16", "fcn8")


def worker_of(nodes: list[Node], work: str = "ray::RayTrainWorker") -> tuple[int, Node] | None:
    """A process on these nodes that does this work (Ray Train's, if nothing is said), and its node."""
    for node in nodes:
        for pid, title in processes(node).items():
            if title.startswith(work):
                return pid, node
    return None


def same_training(output: Path, undisturbed: Path, *, exactly: bool = True) -> None:
    """Every epoch once, and the weights of the undisturbed run."""
    for name in MEMBERS:
        history = read_history((output / f"members/{name}/history.csv").read_text())
        assert [record.epoch for record in history] == [0, 1, 2]
        mine, theirs = (load_file(run / f"members/{name}/model.safetensors") for run in (output, undisturbed))
        for key, value in theirs.items():
            if exactly:
                assert np.array_equal(mine[key], value), key
            else:  # other numbers of threads add in another order
                np.testing.assert_allclose(mine[key], value, atol=1e-4)


def test_apart_and_with_a_worker_killed_they_end_as_together(undisturbed: Path, cells: Path, untrained: Path) -> None:
    options = [*SMALL, "--members.mode", "parallel"]
    process = start("--data", str(cells), "--output", str(untrained), *options, script="train_members.py")
    wait_for(process, lambda: any(untrained.glob("members/fcn8/.state-*/attempt-1/epoch_00000/state.json")))
    worker, _ = wait_for(process, lambda: worker_of([process]))
    assert listening(process) == {"127.0.0.1"}  # nobody outside this machine is heard
    os.kill(worker, signal.SIGKILL)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text[-3000:]
    assert "training at the same time: fcn32" in text
    same_training(untrained, undisturbed, exactly=False)
    again = run("--data", str(cells), "--output", str(untrained), *SMALL, script="train_members.py")
    assert "train_members: unchanged" in again.text  # the mode is no part of the result


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A cluster whose head does no work."""
    running = RayCluster(tmp_path_factory.mktemp("cluster"), head_cpus=0)
    yield running
    running.stop()


@pytest.fixture
def nodes(cluster: RayCluster) -> list[Node]:
    """Three nodes of the cluster, also when those of another test have gone."""
    left = [node for node in cluster.nodes if node.poll() is None]
    return [*left, *(cluster.add_node() for _ in range(3 - len(left)))]


def test_nodes_that_go_cost_little_and_change_nothing(
    undisturbed: Path, cells: Path, untrained: Path, cluster: RayCluster, nodes: list[Node]
) -> None:
    """Of three nodes one is drained with notice, the next is killed; only the second counts as a failure."""
    options = ["--data", str(cells), "--output", str(untrained), *SMALL, "--run.max_failures", "1"]
    often = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    process = start(*options, script="train_members.py", env={**cluster.joined, **often})
    _, drained = wait_for(process, lambda: worker_of(nodes))
    cluster.drain(drained, notice=120)
    state = "members/fcn8/.state-*"
    wait_for(process, lambda: any(untrained.glob(f"{state}/attempt-1/epoch_*_step_*/state.json")))
    nodes.remove(drained)
    _, killed = wait_for(process, lambda: worker_of(nodes))
    kill_node(drained)
    wait_for(process, lambda: any(untrained.glob(f"{state}/attempt-2/epoch_00000/state.json")))
    kill_node(killed)
    text, _ = process.communicate(timeout=400)
    assert process.returncode == 0, text[-3000:]
    assert "a node is to be taken away" in text
    same_training(untrained, undisturbed)


def test_segmentation_loses_a_worker_and_a_node(tmp_path: Path, cluster: RayCluster, nodes: list[Node]) -> None:
    """And ends with the bytes of one process."""
    model, slides, output = write_ensemble(tmp_path / "model"), tmp_path / "slides", tmp_path / "out"
    slides.mkdir()
    for number in range(16):
        write_tiff(slides / f"{number:02d}.tif", picture(500, 420, seed=number))
    how = ["--segment.core", "128", "--segment.use", "fcn8", "--segment.tissue", "false"]
    where = ["--model", model.root, "--slides", str(slides), "--output", str(output)]
    process = start(*where, *how, script="segment.py", env=cluster.joined)

    def busy(parts: int) -> tuple[int, Node]:
        """Where networks run when so many slides have their parts, or had them."""
        made = partial(output.glob, "*/.parts-*/cores-*.parquet")
        networks = "ray::MapWorker(MapBatches(Worker))"
        return wait_for(process, lambda: worker_of(nodes, networks) if len(list(made())) >= parts else None)

    os.kill(busy(1)[0], signal.SIGKILL)
    _, node = busy(3)
    assert len(list(output.glob(f"*/{SLIDE_JSON}"))) < 16
    nodes.remove(node)
    kill_node(node)
    text, _ = process.communicate(timeout=400)
    assert process.returncode == 0, text[-3000:]
    assert "Traceback" not in text
    for path in sorted(slides.iterdir()):
        alone = OneSlide(path, model, tmp_path / "alone", with_settings(core=128, use="fcn8"), cores_a_shard=78).run()
        for name in (MASK, GEOJSON, PARQUET, OVERVIEW):
            assert (output / path.stem / name).read_bytes() == (alone / name).read_bytes(), f"{path.stem} {name}"


def test_every_stage_after_the_members_loses_a_node(
    swept: Path, cells: Path, sweep: Path, tmp_path: Path, cluster: RayCluster, nodes: list[Node]
) -> None:
    """Heatmaps: a node killed. Sweep: Ctrl-C, and when it goes on, a node drained, of which its trial has notice.
    Fusion: a node killed, the one failure that counts, and none is allowed. Evaluation: a node killed.
    """
    output = tmp_path / "run"
    shutil.copytree(swept, output)
    for folder in ("heatmaps", "tune", "fusion", "evaluation"):
        shutil.rmtree(output / folder)
    options = ["--data", str(cells), "--output", str(output), *SMALL, "--run.max_failures", "0"]
    go = partial(start, *options, *SWEPT, str(sweep), env={**cluster.joined, **SLOWLY})
    process = go()

    def busy(pattern: str, work: str) -> tuple[int, Node]:
        """Where a stage works when it has stored something."""
        return wait_for(process, lambda: worker_of(nodes, work) if any(output.glob(pattern)) else None)

    def lose(node: Node) -> None:
        nodes.remove(node)
        kill_node(node)

    predicting = "ray::MapWorker(MapBatches(Worker)).submit"
    lose(busy("heatmaps/split=*/*.parquet", predicting)[1])
    stopped = kill_when(process, lambda: any(output.glob("tune/.state-*/sweep/*/result.json")), signal.SIGINT)
    assert stopped.status == 130, stopped.summary
    assert not (output / "tune/_committed.json").exists()
    states = partial(output.glob, "tune/.state-*/sweep/*/checkpoint_*/state.json")
    before = set(states())
    process = go()
    trial = "ray::ImplicitFunc.train"

    def at_work() -> tuple[int, Node] | None:
        """Where a trial works when each has told of an epoch since: one that only starts would have no notice."""
        told = {path.parents[1] for path in states() if path not in before}
        running = sum(title.startswith(trial) for node in nodes for title in processes(node).values())
        return worker_of(nodes, trial) if running and len(told) >= running else None

    _, drained = wait_for(process, at_work)
    cluster.drain(drained, notice=120)
    wait_for(process, lambda: any(read_growing(state).get("part") for state in states()))
    nodes.append(cluster.add_node())
    lose(drained)
    lose(busy("fusion/.state-*/attempt-1/epoch_00000/state.json", "ray::RayTrainWorker")[1])
    text, _ = process.communicate(timeout=400)
    assert process.returncode == 1, text[-3000:]
    assert "lost its worker or node; goes on from its last checkpoint" in text
    assert "fusion: training stopped: " in text
    assert "Traceback" not in text
    nodes.append(cluster.add_node())
    process = go()
    lose(busy("fusion/_committed.json", predicting)[1])
    text, _ = process.communicate(timeout=400)
    assert process.returncode == 0, text[-3000:]
    assert "tune_fusion: unchanged" in text
    same = ["heatmaps/split=*/*.parquet", "tune/best.yaml", "fusion/model.safetensors", "evaluation/metrics.json"]
    for path in [path for pattern in same for path in swept.glob(pattern)]:
        assert (output / path.relative_to(swept)).read_bytes() == path.read_bytes(), path
    assert read_trials(output) == read_trials(swept)
    history = read_history((output / "fusion/history.csv").read_text())
    assert [record.epoch for record in history] == [-1, 0, 1]


def test_ingest_outlives_its_nodes_their_caches_and_the_head(s3: str, tmp_path: Path) -> None:
    """The only worker node is killed, its cache with it; a second start is refused; then the head and the driver go."""
    for number, spec in enumerate(slide_specs(5, 768, 512, train=1, test=1)):
        write_smear(open_store(f"{s3}/slides"), spec, number)
    cache = tmp_path / "cache"
    options = ["--data", f"{s3}/slides", "--data.cache", str(cache), "--tiles.size", "64", "--tiles.shard", "4"]
    plain, output = tmp_path / "plain", tmp_path / "run"
    assert run(*options, "--output", str(plain), script="ingest.py").status == 0
    shutil.rmtree(cache)
    command = [*options, "--output", str(output)]
    shards = partial(output.glob, "tiles/split=*/*.parquet")
    clusters = []
    try:
        clusters.append(RayCluster(tmp_path, head_cpus=0))
        node = clusters[0].add_node()
        process = start(*command, script="ingest.py", env=clusters[0].joined)
        wait_for(process, lambda: any(shards()))
        kill_node(node)
        shutil.rmtree(cache)
        second = run(*command, script="ingest.py", env=clusters[0].joined)
        assert second.status == 1
        assert second.text.splitlines()[-1].startswith(f"error: {output}: held by process {process.pid}")
        done = len(list(shards()))
        clusters[0].add_node()
        wait_for(process, lambda: len(list(shards())) > done + 4)
        assert any(cache.iterdir())
        kill_node(clusters[0].head)
        process.kill()  # it runs on the head
        process.communicate()
        clusters.append(RayCluster(tmp_path))
        again = run(*command, script="ingest.py", env=clusters[1].joined)
        assert again.status == 0, again.summary
    finally:
        for cluster in clusters:
            cluster.stop()
    assert len(list(shards())) > done + 4
    for path in [*plain.glob("tiles/split=*/*.parquet"), *plain.glob("manifest/*/*.parquet")]:
        assert (output / path.relative_to(plain)).read_bytes() == path.read_bytes()
    states = [read_json(run / "run.json")["stages"]["ingest"] for run in (plain, output)]
    assert states[0]["rows_out"] == states[1]["rows_out"]
