"""Where fusions start, fitted on the validation tiles from stored heatmaps in three passes. Only counts come back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from apacs_ray.data.shard_rows import opened_shard
from apacs_ray.distributed.tasks import map_numbers
from apacs_ray.models.spec import FusionStart, start_key
from apacs_ray.storage import Store
from apacs_ray.training.augment import Pixels
from apacs_ray.training.dataset import Heatmaps, decode_pixels, decode_tile_mask
from apacs_ray.training.start import (
    FOLDS,
    Levels,
    Overlap,
    best_start,
    fitted_start,
    loss_terms,
    member_sets,
    overlaps,
    rule,
    weighted_starts,
)


@dataclass(frozen=True)
class ValidationTiles:
    """The annotated tiles of validation, with their stored heatmaps; small, as it travels with tasks.

    `fold_of` gives the group, from 0, of each slide.
    """

    store: Store
    heatmaps: Heatmaps
    fold_of: Mapping[str, int]

    def read(self, path: str) -> Iterator[tuple[int, Pixels, Pixels]]:
        """Yield fold, heatmaps (H, W, M) uint8 and mask (H, W) uint8 in {0, 1} of each annotated tile of a shard."""
        with opened_shard(self.store, path) as tiles, opened_shard(self.store, self.heatmaps.path(path)) as stored:
            for tile, beside in zip(tiles.rows(["slide_id", "mask"]), stored.rows(["heatmaps"]), strict=True):
                if tile["mask"] is not None:
                    heatmaps, mask = decode_pixels(beside["heatmaps"]), decode_tile_mask(tile["mask"])
                    yield self.fold_of[tile["slide_id"]], heatmaps, mask


def group_slides(slide_ids: Iterable[str]) -> dict[str, int]:
    """Return the fold of each slide, as even as can be, at most `FOLDS` of them."""
    return {slide: number % FOLDS for number, slide in enumerate(sorted(set(slide_ids)))}


def fit_starts(tiles: ValidationTiles, paths: Sequence[str]) -> dict[str, FusionStart]:
    """Fit the start of a fusion of every set of members.

    Args:
        tiles: How they are read.
        paths: Of the shards of validation tiles.

    Returns:
        The best start by `start_key` of its members.
    """
    folds = _count_levels(tiles, paths)
    candidates = {members: weighted_starts(members) for members in member_sets()}
    for members, starts in candidates.items():
        if (fitted := fitted_start(folds, members)) is not None:
            starts.append(fitted)
    different = list({rule(start): start for starts in candidates.values() for start in starts}.values())
    found = dict(zip(map(rule, different), _find(tiles, paths, different), strict=True))
    best = {
        start_key(members): best_start(starts, [found[rule(start)] for start in starts])
        for members, starts in candidates.items()
    }
    return dict(zip(best, _with_losses(tiles, paths, list(best.values())), strict=True))


def _count_levels(tiles: ValidationTiles, paths: Sequence[str]) -> list[Levels]:
    """Count the pixels of each group of slides."""
    count = max(tiles.fold_of.values(), default=-1) + 1

    def count_shard(number: int) -> bytes:
        parts: list[list[Levels]] = [[] for _ in range(count)]
        for fold, heatmaps, mask in tiles.read(paths[number]):
            parts[fold].append(Levels.of(heatmaps, mask))
        rows = [
            np.stack([np.full_like(levels.place, fold), levels.place, levels.background, levels.cell])
            for fold, levels in enumerate(map(Levels.added, parts))
        ]
        return np.concatenate([np.zeros((4, 0), np.int64), *rows], axis=1).tobytes()

    totals = [Levels.added([])] * count
    for content in map_numbers(count_shard, len(paths)):
        folds, *levels = np.frombuffer(content, np.int64).reshape(4, -1)
        totals = [
            Levels.added([total, Levels(*(column[folds == fold] for column in levels))])
            for fold, total in enumerate(totals)
        ]
    return totals


def _find(tiles: ValidationTiles, paths: Sequence[str], starts: Sequence[FusionStart]) -> list[Overlap]:
    """Count what each candidate finds on all tiles."""

    def find(number: int) -> bytes:
        found = np.zeros((len(starts), 3), np.int64)
        for _, *tile in tiles.read(paths[number]):
            found += overlaps(starts, *tile)
        return found.tobytes()

    total = np.zeros((len(starts), 3), np.int64)
    for content in map_numbers(find, len(paths)):
        total += np.frombuffer(content, np.int64).reshape(-1, 3)
    return [Overlap(*row) for row in total.tolist()]


def _with_losses(tiles: ValidationTiles, paths: Sequence[str], starts: Sequence[FusionStart]) -> list[FusionStart]:
    """Return starts with the means over all tiles of the terms of their loss."""

    def lose(number: int) -> bytes:
        return np.array(
            [[loss_terms(start, *tile) for start in starts] for _, *tile in tiles.read(paths[number])]
        ).tobytes()

    parts = [np.frombuffer(content).reshape(-1, len(starts), 2) for content in map_numbers(lose, len(paths))]
    means = np.concatenate([np.zeros((0, len(starts), 2)), *parts])
    if not len(means):
        return list(starts)
    return [
        replace(start, val_entropy=entropy, val_soft_dice=soft_dice)
        for start, (entropy, soft_dice) in zip(starts, means.mean(axis=0).tolist(), strict=True)
    ]
