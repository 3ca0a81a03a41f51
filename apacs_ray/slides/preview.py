"""The preview of a slide: which tiles are kept, which are not, and why."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from apacs_ray.data.grid import Box
from apacs_ray.data.images import Rgb
from apacs_ray.slides.tissue import ARTIFACT, OUT, SkipReason, Tissue

SMALLEST, LARGEST = 640, 1600  # px, the longer side
COLORS: dict[SkipReason | None, tuple[int, int, int]] = {  # differ in gray as well
    None: (0, 114, 178),
    "background": (190, 190, 190),
    "artifact": (213, 94, 0),
    "unscanned": (110, 110, 110),
}
WORDS: dict[SkipReason | None, str] = {
    None: "kept",
    "background": "no tissue",
    "artifact": "ink, lines, dust",
    "unscanned": "not scanned",
}
LEGEND = 22  # px


def draw_preview(tissue: Tissue, bounds: Box, tiles: Sequence[tuple[Box, SkipReason | None]]) -> bytes:
    """Draw the preview of a slide, with every tile framed in the color of what became of it.

    Glass is grayed, artifacts are orange, what was not scanned is striped; a line below says how many tiles are what.

    Args:
        tissue: of the slide.
        bounds: what was scanned, level-0 px.
        tiles: level-0 px of each, and why it is skipped (None: it is kept).

    Returns:
        A PNG.
    """
    picture = Image.fromarray(_shaded(tissue))
    longest = max(picture.size)
    scale = longest / min(max(longest, SMALLEST), LARGEST)
    picture = picture.resize((max(1, round(picture.width / scale)), max(1, round(picture.height / scale))))
    scale *= tissue.downsample
    draw = ImageDraw.Draw(picture)
    _frame(draw, bounds, scale, (60, 60, 60))
    # kept tiles last, so that their frames lie on top
    for box, skipped in sorted(tiles, key=lambda tile: tile[1] is None):
        _frame(draw, box, scale, COLORS[skipped])
    image = Image.new("RGB", (max(picture.width, SMALLEST), picture.height + LEGEND), (255, 255, 255))
    image.paste(picture)
    _legend(ImageDraw.Draw(image), picture.height, Counter(skipped for _, skipped in tiles))
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def _shaded(tissue: Tissue) -> Rgb:
    picture = tissue.picture.copy()
    glass = ~tissue.mask
    faded = picture[glass].astype(np.float32)
    picture[glass] = (0.5 * faded + 0.5 * faded.mean(axis=1, keepdims=True) * 0.92).astype(np.uint8)
    if tissue.excluded is not None:
        artifact = tissue.excluded == ARTIFACT
        picture[artifact] = picture[artifact] // 2 + np.array(COLORS["artifact"], np.uint8) // 2
        rows, columns = np.nonzero(tissue.excluded == OUT)
        picture[rows, columns] = np.where(((rows + columns) // 6 % 2 == 0)[:, None], 150, 185).astype(np.uint8)
    return picture


def _frame(draw: ImageDraw.ImageDraw, box: Box, scale: float, color: tuple[int, int, int]) -> None:
    left, top = box.x / scale, box.y / scale
    right, bottom = (box.x + box.width) / scale - 1, (box.y + box.height) / scale - 1
    draw.rectangle([left, top, max(left, right), max(top, bottom)], outline=color)


def _legend(draw: ImageDraw.ImageDraw, top: int, counts: Counter[SkipReason | None]) -> None:
    x = 6
    for reason, word in WORDS.items():
        if counts[reason] or reason is None:
            draw.rectangle([x, top + 6, x + 10, top + 16], outline=COLORS[reason], width=2)
            text = f"{counts[reason]} {word}"
            draw.text((x + 16, top + 5), text, fill=(0, 0, 0), font=ImageFont.load_default())
            x += 34 + round(draw.textlength(text))
