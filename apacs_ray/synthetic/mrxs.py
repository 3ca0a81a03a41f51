"""A writer of MIRAX slides (`NAME.mrxs` and the folder `NAME/`), as OpenSlide documents the format and reads it.

The slide is a grid of square images without overlap. Every further level joins 2 x 2 images of the level before and
halves them. Images that hold nothing are left out of the index: there a reader finds a transparent region, and where
whole columns or rows are missing, the slide's bounds begin later than its level 0.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image

from apacs_ray.data.images import Rgb, encode_image

Source = Callable[[int, int, int, int], Rgb | None]  # x, y, width, height (level-0 px) -> (H, W, 3), or None: empty

VERSION = b"01.02"
PAGE = 128  # index entries a page
DATA_FILE = 1 << 30  # bytes after which a new Data*.dat begins: offsets are 31 bits


@dataclass(frozen=True)
class MrxsLayout:
    """The way in which a slide is stored.

    Attributes:
        width: level-0 px.
        height: level-0 px.
        levels: of the pyramid, each half as wide as the one before.
        mpp: um per level-0 px.
        image: side of a stored image, px.
        codec: of the stored images.
        quality: of JPEG, 1..100.
        fill: the background color that the slide states, RGB 0..255.
        slide_id: 32 hexadecimal digits.
    """

    width: int
    height: int
    levels: int
    mpp: float  # um per level-0 px
    image: int = 256
    codec: Literal["JPEG", "PNG"] = "JPEG"
    quality: int = 90
    fill: tuple[int, int, int] = (255, 255, 255)  # background color, as the slide states it
    slide_id: str = "0123456789ABCDEF0123456789ABCDEF"

    @property
    def across(self) -> int:
        """Images in a row of level 0."""
        return -(-self.width // self.image)

    @property
    def down(self) -> int:
        """Images in a column of level 0."""
        return -(-self.height // self.image)


def write_mrxs(path: Path, layout: MrxsLayout, source: Source) -> None:
    """Write a slide, and its folder. Memory is flat: a few images of each level at a time.

    The last column and row are filled with the background color, so the slide as read measures whole images.

    Args:
        path: ends in .mrxs.
        layout: how it is stored.
        source: gives the pixels of any part of level 0.
    """
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    writer = _Writer(layout, source, folder)
    top = layout.levels - 1
    for row in range(0, layout.down, 1 << top):
        for column in range(0, layout.across, 1 << top):
            writer.image(top, column, row)
    files = writer.close()
    (folder / "Index.dat").write_bytes(_index(layout, writer.entries))
    (folder / "Slidedat.ini").write_text(_slidedat(layout, files))
    path.write_bytes(_preview(layout, writer.preview))  # written last: without it there is no slide


@dataclass
class _Writer:
    """Depth first over the pyramid: an image is made of the four below it, which are written on the way."""

    layout: MrxsLayout
    source: Source
    folder: Path
    entries: list[list[tuple[int, int, int, int]]] = field(
        default_factory=list
    )  # by level: image, offset, length, file
    preview: Rgb | None = None
    _files: list[BinaryIO] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.entries = [[] for _ in range(self.layout.levels)]

    def image(self, level: int, column: int, row: int) -> Rgb | None:
        """Return the image of `level` whose first level-0 image is (column, row); None where there is nothing."""
        layout = self.layout
        if column >= layout.across or row >= layout.down:
            return None
        rgb = self._base(column, row) if level == 0 else self._joined(level, column, row)
        if rgb is not None:
            self.entries[level].append((row * layout.across + column, *self._store(rgb)))
            if level == layout.levels - 1 and self.preview is None:
                self.preview = rgb
        return rgb

    def _base(self, column: int, row: int) -> Rgb | None:
        layout = self.layout
        x, y = column * layout.image, row * layout.image
        width, height = min(layout.image, layout.width - x), min(layout.image, layout.height - y)
        rgb = self.source(x, y, width, height)
        return None if rgb is None else self._padded(rgb)

    def _joined(self, level: int, column: int, row: int) -> Rgb | None:
        side, step = self.layout.image, 1 << (level - 1)
        whole: Rgb | None = None
        for down in range(2):
            for across in range(2):
                part = self.image(level - 1, column + across * step, row + down * step)
                if part is not None:
                    if whole is None:
                        whole = np.empty((2 * side, 2 * side, 3), np.uint8)
                        whole[:] = self.layout.fill
                    whole[down * side : (down + 1) * side, across * side : (across + 1) * side] = part
        return None if whole is None else np.asarray(Image.fromarray(whole).reduce(2))

    def _padded(self, rgb: Rgb) -> Rgb:
        height, width = rgb.shape[:2]
        side = self.layout.image
        if (height, width) == (side, side):
            return rgb
        whole = np.empty((side, side, 3), np.uint8)
        whole[:] = self.layout.fill
        whole[:height, :width] = rgb
        return whole

    def _store(self, rgb: Rgb) -> tuple[int, int, int]:
        """Append an encoded image to the data files; returns offset, length and file number."""
        if self.layout.codec == "JPEG":
            content = encode_image(rgb, "jpeg", self.layout.quality, "4:4:4")
        else:
            content = encode_image(rgb, "png", 0, "4:4:4")
        if not self._files or self._files[-1].tell() + len(content) > DATA_FILE:
            self._files.append((self.folder / f"Data{len(self._files):04d}.dat").open("wb"))
        file = self._files[-1]
        if file.tell() == 0:  # the header of real slides' data files; readers skip it by offset
            file.write(VERSION + self.layout.slide_id.encode())
        offset = file.tell()
        file.write(content)
        return offset, len(content), len(self._files) - 1

    def close(self) -> int:
        """Close the data files; returns how many there are."""
        for file in self._files:
            file.close()
        return len(self._files)


def _index(layout: MrxsLayout, entries: list[list[tuple[int, int, int, int]]]) -> bytes:
    """Return `Index.dat`: version, slide id, pointers to one chain of pages a level. Numbers are 32-bit, little."""
    sink = io.BytesIO()
    sink.write(VERSION + layout.slide_id.encode())
    roots = sink.tell()
    sink.write(struct.pack("<ii", 0, 0))
    records = sink.tell()
    sink.write(struct.pack(f"<{layout.levels}i", *[0] * layout.levels))
    for level, images in enumerate(entries):
        record = sink.tell()
        sink.write(struct.pack("<ii", 0, record + 8))
        pages = [images[start : start + PAGE] for start in range(0, len(images), PAGE)] or [[]]
        for number, page in enumerate(pages):
            following = sink.tell() + 8 + 16 * len(page) if number + 1 < len(pages) else 0
            sink.write(struct.pack("<ii", len(page), following))
            for entry in page:
                sink.write(struct.pack("<iiii", *entry))
        _patch(sink, records + 4 * level, record)
    _patch(sink, roots, records)
    _patch(sink, roots + 4, sink.tell())  # no further records: the second table is empty
    return sink.getvalue()


def _patch(sink: io.BytesIO, at: int, value: int) -> None:
    end = sink.tell()
    sink.seek(at)
    sink.write(struct.pack("<i", value))
    sink.seek(end)


def _slidedat(layout: MrxsLayout, files: int) -> str:
    """Return `Slidedat.ini`, with what a reader needs."""
    red, green, blue = layout.fill
    lines = [
        "[GENERAL]",
        "SLIDE_VERSION = 01.02",
        f"SLIDE_ID = {layout.slide_id}",
        f"IMAGENUMBER_X = {layout.across}",
        f"IMAGENUMBER_Y = {layout.down}",
        "OBJECTIVE_MAGNIFICATION = 40",
        "CameraImageDivisionsPerSide = 1",
        "[HIERARCHICAL]",
        "HIER_COUNT = 1",
        "NONHIER_COUNT = 0",
        "INDEXFILE = Index.dat",
        "HIER_0_NAME = Slide zoom level",
        f"HIER_0_COUNT = {layout.levels}",
    ]
    for level in range(layout.levels):
        lines += [
            f"HIER_0_VAL_{level} = ZoomLevel_{level}",
            f"HIER_0_VAL_{level}_SECTION = LAYER_0_LEVEL_{level}_SECTION",
        ]
    lines += [
        "[DATAFILE]",
        f"FILE_COUNT = {files}",
        *(f"FILE_{number} = Data{number:04d}.dat" for number in range(files)),
    ]
    for level in range(layout.levels):
        lines += [
            f"[LAYER_0_LEVEL_{level}_SECTION]",
            "OVERLAP_X = 0",
            "OVERLAP_Y = 0",
            f"MICROMETER_PER_PIXEL_X = {layout.mpp * 2**level!r}",
            f"MICROMETER_PER_PIXEL_Y = {layout.mpp * 2**level!r}",
            f"IMAGE_FORMAT = {layout.codec}",
            f"IMAGE_FILL_COLOR_BGR = {blue << 16 | green << 8 | red}",
            f"DIGITIZER_WIDTH = {layout.image}",
            f"DIGITIZER_HEIGHT = {layout.image}",
            f"IMAGE_CONCAT_FACTOR = {min(level, 1)}",
        ]
    return "\n".join(lines) + "\n"


def _preview(layout: MrxsLayout, image: Rgb | None) -> bytes:
    """Return the `.mrxs` file itself: a JPEG picture."""
    if image is None:
        image = np.full((layout.image, layout.image, 3), layout.fill, np.uint8)
    return encode_image(image, "jpeg", 80, "4:2:0")
