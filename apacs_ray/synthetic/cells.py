"""Epithelial cells of a synthetic smear, one at a time: optical density, and the mask's exact outline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from apacs_ray.synthetic.stain import RGB, Look, blend, jittered
from apacs_ray.synthetic.texture import Atlas, Floats, atlas

Bools = npt.NDArray[np.bool_]
CellKind = Literal["superficial", "intermediate", "parabasal", "dysplastic", "anucleate"]

REACH = 1.6  # nominal radii: no outline goes farther
SOFT_UM = 2.4  # um that an object's own defocus may add around it
_ANGLES = 1024


@dataclass(frozen=True)
class Stamp:
    """The drawing of one object around its center pixel.

    Attributes:
        density: (3, S, S) float32, S odd: optical density of R, G, B.
        cell: (S, S) bool, the outline of cytoplasm and nucleus together, before any blur; None for clutter.
        nucleus: (S, S) bool, that of the nucleus; None for clutter.
    """

    density: Floats
    cell: Bools | None = None
    nucleus: Bools | None = None


@dataclass(frozen=True)
class CellTraits:
    """The traits of one cell; lengths in um."""

    radius: float
    corners: int
    jaggedness: float  # spread of the corners' distances
    rounding: float  # degrees over which corners are smoothed
    amount: float  # of stain in the cytoplasm
    colors: tuple[RGB, RGB]  # the cytoplasm's, patches of two
    wrinkles: float
    rim: float
    nucleus: float  # radius; 0: none
    chromatin: float  # amount of hematoxylin
    vesicular: float  # 0 pyknotic (solid) .. 1 pale inside with a dark rim
    irregular: float  # of the nucleus' outline
    halo: float  # share of the cytoplasm missing around the nucleus
    fold: bool


def cell_radius(kind: CellKind, rng: np.random.Generator) -> float:
    """Draw a nominal radius in um: that of the circle with about the cell's area."""
    low, high = {
        "superficial": (20, 33),
        "intermediate": (20, 33),
        "parabasal": (9.5, 14),
        "dysplastic": (15, 24),
        "anucleate": (17, 26),
    }[kind]
    return float(rng.uniform(low, high))


def cell_stamp(kind: CellKind, radius: float, reach: int, seed: int, look: Look, mpp: float) -> Stamp:
    """Draw a cell.

    Args:
        kind: of the cell.
        radius: nominal, um.
        reach: the stamp has 2 * reach + 1 px a side.
        seed: from which all else about it follows.
        look: of its slide.
        mpp: um per px.

    Returns:
        The stamp.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    traits = _traits(kind, radius, look, rng)
    y, x = _axes(reach, rng)
    outline = _Outline.draw(traits, rng, mpp)
    textures = atlas(mpp)

    nucleus, nucleus_depth = _nucleus_place(traits, rng, x, y, mpp)
    thickness, cell = _cytoplasm(traits, outline, rng, x, y, textures, mpp)
    cell |= nucleus
    if traits.halo > 0:
        ring = nucleus_depth + traits.nucleus / mpp * 1.4
        thickness *= 1 - traits.halo * np.clip(ring * mpp / 1.5, 0, 1)

    patches = np.clip(0.5 + 0.6 * textures.cut("cloud", rng, cell.shape), 0, 1)
    first, second = (np.asarray(dye, np.float32)[:, None, None] for dye in traits.colors)
    density = thickness * (first + (second - first) * patches)
    if traits.nucleus:
        dye = np.asarray(jittered(look.hematoxylin, rng, 0.06), np.float32)[:, None, None]
        density += dye * _chromatin(traits, nucleus_depth, textures, rng, mpp)
    softness = rng.uniform(0, 0.9) / mpp * (rng.random() < 0.35)
    if softness > 0.2:  # it lies above or below the plane of focus
        density = gaussian_filter(density, (0, softness, softness), mode="constant", truncate=2.5)
    return Stamp(np.asarray(density, np.float32), cell, nucleus)


def _traits(kind: CellKind, radius: float, look: Look, rng: np.random.Generator) -> CellTraits:
    """Draw a cell's traits: eosinophilic or cyanophilic by kind, and about one in six barely stained."""
    polygonal = kind in ("superficial", "intermediate", "anucleate")
    pale = polygonal and rng.random() < 0.17
    amount = look.strength * (rng.uniform(0.22, 0.36) if pale else float(np.exp(rng.normal(-0.55, 0.28))))
    pink = kind in ("superficial", "anucleate") or (kind == "dysplastic" and rng.random() < 0.3)
    if pink:
        base = blend(
            look.eosin,
            look.orange,
            float(rng.random() ** 2 if kind == "superficial" else rng.uniform(0.5, 1)),
        )
    else:
        base = blend(look.cyan, look.eosin, float(rng.beta(1, 7)))
    other = blend(base, look.cyan if pink else look.eosin, float(rng.uniform(0, 0.3)))
    nucleus, chromatin, vesicular = {
        "superficial": (rng.uniform(2.2, 3.1), rng.uniform(1.0, 1.5), 0.0),
        "intermediate": (rng.uniform(3.3, 4.7), rng.uniform(0.5, 0.85), rng.uniform(0.4, 1)),
        "parabasal": (rng.uniform(3.6, 4.8), rng.uniform(0.7, 1.0), rng.uniform(0.3, 0.8)),
        "dysplastic": (rng.uniform(6.0, 8.6), rng.uniform(0.9, 1.4), rng.uniform(0, 0.4)),
        "anucleate": (0.0, 0.0, 0.0),
    }[kind]
    return CellTraits(
        radius=radius,
        corners=int(rng.integers(4, 8)) if polygonal else int(rng.integers(6, 9)),
        jaggedness=0.16 if polygonal else 0.07,
        rounding=float(rng.uniform(2.5, 8)) if polygonal else float(rng.uniform(14, 22)),
        amount=amount if polygonal else max(amount, 0.5) * 1.25,
        colors=(jittered(base, rng), jittered(other, rng)),
        wrinkles=float(rng.uniform(0, 0.8) ** 1.5) if polygonal else 0.03,
        rim=float(rng.uniform(0.05, 0.5)),
        nucleus=float(nucleus),
        chromatin=float(chromatin) * (0.75 if pale else 1.0),
        vesicular=float(vesicular),
        irregular=0.075 if kind == "dysplastic" else 0.035,
        halo=float(rng.uniform(0.3, 0.7)) if rng.random() < 0.12 else 0.0,
        fold=polygonal and bool(rng.random() < 0.34),
    )


@dataclass(frozen=True)
class _Outline:
    """A star-shaped outline: its radius in px by direction, turned and stretched."""

    radii: Floats  # (_ANGLES,)
    turn: tuple[float, float]  # cosine, sine
    stretch: float

    @staticmethod
    def draw(traits: CellTraits, rng: np.random.Generator, mpp: float) -> _Outline:
        spacing = 2 * np.pi / traits.corners
        corners = (np.arange(traits.corners) + rng.uniform(-0.27, 0.27, traits.corners)) * spacing
        distances = 1 + traits.jaggedness * rng.uniform(-1.4, 1.4, traits.corners)
        radii = _polygon(corners, distances) + _ripple(rng, (3, 6), 0.04) + _ripple(rng, (9, 24), 0.016)
        radii = gaussian_filter1d(radii, traits.rounding * _ANGLES / 360, mode="wrap")
        radii = np.minimum(radii / np.sqrt(np.mean(radii**2)), REACH / 1.18) * traits.radius / mpp
        angle = rng.uniform(0, 2 * np.pi)
        turn = (float(np.cos(angle)), float(np.sin(angle)))
        return _Outline(radii.astype(np.float32), turn, float(rng.uniform(1.0, 1.18)))

    def depth(self, x: Floats, y: Floats) -> tuple[Floats, Floats]:
        """Return how far inside the outline along the radius, px (negative outside); and the radius there, px."""
        along = (x * self.turn[0] + y * self.turn[1]) / self.stretch
        across = (y * self.turn[0] - x * self.turn[1]) * self.stretch
        edge = self.radii[_direction(along, across)]
        return np.asarray(edge - np.hypot(along, across), np.float32), edge


def _cytoplasm(
    traits: CellTraits,
    outline: _Outline,
    rng: np.random.Generator,
    x: Floats,
    y: Floats,
    textures: Atlas,
    mpp: float,
) -> tuple[Floats, Bools]:
    """Draw the amount of stain (S, S) of the cytoplasm, folded where the traits say so, and its exact support."""
    depth, edge = outline.depth(x, y)
    grain, mottle = rng.uniform(0.06, 0.17), rng.uniform(0.05, 0.15)
    body = 1 + grain * textures.cut("grain", rng, depth.shape) + mottle * textures.cut("mottle", rng, depth.shape)
    body += traits.wrinkles * textures.cut("wrinkle", rng, depth.shape)
    body += 0.16 * textures.cut("cloud", rng, depth.shape)
    body = np.clip(body, 0.35, 3)
    layer = _layer(traits, depth, edge, mpp)
    inside = depth > 0
    if traits.fold:
        angle = rng.uniform(0, 2 * np.pi)
        normal = np.cos(angle), np.sin(angle)
        past = x * normal[0] + y * normal[1] - rng.uniform(0.62, 0.9) * traits.radius / mpp
        flap_depth, flap_edge = outline.depth(x - 2 * past * normal[0], y - 2 * past * normal[1])
        flat = past <= 0
        flap = flat & (flap_depth > 0)
        crease = np.exp(-((past * mpp / 0.8) ** 2)) * (inside | flap)
        layer = layer * np.clip(0.5 - past, 0, 1) + flat * (_layer(traits, flap_depth, flap_edge, mpp) + 0.5 * crease)
        inside = (inside & flat) | flap
    return np.asarray(traits.amount * body * layer, np.float32), inside


def _layer(traits: CellTraits, depth: Floats, edge: Floats, mpp: float) -> Floats:
    """Return the relative thickness of one layer of cytoplasm: thin towards the edge, with a slightly darker rim."""
    height = np.clip(depth / edge, 0, 1)  # 0 at the edge, 1 in the center
    profile = 0.72 + 0.5 * height * (2 - height)
    rim = traits.rim * np.exp(-((depth * mpp / 1.1) ** 2))
    return np.asarray((profile + rim) * np.clip(depth + 0.5, 0, 1), np.float32)


def _nucleus_place(
    traits: CellTraits, rng: np.random.Generator, x: Floats, y: Floats, mpp: float
) -> tuple[Bools, Floats]:
    """Draw the nucleus' support, and how far inside it a pixel lies (px, negative outside)."""
    if not traits.nucleus:
        return np.zeros(np.broadcast_shapes(x.shape, y.shape), bool), np.full((1, 1), -1e3, np.float32)
    room = 0.18 * traits.radius / mpp
    center = rng.uniform(-room, room, 2)
    radii = (1 + _ripple(rng, (2, 7), traits.irregular)) * traits.nucleus / mpp
    angle = rng.uniform(0, 2 * np.pi)
    shape = _Outline(
        radii.astype(np.float32), (float(np.cos(angle)), float(np.sin(angle))), float(rng.uniform(1, 1.15))
    )
    depth, _ = shape.depth(x - np.float32(center[0]), y - np.float32(center[1]))
    return depth > 0, depth


def _chromatin(traits: CellTraits, depth: Floats, textures: Atlas, rng: np.random.Generator, mpp: float) -> Floats:
    """Draw the amount of hematoxylin (S, S)."""
    coarse = 0.22 if traits.irregular > 0.05 else 0.13
    texture = 1 + coarse * textures.cut("grain", rng, depth.shape) + coarse * textures.cut("mottle", rng, depth.shape)
    hollow = 1 - 0.35 * traits.vesicular * np.clip(depth * mpp / 1.2, 0, 1)
    return np.asarray(traits.chromatin * np.clip(texture, 0.4, 2) * hollow * np.clip(depth + 0.5, 0, 1), np.float32)


def _polygon(corners: npt.NDArray[np.float64], distances: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the distance of a polygon's edge in each of `_ANGLES` directions; the corners' angles ascend."""
    theta = np.arange(_ANGLES) * (2 * np.pi / _ANGLES)
    side = np.searchsorted(corners, theta, side="right") - 1  # -1: the side that closes the polygon
    start, end = side % len(corners), (side + 1) % len(corners)
    opening = (corners[end] - corners[start]) % (2 * np.pi)
    into = (theta - corners[start]) % (2 * np.pi)
    a, b = distances[start], distances[end]
    return np.asarray(a * b * np.sin(opening) / (a * np.sin(into) + b * np.sin(opening - into)))


def _ripple(rng: np.random.Generator, waves: tuple[int, int], amplitude: float) -> npt.NDArray[np.float64]:
    """Return a random periodic curve over `_ANGLES` directions, of so many waves a turn; more waves are lower."""
    theta = np.arange(_ANGLES) * (2 * np.pi / _ANGLES)
    numbers = np.arange(*waves)
    phases = rng.uniform(0, 2 * np.pi, len(numbers))
    heights = amplitude * rng.standard_normal(len(numbers)) * numbers[0] / numbers
    return np.asarray((heights[:, None] * np.sin(numbers[:, None] * theta + phases[:, None])).sum(axis=0))


def _axes(reach: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Return y (S, 1) and x (1, S) of the stamp's pixels; the center lies anywhere inside the middle pixel."""
    steps = np.arange(-reach, reach + 1, dtype=np.float32)
    dy, dx = rng.uniform(-0.5, 0.5, 2).astype(np.float32)
    return (steps - dy)[:, None], (steps - dx)[None, :]


def _direction(x: npt.NDArray[np.floating], y: npt.NDArray[np.floating]) -> npt.NDArray[np.intp]:
    """Return the index of each pixel's direction in a table of `_ANGLES` radii."""
    turn = np.arctan2(y, x) * np.float32(_ANGLES / (2 * np.pi))
    return np.asarray(np.rint(turn), np.intp) % _ANGLES
