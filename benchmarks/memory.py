"""Peak resident memory of a process that cuts a slide, by the slide's size: it must not grow with it.

Each measurement is a fresh process that finds the tissue, plans the tiles and writes every shard, as a worker does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiling import SHARD, TILE, shards_of, write_slide

SIDES = (12_000, 40_000)  # multiples of the 4000 px that are repeated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="slides of 8000 and 16000 px")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    figures: dict[str, dict[int, float]] = {}
    for kind in ("tif", "mrxs"):
        figures[kind] = {}
        for side in (8000, 16_000) if arguments.quick else SIDES:
            with tempfile.TemporaryDirectory() as folder:
                write_slide(Path(folder) / f"slide.{kind}", side)
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    figures[kind][side] = pool.apply(_cut, (folder,))
            print(f"{kind:>5} {side:>6} px: peak {figures[kind][side]:.0f} MB", flush=True)
        small, large = figures[kind].values()
        print(f"{kind:>5} ratio {large / small:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def _cut(folder: str) -> float:
    """Cut the slide in a folder; returns this process's peak resident memory, MB."""
    from apacs_ray.settings import DataSettings, TilesSettings
    from apacs_ray.slides.cache import SlideCache
    from apacs_ray.slides.find import find_slides
    from apacs_ray.slides.plan import SlideTask, inspect_slide
    from apacs_ray.slides.shards import write_slide_shard
    from apacs_ray.storage import open_store

    store = open_store(folder)
    (slide,) = find_slides(store.list()).slides
    settings = TilesSettings(size=TILE, shard=SHARD, min_tissue=0.0)
    output = open_store(f"{folder}/out")
    task = SlideTask(store, None, output, settings, DataSettings(), SlideCache(Path(folder) / "cache", 1), "0" * 16)
    summary = inspect_slide(task, 0, slide)
    for shard in shards_of(summary, SHARD, times=1):
        write_slide_shard(task, summary, shard)
    # not ru_maxrss, which a process takes over from the one that started it
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
