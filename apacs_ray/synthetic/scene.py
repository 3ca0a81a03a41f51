"""The scene of a synthetic smear: objects by block, so that any region of a slide knows its own."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import cast

import numpy as np

from apacs_ray.data.grid import Box
from apacs_ray.synthetic.cells import REACH, SOFT_UM, CellKind, Stamp, cell_radius, cell_stamp
from apacs_ray.synthetic.clutter import ClutterKind, clutter_radius, clutter_stamp
from apacs_ray.synthetic.stain import Look
from apacs_ray.synthetic.texture import field_at, place_rng

BLOCK_UM = 200  # one block of a slide has its own random objects
_GROUP_UM = 180  # no cell's center is farther than this from where its group began
FARTHEST_UM = 250  # no object reaches farther than this from its block
_OBJECTS, _DENSITY, _INFLAMED = 1, 2, 3  # random streams
_CELLS: tuple[CellKind, ...] = ("superficial", "intermediate", "parabasal", "dysplastic", "anucleate")

# Mean number in a block.
_CLUTTER: tuple[tuple[ClutterKind, float], ...] = (
    ("mucus", 0.3),
    ("debris", 1.6),
    ("bacteria", 0.5),
    ("precipitate", 0.3),
    ("dust", 0.25),
    ("bubble", 0.01),
)


@dataclass(frozen=True)
class Thing:
    """One object: center pixel and reach in px, nominal radius in um, and the seed of all else about it."""

    kind: CellKind | ClutterKind
    x: int
    y: int
    reach: int
    radius: float
    seed: int

    @property
    def is_cell(self) -> bool:
        """Whether it belongs to the mask."""
        return self.kind in _CELLS

    def stamp(self, look: Look, mpp: float) -> Stamp:
        """Draw it; the stamp's corner is at (x - reach, y - reach)."""
        if self.kind in _CELLS:
            return cell_stamp(self.kind, self.radius, self.reach, self.seed, look, mpp)
        return clutter_stamp(cast(ClutterKind, self.kind), self.radius, self.reach, self.seed, look, mpp)


def things_near(seed: int, look: Look, mpp: float, box: Box) -> list[Thing]:
    """Return every object whose stamp touches the box (level-0 px), always in the same order."""
    block = BLOCK_UM / mpp
    wide = box.grown(ceil(FARTHEST_UM / mpp))
    things = []
    for row in range(int(wide.y // block), int((wide.y + wide.height) // block) + 1):
        for column in range(int(wide.x // block), int((wide.x + wide.width) // block) + 1):
            things += [thing for thing in things_of_block(seed, look, mpp, column, row) if _touches(thing, box)]
    return things


def _touches(thing: Thing, box: Box) -> bool:
    return (
        box.x - thing.reach <= thing.x < box.x + box.width + thing.reach
        and box.y - thing.reach <= thing.y < box.y + box.height + thing.reach
    )


def things_of_block(seed: int, look: Look, mpp: float, column: int, row: int) -> list[Thing]:
    """Return the objects of one block: cells in groups, then what lies on them."""
    rng = place_rng(seed, _OBJECTS, column, row)
    things: list[Thing] = []
    for _ in range(rng.poisson(5.2 * look.crowding)):
        at = _somewhere(rng, column, row)
        density = field_at(seed, _DENSITY, at[0] / mpp, at[1] / mpp, 330 / mpp)
        if rng.random() < np.clip(0.62 + 0.5 * density, 0.05, 1):
            things += _group(rng, look, mpp, at)
    for kind, mean in _CLUTTER:
        many = mean * (look.mucus if kind == "mucus" else 1.0)
        things += [_clutter(kind, rng, mpp, _somewhere(rng, column, row)) for _ in range(rng.poisson(many))]
    if rng.random() < 0.12:
        at = _somewhere(rng, column, row)
        things += [_clutter("blood", rng, mpp, _nearby(rng, at, 22)) for _ in range(rng.integers(2, 14))]
    for _ in range(rng.poisson(6 * look.inflammation)):
        at = _somewhere(rng, column, row)
        inflamed = field_at(seed, _INFLAMED, at[0] / mpp, at[1] / mpp, 240 / mpp)
        if rng.random() < np.clip(0.3 + 0.45 * inflamed, 0.04, 1):
            many = 1 + int(rng.integers(3, 16) * (rng.random() < 0.16))
            things += [_clutter("neutrophil", rng, mpp, _nearby(rng, at, 4.0 * many**0.5)) for _ in range(many)]
    return things


def _group(rng: np.random.Generator, look: Look, mpp: float, at: tuple[float, float]) -> list[Thing]:
    """Return cells that touch and overlap: mostly one to four, sometimes a sheet of a dozen."""
    size = int(rng.choice((1, 2, 3, 4, 7, 11), p=(0.52, 0.2, 0.12, 0.08, 0.06, 0.02)))
    main: CellKind = "superficial" if rng.random() < look.eosinophilic else "intermediate"
    if rng.random() < 0.07:
        main = "parabasal"
        size += 2
    rare = rng.random()
    cells: list[Thing] = []
    place = at
    for _ in range(size):
        kind = main
        if rare < 0.03:
            kind = "dysplastic"
        elif main != "parabasal" and rng.random() < 0.28:
            kind = ("superficial", "intermediate", "intermediate", "anucleate")[int(rng.integers(4))]
        radius = cell_radius(kind, rng)
        if cells:
            beside = cells[int(rng.integers(len(cells)))]
            away = (beside.radius + radius) * rng.uniform(0.62, 1.0)
            angle = rng.uniform(0, 2 * np.pi)
            place = (beside.x * mpp + away * np.cos(angle), beside.y * mpp + away * np.sin(angle))
            if np.hypot(place[0] - at[0], place[1] - at[1]) > _GROUP_UM:
                place = at
        cells.append(_thing(kind, rng, mpp, place, radius, REACH * radius + SOFT_UM))
    return cells


def _clutter(kind: ClutterKind, rng: np.random.Generator, mpp: float, at: tuple[float, float]) -> Thing:
    radius = clutter_radius(kind, rng)
    return _thing(kind, rng, mpp, at, radius, 1.12 * radius + SOFT_UM)


def _thing(
    kind: CellKind | ClutterKind,
    rng: np.random.Generator,
    mpp: float,
    at: tuple[float, float],
    radius: float,
    reach: float,
) -> Thing:
    seed = int(rng.integers(2**63))
    return Thing(kind, round(at[0] / mpp), round(at[1] / mpp), ceil(reach / mpp), radius, seed)


def _somewhere(rng: np.random.Generator, column: int, row: int) -> tuple[float, float]:
    """Return a place (um) in the block."""
    x, y = rng.random(2)
    return float((column + x) * BLOCK_UM), float((row + y) * BLOCK_UM)


def _nearby(rng: np.random.Generator, at: tuple[float, float], spread: float) -> tuple[float, float]:
    x, y = np.clip(rng.normal(0, spread, 2), -3 * spread, 3 * spread)
    return float(at[0] + x), float(at[1] + y)
