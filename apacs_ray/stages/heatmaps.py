"""Heatmaps: what the frozen members say of every training and val tile, stored once for all fusion training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from apacs_ray.config.settings import Settings
from apacs_ray.console import say
from apacs_ray.data.shards import TileIndex, shard_paths
from apacs_ray.distributed.heatmaps import ALL, HeatmapTask, write_folds, write_heatmaps
from apacs_ray.distributed.starts import ValidationTiles, fit_starts, group_slides
from apacs_ray.distributed.tasks import ensembles_held, plan_predictors
from apacs_ray.errors import ApacsError
from apacs_ray.models.registry import MEMBERS
from apacs_ray.models.spec import FusionStart
from apacs_ray.runs.markers import Counts
from apacs_ray.runs.provenance import fingerprint
from apacs_ray.stages.ingest_result import IngestResult, read_committed_index
from apacs_ray.stages.stage import Committed, Job, Stage, StageResult, delete_others
from apacs_ray.stages.train_members import member_folder, member_network
from apacs_ray.stages.train_networks import TrainingResult, read_indices, state_folder, train_networks
from apacs_ray.storage import Store
from apacs_ray.training.dataset import Heatmaps
from apacs_ray.training.tensorboard import CURVES, CURVES_FILE, curves_path

SPLITS = ("train", "val")  # test tiles are read by `evaluate` only
FOLDS = "heatmaps/folds"  # there while the stage works
STARTS = 2  # version of how the starts of fusions are fitted


@dataclass(frozen=True)
class HeatmapsResult(StageResult):
    """Heatmaps of `counts` tiles, by members of so many `folds`, and where fusions start that read them.

    `starts` are by the members that a fusion reads, joined by `+`.
    """

    folds: int
    starts: dict[str, FusionStart]


@dataclass(frozen=True)
class StoreHeatmaps(Stage[HeatmapsResult]):
    """Store the members' heatmaps of the train and val tiles."""

    name: ClassVar[str] = "heatmaps"
    script: ClassVar[str] = "tune_fusion.py"
    folder: ClassVar[str] = "heatmaps"
    result_type: ClassVar[type[HeatmapsResult]] = HeatmapsResult

    ingest: Committed[IngestResult]
    members: Committed[TrainingResult]

    def fingerprint(self, settings: Settings) -> str:
        """Return the fingerprint of the tiles and the members; with folds, of how their members are trained."""
        folds = settings.heatmaps.folds
        return fingerprint(
            stage=self.name,
            tiles=self.ingest.fingerprint,
            members=self.members.result.weights,
            folds=folds,
            training=settings.members.fingerprint_inputs() if folds > 1 else None,
            precision=settings.evaluate.precision,
            seed=settings.run.seed,
            starts=STARTS,
            views=settings.heatmaps.views,
        )

    def work(self, job: Job, fingerprint: str) -> HeatmapsResult:
        """Write one heatmap shard beside each tile shard."""
        store, settings = job.store, job.settings
        folders: dict[int, dict[str, str]] = {ALL: {name: member_folder(name) for name in MEMBERS}}
        folds, folds_path = settings.heatmaps.folds, None
        if folds > 1:
            indices = read_indices(store)
            fold_of = assign_folds(indices["train"], folds, settings.run.seed)
            for fold in range(1, folds + 1):
                folders[fold] = self._train_fold(job, fingerprint, fold, indices, fold_of)
            folds_path = f"{FOLDS}/{fingerprint[:8]}.parquet"
            write_folds(store, folds_path, indices["train"], fold_of)
        job.ray.start()
        paths = [path for split in SPLITS for path in shard_paths(store, "tiles", split)]
        task = HeatmapTask(
            store,
            Heatmaps(MEMBERS, fingerprint),
            folders,
            folds_path,
            settings.evaluate.threads,
            settings.evaluate.precision,
            settings.heatmaps.views,
        )
        planned = sum(self.ingest.result.tiles[split] for split in SPLITS)
        with job.progress() as progress:
            plan = plan_predictors(job.ray.cluster(), settings, len(paths), ensembles=ensembles_held(folds))
            rows_in, rows_out = write_heatmaps(task, paths, plan, lambda done: progress.show("heatmaps", done, planned))
        current = {task.heatmaps.path(path) for path in paths}
        for split in SPLITS:
            for path in shard_paths(store, "heatmaps", split):
                if path not in current:
                    store.delete(path)
        drawn = {curves_path(folder) for fold in folders.keys() - {ALL} for folder in folders[fold].values()}
        delete_others(store, f"{CURVES}/heatmaps", CURVES_FILE, drawn)
        val = read_committed_index(store, "val")
        starts = fit_starts(ValidationTiles(store, task.heatmaps, group_slides(val.slide_ids)), val.paths)
        return HeatmapsResult(Counts(rows_in, rows_out), folds, starts)

    def tidy(self, store: Store, fingerprint: str) -> None:
        """Delete the folds and their members."""
        store.delete_folder(FOLDS)

    def _train_fold(
        self, job: Job, fingerprint: str, fold: int, indices: dict[str, TileIndex], fold_of: dict[str, int]
    ) -> dict[str, str]:
        """Train members that never saw the tiles of `fold`; return their folders."""
        say(f"heatmaps: members without fold {fold}")
        train = indices["train"]
        others = {**indices, "train": train.select([fold_of[tile] != fold for tile in train.tile_ids])}
        folders: dict[str, str] = {name: f"{FOLDS}/{fold}/{name}" for name in MEMBERS}
        networks = [replace(member_network(job.settings, name, folders[name]), indices=others) for name in MEMBERS]
        train_networks(job, networks, fingerprint, self.ingest.fingerprint)
        for network in networks:
            job.store.delete_folder(state_folder(network, fingerprint))
        return folders


def assign_folds(index: TileIndex, folds: int, seed: int) -> dict[str, int]:
    """Draw the fold of each tile: whole slides where there are enough of them, else tiles.

    Returns:
        Folds from 1 to `folds`, by tile id.

    Raises:
        ApacsError: There are more folds than tiles.
    """
    units = index.slide_ids if len(set(index.slide_ids)) >= folds else index.tile_ids
    names = sorted(set(units))
    if folds > len(names):
        raise ApacsError(f"heatmaps.folds {folds}: there are only {len(names)} tiles to train on; give fewer folds")
    order = np.random.default_rng([seed, 11]).permutation(len(names))
    fold = {names[place]: 1 + number % folds for number, place in enumerate(order)}
    return {tile: fold[unit] for tile, unit in zip(index.tile_ids, units, strict=True)}
