"""Pictures of single tiles: the image, and over it where a prediction and the annotation agree and differ."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

# colours that stay apart for colour-blind readers (Okabe and Ito): both, prediction only, annotation only
COLOURS = {"tp": (0, 158, 115), "fp": (230, 159, 0), "fn": (204, 51, 160)}
FILL = 0.32
LARGEST = 420  # px, side of a picture in the report


def overlay(
    rgb: npt.NDArray[np.uint8], truth: npt.NDArray[np.bool_], mask: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """RGB (H, W, 3) with TP, FP and FN tinted, their outlines drawn in full colour."""
    picture = rgb.astype(np.float32)
    for kind, region in (("tp", mask & truth), ("fp", mask & ~truth), ("fn", truth & ~mask)):
        colour = np.array(COLOURS[kind], np.float32)
        picture[region] = (1 - FILL) * picture[region] + FILL * colour
        picture[region & ~ndimage.binary_erosion(region, iterations=1, border_value=1)] = colour
    return picture.astype(np.uint8)


def panel(rgb: npt.NDArray[np.uint8], truth: npt.NDArray[np.bool_], mask: npt.NDArray[np.bool_]) -> bytes:
    """The tile and its overlay side by side, as PNG, each at most `LARGEST` px a side."""
    pair = [_shrunk(Image.fromarray(rgb)), _shrunk(Image.fromarray(overlay(rgb, truth, mask)))]
    width, height = pair[0].size
    picture = Image.new("RGB", (2 * width + 6, height), "white")
    picture.paste(pair[0], (0, 0))
    picture.paste(pair[1], (width + 6, 0))
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    return sink.getvalue()


def _shrunk(image: Image.Image) -> Image.Image:
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.BOX)
    return image
