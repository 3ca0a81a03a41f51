"""The figures of an epoch, summed batch by batch: mean loss, pooled Dice, and losses that are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from apacs_ray.training.batch import Batch
from apacs_ray.training.ranks import Ranks
from apacs_ray.training.step import StepOutput


@dataclass(frozen=True, order=True)
class SeenBatch:
    """Which tiles a batch held, on the host."""

    step: int
    tile_ids: tuple[str, ...]


class EpochTally:
    """Sums over one phase of an epoch, kept on the device: no step waits for the host.

    With `units`, the number of each tile's unit, pixels are counted by unit as well.
    """

    def __init__(self, device: torch.device, units: Mapping[str, int] | None = None) -> None:
        self._units = units
        count = max(units.values(), default=-1) + 1 if units else 0
        self._by_unit = torch.zeros(count, 3, dtype=torch.float64, device=device)  # overlap, predicted, true
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)  # loss, tiles, overlap, predicted, true
        self._losses: list[Tensor] = []
        self._batches: list[SeenBatch] = []

    def add(self, batch: Batch, output: StepOutput, counted: Tensor) -> None:
        """Add a batch; tiles with `counted` (N,) 0 are repeats and take no part, others have 1."""
        valid = output.valid
        true = output.mask * valid * counted[:, None, None, None]
        predicted = (output.logits >= 0) * valid * counted[:, None, None, None]
        parts = (predicted * true, predicted, true)
        by_tile = torch.stack([part.sum(dim=(1, 2, 3), dtype=torch.float64) for part in parts], dim=1)
        self._sums += torch.stack(
            [(output.losses * counted).sum().double(), counted.sum().double(), *by_tile.sum(dim=0)]
        )
        if self._units is not None:
            numbers = torch.tensor([self._units[tile] for tile in batch.tile_ids])
            self._by_unit.index_add_(0, numbers.to(self._by_unit.device), by_tile)
        self._losses.append(output.losses)
        self._batches.append(SeenBatch(batch.step, batch.tile_ids))

    def first_not_finite(self) -> SeenBatch | None:
        """Return the first batch with a loss that is not finite. The only wait for the device, once an epoch."""
        if not self._losses:
            return None
        finite = torch.isfinite(torch.cat(self._losses)).cpu()
        parts = torch.split(finite, [len(seen.tile_ids) for seen in self._batches])
        return next((seen for seen, part in zip(self._batches, parts, strict=True) if not part.all()), None)

    def sums(self, ranks: Ranks) -> tuple[float, ...]:
        """Return the sums over all ranks so far."""
        return tuple(ranks.all_reduce(self._sums.clone()).tolist())

    def add_sums(self, sums: tuple[float, ...]) -> None:
        """Add what an earlier part of the epoch gathered."""
        self._sums += torch.tensor(sums, dtype=self._sums.dtype, device=self._sums.device)

    def unit_counts(self, ranks: Ranks) -> list[list[int]]:
        """Return the pixels of each unit over all ranks: cell by both, by the network, in truth; [] without units."""
        if self._units is None:
            return []
        counts: list[list[float]] = ranks.all_reduce(self._by_unit.clone()).tolist()
        return [[round(count) for count in unit] for unit in counts]

    def result(self, ranks: Ranks) -> tuple[float, float, int]:
        """Return mean loss over tiles and pooled Dice, over all ranks (NaN where there was nothing), and the tiles."""
        loss, tiles, overlap, predicted, true = self.sums(ranks)
        dice = 2 * overlap / (predicted + true) if predicted + true else math.nan
        return loss / tiles if tiles else math.nan, dice, round(tiles)
