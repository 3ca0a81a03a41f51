"""Slides that tests write: pyramidal TIFF of several kinds, and MIRAX."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyvips
from PIL import Image

from apacs_ray.synthetic.mrxs import MrxsLayout, write_mrxs

Rgb = npt.NDArray[np.uint8]

OME = """<?xml version="1.0" encoding="UTF-8"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0"
DimensionOrder="XYCZT" Type="uint8" SizeX="{width}" SizeY="{height}" SizeC="3" SizeZ="1" SizeT="1"
PhysicalSizeX="{mpp}" PhysicalSizeXUnit="µm" PhysicalSizeY="{mpp}" PhysicalSizeYUnit="µm">
<Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData/></Pixels></Image></OME>"""


def picture(width: int, height: int, seed: int = 0) -> Rgb:
    """Smooth colors with sharp spots, (height, width, 3)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(90, 250, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8))
    rgb = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    for x, y in zip(rng.integers(0, width, 60), rng.integers(0, height, 60), strict=True):
        rgb[y : y + 7, x : x + 7] = rng.integers(0, 90, 3)
    return rgb


def write_tiff(path: Path, rgb: Rgb, *, mpp: float | None = 0.25, kind: str = "classic", **options: Any) -> Path:
    """A tiled pyramid; `kind`: classic, bigtiff or ome (levels in SubIFDs)."""
    image = pyvips.Image.new_from_array(rgb).copy(interpretation="srgb")
    if mpp is not None:
        image = image.copy(xres=1000 / mpp, yres=1000 / mpp)
    if kind == "ome":
        text = OME.format(width=rgb.shape[1], height=rgb.shape[0], mpp=mpp)
        image.set_type(pyvips.GValue.gstr_type, "image-description", text)
    settings = {"compression": "jpeg", "Q": 90, "tile_width": 128, "tile_height": 128} | options
    image.tiffsave(
        str(path), tile=True, pyramid=True, bigtiff=kind == "bigtiff", subifd=kind == "ome", resunit="cm", **settings
    )
    return path


def write_slide(path: Path, rgb: Rgb, *, margin: int = 0, hole: tuple[int, int] | None = None, **layout: Any) -> Path:
    """A MIRAX slide of `rgb`, behind `margin` empty images on the left and top, less the image at `hole`."""
    height, width = rgb.shape[:2]
    side = layout.setdefault("image", 128)
    offset = margin * side
    settings = MrxsLayout(width + offset, height + offset, layout.pop("levels", 3), layout.pop("mpp", 0.25), **layout)

    def source(x: int, y: int, wide: int, high: int) -> Rgb | None:
        column, row = x // side - margin, y // side - margin
        if column < 0 or row < 0 or (column, row) == hole:
            return None
        return rgb[row * side : row * side + high, column * side : column * side + wide]

    path.parent.mkdir(parents=True, exist_ok=True)
    write_mrxs(path, settings, source)
    return path


def write_ndpi(path: Path, rgb: Rgb, mpp: float = 0.5) -> Path:
    """A Hamamatsu NDPI of one level: a whole JPEG with restart intervals, and offsets of 8 bytes.

    tifffile takes restart intervals for tiles; their bytes have no header.
    """
    height, width = rgb.shape[:2]
    sink = io.BytesIO()
    Image.fromarray(rgb).save(sink, "JPEG", quality=95, subsampling=0, restart_marker_blocks=width // 32)
    data = bytearray(b"II*\0" + bytes(8))

    def put(content: bytes) -> int:
        place = len(data)
        data.extend(content + bytes(len(content) % 2))
        return place

    pixels = put(sink.getvalue())
    bits, resolution = put(struct.pack("<3H", 8, 8, 8)), put(struct.pack("<2I", round(10000 / mpp), 1))
    maker, model = put(b"Hamamatsu\0"), put(b"C13210\0")
    magnification = struct.unpack("<I", struct.pack("<f", 20.0))[0]
    entries = [
        (254, 4, 1, 0), (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, bits), (259, 3, 1, 7), (262, 3, 1, 6),
        (271, 2, 10, maker), (272, 2, 7, model), (273, 4, 1, pixels), (277, 3, 1, 3), (278, 4, 1, height),
        (279, 4, 1, len(sink.getvalue())), (282, 5, 1, resolution), (283, 5, 1, resolution), (284, 3, 1, 1),
        (296, 3, 1, 3), (65420, 4, 1, 1), (65421, 11, 1, magnification), (65422, 9, 1, 0), (65423, 9, 1, 0),
        (65424, 9, 1, 0),
    ]  # fmt: skip
    data[4:12] = struct.pack("<Q", put(b""))
    data.extend(struct.pack("<H", len(entries)))
    for tag, kind, count, value in entries:
        data.extend(struct.pack("<HHII", tag, kind, count, value))
    data.extend(bytes(8 + 4 * len(entries)))  # no next page, and the upper halves of the values
    path.write_bytes(data)
    return path
