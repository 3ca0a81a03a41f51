"""A plain picture (PNG, JPEG, BMP) as a slide of one level: decoded whole, as images of a data set are."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from apacs_ray.data.grid import Box
from apacs_ray.data.images import Rgb, decode_image
from apacs_ray.errors import BadInput
from apacs_ray.slides.mask_sources import MAX_PIXELS
from apacs_ray.slides.reader import Level, SlideInfo, filled

MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"BM")
SUFFIXES = {"png", "jpg", "jpeg", "bmp"}


class ImageSlide:
    """The slide of a picture, of unknown um per px."""

    def __init__(self, path: Path) -> None:
        """Decode the picture at `path`. Raises BadInput where it is none, damaged or too large."""
        try:
            self._pixels = decode_image(path.read_bytes(), MAX_PIXELS)
        except BadInput as defect:
            if defect.code != "too_large":
                raise
            reason = f"{path.name}: too large a picture to be decoded whole; save it as a tiled TIFF ({defect.reason})"
            raise BadInput("too_large", reason) from defect
        height, width, _ = self._pixels.shape
        self.info = SlideInfo("image", (Level(width, height, 1.0),), None, Box(0, 0, width, height))

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Rgb:
        """Return a region as an array, as `Slide.read`."""
        rgb = filled(self.info, width, height)
        part = self._pixels[max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)]
        top, left = max(-y, 0), max(-x, 0)
        rgb[top : top + part.shape[0], left : left + part.shape[1]] = part
        return rgb

    def read_image(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        """Return a region as a picture, as `Slide.read_image`."""
        return Image.fromarray(self.read(level, x, y, width, height))

    def close(self) -> None:
        """Nothing is open."""
