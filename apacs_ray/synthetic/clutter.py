"""Objects of a synthetic smear that are no cells: neutrophils, mucus, debris, blood, bacteria, precipitate, dust."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from apacs_ray.synthetic.cells import Stamp
from apacs_ray.synthetic.stain import RGB, Look, blend, jittered
from apacs_ray.synthetic.texture import Floats, atlas

ClutterKind = Literal["neutrophil", "mucus", "debris", "blood", "bacteria", "precipitate", "dust", "bubble"]

_BROWN: RGB = (0.35, 0.52, 0.75)
_BLACK: RGB = (1.0, 1.05, 1.1)


def clutter_radius(kind: ClutterKind, rng: np.random.Generator) -> float:
    """Draw how far an object reaches from its center, um."""
    low, high = {
        "neutrophil": (6.5, 6.5),
        "mucus": (60, 170),
        "debris": (9, 34),
        "blood": (4, 4.6),
        "bacteria": (15, 40),
        "precipitate": (5, 14),
        "dust": (5, 22),
        "bubble": (14, 40),
    }[kind]
    return float(rng.uniform(low, high))


def clutter_stamp(kind: ClutterKind, radius: float, reach: int, seed: int, look: Look, mpp: float) -> Stamp:
    """Draw an object that is no cell. The arguments are those of `cells.cell_stamp`."""
    rng = np.random.Generator(np.random.PCG64(seed))
    steps = np.arange(-reach, reach + 1, dtype=np.float32) * np.float32(mpp)
    shift = rng.uniform(-0.5 * mpp, 0.5 * mpp, 2).astype(np.float32)
    y, x = (steps - shift[0])[:, None], (steps - shift[1])[None, :]
    return Stamp(np.asarray(_DRAWN[kind](radius, x, y, look, mpp, rng), np.float32))


def _neutrophil(radius: float, x: Floats, y: Floats, look: Look, mpp: float, rng: np.random.Generator) -> Floats:
    """Draw 2 to 4 dark lobes in a row that bends, in cytoplasm that hardly shows."""
    lobes = int(rng.integers(2, 5))
    angle, bend = rng.uniform(0, 2 * np.pi), rng.choice([-1, 1]) * rng.uniform(0.5, 1.5)
    places = np.zeros((lobes, 2))
    for lobe in range(1, lobes):
        angle += bend
        places[lobe] = places[lobe - 1] + rng.uniform(2.0, 2.9) * np.array([np.cos(angle), np.sin(angle)])
    places -= places.mean(axis=0)
    nucleus = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    for place in places:
        size = rng.uniform(1.4, 1.95)
        distance = np.hypot(x - place[0], y - place[1])
        nucleus = np.maximum(nucleus, np.clip((size - distance) / mpp + 0.5, 0, 1))
    body = np.clip((rng.uniform(4.6, 5.8) - np.hypot(x, y)) / 1.2, 0, 1)
    faint = blend(look.cyan, look.eosin, float(rng.random()))
    dark = jittered(look.hematoxylin, rng, 0.05)
    return _dyed(faint, body * rng.uniform(0.08, 0.3)) + _dyed(dark, nucleus * rng.uniform(0.75, 1.25))


def _mucus(radius: float, x: Floats, y: Floats, look: Look, mpp: float, rng: np.random.Generator) -> Floats:
    """Draw a pale bent strand of fibers that tapers to both ends."""
    angle = rng.uniform(0, np.pi)
    along = (x * np.cos(angle) + y * np.sin(angle)) / radius
    across = y * np.cos(angle) - x * np.sin(angle)
    bend, wave, phase = rng.uniform(-0.25, 0.25), rng.uniform(0.02, 0.06), rng.uniform(0, 6)
    path = radius * (bend * (along**2 - 0.3) + wave * np.sin(5 * along + phase))
    width = rng.uniform(0.05, 0.17) * radius * np.clip(1 - along**2, 0, 1) ** 0.7 + 0.5
    aside = (across - path) / width
    fibers = np.zeros(aside.shape, np.float32)
    table = gaussian_filter1d(rng.standard_normal(512), 1.5, mode="wrap")
    for fineness in (9, 17, 34):  # threads that wander over one another
        wander = rng.uniform(0.1, 0.5) * np.sin(along * rng.uniform(2, 6) + rng.uniform(0, 6))
        turns = (aside + wander) * fineness + 0.4 * fineness * along + rng.uniform(0, 512)
        fibers += table[np.asarray(turns, np.intp) % 512]
    fibers += 0.35 * atlas(mpp).cut("mottle", rng, aside.shape) + 0.5 * atlas(mpp).cut("cloud", rng, aside.shape)
    strand = np.clip(1 - np.abs(aside) ** 1.5 + 0.3 * fibers, 0, 1) * (np.abs(along) < 1) * (np.abs(aside) < 1.6)
    texture = np.clip(0.75 + 0.5 * fibers, 0.1, 2.5)
    dye = blend(blend(look.cyan, look.hematoxylin, 0.3), look.eosin, float(rng.beta(1, 2)))
    return _dyed(dye, strand * texture * rng.uniform(0.12, 0.38))


def _debris(radius: float, x: Floats, y: Floats, look: Look, mpp: float, rng: np.random.Generator) -> Floats:
    """Draw degenerate material: ragged, granular, in the cells' own colors but without outline or nucleus."""
    textures = atlas(mpp)
    shape = np.broadcast_shapes(x.shape, y.shape)
    fall = 1 - np.hypot(x * rng.uniform(0.9, 1.5), y * rng.uniform(0.9, 1.5)) / radius
    ragged = fall + 0.16 * textures.cut("cloud", rng, shape) + 0.14 * textures.cut("mottle", rng, shape)
    body = np.clip((ragged - 0.2) * 2.2, 0, 1) * np.clip(fall * radius / 2, 0, 1)
    texture = np.clip(1 + 0.4 * textures.cut("grain", rng, shape) + 0.35 * textures.cut("mottle", rng, shape), 0.1, 3)
    dyes = (look.cyan, look.eosin, blend(look.cyan, _BROWN, 0.5), _BROWN)
    dye = jittered(dyes[rng.choice(4, p=(0.42, 0.28, 0.15, 0.15))], rng, 0.12)
    return _dyed(dye, body * texture * rng.uniform(0.3, 1.0))


def _blood(radius: float, x: Floats, y: Floats, look: Look, mpp: float, rng: np.random.Generator) -> Floats:
    """Draw an erythrocyte: a small orange-pink disc, paler in the middle."""
    distance = np.hypot(x * rng.uniform(0.9, 1.1), y) / (0.85 * radius)
    disc = np.clip((1 - distance) * radius / mpp + 0.5, 0, 1) * (0.65 + 0.5 * np.clip(distance, 0, 1) ** 2)
    dye = jittered(blend(look.eosin, look.orange, float(rng.uniform(0.2, 0.7))), rng)
    return _dyed(dye, disc * rng.uniform(0.35, 0.75))


def _bacteria(radius: float, x: Floats, y: Floats, look: Look, mpp: float, rng: np.random.Generator) -> Floats:
    """Draw a cloud of rods, each 2 to 4 um."""
    side = x.shape[1]
    counts = np.zeros((side, side), np.float32)
    rods = int(rng.uniform(8, 60) * (radius / 25) ** 2) + 3
    place = np.sqrt(rng.random((rods, 1))) * 0.9 * radius * _on_circle(rng.uniform(0, 2 * np.pi, rods))
    place[:, int(rng.integers(2))] *= rng.uniform(0.4, 1)
    angle, length = rng.uniform(0, np.pi, rods), rng.uniform(1.5, 3.6, rods)
    points = max(2, round(2.5 / mpp))
    for step in np.linspace(-0.5, 0.5, points):
        rows = np.rint((place[:, 0] + step * length * np.sin(angle)) / mpp).astype(int) + side // 2
        columns = np.rint((place[:, 1] + step * length * np.cos(angle)) / mpp).astype(int) + side // 2
        inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
        np.add.at(counts, (rows[inside], columns[inside]), 1 / points)
    rod = gaussian_filter(counts, 0.32 / mpp, mode="constant") * np.float32(2.4 / mpp)
    return _dyed(blend(look.hematoxylin, look.cyan, 0.4), np.minimum(rod, 2) * rng.uniform(0.25, 0.7))


def _precipitate(radius: float, x: Floats, y: Floats, look: Look, mpp: float, rng: np.random.Generator) -> Floats:
    """Draw crystals of stain: a few nearly black grains."""
    grains = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    for _ in range(int(rng.integers(2, 9))):
        place, size = np.clip(rng.normal(0, 0.4, 2), -0.75, 0.75) * radius, rng.uniform(0.4, 1.5)
        distance = np.abs(x - place[0]) * rng.uniform(0.6, 1.4) + np.abs(y - place[1])
        grains = np.maximum(grains, np.clip((size - distance) / mpp + 0.5, 0, 1))
    return _dyed(blend(look.hematoxylin, _BLACK, float(rng.random())), grains * rng.uniform(1.0, 2.2))


def _dust(radius: float, x: Floats, y: Floats, look: Look, mpp: float, rng: np.random.Generator) -> Floats:
    """Draw a speck or a fiber on the cover glass, out of focus."""
    angle, bend = rng.uniform(0, np.pi), rng.uniform(-0.4, 0.4)
    along = (x * np.cos(angle) + y * np.sin(angle)) / radius
    across = y * np.cos(angle) - x * np.sin(angle) - bend * radius * along**2
    length = rng.uniform(0.06, 0.16) if rng.random() < 0.6 else rng.uniform(0.5, 0.72)
    ends = np.clip((length - np.abs(along)) * radius / mpp, 0, 1)
    speck = np.asarray(np.clip((1.1 - np.abs(across)) / mpp + 0.5, 0, 1) * ends, np.float32)
    blurred = gaussian_filter(speck, rng.uniform(0.4, 1.3) / mpp, mode="constant", truncate=3)
    return _dyed(blend(_BROWN, _BLACK, float(rng.random())), blurred * rng.uniform(0.6, 1.6))


def _bubble(radius: float, x: Floats, y: Floats, look: Look, mpp: float, rng: np.random.Generator) -> Floats:
    """Draw air under the cover glass: a dark refracting ring with a bright line inside it."""
    distance = np.hypot(x, y) - 0.8 * radius
    ring = np.exp(-((distance / 1.6) ** 2)) - 0.3 * np.exp(-(((distance + 3.2) / 1.6) ** 2))
    return _dyed(_BLACK, ring * (distance < 0.18 * radius) * rng.uniform(0.4, 0.9))


def _on_circle(angle: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _dyed(dye: RGB, amount: npt.NDArray[np.floating]) -> Floats:
    return np.asarray(np.asarray(dye)[:, None, None] * amount, np.float32)


_DRAWN: dict[ClutterKind, Callable[[float, Floats, Floats, Look, float, np.random.Generator], Floats]] = {
    "neutrophil": _neutrophil,
    "mucus": _mucus,
    "debris": _debris,
    "blood": _blood,
    "bacteria": _bacteria,
    "precipitate": _precipitate,
    "dust": _dust,
    "bubble": _bubble,
}
