"""The choice of the engine that reads a slide: ours for plain TIFF, OpenSlide for the formats of scanners' vendors.

Plain pictures are slides of one level, for segmentation; a listing of data takes none for a slide.

`READERS` lists the engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import openslide

from apacs_ray.errors import BadInput
from apacs_ray.slides import image_slide
from apacs_ray.slides.openslide_engine import OpenSlideSlide
from apacs_ray.slides.reader import Engine, Slide
from apacs_ray.slides.tiff import OtherEngine, read_pyramid
from apacs_ray.slides.vips_engine import VipsSlide

LARGEST_SIDE, LARGEST_AREA = 2_000_000, 2e11  # px; half a meter and 125 cm2 at 0.25 um per px
PLAIN = {"generic-tiff", "aperio"}  # OpenSlide's names of formats that our engine reads faster and more strictly
TIFF = {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}
# formats whose tags do not say all: tiles overlap (BIF, Trestle), or are one JPEG stream (NDPI)
NEVER_PLAIN = {"ventana", "trestle", "hamamatsu"}
Order = Literal["first", "second", "never"]


@dataclass(frozen=True)
class FileFormat:
    """The format of a file by its content: its first 4 bytes, and which of OpenSlide's formats it has (None: none)."""

    path: Path
    magic: bytes
    vendor: str | None

    @property
    def is_tiff(self) -> bool:
        """Whether it begins as a TIFF."""
        return self.magic in TIFF

    @property
    def is_plain(self) -> bool:
        """Whether no vendor adds to the format what its own tags do not say."""
        return self.vendor is None or self.vendor in PLAIN


@dataclass(frozen=True)
class Reader:
    """One way to read slides.

    Attributes:
        engine: What `data.engine` calls it.
        name: What refusals call it.
        order: Whether it is asked for a file first, only when another reader has refused it, or never.
        open: Open the file at a path; of a z-stack, the focal plane that is given. Raises BadInput for a defect, and
            OtherEngine for a sound file that this reader does not know.
    """

    engine: str
    name: str
    order: Callable[[FileFormat], Order]
    open: Callable[[Path, str], Slide]


def _order_of_vips(file: FileFormat) -> Order:
    if not file.is_tiff or file.vendor in NEVER_PLAIN:
        return "never"
    return "first" if file.is_plain else "second"


def _order_of_image(file: FileFormat) -> Order:
    return "first" if _is_picture(file) else "never"


def _is_picture(file: FileFormat) -> bool:
    """Whether a file is a plain picture and says so: the main file of a MIRAX slide is a JPEG, too."""
    suffix = file.path.suffix[1:].lower()
    return file.vendor is None and suffix in image_slide.SUFFIXES and file.magic.startswith(image_slide.MAGIC)


def _order_of_openslide(file: FileFormat) -> Order:
    if _is_picture(file):
        return "never"
    return "second" if file.is_tiff and file.is_plain else "first"


# Of readers with the same order the one listed first is asked first. Which files are slides at all, their suffix says
# (`find.SUFFIXES`).
READERS = [
    Reader("image", "Pillow", _order_of_image, lambda path, plane: image_slide.ImageSlide(path)),
    Reader("vips", "libvips", _order_of_vips, lambda path, plane: VipsSlide(path, read_pyramid(path, plane))),
    Reader("openslide", "OpenSlide", _order_of_openslide, lambda path, plane: OpenSlideSlide(path)),
]


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
    file = FileFormat(path, _magic(path), openslide.OpenSlide.detect_format(str(path)))
    readers = [reader for order in ("first", "second") for reader in READERS if reader.order(file) == order]
    if engine != "auto":
        readers = [reader for reader in readers if reader.engine == engine]
        if not readers:
            raise BadInput("unsupported_slide", f"{path.name}: no plain TIFF (data.engine auto may read it)")
        if engine == "openslide" and file.is_tiff and file.is_plain:
            _require_plain_is_right(path, plane)
    return _first_that_opens(path, plane, readers)


def _magic(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(4)


def _require_plain_is_right(path: Path, plane: str) -> None:
    """Raise BadInput for plain TIFF that OpenSlide reads without complaint, and wrong."""
    try:
        read_pyramid(path, plane)
    except OtherEngine:
        return


def _first_that_opens(path: Path, plane: str, readers: Sequence[Reader]) -> Slide:
    reasons: list[str] = []
    codes: list[str] = []
    for reader in readers:
        try:
            return reader.open(path, plane)
        except OtherEngine as error:
            codes.append("unsupported_slide")
            reasons.append(f"{reader.name}: {error}")
        except BadInput as defect:
            if reader.engine == "vips" and not reasons and defect.code in ("unsupported_slide", "too_large"):
                raise  # the other engine would read such a file wrong
            codes.append(defect.code)
            if len(readers) == 1:
                raise
            reasons.append(f"{reader.name}: {defect.reason.removeprefix(f'{path.name}: ')}")
    code = next((code for code in codes if code != "unsupported_slide"), codes[0])
    raise BadInput(code, f"{path.name}: {'; '.join(reasons)}")
