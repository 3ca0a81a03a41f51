"""The sweep on Ray Tune: a trial is one process that trains a fusion network from stored heatmaps.

A trial starts no workers of its own, so trials cannot wait for each other's. An interrupted sweep is restored; each
trial then goes on from its last epoch.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray.tune import Callback

from apacs_ray.data.shards import TileIndex
from apacs_ray.errors import ApacsError
from apacs_ray.models.spec import ModelSpec
from apacs_ray.plan import Cluster
from apacs_ray.run import require_source
from apacs_ray.settings import FusionSettings
from apacs_ray.storage import Store
from apacs_ray.sweep import MUTABLE, Distribution, Sweep
from apacs_ray.training.config import TrainConfig
from apacs_ray.training.feed import Crop, Feed, Heatmaps, in_memory, one_by_one

IN_MEMORY = 2**30  # bytes of decoded tiles that a trial may keep


@dataclass(frozen=True)
class TrialTask:
    """What all trials have in common."""

    store: Store
    indices: dict[str, TileIndex]
    fusion: FusionSettings
    width: float
    heatmaps: str
    epochs: int
    seed: int
    threads: int
    source: str


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


def sweep(
    task: TrialTask, plan: Sweep, cluster: Cluster, state: str, on_done: Callable[[int], None]
) -> list[TrialResult]:
    """Run or restore the sweep whose state lies in `state` of the run."""
    from ray import tune

    resources = {"cpu": min(plan.resources.cpu, cluster.cpus)}
    if cluster.gpus and plan.resources.gpu:
        resources["gpu"] = plan.resources.gpu
    trainable = tune.with_resources(tune.with_parameters(_trial, task=task), resources)
    store = task.store.child(state)
    filesystem = None if store.is_local else store.filesystem
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
        domains = {name: _domain(drawn) for name, drawn in plan.space.items()}
        tuner = tune.Tuner(
            trainable,
            param_space=domains,
            tune_config=tune.TuneConfig(
                metric="val_dice",
                mode="max",
                num_samples=plan.trials,
                max_concurrent_trials=plan.concurrency or None,
                scheduler=_scheduler(plan),
                search_alg=_searcher(plan, task.seed),
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


def _searcher(plan: Sweep, seed: int) -> Any:
    from ray.tune.search import BasicVariantGenerator

    if plan.searcher == "optuna":
        try:
            import optuna  # noqa: F401 - an extra; Ray imports it later and then fails in its own words
        except ImportError as error:
            raise ApacsError("tune.config: searcher optuna needs the package: pip install '.[optuna]'") from error
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(seed=seed)
    return BasicVariantGenerator(random_state=seed)


def _trial(config: dict[str, Any], task: TrialTask) -> None:
    import torch
    from ray import tune

    from apacs_ray.models.weights import build
    from apacs_ray.training.loop import Trainer
    from apacs_ray.training.order import schedule
    from apacs_ray.training.record import EpochRecord
    from apacs_ray.training.state import TrainState, save_state

    require_source(task.source)
    torch.set_num_threads(task.threads)
    settings = FusionSettings.model_validate({**task.fusion.model_dump(), **plain_setting(config)})
    spec = fusion_spec(settings, task.width)
    train_config = replace(TrainConfig.of(settings, task.seed, epochs=task.epochs), patience=0)
    torch.manual_seed(task.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(build(spec), train_config, device=device)
    with contextlib.ExitStack() as stack:
        checkpoint = tune.get_checkpoint()
        if checkpoint is not None:
            trainer.resume(Path(stack.enter_context(checkpoint.as_directory())))
            for group in trainer.optimizer.param_groups:  # PBT may have changed it since
                group["weight_decay"] = train_config.weight_decay
    feed = Feed(
        task.store,
        Heatmaps(settings.members, task.heatmaps),
        Crop(settings.crop, settings.flips, settings.turns),
    )
    train_index, val_index = task.indices["train"], task.indices["val"]
    refs = schedule(
        train_index.groups(),
        len(val_index),
        epochs=range(trainer.next_epoch, task.epochs),
        batch_size=settings.batch_size,
        rank=0,
        world=1,
        seed=task.seed,
    )
    size = (len(train_index) + len(val_index)) * max(train_index.largest, val_index.largest) * 7
    samples = (in_memory if size <= IN_MEMORY else one_by_one)(feed, task.indices, refs)

    def on_epoch(record: EpochRecord, state: TrainState) -> None:
        dice = 0.0 if math.isnan(record.val_dice) else record.val_dice
        best = max((past.val_dice for past in state.history if not math.isnan(past.val_dice)), default=0.0)
        with tempfile.TemporaryDirectory() as folder:
            save_state(Path(folder), state)
            metrics = {"epoch": record.epoch + 1, "val_dice": dice, "best_val_dice": best}
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))

    trainer.run(samples, -(-len(train_index) // settings.batch_size), on_epoch)


def plain_setting(config: dict[str, Any]) -> dict[str, Any]:
    """A trial's setting as `FusionSettings` takes it: members as a list again."""
    return {name: value.split("+") if name == "members" else value for name, value in config.items()}


def fusion_spec(settings: FusionSettings, width: float, name: str = "fusion") -> ModelSpec:
    """The fusion network that settings describe."""
    return ModelSpec(
        "fusion",
        name,
        width=width,
        dropout=settings.dropout,
        head=settings.head,
        members=settings.members,
        heatmap_init=settings.heatmap_init,
    )


def _result(result: Any) -> TrialResult:
    metrics = result.metrics or {}
    return TrialResult(
        str(metrics.get("trial_id", Path(result.path).name)),
        plain_setting(result.config or {}),
        metrics.get("best_val_dice"),
        int(metrics.get("epoch", 0)),
        round(float(metrics.get("time_total_s", 0.0)), 2),
        str(result.error).strip().splitlines()[-1] if result.error else None,
    )
