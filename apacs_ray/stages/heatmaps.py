"""Heatmaps: what the frozen members say of every training and val tile, stored once for all fusion training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from apacs_ray.console import say
from apacs_ray.data.shards import TileIndex, shard_paths
from apacs_ray.distributed.heatmaps import ALL, HeatmapTask, write_heatmaps
from apacs_ray.distributed.pool import plan_pool
from apacs_ray.models.spec import MEMBERS
from apacs_ray.runs.markers import Counts
from apacs_ray.runs.provenance import fingerprint
from apacs_ray.stages.pipeline import Context, Outcome, Stage
from apacs_ray.stages.train_members import member_network
from apacs_ray.stages.train_networks import read_indices, state_folder, train_networks
from apacs_ray.training.dataset import Heatmaps

SPLITS = ("train", "val")  # test tiles are read by `evaluate` only


def _fingerprint(context: Context) -> str:
    settings = context.settings
    return fingerprint(
        stage="heatmaps",
        tiles=context.done("ingest").fingerprint,
        members=context.done("train_members").info,
        folds=settings.heatmaps.folds,
        training=settings.members.model_dump(exclude={"workers", "mode"}) if settings.heatmaps.folds > 1 else None,
        precision=settings.evaluate.precision,
        seed=settings.run.seed,
    )


def _work(context: Context, mark: str) -> Outcome:
    store, settings = context.run.store, context.settings
    folders: dict[int, dict[str, str]] = {ALL: {name: f"members/{name}" for name in MEMBERS}}
    fold_of: dict[str, int] = {}
    folds = settings.heatmaps.folds
    if folds > 1:
        indices = read_indices(store)
        fold_of = assign_folds(indices["train"], folds, settings.run.seed)
        for fold in range(1, folds + 1):
            folders[fold] = _train_fold(context, mark, fold, indices, fold_of)
    context.ray.start()
    paths = [path for split in SPLITS for path in shard_paths(store, "tiles", split)]
    task = HeatmapTask(
        store,
        Heatmaps(MEMBERS, mark),
        folders,
        fold_of,
        settings.evaluate.threads,
        settings.evaluate.precision,
    )
    planned = sum(context.run.facts["tiles"][split] for split in SPLITS)
    with context.bars() as shown:
        plan = plan_pool(context.ray.cluster(), len(paths))
        rows_in, rows_out = write_heatmaps(task, paths, plan, lambda done: shown.show("heatmaps", done, planned))
    current = {task.heatmaps.path(path) for path in paths}
    for split in SPLITS:
        for path in shard_paths(store, "heatmaps", split):
            if path not in current:
                store.delete(path)
    return Outcome(Counts(rows_in, rows_out), {"folds": folds}, lambda: store.delete_folder("heatmaps/folds"))


def _train_fold(
    context: Context, mark: str, fold: int, indices: dict[str, TileIndex], fold_of: dict[str, int]
) -> dict[str, str]:
    """Members that never saw the tiles of `fold`; returns their folders."""
    say(f"heatmaps: members without fold {fold}")
    train = indices["train"]
    part = {**indices, "train": train.select([fold_of[tile] != fold for tile in train.tile_ids])}
    folders: dict[str, str] = {name: f"heatmaps/folds/{fold}/{name}" for name in MEMBERS}
    networks = [replace(member_network(context, name, folders[name]), indices=part) for name in MEMBERS]
    train_networks(context, networks, mark)
    for network in networks:
        context.run.store.delete_folder(state_folder(network, mark))
    return folders


def assign_folds(index: TileIndex, folds: int, seed: int) -> dict[str, int]:
    """tile_id -> fold 1 ... `folds`; a slide stays in one fold where there are enough slides, else tiles are drawn."""
    units = index.slide_ids if len(set(index.slide_ids)) >= folds else index.tile_ids
    names = sorted(set(units))
    order = np.random.default_rng([seed, 11]).permutation(len(names))
    fold = {names[place]: 1 + number % folds for number, place in enumerate(order)}
    return {tile: fold[unit] for tile, unit in zip(index.tile_ids, units, strict=True)}


HEATMAPS = Stage("heatmaps", "heatmaps", _fingerprint, _work)
