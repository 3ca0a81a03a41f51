"""The mask of a tile, whatever annotates its slide: polygons, one image of the whole slide, or masks of single FOVs.

Coordinates are the slide's level-0 px. Images follow the rule of polygons: a tile's pixel takes the value of the mask
pixel that holds its centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyvips

from apacs_ray.data.images import decode_mask
from apacs_ray.errors import BadInput
from apacs_ray.slides.annotation_names import AnnotationKind
from apacs_ray.slides.polygons import LARGEST_FILE, PolygonMask, read_asap, read_geojson
from apacs_ray.slides.reader import SlideInfo

Mask = npt.NDArray[np.bool_]
MAX_PIXELS = 400_000_000
MAX_TILE = 1 << 26  # px of one tile of a mask in tiles, which is decoded as a whole
SLACK = 2  # px that a mask image may lack or have over after its size was rounded


class MaskSource(Protocol):
    """The annotation of one slide. `defects` are its parts that are no area."""

    defects: Sequence[str]

    def tile(self, x: float, y: float, width: int, height: int, downsample: float) -> Mask | None:
        """(height, width) bool, True on cells; None where nobody annotated. Raises BadInput where it is damaged."""
        ...


def open_masks(
    kind: AnnotationKind,
    files: Sequence[tuple[Path, int, int]],
    info: SlideInfo,
    *,
    classes: Sequence[str] = (),
    threshold: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> MaskSource:
    """The annotation of a slide from local files, each with the level-0 (x, y) its name gives (0, 0 where none).

    QuPath shows a slide from its bounds on, so GeoJSON begins there; ASAP counts from level 0. Raises BadInput.
    """
    path = files[0][0]
    if kind in ("geojson", "xml") and path.stat().st_size > LARGEST_FILE:
        raise BadInput("bad_annotation", f"{path.stat().st_size} bytes; {LARGEST_FILE} are the limit")
    if kind == "geojson":
        found = read_geojson(path.read_bytes(), classes).moved(info.bounds.x, info.bounds.y)
        return _Drawn(PolygonMask(found), [f"feature {defect.feature}: {defect.reason}" for defect in found.defects])
    if kind == "xml":
        found = read_asap(path.read_bytes(), classes)
        return _Drawn(PolygonMask(found), [f"annotation {defect.feature}: {defect.reason}" for defect in found.defects])
    if kind == "image":
        return ImageMask(path, info, threshold, max_pixels)
    return FovMasks(files, threshold, max_pixels)


class _Drawn:
    """Polygons."""

    def __init__(self, mask: PolygonMask, defects: Sequence[str]) -> None:
        self.defects = defects
        self._mask = mask

    def tile(self, x: float, y: float, width: int, height: int, downsample: float) -> Mask:
        return self._mask.tile(x, y, width, height, downsample)


class ImageMask:
    """A mask image of the whole slide or of its bounds, of the same size or an integer fraction of it."""

    def __init__(self, path: Path, info: SlideInfo, threshold: int | None, max_pixels: int = MAX_PIXELS) -> None:
        self.defects: Sequence[str] = ()
        self._name = path.name
        self._threshold = threshold
        try:
            image = pyvips.Image.new_from_file(str(path), access="random", fail_on="error")
        except pyvips.Error as error:
            raise BadInput("unreadable", f"{path.name}: {str(error).strip()[:200]}") from error
        _require_bounded(image, path.name, max_pixels)
        if image.hasalpha():
            image = image.flatten()
        self._image: Any = image
        self._left, self._top, self._factor = self._place(info)

    def _place(self, info: SlideInfo) -> tuple[int, int, int]:
        """Level-0 px where it begins, and level-0 px per mask px."""
        whole, bounds = (0, 0, info.width, info.height), info.bounds
        width, height = self._image.width, self._image.height
        for x, y, wide, high in (whole, (bounds.x, bounds.y, bounds.width, bounds.height)):
            factor = max(1, round(wide / width))
            if abs(width * factor - wide) < SLACK * factor and abs(height * factor - high) < SLACK * factor:
                return x, y, factor
        raise BadInput(
            "size_mismatch",
            f"{self._name}: {width} x {height} px is no integer fraction of the slide's {info.width} x {info.height}"
            f" px or of its bounds, {bounds.width} x {bounds.height} px",
        )

    def tile(self, x: float, y: float, width: int, height: int, downsample: float) -> Mask:
        columns = np.floor((x + (np.arange(width) + 0.5) * downsample - self._left) / self._factor).astype(np.int64)
        rows = np.floor((y + (np.arange(height) + 0.5) * downsample - self._top) / self._factor).astype(np.int64)
        left, top = max(int(columns[0]), 0), max(int(rows[0]), 0)
        right, bottom = min(int(columns[-1]) + 1, self._image.width), min(int(rows[-1]) + 1, self._image.height)
        mask = np.zeros((height, width), bool)
        if right <= left or bottom <= top:
            return mask
        try:
            part = self._image.crop(left, top, right - left, bottom - top).numpy()
        except pyvips.Error as error:
            raise BadInput("unreadable_region", f"{self._name}: {str(error).strip()[:200]}") from error
        cells = self._cells(part)
        inside_rows, inside_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
        picked = cells[np.ix_(rows[inside_rows] - top, columns[inside_columns] - left)]
        mask[np.ix_(inside_rows, inside_columns)] = picked
        return mask

    def _cells(self, values: npt.NDArray[Any]) -> Mask:
        if values.ndim == 3:
            if (values != values[..., :1]).any():
                raise BadInput("grey_mask", f"{self._name}: the mask has colours")
            values = values[..., 0]
        if self._threshold is not None:
            return (values >> 8 if values.dtype == np.uint16 else values) >= self._threshold
        present = set(np.unique(values).tolist())
        if not (present <= {0, 1} or present <= {0, 255} or present <= {0, 65535}):
            raise BadInput(
                "grey_mask",
                f"{self._name}: the mask has grey values, not just 0 and 1 or 0 and 255; data.mask_threshold N takes "
                "values of at least N as cell",
            )
        return values > 0


def _require_bounded(image: Any, name: str, max_pixels: int) -> None:
    """Raise BadInput (too_large) for what libvips would have to unpack as a whole, in memory or on disk."""
    fields = image.get_fields()
    tiled = "tile-width" in fields and "tile-height" in fields
    if not tiled and image.width * image.height > max_pixels:
        raise BadInput(
            "too_large",
            f"{name}: {image.width} x {image.height} px exceed data.max_pixels ({max_pixels}); save it as a tiled TIFF",
        )
    if tiled and image.get("tile-width") * image.get("tile-height") > MAX_TILE:
        raise BadInput("too_large", f"{name}: in tiles of {image.get('tile-width')} x {image.get('tile-height')} px")


class FovMasks:
    """Masks of single FOVs at full resolution. A tile that they do not cover wholly is not annotated."""

    def __init__(self, files: Sequence[tuple[Path, int, int]], threshold: int | None, max_pixels: int) -> None:
        self.defects: Sequence[str] = ()
        self._files = files
        self._threshold = threshold
        self._max_pixels = max_pixels
        self._sizes = [self._size(path) for path, _, _ in files]

    def _size(self, path: Path) -> tuple[int, int]:
        from apacs_ray.data.images import probe_image

        with path.open("rb") as file:
            return probe_image(file, self._max_pixels)

    def tile(self, x: float, y: float, width: int, height: int, downsample: float) -> Mask | None:
        columns = np.floor(x + (np.arange(width) + 0.5) * downsample).astype(np.int64)
        rows = np.floor(y + (np.arange(height) + 0.5) * downsample).astype(np.int64)
        mask, covered = np.zeros((2, height, width), bool)
        for (path, left, top), (wide, high) in zip(self._files, self._sizes, strict=True):
            across = (columns >= left) & (columns < left + wide)
            down = (rows >= top) & (rows < top + high)
            if across.any() and down.any():
                fov = decode_mask(path.read_bytes(), self._max_pixels, self._threshold)
                mask[np.ix_(down, across)] |= fov[np.ix_(rows[down] - top, columns[across] - left)]
                covered[np.ix_(down, across)] = True
        return mask if covered.all() else None
