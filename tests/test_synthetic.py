"""Synthetic smears: deterministic, exact masks, regions that fit together, not solvable by a threshold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from apacs_ray.data.grid import Box
from apacs_ray.synthetic.scene import BLOCK_UM, FARTHEST_UM, things_of_block
from apacs_ray.synthetic.slide import SlideSpec, render, render_region, slide_specs, stamps_near
from apacs_ray.synthetic.texture import field, sensor_noise

WIDTH, HEIGHT = 640, 512
Rendered = tuple[SlideSpec, npt.NDArray[np.uint8], npt.NDArray[np.bool_]]


@pytest.fixture(scope="module")
def slides() -> list[Rendered]:
    return [(spec, *render(spec)) for spec in slide_specs(11, WIDTH, HEIGHT, mpp=0.8)]


def otsu_threshold(gray: npt.NDArray[np.uint8]) -> int:
    """The gray level that separates the two classes of greatest variance between them; up to it is dark."""
    counts = np.bincount(gray.ravel(), minlength=256).astype(float)
    below = np.cumsum(counts)
    weighted = np.cumsum(counts * np.arange(256))
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = below * above * (weighted / below - (weighted[-1] - weighted) / above) ** 2
    return int(np.nanargmax(apart))


def test_a_set_has_train_and_test_slides_of_their_own_seed_and_stain() -> None:
    specs = slide_specs(3, WIDTH, HEIGHT, train=3, test=2)
    assert [spec.split for spec in specs] == ["train"] * 3 + ["test"] * 2
    assert len({spec.slide_id for spec in specs}) == len({spec.seed for spec in specs}) == 5
    assert specs == slide_specs(3, WIDTH, HEIGHT, train=3, test=2)
    assert {spec.seed for spec in specs}.isdisjoint(spec.seed for spec in slide_specs(4, WIDTH, HEIGHT))


def test_shapes_and_determinism(slides: list[Rendered]) -> None:
    spec, rgb, mask = slides[0]
    assert (rgb.shape, rgb.dtype, mask.shape, mask.dtype) == (
        (HEIGHT, WIDTH, 3),
        np.uint8,
        (HEIGHT, WIDTH),
        bool,
    )
    again = render(spec)
    assert np.array_equal(again[0], rgb)
    assert np.array_equal(again[1], mask)
    assert (slides[1][1] != rgb).mean() > 0.5


def test_pixels_of_a_seed_stay_what_they_are_while_the_version_stays() -> None:
    """A run recognizes its slides by seed and VERSION: raise VERSION when these numbers change."""
    rgb, mask = render(slide_specs(0, 256, 256, mpp=0.8)[0])
    assert mask.mean() == pytest.approx(0.1730, abs=1e-3)
    assert rgb.mean(axis=(0, 1)) == pytest.approx([220.45, 222.40, 221.40], abs=0.1)


@pytest.mark.parametrize(
    "box", [(0, 0, 256, 256), (37, 101, 211, 97), (WIDTH - 65, HEIGHT - 33, 65, 33), (300, 256, 1, 1)]
)
def test_a_region_is_the_crop_of_the_whole(slides: list[Rendered], box: tuple[int, int, int, int]) -> None:
    spec, rgb, mask = slides[2]
    x, y, width, height = box
    part, part_mask = render_region(spec, x, y, width, height)
    assert np.array_equal(part, rgb[y : y + height, x : x + width])
    assert np.array_equal(part_mask, mask[y : y + height, x : x + width])


def test_a_region_is_the_crop_at_full_magnification() -> None:
    spec = slide_specs(5, 100_000, 80_000, mpp=0.25)[0]
    whole, whole_mask = render_region(spec, 70_000, 41_000, 400, 300)
    part, part_mask = render_region(spec, 70_110, 41_070, 200, 130)
    assert np.array_equal(part, whole[70:200, 110:310])
    assert np.array_equal(part_mask, whole_mask[70:200, 110:310])


@pytest.mark.parametrize("mpp", [0.25, 0.8, 2.0])
def test_no_object_reaches_beyond_the_blocks_that_are_looked_at(mpp: float) -> None:
    look = slide_specs(1, 1, 1)[0].look
    for column in range(120):
        for thing in things_of_block(99, look, mpp, column, -3):
            for place, block in ((thing.x, column), (thing.y, -3)):
                low, high = block * BLOCK_UM - FARTHEST_UM, (block + 1) * BLOCK_UM + FARTHEST_UM
                assert low <= (place - thing.reach) * mpp
                assert (place + thing.reach) * mpp <= high


def test_the_mask_is_the_cells_and_every_nucleus_lies_in_its_cell(slides: list[Rendered]) -> None:
    spec, _, mask = slides[0]
    union = np.zeros((HEIGHT + 400, WIDTH + 400), bool)  # stamps may stick out
    kinds = set()
    for thing, stamp in stamps_near(spec, Box(0, 0, WIDTH, HEIGHT)):
        kinds.add(thing.kind)
        assert (stamp.cell is not None) == thing.is_cell
        edge = np.concatenate([stamp.density[:, [0, -1]].ravel(), stamp.density[:, :, [0, -1]].ravel()])
        assert np.abs(edge).max() < 0.02, f"{thing.kind} is cut by its stamp"
        if stamp.cell is None or stamp.nucleus is None:
            continue
        assert stamp.cell.any()
        assert not (stamp.nucleus & ~stamp.cell).any()
        assert stamp.nucleus.any() == (thing.kind != "anucleate")
        area = stamp.cell.sum() * spec.mpp**2 / (np.pi * thing.radius**2)
        assert 0.6 < area < 1.15
        y, x = thing.y - thing.reach + 200, thing.x - thing.reach + 200
        side = 2 * thing.reach + 1
        union[y : y + side, x : x + side] |= stamp.cell
    assert np.array_equal(union[200:-200, 200:-200], mask)
    assert {"superficial", "intermediate", "neutrophil"} <= kinds


def test_cells_are_darker_than_glass_and_overlaps_darker_still(slides: list[Rendered]) -> None:
    spec, rgb, mask = slides[3]
    layers = np.zeros(mask.shape, int)
    for thing, stamp in stamps_near(spec, Box(0, 0, WIDTH, HEIGHT)):
        if stamp.cell is not None:
            for y, x in np.argwhere(stamp.cell) + np.array([thing.y - thing.reach, thing.x - thing.reach]):
                if 0 <= y < HEIGHT and 0 <= x < WIDTH:
                    layers[y, x] += 1
    light = rgb.astype(float).mean(axis=2)
    medians = [np.median(light[layers == count]) for count in (0, 1, 2)]
    assert medians[0] - 15 > medians[1]
    assert medians[1] - 10 > medians[2]


def test_cells_cover_a_plausible_share(slides: list[Rendered]) -> None:
    shares = [mask.mean() for _, _, mask in slides]
    assert 0.18 < np.mean(shares) < 0.45
    assert all(0.05 < share < 0.65 for share in shares)


def test_stains_differ_between_slides(slides: list[Rendered]) -> None:
    glass = np.array([np.percentile(rgb, 90, axis=(0, 1)) for _, rgb, _ in slides])
    cells = np.array([np.median(rgb[mask], axis=0) for _, rgb, mask in slides])
    for colors in (glass, cells):
        apart = np.abs(colors[:, None] - colors[None]).sum(axis=2)[~np.eye(len(slides), dtype=bool)]
        assert apart.min() > 1.5
        assert apart.max() > 20
    assert len({spec.look for spec, _, _ in slides}) == len(slides)


def test_cells_are_pink_and_blue_green(slides: list[Rendered]) -> None:
    for spec, rgb, mask in slides:
        balance = rgb[mask].astype(float) / spec.look.background
        assert (balance[:, 0] > balance[:, 1] + 0.08).mean() > 0.1, "eosinophilic"
        assert (balance[:, 1] > balance[:, 0] + 0.05).mean() > 0.1, "cyanophilic"


def test_a_threshold_does_not_solve_it(slides: list[Rendered]) -> None:
    both = dark = cell = 0
    for _, rgb, mask in slides:
        for y in range(0, HEIGHT, 256):
            for x in range(0, WIDTH - 255, 256):
                green, truth = rgb[y : y + 256, x : x + 256, 1], mask[y : y + 256, x : x + 256]
                below = green <= otsu_threshold(green)
                both, dark, cell = both + (below & truth).sum(), dark + below.sum(), cell + truth.sum()
    assert 0.5 < 2 * both / (dark + cell) < 0.82


def test_clutter_is_as_dark_as_cells(slides: list[Rendered]) -> None:
    darker = np.concatenate([rgb[~mask][:, 1] < np.median(rgb[mask][:, 1]) for _, rgb, mask in slides])
    assert darker.mean() > 0.01


def test_fields_and_noise_belong_to_a_place() -> None:
    whole = Box(-90, -40, 700, 600)
    part = Box(11, 230, 300, 200)
    rows, columns = slice(270, 470), slice(101, 401)
    assert np.array_equal(field(7, 1, whole, 61.3)[rows, columns], field(7, 1, part, 61.3))
    assert np.array_equal(sensor_noise(7, 1, whole)[:, rows, columns], sensor_noise(7, 1, part))
    smooth = field(7, 1, Box(0, 0, 1500, 1500), 12.0)
    assert abs(smooth.mean()) < 0.05
    assert smooth.std() == pytest.approx(1, abs=0.1)
    assert np.abs(np.diff(smooth, axis=1)).max() < 0.5
