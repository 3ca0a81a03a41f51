"""Every kind of TIFF that a slide may be, written by tifffile, with the RGB that a viewer shows of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

Rgb = npt.NDArray[np.uint8]
SIDE, TILE, ROWS = 200, 64, 48  # px: neither a multiple of the other
LOSSY = {"jpeg", "jpeg2000"}
COMPRESSIONS = ("none", "lzw", "deflate", "packbits", "webp", "zstd", "lzma", "jpeg", "jpeg2000")
# what each is written from, and what tifffile is told of it
LAYOUTS = ("rgb", "ycbcr", "gray", "white is zero", "palette", "planes", "rgb+unspecified", "rgb+straight",
           "rgb+associated", "gray+straight", "cmyk")  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One way to write a slide as TIFF."""

    compression: str
    layout: str
    bits: int = 8
    tiled: bool = True
    predictor: bool = False
    subsampling: tuple[int, int] | None = None

    def __str__(self) -> str:
        parts = [self.compression, self.layout, f"{self.bits} bits", "tiles" if self.tiled else "strips"]
        parts += ["predictor"] if self.predictor else []
        parts += [f"{self.subsampling[0]}x{self.subsampling[1]}"] if self.subsampling else []
        return ", ".join(parts)

    @property
    def lossy(self) -> bool:
        return self.compression in LOSSY


def all_kinds() -> Iterator[Kind]:
    """Those that a TIFF can be; what tifffile cannot write is left out by `write`."""
    for compression, layout, tiled in itertools.product(COMPRESSIONS, LAYOUTS, (True, False)):
        if layout == "ycbcr":
            if compression == "jpeg":
                yield from (Kind(compression, layout, tiled=tiled, subsampling=s) for s in ((1, 1), (2, 1), (2, 2)))
            continue
        if compression in LOSSY and ("+" in layout or layout == "palette"):
            continue  # an alpha or a color's number that is lossy, too
        yield Kind(compression, layout, tiled=tiled)
        if compression in ("lzw", "deflate", "zstd") and layout not in ("palette",):
            yield Kind(compression, layout, tiled=tiled, predictor=True)
        if compression in ("none", "lzw", "deflate") and layout in ("rgb", "gray", "planes"):
            yield Kind(compression, layout, bits=16, tiled=tiled)


def picture(seed: int = 0) -> Rgb:
    """Smooth, so that compression has something to do, with spots; (SIDE, SIDE, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    rgb = np.stack([128 + 90 * np.sin((k + 1) * x / 41 + (3 - k) * y / 57 + k) for k in range(3)], axis=2)
    for left, top in rng.integers(0, SIDE - 9, (30, 2)):
        rgb[top : top + 9, left : left + 9] = rng.integers(0, 255, 3)
    return rgb.astype(np.uint8)


def write(path: Path, kind: Kind, rgb: Rgb) -> Rgb | None:
    """Write `rgb` in this way and return what a viewer must show of it; None where tifffile cannot write that."""
    data, shown, options = _content(kind.layout, rgb)
    if kind.bits == 16:
        data = data.astype(np.uint16) * 257
    if kind.compression != "none":
        options["compression"] = kind.compression
    if kind.predictor:
        options["predictor"] = True
    if kind.subsampling:
        options["subsampling"] = kind.subsampling
    options |= {"tile": (TILE, TILE)} if kind.tiled else {"rowsperstrip": ROWS}
    try:
        tifffile.imwrite(path, data, metadata=None, **options)
    except (ValueError, RuntimeError, NotImplementedError, TypeError, KeyError):
        path.unlink(missing_ok=True)
        return None
    return _decoded(path, kind) if kind.lossy else shown


def _content(layout: str, rgb: Rgb) -> tuple[npt.NDArray[Any], Rgb, dict[str, Any]]:
    gray = np.repeat(rgb[..., :1], 3, axis=2)
    alpha = np.full(rgb.shape[:2], 255, np.uint8)
    alpha[20:60, 30:90] = 0
    alpha[100:140, 100:180] = 128
    share = alpha[..., None] / 255
    on_white = np.rint(rgb * share + 255 * (1 - share)).astype(np.uint8)
    match layout:
        case "rgb":
            return rgb, rgb, {"photometric": "rgb"}
        case "ycbcr":
            return rgb, rgb, {"photometric": "ycbcr"}
        case "gray":
            return rgb[..., 0], gray, {"photometric": "minisblack"}
        case "white is zero":
            return 255 - rgb[..., 0], gray, {"photometric": "miniswhite"}
        case "palette":
            table = np.random.default_rng(5).integers(0, 256, (3, 256)).astype(np.uint16)
            return (
                rgb[..., 0],
                table.T.astype(np.uint8)[rgb[..., 0]],
                {"photometric": "palette", "colormap": table * 257},
            )
        case "planes":
            planes = np.ascontiguousarray(rgb.transpose(2, 0, 1))
            return planes, rgb, {"photometric": "rgb", "planarconfig": "separate"}
        case "rgb+unspecified":
            return np.dstack([rgb, alpha]), rgb, {"photometric": "rgb", "extrasamples": ["unspecified"]}
        case "rgb+straight":
            return np.dstack([rgb, alpha]), on_white, {"photometric": "rgb", "extrasamples": ["unassalpha"]}
        case "rgb+associated":
            multiplied = np.rint(rgb * share).astype(np.uint8)
            shown = np.rint(np.minimum(multiplied + 255 * (1 - share), 255)).astype(np.uint8)
            return np.dstack([multiplied, alpha]), shown, {"photometric": "rgb", "extrasamples": ["assocalpha"]}
        case "gray+straight":
            data = np.dstack([rgb[..., 0], alpha])
            options = {"photometric": "minisblack", "extrasamples": ["unassalpha"], "planarconfig": "contig"}
            return data, np.repeat(on_white[..., :1], 3, axis=2), options
    return np.dstack([255 - rgb, alpha * 0]), rgb, {"photometric": "separated"}


def _decoded(path: Path, kind: Kind) -> Rgb:
    """What tifffile makes of a lossy file."""
    stored = tifffile.imread(path)
    if kind.layout == "planes":
        stored = stored.transpose(1, 2, 0)
    if stored.ndim == 2:
        stored = np.repeat(stored[..., None], 3, axis=2)
    return 255 - stored if kind.layout == "white is zero" else stored
