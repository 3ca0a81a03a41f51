"""The sweep on Ray Tune: searcher, scheduler, and what became of each trial. An interrupted sweep is restored."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray.tune import Callback

from apacs_ray.adapters.keyless import forward_no_keys, ray_filesystem
from apacs_ray.adapters.trial import TRIAL_CURVES, TrialTask, plain_setting, run_trial
from apacs_ray.clean import without_secrets
from apacs_ray.errors import ApacsError
from apacs_ray.plan import Cluster, plan_trials
from apacs_ray.sweep import MUTABLE, Distribution, Sweep
from apacs_ray.tracking import CURVES

LONGEST_ERROR = 400  # characters of a trial's error that are kept


@dataclass(frozen=True)
class TrialResult:
    """One trial: its setting, its best epoch, and how it ended."""

    trial_id: str
    setting: dict[str, Any]
    val_dice: float | None
    epochs: int
    seconds: float
    error: str | None


class TrialCount(Callback):  # type: ignore[misc]
    """Tells how many trials have ended. Ray Tune pickles its callbacks; the listener stays behind."""

    def __init__(self, on_done: Callable[[int], None]) -> None:
        self._on_done: Callable[[int], None] | None = on_done
        self._done = 0

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._done += 1
        if self._on_done is not None:
            self._on_done(self._done)

    def __getstate__(self) -> dict[str, Any]:
        return {"_on_done": None, "_done": self._done}


def sweep(task: TrialTask, plan: Sweep, cluster: Cluster, on_done: Callable[[int], None]) -> list[TrialResult]:
    """Run or restore the sweep whose state lies in `task.state` of the run."""
    from ray import tune

    resources, concurrency = {"cpu": min(plan.resources.cpu, cluster.cpus)}, plan.concurrency
    if plan.resources.workers > 1:
        asked = plan.resources
        nested, concurrency = plan_trials(
            cluster,
            workers=asked.workers,
            cpu=asked.cpu,
            gpu=asked.gpu,
            batch_size=task.fusion.batch_size,
            concurrency=plan.concurrency,
        )
        task, resources = replace(task, plan=nested), {"cpu": 0.01}
    elif cluster.gpus and plan.resources.gpu:
        resources["gpu"] = plan.resources.gpu
    trainable = tune.with_resources(tune.with_parameters(run_trial, task=task), resources)
    store = task.store.child(task.state)
    filesystem = ray_filesystem(store)
    forward_no_keys()
    path = f"{store.full_path()}/sweep"
    tuner = None
    if tune.Tuner.can_restore(path, storage_filesystem=filesystem):
        try:
            tuner = tune.Tuner.restore(
                path, trainable, resume_unfinished=True, resume_errored=True, storage_filesystem=filesystem
            )
        except (EOFError, pickle.UnpicklingError, RuntimeError, ValueError):
            store.delete_folder("sweep")  # a kill cut its state before the first trial: begin again
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
                max_concurrent_trials=concurrency or None if plan.searcher == "optuna" else None,
                scheduler=_scheduler(plan),
                search_alg=_searcher(plan, task.seed, concurrency),
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=store.full_path(),
                storage_filesystem=filesystem,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=2),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
                callbacks=[TrialCount(on_done)],
            ),
        )
    return [_result(result) for result in tuner.fit()]


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
        )
    return AsyncHyperBandScheduler(
        time_attr="epoch",
        max_t=plan.epochs,
        grace_period=min(plan.scheduler.grace_period, plan.epochs),
        reduction_factor=plan.scheduler.reduction_factor,
    )


def _searcher(plan: Sweep, seed: int, concurrency: int) -> Any:
    from ray.tune.search import BasicVariantGenerator

    if plan.searcher == "optuna":
        try:
            import optuna  # noqa: F401 - an extra; Ray imports it later and then fails in its own words
        except ImportError as error:
            raise ApacsError("tune.config: searcher optuna needs the package: pip install '.[optuna]'") from error
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(seed=seed)
    return BasicVariantGenerator(random_state=seed, max_concurrent=concurrency)


def _result(result: Any) -> TrialResult:
    metrics = result.metrics or {}
    return TrialResult(
        str(metrics.get("trial_id", Path(result.path).name)),
        plain_setting(result.config or {}),
        metrics.get("best_val_dice"),
        int(metrics.get("epoch", 0)),
        round(float(metrics.get("time_total_s", 0.0)), 2),
        without_secrets(str(result.error).strip().splitlines()[-1])[:LONGEST_ERROR] if result.error else None,
    )
