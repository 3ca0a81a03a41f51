"""Shapes of annotation files as drawn, unchecked, and limits on what is parsed: common to all readers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry import GeometryCollection, Polygon

from apacs_ray.errors import BadInput

LARGEST_FILE = 512 << 20  # bytes, packed or not
# Brackets and commas of JSON, or tags and attributes of XML, each an object of up to 150 bytes in memory; a vertex
# takes three or four of them
MAX_PARTS = 30_000_000
FARTHEST = 2.0**31  # px; no slide reaches so far, and arithmetic is exact
READ_FORMATS = "read are GeoJSON, COCO, and the XML of ASAP and ImageScope"
# what numpy and shapely raise over coordinates that are none
MALFORMED = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, shapely.errors.ShapelyError)
Origin = Literal["bounds", "level0"]


@dataclass(frozen=True)
class Shape:
    """One annotation of a file. `geometry` is what was drawn, px, unchecked, or why it is no area.

    Attributes:
        number: its index in the file.
        classes: the names that a class filter may ask for, the fullest first.
        geometry: see above.
        layer: regions of one layer belong together.
        negative: it is cut out of the other areas of its layer.
        left_out: why it is no cell where no class is asked for.
    """

    number: int
    classes: tuple[str, ...]
    geometry: Polygon | GeometryCollection | str
    layer: int = 0
    negative: bool = False
    left_out: str | None = None


@dataclass(frozen=True)
class Drawing:
    """All shapes of a file that was understood; there are none where nobody drew anything.

    Attributes:
        file_format: what the file is, for a person.
        shapes: in the order of the file; they can be read once.
        origin: where its coordinates begin, at the slide's bounds or at level 0.
        size: (width, height) px of the picture that it was drawn on, if that is known.
    """

    file_format: str
    shapes: Iterable[Shape]
    origin: Origin = "level0"
    size: tuple[int, int] | None = None


def require_bounded(text: str, marks: str) -> None:
    """Raise BadInput for a text that would take far more memory than it has characters, before it is parsed."""
    parts = sum(text.count(mark) for mark in marks)
    if parts > MAX_PARTS:
        raise BadInput("bad_annotation", f"{parts} parts, about {parts // 3} vertices; {MAX_PARTS} parts are the limit")


def polygon_of(shell: Any, holes: Iterable[Any] = ()) -> Polygon:
    """Return the polygon of rings of positions, of which x and y count; unchecked. Raises one of `MALFORMED`."""
    return Polygon(positions(shell), [positions(hole) for hole in holes])


def positions(points: Any) -> npt.NDArray[np.float64]:
    """Return the (N, 2) float64 array of a list of positions [x, y] or longer ones. Raises one of `MALFORMED`."""
    try:
        array = np.asarray(points, np.float64)
    except ValueError:  # some positions have three numbers, others two
        array = np.asarray([[point[0], point[1]] for point in points], np.float64)
    if array.ndim != 2 or array.shape[1] < 2:
        raise ValueError("it is no list of positions x, y")
    array = array[:, :2]
    if not np.isfinite(array).all():
        raise ValueError("a coordinate is not finite")
    if (np.abs(array) > FARTHEST).any():
        raise ValueError("a coordinate lies beyond any slide")
    return array


def class_names(*names: str | None) -> tuple[str, ...]:
    """Return names without blanks around them, each once, none empty."""
    return tuple(dict.fromkeys(name.strip() for name in names if name and name.strip()))


def shortened(text: object, length: int = 60) -> str:
    """Return a name of the file's, short enough for a sentence."""
    name = str(text)
    return name if len(name) <= length else f"{name[:length]}..."


def counted(counts: Iterable[tuple[str, int]], most: int = 8) -> str:
    """Return `name (count)` of the most frequent names, for a sentence."""
    ordered = sorted(counts, key=lambda entry: (-entry[1], entry[0]))
    named = ", ".join(f"{shortened(name, 100)} ({count})" for name, count in ordered[:most])
    return named + (f" and {len(ordered) - most} more" if len(ordered) > most else "")


def ellipse(left: float, top: float, right: float, bottom: float) -> Polygon:
    """Return the ellipse in a box, as a polygon that departs from it by less than a tenth of a pixel."""
    radii = np.array([right - left, bottom - top]) / 2
    corners = min(max(32, int(8 * float(np.abs(radii).max()) ** 0.5)), 4096)
    angles: npt.NDArray[np.float64] = 2 * np.pi * np.arange(corners) / corners
    return Polygon(np.array([left, top]) + radii * (1 + np.stack([np.cos(angles), np.sin(angles)], axis=1)))
