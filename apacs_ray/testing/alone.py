"""Stages in this process alone: what they hand to Ray is done at once, in order, by the functions that Ray would call.

Replaced is only what carries work to other processes: tasks over blocks, pools of actors, Ray Train's workers (by its
local mode), and the machines that Ray counts. Ray Tune has no such way: a sweep tries the middle of its space.

`without_ray` needs no Ray to be installed: networks train by the training worker, without what Ray Train makes of it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pyarrow as pa

from apacs_ray.config.sweep import Sweep
from apacs_ray.distributed import data, evaluation, heatmaps, session, tasks, train
from apacs_ray.distributed.ddp_worker import PROGRESS, keep_state, resume_newest
from apacs_ray.distributed.resource_plan import Cluster
from apacs_ray.distributed.session import RaySession, prepare_ray
from apacs_ray.distributed.tune import TrialResult
from apacs_ray.distributed.worker import NetworkTask, TrainingTask, WorkerHooks, train_worker
from apacs_ray.stages import train_networks, tune_fusion
from apacs_ray.training.dataset import in_memory
from apacs_ray.training.history import progress_metrics

ONE_CPU = Cluster(cpus=1.0, gpus=0.0, nodes=1, node_cpus=1.0, plain_cpus=1.0)


class AloneSession(RaySession):
    """The session of a run without Ray."""

    def start(self) -> None:
        """Do nothing: there is nothing to start."""

    def cluster(self) -> Cluster:
        """Return one CPU."""
        return ONE_CPU


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let stages do all their work in this process while the block runs."""
    prepare_ray()
    import ray.train.torch

    local = _local_trainer(ray.train.torch.TorchTrainer)
    with _replaced(*INSTEAD, (ray.train.torch, "TorchTrainer", local), (train, "POLL", 0.01)):
        yield


@contextlib.contextmanager
def without_ray() -> Iterator[None]:
    """Let stages work in this process while the block runs, on its GPU where it has one, without importing Ray."""
    with _replaced(*INSTEAD, (train_networks, "train", _train)):
        yield


@contextlib.contextmanager
def _replaced(*changes: tuple[object, str, object]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module, name, instead in changes:
            stack.enter_context(patch.object(module, name, instead))
        yield


def _train(
    given: Sequence[TrainingTask], *, parallel: bool, on_progress: Callable[[str, dict[str, Any]], None]
) -> None:
    """Train as `distributed.train.train` does, one task after the other; tiles stay decoded."""
    from apacs_ray.training.device import default_device, describe_device
    from apacs_ray.training.loop import Trainer
    from apacs_ray.training.ranks import Ranks
    from apacs_ray.training.state import snapshot

    device = default_device()

    def run(task: TrainingTask) -> None:
        def on_epoch(trainer: Trainer, network: NetworkTask) -> None:
            epochs = {"epochs": network.settings.epochs, "device": describe_device(device)}
            progress = {**progress_metrics(trainer.history), **epochs}
            task.store.write(f"{network.state}/{PROGRESS}", json.dumps(progress).encode())
            keep_state(task, network, snapshot(trainer.state()))
            on_progress(network.name, progress)

        hooks = WorkerHooks(
            wrap=lambda network: network,
            resume=lambda trainer, network: resume_newest(trainer, task.store, network.state),
            samples=lambda refs: in_memory(task.dataset, task.indices, refs),
            on_epoch=on_epoch,
            on_part=lambda trainer, network: None,
            interruption=lambda: None,
        )
        train_worker(task, hooks, device=device, ranks=Ranks())

    for task in given:
        run(task)


def _map_blocks(
    work: Callable[[pa.Table], pa.Table], blocks: Sequence[pa.Table], *, cpus: float = 1
) -> Iterator[dict[str, Any]]:
    for block in blocks:
        yield from work(block).to_pylist()


def _map_shards(
    work: Callable[[], Callable[[str], pa.Table]], paths: Sequence[str], plan: object
) -> Iterator[pa.Table]:
    actor = work()
    for path in paths:
        yield actor(path)


def _local_trainer(trainer: Callable[..., Any]) -> Callable[..., Any]:
    """Ray Train's trainer in its local mode, whose worker decodes for itself."""

    def local(work: Callable[..., Any], train_loop_config: dict[str, Any], **others: Any) -> Any:
        import ray.train

        task = train_loop_config["task"]
        others |= {"scaling_config": ray.train.ScalingConfig(num_workers=0), "torch_config": None}
        return trainer(work, train_loop_config={"task": replace(task, plan=replace(task.plan, data_tasks=0))}, **others)

    return local


def _sweep(task: object, plan: Sweep, cluster: Cluster, on_done: Callable[[int], None]) -> list[TrialResult]:
    setting = {name: drawn.values[0] for name, drawn in plan.space.items()}
    on_done(1)
    return [TrialResult("trial", setting, 0.5, plan.epochs, 1.0, None)]


INSTEAD: tuple[tuple[object, str, object], ...] = (
    (session, "RaySession", AloneSession),  # of commands
    (data, "map_blocks", _map_blocks),
    (tasks, "map_blocks", _map_blocks),
    (data, "joined_machines", lambda: 1),
    (heatmaps, "map_shards", _map_shards),
    (evaluation, "map_shards", _map_shards),
    (tune_fusion, "sweep", _sweep),
)
