"""The sweep of the fusion's hyperparameters: `tune/trials.csv`, and the best as `tune/best.yaml`."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import yaml

from apacs_ray.config.settings import FusionSettings
from apacs_ray.config.sweep import read_sweep
from apacs_ray.console import say
from apacs_ray.distributed.trial import TrialTask
from apacs_ray.distributed.tune import TrialResult, sweep
from apacs_ray.errors import ApacsError
from apacs_ray.runs.markers import Counts
from apacs_ray.runs.provenance import fingerprint, source_hash
from apacs_ray.stages.fusion_settings import BEST, NOT_LEARNED
from apacs_ray.stages.pipeline import Context, Outcome, Stage
from apacs_ray.stages.train_networks import read_indices


def _fingerprint(context: Context) -> str:
    plan = read_sweep(context.settings.tune.config)
    # what the space draws, and the epochs that the sweep sets itself, do not depend on the settings
    fixed = context.settings.fusion.model_dump(exclude={*plan.space, *NOT_LEARNED, "epochs", "patience"})
    return fingerprint(
        stage="tune_fusion",
        heatmaps=context.done("heatmaps").fingerprint,
        sweep=plan.model_dump(exclude={"concurrency", "resources"}),
        fusion=fixed,
        width=context.settings.fusion_width,
        seed=context.settings.run.seed,
    )


def _work(context: Context, mark: str) -> Outcome:
    store, settings = context.run.store, context.settings
    plan = read_sweep(settings.tune.config)
    context.ray.start()
    cluster = context.ray.cluster()
    task = TrialTask(
        store,
        read_indices(store),
        settings.fusion,
        settings.fusion_width,
        context.done("heatmaps").fingerprint,
        plan.epochs,
        settings.run.seed,
        max(1, int(plan.resources.cpu)),
        source_hash(),
        f"tune/.state-{mark[:8]}",
        settings.run.max_failures,
    )
    with context.bars() as shown:
        trials = sweep(task, plan, cluster, lambda done: shown.show("trials", done, plan.trials))
    scored = [trial for trial in trials if trial.val_dice is not None and trial.error is None]
    if not scored:
        raise ApacsError(f"tune_fusion: no trial ended well, first: {trials[0].error if trials else 'none ran'}")
    best = max(scored, key=lambda trial: (trial.val_dice or 0.0, trial.trial_id))
    store.write("tune/trials.csv", trials_csv(trials).encode())
    shown_best = FusionSettings.model_validate(best.setting).model_dump(mode="json", include=set(best.setting))
    comment = f"# best of {len(trials)} trials of {settings.tune.config}: val Dice {best.val_dice:.4f}\n"
    store.write(BEST, (comment + yaml.safe_dump({"fusion": shown_best}, sort_keys=True)).encode())
    setting = ", ".join(f"{name} {value}" for name, value in shown_best.items())
    say(f"tune_fusion: best val Dice {best.val_dice:.4f} with {setting}")
    counts = Counts(len(trials), len(scored), {"failed trial": len(trials) - len(scored)})
    return Outcome(counts, {"best": shown_best, "val_dice": best.val_dice}, lambda: _forget(context))


def _forget(context: Context) -> None:
    for entry in list(context.run.store.list("tune")):
        if entry.path.startswith("tune/.state-"):
            context.run.store.delete(entry.path)
            context.run.store.delete_folder("/".join(entry.path.split("/")[:2]))


def trials_csv(trials: Sequence[TrialResult]) -> str:
    """A line a trial: id, best val Dice, epochs, seconds, error, and every drawn setting."""
    names = sorted({name for trial in trials for name in trial.setting})
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(["trial_id", "val_dice", "epochs", "seconds", "error", *names])
    for trial in trials:
        values = [trial.setting.get(name) for name in names]
        shown = ["+".join(value) if isinstance(value, list | tuple) else value for value in values]
        dice = "" if trial.val_dice is None else f"{trial.val_dice:.6f}"
        writer.writerow([trial.trial_id, dice, trial.epochs, trial.seconds, trial.error or "", *shown])
    return sink.getvalue()


TUNE_FUSION = Stage("tune_fusion", "tune", _fingerprint, _work, wanted=lambda settings: settings.fusion.from_best)
