"""Training runs on Ray Train: a `TorchTrainer` for each network, several at the same time, or one for all of them.

Training state lives in the run under its fingerprint. Each start is an attempt of its own for Ray, which keeps no
checkpoints: ours (`training.checkpoints`, complete by size and hash) say where training goes on, so that a snapshot
of Ray's that a kill cut in half does not matter, and each of several networks keeps its own best.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from apacs_ray.console import say
from apacs_ray.distributed.credentials import ray_filesystem
from apacs_ray.distributed.ddp_worker import ERROR, PROGRESS, train_loop
from apacs_ray.distributed.ray_internals import died_as_it_started, torch_config_without_process_group
from apacs_ray.distributed.tasks import KEEP_MEMORY
from apacs_ray.distributed.waiting import told_of_waits
from apacs_ray.distributed.worker import TrainingTask
from apacs_ray.errors import ApacsError, StoreTroubleError, message_of
from apacs_ray.storage import Store
from apacs_ray.training.checkpoints import attempts

POLL = 1.0  # s between looks at the progress of runs
POLL_STORE = 10.0  # s where each look is a request to an object store


def train(tasks: Sequence[TrainingTask], *, parallel: bool, on_progress: Callable[[str, dict[str, Any]], None]) -> None:
    """Train every network to its end.

    Args:
        tasks: A run of Ray Train each.
        parallel: At the same time, or one after the other.
        on_progress: Called with a network's name and what `read_progress` returns.

    Raises:
        ApacsError: A training stopped; the message names its networks and the cause.
    """
    for group in [list(tasks)] if parallel else [[task] for task in tasks]:
        errors: dict[str, BaseException] = {}
        threads = [threading.Thread(target=_fit, args=(task, errors), daemon=True) for task in group]
        with told_of_waits({task.name: task.plan for task in group}):
            _await(group, threads, errors, on_progress)
        for name, error in errors.items():
            raise ApacsError(f"{name}: training stopped: {message_of(error)}") from error


def _await(
    group: Sequence[TrainingTask],
    threads: Sequence[threading.Thread],
    errors: Mapping[str, BaseException],
    on_progress: Callable[[str, dict[str, Any]], None],
) -> None:
    """Start runs of Ray Train, tell of their progress and of what stops, and return when all have ended."""
    for thread in threads:
        thread.start()
    polled = time.monotonic()
    announced: set[str] = set()
    while any(thread.is_alive() for thread in threads):
        time.sleep(POLL)  # the main thread stays here: only it hears Ctrl-C
        for name in errors.keys() - announced:
            announced.add(name)
            say(f"{name}: training stopped: {message_of(errors[name])}; what trains beside it goes on to its end")
        if not group[0].store.is_local and time.monotonic() - polled < POLL_STORE:
            continue
        polled = time.monotonic()
        for task in group:
            for network in task.networks:
                with contextlib.suppress(StoreTroubleError):  # who only looks neither waits nor ends for it
                    if (progress := read_progress(task.store.with_timeout(0), network.state)) is not None:
                        on_progress(network.name, progress)


def read_progress(store: Store, state: str) -> dict[str, Any] | None:
    """Return what rank 0 said after its last epoch: epoch, epochs, val_dice, device. None before the first."""
    try:
        progress: dict[str, Any] = json.loads(store.read(f"{state}/{PROGRESS}"))
    except FileNotFoundError:
        return None
    return progress


def _fit(task: TrainingTask, errors: dict[str, BaseException]) -> None:
    try:
        fit(task)
    except BaseException as error:  # carried to the main thread, which raises it  # noqa: BLE001
        errors[task.name] = error


def fit(task: TrainingTask, callbacks: Sequence[Any] = ()) -> None:
    """Train from the newest checkpoints to the end. Raises ApacsError, or what ended Ray's run.

    Workers that hear that a node of theirs is to be taken away keep a checkpoint and leave; the next run of Ray Train
    goes on from there, on nodes that stay. This counts as no failure, and nothing is done again. A worker that dies as
    it starts, which Ray Train takes for a failure of its own, counts as one that dies later.
    """
    lost = 0
    while True:
        try:
            if _fit_once(task, callbacks):
                return
            say(f"{task.name}: a node is to be taken away; goes on elsewhere")
        except Exception as error:
            lost += 1
            if not died_as_it_started(error) or lost > task.max_failures:
                raise
            say(f"{task.name}: a worker died as it started; tries again")


def _fit_once(task: TrainingTask, callbacks: Sequence[Any]) -> bool:
    """One run of Ray Train; whether it came to the end."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    store = task.store.child(task.state)
    task = replace(task, attempt=1 + max(attempts(store, ""), default=0))
    plan = task.plan
    torch_config = None
    if plan.workers == 1:
        torch_config = torch_config_without_process_group()
    elif plan.backend == "gloo":
        torch_config = TorchConfig(backend="gloo")  # else Ray takes NCCL, where torch finds GPUs
    trainer = TorchTrainer(
        train_loop,
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
