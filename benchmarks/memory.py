"""Peak resident memory of a process that tiles a slide, by the slide's size: it must not grow with it.

Each measurement is a fresh process that finds the tissue, plans the tiles and writes every shard, as a worker does.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cutting import TILE, Cut, Cutting
from measure import options, peak_resident, require, show
from tiling import write_slide

SIDES = (12_000, 40_000)  # multiples of the 4000 px that are repeated
LARGEST_RATIO = 1.3  # of the larger slide's peak to the smaller one's


def main() -> None:
    """Measure the peak memory by slide size and fail when it grows."""
    arguments = options(__doc__ or "", "slides of 8000 and 16000 px").parse_args()
    tile, smear, sides = TILE, 4000, (8000, 16_000) if arguments.quick else SIDES
    if arguments.smoke:
        tile, smear, sides = 256, 512, (512, 2048)
    rows: list[dict[str, Any]] = []
    for kind in ("tif", "mrxs"):
        peaks = []
        for side in sides:
            with tempfile.TemporaryDirectory() as folder:
                write_slide(Path(folder) / f"slide.{kind}", side, smear)
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    tiles, peak = pool.apply(_cut, (Cut(folder, f"{folder}/out", tile),))
            require(tiles == (side // tile) ** 2, f"{kind}, {side} px: {tiles} tiles")
            peaks.append(peak)
            rows.append({"slide": f"{kind}, {side} px", "tiles": tiles, "peak_MB": peak, "ratio": peak / peaks[0]})
    show("peak memory of a process that cuts a slide", rows, arguments.json)
    require(all(row["ratio"] <= LARGEST_RATIO for row in rows), "it grows with the slide")


def _cut(cut: Cut) -> tuple[int, float]:
    """Tile a slide; return the number of tiles and this process's peak resident memory in MB."""
    from apacs_ray.slides.slide_tiles import write_slide_shard

    cutting = Cutting(cut)
    task = cutting.fresh()
    tiles = sum(write_slide_shard(task, cutting.summary, shard).rows_out for shard in cutting.shards)
    return tiles, peak_resident()


if __name__ == "__main__":
    main()
