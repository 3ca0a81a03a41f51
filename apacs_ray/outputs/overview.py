"""The picture of a segmented slide for a quick look: the slide, with the mask's outlines."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image
from scipy import ndimage

from apacs_ray.data.images import Rgb
from apacs_ray.outputs.mask_bands import Band

LARGEST = 1600  # px, the longer side
COLOR = (0, 114, 178)


class Overview:
    """A small mask that is gathered while bands of the large one pass by."""

    def __init__(self, width: int, height: int) -> None:
        """Begin the overview of a mask of `width` x `height` px."""
        self._factor = max(1, -(-max(width, height) // LARGEST))
        self._mask = np.zeros((-(-height // self._factor), -(-width // self._factor)), bool)
        self._row = 0

    def watch(self, bands: Iterable[Band]) -> Iterator[Band]:
        """Look at bands on their way.

        Args:
            bands: From top to bottom.

        Yields:
            The same bands; a px of the overview is set where any of its px is.
        """
        factor = self._factor
        for band in bands:
            columns = np.maximum.reduceat(band, np.arange(0, band.shape[1], factor), axis=1) > 0
            rows = (self._row + np.arange(len(band))) // factor
            first = np.flatnonzero(np.diff(rows, prepend=-1))
            self._mask[rows[first]] |= np.logical_or.reduceat(columns, first, axis=0)
            self._row += len(band)
            yield band
            del band  # before the next one is made

    def draw(self, picture: Rgb) -> bytes:
        """Return a PNG of the slide's small `picture` (H, W, 3), of any size, with the outlines on it."""
        height, width = self._mask.shape
        small = np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
        outline = self._mask & ~ndimage.binary_erosion(self._mask)
        small[outline] = COLOR
        sink = io.BytesIO()
        Image.fromarray(small).save(sink, "png", optimize=True)
        return sink.getvalue()
