"""Synthetic Pap smears with exact cell masks: the data of a run that is given none, and of the tests.

A smear is a list of objects (`scene`) that absorb light: squamous cells (`cells`) and what else lies on a slide
(`clutter`). Optical densities add up (Beer-Lambert), so overlaps are darker; the light that is left is blurred by a
focus that varies over the slide, and the sensor adds noise. All randomness belongs to a place, so a region drawn alone
equals the same part of the whole slide to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from apacs_ray.data.grid import Box
from apacs_ray.synthetic.cells import Stamp
from apacs_ray.synthetic.scene import Thing, things_near
from apacs_ray.synthetic.stain import Look, blend, look_of
from apacs_ray.synthetic.texture import Floats, field, overlap, sensor_noise

VERSION = 2  # goes up when the same seed gives other pixels

_FILM, _LIGHT, _FOCUS, _NOISE = 10, 20, 30, 40  # random streams; the octaves of a stream have the numbers after it
_SHARP_UM, _SOFT_UM = 0.42, 1.9  # standard deviation of the blur in and out of focus
_TRUNCATE = 3.0  # standard deviations


@dataclass(frozen=True)
class SlideSpec:
    """Everything a slide follows from; sizes in px.

    `mpp` is um per px: most cells are 50 to 85 px wide at 0.8, 160 to 260 px at 0.25.
    """

    slide_id: str
    split: Literal["train", "test"]
    seed: int
    width: int
    height: int
    look: Look
    mpp: float = 0.5


def slide_specs(
    seed: int, width: int, height: int, *, train: int = 3, test: int = 2, mpp: float = 0.5
) -> list[SlideSpec]:
    """Return the slides `smear-01`, ... of one set, the training slides first; each with a stain of its own.

    The same arguments give the same slides.

    Args:
        seed: not negative.
        width: px.
        height: px.
        train: training slides.
        test: test slides.
        mpp: um per px.

    Returns:
        Everything that the slides follow from.
    """
    states = np.random.SeedSequence(seed).generate_state(train + test, np.uint64)
    return [
        SlideSpec(
            slide_id=f"smear-{index + 1:02d}",
            split="train" if index < train else "test",
            seed=int(state),
            width=width,
            height=height,
            look=look_of(seed, index),
            mpp=mpp,
        )
        for index, state in enumerate(states)
    ]


def render(spec: SlideSpec) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Render a whole slide: RGB (H, W, 3) uint8 of 0..255, and the mask (H, W) bool, True on an epithelial cell."""
    return render_region(spec, 0, 0, spec.width, spec.height)


def render_region(
    spec: SlideSpec, x: int, y: int, width: int, height: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Render a part of a slide, equal to that part of `render(spec)`; time and memory follow the region's size.

    The mask is the union of the cells' outlines (cytoplasm and nucleus) before any blur.

    Args:
        spec: of the slide.
        x: left edge, px.
        y: top edge, px.
        width: px.
        height: px.

    Returns:
        As `render`.
    """
    box = Box(x, y, width, height)
    margin = ceil(_TRUNCATE * _SOFT_UM / spec.mpp) + 1
    wide = box.grown(margin)
    density, mask = _absorption(spec, wide)
    inner = (slice(margin, margin + height), slice(margin, margin + width))
    light = _focused(spec, np.exp(-density), box, inner)
    return _exposed(spec, light, box), mask[inner]


def stamps_near(spec: SlideSpec, box: Box) -> Iterator[tuple[Thing, Stamp]]:
    """Yield every object that touches the box with its drawing, in the order in which they are added up."""
    for thing in things_near(spec.seed, spec.look, spec.mpp, box):
        yield thing, thing.stamp(spec.look, spec.mpp)


def _absorption(spec: SlideSpec, box: Box) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return the optical density (3, H, W) of the film of mucus and all objects, and the cells' mask (H, W)."""
    film = np.asarray(blend(spec.look.cyan, spec.look.hematoxylin, 0.25), np.float32)
    density = film[:, None, None] * _film(spec, box)
    mask = np.zeros((box.height, box.width), bool)
    for thing, stamp in stamps_near(spec, box):
        corner = thing.x - thing.reach - box.x, thing.y - thing.reach - box.y
        inside, part = overlap(mask.shape, stamp.density.shape[1:], *corner)
        density[:, *inside] += stamp.density[:, *part]
        if stamp.cell is not None:
            mask[inside] |= stamp.cell[part]
    return density, mask


def _film(spec: SlideSpec, box: Box) -> Floats:
    """Return the amount of a thin lacy film of mucus and serum that lies over parts of the slide."""
    octaves = ((190.0, 0.6), (60.0, 0.35), (18.0, 0.3), (6.0, 0.22))
    film = sum(
        weight * field(spec.seed, _FILM + octave, box, spacing / spec.mpp)
        for octave, (spacing, weight) in enumerate(octaves)
    )
    return np.asarray(0.075 * spec.look.mucus * np.clip(np.asarray(film) + 0.15, 0, 2.2) + 0.01, np.float32)


def _focused(spec: SlideSpec, light: Floats, box: Box, inner: tuple[slice, slice]) -> Floats:
    """Return the light (3, H, W) through optics whose focus varies: from soft to sharp to sharpened."""
    sharp = gaussian_filter(light, (0, *[_SHARP_UM / spec.mpp] * 2), truncate=_TRUNCATE)[:, *inner]
    soft = gaussian_filter(light, (0, *[_SOFT_UM / spec.mpp] * 2), truncate=_TRUNCATE)[:, *inner]
    focus = field(spec.seed, _FOCUS, box, 240 / spec.mpp)
    share = np.clip(spec.look.defocus + 0.33 * focus, -0.3, 1)
    return np.asarray(sharp + share * (soft - sharp), np.float32)


def _exposed(spec: SlideSpec, light: Floats, box: Box) -> npt.NDArray[np.uint8]:
    """Return gray levels (H, W, 3): unevenly lit glass behind the objects, and noise that planes partly share."""
    lamp = (
        1
        + 0.028 * field(spec.seed, _LIGHT, box, 620 / spec.mpp)
        + 0.012 * field(spec.seed, _LIGHT + 1, box, 170 / spec.mpp)
    )
    noise = sensor_noise(spec.seed, _NOISE, box)
    rgb = np.empty((box.height, box.width, 3), np.uint8)
    for plane, glass in enumerate(spec.look.background):
        gray = glass * lamp * light[plane] + spec.look.noise * (0.8 * noise[3] + 0.6 * noise[plane])
        rgb[..., plane] = np.clip(np.rint(gray), 0, 255)
    return rgb
