"""The light of bare glass beside every pixel of a small picture, and how much darker the pixel is than that.

Everything is optical density, -ln(light), in thousandths (int16): stain adds up in it, whatever the lamp and the tint
of the glass. Glass is looked for by blocks of `BLOCK` px, so that it costs a sixteenth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from apacs_ray.data.images import Mask

Densities = npt.NDArray[np.int16]
DENSITY = np.rint(-1000 * np.log(np.maximum(np.arange(256), 1) / 255)).astype(np.int16)  # by gray level
BLOCK = 4  # px
NEAR_UM, WIDE_UM = 200.0, 1400.0  # windows in which bare glass is expected: a sheet of cells may fill the near one
EVIDENCE = 0.6  # least share of a window that must be known
UNKNOWN, NONE = np.int16(32767), np.int16(-32768)
LAMP_BLOCKS, LAMP_SAMPLES = 400, 50_000  # least number of blocks for a fit; number that is sampled
LAMP_SHARE, LAMP_GAIN = 0.4, 1.5  # least share of blocks on the surface, and their ratio to those at one level
LAMP_STEP, LAMP_ROUNDS = 30, 8  # thousandths of density between glass and surface; rounds of the fit


@dataclass(frozen=True)
class Glass:
    """Density of the glass by blocks, (H / BLOCK, W / BLOCK, 3): `near` the pixel, and in the `wide` surroundings."""

    near: Densities
    wide: Densities

    def rows(self, top: int, bottom: int) -> Glass:
        """Return the glass below rows `top` (a multiple of `BLOCK`) to `bottom` of the picture."""
        part = slice(top // BLOCK, -(-bottom // BLOCK))
        return Glass(self.near[part], self.wide[part])

    def columns(self, width: int) -> Glass:
        """Return the glass below the first `width` columns, a multiple of `BLOCK`."""
        return Glass(self.near[:, : width // BLOCK], self.wide[:, : width // BLOCK])


def block_minima(picture: npt.NDArray[np.uint8], known: Mask) -> Densities:
    """Return the density of the brightest 2 x 2 px of every block.

    Means of 2 x 2 px, because a minimum follows noise.

    Args:
        picture: (H, W, 3) uint8; its sides are multiples of `BLOCK`.
        known: (H, W) bool, True where the slide was scanned.

    Returns:
        (H / BLOCK, W / BLOCK, 3) int16, thousandths of density; UNKNOWN where nothing is known.
    """
    height, width = known.shape
    hidden = ~known
    hidden = hidden[0::2, 0::2] | hidden[1::2, 0::2] | hidden[0::2, 1::2] | hidden[1::2, 1::2]
    minima = np.empty((height // BLOCK, width // BLOCK, 3), np.int16)
    for channel in range(3):
        density = DENSITY[picture[..., channel]]
        mean = (density[0::2, 0::2] + density[1::2, 0::2] + density[0::2, 1::2] + density[1::2, 1::2]) // 4
        mean[hidden] = UNKNOWN
        rows = np.minimum(mean[0::2], mean[1::2])
        minima[..., channel] = np.minimum(rows[:, 0::2], rows[:, 1::2])
    return minima


def glass_of(minima: Densities, um: float) -> Glass:
    """Return the glass of a whole picture of `um` um per px, from its `block_minima`."""
    known = minima[..., 0] < UNKNOWN
    lamp = _lamp(minima, known)
    flat = np.where(known[..., None], minima - lamp, UNKNOWN)
    anywhere = np.quantile(flat[known], 0.05, axis=0).astype(np.int16) if known.any() else np.zeros(3, np.int16)
    wide = _opening(flat, WIDE_UM / (um * BLOCK))
    wide = np.where(wide == NONE, anywhere, wide)
    near = _opening(flat, NEAR_UM / (um * BLOCK))
    near = np.where(near == NONE, wide, near)
    return Glass(near + lamp, wide + lamp)


def _lamp(minima: Densities, known: Mask) -> Densities:
    """Return the slow change of the light over a whole picture: a quadratic surface through its glass.

    An opening follows a slope, but not up to the edge of the picture, where half of what is around is not there.
    The surface grows from the brightest blocks over all that continue it; what it does not come to know is not
    extrapolated beyond their range.

    Returns:
        As `minima`, thousandths of density.
    """
    lamp = np.zeros_like(minima)
    if known.sum() < LAMP_BLOCKS:
        return lamp
    height, width = known.shape
    y = (np.arange(height, dtype=np.float32) / height - 0.5)[:, None]
    x = (np.arange(width, dtype=np.float32) / width - 0.5)[None, :]
    step = max(1, round((height * width / LAMP_SAMPLES) ** 0.5))
    rows, columns = np.nonzero(known[::step, ::step])
    at_y, at_x = y[rows * step, 0], x[0, columns * step]
    terms = np.stack([np.ones_like(at_x), at_x, at_y, at_x * at_x, at_x * at_y, at_y * at_y], axis=1)
    for channel in range(3):
        some = minima[rows * step, columns * step, channel].astype(np.float32)
        if not some.size:
            break
        glass = np.abs(some - np.quantile(some, 0.05)) < LAMP_STEP
        started = glass.sum()
        for _ in range(LAMP_ROUNDS):
            weights = np.linalg.lstsq(terms[glass], some[glass], rcond=None)[0].astype(np.float32)
            glass = np.abs(some - terms @ weights) < LAMP_STEP
        if glass.mean() >= LAMP_SHARE and glass.sum() >= LAMP_GAIN * started:
            level, right, down, across, both, along = weights
            surface = level + right * x + down * y + across * x * x + both * x * y + along * y * y
            lamp[..., channel] = np.rint(np.clip(surface, some[glass].min(), some[glass].max()))
    return lamp


def _opening(minima: Densities, width: float) -> Densities:
    """Return a gray opening by squares of `width` blocks, which removes what is narrower than that.

    Unknown blocks are ignored, and so are windows of which too little is known.

    Returns:
        As `minima`; NONE where all windows are ignored.
    """
    side = max(1, round(width) | 1)
    known = ndimage.uniform_filter((minima[..., 0] < UNKNOWN).astype(np.float32), side, mode="constant")
    unsaid = known < EVIDENCE - 1e-3
    opening = np.empty_like(minima)
    for channel in range(3):
        lowest = ndimage.minimum_filter(minima[..., channel], side, mode="constant", cval=UNKNOWN)
        lowest[unsaid] = NONE
        opening[..., channel] = ndimage.maximum_filter(lowest, side, mode="constant", cval=NONE)
    return opening


@dataclass(frozen=True)
class Stain:
    """The density of px beyond that of the glass, thousandths, (H, W) int16 each.

    Attributes:
        most: of the channel that absorbs most, beside the glass near by.
        least: of the channel that absorbs least, beside the glass near by.
        wide_most: as `most`, beside the glass of the wide surroundings.
        wide_least: as `least`, beside the glass of the wide surroundings.
    """

    most: Densities
    least: Densities
    wide_most: Densities
    wide_least: Densities

    def cut(self, height: int, width: int) -> Stain:
        """Return the first `height` rows and `width` columns."""
        part = slice(height), slice(width)
        return Stain(self.most[part], self.least[part], self.wide_most[part], self.wide_least[part])


def stain_of(picture: npt.NDArray[np.uint8], glass: Glass) -> Stain:
    """Return the stain of a picture (H, W, 3) uint8 whose sides are multiples of `BLOCK`."""
    densities = [DENSITY[picture[..., channel]] for channel in range(3)]
    near = [_beyond(density, glass.near[..., channel]) for channel, density in enumerate(densities)]
    wide = [_beyond(density, glass.wide[..., channel]) for channel, density in enumerate(densities)]
    return Stain(_of(np.maximum, near), _of(np.minimum, near), _of(np.maximum, wide), _of(np.minimum, wide))


def _beyond(density: Densities, glass: Densities) -> Densities:
    height, width = density.shape
    blocks = density.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    return (blocks - glass[:, None, :, None]).reshape(height, width)


def _of(choose: np.ufunc, planes: list[Densities]) -> Densities:
    return np.asarray(choose(choose(planes[0], planes[1]), planes[2]), np.int16)
