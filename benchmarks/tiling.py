"""Tiles per second of this pipeline on one slide, as TIFF and as MIRAX, against bare threads and a plain loop.

(a) bare: decode and encode in 2 threads. (b) floor: the same work as ours (decode, tissue, focus, encode, Parquet) in
2 threads. (c) this pipeline: its shard tasks on Ray Data with 2 CPUs, workers warm. (d) plain: OpenSlide's Python
interface and PIL in 2 processes. All alternate in one run; the median of the repetitions counts. For MIRAX (a) and (b)
read by OpenSlide's C call, as ours does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyvips
from PIL import Image

from apacs_ray.data.images import encode_image
from apacs_ray.data.synthetic import render, slide_specs
from apacs_ray.data.tiles import Box
from apacs_ray.settings import DataSettings, TilesSettings
from apacs_ray.slides.cache import SlideCache
from apacs_ray.slides.find import find_slides
from apacs_ray.slides.plan import SlideSummary, SlideTask, inspect_slide, read_manifest
from apacs_ray.slides.reader import open_slide, read_box
from apacs_ray.slides.shards import SlideShard, write_slide_shard
from apacs_ray.slides.write_mrxs import MrxsLayout, write_mrxs
from apacs_ray.storage import open_store

WORKERS = 2
TILE, QUALITY = 2000, 90
SHARD = 20
TIMES = 2  # the grid is gone over so often in one repetition


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a slide of 8000 x 8000 px, 3 repetitions")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--side", type=int, help="px, side of the slide (default: 20000)")
    parser.add_argument("--formats", default="tif,mrxs", help="of the slide")
    arguments = parser.parse_args()
    side = arguments.side or (8000 if arguments.quick else 20_000)
    repetitions = 3 if arguments.quick else 5
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments.formats.split(","):
            data = Path(folder) / kind
            data.mkdir()
            write_slide(data / f"slide.{kind}", side)
            figures[kind] = _measure(data, Path(folder) / f"out-{kind}", repetitions)
            _show(kind, figures[kind])
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def write_slide(path: Path, side: int) -> None:
    """A smear of 4000 x 4000 px, repeated; whole, so that every tile of the grid is full."""
    rgb, _ = render(slide_specs(0, 4000, 4000, train=1, test=0)[0])
    times = side // 4000
    if path.suffix == ".tif":
        image = pyvips.Image.new_from_array(rgb).copy(interpretation="srgb", xres=4000, yres=4000)
        image.replicate(times, times).tiffsave(
            str(path), tile=True, pyramid=True, compression="jpeg", Q=85, tile_width=256, tile_height=256, bigtiff=True
        )
        return
    wide = np.concatenate([rgb, rgb[:, :256]], axis=1)
    wide = np.concatenate([wide, wide[:256]])
    layout = MrxsLayout(4000 * times, 4000 * times, 7, 0.25, image=256, quality=85)
    write_mrxs(path, layout, lambda x, y, w, h: wide[y % 4000 : y % 4000 + h, x % 4000 : x % 4000 + w])


def _measure(data: Path, output: Path, repetitions: int) -> dict[str, float]:
    store = open_store(str(data))
    (slide,) = find_slides(store.list()).slides
    settings = TilesSettings(size=TILE, quality=QUALITY, shard=SHARD, min_tissue=0.0, last="drop")
    cache = SlideCache(output / "cache", 1 << 40)
    base = SlideTask(store, None, open_store(str(output)), settings, DataSettings(), cache, "0" * 16)
    started = time.perf_counter()
    summary = inspect_slide(base, 0, slide)
    inspected = time.perf_counter() - started
    boxes = [Box(row["x"], row["y"], TILE, TILE) for row in read_manifest(base.output, base.manifest_path(0))] * TIMES
    shards = shards_of(summary, SHARD, TIMES)
    path = data / slide.path
    plain = multiprocessing.get_context("spawn").Pool(WORKERS)  # before Ray: its threads do not bear forks
    plain.starmap(_plain_part, [(str(path), boxes[:1])] * WORKERS)  # warm
    ray_started = _start_ray()
    ways: dict[str, Callable[[SlideTask], object]] = {
        "bare": lambda task: _bare(path, boxes),
        "floor": lambda task: _floor(task, summary, shards),
        "pipeline": lambda task: _pipeline(task, summary, shards),
        "plain": lambda task: plain.starmap(_plain_part, [(str(path), boxes[n::WORKERS]) for n in range(WORKERS)]),
    }
    ways["pipeline"](fresh(base, 1))  # workers warm
    times: dict[str, list[float]] = {name: [] for name in ways}
    mark = 2
    for _ in range(repetitions):
        for name, way in ways.items():
            task, mark = fresh(base, mark), mark + 1
            begun = time.perf_counter()
            way(task)
            times[name].append(time.perf_counter() - begun)
            shutil.rmtree(output / "tiles", ignore_errors=True)
    plain.terminate()
    rates = {name: len(boxes) / statistics.median(taken) for name, taken in times.items()}
    return {
        **{f"{name}_tiles_per_s": rate for name, rate in rates.items()},
        "pipeline_to_floor": rates["pipeline"] / rates["floor"],
        "pipeline_to_plain": rates["pipeline"] / rates["plain"],
        "tiles_measured": len(boxes) * repetitions,
        "inspect_s": inspected,
        "ray_start_s": ray_started,
    }


def _start_ray() -> float:
    from apacs_ray.adapters.session import prepare_ray

    prepare_ray()  # first: Ray reads its token when it is imported
    import ray

    if ray.is_initialized():
        return 0.0
    started = time.perf_counter()
    ray.init(address="local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    return time.perf_counter() - started


def shards_of(summary: SlideSummary, size: int, times: int) -> list[SlideShard]:
    """All tiles of the first slide in shards of `size`, so many times over."""
    starts = [*range(0, summary.tiles, size)] * times
    return [
        SlideShard("train", number, 0, tuple(range(start, min(start + size, summary.tiles))))
        for number, start in enumerate(starts)
    ]


def fresh(base: SlideTask, mark: int) -> SlideTask:
    """The same task under another fingerprint, its manifest in place: nothing is taken over from the last one."""
    task = replace(base, fingerprint=f"{mark:08x}{'0' * 8}")
    task.output.write(task.manifest_path(0), base.output.read(base.manifest_path(0)))
    return task


def _in_threads(parts: Sequence[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(WORKERS) as pool:
        for future in [pool.submit(part) for part in parts]:
            future.result()


def _bare(path: Path, boxes: Sequence[Box]) -> None:
    def work(part: Sequence[Box]) -> None:
        slide = open_slide(path)
        for box in part:
            encode_image(read_box(slide, box, 1.0, TILE, TILE), "jpeg", QUALITY, "4:4:4")
        slide.close()

    _in_threads([lambda part=boxes[number::WORKERS]: work(part) for number in range(WORKERS)])


def _floor(task: SlideTask, summary: SlideSummary, shards: Sequence[SlideShard]) -> None:
    def work(part: Sequence[SlideShard]) -> None:
        for shard in part:
            write_slide_shard(task, summary, shard)

    _in_threads([lambda part=shards[number::WORKERS]: work(part) for number in range(WORKERS)])


def _pipeline(task: SlideTask, summary: SlideSummary, shards: Sequence[SlideShard]) -> None:
    from apacs_ray.adapters.slides import write_slide_shards

    receipts = write_slide_shards(task, [summary], shards, lambda done: None)
    assert sum(receipt.rows_out for receipt in receipts) == summary.tiles * TIMES


def _plain_part(path: str, boxes: Sequence[Box]) -> None:
    import io

    import openslide

    with openslide.OpenSlide(path) as slide:
        for box in boxes:
            picture = slide.read_region((box.x, box.y), 0, (TILE, TILE))
            white = Image.new("RGB", picture.size, "white")
            white.paste(picture, mask=picture.getchannel("A"))
            white.save(io.BytesIO(), "JPEG", quality=QUALITY, subsampling=0)


def _show(kind: str, figures: dict[str, float]) -> None:
    print(f"{kind}:")
    for name, value in figures.items():
        print(f"  {name:<22} {value:10.2f}")


if __name__ == "__main__":
    main()
