"""Tiling of one slide in several ways, for the benchmarks of tiling; run as a program, a worker of `tiling.py`.

The worker cuts by whichever package its PYTHONPATH holds, so that two versions of the package can be compared. It reads
a line of JSON for each turn and answers with one; it ends with its input.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from measure import start_ray

TILE, QUALITY, SHARD = 2000, 90, 20
WORKERS = 2
SLOWEST = 12  # functions that a profile names


@dataclass(frozen=True)
class Cut:
    """How the slide in a folder is tiled.

    Attributes:
        data: The folder.
        output: Where shards are written.
        tile: Side of a tile, px.
        shard: Tiles of a shard.
        times: How often every tile is written in a turn.
    """

    data: str
    output: str
    tile: int = TILE
    shard: int = SHARD
    times: int = 1


class Cutting:
    """The shards of one slide, written anew in every turn; processes that share the output must not share `turns`."""

    def __init__(self, cut: Cut) -> None:
        from apacs_ray.config.settings import DataSettings, TilesSettings
        from apacs_ray.slides.cache import SlideCache
        from apacs_ray.slides.find import find_slides
        from apacs_ray.slides.manifest import SlideTask, inspect_slide
        from apacs_ray.slides.slide_tiles import SlideShard
        from apacs_ray.storage import open_store

        store = open_store(cut.data)
        (self.slide,) = find_slides(store.list()).slides
        self.cut = cut
        self.turns: Iterator[int] = itertools.count(1)
        self._base = SlideTask(
            data=store,
            masks=None,
            output=open_store(cut.output),
            tiles=TilesSettings(size=cut.tile, quality=QUALITY, shard=cut.shard, min_tissue=0.0, last="drop"),
            settings=DataSettings(),
            cache=SlideCache(Path(cut.output) / "cache", 1 << 40),
            fingerprint="0" * 16,
        )
        started = time.perf_counter()
        self.summary = inspect_slide(self._base, 0, self.slide)
        self.inspected = time.perf_counter() - started  # s
        starts = [*range(0, self.summary.tiles, cut.shard)] * cut.times
        self.shards = [
            SlideShard("train", number, 0, tuple(range(start, min(start + cut.shard, self.summary.tiles))))
            for number, start in enumerate(starts)
        ]

    @property
    def path(self) -> Path:
        """The slide's file."""
        return Path(self.cut.data) / self.slide.path

    @property
    def tiles(self) -> int:
        """Tiles of a turn."""
        return self.summary.tiles * self.cut.times

    def corners(self) -> list[tuple[int, int]]:
        """Return level-0 (x, y) where the tiles of a turn begin."""
        from apacs_ray.slides.manifest import read_manifest

        rows = read_manifest(self._base.output, self._base.manifest_path(0))
        return [(row["x"], row["y"]) for row in rows] * self.cut.times

    def fresh(self) -> Any:
        """Return the task under a new fingerprint, its manifest in place: no shard of an earlier turn is reused."""
        shutil.rmtree(Path(self.cut.output) / "tiles", ignore_errors=True)
        task = replace(self._base, fingerprint=f"{next(self.turns):08x}{'0' * 8}")
        task.output.write(task.manifest_path(0), task.output.read(self._base.manifest_path(0)))
        return task


class Ways:
    """The same tiles in several ways; each does part `part` of `of` and returns the number of its tiles."""

    def __init__(self, cutting: Cutting, part: int, of: int) -> None:
        self._cutting = cutting
        self._shards = cutting.shards[part::of]
        self._corners = cutting.corners()[part::of]

    def floor(self) -> Callable[[], int]:
        """Return the work of a task of the pipeline: read, measure, encode, write Parquet."""
        from apacs_ray.slides.slide_tiles import write_slide_shard

        task, summary = self._cutting.fresh(), self._cutting.summary
        return lambda: sum(write_slide_shard(task, summary, shard).rows_out for shard in self._shards)

    def bare(self) -> Callable[[], int]:
        """Return work that only reads and encodes."""
        from apacs_ray.data.grid import Box
        from apacs_ray.data.images import encode_image
        from apacs_ray.slides.open import open_slide
        from apacs_ray.slides.reader import read_box

        side = self._cutting.cut.tile

        def work() -> int:
            slide = open_slide(self._cutting.path)
            for x, y in self._corners:
                encode_image(read_box(slide, Box(x, y, side, side), 1.0, side, side), "jpeg", QUALITY, "4:4:4")
            slide.close()
            return len(self._corners)

        return work

    def plain(self) -> Callable[[], int]:
        """Return a plain loop over OpenSlide's Python interface and Pillow, as a textbook writes it."""
        import openslide
        from PIL import Image

        sides = self._cutting.cut.tile, self._cutting.cut.tile

        def work() -> int:
            with openslide.OpenSlide(self._cutting.path) as slide:
                for corner in self._corners:
                    picture = slide.read_region(corner, 0, sides)
                    white = Image.new("RGB", picture.size, "white")
                    white.paste(picture, mask=picture.getchannel("A"))
                    white.save(io.BytesIO(), "JPEG", quality=QUALITY, subsampling=0)
            return len(self._corners)

        return work

    def decoding(self) -> Callable[[], int]:
        """Return a loop over OpenSlide's C call alone."""
        import ctypes

        import numpy as np
        import openslide
        from openslide import lowlevel

        side = self._cutting.cut.tile
        pixel = ctypes.POINTER(ctypes.c_uint32)

        def work() -> int:
            with openslide.OpenSlide(self._cutting.path) as slide:
                for corner in self._corners:
                    argb = np.empty((side, side), np.uint32)
                    lowlevel._read_region(slide._osr, argb.ctypes.data_as(pixel), *corner, 0, side, side)
            return len(self._corners)

        return work

    def pipeline(self) -> Callable[[], int]:
        """Return the tasks of the pipeline on a Ray of `WORKERS` CPUs; the first call starts or joins it."""
        if "ray" not in sys.modules:
            start_ray(WORKERS)
        from apacs_ray.distributed.data import write_slide_shards

        task, summary = self._cutting.fresh(), self._cutting.summary
        return lambda: sum(r.rows_out for r in write_slide_shards(task, [summary], self._shards, lambda done: None))


def main() -> None:
    """Answer turns, lines of `{"way": "floor", "profile": false}`, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    order = json.loads(sys.argv[1])
    cutting = Cutting(Cut(**order["cut"]))
    ways = Ways(cutting, order["part"], order["of"])
    package = sys.modules["apacs_ray"].__file__
    description = {
        "package": package,
        "tiles": cutting.tiles,
        "inspect_s": cutting.inspected,
        "cut": asdict(cutting.cut),
    }
    print(json.dumps(description), file=answers, flush=True)
    for line in sys.stdin:
        turn = json.loads(line)
        work = getattr(ways, turn["way"])()
        print(json.dumps(_profiled(work) if turn["profile"] else _timed(work)), file=answers, flush=True)
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def _timed(work: Callable[[], int]) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    tiles = work()
    return {"tiles": tiles, "seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def _profiled(work: Callable[[], int]) -> dict[str, Any]:
    """Do the work with a profile: CPU ms a tile of the package's functions with callees, of the slowest without."""
    import cProfile
    import pstats

    profiler = cProfile.Profile(time.process_time)
    timed = profiler.runcall(_timed, work)
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    a_tile = 1000 / max(1, timed["tiles"])
    within: dict[str, float] = {}
    own: dict[str, float] = {}
    for (file, _, name), (_, _, alone, cumulative, _) in stats.items():
        place = "/".join(Path(file).parts[-2:])
        own[f"{place} {name}"] = own.get(f"{place} {name}", 0.0) + alone * a_tile
        if "apacs_ray" in file:
            within[name] = within.get(name, 0.0) + cumulative * a_tile
    slowest = sorted(own, key=own.__getitem__, reverse=True)[:SLOWEST]
    return {**timed, "within": within, "own": {name: own[name] for name in slowest}}


if __name__ == "__main__":
    main()
