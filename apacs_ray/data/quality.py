"""Two measures of a tile that tell background and blur from cells: tissue fraction and focus.

Both are taken on the tile shrunk by 4 (means of 4 x 4 px), which removes the noise of scanner and JPEG.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from apacs_ray.data.images import as_picture

Floats = npt.NDArray[np.float32]
SHRINK = 4
SATURATION = 0.12  # HSV, 0..1: stained cytoplasm lies above, the lamp's tint on bare glass below
DARK_LUMINANCE = 200.0  # luminance 0..255: nuclei and dense clumps of little color lie below
UNSCANNED = 8.0  # luminance 0..255: scanners fill what they did not scan with black


def tissue_fraction(rgb: npt.NDArray[np.uint8]) -> float:
    """Return the share (0..1) of a tile that is stained or dark, and not the black of no scan.

    It is the measure of images that are tiles already. A slide's tiles have that of the slide's tissue mask
    (`slides.tissue`), which knows the glass around them.

    Args:
        rgb: (H, W, 3) uint8 sRGB.

    Returns:
        The share.
    """
    return measure(rgb)[0]


def focus(rgb: npt.NDArray[np.uint8] | Image.Image) -> float:
    """Return the variance of the 4-neighbor Laplacian of luminance (0..255) on a tile shrunk by 4.

    It grows with sharpness and with contrast, so compare tiles of one slide; on bare glass it is near 0.

    Args:
        rgb: (H, W, 3) uint8 sRGB.

    Returns:
        Gray levels squared.
    """
    return _focus(_luma(*_shrunk(rgb)))


def measure(rgb: npt.NDArray[np.uint8] | Image.Image) -> tuple[float, float]:
    """Return `tissue_fraction` and `focus` of a tile, from one shrinking of it."""
    red, green, blue = _shrunk(rgb)
    highest = np.maximum(np.maximum(red, green), blue)
    lowest = np.minimum(np.minimum(red, green), blue)
    light = _luma(red, green, blue)
    stained = highest - lowest >= SATURATION * np.maximum(highest, 1)
    tissue = float(((stained | (light <= DARK_LUMINANCE)) & (light >= UNSCANNED)).mean())
    return tissue, _focus(light)


def _shrunk(rgb: npt.NDArray[np.uint8] | Image.Image) -> tuple[Floats, Floats, Floats]:
    """Return red, green and blue of the tile shrunk."""
    shrunk = np.asarray(as_picture(rgb).reduce(SHRINK))
    red, green, blue = (shrunk[..., channel].astype(np.float32) for channel in range(3))
    return red, green, blue


def _luma(red: Floats, green: Floats, blue: Floats) -> Floats:
    return np.asarray(0.299 * red + 0.587 * green + 0.114 * blue, np.float32)  # Rec. 601, 0..255


def _focus(light: Floats) -> float:
    padded = np.pad(light, 1, mode="edge")
    around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return float((around - 4 * light).var(dtype=np.float64))
