"""Tissue: where a slide holds cells, found on a small picture of it, as in the paper from its intensity.

Tissue is what is denser than the glass beside it, in the channel that absorbs most: faintly so where glass lies within
a fifth of a millimeter (pale cells are found; lamp, tint and vignette cancel), clearly so where it lies within a
millimeter and a half (sheets of cells). Parts that were not scanned and artifacts (`artifacts`) are excluded. All
limits are in um on a picture of about 8 um per px, whatever the slide's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from apacs_ray.data.grid import Box
from apacs_ray.data.images import Mask, Rgb
from apacs_ray.slides import artifacts
from apacs_ray.slides.glass import BLOCK, Glass, block_minima, glass_of, stain_of
from apacs_ray.slides.reader import Slide
from apacs_ray.slides.regions import closed, grown
from apacs_ray.slides.small_picture import UM_PER_PIXEL, level_to_read, read_small

Excluded = npt.NDArray[np.uint8]
SkipReason = Literal["background", "artifact", "unscanned"]
Array = TypeVar("Array", Rgb, Mask)
ASSUMED_MPP = 0.25  # um per px of a slide that does not say: cells of 2x or 0.5x the size are found all the same
FAINTEST, FAINT_AT_MOST, DEVIATIONS = 20, 50, 4.5  # thousandths of density; standard deviations of the glass
CLEAR = 110  # thousandths of density beyond the glass of the wide surroundings
BAND = 1 << 22  # px that are worked on at a time
HALO = 64  # px above and below a band: more than the shortest line (40)
SAMPLES = 1 << 18
OUT, ARTIFACT = np.uint8(1), np.uint8(2)  # values of `Tissue.excluded`


@dataclass(frozen=True)
class Tissue:
    """The tissue mask of a slide and the picture it was found on.

    Attributes:
        mask: (H, W) bool, True on tissue.
        picture: (H, W, 3) uint8 RGB.
        downsample: level-0 px per px of both.
        excluded: (H, W) uint8, what is no smear: OUT where nothing was scanned, ARTIFACT where ink, a line or the like
            was taken out. None: nothing is.
    """

    mask: Mask
    picture: Rgb
    downsample: float
    excluded: Excluded | None = None

    def fraction(self, box: Box, width: float, height: float) -> float:
        """Return the share (0..1) of the rectangle at (box.x, box.y), `width` x `height` level-0 px, that is tissue."""
        return self._share(self.mask[self._place(box, width, height)])

    def judge(self, box: Box, width: float, height: float, least: float) -> tuple[float, SkipReason | None]:
        """Decide whether a tile is kept.

        Args:
            box: of which `x` and `y` count: where the tile begins, level-0 px.
            width: level-0 px.
            height: level-0 px.
            least: share of tissue (0..1) with which it is kept.

        Returns:
            `fraction` of the tile, and why it is skipped (None: it is kept). unscanned: half of it or more; artifact:
            it would be kept if nothing had been taken out of it; else background.
        """
        tissue = self.fraction(box, width, height)
        if tissue >= least:
            return tissue, None
        if self.excluded is None:
            return tissue, "background"
        excluded = self.excluded[self._place(box, width, height)]
        if self._share(excluded == OUT) >= 0.5:
            return tissue, "unscanned"
        artifact = self._share(excluded == ARTIFACT)
        return tissue, "artifact" if artifact and tissue + artifact >= least else "background"

    def _place(self, box: Box, width: float, height: float) -> tuple[slice, slice]:
        rows = slice(int(box.y // self.downsample), max(int(np.ceil((box.y + height) / self.downsample)), 1))
        columns = slice(int(box.x // self.downsample), max(int(np.ceil((box.x + width) / self.downsample)), 1))
        return rows, columns

    @staticmethod
    def _share(part: Mask) -> float:
        return float(part.mean()) if part.size else 0.0


def find_tissue(slide: Slide, mpp: float | None = None) -> Tissue:
    """Find the tissue of a slide, at about 8 um per px.

    Args:
        slide: open.
        mpp: um per level-0 px; it counts where it is given, else the slide's own, else `ASSUMED_MPP`.

    Returns:
        The tissue mask. What cannot be read may be cells: its tiles are cut, and then rejected by name.

    Raises:
        BadInput: the level cannot be read, or too much of it.
    """
    mpp = mpp or slide.info.mpp or ASSUMED_MPP
    number, shrink = level_to_read(slide, mpp)
    small = read_small(slide, number, shrink)
    downsample = slide.info.levels[number].downsample * shrink
    hidden = small.outside | small.damaged
    mask, excluded = split_picture(small.picture, downsample * mpp, hidden if hidden.any() else None)
    mask |= small.damaged  # what cannot be read may be cells: its tiles are cut, and then rejected by name
    excluded[small.damaged] = 0
    return Tissue(mask, small.picture, downsample, excluded)


def tissue_mask(picture: Rgb, um: float = UM_PER_PIXEL, outside: Mask | None = None) -> Mask:
    """Return the (H, W) bool tissue of a small picture.

    Args:
        picture: (H, W, 3) uint8 sRGB.
        um: um per px.
        outside: (H, W) bool, True where nothing was scanned; None: nowhere.

    Returns:
        True on tissue.
    """
    return split_picture(picture, um, outside)[0]


def split_picture(picture: Rgb, um: float, outside: Mask | None = None) -> tuple[Mask, Excluded]:
    """Return the tissue of a small picture, and what was excluded from the search.

    Args:
        picture: (H, W, 3) uint8 sRGB.
        um: um per px.
        outside: (H, W) bool, True where nothing was scanned; None: nowhere.

    Returns:
        (H, W) bool, True on tissue, and (H, W) uint8 as `Tissue.excluded`.
    """
    height, width = picture.shape[:2]
    excluded = np.zeros((height, width), np.uint8)
    minima = []
    for band in bands(height, width):
        hidden = _hidden(picture[band.wide], None if outside is None else outside[band.wide])[band.inner]
        excluded[band.rows] = hidden * OUT
        minima.append(block_minima(_whole_blocks(picture[band.rows]), ~_whole_blocks(hidden)))
    glass = glass_of(np.concatenate(minima), um)
    threshold = faintest_stain(picture, excluded != OUT, glass)
    mask = np.zeros((height, width), bool)
    for band in bands(height, width):
        known = excluded[band.wide] != OUT
        tissue, artifact = _tissue_of(picture[band.wide], known, glass.rows(*band.span), threshold, um)
        mask[band.rows] = tissue[band.inner]
        excluded[band.rows][(artifact & known)[band.inner]] = ARTIFACT
    return mask, excluded


@dataclass(frozen=True)
class Band:
    """Rows of a picture that are worked on at once, with more rows around them.

    Attributes:
        rows: of the picture.
        wide: the same with more around them.
        inner: `rows` within `wide`.
        span: the first row of `wide` and the one after its last.
    """

    rows: slice
    wide: slice
    inner: slice
    span: tuple[int, int]


def bands(height: int, width: int) -> Iterator[Band]:
    """Yield the bands of a picture, of about `BAND` px each."""
    step = max(2 * HALO, BAND // width // BLOCK * BLOCK)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        first, end = max(0, top - HALO), min(bottom + HALO, height)
        yield Band(slice(top, bottom), slice(first, end), slice(top - first, bottom - first), (first, end))


def _hidden(picture: Rgb, outside: Mask | None) -> Mask:
    """Return what no scanner saw, with the px around it, which are a mixture of both."""
    black = np.ones(picture.shape[:2], bool)
    for channel in range(3):
        black &= picture[..., channel] <= artifacts.BLACK
    hidden = black if outside is None else black | outside
    return grown(hidden | artifacts.fill(picture, hidden), 1)


def _whole_blocks(part: Array) -> Array:
    """Repeat the last row and column until both sides are multiples of `BLOCK`."""
    height, width = part.shape[:2]
    more = [(0, -height % BLOCK), (0, -width % BLOCK), (0, 0)][: part.ndim]
    return np.pad(part, more, mode="edge")


def faintest_stain(picture: Rgb, known: Mask, glass: Glass) -> int:
    """Return the least density that is no noise of this slide's glass, thousandths."""
    height, width = (side // BLOCK * BLOCK for side in known.shape)
    step = max(1, round((height * width / SAMPLES) ** 0.5)) * BLOCK  # whole blocks: the glass is known by blocks
    levels = []
    for row in range(0, height, step):
        part = picture[row : row + BLOCK, :width]
        most = stain_of(part, glass.rows(row, row + BLOCK).columns(width)).most
        levels.append(most[known[row : row + BLOCK, :width]])
    samples = np.concatenate([*levels, np.zeros(0, np.int16)])
    if not samples.size:
        return FAINTEST
    low, lower = np.quantile(samples, (0.05, 0.25))  # both are glass, even where cells cover three quarters
    deviation = (lower - low) / 0.97  # 0.97 and 0.674: distances of a normal distribution's quantiles
    return round(min(max(FAINTEST, lower + (0.674 + DEVIATIONS) * deviation), FAINT_AT_MOST))


def _tissue_of(picture: Rgb, known: Mask, glass: Glass, threshold: int, um: float) -> tuple[Mask, Mask]:
    """Return the tissue of a band, and the artifacts that were taken out."""
    height, width = known.shape
    stain = stain_of(_whole_blocks(picture), glass).cut(height, width)
    stained = ((stain.most > threshold) | (stain.wide_most > CLEAR)) & known
    artifact = (artifacts.even_things(picture, stain, known, um) | artifacts.ink(stain, known, um)) & known
    mask = closed(stained & ~artifact) & known
    lines = artifacts.gray_lines(mask, stain, um) | artifacts.fringes(mask, artifact, um)
    return artifacts.without_specks(mask & ~lines, stain, threshold, um), artifact | (lines & known)
