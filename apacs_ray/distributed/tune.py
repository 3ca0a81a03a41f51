"""The sweep on Ray Tune: searcher, scheduler, and what became of each trial. An interrupted sweep is restored."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from apacs_ray.config.sweep import MUTABLE, Distribution, Sweep
from apacs_ray.console import say
from apacs_ray.distributed.credentials import ray_filesystem
from apacs_ray.distributed.ray_internals import keep_aws_variables_from_trials
from apacs_ray.distributed.resource_plan import Cluster
from apacs_ray.distributed.trial import FAILURE, TRIAL_CURVES, TrialTask, error_line, plain_setting, run_trial
from apacs_ray.distributed.trial_plan import plan_sweep
from apacs_ray.distributed.waiting import told_of_waits
from apacs_ray.training.history import VAL_UNITS
from apacs_ray.training.tensorboard import CURVES


@dataclass(frozen=True)
class TrialResult:
    """One trial: its setting, its best epoch, and how it ended.

    `val_units` are the pixels of each unit of validation at that epoch, as `Trainer.val_units` has them; [] where that
    was not told.
    """

    trial_id: str
    setting: dict[str, Any]
    val_dice: float | None
    epochs: int
    seconds: float
    error: str | None
    val_units: list[list[int]] = field(default_factory=list)


def sweep(task: TrialTask, plan: Sweep, cluster: Cluster, on_done: Callable[[int], None]) -> list[TrialResult]:
    """Run or restore the sweep whose state lies in `task.state` of the run.

    Returns:
        Every trial, in the order of Ray Tune.

    Raises:
        KeyboardInterrupt: Ctrl-C; the state is kept.
    """
    from ray import tune

    from apacs_ray.distributed.trial_listener import TrialListener

    each, concurrency = plan_sweep(plan, cluster, task.fusion.batch_size)
    task = replace(task, plan=each)
    own = {"cpu": each.cpus, **({"gpu": each.gpus} if each.gpus else {})}
    resources = own if each.workers == 1 else {"cpu": 0.01}  # its workers have theirs
    trainable = tune.with_resources(tune.with_parameters(run_trial, task=task), resources)
    store = task.store.child(task.state)
    filesystem = ray_filesystem(store)
    keep_aws_variables_from_trials()
    path = f"{store.full_path()}/sweep"
    tuner = None
    if tune.Tuner.can_restore(path, storage_filesystem=filesystem):
        try:
            tuner = tune.Tuner.restore(
                path, trainable, resume_unfinished=True, resume_errored=True, storage_filesystem=filesystem
            )
        except (AttributeError, EOFError, ImportError, pickle.UnpicklingError, RuntimeError, ValueError) as error:
            # a kill cut its state before the first trial, or it is of another version of this code
            say(f"tune_fusion: what an interrupted sweep left cannot be read; it begins again ({error_line(error)})")
            store.delete_folder("sweep")
    if tuner is None:
        task.store.delete_folder(f"{CURVES}/{TRIAL_CURVES}")  # of an earlier sweep
        domains = {name: _domain(drawn) for name, drawn in plan.space.items()}
        tuner = tune.Tuner(
            trainable,
            param_space=domains,
            tune_config=tune.TuneConfig(
                metric="val_dice",
                mode="max",
                num_samples=plan.trials,
                # Ray Tune heeds this for searchers; the random one is told itself
                max_concurrent_trials=concurrency if plan.searcher == "optuna" else None,
                scheduler=_scheduler(plan),
                search_alg=_searcher(plan, task.seed, concurrency),
                trial_dirname_creator=_folder,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=store.full_path(),
                storage_filesystem=filesystem,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=task.max_failures),
                # one that others may go on from must be there until they do
                checkpoint_config=tune.CheckpointConfig(num_to_keep=3 if plan.scheduler.kind == "pbt" else 1),
                callbacks=[TrialListener(on_done)],
            ),
        )
    # `TrialListener` says in a line what it shows tracebacks of
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with stopped_by_ctrl_c(), told_of_waits({"a trial": each}):
        results = tuner.fit()
    return [_result(result) for result in results]


@contextlib.contextmanager
def stopped_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the sweep where it stands.

    Tune alone would return as if the sweep had ended, and an exception from a handler may be lost in its callbacks. So
    it is told by SIGUSR1, on which it stops likewise; the second Ctrl-C does not wait for it.

    Raises:
        KeyboardInterrupt: after Ctrl-C, when the sweep's state is kept.
    """
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    before, asked = signal.getsignal(signal.SIGUSR1), False

    def stop(number: int, frame: object) -> None:
        nonlocal asked
        if asked or signal.getsignal(signal.SIGUSR1) == before:  # Tune does not listen yet
            raise KeyboardInterrupt
        asked = True
        signal.raise_signal(signal.SIGUSR1)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        signal.signal(signal.SIGUSR1, before)
    if asked:
        raise KeyboardInterrupt


def _domain(drawn: Distribution) -> Any:
    from ray import tune

    if drawn.kind in ("grid", "choice"):
        # searchers compare choices: a list of members travels as one word
        values = ["+".join(value) if isinstance(value, list | tuple) else value for value in drawn.values]
        return tune.grid_search(values) if drawn.kind == "grid" else tune.choice(values)
    return getattr(tune, drawn.kind)(*drawn.values)


def _scheduler(plan: Sweep) -> Any:
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining

    if plan.scheduler.kind == "fifo":
        return FIFOScheduler()
    if plan.scheduler.kind == "pbt":
        return PopulationBasedTraining(
            time_attr="epoch",
            perturbation_interval=plan.scheduler.interval,
            hyperparam_mutations={name: _domain(drawn) for name, drawn in plan.space.items() if name in MUTABLE},
            custom_explore_fn=partial(within_ranges, plan.space),
        )
    return AsyncHyperBandScheduler(
        time_attr="epoch",
        max_t=plan.epochs,
        grace_period=min(plan.scheduler.grace_period, plan.epochs),
        reduction_factor=plan.scheduler.reduction_factor,
    )


def within_ranges(space: Mapping[str, Distribution], setting: dict[str, Any]) -> dict[str, Any]:
    """Return a setting that population based training changed, not beyond the ends of its ranges."""
    ranges = {name: drawn.ends() for name, drawn in space.items() if drawn.kind not in ("choice", "grid")}
    return setting | {name: min(max(setting[name], low), high) for name, (low, high) in ranges.items()}


def _searcher(plan: Sweep, seed: int, concurrency: int) -> Any:
    from ray.tune.search import BasicVariantGenerator

    if plan.searcher == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(seed=seed)
    return BasicVariantGenerator(random_state=seed, max_concurrent=concurrency)


def _folder(trial: Any) -> str:
    return str(trial.trial_id)


def _result(result: Any) -> TrialResult:
    metrics = result.metrics or {}
    setting, val_dice, val_units = best_epoch_of(result)
    return TrialResult(
        Path(result.path).name,  # metrics name another trial where this one took over finished weights
        plain_setting(setting),
        val_dice,
        int(metrics.get("epoch", 0)),
        round(float(metrics.get("time_total_s", 0.0)), 2),
        error_line(error) if (error := result.error or metrics.get(FAILURE)) else None,
        val_units,
    )


def best_epoch_of(result: Any) -> tuple[dict[str, Any], float | None, list[list[int]]]:
    """Return the setting of a trial at its highest val Dice (population based training changes it), and that Dice.

    And the counts by unit of that epoch.
    """
    config, epochs = result.config or {}, result.metrics_dataframe
    if epochs is not None and not epochs.empty:
        epochs = epochs[epochs["epoch"] > 0]  # a trial that had to leave its node in its first epoch has told of none
    if epochs is None or epochs.empty:
        return config, None, []
    best = epochs.loc[epochs["val_dice"].idxmax()]
    drawn = {name: best.get(f"config/{name}", value) for name, value in config.items()}
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in drawn.items()}
    units = best.get(VAL_UNITS)
    return plain, float(best["val_dice"]), json.loads(units) if isinstance(units, str) else []
