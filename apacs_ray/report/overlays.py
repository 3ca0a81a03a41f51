"""Pictures of a tile: where prediction and annotation agree and differ."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

Rgb = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Shares = npt.NDArray[np.float32]

# Three of the colors of Okabe and Ito, which color-blind readers tell apart: both, prediction only, annotation only
COLORS = {"tp": (0, 158, 115), "fp": (240, 160, 0), "fn": (20, 90, 220), "better": (0, 158, 115), "worse": (213, 94, 0)}
# errors stand out, agreement lets the cell be seen
TINT = {"tp": 0.22, "fp": 0.55, "fn": 0.55, "better": 0.55, "worse": 0.55}
GRAYED = 0.6  # the overlay's picture is grayed by this much: the colors of a stain must not pass for a mark
LARGEST = 480  # px, side of one picture
GAP = 6  # px between the two
JPEG_QUALITY = 88


def overlay(rgb: Rgb, truth: Mask, mask: Mask) -> Rgb:
    """Return the tile (H, W, 3) grayed, with TP, FP and FN tinted and their outlines drawn in full color."""
    return _painted(rgb, {kind: part.astype(np.float32) for kind, part in _kinds(truth, mask).items()})


def panel(rgb: Rgb, truth: Mask, mask: Mask) -> bytes:
    """Encode a tile and its overlay as one picture.

    The two lie above each other, or beside each other where the tile is tall. Masks are shrunk as shares, and outlines
    drawn after that, so that they show in a picture of a large tile too.

    Args:
        rgb: (H, W, 3) uint8.
        truth: (H, W) bool, annotated.
        mask: (H, W) bool, predicted.

    Returns:
        A PNG, in which each of the two is at most `LARGEST` px a side.
    """
    return _panel(rgb, _kinds(truth, mask))


def change_panel(rgb: Rgb, truth: Mask, fusion: Mask, member: Mask) -> bytes:
    """Encode a tile, and where the fusion is right and the member is not (`better`), or the other way round (`worse`).

    Args:
        rgb: (H, W, 3) uint8.
        truth: (H, W) bool, annotated.
        fusion: (H, W) bool, predicted.
        member: Likewise.

    Returns:
        A PNG, as of `panel`.
    """
    changed = fusion != member
    return _panel(rgb, {"better": changed & (fusion == truth), "worse": changed & (member == truth)})


def _panel(rgb: Rgb, kinds: dict[str, Mask]) -> bytes:
    size = _fitting(rgb.shape[1], rgb.shape[0])
    small = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS))
    shares = {kind: _shrunk(part, size) for kind, part in kinds.items()}
    pair = [Image.fromarray(small), Image.fromarray(_painted(small, shares))]
    width, height = size
    beside = height > 1.4 * width
    whole = (2 * width + GAP, height) if beside else (width, 2 * height + GAP)
    picture = Image.new("RGB", whole, "white")
    picture.paste(pair[0], (0, 0))
    picture.paste(pair[1], (width + GAP, 0) if beside else (0, height + GAP))
    return _encoded(picture, "png")


def data_uri(png: bytes) -> str:
    """Return a picture as a data URI, as JPEG: a photograph's PNG would be five times larger."""
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        jpeg = _encoded(image.convert("RGB"), "jpeg", quality=JPEG_QUALITY, subsampling="4:4:4")
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def _kinds(truth: Mask, mask: Mask) -> dict[str, Mask]:
    return {"tp": mask & truth, "fp": mask & ~truth, "fn": truth & ~mask}


def _painted(rgb: Rgb, shares: dict[str, Shares]) -> Rgb:
    """Paint `shares`: for each kind the share of a pixel that is of that kind, (H, W) 0..1."""
    color = rgb.astype(np.float32)
    gray = (color @ np.array([0.299, 0.587, 0.114], np.float32))[:, :, None]
    picture = (1 - GRAYED) * color + GRAYED * gray
    for kind, share in shares.items():
        painted = np.array(COLORS[kind], np.float32)
        tint = (TINT[kind] * share)[:, :, None]
        picture = (1 - tint) * picture + tint * painted
    for kind, share in shares.items():
        region = share >= 0.5
        thickness = max(1, round(max(region.shape) / 400))
        inner = ndimage.binary_erosion(region, iterations=thickness, border_value=1)
        picture[region & ~inner] = COLORS[kind]
    return np.rint(picture).astype(np.uint8)


def _fitting(width: int, height: int) -> tuple[int, int]:
    """Return the size (width, height) in which a tile is shown; small tiles keep theirs."""
    factor = min(1.0, LARGEST / max(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))


def _shrunk(part: Mask, size: tuple[int, int]) -> Shares:
    shares = Image.fromarray(part.astype(np.float32)).resize(size, Image.Resampling.BOX)
    return np.asarray(shares, np.float32)


def _encoded(picture: Image.Image, kind: str, **options: int | str) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, kind, **options)
    return sink.getvalue()
