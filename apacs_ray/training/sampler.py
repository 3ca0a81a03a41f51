"""The order of training: which worker sees which tile when, with which weight and seed. Pure arithmetic.

A seeded permutation of the tiles, one an epoch, is cut into global batches, and each batch by rank, so that
the batches do not depend on the number of workers. To keep Parquet reads local the permutation shuffles row
groups, then tiles inside windows of several row groups; data that fits one window gets a full permutation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

WINDOW = 1024  # tiles that are shuffled together
Phase = Literal["train", "val"]


@dataclass(frozen=True)
class SampleRef:
    """One tile's turn: `row` in its split's index, `weight` of its loss in the rank's sum, its own `seed`."""

    epoch: int
    phase: Phase
    step: int
    row: int
    weight: float
    seed: int


def schedule(
    groups: Sequence[int],
    n_val: int,
    *,
    epochs: range,
    batch_size: int,
    rank: int,
    world: int,
    seed: int,
    first_step: int = 0,
    window: int = WINDOW,
) -> Iterator[SampleRef]:
    """Yield what worker `rank` of `world` sees: for each epoch its training tiles in order, then its val tiles.

    `groups` are the tiles in each row group of the training part, in index order. The first epoch begins with step
    `first_step`, for training that was left in the middle of it. The loss of a batch is the
    mean over its tiles; as DDP averages over ranks, each ref weighs world / (tiles in the batch). Every rank
    has the same number of refs in a step, so that all take the same backward passes: one with a tile less
    repeats the first of the batch with weight 0. Each validation tile is seen by one rank.

    Yields:
        A ref for each turn of a tile.
    """
    for epoch in epochs:
        order = permutation(groups, seed, epoch, window)
        for step, start in enumerate(range(0, len(order), batch_size)):
            if epoch == epochs.start and step < first_step:
                continue
            batch = order[start : start + batch_size]
            mine = _cut(batch, rank, world)
            for row in mine:
                yield SampleRef(epoch, "train", step, row, world / len(batch), tile_seed(seed, epoch, row))
            for row in batch[:1] * (-(-len(batch) // world) - len(mine)):
                yield SampleRef(epoch, "train", step, row, 0.0, tile_seed(seed, epoch, row))
        for step, row in enumerate(range(rank, n_val, world)):
            yield SampleRef(epoch, "val", step, row, 1.0, 0)


def permutation(groups: Sequence[int], seed: int, epoch: int, window: int = WINDOW) -> list[int]:
    """Return row numbers of one epoch: row groups shuffled, then tiles inside windows of at least `window` tiles."""
    rng = np.random.default_rng([seed, epoch])
    starts = np.concatenate([[0], np.cumsum(groups)]).astype(np.int64)
    order: list[int] = []
    pending: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    waiting = 0
    for group in rng.permutation(len(groups)):
        pending.append(np.arange(starts[group], starts[group + 1]))
        waiting += groups[group]
        if waiting >= window:
            order.extend(rng.permutation(np.concatenate(pending)).tolist())
            pending, waiting = [], 0
    if pending:
        order.extend(rng.permutation(np.concatenate(pending)).tolist())
    return order


def tile_seed(seed: int, epoch: int, row: int) -> int:
    """Return 64 bits for the augmentation of one tile in one epoch, the same for any number of workers."""
    return int(np.random.SeedSequence([seed, epoch, row]).generate_state(1, np.uint64)[0])


def _cut(batch: list[int], rank: int, world: int) -> list[int]:
    """The contiguous part of a batch that a rank takes; sizes differ by one at most."""
    return batch[len(batch) * rank // world : len(batch) * (rank + 1) // world]
