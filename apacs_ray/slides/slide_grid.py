"""The grid of tiles over a slide's scanned part, and which tiles hold enough tissue to be kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from apacs_ray.config.settings import TilesSettings
from apacs_ray.data.grid import Box, grid
from apacs_ray.slides.reader import SlideInfo
from apacs_ray.slides.tissue import ASSUMED_MPP, SkipReason, Tissue

MIN_TISSUE = 0.02  # share of a tile that must be tissue, unless tiles.min_tissue says otherwise


@dataclass(frozen=True)
class TilePlan:
    """One tile of a slide before it is read.

    Attributes:
        box: in the grid's px, which are tile px.
        area: in level-0 px, whole px.
        tissue: share (0..1) of it that is tissue.
        skipped: why it is skipped; None: it is kept.
    """

    box: Box
    area: Box
    tissue: float
    skipped: SkipReason | None


def grid_size(bounds: Box, downsample: float) -> tuple[int, int]:
    """Return width and height of a slide's grid, tile px."""
    return max(1, int(bounds.width / downsample)), max(1, int(bounds.height / downsample))


def tiles_of(
    tiles: TilesSettings, info: SlideInfo, tissue: Tissue, downsample: float, mpp: float | None
) -> Iterator[TilePlan]:
    """Lay the grid over a slide and judge its tiles by their share of tissue.

    A tile is kept when its `tissue`, which its row stores as `tissue_fraction`, reaches `tiles.min_tissue`, or when the
    area of that is at least `tiles.min_tissue_um2`.

    Args:
        tiles: size, stride and limits.
        info: what the slide says of itself.
        tissue: its tissue mask.
        downsample: level-0 px per tile px.
        mpp: um per level-0 px, None where unknown.

    Yields:
        Every tile in reading order, skipped ones too.
    """
    min_tissue = MIN_TISSUE if tiles.min_tissue is None else tiles.min_tissue
    px_um2 = ((mpp or ASSUMED_MPP) * downsample) ** 2
    width, height = grid_size(info.bounds, downsample)
    for box in grid(width, height, tiles.size, tiles.stride or tiles.size, tiles.last):
        x, y = level0_point(info.bounds, box, downsample)
        wide, high = box.width * downsample, box.height * downsample
        least = min(min_tissue, tiles.min_tissue_um2 / (box.width * box.height * px_um2))  # the area, as a share
        share_of_tissue, skipped = tissue.judge(Box(x, y, 0, 0), wide, high, least)
        yield TilePlan(box, Box(x, y, round(wide), round(high)), share_of_tissue, skipped)


def level0_point(bounds: Box, box: Box, downsample: float) -> tuple[int, int]:
    """Return the level-0 px where a tile begins: whole, so that its row says exactly where its pixels are."""
    return bounds.x + round(box.x * downsample), bounds.y + round(box.y * downsample)


def qupath_point(x: float, y: float, bounds: Box) -> tuple[float, float]:
    """Return level-0 px as QuPath counts them: from the slide's bounds on."""
    return x - bounds.x, y - bounds.y
