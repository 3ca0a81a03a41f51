"""Counts, ratios, objects, intervals, and the models that need no training."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from apacs_ray.data.grid import grid, owned_region
from apacs_ray.errors import ApacsError
from apacs_ray.evaluation import bootstrap
from apacs_ray.evaluation.bootstrap import resample
from apacs_ray.evaluation.calibration import BINS, calibration, calibration_row, calibration_schema
from apacs_ray.evaluation.changes import CHANGES, CHANGES_SCHEMA, changes, changes_row, gains
from apacs_ray.evaluation.metrics import compare, dice_of, iou_of, summarize
from apacs_ray.evaluation.objects import boundary, label_objects, match_objects
from apacs_ray.evaluation.per_tile import confusion, per_tile_schema, tile_row
from apacs_ray.evaluation.predictions import MODEL_KEYS, otsu, predictions, sigmoid
from apacs_ray.models.registry import MEMBERS

MODELS = ("fusion", "otsu")
PIXELS = ("tp", "fp", "tn", "fn")


def whole(height: int, width: int, **more: Any) -> dict[str, Any]:
    tile = {"tile_id": "t", "slide_id": "s", "x": 0, "y": 0, "width": width, "height": height}
    once = {"once_left": 0, "once_top": 0, "once_right": width, "once_bottom": height}
    return {**tile, **once, **more}


def table(tiles: list[tuple[str, np.ndarray, np.ndarray]]) -> pa.Table:
    """Rows for (slide, prediction, truth); otsu predicts nothing."""
    rows = []
    for number, (slide, mask, truth) in enumerate(tiles):
        tile = whole(*truth.shape, tile_id=f"t{number:02}", slide_id=slide)
        masks = {"fusion": mask, "otsu": np.zeros_like(mask)}
        rows.append(tile_row(tile, masks, truth, border=0, disputed=MODELS))
    return pa.Table.from_pylist(rows, per_tile_schema(MODELS))


def noisy_tiles(number: int, slides: int, seed: int = 0) -> list[tuple[str, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    tiles = []
    for at in range(number):
        truth = rng.random((12, 12)) < rng.uniform(0.1, 0.6)
        tiles.append((f"s{at % slides}", truth ^ (rng.random((12, 12)) < rng.uniform(0, 0.3)), truth))
    return tiles


# --- counts of one tile


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 40))
def test_a_row_counts_the_pixels_of_its_region_one_by_one(seed: int, border: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(3, 30, 2))
    left, right = sorted(int(side) for side in rng.integers(0, width + 1, 2))
    top, bottom = sorted(int(side) for side in rng.integers(0, height + 1, 2))
    truth, mask = rng.random((2, height, width)) < 0.4
    once = {"once_left": left, "once_right": right, "once_top": top, "once_bottom": bottom}
    row = tile_row(whole(height, width, **once), {"fusion": mask}, truth, border=border, disputed=("fusion",))
    expected = dict.fromkeys(PIXELS, 0)
    for y in range(height):
        for x in range(width):
            inside = border <= y < height - border and border <= x < width - border
            if inside and top <= y < bottom and left <= x < right:
                expected[("tp" if mask[y, x] else "fn") if truth[y, x] else ("fp" if mask[y, x] else "tn")] += 1
    assert {kind: row[f"fusion_{kind}"] for kind in PIXELS} == expected
    assert all(type(row[f"fusion_{kind}"]) is int for kind in PIXELS)
    total = sum(expected.values())
    assert row["disagreement"] == pytest.approx((expected["fp"] + expected["fn"]) / total if total else 0.0)


@pytest.mark.parametrize(("stride", "last"), [(20, "shift"), (13, "keep"), (13, "shift"), (20, "keep")])
def test_overlapping_tiles_count_each_source_pixel_once(stride: int, last: Any) -> None:
    rng = np.random.default_rng(4)
    truth, mask = rng.random((2, 47, 65)) < 0.4
    sums = dict.fromkeys(PIXELS, 0)
    for box in grid(65, 47, 20, stride, last):
        left, top, right, bottom = owned_region(box.x, box.y, 65, 47, 20, stride, last)
        part = np.s_[box.y : box.y + box.height, box.x : box.x + box.width]
        once = {"once_left": left, "once_top": top, "once_right": right, "once_bottom": bottom}
        tile = whole(box.height, box.width, **once)
        row = tile_row(tile, {"fusion": mask[part]}, truth[part], border=0, disputed=("fusion",))
        sums = {kind: sums[kind] + row[f"fusion_{kind}"] for kind in PIXELS}
    assert sums == confusion(mask, truth)
    assert sum(sums.values()) == 47 * 65


def test_disagreement_needs_every_model_against_the_annotation() -> None:
    truth = np.zeros((20, 20), bool)
    wide, narrow = truth.copy(), truth.copy()
    wide[:10] = True
    narrow[:5] = True
    row = tile_row(whole(20, 20), {"fcn32": wide, "fcn8": narrow}, truth, border=0, disputed=("fcn32", "fcn8"))
    assert row["disagreement"] == 0.25


# --- figures of a table


def test_known_counts_and_ratios() -> None:
    truth = np.zeros((10, 10), bool)
    truth[:4, :5] = True
    mask = np.zeros((10, 10), bool)
    mask[:4, :4] = True
    mask[9, 9] = True
    empty = np.zeros((10, 10), bool)
    row = summarize(table([("a", mask, truth), ("b", empty, empty)]), MODELS, 0)["fusion"]
    assert [row[kind] for kind in PIXELS] == [16, 1, 179, 4]
    assert row["dice"] == pytest.approx(32 / 37)
    assert row["iou"] == pytest.approx(16 / 21)
    assert row["accuracy"] == pytest.approx(195 / 200)
    assert (row["tiles"], row["undefined_tiles"]) == (2, 1)
    assert (row["mean_dice"], row["mean_iou"]) == (pytest.approx(32 / 37), pytest.approx(16 / 21))
    assert row["per_slide"]["a"] == {
        **{"tp": 16, "fp": 1, "tn": 79, "fn": 4, "tiles": 1},
        **{"accuracy": pytest.approx(0.95), "iou": pytest.approx(16 / 21), "dice": pytest.approx(32 / 37)},
    }
    assert row["per_slide"]["b"]["dice"] is None
    assert row["objects"] == {"tp": 1, "fp": 0, "fn": 0}
    assert row["ci_unit"] == "tile"
    assert row["dice_ci95"][0] <= row["dice"] <= row["dice_ci95"][1]


def test_nothing_to_find_is_undefined_and_never_perfect() -> None:
    empty = np.zeros((8, 8), bool)
    metrics = summarize(table([("a", empty, empty)]), MODELS, 0)
    row = metrics["fusion"]
    undefined = (
        "dice",
        "iou",
        "mean_dice",
        "mean_iou",
        "boundary_iou",
        "object_f1",
        "dice_ci95",
        "iou_ci95",
    )
    assert [row[name] for name in undefined] == [None] * len(undefined)
    assert (row["accuracy"], row["undefined_tiles"]) == (1.0, 1)
    assert compare(table([("a", empty, empty)]), MODELS, "fusion", 0)["otsu"] == {
        "dice_difference": None,
        "ci95": None,
        "unit": "tile",
        "significant": False,
    }
    json.dumps(metrics, allow_nan=False)


def test_means_differ_from_pooled_figures_where_tiles_differ_in_cells() -> None:
    truth, half = np.zeros((2, 10, 10), bool)
    truth[:, :8] = True
    half[:, :4] = True
    small = np.zeros((10, 10), bool)
    small[:2, :2] = True
    row = summarize(table([("a", half, truth), ("a", small, small)]), MODELS, 0)["fusion"]
    assert row["dice"] == pytest.approx(2 * 44 / (2 * 44 + 40))
    assert row["mean_dice"] == pytest.approx((80 / 120 + 1) / 2)


def test_the_metrics_do_not_depend_on_the_order_of_the_rows() -> None:
    rows = table(noisy_tiles(17, 3))
    order = np.random.default_rng(2).permutation(17)
    mixed = rows.take(order)
    assert json.dumps(summarize(rows, MODELS, 7)) == json.dumps(summarize(mixed, MODELS, 7))
    assert compare(rows, MODELS, "fusion", 7) == compare(mixed, MODELS, "fusion", 7)


def test_slides_add_up_to_the_pooled_counts() -> None:
    row = summarize(table(noisy_tiles(17, 6)), MODELS, 0)["fusion"]
    assert list(row["per_slide"]) == sorted(row["per_slide"])
    for kind in (*PIXELS, "tiles"):
        assert sum(slide[kind] for slide in row["per_slide"].values()) == row[kind]


# --- intervals


def test_slides_are_resampled_from_five_on() -> None:
    rows = {slides: table(noisy_tiles(12, slides)) for slides in (1, 4, 5)}
    units = {slides: summarize(table, MODELS, 0)["fusion"]["ci_unit"] for slides, table in rows.items()}
    assert units == {1: "tile", 4: "tile", 5: "slide"}


def test_the_interval_is_that_of_a_plain_bootstrap() -> None:
    rows = table(noisy_tiles(9, 1))
    counts = np.stack([rows[f"fusion_{kind}"].to_numpy() for kind in PIXELS], axis=1)
    rng = np.random.default_rng([3, bootstrap.STREAM])
    pooled = [counts[rng.integers(9, size=9)].sum(axis=0) for _ in range(bootstrap.RESAMPLES)]
    dice = [2 * tp / (2 * tp + fp + fn) for tp, fp, _, fn in pooled]
    row = summarize(rows, MODELS, 3)["fusion"]
    assert row["dice_ci95"] == pytest.approx(np.percentile(dice, [2.5, 97.5]).tolist())
    assert row["iou_ci95"] == pytest.approx([d / (2 - d) for d in row["dice_ci95"]], abs=1e-4)
    assert summarize(rows, MODELS, 4)["fusion"]["dice_ci95"] != row["dice_ci95"]


def test_resampling_in_small_parts_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    units = np.random.default_rng(0).integers(0, 4_000_000, (30, 3, 4))
    at_once = resample(units, 5)
    monkeypatch.setattr(bootstrap, "WEIGHTS_AT_ONCE", 7 * 30)
    assert np.array_equal(resample(units, 5), at_once)
    assert at_once.shape == (2000, 3, 4)
    spread = at_once[:, 0, 0].std() / (units[:, 0, 0].std() * np.sqrt(30))
    assert spread == pytest.approx(1, abs=0.1)


def test_undefined_resamples_are_left_out_of_the_interval() -> None:
    values = np.concatenate([np.full(500, np.nan), np.linspace(0, 1, 101)])
    assert bootstrap.interval(values) == pytest.approx([0.025, 0.975])
    assert bootstrap.interval(np.full(3, np.nan)) is None


def test_a_paired_comparison_sees_what_two_intervals_do_not() -> None:
    """One model errs on a fixed share more of each tile; tiles differ far more than the models do."""
    rng = np.random.default_rng(1)
    rows = []
    for number in range(40):
        cells, missed = int(rng.integers(200, 800)), float(rng.uniform(0.05, 0.6))
        row: dict[str, Any] = whole(40, 40, tile_id=f"t{number:02}", disagreement=0.0)
        for model, share in (("fusion", missed), ("otsu", missed + 0.02)):
            fn = round(cells * share)
            row |= {f"{model}_{name.name[7:]}": 0 for name in per_tile_schema(["fusion"]) if "_" in name.name}
            row |= {
                f"{model}_tp": cells - fn,
                f"{model}_fp": 0,
                f"{model}_fn": fn,
                f"{model}_tn": 1600 - cells,
            }
        rows.append(row)
    made = pa.Table.from_pylist(rows, per_tile_schema(MODELS))
    metrics, comparison = summarize(made, MODELS, 0), compare(made, MODELS, "fusion", 0)["otsu"]
    assert metrics["fusion"]["dice_ci95"][0] < metrics["otsu"]["dice_ci95"][1]
    assert comparison["significant"]
    assert 0 < comparison["ci95"][0] < comparison["dice_difference"] < comparison["ci95"][1]
    assert comparison["dice_difference"] == pytest.approx(metrics["fusion"]["dice"] - metrics["otsu"]["dice"])
    other_way = compare(made, MODELS, "otsu", 0)["fusion"]
    assert other_way["ci95"] == pytest.approx([-bound for bound in reversed(comparison["ci95"])])


def test_equal_models_are_not_told_apart() -> None:
    rows = table(noisy_tiles(10, 2))
    same = rows.select([name for name in rows.column_names if not name.startswith("otsu_")])
    for name in [name for name in same.column_names if name.startswith("fusion_")]:
        same = same.append_column(name.replace("fusion", "mean"), same[name])
    comparison = compare(same, ("fusion", "mean"), "fusion", 0)["mean"]
    assert (comparison["dice_difference"], comparison["ci95"], comparison["significant"]) == (0.0, [0.0, 0.0], False)


def test_ratios_of_arrays() -> None:
    counts = np.array([[16, 1, 79, 4], [0, 0, 9, 0], [0, 3, 0, 0]])
    assert dice_of(counts) == pytest.approx([32 / 37, np.nan, 0], nan_ok=True)
    assert iou_of(counts) == pytest.approx([16 / 21, np.nan, 0], nan_ok=True)


# --- boundaries and objects


@pytest.mark.parametrize("band", [1, 3, 8, 50])
def test_the_boundary_band_is_what_erosions_take_away(band: int) -> None:
    noise = np.random.default_rng(band).random((70, 90))
    mask = ndimage.gaussian_filter(noise, 6) > np.median(ndimage.gaussian_filter(noise, 6))
    eroded = ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=band, border_value=1)
    assert np.array_equal(boundary(mask, band), mask & ~eroded)
    assert mask[0].any()
    assert not boundary(np.ones((9, 9), bool), 3).any()
    assert not boundary(np.zeros((9, 9), bool), 3).any()


def test_boundary_iou_is_pooled_and_stricter_than_iou() -> None:
    truth = np.zeros((60, 60), bool)
    truth[10:30, 10:30] = truth[40:55, 20:50] = True
    assert summarize(table([("a", truth, truth)]), MODELS, 0)["fusion"]["boundary_iou"] == 1.0
    shifted = np.roll(truth, 3, axis=0)
    worse = summarize(table([("a", shifted, truth), ("a", truth, truth)]), MODELS, 0)["fusion"]
    assert 0 < worse["boundary_iou"] < worse["iou"] < 1
    band = round(0.02 * np.hypot(60, 60))
    edges = boundary(shifted, band), boundary(truth, band)
    shared, union = (edges[0] & edges[1]).sum(), (edges[0] | edges[1]).sum()
    own = edges[1].sum()
    assert worse["boundary_iou"] == pytest.approx((shared + own) / (union + own))


def test_objects_match_one_to_one_from_half() -> None:
    true = np.array([[1, 1, 1, 1, 0, 2, 2, 2, 2, 0, 3, 3]])
    predicted = np.array([[1, 1, 1, 0, 0, 2, 0, 4, 0, 5, 5, 0]])
    assert match_objects(predicted, true) == {"objects_tp": 1, "objects_fp": 3, "objects_fn": 2}


def test_two_halves_are_one_match() -> None:
    one, halves = np.array([[1, 1, 1, 1]]), np.array([[1, 1, 2, 2]])
    assert match_objects(one, halves) == {"objects_tp": 1, "objects_fp": 0, "objects_fn": 1}
    assert match_objects(halves, one) == {"objects_tp": 1, "objects_fp": 1, "objects_fn": 0}


def test_objects_without_a_counterpart_and_empty_images() -> None:
    none, one = np.zeros((5, 5), np.int32), np.eye(5, dtype=np.int32)
    assert match_objects(none, one) == {"objects_tp": 0, "objects_fp": 0, "objects_fn": 1}
    assert match_objects(one, none) == {"objects_tp": 0, "objects_fp": 1, "objects_fn": 0}
    nothing = np.zeros((0, 4), np.int32)
    assert sum(match_objects(nothing, nothing).values()) == 0


def test_touching_corners_join_and_specks_do_not_count() -> None:
    mask = np.zeros((20, 20), bool)
    mask[:4, :4] = mask[4:8, 4:8] = True
    mask[12:15, 12:17] = True  # 15 px
    labels = label_objects(mask)
    assert (labels[:8, :8] > 0).sum() == 32
    assert len(np.unique(labels)) == 2
    assert np.unique(label_objects(mask[::-1])).tolist() == [0, 1]  # the speck comes first
    mask[15, 12] = True  # 16 px
    assert len(np.unique(label_objects(mask))) == 3


# --- models that need no training


def test_majority_and_mean_are_of_all_three() -> None:
    rng = np.random.default_rng(0)
    logits = {name: rng.normal(size=(6, 7)).astype(np.float32) for name in (*MEMBERS, "fusion")}
    logits["fcn32"][0, 0], logits["fcn16"][0, 0], logits["fcn8"][0, 0] = 5, -0.5, -0.5
    masks = predictions(logits, np.full((6, 7, 3), 200, np.uint8))
    assert list(masks) == [key for key in MODEL_KEYS if key != "fusion_published"]
    votes = sum((logits[name] >= 0).astype(int) for name in MEMBERS)
    assert np.array_equal(masks["majority"], votes >= 2)
    mean = sum(1 / (1 + np.exp(-logits[name].astype(np.float64))) for name in MEMBERS) / 3
    assert np.array_equal(masks["mean"], mean >= 0.5)
    assert masks["mean"][0, 0]
    assert not masks["majority"][0, 0]
    for name in (*MEMBERS, "fusion"):
        assert np.array_equal(masks[name], logits[name] >= 0)


def test_a_probability_of_one_half_is_cell() -> None:
    zeros = dict.fromkeys((*MEMBERS, "fusion", "fusion_published"), np.zeros((2, 2), np.float32))
    masks = predictions(zeros, np.zeros((2, 2, 3), np.uint8))
    assert list(masks) == list(MODEL_KEYS)
    assert all(mask.all() == (name != "otsu") for name, mask in masks.items())
    assert sigmoid(np.array([-1000.0, 0.0, 1000.0], np.float32)).tolist() == [0.0, 0.5, 1.0]


def test_a_logit_that_is_no_number_stops() -> None:
    logits = {name: np.zeros((2, 2), np.float32) for name in MEMBERS}
    logits["fcn16"][1, 1] = np.nan
    with pytest.raises(ApacsError, match="fcn16"):
        predictions(logits, np.zeros((2, 2, 3), np.uint8))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_otsu_maximizes_the_variance_between_classes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    low, spread = int(rng.integers(0, 120)), int(rng.integers(2, 120))
    green = np.where(rng.random((9, 9)) < 0.4, low, low + spread) + rng.integers(0, 16, (9, 9))
    green = green.astype(np.uint8)

    def between(mask: np.ndarray) -> float:
        share = mask.mean()
        return float(share * (1 - share) * (green[mask].mean() - green[~mask].mean()) ** 2)

    dark = otsu(green)
    assert dark.any()
    assert green[dark].max() < green[~dark].min()
    best = max(between(green <= level) for level in np.unique(green)[:-1])
    assert between(dark) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_constant_tile_has_no_cell_by_otsu(value: int) -> None:
    assert not otsu(np.full((6, 5), value, np.uint8)).any()


# --- probabilities, and what the fusion changed


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_calibration_pools_tiles_to_what_all_pixels_give(seed: int, tiles: int) -> None:
    rng = np.random.default_rng(seed)
    rows, steps, true = [], [], []
    for _ in range(tiles):
        logits = rng.normal(0, 3, tuple(rng.integers(0, 12, 2))).astype(np.float32)
        truth = rng.random(logits.shape) < 0.4
        rows.append(calibration_row("fcn8", sigmoid(logits), truth))
        steps += np.rint(sigmoid(logits) * 255).ravel().tolist()
        true += truth.ravel().tolist()
    found = calibration(pa.Table.from_pylist(rows, calibration_schema("fcn8")), "fcn8")
    error = 0.0
    for number in range(BINS):
        inside = [(step, cell) for step, cell in zip(steps, true, strict=True) if int(step * BINS / 256) == number]
        assert found["pixels"][number] == len(inside)
        assert found["cells"][number] == sum(cell for _, cell in inside)
        if inside:
            said = float(np.mean([step / 255 for step, _ in inside]))
            assert found["confidence"][number] == pytest.approx(said)
            error += abs(said * len(inside) - sum(cell for _, cell in inside)) / len(true)
        else:
            assert found["confidence"][number] is None
    assert found["ece"] == (pytest.approx(error) if true else None)


def test_what_is_sure_and_right_is_calibrated_and_what_is_sure_and_wrong_is_not() -> None:
    truth = np.arange(100).reshape(10, 10) % 3 == 0
    for said, ece in ((truth, 0.0), (~truth, 1.0)):
        row = calibration_row("fusion", said.astype(np.float32), truth)
        assert calibration(pa.Table.from_pylist([row], calibration_schema("fusion")), "fusion")["ece"] == ece


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_changes_are_the_difference_between_the_counts_of_the_two(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, wrong = [], []
    for _ in range(3):
        fusion, member, truth = rng.random((3, 9, 7)) < rng.uniform(0.2, 0.8)
        rows.append(changes_row(fusion, member, truth))
        wrong.append([int((mask != truth).sum()) for mask in (fusion, member)])
        assert sum(rows[-1].values()) == (fusion != member).sum()
        counts = [confusion(mask, truth) for mask in (fusion, member)]
        for kind, part in (("cell", "tp"), ("background", "tn")):
            change = rows[-1][f"fusion_better_{kind}"] - rows[-1][f"fusion_worse_{kind}"]
            assert change == counts[0][part] - counts[1][part]
    table = pa.Table.from_pylist(rows, CHANGES_SCHEMA)
    expected = [of_member - of_fusion for of_fusion, of_member in wrong]
    assert gains(table).tolist() == expected
    pooled = changes(table, "fcn16")
    assert pooled["member"] == "fcn16"
    assert [pooled[name] for name in CHANGES] == [sum(row[f"fusion_{name}"] for row in rows) for name in CHANGES]
    assert pooled["tiles_better"] == sum(gain > 0 for gain in expected)
    assert pooled["tiles_worse"] == sum(gain < 0 for gain in expected)
