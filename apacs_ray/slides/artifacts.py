"""Artifacts on a small picture of a slide, neither glass nor smear: fill, ink and other even things, lines, specks.

Lengths and areas are um; a picture has `um` um per px, about 8, where a cell is a few px.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from apacs_ray.data.images import Mask, Rgb
from apacs_ray.slides.glass import DENSITY, Densities, Stain
from apacs_ray.slides.regions import Components, grown, opened

BLACK = 8  # gray level: what was not scanned is often black
FILL_SHARE = 0.002  # a color that covers less than this share of a picture is no fill
FILL_COLORS = 3
FILL_PX = 36
STRAIGHT_PX, STRAIGHT = 6, 0.5  # px of an edge that count as straight; least share of a fill's outline that is straight
EVEN = 20  # neighbors are even that differ by at most 1 / EVEN of the density and two gray levels
LEVELS = np.rint(2000 / np.maximum(np.arange(256), 1)).astype(np.int16)  # density of two gray levels
EVEN_AREA, EVEN_SPAN = 60_000.0, 320.0  # um2, um: larger or longer than any even part of a cell or a sheet
OPAQUE = 150  # thousandths of density
EVEN_EDGE = 40.0  # um: how far the soft edge of an even thing reaches
VIVID, DARK = 968, 1600  # thousandths: between channels (saturation 0.62), in every channel (20 % of the light)
INK_CORE, INK_AREA, INK_EDGE = 40.0, 18_000.0, 32.0
LINE_SPAN, LINE_CORE, LINE_EDGE = 320.0, 40.0, 16.0
FRINGE = 24.0
LINE_LEAST = 50  # thousandths of density: fainter px have no sure color
GRAY = 0.75  # least to most absorbed channel: above it, a thing has no color, as the edge of a coverslip
SPECK_AREA, DUST_AREA, DUST_OPAQUE = 300.0, 170.0, 700  # um2, um2, thousandths of density
PEAK = 1.75  # tissue somewhere exceeds the threshold by this factor; JPEG's steps on bare glass do not


def fill(picture: Rgb, outside: Mask) -> Mask:
    """Find opaque areas of one color with straight edges: what a scanner or reader put where it had not scanned.

    Bare glass can be as even as fill, but the outline of its even parts is ragged.

    Args:
        picture: (H, W, 3) uint8 sRGB.
        outside: (H, W) bool, True where it is known that nothing was scanned.

    Returns:
        (H, W) bool, True on fill that is not in `outside`.
    """
    filled = np.zeros_like(outside)
    beside = grown(outside, 2)
    for color in _even_colors(picture, outside):
        alike = ~outside & ~filled
        for channel, level in enumerate(color):
            plane = picture[..., channel]
            alike &= (plane >= max(level - 1, 0)) & (plane <= min(level + 1, 255))
        areas = Components.of(alike, structure=None)
        large = Components.of(areas.chosen(areas.sizes >= FILL_PX), structure=None)
        straight = large.chosen(_straight(large, beside) >= STRAIGHT)
        filled |= straight
        beside |= grown(straight, 2)
    return filled


def _even_colors(picture: Rgb, outside: Mask) -> list[tuple[int, int, int]]:
    """Return the commonest colors of blocks of 5 x 5 px that are of one color, brightest first."""
    color = picture[..., 0].astype(np.int32) << 16 | picture[..., 1].astype(np.int32) << 8 | picture[..., 2]
    if min(color.shape) < 5:
        return []
    middle = color[2:-2:2, 2:-2:2]
    even = ~outside[2:-2:2, 2:-2:2]
    rows, columns = color.shape
    for down in (0, 2, 4):
        for across in (0, 2, 4):
            even &= color[down : rows - 4 + down : 2, across : columns - 4 + across : 2] == middle
    colors, counts = np.unique(middle[even], return_counts=True)
    common = [int(place) for place in np.argsort(-counts)[:FILL_COLORS] if counts[place] >= FILL_SHARE * middle.size]
    chosen = [(int(c) >> 16, int(c) >> 8 & 255, int(c) & 255) for c in colors[common]]
    return sorted(chosen, key=sum, reverse=True)


def _straight(areas: Components, beside: Mask) -> npt.NDArray[np.float64]:
    """Return the share of each area's outline that is straight, along rows or columns, except where it is `beside`."""
    total = np.zeros(areas.count + 1)
    straight = np.zeros(areas.count + 1)
    for labels, hidden in ((areas.labels, beside), (areas.labels.T, beside.T)):
        first, second = labels[:-1], labels[1:]
        edge = (first != second) & ~(hidden[:-1] | hidden[1:])
        owner = np.maximum(first, second)
        total += np.bincount(owner[edge], minlength=areas.count + 1)
        straight += np.bincount(owner[_runs(edge, STRAIGHT_PX)], minlength=areas.count + 1)
    return np.where(total > 0, straight / np.maximum(total, 1), 0.0)


def _runs(edge: Mask, length: int) -> Mask:
    """Return the parts of an edge that run on for `length` px along a row."""
    if edge.shape[1] < length:
        return np.zeros_like(edge)
    run = edge[:, : edge.shape[1] - length + 1].copy()
    for step in range(1, length):
        run &= edge[:, step : edge.shape[1] - length + 1 + step]
    out = np.zeros_like(edge)
    for step in range(length):
        out[:, step : edge.shape[1] - length + 1 + step] |= run
    return out


def even_things(picture: Rgb, stain: Stain, known: Mask, um: float) -> Mask:
    """Find what is opaque, and of one density over more than any cell: ink, bubble rims, hair, blood.

    Args:
        picture: (H, W, 3) uint8 sRGB.
        stain: of the picture.
        known: (H, W) bool, True where the slide was scanned.
        um: um per px.

    Returns:
        (H, W) bool.
    """
    even = known & (np.maximum(stain.most, stain.wide_most) > OPAQUE)
    for channel in range(3):
        density = DENSITY[picture[..., channel]]
        highest, lowest = _of_four(np.maximum, density), _of_four(np.minimum, density)
        even &= highest - lowest <= highest // EVEN + LEVELS[picture[..., channel]]
    areas = Components.of(even)
    large = areas.sizes * um * um >= EVEN_AREA
    return grown(areas.chosen(large | (areas.spans() * um >= EVEN_SPAN)), round(EVEN_EDGE / um))


def _of_four(choose: np.ufunc, plane: Densities) -> Densities:
    """Return the highest or lowest of every px and its neighbors on the left, above, and between."""
    out = plane.copy()
    out[:, 1:] = choose(plane[:, 1:], plane[:, :-1])
    rows = out.copy()
    rows[1:] = choose(out[1:], out[:-1])
    return rows


def ink(stain: Stain, known: Mask, um: float) -> Mask:
    """Find wide areas more vivid or darker than cells are, even or not.

    Args:
        stain: of the picture.
        known: (H, W) bool, True where the slide was scanned.
        um: um per px.

    Returns:
        (H, W) bool.
    """
    strong = known & ((stain.wide_most - stain.wide_least > VIVID) | (stain.wide_least > DARK))
    areas = Components.of(opened(strong, round(INK_CORE / um)), structure=None)
    return grown(areas.chosen(areas.sizes * um * um >= INK_AREA), round(INK_EDGE / um))


def fringes(mask: Mask, beside: Mask, um: float) -> Mask:
    """Find what is left along even things and ink: thin remains of their soft edges, never as wide as a cell.

    Args:
        mask: (H, W) bool, tissue as found so far.
        beside: (H, W) bool, the things that were taken out of it.
        um: um per px.

    Returns:
        (H, W) bool, parts of `mask`.
    """
    if not beside.any():
        return np.zeros_like(mask)
    things = Components.of(mask)
    thin = things.counts(opened(mask, round(LINE_CORE / um))) == 0
    return things.chosen(thin & (things.counts(mask & grown(beside, round(FRINGE / um))) == things.sizes))


def gray_lines(mask: Mask, stain: Stain, um: float) -> Mask:
    """Find long thin things without color, in parts that may touch cells: edges of a coverslip, rims of bubbles.

    Args:
        mask: (H, W) bool, tissue as found so far.
        stain: of the picture.
        um: um per px.

    Returns:
        (H, W) bool.
    """
    gray = mask & (stain.least > GRAY * stain.most) & (stain.most > LINE_LEAST)
    things = Components.of(gray)
    long = things.spans() * um >= LINE_SPAN
    if not long.any():
        return np.zeros_like(mask)
    # measure the width of a line at a third of its peak, without the faint fringe
    peak = ndimage.maximum_filter(stain.most, round(56 / um))
    cores = opened(gray & (stain.most > peak // 3), round(LINE_CORE / um))
    return grown(things.chosen(long & (things.counts(cores) == 0)), round(LINE_EDGE / um))


def without_specks(mask: Mask, stain: Stain, threshold: int, um: float) -> Mask:
    """Take specks out of a mask: what is too small for a cell or too faint for anything, and dust, small and gray.

    Args:
        mask: (H, W) bool, tissue as found so far.
        stain: of the picture.
        threshold: least density of tissue, thousandths.
        um: um per px.

    Returns:
        (H, W) bool, what is left of `mask`.
    """
    things = Components.of(mask)
    places = np.flatnonzero(mask)
    owner, most = things.labels.ravel()[places], stain.most.ravel()[places]
    peak = np.zeros(things.count + 1, np.int16)
    np.maximum.at(peak, owner, most)
    sums = np.bincount(owner, most, things.count + 1)
    least = np.bincount(owner, stain.least.ravel()[places], things.count + 1)
    area = sums / np.maximum(peak, 1) * um * um  # as if all of it had the peak's density, so without the faint fringe
    # a small cell can be gray as well, but it is larger than dust and not opaque
    dust = (least > GRAY * sums) & ((area < DUST_AREA) | ((area < SPECK_AREA) & (peak > DUST_OPAQUE)))
    return things.chosen((things.sizes * um * um >= SPECK_AREA) & (peak >= PEAK * threshold) & ~dust)
