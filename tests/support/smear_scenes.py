"""Smears with known cells as one level of a slide, 2 um per px, under any light and with any artifact on top."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from apacs_ray.config.settings import TilesSettings
from apacs_ray.data.grid import Box
from apacs_ray.slides.reader import Level, SlideInfo
from apacs_ray.slides.slide_grid import tiles_of
from apacs_ray.slides.tissue import find_tissue
from apacs_ray.synthetic.cells import REACH, SOFT_UM, CellKind, Stamp, cell_radius, cell_stamp
from apacs_ray.synthetic.scene import things_near
from apacs_ray.synthetic.stain import look_of
from apacs_ray.synthetic.texture import overlap

UM, DOWN = 2.0, 4  # of the level; level 0 has 0.5 um per px
TILE = 512  # level-0 px
HOLDS = 0.02  # share of a tile that is cell from which on the tile must be kept
Rgb = npt.NDArray[np.uint8]
Paint = Callable[[ImageDraw.ImageDraw], object]


@dataclass
class Scene:
    """Optical density (3, H, W), what of it is cell, and what is cell or clutter (H, W)."""

    density: npt.NDArray[np.float32]
    cells: npt.NDArray[np.bool_]
    things: npt.NDArray[np.bool_]

    def without(self, hidden: npt.NDArray[np.bool_]) -> Scene:
        return Scene(self.density, self.cells & ~hidden, self.things & ~hidden)


def bare(side: int) -> Scene:
    return Scene(np.zeros((3, side, side), np.float32), np.zeros((side, side), bool), np.zeros((side, side), bool))


def smear(side: int, seed: int = 0, radius: float = 0.36, **traits: float) -> Scene:
    """Cells and clutter of a look within a disc; traits as in `Look` (crowding, strength, inflammation)."""
    scene, look = bare(side), replace(look_of(seed, seed % 5), **traits)
    for thing in things_near(seed + 11, look, UM, Box(0, 0, side, side)):
        if (thing.x / side - 0.5) ** 2 + (thing.y / side - 0.5) ** 2 < radius**2:
            _put(scene, thing.stamp(look, UM), thing.x, thing.y, thing.reach)
    return scene


def singles(
    side: int,
    places: Sequence[tuple[float, float]],
    kinds: Sequence[CellKind] = ("intermediate", "superficial", "parabasal"),
    um: float = UM,
) -> Scene:
    """One cell at each place, px of a picture of `um` um per px."""
    scene, look, rng = bare(side), look_of(0, 1), np.random.default_rng(5)
    for number, (x, y) in enumerate(places):
        kind = kinds[number % len(kinds)]
        radius = cell_radius(kind, rng)
        reach = int(np.ceil((REACH * radius + SOFT_UM) / um))
        _put(scene, cell_stamp(kind, radius, reach, int(rng.integers(2**62)), look, um), int(x), int(y), reach)
    return scene


def _put(scene: Scene, stamp: Stamp, x: int, y: int, reach: int) -> None:
    inside, part = overlap(scene.cells.shape, stamp.density.shape[1:], x - reach, y - reach)
    scene.density[:, *inside] += stamp.density[:, *part]
    scene.things[inside] |= stamp.density[:, *part].max(axis=0) > 0.01
    if stamp.cell is not None:
        scene.cells[inside] |= stamp.cell[part]


def lit(
    scene: Scene,
    stain: float = 1.0,
    glass: tuple[int, int, int] = (240, 241, 237),
    noise: float = 2.0,
    vignette: float = 0.0,
    gradient: float = 0.0,
) -> Rgb:
    """(H, W, 3): the scene on a lamp that wavers by 2 %. `noise` is that of level 0, a quarter of it is left here."""
    height, width = scene.cells.shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / np.float32(max(height, width))
    rng = np.random.default_rng(1)
    coarse = rng.standard_normal((max(2, height // 300), max(2, width // 300))).astype(np.float32)
    lamp = 1 + 0.02 * np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    lamp *= (1 - gradient * x) * (1 - 2 * vignette * ((x - 0.5) ** 2 + (y - 0.5) ** 2))
    rgb = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        light = gaussian_filter(np.exp(-stain * scene.density[channel]), 0.35)
        gray = glass[channel] * lamp * light + noise / 4 * rng.standard_normal((height, width))
        rgb[..., channel] = np.clip(np.rint(gray), 0, 255)
    return rgb


def painted(rgb: Rgb, paint: Paint, blur: float = 1.0, alpha: float = 1.0) -> Rgb:
    """Something drawn over a picture with soft edges; with `alpha` below 1 as a filter, like thin ink."""
    blank = (1, 2, 3)
    layer = Image.new("RGB", (rgb.shape[1], rgb.shape[0]), blank)
    paint(ImageDraw.Draw(layer))
    colors = np.asarray(layer)
    drawn = (colors != np.array(blank)).any(axis=2)
    soft = gaussian_filter(drawn.astype(np.float32), blur)[..., None]
    color = gaussian_filter(np.where(drawn[..., None], colors, 0).astype(np.float32), (blur, blur, 0))
    color /= np.maximum(soft, 1e-3)
    if alpha < 1:
        color = color * rgb / 255
    return np.clip(rgb * (1 - alpha * soft) + color * alpha * soft, 0, 255).astype(np.uint8)


def jpeg(rgb: Rgb, quality: int) -> Rgb:
    sink = io.BytesIO()
    Image.fromarray(rgb).save(sink, "JPEG", quality=quality)
    return np.asarray(Image.open(sink).convert("RGB"))


class LevelSlide:
    """A slide of which only level 1 is there: whoever reads level 0 fails."""

    def __init__(self, rgb: Rgb, mpp: float | None = UM / DOWN) -> None:
        height, width = rgb.shape[:2]
        levels = (Level(width * DOWN, height * DOWN, 1.0), Level(width, height, float(DOWN)))
        self.info = SlideInfo("vips", levels, mpp, Box(0, 0, width * DOWN, height * DOWN))
        self._rgb = rgb

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Rgb:
        assert level == 1
        return self._rgb[y : y + height, x : x + width]

    def close(self) -> None: ...


@dataclass(frozen=True)
class Score:
    """Tiles that hold cells and are kept, that hold cells; that hold nothing and are kept, that hold nothing."""

    kept: int
    holding: int
    false: int
    empty: int

    @property
    def recall(self) -> float:
        return self.kept / self.holding if self.holding else 1.0


def score(rgb: Rgb, scene: Scene, mpp: float | None = UM / DOWN) -> Score:
    """The tiles that are kept of a scene as it is seen in `rgb`, by those that hold cells."""
    slide = LevelSlide(rgb, mpp)
    tissue = find_tissue(slide)
    kept = holding = false = empty = 0
    for tile in tiles_of(TilesSettings(size=TILE, last="drop"), slide.info, tissue, 1.0, mpp):
        x, y, side = tile.area.x // DOWN, tile.area.y // DOWN, TILE // DOWN
        part = slice(y, y + side), slice(x, x + side)
        if scene.cells[part].mean() >= HOLDS:
            holding += 1
            kept += tile.skipped is None
        elif not scene.cells[part].any() and scene.things[part].mean() < 0.002:
            empty += 1
            false += tile.skipped is None
    return Score(kept, holding, false, empty)
