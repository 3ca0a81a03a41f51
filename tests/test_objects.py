"""Objects over cores: however a mask is cut, the same polygons, sums and first pixels."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from support.segmentation import filled_by_scipy

from apacs_ray.data.grid import Box, grid
from apacs_ray.evaluation.objects import EIGHT, components
from apacs_ray.inference.holes import fill_holes
from apacs_ray.inference.joining import join
from apacs_ray.inference.objects import SlideObject, core_objects, eccentricity, paint
from apacs_ray.inference.outlines import joined, outlines
from apacs_ray.slides.annotations.areas import rings_of
from apacs_ray.slides.annotations.rasterize import fill

MASKS = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**32 - 1), st.floats(0.1, 0.95))


def drawn(height: int, width: int, seed: int, share: float) -> np.ndarray:
    """Noise in which also larger areas are of one kind."""
    generator = np.random.default_rng(seed)
    noise = generator.random((height, width)) < share
    return noise if seed % 2 else ndimage.binary_opening(noise, np.ones((2, 2)))


def objects_of(mask: np.ndarray, side: int, skip_empty: bool = False) -> list[SlideObject]:
    height, width = mask.shape
    probability = np.linspace(0, 65535, mask.size).astype(np.uint16).reshape(mask.shape)
    cores = []
    for box in grid(width, height, side, side, "keep"):
        part = slice(box.y, box.y + box.height), slice(box.x, box.x + box.width)
        cores.append(core_objects(mask[part], probability[part], probability[part] // 2, box))
    return list(join([core for core in cores if core.pieces or not skip_empty], width))


@given(MASKS)
@settings(deadline=None)
def test_outlines_are_valid_and_hold_their_pixels_exactly(args: tuple[int, int, int, float]) -> None:
    mask = drawn(*args)
    labels = components(mask)
    polygons = outlines(labels, 0, 0)
    assert len(polygons) == labels.max(initial=0)
    for number, polygon in enumerate(polygons, 1):
        assert polygon.is_valid, shapely.is_valid_reason(polygon)
        filled = np.zeros_like(mask)
        for part in getattr(polygon, "geoms", [polygon]):
            fill(filled, list(rings_of(part)), 0, 0, 1)
        assert np.array_equal(filled, labels == number)


@given(MASKS, st.integers(1, 25), st.booleans())
@settings(deadline=None)
def test_cut_in_any_way_they_are_the_same(args: tuple[int, int, int, float], side: int, skip_empty: bool) -> None:
    mask = drawn(*args)
    whole = sorted(objects_of(mask, 100), key=lambda one: one.first)
    cut = sorted(objects_of(mask, side, skip_empty), key=lambda one: one.first)
    assert len(whole) == ndimage.label(mask, EIGHT)[1]
    for one, other in zip(whole, cut, strict=True):
        assert (one.pixels, one.probability, one.disagreement, one.first) == (
            other.pixels,
            other.probability,
            other.disagreement,
            other.first,
        )
        assert other.polygon.is_valid, shapely.is_valid_reason(other.polygon)
        assert other.polygon.area == one.pixels
        assert shapely.to_wkt(one.polygon) == shapely.to_wkt(other.polygon)


@given(MASKS, st.integers(1, 25), st.integers(0, 12))
@settings(deadline=None, max_examples=300)
def test_holes_are_filled_however_it_is_cut(args: tuple[int, int, int, float], side: int, least: int) -> None:
    mask = drawn(*args)
    cores, found = [], np.zeros_like(mask)
    for box in grid(mask.shape[1], mask.shape[0], side, side, "keep"):
        part = slice(box.y, box.y + box.height), slice(box.x, box.x + box.width)
        values = np.ones_like(mask[part], np.uint16)
        one = core_objects(mask[part], values, values, box)
        found[part], one = fill_holes(mask[part], one, least)
        cores.append(one)
    objects = list(join(cores, mask.shape[1], least))
    for one in objects:
        for hole in one.holes:
            paint(found, hole, 0, 0, True)
    expected = filled_by_scipy(mask, least)
    assert np.array_equal(found, expected)
    polygons = outlines(components(expected), 0, 0)
    firsts = sorted(one.first for one in objects_of(expected, 100))
    assert sorted(one.first for one in objects) == firsts
    shapes = {shapely.to_wkt(joined([polygon])) for polygon in polygons}
    assert {shapely.to_wkt(one.polygon) for one in objects} == shapes
    for one in objects:
        assert one.polygon.is_valid
        assert one.size == one.polygon.area
        assert one.probability == one.pixels


def test_those_that_end_are_not_held() -> None:
    """Over many rows, with one object from top to bottom."""
    mask = np.zeros((4096, 64), bool)
    mask[::4, 2:5] = True
    mask[:, 30] = True
    seen: list[int] = []

    def cores():  # type: ignore[no-untyped-def]
        for box in grid(64, 4096, 32, 32, "keep"):
            part = mask[box.y : box.y + 32, box.x : box.x + 32]
            seen.append(box.y)
            yield core_objects(part, part.astype(np.uint16), part.astype(np.uint16), box)

    one = None
    for number, one in enumerate(join(cores(), 64)):  # noqa: B007
        if number == 8 * 20:
            assert seen[-1] == 32 * 20  # 7 of 8 with their core, and one, which touches its border, behind each row
    assert number == 1024
    assert one is not None
    assert one.pixels == 4096


@pytest.mark.parametrize("fill", [0, 3])
def test_what_a_core_holds_whole_comes_with_it(fill: float) -> None:
    """However wide a slide is, objects of a whole row of cores are not held, unless a hole may hold them."""
    mask = np.zeros((32, 320), bool)
    mask[4:6, 4::32] = True  # of 2 px, smaller than a hole of up to 3
    mask[10:13, 4::32] = True
    mask[20, 30:] = True  # over all borders
    seen: list[int] = []

    def cores():  # type: ignore[no-untyped-def]
        for box in grid(320, 32, 32, 32, "keep"):
            part = mask[box.y : box.y + 32, box.x : box.x + 32]
            seen.append(box.x)
            yield core_objects(part, part.astype(np.uint16), part.astype(np.uint16), box)

    when = [(one.pixels, seen[-1]) for one in join(cores(), 320, fill)]
    assert [x for pixels, x in when if pixels == 3] == list(range(0, 320, 32))
    assert [x for pixels, x in when if pixels == 2] == ([288] * 10 if fill else list(range(0, 320, 32)))
    assert [x for pixels, x in when if pixels == 290] == [288]
    assert len(when) == 21


@pytest.mark.parametrize(("across", "down"), [(40, 40), (80, 20), (100, 1)])
def test_eccentricity_is_that_of_an_ellipse(across: int, down: int) -> None:
    y, x = np.mgrid[-down - 1 : down + 2, -across - 1 : across + 2]
    mask = (x / across) ** 2 + (y / down) ** 2 <= 1
    (polygon,) = outlines(components(mask), 1000, 2000)
    expected = np.sqrt(1 - (min(across, down) / max(across, down)) ** 2)
    assert eccentricity(polygon) == pytest.approx(expected, abs=0.02)
    box = Box(0, 0, mask.shape[1], mask.shape[0])
    (piece,) = core_objects(mask, mask * np.uint16(65535), mask.astype(np.uint16), box).pieces
    assert piece.probability == piece.pixels * 65535
