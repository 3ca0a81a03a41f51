"""The report: complete, self-contained, right in what it says, and no name in it becomes markup."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from apacs_ray.config.settings import Settings
from apacs_ray.evaluation.calibration import calibration, calibration_row, calibration_schema
from apacs_ray.evaluation.changes import CHANGES, CHANGES_SCHEMA, changes, changes_row
from apacs_ray.evaluation.metrics import compare, summarize
from apacs_ray.evaluation.per_tile import per_tile_schema, tile_row
from apacs_ray.evaluation.predictions import MODEL_KEYS
from apacs_ray.models.registry import MEMBERS
from apacs_ray.models.spec import FusionStart
from apacs_ray.report.charts import VARIABLES, dice_chart, difference_chart, slide_chart, sweep_charts, training_charts
from apacs_ray.report.overlays import COLORS, LARGEST, overlay, panel
from apacs_ray.report.page import ReportContext, TilePicture, build_report
from apacs_ray.report.summary import TrainedNetworks, best_member, headline, kept_epochs, read_sweep_table, verdict
from apacs_ray.stages.train_fusion import described
from apacs_ray.training.history import EpochRecord

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=y> 切片 &amp;"
KINDS = ("best", "median", "worst", "disagree", "better", "worse")
NETWORKS = (*MEMBERS, "fusion")
SHARES = {"fcn32": 0.3, "fcn16": 0.25, "fcn8": 0.2, "majority": 0.2, "mean": 0.18, "fusion": 0.05, "otsu": 0.7}
SWEPT = {"tiles": {"train": 2000, "val": 500}}
TRIALS = (
    "trial_id,val_dice,val_dice_error,epochs,seconds,error,learning_rate,members\n"
    "a,0.5,0.2,2,1.0,,0.0001,fcn32+fcn8\nb,0.6,0.0,4,1.0,,0.01,fcn16+fcn8\n"
    "c,,,0,1.0,RuntimeError: memory,0.1,fcn16+fcn8\n"
)


def history(*val: float) -> list[EpochRecord]:
    return [EpochRecord(at, 1.0, 0.6, math.nan, dice, 1e-3, 70.0) for at, dice in enumerate(val)]


def charted(dice: float | None) -> dict[str, Any]:
    """Of one model what the charts show."""
    return {"dice": dice, "dice_ci95": None, "per_slide": {"s": {"dice": dice}}}


def per_tile(slides: list[str], fusion: str = "fusion") -> pa.Table:
    """Noise as cells; each model misses its share of them."""
    rng = np.random.default_rng(0)
    models = [key for key in MODEL_KEYS if key in SHARES]
    rows = []
    for number, slide in enumerate(slides):
        truth = rng.random((24, 24)) < 0.5
        masks = {model: truth & (rng.random((24, 24)) > SHARES[model]) for model in models}
        place = {"tile_id": f"{slide}_{number}", "slide_id": slide, "x": 0, "y": 0, "width": 24, "height": 24}
        once = {"once_left": 0, "once_top": 0, "once_right": 24, "once_bottom": 24}
        row = tile_row(place | once, masks, truth, border=0, disputed=MEMBERS)
        for name in NETWORKS:
            row |= calibration_row(name, np.where(masks[name], 0.73, 0.12).astype(np.float32), truth)
        rows.append(row | changes_row(masks["fusion"], masks["fcn8"], truth))
    networks = [field for name in NETWORKS for field in calibration_schema(name)]
    return pa.Table.from_pylist(rows, pa.schema([*per_tile_schema(models), *networks, *CHANGES_SCHEMA]))


def figures(table: pa.Table, models: list[str]) -> dict[str, dict[str, Any]]:
    """What evaluation makes of the rows."""
    metrics = summarize(table, models, 0)
    for name in NETWORKS:
        metrics[name]["calibration"] = calibration(table, name)
    metrics["fusion"]["changes"] = changes(table, "fcn8")
    return metrics


def context(**changes: Any) -> ReportContext:
    table = per_tile([HOSTILE, "b", "c", "d", "e", "f"])
    models = [key for key in MODEL_KEYS if key in SHARES]
    png = panel(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), bool), np.ones((8, 8), bool))
    done = {"state": "done", "seconds": 130.0, "rows_in": 9, "rows_out": 6, "skipped": {HOSTILE: 2}, "rejected": 1}
    reject = {"uri": HOSTILE, "slide_id": None, "x": None, "y": None, "code": "truncated", "reason": HOSTILE}
    values = {
        "title": HOSTILE,
        "output": HOSTILE,
        "metrics": figures(table, models),
        "comparison": compare(table, models, "fusion", 0),
        "trained": TrainedNetworks({name: history(0.4, 0.5) for name in NETWORKS}, dict.fromkeys(NETWORKS, 1)),
        "start": None,
        "views": 1,
        "folds": 1,
        "trials": TRIALS.replace("a,", HOSTILE.replace('"', "") + ",", 1),
        "best": {"learning_rate": 0.01, "members": ["fcn16", "fcn8"]},
        "stages": {"ingest": done, "tune_fusion": {**done, "result": SWEPT}, "evaluate": {"state": "running"}},
        "facts": {"val_unit": "image", "pairs": {"listed": 5, "used": 4, "rejected": 1}},
        "rejects": [reject] * 25,
        "pictures": [TilePicture(kind, 1, HOSTILE, HOSTILE, HOSTILE, png) for kind in KINDS],
        "settings": Settings().model_dump(mode="json") | {"data": {"slide_regex": HOSTILE}},
        "environment": {"python": "3", "packages": {"ray": "2"}, "git": None},
    }
    return ReportContext(**{**values, **changes})


class Page(HTMLParser):
    """Collects tags with their attributes, and checks that they close in order."""

    VOID = frozenset(["meta", "img", "br"])

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


# --- the page


def test_no_name_becomes_markup_and_nothing_is_fetched() -> None:
    html = build_report(context())
    page = Page(html)
    assert "<script" not in html
    assert page.count("img") == len(KINDS)
    for name, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on")], name
        for key in ("src", "href", "xlink:href"):
            value = attributes.get(key)
            assert value is None or value.startswith(("data:image/jpeg;base64,", "#")), value
    assert not re.search(r"url\([^#]|@import|https?:", html)
    assert HOSTILE in page.text


def test_every_part_of_the_report_is_there() -> None:
    page = Page(build_report(context()))
    for words in (
        "All models",
        "Is the fusion better?",
        "best member on validation",
        "Training",
        "Sweep of the fusion",
        "1 trial failed",
        "What it looks like",
        "Annotations to look at again",
        "Cells as objects",
        "Slide by slide",
        "25 × truncated",
        "20 of 25; all are in rejects/",
        "2 min 10 s",
        "5 listed, 4 used, 1 rejected",
        "ray 2",
        "writes this page",
        "tiles.size",
        "learning rate 0.01, members fcn16+fcn8",
    ):
        assert words in page.text, words
    anchors = {attributes["href"] for name, attributes in page.tags if name == "a"}
    assert {f"#{attributes['id']}" for name, attributes in page.tags if name == "section"} == anchors


def test_our_figures_stand_beside_the_paper() -> None:
    made = context()
    html = build_report(made)
    for model, paper in (("fcn8", "0.6877"), ("fusion", "0.7336"), ("majority", "–")):
        row = next(row for row in re.findall(r"<tr.*?</tr>", html, re.S) if f"{made.metrics[model]['iou']:.4f}" in row)
        cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
        assert cells[3] == f"{made.metrics[model]['dice']:.4f}"
        assert cells[-1] == paper


def test_what_the_run_says_of_whole_slides() -> None:
    slides = {"listed": 3, "used": 2, "rejected": 1}
    facts = {"slides": slides, "engines": {"openslide": 2}, "unreadable": {HOSTILE: "99.0%"}}
    page = Page(build_report(context(facts=facts)))
    for words in ("3 listed, 2 used, 1 rejected", "2 openslide", f"{HOSTILE} (99.0% of them read)"):
        assert words in page.text


def test_a_report_without_sweep_rejects_or_several_units() -> None:
    table = per_tile(["only"])
    models = [key for key in MODEL_KEYS if key in SHARES]
    metrics, comparison = figures(table, models), compare(table, models, "fusion", 0)
    made = context(metrics=metrics, comparison=comparison, trials="", best={}, rejects=[], facts={}, pictures=[])
    page = Page(build_report(made))
    assert "Sweep of the fusion" not in page.text
    assert "one unit, no interval" in page.text
    assert "cannot be compared" in page.text
    assert "#sweep" not in {attributes.get("href") for _, attributes in page.tags}


def test_a_test_set_without_cells_still_gives_a_report() -> None:
    empty = dict.fromkeys(("tp", "fp", "fn"), 0)
    undefined = dict.fromkeys(("iou", "dice", "mean_iou", "mean_dice", "boundary_iou", "object_f1"))
    row = {**empty, "tn": 9, "accuracy": 1.0, **undefined, "objects": empty, "tiles": 1, "undefined_tiles": 1}
    row |= {"iou_ci95": None, "dice_ci95": None, "ci_unit": "tile"}
    row["per_slide"] = {"s": {**empty, "tn": 9, "accuracy": 1.0, "iou": None, "dice": None, "tiles": 1}}
    none = {"otsu": {"dice_difference": None, "ci95": None, "unit": "tile", "significant": False}}
    nothing = {"pixels": [9] + [0] * 9, "cells": [0] * 10, "confidence": [0.0] + [None] * 9, "ece": 0.0}
    changed = dict.fromkeys((*CHANGES, "tiles_better", "tiles_worse"), 0) | {"member": "fcn8"}
    metrics = {name: row | {"calibration": nothing, "changes": changed} for name in ("fcn8", "fusion")} | {"otsu": row}
    page = Page(build_report(context(metrics=metrics, comparison=none, trained=TrainedNetworks({}, {}))))
    assert "Dice and IoU are undefined" in page.text
    assert "1 tile has no cell" in page.text


# --- what it says


def test_the_headline_names_the_member_that_was_best_on_validation() -> None:
    made = context()
    histories = {"fcn32": history(0.3, 0.7), "fcn16": history(0.6), "fusion": history(0.9)}
    kept = kept_epochs(histories, {"fcn32": 1, "fcn16": 0, "fusion": 0})
    assert best_member(kept) == "fcn32"
    words = headline(made.metrics, made.comparison, kept)
    difference = made.metrics["fusion"]["dice"] - made.metrics["fcn32"]["dice"]
    assert f"FCN-32 was the best single network on validation; the fusion's Dice is {difference:.3f} higher" in words
    assert "Resampling confirms" in words
    assert best_member({}) is None


@pytest.mark.parametrize(
    ("difference", "span", "words"),
    [
        (0.1, [0.05, 0.2], "fusion is better"),
        (-0.1, [-0.2, -0.05], "fusion is worse"),
        (0.1, [-0.05, 0.2], "not told apart"),
        (None, None, "cannot be compared"),
    ],
)
def test_verdicts(difference: float | None, span: list[float] | None, words: str) -> None:
    significant = span is not None and not span[0] <= 0 <= span[1]
    assert verdict({"dice_difference": difference, "ci95": span, "significant": significant}) == words


def test_the_kept_epochs_are_those_that_the_run_names() -> None:
    kept = kept_epochs({"fcn8": history(0.2, 0.7, 0.1), "fcn16": history()}, {"fcn8": 2, "fcn16": 0})
    assert {name: record.epoch for name, record in kept.items()} == {"fcn8": 2}


def test_a_start_that_was_kept_is_said_to_be_the_fusion() -> None:
    start = FusionStart("fcn8", {"fcn32": 0.0, "fcn16": 0.0, "fcn8": 1.0}, val_dice=0.91)
    before = EpochRecord(-1, math.nan, math.nan, 0.3, 0.91, 0.0, 0.0)
    histories = {"fcn8": history(0.91), "fusion": (before, *history(0.4, 0.5))}
    kept = TrainedNetworks(histories, {"fcn8": 0, "fusion": -1})
    page = Page(build_report(context(trained=kept, start=start)))
    assert "No epoch of its training was better on validation than what it started from, which was kept" in page.text
    assert "no epoch was better on validation, so it is the fusion" in page.text
    assert "What the fusion starts from" in page.text
    assert not {"nan", "+nan"} & set(page.text.lower().split())
    page = Page(build_report(context(trained=TrainedNetworks(histories, {"fcn8": 0, "fusion": 1}), start=start)))
    assert "No epoch of its training was better" not in page.text


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("weighted", (0.2, 0.0, 0.8), ("weighted", "0.200", "0.000", "0.800")),
        ("mean", (1 / 3, 1 / 3, 1 / 3), ("mean", "0.333", "0.333", "0.333")),
        ("fcn8", (0.0, 0.0, 1.0), ("FCN-8", "0.000", "0.000", "1.000")),
    ],
)
def test_the_weights_of_a_start_are_shown(name: str, weights: tuple[float, ...], words: tuple[str, ...]) -> None:
    start = FusionStart(name, dict(zip(("fcn32", "fcn16", "fcn8"), weights, strict=True)), val_dice=0.91)
    text = " ".join(Page(build_report(context(start=start))).text.split())
    assert f"by pooled Dice on validation: {words[0]}. Training adds" in text
    assert f"bias val Dice {' '.join(words[1:])} 1.000 +0.000 0.910" in text
    used = " + ".join(f"{weight:.2f} {member}" for member, weight in start.weights.items() if weight)
    assert described(start) == f"{name} ({used}), val Dice 0.9100"


def test_what_the_fusion_changed_is_counted_and_shown() -> None:
    made = context()
    changed = made.metrics["fusion"]["changes"]
    assert changed["better_cell"] > changed["worse_cell"] > 0  # each only misses cells
    assert changed["better_background"] == changed["worse_background"] == 0
    assert changed["better_cell"] - changed["worse_cell"] == made.metrics["fusion"]["tp"] - made.metrics["fcn8"]["tp"]
    text = Page(build_report(made)).text
    for words in ("of the answer of FCN-8", "Most for better", "Most for worse", "right, where the member is wrong"):
        assert words in text
    better, worse = (changed[name] for name in ("better_cell", "worse_cell"))
    assert f"{better} for better, {worse} for worse" in text
    assert "Most for worse" not in Page(build_report(context(pictures=[]))).text


@pytest.mark.parametrize(("views", "words"), [(4, "its flips;"), (8, "its flips and quarter turns;")])
def test_the_report_says_that_the_fusion_reads_views_and_members_stand_with_one(views: int, words: str) -> None:
    text = Page(build_report(context(views=views))).text
    assert f"over {views} views of a tile, {words} each member stands here with one view" in text
    assert f"It reads its members over {views} views of each tile; they stand here with one." in text
    assert "views of" not in Page(build_report(context())).text


def test_the_report_says_whether_members_saw_the_tiles_of_the_heatmaps() -> None:
    assert "from members that saw those tiles, as in the paper" in Page(build_report(context())).text
    text = Page(build_report(context(folds=3))).text
    assert "from members that had not seen those tiles: others, trained on the rest in 3 folds." in text
    assert "as in the paper: the wider" not in text


def test_the_report_says_on_which_tiles_trials_were_judged() -> None:
    said = "Trials learned from 2 000 train tiles and were judged on 500 val tiles."
    assert said in Page(build_report(context())).text
    assert "judged on" not in Page(build_report(context(stages={"tune_fusion": {"result": {}}}))).text  # of before


def test_the_sweep_is_read_best_first_without_failed_trials() -> None:
    sweep = read_sweep_table(TRIALS)
    assert [trial.name for trial in sweep.trials] == ["b", "a"]
    assert (sweep.failed, sweep.longest, sweep.sampled) == (1, 4, ["learning_rate", "members"])
    assert read_sweep_table("").trials == ()


# --- charts


def test_charts_are_the_same_each_time_and_their_ids_their_own() -> None:
    html = build_report(context())
    assert build_report(context()) == html
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]*)\)", html) + re.findall(r'xlink:href="#([^"]*)"', html)
    assert used
    assert set(used) <= set(ids)
    assert page.count("svg") == 3 + 2 + 4 + 2  # by model; calibration; networks; sampled settings


def test_charts_take_every_color_from_the_style_sheet() -> None:
    css = files("apacs_ray.report").joinpath("templates/report.css").read_text()
    for value, name in VARIABLES.items():
        assert f"--{name}: {value};" in css
    drawings = re.findall(r"<svg.*?</svg>", build_report(context()), re.S)
    assert drawings
    for drawing in drawings:
        assert "var(--" in drawing
        assert not re.search(r"#[0-9a-f]{6}\b|<style", drawing)


def test_a_name_in_a_chart_stays_text() -> None:
    page = Page(dice_chart({"<script>&amp;\"'": charted(0.5), "$x^2$ {": charted(0.6)}))
    assert {"<script>&amp;\"'", "$x^2$ {"} <= set(page.words)
    assert {name for name, _ in page.tags} <= {"svg", "g", "defs", "path", "use", "clippath", "rect", "text"}
    trials = "trial_id,val_dice,epochs,seconds,error,$head$\na,0.5,1,1.0,,<script>\nb,0.6,1,1.0,,$y_0$\n"
    (chart,) = sweep_charts(read_sweep_table(trials))
    assert {"<script>", "$y_0$", "$head$"} <= set(Page(chart).words)


def test_no_chart_without_figures() -> None:
    undefined = {"dice_difference": None, "ci95": None, "unit": "tile", "significant": False}
    assert dice_chart({"fusion": charted(None)}) == ""
    assert slide_chart({"fusion": charted(None)}) == ""
    assert difference_chart({"fcn8": undefined}) == ""
    assert difference_chart({}) == ""
    assert training_charts({"fcn8": []}, {}) == []
    assert sweep_charts(read_sweep_table("")) == []


def test_the_dice_chart_shows_every_model_that_has_a_dice() -> None:
    words = Page(dice_chart({"fcn8": charted(0.8), "fusion": charted(0.85), "otsu": charted(None)})).words
    assert {"FCN-8", "fusion", "0.8000", "0.8500"} <= set(words)
    assert "Otsu, green channel" not in words


def test_many_slides_are_thinned() -> None:
    chart = slide_chart({"fusion": {"per_slide": {f"s{at}": {"dice": at / 1000} for at in range(1000)}}})
    assert chart.count("<use") == 200


@pytest.mark.parametrize(("floor", "words"), [(0.5, "further right"), (-0.5, "further left")])
def test_a_far_floor_does_not_flatten_the_other_differences(floor: float, words: str) -> None:
    rows = {"fcn8": (0.01, [-0.01, 0.02]), "otsu": (floor, [floor - 0.05, floor + 0.05])}
    made = {
        name: {"dice_difference": difference, "ci95": span, "significant": name == "otsu"}
        for name, (difference, span) in rows.items()
    }
    texts = Page(difference_chart(made)).words
    assert any(words in text for text in texts)
    ticks = [float(text.replace("\N{MINUS SIGN}", "-")) for text in texts if re.fullmatch(r"\W?0\.\d{2,3}", text)]
    assert max(ticks) < 0.05
    assert "off the scale" not in difference_chart({"otsu": made["otsu"]})


def test_training_charts_live_with_undefined_epochs() -> None:
    histories = {"fcn8": history(0.2, math.nan, 0.7), "fusion": history()}
    (chart,) = training_charts(histories, kept_epochs(histories, {"fcn8": 2}))
    assert {"FCN-8", "0.7000", "epoch"} <= set(Page(chart).words)
    assert "nan" not in chart
    assert len(training_charts({"fcn8": history(math.nan)}, {"fcn8": history(math.nan)[0]})) == 1


def test_a_sweep_has_a_chart_for_each_sampled_setting_and_none_for_the_epochs() -> None:
    rate, members = sweep_charts(read_sweep_table(TRIALS))
    assert "learning rate" in Page(rate).words
    assert {"members", "16+8", "32+8"} <= set(Page(members).words)
    for chart in (rate, members):
        marks = re.findall(r"<use [^>]*fill: var\(--(\w+)\)", chart)
        assert sorted(marks) == ["card", "fusion"]  # the trial that was stopped early, and the best


# --- pictures


def test_overlay_colors_say_what_they_mean() -> None:
    rgb = np.full((30, 30, 3), 255, np.uint8)
    truth, mask = np.zeros((2, 30, 30), bool)
    truth[2:20, 2:20] = True
    mask[10:28, 2:20] = True
    drawn = overlay(rgb, truth, mask)
    assert tuple(drawn[10, 10]) == COLORS["tp"]  # outline of the overlap
    assert tuple(drawn[27, 10]) == COLORS["fp"]
    assert tuple(drawn[2, 10]) == COLORS["fn"]
    assert tuple(drawn[0, 0]) == (255, 255, 255)
    inside_tp, inside_fp = drawn[15, 10].astype(int), drawn[24, 10].astype(int)
    assert np.abs(inside_tp - 255).sum() < np.abs(inside_fp - 255).sum()


def test_outlines_survive_the_shrinking_of_a_large_tile() -> None:
    truth = np.zeros((1500, 1500), bool)
    truth[300:900, 300:900] = True
    picture = Image.open(io.BytesIO(panel(np.full((1500, 1500, 3), 200, np.uint8), truth, truth)))
    drawn = np.asarray(picture)
    assert drawn.shape[1] == LARGEST
    outline = (drawn == COLORS["tp"]).all(axis=2).sum()
    assert outline >= 4 * 0.9 * 600 * LARGEST / 1500


@pytest.mark.parametrize(
    ("shape", "size"), [((900, 600), (2 * 320 + 6, 480)), ((300, 300), (300, 606)), ((40, 2000), (480, 26))]
)
def test_a_panel_holds_both_pictures(shape: tuple[int, int], size: tuple[int, int]) -> None:
    png = panel(np.zeros((*shape, 3), np.uint8), *np.zeros((2, *shape), bool))
    assert Image.open(io.BytesIO(png)).size == size


def test_pictures_are_small_in_the_page_and_still_the_picture() -> None:
    y, x = np.mgrid[:200, :200]
    rgb = np.stack([120 + 60 * np.sin(x / 30), 120 + 60 * np.cos(y / 20), x / 2 + 40], axis=2).astype(np.uint8)
    png = panel(rgb, x < 90, x < 110)
    html = build_report(context(pictures=[TilePicture("best", 1, "t", "s", "c", png)]))
    encoded = re.search(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert encoded is not None
    embedded = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[1]))), np.int64)
    stored = np.asarray(Image.open(io.BytesIO(png)), np.int64)
    assert embedded.shape == stored.shape
    assert np.abs(embedded - stored).mean() < 3
