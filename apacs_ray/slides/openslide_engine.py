"""The engine that reads slides by OpenSlide: MRXS, NDPI, SCN, VMS, BIF, DICOM, JPEG 2000 in SVS, and others."""

from __future__ import annotations

import configparser
import contextlib
import ctypes
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import openslide
from openslide import lowlevel
from PIL import Image

from apacs_ray.data.grid import Box
from apacs_ray.data.images import Mask, Rgb, as_picture
from apacs_ray.errors import BadInput
from apacs_ray.slides.mpp import square_mpp
from apacs_ray.slides.reader import WHITE, Level, SlideInfo, level_downsample

PIXEL = ctypes.POINTER(ctypes.c_uint32)
OPAQUE = np.uint32(0xFF000000)
MIRAX = ".mrxs"


class OpenSlideSlide:
    """A slide that OpenSlide reads.

    OpenSlide refuses everything after its first error: so a failed read reopens and tries once more, and a region that
    fails again is damaged.
    """

    def __init__(self, path: Path) -> None:
        """Open the slide. Raises BadInput: missing_file, unsupported_slide, unreadable."""
        self._path = path
        self._resources = contextlib.ExitStack()
        self._argb = np.empty((0, 0), np.uint32)
        try:
            self._opened_path = self._resources.enter_context(_mirax_names(path)) if _is_mirax(path) else path
            self._slide = self._open()
            self._downsamples = self._slide.level_downsamples  # OpenSlide's own, by which it converts coordinates
            self.info = _info(self._slide)
        except BaseException:
            self._resources.close()
            raise

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Rgb:
        """Return a region as an array, as `Slide.read`."""
        return np.asarray(self.read_image(level, x, y, width, height))

    def read_image(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        """Return a region as a picture, as `Slide.read_image`."""
        return self._read_twice(level, x, y, width, height)[0]

    def read_known(self, level: int, x: int, y: int, width: int, height: int) -> tuple[Rgb, Mask]:
        """Return a region and what of it the slide holds, as `KnowsHoles.read_known`."""
        picture, known = self._read_twice(level, x, y, width, height)
        return np.asarray(picture), np.ones((height, width), bool) if known is None else known

    def _read_twice(self, level: int, x: int, y: int, width: int, height: int) -> tuple[Image.Image, Mask | None]:
        downsample = self._downsamples[level]
        at = round(x * downsample), round(y * downsample)
        try:
            return self._read(level, *at, width, height)
        except openslide.OpenSlideError:
            self._slide.close()
            self._slide = self._open()
        try:
            return self._read(level, *at, width, height)
        except openslide.OpenSlideError as error:
            self._slide.close()
            self._slide = self._open()
            raise BadInput("unreadable_region", f"{self._path.name}: {error}") from error

    def close(self) -> None:
        """Close the slide and remove links that were made for it."""
        self._slide.close()
        self._resources.close()

    def _open(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(str(self._opened_path))
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise BadInput("unsupported_slide", f"{self._path.name}: OpenSlide knows no such format") from error
        except (openslide.OpenSlideError, OSError) as error:
            code = "unsupported_slide" if "nsupported" in str(error) else "unreadable"
            raise BadInput(code, f"{self._path.name}: {error}") from error

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> tuple[Image.Image, Mask | None]:
        """Read a region by OpenSlide's C function into an array, which is premultiplied ARGB; (x, y) in level-0 px.

        Returns:
            The picture, and where the slide holds it (None: everywhere).
        """
        if self._argb.shape != (height, width):  # reused: the system clears new memory page by page
            self._argb = np.empty((height, width), np.uint32)
        argb = self._argb
        lowlevel._read_region(self._slide._osr, argb.ctypes.data_as(PIXEL), x, y, level, width, height)
        picture = as_picture(argb, "BGRX")  # little-endian ARGB
        if argb.min() >= OPAQUE:
            return picture, None
        transparent = argb < OPAQUE
        rgb = np.array(picture)
        missing = (255 - (argb >> np.uint32(24)))[transparent].astype(np.float32)[:, None] / 255
        rgb[transparent] = np.rint(rgb[transparent] + missing * np.array(self.info.background, np.float32))
        return Image.fromarray(rgb), ~transparent


def _is_mirax(path: Path) -> bool:
    return path.suffix.lower() == MIRAX


@contextlib.contextmanager
def _mirax_names(path: Path) -> Iterator[Path]:
    """Link a MIRAX slide under the names that OpenSlide looks for, NAME.mrxs and NAME/ in this case.

    Yields:
        The path to open.

    Raises:
        BadInput: missing_file.
    """
    beside = sorted(path.parent.iterdir(), key=lambda one: one.name != path.stem)  # the exact name first
    folder = next((one for one in beside if one.name.lower() == path.stem.lower() and one.is_dir()), None)
    if folder is None:
        raise BadInput(
            "missing_file",
            f"{path.name}: its folder {path.stem}/ (Slidedat.ini, Index.dat, Data0000.dat ...) does not lie beside it; "
            "copy that, too",
        )
    held = {one.name for one in folder.iterdir()}
    for name in ("Slidedat.ini", *_data_files(folder / "Slidedat.ini")):
        if name not in held:
            raise BadInput("missing_file", f"{path.name}: {name} is missing in its folder {folder.name}/; copy it anew")
    if path.suffix == MIRAX and folder.name == path.stem:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="apacs_ray-mrxs-") as place:
        linked = Path(place, path.stem + MIRAX)
        linked.symlink_to(path.absolute())
        linked.with_suffix("").symlink_to(folder.absolute(), target_is_directory=True)
        yield linked


def _data_files(slidedat: Path) -> list[str]:
    """Return the files of pixels that a `Slidedat.ini` names; none where OpenSlide will say that it is unreadable."""
    ini = configparser.ConfigParser(strict=False, interpolation=None)
    try:
        ini.read_string(slidedat.read_text("utf-8-sig"))
        return [name for key, name in ini["DATAFILE"].items() if re.fullmatch(r"file_\d+", key)]
    except (OSError, UnicodeDecodeError, configparser.Error, KeyError):
        return []


def _info(slide: openslide.OpenSlide) -> SlideInfo:
    properties = slide.properties
    full = slide.level_dimensions[0]
    levels = tuple(Level(w, h, level_downsample(full, (w, h))) for w, h in slide.level_dimensions)
    x = _whole(properties, openslide.PROPERTY_NAME_BOUNDS_X, 0)
    y = _whole(properties, openslide.PROPERTY_NAME_BOUNDS_Y, 0)
    width = _whole(properties, openslide.PROPERTY_NAME_BOUNDS_WIDTH, full[0] - x)
    height = _whole(properties, openslide.PROPERTY_NAME_BOUNDS_HEIGHT, full[1] - y)
    color = properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR)
    background = WHITE if color is None else tuple(bytes.fromhex(color))
    names = openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y
    mpp, note = square_mpp((_number(properties, names[0]), _number(properties, names[1])))
    notes = () if note is None else (note,)
    return SlideInfo("openslide", levels, mpp, Box(x, y, width, height), background, notes)  # type: ignore[arg-type]


def _whole(properties: Mapping[str, str], name: str, otherwise: int) -> int:
    return int(properties.get(name, otherwise))


def _number(properties: Mapping[str, str], name: str) -> float | None:
    try:
        return float(properties[name])
    except (KeyError, ValueError):
        return None
