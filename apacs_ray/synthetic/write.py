"""Synthetic smears as slides: MIRAX and pyramidal TIFF in turn, each with its exact mask beside it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyvips

from apacs_ray.data.images import encode_mask
from apacs_ray.storage import Store
from apacs_ray.synthetic.mrxs import MrxsLayout, write_mrxs
from apacs_ray.synthetic.slide import SlideSpec, render

LEVELS = 4
QUALITY = 90  # of JPEG, so that smears have its noise
IMAGE = 256  # px, side of a stored MIRAX image or TIFF tile


def write_smear(store: Store, spec: SlideSpec, number: int) -> None:
    """Render a slide as `<split>/<id>.mrxs` or `.tif` and its mask as `<id>_mask.png`, 1-bit.

    What is there already is complete (writes are atomic, the slide's own file comes last) and deterministic.

    Args:
        store: of the smears.
        spec: of the slide.
        number: of the slide: even ones are MIRAX, odd ones TIFF.
    """
    name = f"{spec.slide_id}{'.mrxs' if number % 2 == 0 else '.tif'}"
    if store.version(f"{spec.split}/{name}") is not None:
        return
    rgb, cells = render(spec)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / name
        if number % 2 == 0:
            write_as_mrxs(path, rgb, spec.mpp)
        else:
            write_as_tiff(path, rgb, spec.mpp)
        store.write(f"{spec.split}/{spec.slide_id}_mask.png", encode_mask(cells))
        for file in sorted(Path(scratch).rglob("*"), key=lambda file: file == path):
            if file.is_file():
                store.write(f"{spec.split}/{file.relative_to(scratch).as_posix()}", file.read_bytes())


def write_as_mrxs(path: Path, rgb: np.ndarray[Any, np.dtype[np.uint8]], mpp: float) -> None:
    """Write an array (H, W, 3) as a MIRAX slide; sides that are no multiples of `IMAGE` are filled up with white."""
    height, width = rgb.shape[:2]
    layout = MrxsLayout(width, height, LEVELS, mpp, image=IMAGE, quality=QUALITY)
    write_mrxs(path, layout, lambda x, y, w, h: rgb[y : y + h, x : x + w])


def write_as_tiff(path: Path, rgb: np.ndarray[Any, np.dtype[np.uint8]], mpp: float) -> None:
    """Write an array (H, W, 3) as a pyramidal TIFF of JPEG tiles that says its resolution."""
    pyvips.Image.new_from_array(rgb).copy(xres=1000 / mpp, yres=1000 / mpp, interpretation="srgb").tiffsave(
        str(path), tile=True, pyramid=True, compression="jpeg", Q=QUALITY, tile_width=IMAGE, tile_height=IMAGE,
        resunit="cm",
    )  # fmt: skip
