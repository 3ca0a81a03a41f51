"""COCO's run lengths of a mask, and the polygons along the edges of its pixels.

A mask of `height` x `width` is read column by column, from the top; `counts` are the lengths of its runs, of background
and of foreground in turn. In their packed form, a count is written in characters of six bits from "0" on: five bits of
the number, lowest first, and one that says whether more follow; the highest of the five is the sign. From the fourth
count on, the difference to the count two before is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry import Polygon

Numbers = npt.NDArray[np.int64]
MAX_CHARACTERS = 7  # of a count: 35 bits
LARGEST_SIDE = 1 << 31  # px


def run_lengths(tree: dict[str, Any]) -> tuple[list[int], int, int]:
    """Return (counts, width, height) of a segmentation. Raises ValueError when it is none."""
    size, counts = tree.get("size"), tree.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(_is_whole(side) for side in size):
        raise ValueError("run lengths without a size")
    height, width = size
    if not (0 < height <= LARGEST_SIDE and 0 < width <= LARGEST_SIDE):
        raise ValueError(f"run lengths of {width} x {height} px")
    lengths = _unpacked_counts(counts) if isinstance(counts, str) else counts
    if not isinstance(lengths, list) or not all(_is_whole(length) and length >= 0 for length in lengths):
        raise ValueError("run lengths that are no whole numbers")
    if sum(lengths) > width * height:
        raise ValueError(f"run lengths beyond {width} x {height} px")
    return lengths, width, height


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _unpacked_counts(text: str) -> list[int]:
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift >= 5 * MAX_CHARACTERS:
            raise ValueError("run lengths that are not packed as COCO does")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("run lengths that end within a number")
    return counts


def outlines(counts: list[int], height: int) -> list[Polygon]:
    """Return polygons that together hold exactly the pixels of the foreground.

    Pixels that share a corner only are in different polygons.

    Args:
        counts: lengths of the runs of background and foreground in turn, px.
        height: of the mask, px.

    Returns:
        Polygons with holes, px.
    """
    ends = np.cumsum(np.asarray(counts, np.int64))
    starts, ends = ends[0 : len(ends) // 2 * 2 : 2], ends[1::2]
    drawn = starts < ends
    shells: list[Numbers] = []
    holes: list[Numbers] = []
    for ring, is_hole in _rings(*_rectangles(starts[drawn], ends[drawn], height)):
        (holes if is_hole else shells).append(ring)
    return _with_holes(shells, holes)


def _rectangles(starts: Numbers, ends: Numbers, height: int) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Return (left, top, right, bottom) of rectangles without overlap: each run's first column, last and rest."""
    first, top = np.divmod(starts, height)
    last, bottom = np.divmod(ends, height)  # the first pixel after it
    one = first == last
    begins = ~one & (top > 0)
    whole_from = first + begins
    whole = ~one & (whole_from < last)
    tail = ~one & (bottom > 0)
    zero, full = np.zeros_like(first), np.full_like(first, height)
    parts = [
        (first[one], top[one], first[one] + 1, bottom[one]),
        (first[begins], top[begins], first[begins] + 1, full[begins]),
        (whole_from[whole], zero[whole], last[whole], full[whole]),
        (last[tail], zero[tail], last[tail] + 1, bottom[tail]),
    ]
    left, above, right, below = (np.concatenate(side) for side in zip(*parts, strict=True))
    return left, above, right, below


def _rings(left: Numbers, top: Numbers, right: Numbers, bottom: Numbers) -> Iterator[tuple[Numbers, bool]]:
    """Yield closed rings around the union of rectangles that do not overlap, each with whether it is a hole.

    Where an odd number of rectangles has a corner, the outline turns. Where two have it that lie across from each
    other, two turns meet. Turns in the order of their columns are joined by twos, and in the order of their rows.

    Yields:
        (N, 2) int64 px, and whether it is a hole.
    """
    x = np.concatenate([left, right, right, left])
    y = np.concatenate([top, top, bottom, bottom])
    below, aside = np.repeat([1, 1, 0, 0], len(left)), np.repeat([1, 0, 0, 1], len(left))  # where its rectangle lies
    order = np.lexsort((aside, below, y, x))
    x, y, below, aside = x[order], y[order], below[order], aside[order]
    new = np.r_[True, (np.diff(x) != 0) | (np.diff(y) != 0)][: len(x)]
    first = np.flatnonzero(new)
    corners = np.diff(np.r_[first, len(x)])
    pairs = first[corners == 2]
    across = pairs[(below[pairs] != below[pairs + 1]) & (aside[pairs] != aside[pairs + 1])]
    turns = np.sort(np.concatenate([first[corners % 2 == 1], across, across + 1]))
    places = np.stack([x, y], axis=1)[turns]
    upright = _partners(np.lexsort((below[turns], y[turns], x[turns])))
    level = _partners(np.lexsort((aside[turns], x[turns], y[turns])))
    outer = (below[turns] & aside[turns]).astype(bool)  # the leftmost turn of a ring that is no hole is such
    yield from _walks(places, upright, level, np.isin(turns, np.r_[across, across + 1]), outer)


def _partners(order: Numbers) -> list[int]:
    """Return each turn's other end, where neighbors in `order` are joined by twos."""
    partner = np.empty_like(order)
    partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
    joined: list[int] = partner.tolist()
    return joined


def _walks(
    places: Numbers, upright: list[int], level: list[int], meeting: npt.NDArray[np.bool_], outer: npt.NDArray[np.bool_]
) -> Iterator[tuple[Numbers, bool]]:
    """Walk along the joints, from the leftmost turn of each way downwards; a way through a place twice is two.

    `places` are in the order of their columns. A way begins at an `outer` corner of the foreground, or at a hole's.

    Yields:
        (N, 2) int64 px, and whether it is a hole.
    """
    done = [False] * len(places)
    meets, keys = meeting.tolist(), [tuple(place) for place in places.tolist()]
    for start in range(len(places)):
        if done[start]:
            continue
        path: list[int] = []
        passed: dict[tuple[int, ...], int] = {}
        turn, joints = start, upright
        while not path or turn != start:
            if meets[turn]:
                if (since := passed.get(keys[turn])) is not None:
                    yield _ring(places[path[since:]], not outer[start])
                    del path[since:]
                    passed = {key: at for key, at in passed.items() if at < since}
                passed[keys[turn]] = len(path)
            path.append(turn)
            done[turn] = True
            turn, joints = joints[turn], level if joints is upright else upright
        yield _ring(places[path], not outer[start])


def _ring(open_ring: Numbers, of_hole: bool) -> tuple[Numbers, bool]:
    """Close a ring, and tell whether it is a hole: one that runs against its way, or with the way of a hole."""
    ring = np.concatenate([open_ring, open_ring[:1]])
    x, y = ring[:, 0] - ring[0, 0], ring[:, 1] - ring[0, 1]
    against = int((x[:-1] * y[1:] - x[1:] * y[:-1]).sum()) > 0
    return ring, against != of_hole


def _with_holes(shells: list[Numbers], holes: list[Numbers]) -> list[Polygon]:
    """Put each hole in the smallest shell around it."""
    polygons = [Polygon(shell) for shell in shells]
    if not holes:
        return polygons
    first_pixels = [ring[np.lexsort((ring[:, 1], ring[:, 0]))[0]] + 0.5 for ring in holes]
    around, inside = shapely.STRtree(shapely.points(first_pixels)).query(polygons, predicate="contains")
    smallest_last = np.argsort(-shapely.area(polygons)[around], kind="stable")
    shell_of = dict(zip(inside[smallest_last].tolist(), around[smallest_last].tolist(), strict=True))
    holes_of: dict[int, list[Numbers]] = {}
    for hole, shell in shell_of.items():
        holes_of.setdefault(shell, []).append(holes[hole])
    return [Polygon(shell, holes_of.get(number, ())) for number, shell in enumerate(shells)]
