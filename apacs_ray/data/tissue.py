"""Two measures of a tile that tell background and blur from cells: tissue fraction and focus.

Both are taken on the tile shrunk by 4 (means of 4 x 4 px), which removes the noise of scanner and JPEG.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

SHRINK = 4
SATURATION = 0.12  # HSV, 0..1: stained cytoplasm lies above, the lamp's tint on bare glass below
DARK = 200.0  # luminance 0..255: nuclei and dense clumps of little colour lie below
UNSCANNED = 8.0  # luminance 0..255: scanners fill what they did not scan with black


def tissue_fraction(rgb: npt.NDArray[np.uint8]) -> float:
    """Share (0..1) of a tile, (H, W, 3) uint8 sRGB, that is stained or dark, and not the black of no scan."""
    pixels = _shrunk(rgb)
    highest = pixels.max(axis=2)
    saturation = (highest - pixels.min(axis=2)) / np.maximum(highest, 1.0)
    light = _luminance(pixels)
    return float((((saturation >= SATURATION) | (light <= DARK)) & (light >= UNSCANNED)).mean())


def focus(rgb: npt.NDArray[np.uint8]) -> float:
    """Variance of the 4-neighbour Laplacian of luminance (0..255) on a tile, (H, W, 3) uint8, shrunk by 4.

    Its unit is grey levels squared. It grows with sharpness and with contrast, so compare tiles of one slide;
    on bare glass it is near 0.
    """
    return float(ndimage.laplace(_luminance(_shrunk(rgb)), mode="nearest").var())


def _shrunk(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    return np.asarray(Image.fromarray(np.ascontiguousarray(rgb)).reduce(SHRINK), np.float64)


def _luminance(pixels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rec. 601 luma, 0..255."""
    light: npt.NDArray[np.float64] = pixels @ np.array([0.299, 0.587, 0.114])
    return light
