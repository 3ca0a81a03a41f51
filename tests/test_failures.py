"""Training on real raylets while parts of them are killed: it ends as an undisturbed run does."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ray_cluster import RayCluster, kill_node
from runs import SMALL, read_json, run, start, wait_for
from safetensors.numpy import load_file

from apacs_ray.training.record import read_history

MEMBERS = ("fcn32", "fcn16", "fcn8")


@pytest.fixture
def untrained(undisturbed: Path, tmp_path: Path) -> Path:
    """The run as it is when its tiles are cut."""
    output = tmp_path / "untrained"
    shutil.copytree(undisturbed, output)
    for folder in ("members", "heatmaps", "fusion", "evaluation"):
        shutil.rmtree(output / folder)
    return output


def training_workers() -> list[int]:
    """Processes of Ray Train's workers, which name themselves in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::RayTrainWorker"):
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def first_epoch(output: Path) -> Callable[[], bool]:
    return lambda: any(output.glob("members/fcn8/.state-*/attempt-1/epoch_00000/state.json"))


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


def test_together_and_with_its_worker_killed_it_ends_the_same(undisturbed: Path, cells: Path, untrained: Path) -> None:
    options = [*SMALL, "--members.mode", "together"]
    before = set(training_workers())
    process = start("--data", str(cells), "--output", str(untrained), *options, script="train_members.py")
    wait_for(process, first_epoch(untrained))
    (worker,) = set(training_workers()) - before  # one, for all three networks
    os.kill(worker, signal.SIGKILL)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text[-3000:]
    assert "training together: fcn32 + fcn16 + fcn8" in text
    same_training(untrained, undisturbed, exactly=False)
    again = run("--data", str(cells), "--output", str(untrained), *SMALL, script="train_members.py")
    assert "train_members: unchanged" in again.text  # the mode is no part of the result


def test_a_killed_node_costs_an_epoch_at_most(undisturbed: Path, cells: Path, untrained: Path, tmp_path: Path) -> None:
    cluster = RayCluster(tmp_path, head_cpus=0)
    try:
        nodes = [cluster.add_node(cpus=2) for _ in range(2)]
        command = ["--data", str(cells), "--output", str(untrained), *SMALL]
        process = start(*command, script="train_members.py", env=cluster.joined)
        wait_for(process, first_epoch(untrained))
        kill_node(nodes[0])
        text, _ = process.communicate(timeout=400)
        assert process.returncode == 0, text[-3000:]
        same_training(untrained, undisturbed)
        states = read_json(untrained / "run.json")["stages"]
        assert states["train_members"]["state"] == "done"
    finally:
        cluster.stop()
