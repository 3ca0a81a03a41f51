"""The choice of the engine that reads a slide: ours for plain TIFF, OpenSlide for the formats of scanners' vendors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import openslide

from apacs_ray.errors import BadInput
from apacs_ray.slides.openslide_engine import OpenSlideSlide
from apacs_ray.slides.reader import Engine, Slide
from apacs_ray.slides.tiff import OtherEngine, read_pyramid
from apacs_ray.slides.vips_engine import VipsSlide

LARGEST_SIDE, LARGEST_AREA = 2_000_000, 2e11  # px; half a meter and 125 cm2 at 0.25 um per px
PLAIN = {"generic-tiff", "aperio"}  # OpenSlide's names of formats that our engine reads faster and more strictly
TIFF = {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}
# formats whose tags do not say all: tiles overlap (BIF, Trestle), or are one JPEG stream (NDPI)
NEVER_PLAIN = {"ventana", "trestle", "hamamatsu"}


def open_slide(path: Path, engine: Engine = "auto", plane: str = "middle") -> Slide:
    """Open a slide with the engine that reads it right; what that one refuses, the other is asked for.

    Args:
        path: the file to open; its companions lie beside it.
        engine: the only one to ask, unless 'auto'.
        plane: the focal plane of a z-stack: 'middle', its number from 0, or 'sharpest' of each region that is read.

    Returns:
        The open slide; close it.

    Raises:
        BadInput: missing_file, empty_file, unreadable, truncated, unsupported_slide, too_large.
    """
    slide = _opened(path, engine, plane)
    for level in slide.info.levels:
        sides = level.width, level.height
        if min(sides) < 1 or max(sides) > LARGEST_SIDE or level.width * level.height > LARGEST_AREA:
            slide.close()
            raise BadInput("too_large", f"{path.name}: a level of {level.width} x {level.height} px, as no slide has")
    return slide


def _opened(path: Path, engine: Engine, plane: str) -> Slide:
    if not path.is_file():
        raise BadInput("missing_file", f"{path.name}: no such file")
    if path.stat().st_size == 0:
        raise BadInput("empty_file", f"{path.name} has no bytes")
    vendor = openslide.OpenSlide.detect_format(str(path))
    plain = vendor is None or vendor in PLAIN
    by_vips, by_openslide = lambda: VipsSlide(path, read_pyramid(path, plane)), lambda: OpenSlideSlide(path)
    ways: list[tuple[str, Callable[[], Slide]]] = [("libvips", by_vips), ("OpenSlide", by_openslide)]
    if not _is_tiff(path) or vendor in NEVER_PLAIN:
        ways = ways[1:]
        if engine == "vips":
            raise BadInput("unsupported_slide", f"{path.name}: no plain TIFF (data.engine auto may read it)")
    elif engine != "auto":
        if plain and engine == "openslide":
            _require_plain_is_right(path, plane)
        ways = [way for way in ways if way[0] == {"vips": "libvips", "openslide": "OpenSlide"}[engine]]
    elif not plain:
        ways.reverse()
    return _first_that_opens(path, ways)


def _is_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in TIFF


def _require_plain_is_right(path: Path, plane: str) -> None:
    """Raise BadInput for plain TIFF that OpenSlide reads without complaint, and wrong."""
    try:
        read_pyramid(path, plane)
    except OtherEngine:
        return


def _first_that_opens(path: Path, ways: list[tuple[str, Callable[[], Slide]]]) -> Slide:
    reasons: list[str] = []
    codes: list[str] = []
    for name, way in ways:
        try:
            return way()
        except OtherEngine as error:
            codes.append("unsupported_slide")
            reasons.append(f"{name}: {error}")
        except BadInput as defect:
            if name == "libvips" and not reasons and defect.code in ("unsupported_slide", "too_large"):
                raise  # the other engine would read such a file wrong
            codes.append(defect.code)
            if len(ways) == 1:
                raise
            reasons.append(f"{name}: {defect.reason.removeprefix(f'{path.name}: ')}")
    code = next((code for code in codes if code != "unsupported_slide"), codes[0])
    raise BadInput(code, f"{path.name}: {'; '.join(reasons)}")
