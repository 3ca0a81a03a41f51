"""Shards of slides' tiles: the assignment of tiles to shards, and the writing of one shard.

A shard holds tiles of one slide, neighbors in reading order, so that one task opens one slide once; a large slide is
many shards and keeps all workers busy, and many small slides do so as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from apacs_ray.data.grid import Box
from apacs_ray.data.quality import focus
from apacs_ray.data.rejects import Reject
from apacs_ray.data.shards import Receipt, read_finished, shard_path, write_tiles
from apacs_ray.data.splits import assign_val
from apacs_ray.data.tile_rows import TILE_SCHEMA, TilePixels, TilePlace, tile_row
from apacs_ray.data.units import one_unit
from apacs_ray.data.words import Split
from apacs_ray.errors import BadInput
from apacs_ray.slides.manifest import SlideSummary, SlideTask, opened_masks, opened_slide, read_manifest
from apacs_ray.slides.mask_sources import MaskSource
from apacs_ray.slides.reader import Slide, read_box


@dataclass(frozen=True)
class SlideShard:
    """Rows `rows` of a slide's manifest, to be written as shard `number` of `split`."""

    split: Split
    number: int
    slide: int
    rows: tuple[int, ...]


def plan_shards(
    task: SlideTask, slides: Sequence[tuple[int, SlideSummary]], splits: Sequence[Split], seed: int
) -> tuple[list[SlideShard], str]:
    """Assign the tiles of all slides to shards.

    Whole slides become val where at least three train; where fewer do, the tiles of those few slides are drawn.

    Args:
        task: how slides are cut.
        slides: the number and summary of each.
        splits: of each slide.
        seed: of the choice of val.

    Returns:
        Shards by split and then slide, and in which units val was chosen ('given' when it was).
    """
    unit = "given"
    parts: dict[Split, list[tuple[int, list[int]]]] = {"train": [], "val": [], "test": []}
    training = [(number, summary) for (number, summary), split in zip(slides, splits, strict=True) if split == "train"]
    val_rows: dict[int, set[int]] = {}
    if training and "val" not in splits:
        val_rows, unit = _draw_val(task, training, seed)
    for (number, summary), split in zip(slides, splits, strict=True):
        rows = range(summary.tiles)
        drawn = val_rows.get(number, set()) if split == "train" else set()
        parts[split].append((number, [row for row in rows if row not in drawn]))
        if drawn:
            parts["val"].append((number, sorted(drawn)))
    shards = []
    for split, pieces in parts.items():
        chunks = [
            (number, rows[start : start + task.tiles.shard])
            for number, rows in pieces
            for start in range(0, len(rows), task.tiles.shard)
        ]
        shards += [SlideShard(split, place, number, tuple(rows)) for place, (number, rows) in enumerate(chunks)]
    return shards, unit


def _draw_val(
    task: SlideTask, training: Sequence[tuple[int, SlideSummary]], seed: int
) -> tuple[dict[int, set[int]], str]:
    """Return the manifest rows of each training slide that become val."""
    # tiles without masks cannot validate
    known = [(number, summary) for number, summary in training if summary.tiles and summary.annotated]
    fraction = task.settings.val_fraction
    if len({summary.slide.slide_id for _, summary in known}) >= 3:
        units = [
            {"slide_id": summary.slide.slide_id, "image": summary.slide.image_id, "tile_id": str(number)}
            for number, summary in known
        ]
        chosen, unit = assign_val(units, fraction, seed, slides_known=True)
        return {
            number: set(range(summary.tiles)) for (number, summary), is_val in zip(known, chosen, strict=True) if is_val
        }, unit
    tiles = [  # of two slides at most, which fits the driver's memory
        (number, place, {"slide_id": "", "image": "", "tile_id": row["tile_id"]})
        for number, summary in known
        for place, row in enumerate(read_manifest(task.output, task.manifest_path(number)))
    ]
    if not tiles:
        return {}, "tile"
    chosen, unit = assign_val([tile for *_, tile in tiles], fraction, seed, slides_known=False)
    drawn: dict[int, set[int]] = {}
    for (number, place, _), is_val in zip(tiles, chosen, strict=True):
        if is_val:
            drawn.setdefault(number, set()).add(place)
    return drawn, unit


def write_slide_shard(task: SlideTask, summary: SlideSummary, shard: SlideShard) -> Receipt:
    """Write one shard: read, measure and encode its tiles; a finished shard is left as it is.

    A region that cannot be read is the reject of that tile; a slide that no longer opens rejects its tiles.

    Args:
        task: how slides are cut.
        summary: of the slide.
        shard: to write.

    Returns:
        The receipt: what became of its rows.
    """
    path = shard_path("tiles", shard.split, task.fingerprint, shard.number)
    finished = read_finished(task.output, path)
    if finished is not None:
        return finished
    rows = read_manifest(task.output, task.manifest_path(shard.slide), shard.rows)
    tiles, rejects = measure_tiles(task, summary, rows)
    return write_tiles(
        task.output, pa.Table.from_pylist(tiles, TILE_SCHEMA), Receipt(path, len(rows), len(tiles), {}, rejects)
    )


def measure_tiles(
    task: SlideTask, summary: SlideSummary, rows: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows of `TILE_SCHEMA` for manifest rows of one slide, and rejects for those that cannot be read."""
    tiles: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []

    def refuse(row: dict[str, Any], defect: BadInput) -> None:
        uri = task.data.uri_of(summary.slide.path)
        rejects.append(asdict(Reject.of(defect, uri, summary.slide.slide_id, row["x"], row["y"])))

    try:
        with one_unit(summary.slide.path, again=True), _opened_both(task, summary) as (slide, masks):
            for row in rows:
                try:
                    with one_unit(f"{summary.slide.path} at {row['x']}, {row['y']}", again=True):
                        tiles.append(_measured(task, summary, slide, masks, row))
                except BadInput as defect:
                    refuse(row, defect)
    except BadInput as defect:  # it opened when it was inspected, and does not now
        for row in rows[len(tiles) + len(rejects) :]:
            refuse(row, defect)
    return tiles, rejects


@contextlib.contextmanager
def _opened_both(task: SlideTask, summary: SlideSummary) -> Iterator[tuple[Slide, MaskSource | None]]:
    with opened_slide(task, summary.slide) as slide:
        if not summary.annotated:
            yield slide, None
            return
        with opened_masks(task, summary.slide, slide.info, summary.mask_rules) as masks:
            yield slide, masks


def _measured(
    task: SlideTask, summary: SlideSummary, slide: Slide, masks: MaskSource | None, row: dict[str, Any]
) -> dict[str, Any]:
    """Read a tile and return its row."""
    box = Box(row["x"], row["y"], row["width"], row["height"])
    picture = read_box(slide, box, summary.downsample, box.width, box.height)
    mask = None if masks is None else masks.tile(box.x, box.y, box.width, box.height, summary.downsample)
    place = TilePlace(
        row["tile_id"],
        summary.slide.slide_id,
        row["x"],
        row["y"],
        Box(row["column"], row["row"], row["width"], row["height"]),
        summary.grid_width,
        summary.grid_height,
        task.data.uri_of(summary.slide.path),
        summary.slide.version,
        level=slide.info.level_for(summary.downsample),
        downsample=summary.downsample,
        mpp=None if summary.mpp is None else summary.mpp * summary.downsample,
    )
    # the share that `tiles.min_tissue` was compared with
    return tile_row(place, TilePixels(picture, mask, row["tissue_fraction"], focus(picture)), task.tiles)
