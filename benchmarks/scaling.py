"""Tiling on clusters of 1 and 2 nodes of a CPU each, against as many bare processes doing the same shards.

Bare: processes of this machine that read, measure and encode the tiles of the shards and write them, one shard after
the other. Ours: the same shards as tasks of Ray Data on raylets of one CPU, sent by a driver on the head, which has no
CPU for tasks. Both read one local slide and write shards of the default size to one local folder. The bare processes
are measured before and after the cluster, which is not there meanwhile; what starts is not counted.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cutting import TILE, Cut, Cutting  # noqa: E402
from measure import Elsewhere, alternate, medians, options, require, show, start_ray  # noqa: E402
from tiling import write_slide  # noqa: E402

from apacs_ray.config.settings import TilesSettings  # noqa: E402
from apacs_ray.slides.manifest import SlideSummary, SlideTask  # noqa: E402
from apacs_ray.slides.slide_tiles import SlideShard, write_slide_shard  # noqa: E402
from apacs_ray.testing.cluster import RayCluster  # noqa: E402

TIMES = 4  # how often every tile is written in one repetition


def main() -> None:
    """Measure tiling on clusters of each size and print the table."""
    parser = options(__doc__ or "", "a slide of 8000 x 8000 px in shards of 8 tiles")
    parser.add_argument("--formats", help="of the slide (default: tif,mrxs)")
    parser.add_argument("--nodes", help="of each cluster (default: 1,2)")
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    side, tile, shard, formats, nodes = 32_000, TILE, TilesSettings().shard, "tif,mrxs", "1,2"
    if arguments.quick:
        side, shard = 8000, 8
    if arguments.smoke:
        side, tile, shard, formats, nodes = 1024, 256, 8, "mrxs", "1"
    counts = [int(count) for count in (arguments.nodes or nodes).split(",")]
    rows = []
    for kind in (arguments.formats or formats).split(","):
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data"
            data.mkdir()
            write_slide(data / f"slide.{kind}", side, min(side, 4000))
            work = Cutting(Cut(str(data), str(Path(folder) / "out"), tile, shard, TIMES))
            rows += _measure(kind, work, counts, Path(folder), 1 if arguments.smoke else arguments.repetitions)
    show(f"cutting tiles of {tile} px", rows, arguments.json)


def _measure(kind: str, work: Cutting, counts: list[int], folder: Path, repetitions: int) -> list[dict[str, object]]:
    seconds: dict[str, float] = {}
    for count in counts:
        with multiprocessing.get_context("spawn").Pool(count) as pool:
            way = {f"bare {count}": partial(_bare, work, pool)}
            before = alternate(way, repetitions)
            with _driver_of(count, work, folder) as driver:  # a cluster that waits would take from the bare processes
                ours = alternate({f"ours {count}": driver}, repetitions)
            after = alternate(way, repetitions, warm=False)
        seconds |= medians({name: before[name] + after[name] for name in way}) | medians(ours)
    rates = {name: work.tiles / value for name, value in seconds.items()}
    return [
        {
            "slide": kind,
            "nodes": count,
            "bare_tiles_per_s": rates[f"bare {count}"],
            "ours_tiles_per_s": rates[f"ours {count}"],
            "ratio": rates[f"ours {count}"] / rates[f"bare {count}"],
            "speed_up": rates[f"ours {count}"] / rates[f"ours {counts[0]}"],
            "bare_speed_up": rates[f"bare {count}"] / rates[f"bare {counts[0]}"],
        }
        for count in counts
    ]


@contextlib.contextmanager
def _driver_of(nodes: int, work: Cutting, folder: Path) -> Iterator[Elsewhere]:
    """Yield tiling by a cluster of so many nodes, which lives while the block runs."""
    place = folder / f"cluster-{nodes}"
    place.mkdir()
    cluster = RayCluster(place, head_cpus=0)
    try:
        for _ in range(nodes):
            cluster.add_node(cpus=1)
        driver = Elsewhere(partial(_driver, work, nodes), {**cluster.joined, "PYTHONPATH": str(ROOT)})
        yield driver
        driver.end()
    finally:
        cluster.stop()


def _bare(work: Cutting, pool: multiprocessing.pool.Pool) -> None:
    """Tile in processes, of which the next free one takes the next shard."""
    written = pool.imap_unordered(partial(_write, work.fresh(), work.summary), work.shards)
    require(sum(written) == work.tiles, "tiles were lost")


def _write(task: SlideTask, summary: SlideSummary, shard: SlideShard) -> int:
    return write_slide_shard(task, summary, shard).rows_out


def _driver(work: Cutting, nodes: int) -> Callable[[], object]:
    """Set up a driver on the cluster of this process's environment."""
    start_ray()
    from apacs_ray.distributed.data import write_slide_shards

    work.turns = itertools.count(nodes * 1_000_000)

    def cut() -> int:
        receipts = write_slide_shards(work.fresh(), [work.summary], work.shards, lambda done: None)
        require(sum(receipt.rows_out for receipt in receipts) == work.tiles, "tiles were lost")
        return len(receipts)

    return cut


if __name__ == "__main__":
    main()
