"""The history of a training, one record an epoch, and which epoch is the best. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from apacs_ray.config.training_settings import Select
from apacs_ray.models.spec import FusionStart

VAL_UNITS = "val_units"
START = -1  # the epoch of a network that has not been trained yet


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of training. Losses are means over tiles; Dice is pooled over pixels (of the crops, in training).

    Epoch -1 (`START`) is the network before any: it has no training figures.
    """

    epoch: int
    train_loss: float
    train_dice: float
    val_loss: float
    val_dice: float
    learning_rate: float
    seconds: float


def start_record(start: FusionStart | None, dice_weight: float) -> EpochRecord | None:
    """Return what validation says of a network as it is built; None of one that says nothing before it is trained."""
    if start is None:
        return None
    dice = math.nan if start.val_dice is None else start.val_dice
    return EpochRecord(START, math.nan, math.nan, start.val_loss(dice_weight), dice, 0.0, 0.0)


@dataclass(frozen=True)
class EpochPart:
    """An epoch that was left after `steps` of its steps: sums over its training tiles so far, on all ranks."""

    epoch: int
    steps: int
    sums: tuple[float, ...]
    seconds: float


def score(record: EpochRecord, select: Select = "dice") -> tuple[float, float, int]:
    """Return what decides which epoch's weights are kept; larger is better.

    By `dice` validation Dice decides, of equals the lower validation loss, of equals the earlier epoch. A Dice that is
    not defined (nothing true, nothing predicted) counts as 0: where validation tiles hold no cell, the loss alone tells
    an epoch that rightly finds nothing from one of false positives. Where no epoch finds a cell yet, it tells who
    learns. By `loss` the loss decides first.

    Returns:
        Dice in 0..1, the negative loss, the negative epoch; by `loss` the first two change places.
    """
    dice = 0.0 if math.isnan(record.val_dice) else record.val_dice
    first, second = (dice, -record.val_loss) if select == "dice" else (-record.val_loss, dice)
    return first, second, -record.epoch


def best_record(history: Iterable[EpochRecord], select: Select = "dice") -> EpochRecord | None:
    """Return the epoch of the highest `score`; None without any."""
    return max(history, key=lambda record: score(record, select), default=None)


def epochs_since_best(history: tuple[EpochRecord, ...], select: Select = "dice") -> int:
    """Return how many epochs came after the one with the highest `score`."""
    best = best_record(history, select)
    return history[-1].epoch - best.epoch if best else 0


def progress_metrics(history: tuple[EpochRecord, ...]) -> dict[str, float]:
    """Return what Ray and people hear: epochs done, validation Dice (0 where undefined, or before any), the best."""
    dice = [0.0 if math.isnan(record.val_dice) else record.val_dice for record in history] or [0.0]
    return {"epoch": len(history), "val_dice": dice[-1], "best_val_dice": max(dice)}


def unit_metrics(counts: list[list[int]]) -> dict[str, str]:
    """Return the counts by unit of an epoch's validation as Ray carries them, in a metric; nothing without counts."""
    return {VAL_UNITS: json.dumps(counts, separators=(",", ":"))} if counts else {}


def history_csv(history: tuple[EpochRecord, ...]) -> str:
    """Return the text of `history.csv`: a header, and a line an epoch."""
    header = ",".join(EpochRecord.__dataclass_fields__)
    return "\n".join([header, *(",".join(f"{value:.6g}" for value in asdict(r).values()) for r in history)]) + "\n"


def read_history(text: str) -> tuple[EpochRecord, ...]:
    """Return the records of a `history.csv`."""
    header, *lines = text.splitlines()
    rows = [dict(zip(header.split(","), map(float, line.split(",")), strict=True)) for line in lines]
    return tuple(EpochRecord(**{**row, "epoch": int(row["epoch"])}) for row in rows)  # type: ignore[arg-type]
