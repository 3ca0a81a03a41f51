"""What a DDP worker of Ray Train does: the training worker, with checkpoints and metrics that go to the run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apacs_ray.distributed.interruptions import WorkerInterruptions
from apacs_ray.distributed.ray_internals import nodes_are_simulated
from apacs_ray.distributed.training_data import ray_samples
from apacs_ray.distributed.worker import NetworkTask, TrainingTask, WorkerHooks, threads_ahead, train_worker
from apacs_ray.errors import ApacsError, StoreTroubleError, TrainingError, gpu_too_small
from apacs_ray.storage import Store
from apacs_ray.training.checkpoints import complete_checkpoints, fetch, keep_checkpoint
from apacs_ray.training.dataset import one_by_one
from apacs_ray.training.history import progress_metrics, unit_metrics
from apacs_ray.training.tensorboard import write_curves

if TYPE_CHECKING:
    import torch
    from torch import nn

    from apacs_ray.training.batch import Sample
    from apacs_ray.training.loop import Trainer
    from apacs_ray.training.sampler import SampleRef
    from apacs_ray.training.state import Snapshot

PROGRESS = "progress.json"  # what rank 0 says after an epoch
ERROR = "error.txt"  # why training cannot go on


def train_loop(config: dict[str, Any]) -> bool | None:
    """Train as one DDP worker on `config["task"]`, a `TrainingTask`.

    Returns:
        Whether training came to its end; None when it cannot, and `ERROR` in its state says why.

    Raises:
        StoreTroubleError: Another worker, later, may have better luck.
        ApacsError: One of several workers cannot go on; Ray ends the others, which wait for it.
        OutOfMemoryError: Likewise.
    """
    import ray.train
    import ray.train.torch
    import torch

    from apacs_ray.training.device import describe_arithmetic, describe_device
    from apacs_ray.training.ranks import Ranks
    from apacs_ray.training.writer import CheckpointWriter

    task: TrainingTask = config["task"]
    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size())
    device = _device(task.plan.gpus)

    def wrap(network: nn.Module) -> nn.Module:
        # gradients live in the buffers in which they travel: 537 MB less, and no copy
        views = {"gradient_as_bucket_view": True}
        model: nn.Module = ray.train.torch.prepare_model(network, move_to_device=False, parallel_strategy_kwargs=views)
        return model

    def samples(refs: Iterator[SampleRef]) -> Iterator[Sample]:
        if task.plan.data_tasks:
            return ray_samples(task.dataset, task.indices, refs, task.plan, task.source)
        return one_by_one(task.dataset, task.indices, refs, threads_ahead(task.plan, device))

    def write(trainer: Trainer, network: NetworkTask, then: Callable[[], None] = lambda: None) -> None:
        def keep(state: Snapshot) -> None:
            then()  # before the checkpoint, with which the epoch counts: else a kill between the two would lose it
            keep_state(task, network, state)

        if ranks.rank == 0:
            writer.write(network.name, trainer.state(), keep)

    def describe(network: NetworkTask) -> str:
        return f"{describe_device(device)}, {describe_arithmetic(network.settings.precision, device)}"

    def on_epoch(trainer: Trainer, network: NetworkTask) -> None:
        history = trainer.history
        metrics = progress_metrics(history)

        def tell() -> None:
            progress = {**metrics, "epochs": network.settings.epochs, "device": describe(network)}
            task.store.write(f"{network.state}/{PROGRESS}", json.dumps(progress).encode())
            write_curves(task.store, network.curves, history, network.setting)

        write(trainer, network, tell)
        interruptions.kept()
        ray.train.report({"network": network.name, **metrics, **unit_metrics(trainer.val_units)})

    interruptions = WorkerInterruptions(ranks, device, task.checkpoint_every)
    hooks = WorkerHooks(
        wrap=wrap,
        resume=lambda trainer, network: resume_newest(trainer, task.store, network.state),
        samples=samples,
        on_epoch=on_epoch,
        on_part=write,
        interruption=interruptions,
    )
    try:
        with CheckpointWriter() as writer:
            return train_worker(task, hooks, device=device, ranks=ranks)
    except StoreTroubleError:
        raise
    except (ApacsError, torch.OutOfMemoryError) as error:
        task.store.write(f"{task.state}/{ERROR}", _explain(error, task).encode())
        if ranks.world > 1 and not isinstance(error, TrainingError):
            raise  # the others wait for this worker, and Ray ends them only when it fails
        return None  # trying again would end the same way


def _explain(error: Exception, task: TrainingTask) -> str:
    """For a person: what ended training, and what to do."""
    if isinstance(error, ApacsError):
        return str(error)
    return gpu_too_small(error, "fusion" if task.networks[0].spec.kind == "fusion" else "members")


def _device(gpus: float) -> torch.device:
    """This worker's device. Raises ApacsError when it was given a GPU that torch cannot use."""
    import ray.train.torch
    import torch

    if gpus and not torch.cuda.is_available():
        if nodes_are_simulated():
            return torch.device("cpu")
        node = ray.util.get_node_ip_address()
        raise ApacsError(
            f"node {node} promised a GPU, but torch finds none there; look at its driver (python -m apacs_ray doctor)"
        )
    return ray.train.torch.get_device()


def keep_state(task: TrainingTask, network: NetworkTask, state: Snapshot) -> None:
    """Keep a state of a network as a checkpoint in the run."""
    from apacs_ray.training.state import save_state

    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder), state)
        keep_checkpoint(task.store, network.state, task.attempt, Path(folder), network.settings.select)


def resume_newest(trainer: Trainer, store: Store, state: str) -> None:
    """Go on from the newest checkpoint that is whole; a damaged one is passed over."""
    for checkpoint in reversed(complete_checkpoints(store, state)):
        with tempfile.TemporaryDirectory() as folder:
            fetch(store, checkpoint, Path(folder))
            try:
                trainer.resume(Path(folder))
                return
            except ApacsError:
                continue
