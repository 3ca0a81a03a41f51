"""Charts of the report as inline SVG, with matplotlib."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from apacs_ray.training.record import EpochRecord, score

TRAIN, VAL, ACCENT, GREY = "#9aa5b1", "#0b7285", "#d9480f", "#868e96"


def training_curves(histories: Mapping[str, Sequence[EpochRecord]]) -> str:
    """Train and val Dice by epoch, a panel a network."""
    figure, axes = plt.subplots(1, len(histories), figsize=(3.1 * len(histories), 2.7), sharey=True, squeeze=False)
    for axis, (name, history) in zip(axes[0], histories.items(), strict=True):
        epochs = [record.epoch + 1 for record in history]
        axis.plot(epochs, [record.train_dice for record in history], color=TRAIN, label="train (crops)")
        axis.plot(epochs, [record.val_dice for record in history], color=VAL, label="val")
        best = max(history, key=score)
        axis.plot(best.epoch + 1, best.val_dice, "o", color=ACCENT, markersize=5, label="kept")
        axis.set_title(f"{name}: {best.val_dice:.3f}", fontsize=10, loc="left")
        axis.set_xlabel("epoch")
        axis.set_ylim(0, 1)
    axes[0][0].set_ylabel("Dice")
    axes[0][-1].legend(fontsize=8, frameon=False, loc="lower right")
    return _svg(figure)


def dice_bars(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Pooled Dice of every model with its interval."""
    names = [name for name, row in metrics.items() if row["dice"] is not None]
    figure, axis = plt.subplots(figsize=(6.6, 0.36 * len(names) + 0.7))
    for place, name in enumerate(reversed(names)):
        row = metrics[name]
        colour = ACCENT if name.startswith("fusion") else VAL
        axis.barh(place, row["dice"], color=colour, alpha=0.85, height=0.62)
        if row["dice_ci95"]:
            axis.plot(row["dice_ci95"], [place, place], color="#212529", linewidth=1.6)
        axis.text(0.01, place, f"{row['dice']:.4f}", va="center", color="white", fontsize=8)
    axis.set_yticks(range(len(names)), list(reversed(names)))
    axis.set_xlim(0, 1)
    axis.set_xlabel("pooled Dice, with 95 % interval")
    return _svg(figure)


def sweep_chart(trials: str) -> str:
    """Val Dice of every trial against each number that was drawn."""
    rows = [row for row in csv.DictReader(io.StringIO(trials)) if row["val_dice"]]
    numbers = [name for name in (rows[0] if rows else {}) if name not in ("trial_id", "val_dice", "seconds", "error")]
    drawn = [name for name in numbers if all(_is_number(row[name]) for row in rows)]
    if not rows or not drawn:
        return ""
    figure, axes = plt.subplots(1, len(drawn), figsize=(2.5 * len(drawn), 2.5), sharey=True, squeeze=False)
    best = max(rows, key=lambda row: float(row["val_dice"]))
    for axis, name in zip(axes[0], drawn, strict=True):
        values = [float(row[name]) for row in rows]
        axis.scatter(values, [float(row["val_dice"]) for row in rows], color=VAL, alpha=0.7, s=18)
        axis.scatter([float(best[name])], [float(best["val_dice"])], color=ACCENT, s=34)
        axis.set_xlabel(name)
        if min(values) > 0 and max(values) > 20 * min(values):
            axis.set_xscale("log")
    axes[0][0].set_ylabel("val Dice")
    return _svg(figure)


def stage_chart(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Seconds of each stage."""
    timed = {name: stage["seconds"] for name, stage in stages.items() if stage.get("seconds")}
    if not timed:
        return ""
    figure, axis = plt.subplots(figsize=(6.6, 0.32 * len(timed) + 0.6))
    axis.barh(range(len(timed)), list(timed.values()), color=GREY, height=0.6)
    axis.set_yticks(range(len(timed)), list(timed))
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    return _svg(figure)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _svg(figure: Figure) -> str:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    sink = io.StringIO()
    figure.savefig(sink, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = sink.getvalue()
    return text[text.index("<svg") :]
