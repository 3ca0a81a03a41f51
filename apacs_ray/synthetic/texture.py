"""Random fields and textures that belong to places: regions of a slide that are drawn apart fit together exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from apacs_ray.data.grid import Box

Floats = npt.NDArray[np.float32]

_ATLAS_UM = 256  # side of the texture atlas; stamps take their texture from a random place in it
_NOISE_BLOCK = 256  # px
_ORIGIN = 1 << 24  # added to indices of blocks, which may be negative: SeedSequence takes no negative numbers
_SPLINE_STD = 0.48  # standard deviation of a cubic B-spline of lattice values of unit variance


def place_rng(seed: int, stream: int, column: int, row: int) -> np.random.Generator:
    """Return the generator (PCG64) of one block of a slide for one purpose (`stream`)."""
    sequence = np.random.SeedSequence([seed, stream, column + _ORIGIN, row + _ORIGIN])
    return np.random.Generator(np.random.PCG64(sequence))


def field(seed: int, stream: int, box: Box, spacing: float) -> Floats:
    """Return a smooth random field: mean 0, deviation about 1, features of `spacing` px.

    A cubic B-spline over a lattice of hashed values. Only elementwise sums, no matrix product: its order of
    summation (and so the last bit) would depend on the shape of the box.

    Args:
        seed: of the slide.
        stream: the purpose; fields of different streams are independent.
        box: level-0 px.
        spacing: px of the lattice.

    Returns:
        (box.height, box.width) float32.
    """
    columns, across = _spline(box.x, box.width, spacing)
    rows, down = _spline(box.y, box.height, spacing)
    left, top = int(columns[0]), int(rows[0])
    lattice = _lattice(seed, stream, left, top, int(columns[-1]) - left + 4, int(rows[-1]) - top + 4)
    wide = sum(lattice[:, columns - left + tap] * across[tap] for tap in range(4))
    tall = sum(np.asarray(wide)[rows - top + tap] * down[tap][:, None] for tap in range(4))
    return np.asarray(tall, np.float32)


def field_at(seed: int, stream: int, x: float, y: float, spacing: float) -> float:
    """Return `field` at one place."""
    return float(field(seed, stream, Box(int(x), int(y), 1, 1), spacing)[0, 0])


def sensor_noise(seed: int, stream: int, box: Box) -> Floats:
    """Return unit normal noise (4, box.height, box.width) float32, independent between pixels and planes."""
    noise = np.empty((4, box.height, box.width), np.float32)
    for row in range(box.y // _NOISE_BLOCK, -(-(box.y + box.height) // _NOISE_BLOCK)):
        for column in range(box.x // _NOISE_BLOCK, -(-(box.x + box.width) // _NOISE_BLOCK)):
            rng = place_rng(seed, stream, column, row)
            block = rng.standard_normal((4, _NOISE_BLOCK, _NOISE_BLOCK), dtype=np.float32)
            paste(noise, block, column * _NOISE_BLOCK - box.x, row * _NOISE_BLOCK - box.y)
    return noise


def paste(canvas: Floats, block: Floats, x: int, y: int) -> None:
    """Put `block` (C, h, w) on `canvas` (C, H, W) with its corner at (x, y), cut at the canvas' edges."""
    inside, part = overlap(canvas.shape[1:], block.shape[1:], x, y)
    canvas[:, *inside] = block[:, *part]


def overlap(
    canvas: tuple[int, ...], stamp: tuple[int, ...], x: int, y: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return where a stamp (h, w) at (x, y) meets a canvas (H, W): slices of the canvas and of the stamp."""
    top, left = max(0, y), max(0, x)
    bottom, right = max(top, min(canvas[0], y + stamp[0])), max(left, min(canvas[1], x + stamp[1]))
    return (
        (slice(top, bottom), slice(left, right)),
        (slice(top - y, bottom - y), slice(left - x, right - x)),
    )


@dataclass(frozen=True)
class Atlas:
    """Periodic textures (S, S), float32, mean 0 and unit variance (`wrinkle`: 0..1, thin bright ridges)."""

    grain: Floats
    mottle: Floats
    cloud: Floats
    wrinkle: Floats

    def cut(self, name: str, rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
        """Return a piece of one texture of any shape, from a random place."""
        texture: Floats = getattr(self, name)
        side = texture.shape[0]
        y, x = (int(place) for place in rng.integers(0, side, 2))
        if y + shape[0] <= side and x + shape[1] <= side:
            return texture[y : y + shape[0], x : x + shape[1]]
        rows, columns = (np.arange(start, start + length) % side for start, length in zip((y, x), shape, strict=True))
        return np.asarray(texture[np.ix_(rows, columns)])


@lru_cache(maxsize=4)
def atlas(mpp: float) -> Atlas:
    """Return the textures at a scale (um per px), the same for all slides; stamps differ by where they cut."""
    side = round(_ATLAS_UM / mpp)
    rng = np.random.Generator(np.random.PCG64(20230423))

    def smooth(*sigma_um: float) -> Floats:
        noise = rng.standard_normal((side, side), dtype=np.float32)
        blurred = gaussian_filter(noise, [sigma / mpp for sigma in sigma_um], mode="wrap")
        return np.asarray(blurred / blurred.std(), np.float32)

    ridges = [1 - np.abs(smooth(*sigma)) / 0.16 for sigma in ((7.0, 2.6), (3.0, 6.0))]
    return Atlas(
        grain=smooth(0.5, 0.5),
        mottle=smooth(1.8, 1.8),
        cloud=smooth(7.0, 7.0),
        wrinkle=np.clip(np.maximum(*ridges), 0, 1).astype(np.float32),
    )


def _spline(start: int, length: int, spacing: float) -> tuple[npt.NDArray[np.int64], list[Floats]]:
    """Return the first lattice index of each pixel, and the weights of its 4 lattice values."""
    place = np.arange(start, start + length) / spacing
    first = np.floor(place).astype(np.int64)
    t = (place - first).astype(np.float32)
    weights = [
        (1 - t) ** 3 / 6,
        (3 * t**3 - 6 * t**2 + 4) / 6,
        (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
        t**3 / 6,
    ]
    return first, [np.asarray(weight, np.float32) for weight in weights]


def _lattice(seed: int, stream: int, column: int, row: int, width: int, height: int) -> Floats:
    """Return uniform lattice values (height, width): a hash (splitmix64's finalizer) of seed and place."""
    columns = np.arange(column, column + width, dtype=np.int64).astype(np.uint64)
    rows = np.arange(row, row + height, dtype=np.int64).astype(np.uint64)
    key = np.array([seed & (2**64 - 1)], np.uint64) + np.array([stream], np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = _mix(_mix(_mix(key)[0] ^ columns)[None, :] ^ (rows * np.uint64(0xC2B2AE3D27D4EB4F))[:, None])
    uniform = (mixed >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - 1
    return np.asarray(uniform * np.float32(3**0.5 / _SPLINE_STD), np.float32)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
