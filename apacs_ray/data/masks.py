"""The rule by which pixels of a mask are cells: one for both layouts, found from all values of a mask.

Of parts only those without cells would pass, so a mask is judged as a whole; its rule then holds for every part of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from apacs_ray.data.grid import Box
from apacs_ray.data.images import Mask
from apacs_ray.data.mask_file import MaskFile, Pixels, require_fits
from apacs_ray.data.mask_header import Palette
from apacs_ray.errors import BadInput

Values = npt.NDArray[np.int64]
CELL_VALUES = (0, 1, 255, 65535)  # the values that a mask of two values may have beside 0
JPEG_GAP = (16, 239)  # gray levels that JPEG does not make of black and white
REC_601 = (19595, 38470, 7471)  # of 65536: red, green, blue
ADVICE = "data.mask_threshold N takes values of at least N as cell"


@dataclass(frozen=True)
class CellRule:
    """The rule of a mask: a pixel is cell when its value (of colors: the luminance, Rec. 601) is at least this."""

    at_least: int

    def cells(self, pixels: Pixels) -> Mask:
        """Return the (H, W) bool cells of pixels as a `MaskFile` reads them."""
        mask: Mask = luminance(pixels) >= self.at_least
        return mask


@dataclass
class Contents:
    """The values of all pixels of a mask together."""

    deep: bool = False  # 16 bits
    colored: bool = False
    pixels: int = 0
    zeros: int = 0
    _known: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(1 << 16, bool))
    _others: set[int] = field(default_factory=set)  # values of more than 16 bits
    _colors: set[int] = field(default_factory=set)  # of 8 bits a channel, packed

    @classmethod
    def of(cls, mask: MaskFile) -> Contents:
        """Look at every pixel once. Raises BadInput where the file is damaged or has values that no mask has."""
        mask.require_sound()
        contents = cls()
        for block in mask.blocks():
            contents.add(block)
        return contents

    def add(self, pixels: Pixels) -> None:
        """Look at a part."""
        pixels = _opaque(pixels)
        if pixels.ndim == 3 and (pixels != pixels[..., :1]).any():
            self.colored = True
            if pixels.dtype == np.uint8 and len(self._colors) <= 256:
                packed = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
                self._colors |= set(np.unique(packed).tolist())
        elif pixels.ndim == 3:
            pixels = pixels[..., 0]
            if len(self._colors) <= 256:
                self._colors |= {int(value) * 0x10101 for value in np.unique(pixels)}
        self.deep |= pixels.dtype == np.uint16
        values = luminance(_integral(pixels))
        self.pixels += values.size
        low, high = int(values.min()), int(values.max())
        lows = int(np.count_nonzero(values == low))
        if lows + np.count_nonzero(values == high) >= values.size:  # true of most parts, and faster than sorting
            different = {low, high}
        elif values.dtype in (np.uint8, np.uint16):
            different = {low, high, *np.unique(values[~self._known[values]]).tolist()}
        else:
            different = set(np.unique(values).tolist())
        self._known[[value for value in different if value < len(self._known)]] = True
        self._others |= {value for value in different if value >= len(self._known)}
        self.zeros += 0 if low else lows

    @property
    def present(self) -> Values:
        """The different values, ascending."""
        return np.array(sorted({*np.flatnonzero(self._known).tolist(), *self._others}), np.int64)

    @property
    def colors(self) -> Palette:
        """The different colors of an image of 8 bits in three channels."""
        packed = np.array(sorted(self._colors), np.int64)
        return np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=1)


def find_rule(mask: MaskFile, threshold: int | None, *, doubtful: bool = False) -> CellRule:
    """Find the rule of a mask, by a look at all of it.

    Two values are a mask by themselves: 1 bit, {0, 1}, {0, 255}, {0, 65535}, in one or three equal channels; what JPEG
    makes of black and white; and a palette of two colors, of which the lighter is cell. Any other mask is gray:
    `threshold` makes values of at least that cell; without it the mask is refused. Values are compared as
    stored, so labels of 16 and 32 bits keep all their objects; of colors it is their luminance. A mask that would be
    another one by another reading (16 bits of which 8 may be meant, the numbers of a palette's colors) is refused.

    Args:
        mask: open.
        threshold: `data.mask_threshold`, 1..255, or None.
        doubtful: the file may be a picture of the slide rather than its mask.

    Returns:
        The rule.

    Raises:
        BadInput: grey_mask, unsupported_mode, unreadable, truncated; no_mask for what is doubtful and no mask.
    """
    contents = Contents.of(mask)
    rule = _two_tone(contents, mask.stored.palette) or _two_values(contents, lossy=mask.stored.lossy)
    if rule is not None:
        return rule
    if threshold is None:
        hint = f"; JPEG blurs masks: {ADVICE}, 128 say" if mask.stored.lossy else f"; {ADVICE}"
        raise BadInput("grey_mask", f"the mask has {_described(contents)}, not just 0 and 1 or 0 and 255{hint}")
    if doubtful and (contents.colored or 2 * contents.zeros < contents.pixels):
        raise BadInput("no_mask", f"it has {_described(contents)}, as a picture has")
    return _by_threshold(contents, threshold, mask.stored.palette)


def decode_mask(data: bytes, max_pixels: int, threshold: int | None) -> Mask:
    """Decode any mask file, with its EXIF orientation applied.

    Args:
        data: the file.
        max_pixels: `data.max_pixels`.
        threshold: `data.mask_threshold`, 1..255, or None.

    Returns:
        (H, W) bool, True where a cell is.

    Raises:
        BadInput: as `MaskFile` and `find_rule`, and too_large for more than `max_pixels`.
    """
    mask = _small(data, max_pixels)
    rule = find_rule(mask, threshold)
    return rule.cells(mask.read(Box(0, 0, mask.width, mask.height)))


def probe_mask(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Return (width, height) in px of a mask file, from its header alone. Raises BadInput: as `decode_mask`."""
    mask = _small(data, max_pixels)
    return mask.width, mask.height


def luminance(pixels: Pixels) -> Pixels:
    """Return one value a pixel: gray as it is, of three channels their luminance (of equal ones their value)."""
    if pixels.ndim == 2:
        return pixels
    if pixels.shape[2] < 3:
        return pixels[..., 0]
    weights = np.array(REC_601, np.uint32 if pixels.dtype == np.uint8 else np.uint64)
    total = sum(pixels[..., channel].astype(weights.dtype) * weights[channel] for channel in range(3))
    values: Pixels = ((total + (1 << 15)) >> 16).astype(pixels.dtype)
    return values


def _small(data: bytes, max_pixels: int) -> MaskFile:
    mask = MaskFile(data, max_pixels)
    require_fits(mask.width, mask.height, max_pixels)
    return mask


def _opaque(pixels: Pixels) -> Pixels:
    """Return the channels but alpha. Raises BadInput where that is not opaque."""
    if pixels.ndim == 2 or pixels.shape[2] == 3:
        return pixels
    alpha = pixels[..., -1]
    if (alpha != (255 if pixels.dtype == np.uint8 else 65535)).any():
        raise BadInput("unsupported_mode", "the mask has transparent parts, neither cell nor background")
    return pixels[..., 0] if pixels.shape[2] == 2 else pixels[..., :3]


def _integral(pixels: Pixels) -> Pixels:
    """Return values that are whole numbers from 0 on. Raises BadInput for others."""
    if np.issubdtype(pixels.dtype, np.floating):
        if not (np.isfinite(pixels).all() and (pixels == np.floor(pixels)).all() and np.abs(pixels).max() < 2**53):
            raise BadInput("unsupported_mode", "the mask has fractions; save it as gray of 8 bits")
        pixels = pixels.astype(np.int64)
    if pixels.dtype.kind == "i" and pixels.min() < 0:
        raise BadInput("unsupported_mode", f"the mask has negative values, down to {pixels.min()}")
    return pixels


def _two_values(contents: Contents, *, lossy: bool) -> CellRule | None:
    present = contents.present
    top = int(present[-1])
    if contents.colored:
        return None
    if top in CELL_VALUES and set(present.tolist()) <= {0, top}:
        return CellRule(1)
    if lossy and JPEG_GAP[1] < top <= 255 and not ((present >= JPEG_GAP[0]) & (present <= JPEG_GAP[1])).any():
        return CellRule(128)
    return None


def _two_tone(contents: Contents, palette: Palette | None) -> CellRule | None:
    """Return the rule of a palette of two colors, declared or used: the lighter is cell."""
    if palette is None:
        return None
    declared = np.unique(palette, axis=0), np.unique(_unpadded(palette), axis=0)
    for colors in declared:
        if len(colors) == 2:
            return _lighter(colors)
    used = contents.colors
    if not contents.colored or len(used) != 2:
        return None
    rule = _lighter(used)
    darker, lighter = sorted((_first_index(palette, color) for color in used), key=lambda place: place[1])
    return rule if darker[0] < lighter[0] else None  # else the background may be the lighter color


def _lighter(colors: Palette) -> CellRule | None:
    low, high = sorted(int(value) for value in luminance(colors[None].astype(np.uint8))[0])
    return CellRule(high) if low < high else None


def _first_index(palette: Palette, color: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Return where a color first stands in a palette (its length: nowhere), and its luminance."""
    places = np.flatnonzero((palette == color).all(axis=1))
    value = int(luminance(color[None, None].astype(np.uint8))[0, 0])
    return (int(places[0]) if len(places) else len(palette)), value


def _unpadded(palette: Palette) -> Palette:
    """Return a palette without the black that fills the table of a TIFF."""
    lit = np.flatnonzero(palette.any(axis=1))
    return palette[: lit[-1] + 1] if len(lit) else palette[:1]


def _by_threshold(contents: Contents, threshold: int, palette: Palette | None) -> CellRule:
    present = contents.present
    if palette is not None and contents.colored:
        places: Iterable[tuple[int, int]] = (_first_index(palette, color) for color in contents.colors)
        if any((index >= threshold) != (value >= threshold) for index, value in places):
            raise BadInput(
                "grey_mask",
                f"data.mask_threshold {threshold} means other pixels by the numbers of the palette's colors than by "
                "their luminance; save the mask as gray",
            )
    if contents.deep and not contents.colored and len(present) > 2 and not (present % 257).any():
        return CellRule(257 * threshold)  # 8 bits, written with 16
    between = ((present >= threshold) & (present < 256 * threshold)).any()
    if contents.deep and threshold > 1 and present[-1] > 255 and between:
        raise BadInput(
            "grey_mask",
            f"the mask has 16-bit values up to {present[-1]}, of which data.mask_threshold {threshold} may mean "
            f"{threshold} or {256 * threshold}; save it with 8 bits (data.mask_threshold 1 takes all but 0)",
        )
    return CellRule(threshold)


def _described(contents: Contents) -> str:
    present = contents.present
    kind = "luminances of colors" if contents.colored else "gray values"
    return f"{len(present)} {kind} from {present[0]} to {present[-1]}"
