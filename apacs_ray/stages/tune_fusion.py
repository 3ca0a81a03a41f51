"""The sweep of the fusion's hyperparameters: `tune/trials.csv`, and the best as `tune/best.yaml`."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import yaml

from apacs_ray.config.settings import Settings, TuneSettings
from apacs_ray.config.sweep import read_sweep
from apacs_ray.config.training_settings import FusionSettings
from apacs_ray.console import say
from apacs_ray.data.drawing import draw_by_slide
from apacs_ray.data.shards import TileIndex
from apacs_ray.distributed.trial import TrialTask
from apacs_ray.distributed.tune import TrialResult, sweep
from apacs_ray.errors import ApacsError
from apacs_ray.evaluation.selection import paired_errors
from apacs_ray.models.pretrained import published_fusion, published_fusion_version
from apacs_ray.models.spec import FusionStart, fusion_spec, start_key
from apacs_ray.runs.markers import Counts
from apacs_ray.runs.provenance import fingerprint, source_hash
from apacs_ray.stages.heatmaps import HeatmapsResult
from apacs_ray.stages.ingest_result import IngestResult
from apacs_ray.stages.stage import Committed, Job, Stage, StageResult
from apacs_ray.stages.train_networks import PRETRAINED, read_indices, write_pretrained
from apacs_ray.storage import Store


@dataclass(frozen=True)
class SweepResult(StageResult):
    """The trial that was taken: the settings it drew, its val Dice in 0..1, its id; tiles that trials saw, by split."""

    best: dict[str, Any]
    val_dice: float
    tiles: dict[str, int] = field(default_factory=dict)  # empty in older runs
    trial: str = ""  # likewise


@dataclass(frozen=True)
class TuneFusion(Stage[SweepResult]):
    """Sweep the fusion's hyperparameters on the stored heatmaps."""

    name: ClassVar[str] = "tune_fusion"
    script: ClassVar[str] = "tune_fusion.py"
    folder: ClassVar[str] = "tune"
    result_type: ClassVar[type[SweepResult]] = SweepResult

    ingest: Committed[IngestResult]
    heatmaps: Committed[HeatmapsResult]

    def fingerprint(self, settings: Settings) -> str:
        """Return the fingerprint of the heatmaps, the sweep, and what of the fusion's settings it does not draw.

        `tune.tiles` counts where the splits have more.
        """
        plan = read_sweep(settings.tune.config)
        stored = self.ingest.result.tiles
        drawn = {split: most for split, most in settings.tune.most.items() if most < stored[split]}
        # what the space draws, and the epochs that the sweep sets itself, do not depend on the settings
        fixed = settings.fusion.fingerprint_inputs(exclude={*plan.space, "epochs", "patience"})
        return fingerprint(
            stage=self.name,
            heatmaps=self.heatmaps.fingerprint,
            sweep=plan.fingerprint_inputs(),
            fusion=fixed,
            start=published_fusion_version(settings.fusion),
            seed=settings.run.seed,
            **({"tiles": drawn} if drawn else {}),
        )

    def work(self, job: Job, fingerprint: str) -> SweepResult:
        """Run or resume the sweep.

        Returns:
            The best trial.

        Raises:
            ApacsError: when no trial ended well.
        """
        store, settings = job.store, job.settings
        plan = read_sweep(settings.tune.config)
        job.ray.start()
        state = f"tune/.state-{fingerprint[:8]}"
        fusion = settings.fusion
        spec = fusion_spec(fusion, fusion.width)
        pretrained = write_pretrained(store, f"{state}/{PRETRAINED}", lambda: published_fusion(fusion, spec))
        stored = read_indices(store)
        indices = draw_tiles(stored, settings.tune, settings.run.seed)
        tiles = {split: len(index) for split, index in indices.items()}
        part = ", ".join(f"{tiles[split]} of {len(index)} {split} tiles" for split, index in stored.items())
        if any(tiles[split] < len(index) for split, index in stored.items()):
            say(f"tune_fusion: trials see {part} (tune.tiles {settings.tune.tiles})")
        task = TrialTask(
            store,
            indices,
            fusion,
            fusion.width,
            self.heatmaps.fingerprint,
            plan.epochs,
            settings.run.seed,
            source_hash(),
            state,
            settings.run.max_failures,
            60 * settings.run.checkpoint_minutes,
            pretrained=pretrained,
            starts=self.heatmaps.result.starts,
            deterministic=settings.run.deterministic,
        )
        with job.progress() as progress:
            trials = sweep(
                task, plan, job.ray.cluster(), lambda done: progress.show("trials", done, plan.trials_in_all)
            )
        scored = _scored(trials)
        if not scored:
            raise ApacsError(f"tune_fusion: no trial ended well, first: {trials[0].error if trials else 'none ran'}")
        starts = self.heatmaps.result.starts
        best = best_trial(scored, fusion, starts)
        drawn = FusionSettings.model_validate(best.setting).model_dump(mode="json", include=set(best.setting))
        store.write("tune/trials.csv", trials_csv(trials, fusion, starts).encode())
        of = f"{len(trials)} trials of {settings.tune.config}, which saw {part}"
        top = _dice(_highest(scored))
        comment = f"# taken of {of}: val Dice {best.val_dice:.4f}, the highest is {top:.4f}\n"
        store.write("tune/best.yaml", (comment + yaml.safe_dump({"fusion": drawn}, sort_keys=True)).encode())
        setting = ", ".join(f"{name} {value}" for name, value in drawn.items())
        say(f"tune_fusion: val Dice {best.val_dice:.4f} (the highest is {top:.4f}) with {setting}")
        counts = Counts(len(trials), len(scored), {"failed trial": len(trials) - len(scored)})
        return SweepResult(counts, drawn, best.val_dice or 0.0, tiles, best.trial_id)

    def tidy(self, store: Store, fingerprint: str) -> None:
        """Delete the state of this sweep and of earlier ones that were given up."""
        for entry in list(store.list("tune")):
            if entry.path.startswith("tune/.state-"):
                store.delete(entry.path)
                store.delete_folder("/".join(entry.path.split("/")[:2]))


def draw_tiles(indices: Mapping[str, TileIndex], tune: TuneSettings, seed: int) -> dict[str, TileIndex]:
    """Return the tiles that trials see: so many of each split as `tune.tiles` allows, from all of its slides."""
    drawn = dict(indices)
    for split, most in tune.most.items():
        index = indices[split]
        if most < len(index):
            drawn[split] = index.select(draw_by_slide(index.slide_ids, index.tile_ids, most, seed))
    return drawn


def best_trial(trials: Sequence[TrialResult], fusion: FusionSettings, starts: Mapping[str, FusionStart]) -> TrialResult:
    """Return the trial to take: of the `contenders` one that is behind the best of them by no more than chance.

    All that are behind by no more than the standard error of the difference are equal: of them the one of the lowest
    learning rate is taken, as it leaves its start the least.

    Args:
        trials: With a val Dice.
        fusion: What trials have that do not draw it: members and head.
        starts: By members, joined by `+`.
    """
    left = contenders(trials, fusion, starts)
    best = _highest(left)
    errors = chance(left, best)
    equal = [trial for trial in left if _dice(best) - _dice(trial) <= errors.get(trial.trial_id, 0.0)]
    return max(equal, key=lambda trial: (-trial.setting.get("learning_rate", 0.0), _dice(trial), trial.trial_id))


def contenders(
    trials: Sequence[TrialResult], fusion: FusionSettings, starts: Mapping[str, FusionStart]
) -> list[TrialResult]:
    """Return the trials whose members start as well, on validation, as those of any other trial.

    So a sweep cannot leave out the best member for a chance gain of one trial: what starts without it is worse. A
    published head has no start, and is held to none. Arguments as of `best_trial`.
    """

    def begins(trial: TrialResult) -> float | None:
        if trial.setting.get("head", fusion.head) == "published":
            return None
        start = starts.get(start_key(trial.setting.get("members", fusion.members)))
        return (start.val_dice or 0.0) if start is not None else 0.0

    highest = max((value for trial in trials if (value := begins(trial)) is not None), default=None)
    return [trial for trial in trials if begins(trial) in (None, highest)]


def chance(trials: Sequence[TrialResult], best: TrialResult) -> dict[str, float]:
    """Return, by trial, the standard error of its val Dice less that of `best`, over slides or groups of tiles.

    Args:
        trials: With a val Dice; `best` is one of them.
        best: The trial that others are compared with.

    Returns:
        Those that can be told: trials that counted by the same units as the best one, of which there are two or more.
    """
    same = [trial for trial in trials if len(trial.val_units) == len(best.val_units) > 1]
    if not same:
        return {}
    units = np.array([trial.val_units for trial in same], np.int64).transpose(1, 0, 2)
    errors = paired_errors(units, same.index(best)).tolist()
    return {trial.trial_id: error for trial, error in zip(same, errors, strict=True)}


def _scored(trials: Sequence[TrialResult]) -> list[TrialResult]:
    return [trial for trial in trials if trial.val_dice is not None and trial.error is None]


def _dice(trial: TrialResult) -> float:
    return trial.val_dice or 0.0


def _highest(trials: Sequence[TrialResult]) -> TrialResult:
    return max(trials, key=lambda trial: (_dice(trial), trial.trial_id))


def trials_csv(trials: Sequence[TrialResult], fusion: FusionSettings, starts: Mapping[str, FusionStart]) -> str:
    """Return `trials.csv`, a line a trial: id, best val Dice and its error, epochs, seconds, error, drawn settings.

    Errors are of the difference from the trial that `best_trial` compares with. Other arguments as of that.
    """
    scored = _scored(trials)
    errors = chance(scored, _highest(contenders(scored, fusion, starts))) if scored else {}
    names = sorted({name for trial in trials for name in trial.setting})
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(["trial_id", "val_dice", "val_dice_error", "epochs", "seconds", "error", *names])
    for trial in trials:
        values = [trial.setting.get(name) for name in names]
        cells = ["+".join(value) if isinstance(value, list | tuple) else value for value in values]
        dice = "" if trial.val_dice is None else f"{trial.val_dice:.6f}"
        error = f"{errors[trial.trial_id]:.6f}" if trial.trial_id in errors else ""
        writer.writerow([trial.trial_id, dice, error, trial.epochs, trial.seconds, trial.error or "", *cells])
    return sink.getvalue()
