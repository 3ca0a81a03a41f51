"""`report.html`: one file that needs nothing else, worth looking at. Every name in it is escaped."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from apacs_ray.report.charts import dice_bars, stage_chart, sweep_chart, training_curves
from apacs_ray.report.overlays import COLOURS
from apacs_ray.training.record import EpochRecord

# accuracy, IoU, Dice on APACS23's own test slides (Scientific Data 11:733, 2024)
PAPER = {
    "fcn32": (0.9740, 0.5630, 0.7204),
    "fcn16": (0.9739, 0.4934, 0.6608),
    "fcn8": (0.9751, 0.5241, 0.6877),
    "fusion": (0.9776, 0.5793, 0.7336),
}
REJECTS_SHOWN = 20


@dataclass(frozen=True)
class TilePicture:
    """A tile beside its overlay. `kind`: best, median, worst or disagree."""

    kind: str
    rank: int
    tile_id: str
    slide_id: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class ReportContext:
    """Everything the report shows."""

    title: str
    output: str
    metrics: Mapping[str, Mapping[str, Any]]
    comparison: Mapping[str, Mapping[str, Any]]
    histories: Mapping[str, Sequence[EpochRecord]]
    trials: str
    best: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, Any]
    rejects: Sequence[Mapping[str, Any]]
    pictures: Sequence[TilePicture]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]


def build_report(context: ReportContext) -> str:
    """The page as HTML text."""
    environment = Environment(
        loader=PackageLoader("apacs_ray.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"ratio": _ratio, "percent": _percent, "data_uri": _data_uri}
    return environment.get_template("report.html.j2").render(
        report=context,
        paper=PAPER,
        colours={kind: f"rgb{colour}" for kind, colour in COLOURS.items()},
        charts={
            "dice": Markup(dice_bars(context.metrics)),
            "training": Markup(training_curves(context.histories)),
            "sweep": Markup(sweep_chart(context.trials)),
            "stages": Markup(stage_chart(context.stages)),
        },
        kinds=(
            ("best", "Best tiles", "What the fusion does well."),
            ("median", "Median tiles", "What to expect."),
            ("worst", "Worst tiles", "Where it fails; look here first."),
        ),
        codes=Counter(str(reject["code"]) for reject in context.rejects),
        rejects=list(context.rejects)[:REJECTS_SHOWN],
    )


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
