"""A few pairs or slides, cut as ingest would cut them, to know what the rest will come to. No Ray, nothing is kept."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from apacs_ray.config.settings import DataSettings, TilesSettings
from apacs_ray.data.folders import Pair
from apacs_ray.data.image_tiles import ShardTask, Source, manifest_rows, plan_tiles, probe_pair, write_shard
from apacs_ray.data.shards import open_table
from apacs_ray.estimate.networks import SampleTile
from apacs_ray.slides.manifest import SlideSummary, SlideTask, inspect_slide, read_manifest
from apacs_ray.slides.slide_files import SlideFiles
from apacs_ray.slides.slide_tiles import measure_tiles
from apacs_ray.storage import LocalStore, Store

SLIDES, PAIRS, TILES = 3, 64, 8  # at most: slides and pairs that are opened, tiles that are cut of each
SHARDS = 5  # at most, until one gives a tile
T = TypeVar("T")


@dataclass(frozen=True)
class CutTiles:
    """Tiles that were read, measured and encoded on one core."""

    count: int = 0
    seconds: float = 0.0
    size: float = 0.0  # bytes as stored
    tile: SampleTile | None = None

    @property
    def each(self) -> float:
        """Seconds a tile."""
        return self.seconds / self.count


@dataclass(frozen=True)
class Sample:
    """A few units of the data, cut.

    Attributes:
        tiles: that each unit will give.
        opening: seconds for all, before the first was cut.
        cut: tiles of them.
    """

    tiles: tuple[float, ...]
    opening: float
    cut: CutTiles


def spread(units: Sequence[T], count: int) -> list[T]:
    """Return at most `count` units, from the first to the last in equal steps."""
    count = min(count, len(units))
    return [units[number * len(units) // count] for number in range(count)]


def cut_pairs(store: Store, pairs: Sequence[Pair], tiles: TilesSettings, data: DataSettings) -> Sample:
    """Read the headers of pairs, and cut tiles of the first that are good."""
    started = time.perf_counter()
    sources = [probe_pair(store, pair, data.max_pixels) for pair in pairs]
    opening = time.perf_counter() - started
    good = [source for source in sources if isinstance(source, Source)]
    if not good:
        return Sample((0.0,) * len(pairs), opening, CutTiles())
    made, cut = 0.0, CutTiles()
    shards = plan_tiles(good, tiles, data, seed=0).shards
    for plan in shards[:SHARDS]:
        rows = plan.slice(0, TILES)
        with tempfile.TemporaryDirectory() as folder:
            output = LocalStore(folder)
            started = time.perf_counter()
            receipt = write_shard(ShardTask(store, output, tiles, data, "estimate"), rows)
            seconds = time.perf_counter() - started
            if not receipt.rows_out:
                continue
            with output.open(receipt.path) as stream:
                rows_out = open_table(stream, receipt.path).read(columns=["image", "mask"]).to_pylist()
        made, cut = receipt.rows_out / receipt.rows_in, _cut(rows_out, seconds)
        break
    planned = [len(manifest_rows(source, tiles)) if isinstance(source, Source) else 0 for source in sources]
    return Sample(tuple(made * count for count in planned), opening, cut)


def cut_slides(task: SlideTask, slides: Sequence[SlideFiles]) -> Sample:
    """Find the tissue of slides, and cut tiles of each that opens."""
    with tempfile.TemporaryDirectory() as folder:
        task = replace(task, output=LocalStore(folder))
        started = time.perf_counter()
        summaries = [inspect_slide(task, number, slide) for number, slide in enumerate(slides)]
        opening = time.perf_counter() - started
        cut = cut_some(task, [(number, one) for number, one in enumerate(summaries) if one.reject is None])
    return Sample(tuple(float(summary.tiles) for summary in summaries), opening, cut)


def cut_some(task: SlideTask, slides: Sequence[tuple[int, SlideSummary]]) -> CutTiles:
    """Cut tiles of inspected slides, from all over each."""
    cut_rows, seconds = [], 0.0
    for number, summary in slides:
        if summary.tiles:
            places = spread(range(summary.tiles), TILES)
            rows = read_manifest(task.output, task.manifest_path(number), places)
            started = time.perf_counter()
            cut_rows += measure_tiles(task, summary, rows)[0]
            seconds += time.perf_counter() - started
    return _cut(cut_rows, seconds)


def _cut(rows: Sequence[dict[str, bytes]], seconds: float) -> CutTiles:
    if not rows:
        return CutTiles()
    size = sum(len(row["image"]) + len(row["mask"] or b"") for row in rows)
    middle = rows[len(rows) // 2]
    return CutTiles(len(rows), seconds, size, SampleTile(middle["image"], middle["mask"]))
