"""The masks of a slide's tiles, whatever annotates it: polygons, one image of the whole slide, or masks of single FOVs.

Coordinates are the slide's level-0 px. Images follow the rule of polygons: a tile's pixel takes the value of the mask
pixel that holds its center.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from apacs_ray.config.settings import DataSettings
from apacs_ray.data.grid import Box
from apacs_ray.data.images import Mask
from apacs_ray.data.mask_file import MaskFile, require_fits
from apacs_ray.data.masks import CellRule, find_rule
from apacs_ray.errors import BadInput
from apacs_ray.slides.annotations.names import AnnotationKind
from apacs_ray.slides.annotations.rasterize import PolygonMask
from apacs_ray.slides.annotations.read import read_annotations
from apacs_ray.slides.annotations.shapes import LARGEST_FILE
from apacs_ray.slides.reader import SlideInfo

MAX_PIXELS: int = DataSettings.model_fields["max_pixels"].default
NO_MASK = "no_mask"  # code of a picture beside a slide that is no mask of it: a note, no reject
# codes that say that a doubtful image is no mask
PICTURE_CODES = {NO_MASK, "grey_mask", "size_mismatch", "unsupported_mode", "multiple_frames"}
SLACK = 2  # px that a mask image may lack or have over after its size was rounded


class MaskSource(Protocol):
    """The annotation of one slide.

    Attributes:
        defects: its parts that are no area.
        rules: which values of its images are cells, one number an image (none for polygons). They were found by a look
            at all pixels, and spare the next one who opens the same files that look.
    """

    defects: Sequence[str]
    rules: tuple[int, ...]

    def tile(self, x: float, y: float, width: int, height: int, downsample: float) -> Mask | None:
        """Return the mask of a tile.

        Args:
            x: left edge, level-0 px.
            y: top edge, level-0 px.
            width: tile px.
            height: tile px.
            downsample: level-0 px per tile px.

        Returns:
            (height, width) bool, True on cells; None where nobody annotated.

        Raises:
            BadInput: unreadable_region, size_mismatch; a mask image is damaged there.
        """
        ...


def open_masks(
    kind: AnnotationKind,
    files: Sequence[tuple[Path, int, int]],
    info: SlideInfo,
    *,
    classes: Sequence[str] = (),
    threshold: int | None = None,
    max_pixels: int = MAX_PIXELS,
    doubtful: bool = False,
    rules: Sequence[int] = (),
) -> MaskSource:
    """Open the annotation of a slide from local files.

    Args:
        kind: of the annotation.
        files: each with the level-0 (x, y) its name gives (0, 0 where none).
        info: what the slide says of itself.
        classes: annotations of these classes are cells; empty: all.
        threshold: `data.mask_threshold`, 1..255; None: gray masks are refused.
        max_pixels: of an image that cannot be read in parts.
        doubtful: an image is a mask only when it looks like one.
        rules: those that the same files had before; without them all pixels of mask images are read to find them.

    Returns:
        The masks.

    Raises:
        BadInput: no_mask for what is doubtful and no mask; bad_annotation, and the codes of mask files, for defects.
    """
    path = files[0][0]
    if kind == "image":
        return ImageMask(path, info, threshold, max_pixels, doubtful=doubtful, rules=rules)
    if kind == "fovs":
        return FovMasks(files, threshold, max_pixels, rules)
    if path.stat().st_size > LARGEST_FILE:
        raise BadInput("bad_annotation", f"{path.name}: {path.stat().st_size} bytes; {LARGEST_FILE} are the limit")
    drawn = read_annotations(path.read_bytes(), path.name, classes)
    try:
        drawn = drawn.placed(info)
    except BadInput as defect:
        raise BadInput(defect.code, f"{path.name}: {defect.reason}") from defect
    return _Drawn(PolygonMask(drawn), [f"annotation {defect.feature}: {defect.reason}" for defect in drawn.defects])


class _Drawn:
    """Polygons."""

    def __init__(self, mask: PolygonMask, defects: Sequence[str]) -> None:
        self.defects = defects
        self.rules: tuple[int, ...] = ()
        self._mask = mask

    def tile(self, x: float, y: float, width: int, height: int, downsample: float) -> Mask:
        return self._mask.tile(x, y, width, height, downsample)


class ImageMask:
    """A mask image of the whole slide or of its bounds, of the same size or an integer fraction of it."""

    def __init__(
        self,
        path: Path,
        info: SlideInfo,
        threshold: int | None,
        max_pixels: int = MAX_PIXELS,
        *,
        doubtful: bool = False,
        rules: Sequence[int] = (),
    ) -> None:
        """Open the image and find the rule by which its pixels are cells. The arguments are those of `open_masks`.

        Raises:
            BadInput: as `open_masks`.
        """
        self.defects: Sequence[str] = ()
        self._name = path.name
        try:
            self._mask = MaskFile(path, max_pixels)
            self._left, self._top, self._factor = self._place(info)
            self._rule = CellRule(rules[0]) if rules else find_rule(self._mask, threshold, doubtful=doubtful)
        except BadInput as defect:
            if doubtful and defect.code in PICTURE_CODES:
                advice = "it was not taken for the slide's mask; if it is, name it ..._mask"
                raise BadInput(NO_MASK, f"{path.name}: {advice} ({defect.reason})") from defect
            raise BadInput(defect.code, f"{path.name}: {defect.reason}") from defect
        self.rules: tuple[int, ...] = (self._rule.at_least,)

    def _place(self, info: SlideInfo) -> tuple[int, int, int]:
        """Return the level-0 px where it begins, and level-0 px per mask px."""
        whole, bounds = (0, 0, info.width, info.height), info.bounds
        width, height = self._mask.width, self._mask.height
        for x, y, wide, high in (whole, (bounds.x, bounds.y, bounds.width, bounds.height)):
            factor = max(1, round(wide / width))
            if abs(width * factor - wide) < SLACK * factor and abs(height * factor - high) < SLACK * factor:
                return x, y, factor
        raise BadInput(
            "size_mismatch",
            f"{width} x {height} px is no integer fraction of the slide's {info.width} x {info.height} px or of its "
            f"bounds, {bounds.width} x {bounds.height} px",
        )

    def tile(self, x: float, y: float, width: int, height: int, downsample: float) -> Mask:
        """Return the mask of a tile, as `MaskSource.tile`; nothing outside of the image is a cell.

        Returns:
            (height, width) bool.

        Raises:
            BadInput: unreadable_region.
        """
        columns = np.floor((x + (np.arange(width) + 0.5) * downsample - self._left) / self._factor).astype(np.int64)
        rows = np.floor((y + (np.arange(height) + 0.5) * downsample - self._top) / self._factor).astype(np.int64)
        left, top = max(int(columns[0]), 0), max(int(rows[0]), 0)
        right, bottom = min(int(columns[-1]) + 1, self._mask.width), min(int(rows[-1]) + 1, self._mask.height)
        mask = np.zeros((height, width), bool)
        if right <= left or bottom <= top:
            return mask
        try:
            cells = self._rule.cells(self._mask.read(Box(left, top, right - left, bottom - top)))
        except BadInput as defect:
            raise BadInput("unreadable_region", f"{self._name}: {defect.reason}") from defect
        inside_rows, inside_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
        picked = cells[np.ix_(rows[inside_rows] - top, columns[inside_columns] - left)]
        mask[np.ix_(inside_rows, inside_columns)] = picked
        return mask


class FovMasks:
    """Masks of single FOVs at full resolution. A tile that they do not cover wholly is not annotated.

    One that cannot be used refuses them all: where only some are read, it is those with fewer cells.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, int, int]],
        threshold: int | None,
        max_pixels: int,
        rules: Sequence[int] = (),
    ) -> None:
        """Open every mask and find its rule. The arguments are those of `open_masks`.

        Raises:
            BadInput: as `open_masks`.
        """
        self.defects: Sequence[str] = ()
        self._files = files
        self._max_pixels = max_pixels
        self._sizes: list[tuple[int, int]] = []
        thresholds: list[int] = []
        for number, (path, _, _) in enumerate(files):
            mask = self._opened(path)
            self._sizes.append((mask.width, mask.height))
            try:
                thresholds.append(rules[number] if rules else find_rule(mask, threshold).at_least)
            except BadInput as defect:
                raise BadInput(defect.code, f"{path.name}: {defect.reason}") from defect
        self.rules = tuple(thresholds)
        self._cells: tuple[int, Mask] | None = None  # number and cells of the FOV that was read last

    def _opened(self, path: Path) -> MaskFile:
        try:
            mask = MaskFile(path, self._max_pixels)
            require_fits(mask.width, mask.height, self._max_pixels)
        except BadInput as defect:
            raise BadInput(defect.code, f"{path.name}: {defect.reason}") from defect
        return mask

    def tile(self, x: float, y: float, width: int, height: int, downsample: float) -> Mask | None:
        """Return the mask of a tile, as `MaskSource.tile`; None where FOVs do not cover it wholly."""
        columns = np.floor(x + (np.arange(width) + 0.5) * downsample).astype(np.int64)
        rows = np.floor(y + (np.arange(height) + 0.5) * downsample).astype(np.int64)
        mask, covered = np.zeros((2, height, width), bool)
        for number, (_, left, top) in enumerate(self._files):
            wide, high = self._sizes[number]
            across = (columns >= left) & (columns < left + wide)
            down = (rows >= top) & (rows < top + high)
            if across.any() and down.any():
                fov = self._decoded(number)
                mask[np.ix_(down, across)] |= fov[np.ix_(rows[down] - top, columns[across] - left)]
                covered[np.ix_(down, across)] = True
        return mask if covered.all() else None

    def _decoded(self, number: int) -> Mask:
        if self._cells is None or self._cells[0] != number:
            path = self._files[number][0]
            mask = self._opened(path)
            if (mask.width, mask.height) != self._sizes[number]:
                raise BadInput("size_mismatch", f"{path.name}: its size has changed")
            try:
                pixels = mask.read(Box(0, 0, mask.width, mask.height))
            except BadInput as defect:
                raise BadInput("unreadable_region", f"{path.name}: {defect.reason}") from defect
            self._cells = number, CellRule(self.rules[number]).cells(pixels)
        return self._cells[1]
