"""The report's words, and the figures behind them: the paper's, best epochs, the sweep's trials, verdicts."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apacs_ray.models.registry import MEMBERS
from apacs_ray.training.history import START, EpochRecord, score

# accuracy, IoU, Dice on APACS23's own test slides (Scientific Data 11:733, 2024)
PAPER = {
    "fcn32": (0.9740, 0.5630, 0.7204),
    "fcn16": (0.9739, 0.4934, 0.6608),
    "fcn8": (0.9751, 0.5241, 0.6877),
    "fusion": (0.9776, 0.5793, 0.7336),
}
NAMES = {
    "fcn32": "FCN-32",
    "fcn16": "FCN-16",
    "fcn8": "FCN-8",
    "majority": "majority of the three",
    "mean": "mean probability",
    "fusion": "fusion",
    "fusion_published": "fusion, published head",
    "otsu": "Otsu, green channel",
}
NOT_SAMPLED = (
    "trial_id",
    "val_dice",
    "val_dice_error",
    "epochs",
    "seconds",
    "error",
)  # columns of trials.csv that are no setting


@dataclass(frozen=True)
class Trial:
    """A trial that ended well; `setting` holds the sampled settings as written in `trials.csv`.

    `error` is the standard error of its `val_dice` less the highest; None where that was not told.
    """

    name: str
    val_dice: float
    error: float | None
    epochs: int
    seconds: float
    setting: Mapping[str, str]


@dataclass(frozen=True)
class Sweep:
    """The trials of `trials.csv`, the one that was taken first, then the best, and the number that failed."""

    trials: tuple[Trial, ...]
    failed: int

    @property
    def sampled(self) -> list[str]:
        """Names of the settings that differ between trials."""
        names = self.trials[0].setting if self.trials else {}
        return [name for name in names if len({trial.setting[name] for trial in self.trials}) > 1]

    @property
    def longest(self) -> int:
        """Epochs of the longest trial; a shorter one was stopped early."""
        return max((trial.epochs for trial in self.trials), default=0)


def read_sweep_table(trials_csv: str, taken: str = "") -> Sweep:
    """Read the text of `tune/trials.csv`; empty text is a sweep without trials. `taken` is the id of a trial."""
    rows = list(csv.DictReader(io.StringIO(trials_csv)))
    ended = [row for row in rows if row["val_dice"] and not row["error"] and math.isfinite(float(row["val_dice"]))]
    trials = [
        Trial(
            row["trial_id"],
            float(row["val_dice"]),
            float(row["val_dice_error"]) if row.get("val_dice_error") else None,
            int(row["epochs"]),
            float(row["seconds"]),
            {name: value for name, value in row.items() if name not in NOT_SAMPLED},
        )
        for row in ended
    ]
    trials.sort(key=lambda trial: (trial.name == taken, trial.val_dice, trial.name), reverse=True)
    return Sweep(tuple(trials), len(rows) - len(trials))


def kept_epochs(histories: Mapping[str, Sequence[EpochRecord]], kept: Mapping[str, int]) -> dict[str, EpochRecord]:
    """Return the epoch of each network whose weights the run has kept; `kept` is its number."""
    return {name: record for name, history in histories.items() for record in history if record.epoch == kept.get(name)}


@dataclass(frozen=True)
class TrainedNetworks:
    """The networks of a run.

    Attributes:
        histories: Network -> its epochs; -1 is its start, where that is known.
        kept: Network -> the epoch whose weights are kept.
    """

    histories: Mapping[str, Sequence[EpochRecord]]
    kept: Mapping[str, int]

    @property
    def kept_epochs(self) -> dict[str, EpochRecord]:
        """The epoch of each network whose weights are kept."""
        return kept_epochs(self.histories, self.kept)

    @property
    def best_member(self) -> str:
        """The member that was best on validation; without any such figure the finest."""
        return best_member(self.kept_epochs) or MEMBERS[-1]


def best_member(kept: Mapping[str, EpochRecord]) -> str | None:
    """Return the member that was best on validation, which is how one would choose a single network."""
    scores = {name: score(kept[name]) for name in MEMBERS if name in kept}
    return max(scores, key=scores.__getitem__, default=None)


def verdict(row: Mapping[str, Any]) -> str:
    """Put one comparison of `evaluation.metrics.compare` in words."""
    if row["dice_difference"] is None or row["ci95"] is None:
        return "cannot be compared"
    if not row["significant"]:
        return "not told apart"
    return "fusion is better" if row["dice_difference"] > 0 else "fusion is worse"


def headline(
    metrics: Mapping[str, Mapping[str, Any]],
    comparison: Mapping[str, Mapping[str, Any]],
    kept: Mapping[str, EpochRecord],
    views: int = 1,
) -> str:
    """Put the result in a few sentences."""
    fusion = metrics["fusion"]
    if fusion["dice"] is None:
        return "The test tiles hold no cell, annotated or found, so Dice and IoU are undefined."
    span = fusion["dice_ci95"]
    interval = f" (95 % interval {span[0]:.3f} to {span[1]:.3f})" if span else ""
    words = [f"The fusion reaches a pooled Dice of {fusion['dice']:.3f}{interval} on tiles that no selection has seen."]
    if kept.get("fusion") is not None and kept["fusion"].epoch == START:
        words.append("No epoch of its training was better on validation than what it started from, which was kept.")
    if views > 1:
        words.append(f"It reads its members over {views} views of each tile; they stand here with one.")
    member = best_member(kept)
    row = comparison.get(member) if member else None
    if member and row and row["dice_difference"] is not None:
        words.append(
            f"{NAMES.get(member, member)} was the best single network on validation; the fusion's Dice is "
            f"{abs(row['dice_difference']):.3f} {'higher' if row['dice_difference'] >= 0 else 'lower'} than its own."
        )
        if row["ci95"]:
            words.append(
                "Resampling confirms this difference."
                if row["significant"]
                else "Resampling cannot tell this difference from zero."
            )
    return " ".join(words)
