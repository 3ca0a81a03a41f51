"""The report: complete, self-contained, and no name in it becomes markup."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from apacs_ray.report.overlays import COLOURS, overlay, panel
from apacs_ray.report.page import ReportContext, TilePicture, build_report
from apacs_ray.training.record import EpochRecord

HOSTILE = "<script>alert('x')</script>"


def metrics(dice: float | None) -> dict[str, object]:
    ratios = {"tp": 1, "fp": 1, "tn": 1, "fn": 1, "accuracy": 0.5, "iou": dice, "dice": dice}
    more = {"mean_iou": dice, "mean_dice": dice, "boundary_iou": None, "tiles": 4, "undefined_tiles": 1}
    interval = None if dice is None else [dice - 0.1, dice + 0.1]
    objects = {"objects": {"tp": 1, "fp": 0, "fn": 2}, "object_f1": 0.5, "per_slide": {HOSTILE: {**ratios, "tiles": 4}}}
    return {**ratios, **more, **objects, "iou_ci95": interval, "dice_ci95": interval, "ci_unit": "tile"}


def context(**changes: object) -> ReportContext:
    history = [EpochRecord(0, 1.0, 0.5, 1.0, 0.4, 1e-3, 2.0), EpochRecord(1, 0.9, 0.6, float("nan"), 0.5, 1e-3, 2.0)]
    rgb = np.zeros((8, 8, 3), np.uint8)
    png = panel(rgb, np.zeros((8, 8), bool), np.ones((8, 8), bool))
    values = {
        "title": HOSTILE,
        "output": "runs/x",
        "metrics": {"fcn8": metrics(0.8), "fusion": metrics(0.9), "otsu": metrics(None)},
        "comparison": {"fcn8": {"dice_difference": 0.1, "ci95": [0.05, 0.2], "unit": "tile", "significant": True}},
        "histories": {"fcn8": history, "fusion": history},
        "trials": "trial_id,val_dice,epochs,seconds,error,learning_rate\na,0.5,2,1.0,,0.001\nb,0.6,2,1.0,,0.01\n",
        "best": {"learning_rate": 0.01},
        "stages": {
            "ingest": {"state": "done", "seconds": 3.0, "rows_in": 4, "rows_out": 4, "skipped": {}, "rejected": 0}
        },
        "facts": {"val_unit": "image", "pairs": {"listed": 5, "used": 4, "rejected": 1}},
        "rejects": [{"uri": HOSTILE, "slide_id": None, "x": None, "y": None, "code": "truncated", "reason": HOSTILE}],
        "pictures": [TilePicture(kind, 1, HOSTILE, "s", "c", png) for kind in ("best", "median", "worst", "disagree")],
        "settings": {"a": HOSTILE},
        "environment": {"python": "3"},
    }
    return ReportContext(**{**values, **changes})  # type: ignore[arg-type]


def test_every_part_is_there_and_names_are_escaped() -> None:
    page = build_report(context())
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("data:image/png;base64,") == 4
    assert page.count("<svg") == 4
    for text in ("68.77%", "truncated", "fusion is better", "Annotations to look at again", "0.9000", "learning_rate"):
        assert text in page
    assert 'src="http' not in page
    assert 'href="http' not in page.replace('href="http://www.w3.org', "")


def test_without_a_sweep_there_is_no_sweep_section() -> None:
    assert "Sweep of the fusion" not in build_report(context(trials="", best={}))


def test_overlay_colours_say_what_they_mean() -> None:
    rgb = np.full((30, 30, 3), 255, np.uint8)
    truth, mask = np.zeros((2, 30, 30), bool)
    truth[2:20, 2:20] = True
    mask[10:28, 2:20] = True
    drawn = overlay(rgb, truth, mask)
    assert tuple(drawn[10, 10]) == COLOURS["tp"]  # outline of the overlap
    assert tuple(drawn[27, 10]) == COLOURS["fp"]
    assert tuple(drawn[2, 10]) == COLOURS["fn"]
    assert tuple(drawn[0, 0]) == (255, 255, 255)
    picture = Image.open(io.BytesIO(panel(np.zeros((900, 600, 3), np.uint8), *np.zeros((2, 900, 600), bool))))
    assert picture.size == (2 * 280 + 6, 420)
