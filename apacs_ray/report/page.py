"""`report.html`, one file that needs no other: what it shows, and its rendering. Every name in it is escaped."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from apacs_ray.models.spec import FusionStart
from apacs_ray.report import charts
from apacs_ray.report.overlays import COLORS, data_uri
from apacs_ray.report.summary import NAMES, PAPER, TrainedNetworks, headline, read_sweep_table, verdict

REJECTS_SHOWN = 20
SLIDES_SHOWN = 30
TRIALS_SHOWN = 10
KINDS = (
    ("best", "Best", "what the fusion does well"),
    ("median", "Median", "what to expect"),
    ("worst", "Worst", "where it fails"),
)
LEGEND = (
    ("tp", "found and annotated (TP)"),
    ("fp", "found only (FP)"),
    ("fn", "annotated only (FN)"),
)
CHANGE_LEGEND = (
    ("better", "right, where the member is wrong"),
    ("worse", "wrong, where the member is right"),
)


@dataclass(frozen=True)
class TilePicture:
    """A tile and its overlay.

    Attributes:
        kind: best, median, worst or disagree.
        rank: Counts from 1 within the kind.
        tile_id: Of the tile row.
        slide_id: Of the tile row.
        caption: The words below it.
        png: Tile and overlay, as `overlays.panel` encodes them.
    """

    kind: str
    rank: int
    tile_id: str
    slide_id: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class ReportContext:
    """All that the report shows.

    Attributes:
        title: The data's name.
        output: The run's URI.
        metrics: Model -> figures, of `evaluation.metrics.summarize`.
        comparison: Other model -> its difference from the fusion, of `evaluation.metrics.compare`.
        trained: The networks, with their epochs.
        start: What the fusion starts as; None where its head is the published one.
        views: Of a tile, over which the fusion's members are averaged.
        folds: In which members were trained for the heatmaps of the training tiles; 1: they saw those tiles.
        trials: The text of `tune/trials.csv`, empty without a sweep.
        best: The settings of the trial that was taken, empty without a sweep.
        stages: Stage -> its entry in `run.json`.
        facts: What `run.json` says of the run.
        rejects: All rows.
        pictures: Tiles with overlays.
        settings: Section -> key -> value.
        environment: Versions and machine of the run.
    """

    title: str
    output: str
    metrics: Mapping[str, Mapping[str, Any]]
    comparison: Mapping[str, Mapping[str, Any]]
    trained: TrainedNetworks
    start: FusionStart | None
    views: int
    folds: int
    trials: str
    best: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, Any]
    rejects: Sequence[Mapping[str, Any]]
    pictures: Sequence[TilePicture]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]


def build_report(context: ReportContext) -> str:
    """Render the page as HTML text."""
    environment = Environment(
        loader=PackageLoader("apacs_ray.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "ratio": lambda value: "–" if value is None or math.isnan(value) else f"{value:.4f}",
        "signed": lambda value: "–" if value is None else f"{value:+.4f}",
        "span": lambda bounds, sign="": "–" if not bounds else f"{bounds[0]:{sign}.4f} to {bounds[1]:{sign}.4f}",
        "count": lambda value: f"{value:,}".replace(",", "\N{THIN SPACE}"),
        "duration": _duration,
        "setting": _rounded,
        "name": lambda key: NAMES.get(key, key),
        "data_uri": data_uri,
    }
    swept = context.stages.get("tune_fusion", {}).get("result", {})
    sweep = read_sweep_table(context.trials, swept.get("trial", ""))
    kept = context.trained.kept_epochs
    fusion = context.metrics["fusion"]
    slides = sorted(fusion["per_slide"].items(), key=lambda item: (item[1]["dice"] is None, item[1]["dice"], item[0]))
    return environment.get_template("report.html.j2").render(
        report=context,
        headline=headline(context.metrics, context.comparison, kept, context.views),
        fusion=fusion,
        paper=PAPER,
        best_member=context.trained.best_member,
        verdicts={name: verdict(row) for name, row in context.comparison.items()},
        kept_epochs=kept,
        sweep=sweep,
        sweep_tiles=swept.get("tiles"),
        top_trials=sweep.trials[:TRIALS_SHOWN],
        kinds=KINDS,
        legend=LEGEND,
        change_legend=CHANGE_LEGEND,
        colors={kind: f"rgb{color}" for kind, color in COLORS.items()},
        slides=slides[:SLIDES_SHOWN],
        stages=_stage_rows(context.stages),
        codes=Counter(str(reject["code"]) for reject in context.rejects).most_common(),
        rejects=list(context.rejects)[:REJECTS_SHOWN],
        settings=_flat(context.settings),
        facts=_environment_rows(context),
        charts=charts,
    )


@dataclass(frozen=True)
class _StageRow:
    """One stage; `share` is its part of the longest stage's seconds, in percent."""

    name: str
    state: str
    seconds: float | None
    share: float
    rows_in: int | None
    rows_out: int | None
    skipped: str
    rejected: int | None


def _stage_rows(stages: Mapping[str, Mapping[str, Any]]) -> list[_StageRow]:
    """Return the stages with their counts. The one that writes this page still runs: what it recorded is older."""
    longest = max((stage.get("seconds") or 0.0 for stage in stages.values()), default=0.0) or 1.0
    rows = []
    for name, stage in stages.items():
        if stage.get("state") == "running":
            rows.append(_StageRow(name, "writes this page", None, 0.0, None, None, "", None))
            continue
        skipped = {reason: count for reason, count in (stage.get("skipped") or {}).items() if count}
        seconds = stage.get("seconds")
        rows.append(
            _StageRow(
                name,
                str(stage.get("state", "")),
                seconds,
                round(100 * (seconds or 0.0) / longest, 1),
                stage.get("rows_in"),
                stage.get("rows_out"),
                ", ".join(f"{count} {reason}" for reason, count in skipped.items()),
                stage.get("rejected"),
            )
        )
    return rows


def _environment_rows(context: ReportContext) -> list[tuple[str, str]]:
    """Return the run's facts and environment, a name and a text each."""
    facts = {name.replace("_", " "): value for name, value in context.facts.items() if name != "device"}
    rows = []
    for name, value in (facts | dict(context.environment)).items():
        if name == "packages":
            rows.append((name, ", ".join(f"{key} {version}" for key, version in value.items() if version)))
        elif name == "unreadable":
            slides = ", ".join(f"{slide} ({share} of them read)" for slide, share in value.items())
            rows.append(("slides with unreadable tiles", slides or "–"))
        elif isinstance(value, Mapping):
            rows.append((name, ", ".join(f"{count} {kind}" for kind, count in value.items()) or "–"))
        elif value not in (None, ""):
            rows.append((name, str(value)))
    return rows


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return `section.key` and value of every setting, as they are typed on the command line."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        rows += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, _typed(value))]
    return rows


def _typed(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _rounded(value: str) -> str:
    """Return a sampled setting, numbers with 3 digits."""
    try:
        return f"{float(value):.3g}"
    except ValueError:
        return value


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
