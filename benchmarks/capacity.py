"""Unit costs of segmenting slides, and what 1 000 slides take by them on 1, 10 and 100 GPUs: `cluster/capacity.md`.

The costs are measured as `segment --estimate` does it, in one process, with a synthetic smear repeated to a slide (TIFF
and MIRAX) and networks of random weights, whose number of FLOPs is that of trained ones; how fast a GPU is is assumed.
The masks that objects are found in are those of the smear's cells, not of the random networks. A slide of the plan is
100 000 x 200 000 px in 5 GB, of which a fifth is tissue in one piece. `--write` puts costs in `cluster/segment.json`
and the tables in `cluster/capacity.md`; `--tables` does so from costs that are there.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
from measure import machine, options, require, show, start_ray
from tiling import write_slide

from apacs_ray.config.settings import SegmentSettings
from apacs_ray.data.grid import Box
from apacs_ray.distributed.resource_plan import Cluster
from apacs_ray.distributed.tasks import plan_segment_pool
from apacs_ray.estimate.segment_sample import costs_of
from apacs_ray.estimate.segmenting import (
    Machines,
    UnitCosts,
    Workload,
    bottleneck,
    bytes_moved,
    bytes_written,
    core_seconds,
    cpus_a_gpu,
    loads,
    wall_seconds,
)
from apacs_ray.inference.cores import cores_of
from apacs_ray.inference.cutting import cores_a_shard
from apacs_ray.inference.segmenter import Segmented
from apacs_ray.inference.slide_plan import lattice_size
from apacs_ray.models.registry import MEMBERS, NETWORKS
from apacs_ray.slides.open import open_slide
from apacs_ray.slides.slide_window import read_window
from apacs_ray.synthetic.slide import render, slide_specs

ROOT = Path(__file__).resolve().parent.parent
FILE, DOCUMENT = ROOT / "cluster/segment.json", ROOT / "cluster/capacity.md"
BEGIN, END = "<!-- by benchmarks/capacity.py -->", "<!-- end -->"
SLIDES, WIDTH, HEIGHT, TISSUE, SLIDE_BYTES = 1000, 100_000, 200_000, 0.2, 5e9
CORE, HALO = 4096, 480
PLAN_SECONDS = 9.0  # of a core: benchmarks/tissue.py, MIRAX of 200 000 x 100 000 px at 0.25 um
# FLOP/s of the ensemble in bfloat16. An H100: 8.98 TFLOP a tile of 2000 px in 61 ms (cluster/training.json); an L4 as
# much less as is assumed for training (benchmarks/capacity_training.py)
GPUS = {"L4": 15e12, "H100": 147e12}
SEEN = {"L4": "**assumed**: a tenth", "H100": "`benchmarks/inference.py`, machine H: a tile of 2000 px in 61 ms"}
GPUS_A_NODE = {"L4": 4, "H100": 8}
CPUS_A_NODE = {"L4": 48, "H100": 192}
DISK = {"L4": 1e9, "H100": 4e9}  # bytes/s that a node's disk writes, assumed: EBS gp3; NVMe
NETWORK = {"L4": 40e9 / 8, "H100": 200e9 / 8}  # bytes/s of a node: 40 Gbit/s of a g6.12xlarge; assumed
NUMBERS = (1, 10, 100)


def main() -> None:
    """Measure the costs, or read them, and print the plan."""
    parser = options(__doc__ or "", "a slide of 6144 px and fewer shards")
    parser.add_argument("--write", action="store_true", help="keep the costs, and write the tables into capacity.md")
    parser.add_argument("--tables", action="store_true", help="do not measure: the tables of the costs that are kept")
    arguments = parser.parse_args()
    if arguments.tables:
        kept = json.loads(FILE.read_text())
    else:
        side, smear, shards = (12_288, 4096, 400) if not arguments.quick else (6144, 3072, 200)
        if arguments.smoke:
            side, smear, shards = 512, 512, 4
        kept = {"machine": machine(), "costs": measure(side, smear, shards)}
    costs = kept["costs"]
    show("unit costs", [{"cost": name, "value": value} for name, value in costs.items()], None)
    rows = [row for name in GPUS for row in plan_rows(costs, name)]
    show(f"{SLIDES} slides of {WIDTH} x {HEIGHT} px", rows, arguments.json)
    if arguments.write:
        FILE.write_text(json.dumps(kept, indent=1) + "\n")
    if arguments.write or arguments.tables:
        DOCUMENT.write_text(in_document(DOCUMENT.read_text(), section(costs)))


def measure(side: int, smear: int, shards: int) -> dict[str, float]:
    """Return the unit costs, by name: seconds a megapixel, milliseconds a shard, bytes a megapixel."""
    rgb, mask = render(slide_specs(0, smear, smear, train=1, test=0)[0])
    with tempfile.TemporaryDirectory() as folder:
        read = {}
        for kind in ("tif", "mrxs"):
            path = Path(folder, f"slide.{kind}")
            write_slide(path, side, smear)
            read[kind] = _read(path, side)
    values = np.full(mask.shape, 50_000, np.uint16)
    found = costs_of([Segmented(mask.astype(bool), values, values // 4)], SegmentSettings(), 0.25)
    require(rgb.shape[:2] == mask.shape, "the smear has a mask")
    mega = 1e6
    return {
        "read_tif_s_a_Mpx": read["tif"] * mega,
        "read_mrxs_s_a_Mpx": read["mrxs"] * mega,
        "objects_s_a_Mpx": found.objects * mega,
        "files_s_a_Mpx": found.files * mega,
        "glass_s_a_Mpx": found.glass * mega,
        "driver_ms_a_shard": 1000 * _driver(shards),
        "part_bytes_a_Mpx": found.part_bytes * mega,
        "file_bytes_a_Mpx": found.file_bytes * mega,
        "glass_bytes_a_Mpx": found.glass_bytes * mega,
    }


def _read(path: Path, side: int) -> float:
    """Core-seconds of a px of windows with their halos, as large as a slide of this size has them."""
    window = min(CORE + 2 * HALO, side)
    reader = open_slide(path, "auto", "middle")
    pixels, began = 0, time.process_time()
    for x, y in ((0, 0), (side - window, side - window), (0, side - window)):
        pixels += read_window(reader, Box(x, y, window, window), 1.0).size // 3
    seconds = time.process_time() - began
    reader.close()
    return seconds / pixels


def _driver(shards: int) -> float:
    """CPU seconds of the driver for a shard that passes through three empty steps, as one of segmentation does."""
    start_ray(2)
    import ray

    from apacs_ray.distributed.ray_internals import dataset_from_blocks
    from apacs_ray.distributed.tasks import configure_data, held_to_source, pool_worker

    configure_data()
    whole: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    tasks = {**whole, "num_cpus": 0.25, "compute": ray.data.TaskPoolStrategy(size=2)}
    actors = {**whole, "num_cpus": 0.5, "compute": ray.data.ActorPoolStrategy(size=1)}

    def run(count: int) -> float:
        blocks = [pa.table({"shard": [number]}) for number in range(count)]
        began = time.process_time()
        dataset = (
            dataset_from_blocks(blocks)
            .map_batches(held_to_source(lambda block: block), **tasks)
            .map_batches(pool_worker(lambda: lambda block: block), **actors)
            .map_batches(held_to_source(lambda block: block), **tasks)
        )
        require(sum(1 for _ in dataset.iter_rows()) == count, "a shard is lost")
        return time.process_time() - began

    few = run(max(1, shards // 8))  # with what it takes to begin
    seconds = max(0.0, run(shards) - few) / (shards - max(1, shards // 8))
    ray.shutdown()
    return seconds


def workload() -> Workload:
    """Return the work of all slides: tissue as one rectangle in the middle, of the slide's shape."""
    down, across = lattice_size(WIDTH, HEIGHT)
    wanted = np.zeros((down, across), bool)
    share = math.sqrt(TISSUE)
    high, wide = round(down * share), round(across * share)
    top, left = (down - high) // 2, (across - wide) // 2
    wanted[top : top + high, left : left + wide] = True
    cores = cores_of(WIDTH, HEIGHT, CORE, HALO, wanted)
    one = Workload.of_slide(cores, pixels=WIDTH * HEIGHT, size=SLIDE_BYTES, shards=0)
    return replace(one, shards=math.ceil(one.cores / cores_a_shard(CORE, HALO))).times(SLIDES)


def unit_costs(costs: dict[str, float], gpu: str) -> UnitCosts:
    """Return the costs with the networks on a GPU of a kind, MIRAX read."""
    mega = 1e6
    return UnitCosts(
        plan=PLAN_SECONDS,
        read=costs["read_mrxs_s_a_Mpx"] / mega,
        networks=flops_a_pixel() / GPUS[gpu],
        objects=costs["objects_s_a_Mpx"] / mega,
        files=costs["files_s_a_Mpx"] / mega,
        glass=costs["glass_s_a_Mpx"] / mega,
        driver=costs["driver_ms_a_shard"] / 1000,
        part_bytes=costs["part_bytes_a_Mpx"] / mega,
        file_bytes=costs["file_bytes_a_Mpx"] / mega,
        glass_bytes=costs["glass_bytes_a_Mpx"] / mega,
    )


def flops_a_pixel() -> float:
    """Return the floating-point operations of the members and the refined fusion for a px at width 1."""
    return sum(NETWORKS[name].gflops for name in (*MEMBERS, "fusion")) * 1e9 / 1e6


def machines(gpu: str, number: int) -> Machines:
    """Return the nodes for a number of GPUs; of the CPUs of a node the share that belongs to its GPUs."""
    nodes = math.ceil(number / GPUS_A_NODE[gpu])
    cpus = number * CPUS_A_NODE[gpu] / GPUS_A_NODE[gpu]
    copies = 1.0 + nodes  # of a slide: to the node that plans it, and to every node that reads some of it
    pool = plan_segment_pool(Cluster(cpus, number, nodes, cpus / nodes, cpus / number))
    return Machines(cpus, number, True, nodes, pool.tasks, pool.writers, copies, DISK[gpu], NETWORK[gpu])


def plan_rows(costs: dict[str, float], gpu: str) -> list[dict[str, Any]]:
    """Return a row for each number of GPUs: hours by resource, in all, and the first bottleneck."""
    work, each = workload(), unit_costs(costs, gpu)
    rows = []
    for number in NUMBERS:
        there = machines(gpu, number)
        busy = {load.resource: load.seconds / 3600 for load in loads(work, each, there)}
        planning = each.plan * SLIDES / min(there.cpus, SLIDES) / 3600
        rows.append(
            {
                "on": f"{number} {gpu}",
                "nodes": there.nodes,
                "plan": planning,
                **{name: busy[name] for name in BUSY},
                "in_all": wall_seconds(work, each, there) / 3600,
                "bottleneck": bottleneck(work, each, there),
            }
        )
    return rows


BUSY = (
    "GPUs",
    "CPUs",
    "tasks that read",
    "tasks that find objects",
    "tasks that write files",
    "disks",
    "network",
    "driver",
)


def section(costs: dict[str, float]) -> str:
    """Return the section of capacity.md that follows from the costs, in Markdown."""
    return "\n".join(
        [BEGIN, *_unit_lines(costs), "", *_hour_lines(costs), "", *_cpu_lines(costs), "", *_copy_lines(costs), END]
    )


def _unit_lines(costs: dict[str, float]) -> list[str]:
    one, l4 = workload().times(1 / SLIDES), unit_costs(costs, "L4")
    core, window = (pixels / one.cores / 1e6 for pixels in (one.core_pixels, one.window_pixels))
    seconds = core_seconds(one, l4)
    each = ", ".join(_s(NETWORKS[name].gflops * window / 1e3) for name in (*MEMBERS, "fusion"))
    ours = "`benchmarks/capacity.py`"
    rows = [
        ("tissue of a slide, its plan", f"{PLAN_SECONDS:.0f} s of a core", "`benchmarks/tissue.py`, MIRAX"),
        (
            "reading a core's window",
            f"{_s(costs['read_mrxs_s_a_Mpx'] * window)} s of a core (TIFF: {_s(costs['read_tif_s_a_Mpx'] * window)})",
            ours,
        ),
        ("FCN-32, -16, -8, fusion on it", f"{each} TFLOP", "counted"),
        *(
            (
                f"the same on one {gpu}, {speed / 1e12:.0f} TFLOP/s in bfloat16",
                f"{_s(flops_a_pixel() * window * 1e6 / speed)} s",
                SEEN[gpu],
            )
            for gpu, speed in GPUS.items()
        ),
        ("objects of a core", f"{_s(seconds['objects'] / one.cores)} s of a core", ours),
        ("its part", f"{_s(costs['part_bytes_a_Mpx'] * core / 1e6)} MB written, and read twice", ours),
        ("files of a slide", f"{_s(seconds['files'])} s of a core, one task", ours),
        ("the same, on scratch and in the store", f"{_s(bytes_written(one, l4) / 1e6)} MB", ours),
        ("a shard in the driver", f"{_s(costs['driver_ms_a_shard'])} ms of its CPU", ours),
        ("requests for the parts of a slide", f"{3 * one.shards:.0f} at least", "counted: a write, two reads a shard"),
    ]
    return [
        f"A slide has {one.cores:.0f} cores of {CORE} px. With the refined fusion's halo of {HALO} px a window has",
        f"{window:.1f} Mpx for {core:.1f} that are kept, {window / core:.2f} px seen for each. A core is a shard.",
        "",
        "| unit | cost | from |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _hour_lines(costs: dict[str, float]) -> list[str]:
    rows = [row for gpu in GPUS for row in plan_rows(costs, gpu)]
    return [
        "Hours that each resource is busy, were it alone. The plan comes before; the others are at work together, so",
        "the longest is what it takes.",
        "",
        f"| GPUs (nodes) | plan | {' | '.join(BUSY)} | in all | bottleneck |",
        "|---" * (len(BUSY) + 4) + "|",
        *(
            f"| {row['on']} ({row['nodes']}) | {_s(row['plan'])} | {' | '.join(_s(row[name]) for name in BUSY)} | "
            f"{_s(row['in_all'])} | {row['bottleneck']} |"
            for row in rows
        ),
        "",
        "`segment` gives a third of the CPUs beside the GPUs each to tasks that read, find objects and write",
        "the files of slides.",
    ]


def _cpu_lines(costs: dict[str, float]) -> list[str]:
    lines = [
        "CPUs that a GPU needs so that it never waits; planned are half as many again, as slides differ:",
        "",
        "| GPU | reading | objects | files | in all | planned |",
        "|---|---|---|---|---|---|",
    ]
    for gpu in GPUS:
        work, each = workload(), unit_costs(costs, gpu)
        seconds, on_gpu = core_seconds(work, each), each.networks * work.window_pixels
        shares = " | ".join(_s(seconds[step] / on_gpu) for step in ("read", "objects", "files"))
        lines.append(f"| {gpu} | {shares} | {_s(cpus_a_gpu(work, each))} | {planned_cpus(costs, gpu)} |")
    return lines


def planned_cpus(costs: dict[str, float], gpu: str) -> int:
    """Return the CPUs to have for each GPU of a kind."""
    return math.ceil(1.5 * cpus_a_gpu(workload(), unit_costs(costs, gpu)))


def _copy_lines(costs: dict[str, float]) -> list[str]:
    work, l4 = workload(), unit_costs(costs, "L4")
    few, many = machines("L4", 10), machines("L4", 100)
    moved = [_s(bytes_moved(work, l4, there) / 1e12) for there in (machines("L4", 1), few, many)]
    once = replace(many, copies=2.0)
    return [
        f"Slides are copied whole to every node that reads some of their cores: {moved[0]} TB come to one node,",
        f"{moved[1]} to {few.nodes}, {moved[2]} to {many.nodes}. If one node read each it would be",
        f"{_s(bytes_moved(work, l4, once) / 1e12)} TB on any number.",
    ]


def in_document(text: str, section_text: str) -> str:
    """Return capacity.md with its section replaced."""
    require(BEGIN in text and END in text, f"{DOCUMENT.name} has no place for the tables")
    return re.sub(rf"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: section_text, text, flags=re.S)


def _s(value: float) -> str:
    """A number with two digits that count, or none behind the point."""
    if value >= 100:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


if __name__ == "__main__":
    main()
