"""Training runs on Ray Train: one `TorchTrainer` a network, several at the same time.

Training state lives in the run under its fingerprint. Each start is an attempt of its own for Ray; where training goes
on is decided by our own checkpoints (complete by size and hash), so a snapshot that a kill cut in half does not matter.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apacs_ray.adapters.feed import ray_samples
from apacs_ray.checkpoints import attempts, complete_checkpoints, fetch
from apacs_ray.data.shards import TileIndex
from apacs_ray.errors import ApacsError
from apacs_ray.models.spec import ModelSpec
from apacs_ray.plan import NetworkPlan, TrainingPlan
from apacs_ray.run import require_source
from apacs_ray.storage import Store
from apacs_ray.training.config import TrainConfig
from apacs_ray.training.feed import Feed

if TYPE_CHECKING:
    from apacs_ray.training.loop import Trainer

PROGRESS = "progress.json"
ERROR = "error.txt"
POLL = 1.0  # s between looks at the progress of runs


@dataclass(frozen=True)
class NetworkTask:
    """Everything a training worker needs. `spec` builds the network, `state` is its folder in the run."""

    name: str
    spec: ModelSpec
    config: TrainConfig
    feed: Feed
    indices: dict[str, TileIndex]
    state: str
    plan: NetworkPlan
    max_failures: int
    source: str
    start: str | None = None  # safetensors to begin with

    @property
    def store(self) -> Store:
        return self.feed.store


def train(tasks: Sequence[NetworkTask], plan: TrainingPlan, on_progress: Callable[[str, dict[str, Any]], None]) -> None:
    """Train every network to its end, at the same time where the plan says so. Raises ApacsError naming the network."""
    groups = [list(tasks)] if plan.parallel else [[task] for task in tasks]
    for group in groups:
        errors: dict[str, BaseException] = {}
        threads = [threading.Thread(target=_fit, args=(task, errors), daemon=True) for task in group]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(POLL)  # the main thread stays here: only it hears Ctrl-C
            for task in group:
                if (now := read_progress(task.store, task.state)) is not None:
                    on_progress(task.name, now)
        for name, error in errors.items():
            raise ApacsError(f"{name}: training stopped: {_cause(error)}") from error


def read_progress(store: Store, state: str) -> dict[str, Any] | None:
    """What rank 0 said after its last epoch: epoch, epochs, val_dice, device. None before the first."""
    try:
        now: dict[str, Any] = json.loads(store.read(f"{state}/{PROGRESS}"))
    except FileNotFoundError:
        return None
    return now


def _fit(task: NetworkTask, errors: dict[str, BaseException]) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    store = task.store.child(task.state)
    attempt = 1 + max(attempts(store, ""), default=0)
    plan = task.plan
    local = {} if store.is_local else {"storage_filesystem": store.filesystem}
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={"task": task},
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.workers,
            use_gpu=plan.gpus > 0,
            resources_per_worker={"CPU": plan.cpus, **({"GPU": plan.gpus} if plan.gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name=f"attempt-{attempt}",
            storage_path=store.full_path(),
            failure_config=ray.train.FailureConfig(max_failures=task.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="score", checkpoint_score_order="max"
            ),
            **local,
        ),
    )
    store.delete(ERROR)
    try:
        trainer.fit()
        if store.version(ERROR) is not None:
            errors[task.name] = ApacsError(store.read(ERROR).decode())
    except BaseException as error:  # carried to the main thread, which raises it  # noqa: BLE001
        errors[task.name] = error


def _cause(error: BaseException) -> str:
    """The innermost message of a failure that travelled through Ray."""
    failures = list(getattr(error, "worker_failures", {}).values())
    inner: BaseException | None = failures[0] if failures else error
    while inner is not None and (inner.__cause__ or getattr(inner, "cause", None)) is not None:
        inner = getattr(inner, "cause", None) or inner.__cause__
    lines = [line for line in str(inner).strip().splitlines() if line.strip()]
    return lines[-1] if lines else repr(inner)


def _train_loop(config: dict[str, Any]) -> None:
    """One DDP worker."""
    import ray.train
    import ray.train.torch
    import torch
    import torch.distributed as dist

    from apacs_ray.models.weights import build, load_model
    from apacs_ray.training.loop import Trainer, describe_device
    from apacs_ray.training.order import schedule
    from apacs_ray.training.record import EpochRecord, score
    from apacs_ray.training.state import TrainState, save_state

    task: NetworkTask = config["task"]
    require_source(task.source)
    torch.set_num_threads(task.plan.threads)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.manual_seed(task.config.seed)
    device = ray.train.torch.get_device()
    device_name = describe_device(device)

    def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
        if world > 1:
            dist.all_reduce(tensor)
        return tensor

    # laid out before DDP wraps it: a layout changed afterwards gives wrong gradients
    model = build(task.spec) if task.start is None else load_model(task.store.read(task.start), task.spec)
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = ray.train.torch.prepare_model(model, move_to_device=False)
    trainer = Trainer(model, task.config, device=device, rank=rank, world=world, all_reduce=all_reduce)
    _resume(trainer, task)
    train_index = task.indices["train"]
    refs = schedule(
        train_index.groups(),
        len(task.indices["val"]),
        epochs=range(trainer.next_epoch, task.config.epochs),
        batch_size=task.config.batch_size,
        rank=rank,
        world=world,
        seed=task.config.seed,
    )

    def on_epoch(record: EpochRecord, state: TrainState) -> None:
        metrics = {"epoch": record.epoch, "val_dice": record.val_dice, "score": score(record)}
        if rank > 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            save_state(Path(folder), state)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=f"epoch_{record.epoch:05d}")
        progress = {**metrics, "epochs": task.config.epochs, "device": device_name}
        task.store.write(f"{task.state}/{PROGRESS}", json.dumps(progress).encode())

    steps = -(-len(train_index) // task.config.batch_size)
    try:
        trainer.run(ray_samples(task.feed, task.indices, refs, task.plan, task.source), steps, on_epoch)
    except ApacsError as error:  # trying again would end the same way, so it is told and not retried
        task.store.write(f"{task.state}/{ERROR}", str(error).encode())
    except torch.OutOfMemoryError as error:
        section = "fusion" if task.spec.kind == "fusion" else "members"
        message = f"the GPU's memory is too small: raise {section}.accumulate, or lower {section}.batch_size or .crop"
        task.store.write(f"{task.state}/{ERROR}", f"{message} ({str(error).splitlines()[0][:200]})".encode())


def _resume(trainer: Trainer, task: NetworkTask) -> None:
    """Go on from the newest checkpoint that is whole; a damaged one is passed over."""
    for checkpoint in reversed(complete_checkpoints(task.store, task.state)):
        with tempfile.TemporaryDirectory() as folder:
            fetch(task.store, checkpoint, Path(folder))
            try:
                trainer.resume(Path(folder))
                return
            except ApacsError:
                continue
