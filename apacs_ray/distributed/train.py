"""Training runs on Ray Train: a `TorchTrainer` for each network, several at the same time, or one for all of them.

Training state lives in the run under its fingerprint. Each start is an attempt of its own for Ray, which keeps no
checkpoints: ours (`training.checkpoints`, complete by size and hash) say where training goes on, so that a snapshot
of Ray's that a kill cut in half does not matter, and each of several networks keeps its own best.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apacs_ray.console import say
from apacs_ray.data.shards import TileIndex
from apacs_ray.distributed.credentials import ray_filesystem
from apacs_ray.distributed.preemption import WorkersNotice
from apacs_ray.distributed.resource_plan import NetworkPlan
from apacs_ray.distributed.session import KEEP_MEMORY
from apacs_ray.distributed.training_data import ray_samples
from apacs_ray.errors import ApacsError, StoreTroubleError, TrainingError, gpu_too_small
from apacs_ray.models.spec import ModelSpec
from apacs_ray.runs.provenance import require_source
from apacs_ray.storage import Store
from apacs_ray.training.checkpoints import attempts, complete_checkpoints, fetch, keep_checkpoint
from apacs_ray.training.config import TrainConfig
from apacs_ray.training.dataset import Feed, one_by_one
from apacs_ray.training.tensorboard import write_curves

if TYPE_CHECKING:
    import torch

    from apacs_ray.training.loop import Trainer

PROGRESS = "progress.json"
ERROR = "error.txt"
POLL = 1.0  # s between looks at the progress of runs
POLL_STORE = 10.0  # s where each look is a request to an object store


@dataclass(frozen=True)
class NetworkTask:
    """One network to train. `spec` builds it, `state` is the folder of its checkpoints, `curves` the name of these."""

    name: str
    spec: ModelSpec
    config: TrainConfig
    state: str
    curves: str
    start: str | None = None  # safetensors to begin with
    setting: Mapping[str, Any] | None = None  # of a trial, to be shown beside its curves


@dataclass(frozen=True)
class TrainingTask:
    """Everything the workers of one `TorchTrainer` need: the networks that learn from one stream of samples."""

    networks: tuple[NetworkTask, ...]
    feed: Feed
    indices: dict[str, TileIndex]
    plan: NetworkPlan
    max_failures: int
    source: str
    attempt: int = 0

    @property
    def store(self) -> Store:
        return self.feed.store

    @property
    def state(self) -> str:
        """The folder of Ray's own state and of what workers tell the driver."""
        return self.networks[0].state

    @property
    def name(self) -> str:
        return ", ".join(network.name for network in self.networks)


def train(tasks: Sequence[TrainingTask], *, parallel: bool, on_progress: Callable[[str, dict[str, Any]], None]) -> None:
    """Train every network to its end, tasks at the same time or one after the other. Raises ApacsError naming it."""
    for group in [list(tasks)] if parallel else [[task] for task in tasks]:
        errors: dict[str, BaseException] = {}
        threads = [threading.Thread(target=_fit, args=(task, errors), daemon=True) for task in group]
        for thread in threads:
            thread.start()
        looked = time.monotonic()
        told: set[str] = set()
        while any(thread.is_alive() for thread in threads):
            time.sleep(POLL)  # the main thread stays here: only it hears Ctrl-C
            for name in errors.keys() - told:
                told.add(name)
                say(f"{name}: training stopped: {_cause(errors[name])}; what trains beside it goes on to its end")
            if not group[0].store.is_local and time.monotonic() - looked < POLL_STORE:
                continue
            looked = time.monotonic()
            for task in group:
                for network in task.networks:
                    with contextlib.suppress(StoreTroubleError):  # who only looks neither waits nor ends for it
                        if (now := read_progress(task.store.with_timeout(0), network.state)) is not None:
                            on_progress(network.name, now)
        for name, error in errors.items():
            raise ApacsError(f"{name}: training stopped: {_cause(error)}") from error


def read_progress(store: Store, state: str) -> dict[str, Any] | None:
    """What rank 0 said after its last epoch: epoch, epochs, val_dice, device. None before the first."""
    try:
        now: dict[str, Any] = json.loads(store.read(f"{state}/{PROGRESS}"))
    except FileNotFoundError:
        return None
    return now


def _fit(task: TrainingTask, errors: dict[str, BaseException]) -> None:
    try:
        fit(task)
    except BaseException as error:  # carried to the main thread, which raises it  # noqa: BLE001
        errors[task.name] = error


def fit(task: TrainingTask, callbacks: Sequence[Any] = ()) -> None:
    """Train from the newest checkpoints to the end. Raises ApacsError, or what ended Ray's run.

    Workers that hear that a node of theirs is to be taken away keep a checkpoint and leave; the next run of Ray Train
    goes on from there, on nodes that stay. This counts as no failure, and nothing is done again.
    """
    while not _fit_once(task, callbacks):
        say(f"{task.name}: a node is to be taken away; goes on elsewhere")


def _fit_once(task: TrainingTask, callbacks: Sequence[Any]) -> bool:
    """One run of Ray Train; whether it came to the end."""
    import ray.train
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig, TorchTrainer

    class _Alone(TorchConfig):  # type: ignore[misc]
        """One worker has nobody to meet, so torch need not listen for others, which it does on every address."""

        backend_cls = Backend

    store = task.store.child(task.state)
    task = replace(task, attempt=1 + max(attempts(store, ""), default=0))
    plan = task.plan
    torch_config = None
    if plan.workers == 1:
        torch_config = _Alone()
    elif 0 < plan.gpus < 1:
        torch_config = TorchConfig(backend="gloo")  # NCCL refuses two ranks on one GPU
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={"task": task},
        torch_config=torch_config,
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.workers,
            use_gpu=plan.gpus > 0,
            resources_per_worker={"CPU": plan.cpus, **({"GPU": plan.gpus} if plan.gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name=f"attempt-{task.attempt}",
            storage_path=store.full_path(),
            failure_config=ray.train.FailureConfig(max_failures=task.max_failures, max_preemption_failures=-1),
            worker_runtime_env=KEEP_MEMORY,
            callbacks=list(callbacks),
            storage_filesystem=ray_filesystem(store),
        ),
    )
    store.delete(ERROR)
    try:
        finished = trainer.fit().return_value
    except Exception as error:
        if store.version(ERROR) is not None:
            raise ApacsError(store.read(ERROR).decode()) from error
        raise
    if finished is None:
        raise ApacsError(store.read(ERROR).decode())
    return bool(finished)


def _cause(error: BaseException) -> str:
    """The innermost message of a failure that traveled through Ray."""
    failures = list(getattr(error, "worker_failures", {}).values())
    inner: BaseException | None = failures[0] if failures else error
    while inner is not None and (inner.__cause__ or getattr(inner, "cause", None)) is not None:
        inner = getattr(inner, "cause", None) or inner.__cause__
    lines = [line for line in str(inner).strip().splitlines() if line.strip()]
    return lines[-1] if lines else repr(inner)


def _train_loop(config: dict[str, Any]) -> bool | None:
    """One DDP worker; whether training came to its end. None: it cannot, and `ERROR` in its state says why."""
    import ray.train
    import ray.train.torch
    import torch
    import torch.distributed as dist

    from apacs_ray.training.history import EpochRecord, told
    from apacs_ray.training.loop import Trainer, describe_device, earliest_place, train_epochs
    from apacs_ray.training.sampler import schedule
    from apacs_ray.training.state import save_state

    task: TrainingTask = config["task"]
    require_source(task.source)
    torch.set_num_threads(task.plan.threads)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = _device(task.plan.gpus)
    device_name = describe_device(device)

    def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
        if world > 1:
            dist.all_reduce(tensor)
        return tensor

    of: dict[Trainer, NetworkTask] = {}
    for network in task.networks:
        model = ray.train.torch.prepare_model(_network(task, network).to(device), move_to_device=False)
        trainer = Trainer(model, network.config, device=device, rank=rank, world=world, all_reduce=all_reduce)
        _resume(trainer, task.store, network.state)
        of[trainer] = network
    how = task.networks[0].config
    epoch, step = earliest_place(list(of))
    refs = schedule(
        task.indices["train"].groups(),
        len(task.indices["val"]),
        epochs=range(epoch, how.epochs),
        first_step=step,
        batch_size=how.batch_size,
        rank=rank,
        world=world,
        seed=how.seed,
    )

    def keep(trainer: Trainer) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_state(Path(folder), trainer.state())
            keep_checkpoint(task.store, of[trainer].state, task.attempt, Path(folder))

    def on_epoch(trainer: Trainer, record: EpochRecord) -> None:
        network = of[trainer]
        metrics = told(trainer.history)
        if rank == 0:
            keep(trainer)
            progress = {**metrics, "epochs": network.config.epochs, "device": device_name}
            task.store.write(f"{network.state}/{PROGRESS}", json.dumps(progress).encode())
            write_curves(task.store, network.curves, trainer.history, network.setting)
        ray.train.report({"network": network.name, **metrics})

    steps = -(-len(task.indices["train"]) // how.batch_size)
    if task.plan.data_tasks:
        samples = ray_samples(task.feed, task.indices, refs, task.plan, task.source)
    else:
        samples = one_by_one(task.feed, task.indices, refs)
    try:
        tiles = (len(task.indices["train"]), len(task.indices["val"]))
        notice = WorkersNotice(all_reduce, world, device)
        left = train_epochs(list(of), samples, steps, on_epoch, notice, tiles)
        if rank == 0:
            for trainer in left:
                keep(trainer)
        return not left
    except StoreTroubleError:
        raise  # a new worker, later, may have better luck
    except (ApacsError, torch.OutOfMemoryError) as error:
        task.store.write(f"{task.state}/{ERROR}", _told(error, task).encode())
        if world > 1 and not isinstance(error, TrainingError):
            raise  # the others wait for this worker, and Ray ends them only when it fails
        return None  # trying again would end the same way


def _told(error: Exception, task: TrainingTask) -> str:
    """For a person: what ended training, and what to do."""
    if isinstance(error, ApacsError):
        return str(error)
    return gpu_too_small(error, "fusion" if task.networks[0].spec.kind == "fusion" else "members")


def _device(gpus: float) -> torch.device:
    """This worker's device. Raises ApacsError when it was given a GPU that torch cannot use."""
    import ray.train.torch
    import torch

    if gpus and not torch.cuda.is_available():
        if "RAY_FAKE_CLUSTER" in os.environ:  # its GPUs are numbers (cluster/local.yaml)
            return torch.device("cpu")
        node = ray.util.get_node_ip_address()
        raise ApacsError(
            f"node {node} promised a GPU, but torch finds none there; look at its driver (python -m apacs_ray doctor)"
        )
    return ray.train.torch.get_device()


def _network(task: TrainingTask, network: NetworkTask) -> Any:
    """The network as its training starts, laid out before DDP wraps it: a later change gives wrong gradients."""
    import torch

    from apacs_ray.models.weights import build, load_model

    torch.manual_seed(network.config.seed)
    model = build(network.spec) if network.start is None else load_model(task.store.read(network.start), network.spec)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _resume(trainer: Trainer, store: Store, state: str) -> None:
    """Go on from the newest checkpoint that is whole; a damaged one is passed over."""
    for checkpoint in reversed(complete_checkpoints(store, state)):
        with tempfile.TemporaryDirectory() as folder:
            fetch(store, checkpoint, Path(folder))
            try:
                trainer.resume(Path(folder))
                return
            except ApacsError:
                continue
