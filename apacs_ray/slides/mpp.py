"""The scale of a slide, um per level-0 px: where TIFF files say it, and the one rule by which it is believed."""

from __future__ import annotations

import re
from typing import Any

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import ParseError, fromstring

MPP_RANGE = (0.02, 20.0)  # um; a resolution outside is a printer's default and says nothing of the slide
SQUARE_TOLERANCE = 0.01  # the two directions may differ by this share: tiles are square in px and in um
UM_PER_UNIT = {2: 25400.0, 3: 10000.0}  # TIFF ResolutionUnit: inch, centimeter
UM_PER_NAME = {"": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
MICRO = str.maketrans({"\u00b5": "u", "\u03bc": "u"})  # the micro sign, and the Greek letter
APERIO_MPP = re.compile(r"\|\s*MPP\s*=\s*([0-9]+(?:[.,][0-9]*)?)")

Scale = tuple[float | None, float | None]  # um per px across and down, None where it is not said


def square_mpp(scale: Scale) -> tuple[float | None, str | None]:
    """Return the um per px of both directions, if they are known and alike.

    A direction that is not said is taken to be like the other.

    Args:
        scale: what the slide says.

    Returns:
        um per px, else None and why it is not known (None: nothing was said).
    """
    across, down = (value if value is not None and _is_sensible(value) else None for value in scale)
    if across is None or down is None:
        return across or down, None
    if abs(across - down) > SQUARE_TOLERANCE * across:
        return None, f"its px measure {across:g} x {down:g} um and tiles are square: its mpp counts as unknown"
    return across, None


def _is_sensible(mpp: float) -> bool:
    return MPP_RANGE[0] <= mpp <= MPP_RANGE[1]


def tiff_scale(page: Any, words: str) -> Scale:
    """Return what a TIFF says of the scale of its full level: its description, else the page's resolution.

    Aperio's resolution tags are meaningless, so only its words count.

    Args:
        page: tifffile's page of that level.
        words: the description of the file's first page.

    Returns:
        um per px, across and down.
    """
    if (aperio := APERIO_MPP.search(page.description or words)) is not None:
        value = float(aperio.group(1).replace(",", "."))
        return value, value
    if words.startswith("Aperio"):
        return None, None
    if "<" in words and (ome := ome_scale(words, page.imagewidth, page.imagelength)) != (None, None):
        return ome
    unit = UM_PER_UNIT.get(int(page.tags.valueof("ResolutionUnit", 2)))
    if unit is None:
        return None, None
    return _per_px(page.tags.valueof("XResolution"), unit), _per_px(page.tags.valueof("YResolution"), unit)


def _per_px(resolution: tuple[int, int] | None, unit: float) -> float | None:
    numerator, denominator = resolution or (0, 0)
    return unit * denominator / numerator if numerator and denominator else None


def ome_scale(text: str, width: int, height: int) -> Scale:
    """Return PhysicalSizeX and Y in um of the image of this size in an OME-XML text.

    Args:
        text: the OME-XML.
        width: of the image, px.
        height: of the image, px.

    Returns:
        um per px, across and down; (None, None) where it says none.
    """
    try:
        root = fromstring(text, forbid_dtd=True)
    except (ParseError, DefusedXmlException, ValueError):
        return None, None
    for element in root.iter():
        sides = element.get("SizeX"), element.get("SizeY")
        if element.tag.rpartition("}")[2] == "Pixels" and sides == (str(width), str(height)):
            return _physical(element.attrib, "X"), _physical(element.attrib, "Y")
    return None, None


def _physical(attributes: dict[str, str], axis: str) -> float | None:
    unit = UM_PER_NAME.get(attributes.get(f"PhysicalSize{axis}Unit", "um").strip().translate(MICRO).lower())
    try:
        return None if unit is None else float(attributes[f"PhysicalSize{axis}"].replace(",", ".")) * unit
    except (KeyError, ValueError):
        return None
