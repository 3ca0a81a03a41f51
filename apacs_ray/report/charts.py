"""The charts of the report, by matplotlib, as inline SVG that takes its colors and font from `report.css`."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from apacs_ray.report.summary import NAMES, PAPER, Sweep
from apacs_ray.training.history import EpochRecord

# the variables of report.css with their values in light mode; a chart names the variable, so dark mode applies to it
INK, SOFT, LINE, CARD = "#1c2733", "#5b6977", "#dfe4ea", "#ffffff"
FUSION, PLAIN, TRAIN, VAL = "#c2410c", "#4b6478", "#9aa7b4", "#0e7490"
VARIABLES = {
    **{INK: "ink", SOFT: "soft", LINE: "line", CARD: "card"},
    **{FUSION: "fusion", PLAIN: "plain", TRAIN: "train", VAL: "val"},
}
STYLE = {
    "svg.fonttype": "none",  # text stays text: the page's font, found by a search
    "text.parse_math": False,  # a '$' in a name is a '$'
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans"],  # its widths, which no font of a page exceeds by much
    **{"text.color": INK, "axes.labelcolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT},
    **{"axes.edgecolor": LINE, "grid.color": LINE, "axes.facecolor": "none", "figure.facecolor": "none"},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.8},
    **{"xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "lines.markersize": 7},
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
}
WIDTH, ROW = 7.2, 0.28  # inches: a chart with a row a model
PANEL = (3.0, 2.1)  # inches: one of several charts in a row
SLIDES_DRAWN = 200  # a model at most
FLOOR = "otsu"  # no rival of the fusion; it must not set the scale on which rivals are compared
Rows = Mapping[str, Mapping[str, Any]]


def dice_chart(metrics: Rows) -> Markup:
    """Draw the pooled Dice of every model with its interval; the paper's figure is a hollow diamond."""
    rows = {name: row for name, row in metrics.items() if row["dice"] is not None}

    def paint(axes: Axes) -> None:
        for place, (name, row) in enumerate(rows.items()):
            _interval(axes, place, row["dice"], row["dice_ci95"], _color(name))
            if name in PAPER:
                axes.plot(PAPER[name][2], place, "D", markersize=6, markerfacecolor="none", markeredgecolor=SOFT)
        _name_rows(axes, {name: f"{row['dice']:.4f}" for name, row in rows.items()})
        axes.set_xlim(_floor(axes.dataLim.x0), 1)

    return _by_model("Pooled Dice of each model with its 95 % interval", rows, paint)


def difference_chart(comparison: Rows) -> Markup:
    """Draw the Dice of the fusion less that of each other model, with its interval; left of 0 the other is better."""
    rows = {name: row for name, row in comparison.items() if row["ci95"] and row["dice_difference"] is not None}
    bounds = [bound for name, row in rows.items() if name != FLOOR or len(rows) == 1 for bound in row["ci95"]]

    def paint(axes: Axes) -> None:
        low, high = min(0.0, *bounds), max(0.0, *bounds)
        room = 0.06 * (high - low) or 0.01
        axes.set_xlim(low - room, high + room)
        axes.axvline(0, color=SOFT, linewidth=1.2)
        for place, (name, row) in enumerate(rows.items()):
            difference = row["dice_difference"]
            if name == FLOOR and not low <= difference <= high:
                right = difference > high
                words = "off the scale, further right →" if right else "← off the scale, further left"
                at = (high if right else low, place)
                axes.text(*at, words, color=SOFT, ha="right" if right else "left", va="center")
            else:
                _interval(axes, place, difference, row["ci95"], FUSION if row["significant"] else PLAIN)
        _name_rows(axes, {name: f"{row['dice_difference']:+.4f}" for name, row in rows.items()})

    return _by_model("Difference of Dice between the fusion and each other model", rows, paint)


def calibration_charts(metrics: Rows, member: str) -> list[Markup]:
    """Draw, of the fusion and a member, the share of cells against the probability said; and the pixels by probability.

    Bins without a pixel are left out.

    Returns:
        Two charts.
    """
    shown = {name: metrics[name]["calibration"] for name in (member, "fusion")}

    def reliability(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1.0)
        for name, row in shown.items():
            bins = list(zip(row["confidence"], row["cells"], row["pixels"], strict=True))
            filled = [(said, cells / pixels) for said, cells, pixels in bins if pixels]
            said, shares = [point[0] for point in filled], [point[1] for point in filled]
            axes.plot(said, shares, ".-", color=_color(name), linewidth=1.6, clip_on=False)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_title("share of cells", loc="left", fontsize=10)
        axes.set_xlabel("probability")

    def histogram(axes: Axes) -> None:
        for order, (name, row) in enumerate(shown.items()):
            width = 1 / (2 * len(row["pixels"]) + 1)
            places = [(number + 0.3 + 0.4 * order) / len(row["pixels"]) for number in range(len(row["pixels"]))]
            total = sum(row["pixels"]) or 1
            axes.bar(places, [pixels / total for pixels in row["pixels"]], width, color=_color(name))
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlim(0, 1)
        axes.set_title("share of pixels", loc="left", fontsize=10)
        axes.set_xlabel("probability")

    words = f"the fusion and {NAMES.get(member, member)}"
    return [
        _svg(f"Share of cells by probability of {words}", PANEL, reliability),
        _svg(f"Share of pixels by probability of {words}", PANEL, histogram),
    ]


def slide_chart(metrics: Rows) -> Markup:
    """Draw the Dice of each slide: a row a model, a dot a slide; the bar is the median."""
    slides = {name: row["per_slide"].values() for name, row in metrics.items()}
    dice = {name: sorted(row["dice"] for row in rows if row["dice"] is not None) for name, rows in slides.items()}
    dice = {name: values for name, values in dice.items() if values}

    def paint(axes: Axes) -> None:
        for place, (name, values) in enumerate(dice.items()):
            drawn = _thinned(values)
            heights = [place + 0.13 * (order % 3 - 1) for order in range(len(drawn))]
            color = _color(name)
            axes.plot(drawn, heights, "o", markersize=5, color=color, alpha=0.55, markeredgewidth=0, clip_on=False)
            axes.plot([median(values)] * 2, [place - 0.33, place + 0.33], color=INK, linewidth=2)
        _name_rows(axes, {name: f"{median(values):.4f}" for name, values in dice.items()})
        axes.set_xlim(_floor(axes.dataLim.x0), 1)

    return _by_model("Dice of each slide by model", dice, paint)


def training_charts(histories: Mapping[str, Sequence[EpochRecord]], kept: Mapping[str, EpochRecord]) -> list[Markup]:
    """Draw train and val Dice by epoch, a panel a network, on one scale for all; `kept` is marked."""
    values = [value for history in histories.values() for r in history for value in (r.train_dice, r.val_dice)]
    lowest = _floor(min((value for value in values if math.isfinite(value)), default=0.0))

    def panel(name: str, history: Sequence[EpochRecord]) -> Markup:
        def paint(axes: Axes) -> None:
            epochs = [record.epoch + 1 for record in history]
            # a dot too, for an epoch between two undefined ones is no line
            axes.plot(epochs, [r.train_dice for r in history], ".--", color=TRAIN, linewidth=1.6, markersize=3)
            axes.plot(epochs, [r.val_dice for r in history], ".-", color=VAL, linewidth=1.6, markersize=3)
            best = kept.get(name)
            if best is not None:
                axes.plot(best.epoch + 1, best.val_dice, "o", color=FUSION, clip_on=False)
                axes.set_title(f"{best.val_dice:.4f}", loc="right", fontsize=10)
            axes.set_title(NAMES.get(name, name), loc="left", fontsize=10)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
            axes.set_ylim(lowest, 1)

        return _svg(f"Train and val Dice of {NAMES.get(name, name)} by epoch", PANEL, paint)

    return [panel(name, history) for name, history in histories.items() if history]


def sweep_charts(sweep: Sweep) -> list[Markup]:
    """Draw the val Dice of the trials against each sampled setting, a panel each; trials stopped early are hollow."""

    def panel(name: str) -> Markup:
        values = [trial.setting[name] for trial in sweep.trials]
        numeric = all(_is_number(value) for value in values)
        kinds = sorted(set(values))
        places = [float(value) if numeric else float(kinds.index(value)) for value in values]

        def paint(axes: Axes) -> None:
            # the best is drawn last, on top
            for order, (place, trial) in reversed(list(enumerate(zip(places, sweep.trials, strict=True)))):
                edge = FUSION if order == 0 else VAL
                face = edge if order == 0 or trial.epochs == sweep.longest else CARD
                axes.plot(
                    place, trial.val_dice, "o", color=edge, markerfacecolor=face, markersize=8 if order == 0 else 6
                )
            axes.set_xlabel(name.replace("_", " "), color=INK)
            if not numeric:
                axes.set_xticks(range(len(kinds)), [kind.replace("fcn", "") for kind in kinds])
                axes.set_xlim(-0.5, len(kinds) - 0.5)
            elif len(kinds) <= 5 and all(place.is_integer() for place in places):
                axes.set_xticks(sorted(set(places)))
            elif _spread_over_decades(places):
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(numticks=5))
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("e-0", "e-")))
                axes.xaxis.set_minor_locator(NullLocator())
            else:
                axes.xaxis.set_major_locator(MaxNLocator(5))

        return _svg(f"Val Dice of the trials by {name}", PANEL, paint)

    return [panel(name) for name in sweep.sampled]


def _by_model(label: str, rows: Mapping[str, Any], paint: Callable[[Axes], None]) -> Markup:
    """Draw a chart with a row a model; empty without rows."""
    return _svg(label, (WIDTH, 0.4 + ROW * len(rows)), paint) if rows else Markup()


def _name_rows(axes: Axes, figures: Mapping[str, str]) -> None:
    """Write the models' names to the left, from top to bottom, and a figure of each to the right."""
    axes.set_yticks(range(len(figures)), [NAMES.get(name, name) for name in figures], color=INK)
    axes.set_ylim(len(figures) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    for place, figure in enumerate(figures.values()):
        axes.text(1.015, place, figure, transform=axes.get_yaxis_transform(), va="center")


def _interval(axes: Axes, place: int, value: float, span: Sequence[float] | None, color: str) -> None:
    if span:
        axes.plot(span, [place, place], color=color, linewidth=3, alpha=0.45, solid_capstyle="round")
    axes.plot(value, place, "o", color=color, clip_on=False)


def _svg(label: str, size: tuple[float, float], paint: Callable[[Axes], None]) -> Markup:
    """Return the chart that `paint` draws, `size` in inches. Screen readers read `label`, which also seeds the ids."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": label}):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.add_subplot())
        sink = io.StringIO()
        figure.savefig(sink, format="svg", metadata={"Date": None})
    box, drawing = re.findall(r'<svg [^>]*viewBox="([^"]*)"[^>]*>(.*)</svg>', sink.getvalue(), re.S)[0]
    # matplotlib's rule for all elements would hold in the whole page; its names of groups are the same in every chart
    drawing = re.sub(r"<metadata>.*?</metadata>|<style [^>]*>.*?</style>", "", drawing, flags=re.S)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)
    drawing = re.sub("|".join(VARIABLES), lambda color: f"var(--{VARIABLES[color[0]]})", drawing)
    return Markup('<svg viewBox="{}" role="img" aria-label="{}">{}</svg>').format(box, label, Markup(drawing))


def _color(model: str) -> str:
    return FUSION if model.startswith("fusion") else PLAIN


def _floor(value: float) -> float:
    """Return the next tenth below, where an axis of Dice starts."""
    return max(0, math.ceil(value * 10) - 1) / 10


def _thinned(values: list[float]) -> list[float]:
    """Return values of evenly spaced ranks, the ends among them, where there are too many to draw."""
    if len(values) <= SLIDES_DRAWN:
        return values
    return [values[round(rank * (len(values) - 1) / (SLIDES_DRAWN - 1))] for rank in range(SLIDES_DRAWN)]


def _spread_over_decades(values: Sequence[float]) -> bool:
    """Return whether a linear axis would crowd most of the values at its low end."""
    low, high = min(values), max(values)
    return low > 0 and high > 20 * low and median(values) < low + (high - low) / 4


def _is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False
