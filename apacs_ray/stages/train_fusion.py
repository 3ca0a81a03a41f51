"""Fusion: trained on RGB and the stored heatmaps, with the best setting of the sweep."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from apacs_ray.config.settings import Settings
from apacs_ray.config.training_settings import FusionSettings
from apacs_ray.console import say
from apacs_ray.models.pretrained import pretrained_fusion, published_fusion, published_fusion_version
from apacs_ray.models.spec import FusionStart, ModelSpec, fusion_spec
from apacs_ray.runs.markers import Counts
from apacs_ray.runs.provenance import fingerprint
from apacs_ray.stages.heatmaps import HeatmapsResult
from apacs_ray.stages.ingest_result import IngestResult
from apacs_ray.stages.stage import Committed, Job, Stage, delete_others
from apacs_ray.stages.train_networks import KEPT, Network, TrainingResult, forget_state, train_networks, weights_hold
from apacs_ray.stages.tune_fusion import SweepResult
from apacs_ray.storage import Store
from apacs_ray.training.dataset import Heatmaps
from apacs_ray.training.tensorboard import CURVES, CURVES_FILE

FOLDERS = {"fusion": "fusion", "fusion_published": "fusion_published"}


@dataclass(frozen=True)
class TrainFusion(Stage[TrainingResult]):
    """Train the fusion; with `fusion.compare` the published head as well. `sweep` is None where none was asked for."""

    name: ClassVar[str] = "train_fusion"
    script: ClassVar[str] = "train_fusion.py"
    folder: ClassVar[str] = "fusion"
    result_type: ClassVar[type[TrainingResult]] = TrainingResult

    ingest: Committed[IngestResult]
    heatmaps: Committed[HeatmapsResult]
    sweep: Committed[SweepResult] | None

    def fingerprint(self, settings: Settings) -> str:
        """Return the fingerprint of the heatmaps and of how the fusion is trained."""
        return fingerprint(
            stage=self.name,
            heatmaps=self.heatmaps.fingerprint,
            fusion=self._trained_settings(settings).fingerprint_inputs(),
            start=published_fusion_version(settings.fusion),
            keys=sorted(fusion_folders(settings)),
            seed=settings.run.seed,
        )

    def work(self, job: Job, fingerprint: str) -> TrainingResult:
        """Leave each fusion in the folder of its key."""
        fusion, own = self._trained_settings(job.settings), job.settings.fusion
        changed = [name for name in type(own).model_fields if getattr(fusion, name) != getattr(own, name)]
        if changed:
            values = ", ".join(f"{name} {getattr(fusion, name)}" for name in changed)
            say(f"train_fusion: from the sweep: {values} (--fusion.from_best false keeps your own)")
        networks = []
        starts = self.heatmaps.result.starts
        for key, (how, spec) in fusion_specs(job.settings, fusion, starts).items():
            if spec.start is not None:
                say(f"{key}: starts as {described(spec.start)}")
            heatmaps = Heatmaps(how.members, self.heatmaps.fingerprint)
            networks.append(Network(key, spec, FOLDERS[key], how, heatmaps, pretrained=_pretrained(job, spec, how)))
        trained = train_networks(job, networks, fingerprint, self.ingest.fingerprint, self.ingest.result.mpp)
        for key, folder in FOLDERS.items():
            if key not in trained:  # compared with under earlier settings
                delete_others(job.store, folder, re.compile(rf"{folder}/({'|'.join(map(re.escape, KEPT))})"), ())
                delete_others(job.store, f"{CURVES}/{folder}", CURVES_FILE, ())
        return TrainingResult(Counts(len(trained), len(trained)), trained)

    def holds(self, store: Store, result: TrainingResult) -> bool:
        """Return whether the weights are those that were committed."""
        return weights_hold(store, result)

    def tidy(self, store: Store, fingerprint: str) -> None:
        """Delete the training state."""
        forget_state(store, list(FOLDERS.values()))

    def _trained_settings(self, settings: Settings) -> FusionSettings:
        return settings.fusion if self.sweep is None else overlay(settings.fusion, self.sweep.result.best)


def overlay(settings: FusionSettings, best: dict[str, Any]) -> FusionSettings:
    """Return settings with some of them replaced, validated again."""
    return FusionSettings.model_validate({**settings.model_dump(), **best})


def fusion_folders(settings: Settings) -> dict[str, str]:
    """Return the folders of a run's fusions by key: `fusion`, with `fusion.compare` `fusion_published` as well."""
    return FOLDERS if settings.fusion.compare else {"fusion": FOLDERS["fusion"]}


def fusion_specs(
    settings: Settings, fusion: FusionSettings, starts: Mapping[str, FusionStart] | None = None
) -> dict[str, tuple[FusionSettings, ModelSpec]]:
    """Return how the fusions of a run learn and what they are, by key, when `fusion` says how the first one does.

    `starts` are those that were fitted, by members; without them a refined fusion starts as the mean.
    """
    hows = {
        key: fusion if key == "fusion" else fusion.model_copy(update={"head": "published"})
        for key in fusion_folders(settings)
    }
    views = settings.heatmaps.views
    return {key: (how, replace(fusion_spec(how, how.width, key, starts), views=views)) for key, how in hows.items()}


def described(start: FusionStart) -> str:
    """Return a start in words."""
    weights = " + ".join(f"{weight:.2f} {name}" for name, weight in start.weights.items() if weight)
    dice = "not defined" if start.val_dice is None else f"{start.val_dice:.4f}"
    shape = f" / {start.temperature:.2f} {start.bias:+.2f}" if start.name == "fitted" else ""
    return f"{start.name} ({weights}{shape}), val Dice {dice}"


def _pretrained(job: Job, spec: ModelSpec, how: FusionSettings) -> Callable[[], bytes | None]:
    return lambda: published_fusion(how, spec) or pretrained_fusion(job.store, spec, how.trunk, job.settings.run.seed)
