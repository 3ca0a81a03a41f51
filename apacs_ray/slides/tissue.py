"""Where a slide holds cells: tissue found on a small picture of it, as in the paper from its intensity.

Stain is what stands out from the glass in saturation or darkness, by a threshold that follows the glass's own noise.
What is no smear is taken out: pen (far more saturated or darker than stain over a wide area), thin long lines
(coverslip edges, bubble rims, hairs) and specks (dust).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from apacs_ray.data.tiles import Box
from apacs_ray.slides.reader import Slide

Mask = npt.NDArray[np.bool_]
LARGEST = 4_000_000  # px of the picture that is looked at
UM_PER_PIXEL = 8.0  # scale at which cells are small blobs; used where mpp is known
DOWNSAMPLE = 32.0  # level-0 px per px of that picture, where mpp is not known
FLOOR = 0.035  # saturation or darkness (0..1) below which nothing counts, however quiet the glass
NOISES = 6.0  # robust standard deviations of the glass
PEN_SATURATION, PEN_DARK = 0.62, 0.20  # HSV saturation, relative luminance; no stain is so even and so strong
PEN_SIDE = 24  # px: smaller dark or vivid spots are nuclei and clumps
SPECK = 8  # px: the smallest blob that may be a cell (50 um across are 30 px)
THIN = 5  # px: a long component that nearly vanishes when opened by this is a line


@dataclass(frozen=True)
class Tissue:
    """The tissue mask of a slide and the picture it was found on; `downsample` is level-0 px per px of both."""

    mask: Mask
    picture: npt.NDArray[np.uint8]
    downsample: float

    def fraction(self, box: Box, width: float, height: float) -> float:
        """Share (0..1) of the rectangle at (box.x, box.y), `width` x `height` level-0 px, that is tissue."""
        rows = slice(int(box.y // self.downsample), max(int(np.ceil((box.y + height) / self.downsample)), 1))
        columns = slice(int(box.x // self.downsample), max(int(np.ceil((box.x + width) / self.downsample)), 1))
        part = self.mask[rows, columns]
        return float(part.mean()) if part.size else 0.0


def find_tissue(slide: Slide) -> Tissue:
    """Tissue of a slide, looked for at about 8 um per px. Raises BadInput when that level cannot be read."""
    info = slide.info
    wanted = UM_PER_PIXEL / info.mpp if info.mpp else DOWNSAMPLE
    wanted = max(min(wanted, max(info.width, info.height) / 256), (info.width * info.height / LARGEST) ** 0.5, 1.0)
    number = info.level_for(wanted)
    level = info.levels[number]
    shrink = max(1, round(wanted / level.downsample))
    picture = _read_shrunk(slide, number, shrink)
    return Tissue(tissue_mask(picture), picture, level.downsample * shrink)


def _read_shrunk(slide: Slide, number: int, shrink: int) -> npt.NDArray[np.uint8]:
    """A whole level, averaged over `shrink` x `shrink` px, read in strips so that memory stays flat."""
    from PIL import Image

    level = slide.info.levels[number]
    strip = max(1, 4096 // shrink) * shrink
    strips = []
    for top in range(0, level.height, strip):
        parts = []
        for left in range(0, level.width, strip):
            width, height = min(strip, level.width - left), min(strip, level.height - top)
            parts.append(np.asarray(Image.fromarray(slide.read(number, left, top, width, height)).reduce(shrink)))
        strips.append(np.concatenate(parts, axis=1))
    return np.concatenate(strips)


def tissue_mask(picture: npt.NDArray[np.uint8]) -> Mask:
    """(H, W) bool of a small picture of a slide, (H, W, 3) uint8."""
    rgb = picture.astype(np.float32) / 255
    highest, lowest = rgb.max(axis=2), rgb.min(axis=2)
    saturation = ((highest - lowest) / np.maximum(highest, 1e-3)).astype(np.float32)
    light = (rgb @ np.array([0.299, 0.587, 0.114], np.float32)).astype(np.float32)
    glass = max(float(np.quantile(light, 0.95)), 1e-3)
    darkness = np.clip(1 - light / glass, 0, 1).astype(np.float32)
    scanned = highest > 0.03  # unscanned parts are black
    stained = (saturation > _threshold(saturation[scanned])) | (darkness > _threshold(darkness[scanned]))
    mask = stained & scanned & ~_pen(saturation, light)
    return _without_lines_and_specks(ndimage.binary_closing(mask, iterations=1) | mask)


def _threshold(values: npt.NDArray[np.float32]) -> float:
    """Above the glass: its mode and spread are taken from the lower half of all values."""
    if not values.size:
        return 1.0
    low, middle = np.quantile(values, (0.05, 0.30))
    spread = 1.4826 * max(float(middle - low), 1e-3)
    return min(max(float(middle) + NOISES * spread * 0.5, FLOOR), 0.25)


def _pen(saturation: npt.NDArray[np.float32], light: npt.NDArray[np.float32]) -> Mask:
    """Ink: wide areas of a saturation or darkness that stained cells do not reach on average."""
    strong = (saturation > PEN_SATURATION) | (light < PEN_DARK)
    core = ndimage.binary_opening(strong, structure=np.ones((5, 5), bool))
    labels, count = ndimage.label(core)
    if not count:
        return np.zeros_like(core)
    sizes = ndimage.sum_labels(core, labels, index=np.arange(1, count + 1))
    wide = np.isin(labels, 1 + np.flatnonzero(sizes >= PEN_SIDE**2 / 2))
    return ndimage.binary_dilation(wide, iterations=4)


def _without_lines_and_specks(mask: Mask) -> Mask:
    labels, count = ndimage.label(mask, structure=np.ones((3, 3), bool))
    if not count:
        return mask
    numbers = np.arange(1, count + 1)
    sizes = ndimage.sum_labels(mask, labels, numbers)
    cores = ndimage.binary_opening(mask, structure=np.ones((THIN, THIN), bool))
    cored = ndimage.sum_labels(cores, labels, numbers)
    spans = np.array([max(part.stop - part.start for part in place) for place in ndimage.find_objects(labels)])
    line = (spans >= 40) & (cored < 0.25 * sizes)
    return np.isin(labels, numbers[(sizes >= SPECK) & ~line])
