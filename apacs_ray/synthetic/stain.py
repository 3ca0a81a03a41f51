"""The look of a slide: how it was stained and scanned. Colors are optical densities: amounts add (Beer-Lambert)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Look:
    """Stain, content and optics of one slide; dyes are natural-log densities of R, G, B at amount 1."""

    eosin: RGB
    orange: RGB
    cyan: RGB
    hematoxylin: RGB
    background: RGB  # gray levels of bare glass, 0..255
    strength: float  # of the cytoplasm's stain
    crowding: float  # cell groups, relative to 1
    eosinophilic: float  # share of superficial cells
    inflammation: float  # neutrophils, relative to 1
    mucus: float  # film and strands, relative to 1
    defocus: float  # -0.3 (sharp, sharpened by the scanner) .. 1 (soft)
    noise: float  # of the sensor, gray levels


def look_of(seed: int, index: int) -> Look:
    """Return the look of the index-th slide of a set: traits spread evenly over a set, so that no two are alike."""
    start = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 7]))).random(12)

    def trait(number: int, low: float, high: float) -> float:
        step = (0.6180339887, 0.7548776662, 0.5698402910, 0.8191725134)[number % 4]
        return float(low + (high - low) * ((start[number] + index * step) % 1.0))

    teal, pink, violet = trait(0, -1, 1), trait(1, -1, 1), trait(2, -1, 1)
    light, tint = trait(3, 226, 247), trait(4, -1, 1)
    return Look(
        eosin=(0.09 - 0.02 * pink, 0.47, 0.30 + 0.11 * pink),
        orange=(0.05, 0.31 - 0.03 * pink, 0.60),
        cyan=(0.51, 0.20 + 0.035 * teal, 0.185 - 0.04 * teal),
        hematoxylin=(0.98 + 0.12 * violet, 1.02, 0.66 + 0.1 * teal),
        background=(light + 3 * tint, light + 1.0, light - 4 * tint),
        strength=trait(5, 0.72, 1.12),
        crowding=trait(6, 0.8, 1.25),
        eosinophilic=trait(7, 0.25, 0.6),
        inflammation=trait(8, 0.5, 1.7),
        mucus=trait(9, 0.5, 1.5),
        defocus=trait(10, -0.05, 0.25),
        noise=trait(11, 1.2, 2.6),
    )


def blend(a: RGB, b: RGB, share: float) -> RGB:
    """Return the dye between two: `share` 0 is a, 1 is b."""
    return (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share)


def jittered(dye: RGB, rng: np.random.Generator, spread: float = 0.08) -> RGB:
    """Return the dye as one cell took it up: every channel times about 1 +- spread."""
    r, g, b = dye * np.exp(spread * rng.standard_normal(3))
    return float(r), float(g), float(b)
