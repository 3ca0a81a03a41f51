"""Annotations of a slide, read from a file of any known format; its content tells the format, not its name.

Annotations that cannot be used are listed one by one. A file with annotations, none of which can be used, is refused:
else it would say that there is no cell.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import shapely
from shapely.geometry import Polygon

from apacs_ray.errors import BadInput
from apacs_ray.slides.annotations.areas import areas_of, cut_out
from apacs_ray.slides.annotations.coco import is_coco, read_coco
from apacs_ray.slides.annotations.geojson import read_geojson
from apacs_ray.slides.annotations.shapes import (
    READ_FORMATS,
    Drawing,
    Origin,
    Shape,
    counted,
    require_bounded,
    shortened,
)
from apacs_ray.slides.annotations.unpack import decoded, unpacked
from apacs_ray.slides.annotations.xml import read_xml
from apacs_ray.slides.reader import SlideInfo

MAX_DEFECTS = 1000  # that are listed one by one
SLACK = 2  # px that a picture of the slide may lack or have over after its size was rounded


@dataclass(frozen=True)
class Defect:
    """An annotation that is no area: its index in the file, and why."""

    feature: int
    reason: str


@dataclass(frozen=True)
class Annotations:
    """The areas of one slide, px from `origin` on.

    Attributes:
        areas: valid polygons.
        defects: annotations that were left out.
        repaired: number of those that crossed themselves and were made valid.
        origin: where coordinates begin, at the slide's bounds or at level 0.
        size: (width, height) px of the picture that was annotated, if the file says so.
    """

    areas: tuple[Polygon, ...]
    defects: tuple[Defect, ...] = ()
    repaired: int = 0
    origin: Origin = "level0"
    size: tuple[int, int] | None = None

    def placed(self, info: SlideInfo) -> Annotations:
        """Return the same areas in level-0 px of their slide.

        A picture that was annotated may be the slide or its bounds, of any scale.

        Args:
            info: what the slide says of itself.

        Returns:
            Areas whose `origin` is level 0, and that have no `size`.

        Raises:
            BadInput: size_mismatch, or bad_annotation where all areas lie outside of the slide.
        """
        x, y, scale = 0.0, 0.0, 1.0
        if self.origin == "bounds":
            x, y = info.bounds.x, info.bounds.y
        if self.size is not None:
            x, y, scale = _place(self.size, info)
        areas = self.areas
        if (x, y, scale) != (0, 0, 1):
            areas = tuple(shapely.transform(list(areas), lambda points: points * scale + np.array([x, y])))
        left, top, right, bottom = shapely.bounds(list(areas)).reshape(-1, 4).T
        if areas and not ((left < info.width) & (top < info.height) & (right > 0) & (bottom > 0)).any():
            raise BadInput(
                "bad_annotation",
                f"all {len(areas)} areas lie outside of the slide's {info.width} x {info.height} px: is it of another "
                "slide, or not in level-0 px?",
            )
        return replace(self, areas=areas, origin="level0", size=None)


def _place(size: tuple[int, int], info: SlideInfo) -> tuple[float, float, float]:
    """Return where a picture of the slide begins, level-0 px, and level-0 px per px of it."""
    bounds = info.bounds
    for x, y, width, height in ((0, 0, info.width, info.height), (bounds.x, bounds.y, bounds.width, bounds.height)):
        exact = max(width / size[0], height / size[1])
        for scale in (max(1, round(exact)), exact):  # sides may have been cut to whole px at an integer scale
            slack = SLACK * max(scale, 1)
            if abs(size[0] * scale - width) < slack and abs(size[1] * scale - height) < slack:
                return x, y, scale
    raise BadInput(
        "size_mismatch",
        f"drawn on {size[0]} x {size[1]} px, which is neither the slide's {info.width} x {info.height} px in small nor "
        f"its bounds, {bounds.width} x {bounds.height} px",
    )


def read_annotations(content: bytes, name: str, classes: Sequence[str] = ()) -> Annotations:
    """Read the areas of an annotation file: GeoJSON, COCO, ASAP's or ImageScope's XML, plain or in gzip or zip.

    Args:
        content: the file's bytes.
        name: its name, for sentences, and to find its slide among several of a COCO file.
        classes: only annotations of these classes are cells; empty: all are, except QuPath's Ignore* and Region*.

    Returns:
        Areas; none at all only if the file was understood and nobody drew anything in it.

    Raises:
        BadInput: bad_annotation; the file is damaged, of another kind, or nothing in it can be used.
    """
    try:
        return _checked(_drawing(decoded(unpacked(content)), name), classes)
    except BadInput as defect:
        raise BadInput(defect.code, f"{shortened(name, 200)}: {defect.reason}") from defect


def _drawing(text: str, name: str) -> Drawing:
    text = text.lstrip("\ufeff \t\r\n")
    if text.startswith("<"):
        return read_xml(text)
    if not text.startswith(("{", "[")):
        what = "neither JSON nor XML" if text else "an empty file"
        raise BadInput("bad_annotation", f"{what}; {READ_FORMATS}")
    require_bounded(text, "[{,")
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput("bad_annotation", f"no JSON: {shortened(error, 120)}") from error
    return read_coco(tree, name) if is_coco(tree) else read_geojson(tree)


class _Collected:
    """The areas, holes and defects of a file's shapes."""

    def __init__(self) -> None:
        self.areas: dict[int, list[tuple[int, Polygon]]] = defaultdict(list)  # by layer, each with its index
        self.holes: dict[int, list[Polygon]] = defaultdict(list)
        self.repaired = 0
        self.reasons: Counter[str] = Counter()
        self._defects: list[Defect] = []

    def take(self, shape: Shape) -> None:
        if isinstance(shape.geometry, str):
            self.tell(shape.number, shape.geometry)
            return
        parts, reason = areas_of(shape.geometry)
        if not parts:
            self.tell(shape.number, reason or "it has no area")
        elif reason is not None:
            self.repaired += 1
        if shape.negative:
            self.holes[shape.layer] += parts
        else:
            self.areas[shape.layer] += [(shape.number, part) for part in parts]

    def tell(self, number: int, reason: str) -> None:
        self.reasons[reason] += 1
        if len(self._defects) < MAX_DEFECTS:
            self._defects.append(Defect(number, reason))

    def cut(self) -> list[Polygon]:
        """Return the areas without the negative regions of their layers."""
        left: list[Polygon] = []
        for layer, drawn in self.areas.items():
            areas = [area for _, area in drawn]
            if not self.holes[layer]:
                left += areas
                continue
            for (number, _), (parts, reason) in zip(drawn, cut_out(areas, self.holes[layer]), strict=True):
                left += parts
                if not parts:
                    self.tell(number, reason or "negative regions cover all of it")
        if not left and (negative := sum(map(len, self.holes.values()))):
            self.reasons["negative region"] += negative
        return left

    def defects(self) -> tuple[Defect, ...]:
        untold = self.reasons.total() - len(self._defects)
        if untold <= 0:
            return tuple(self._defects)
        last = self._defects[-1].feature
        return (*self._defects, Defect(last, f"and {untold} more after this one have no area either"))


def _checked(drawing: Drawing, classes: Sequence[str]) -> Annotations:
    wanted, class_counts = {name.strip() for name in classes}, Counter[str]()
    collected, total, wanted_count = _Collected(), 0, 0
    for shape in drawing.shapes:
        total += 1
        class_counts.update(shape.classes or ("no class",))
        if wanted and wanted.isdisjoint(shape.classes):
            continue
        wanted_count += 1
        collected.take(replace(shape, geometry=shape.left_out) if shape.left_out and not wanted else shape)
    if total and not wanted_count:
        raise BadInput(
            "bad_annotation",
            f"none of its {total} annotations is of class {' or '.join(sorted(wanted))} (data.mask_classes); it has "
            f"{counted(class_counts.items())}",
        )
    areas = collected.cut()
    if total and not areas:
        raise BadInput(
            "bad_annotation",
            f"{drawing.file_format} of which no annotation can be drawn: {counted(collected.reasons.items(), 3)}",
        )
    if areas:
        left, top, right, bottom = shapely.total_bounds(areas)
        if right - left <= 1 and bottom - top <= 1:
            raise BadInput(
                "bad_annotation",
                "all areas lie within one pixel: coordinates must be in px, not in shares of the slide",
            )
    return Annotations(tuple(areas), collected.defects(), collected.repaired, drawing.origin, drawing.size)
