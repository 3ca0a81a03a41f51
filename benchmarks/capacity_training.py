"""What 1 000 slides, 713 000 tiles, take from cutting to evaluation, by measured unit costs: `cluster/capacity.md`.

The costs stand in `cluster/training.json`, each with what measured it; FLOPs are counted here. Who trains where is
asked of the functions that plan runs. `--tables` writes the tables into `cluster/capacity.md`.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from measure import options, require, show
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from apacs_ray.config.settings import Settings
from apacs_ray.config.sweep import read_sweep
from apacs_ray.distributed.resource_plan import BETWEEN_NODES, Nodes, TrainingPlan, cluster_of, plan_training
from apacs_ray.distributed.trial_plan import plan_sweep
from apacs_ray.estimate.lines import Seconds, Tiles, sweep
from apacs_ray.models.fusion import build_fusion
from apacs_ray.models.registry import MEMBERS, build_member
from apacs_ray.report.summary import NAMES

ROOT = Path(__file__).resolve().parent.parent
FILE, DOCUMENT = ROOT / "cluster/training.json", ROOT / "cluster/capacity.md"
BEGIN, END = "<!-- by benchmarks/capacity_training.py -->", "<!-- end of training -->"
SLIDES, TILES, SIDE, SLIDE_GB = 1000, 713_000, 2000, 5
SPLITS = {"train": 0.8, "val": 0.1, "test": 0.1}  # of the tiles
CPU_NODE = {"cpus": 32, "disk_GB_s": 0.5, "network_GB_s": 12.5 / 8}  # as in aws.yaml
CPU_NODES, CUT_COPIES = (1, 10, 100), 2  # a slide is fetched by who finds its tissue and by who cuts it
GRADIENT_GB = 0.537  # of each member, float32


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU and of node: `links` is GB/s between GPUs of a node, assumed; `speed` against an H100, assumed."""

    name: str
    on_node: int
    cpus: int
    speed: float
    links: float


# an L4: 30 TFLOP/s where the H100 of machine H trains FCN-8 at 290
KINDS = (Gpu("L4", 4, 48, 30 / 290, 8.0), Gpu("H100", 8, 192, 1.0, 200.0))
SWEEP_GPUS = (1, 4, 40)
PLANNED, PLANNED_BATCH = (1, 2, 4, 8, 16), 4
RUNS = ((4, 4), (40, 4), (40, 16), (400, 4), (400, 64))  # GPUs and tiles a batch


def main() -> None:
    """Print the plan, and write it into the document."""
    parser = options(__doc__ or "", "the same")
    parser.add_argument("--tables", action="store_true", help="write the tables into capacity.md")
    arguments = parser.parse_args()
    costs = read_costs()
    rows = [stage_row(costs, kind, gpus, batch) for kind in KINDS for gpus, batch in RUNS]
    show(f"{SLIDES} slides, {TILES} tiles", rows, arguments.json)
    if arguments.tables:
        DOCUMENT.write_text(in_document(DOCUMENT.read_text(), section(costs)))


def read_costs(what: str = "value") -> dict[str, Any]:
    """Return the unit costs, by name; `before`: what they were, of those that have it."""
    return {name: cost[what] for name, cost in json.loads(FILE.read_text()).items() if what in cost}


@functools.cache
def tflops(side: int) -> dict[str, float]:
    """Count 10^12 floating-point operations of a forward pass of each network on a tile of `side` px.

    The margin of 100 px that networks put around a tile does not grow with it, so 2000 px are less than four times
    1000 px.
    """
    counted = {}
    with FakeTensorMode(), torch.no_grad():
        for name in (*MEMBERS, "fusion"):
            network = build_fusion("refined", MEMBERS, width=1.0) if name == "fusion" else build_member(name, width=1.0)
            channels = 3 + len(MEMBERS) if name == "fusion" else 3
            with FlopCounterMode(display=False) as counter:
                network.eval()(torch.empty(1, channels, side, side))
            counted[name] = counter.get_total_flops() / 1e12
    return counted


def plan(kind: Gpu, gpus: int, batch: int) -> TrainingPlan:
    """Return who trains where on so many GPUs."""
    return plan_training(MEMBERS, cluster_of([nodes_of(kind, gpus)], []), batch_size=batch)


def nodes_of(kind: Gpu, gpus: int) -> Nodes:
    """Return the nodes of so many GPUs; of a part of one its CPUs in proportion."""
    on_node = min(gpus, kind.on_node)
    return Nodes(kind.cpus * on_node / kind.on_node, on_node, math.ceil(gpus / on_node))


def epoch_minutes(costs: dict[str, Any], kind: Gpu, gpus: int, batch: int) -> float:
    """Return the minutes of an epoch of the slowest member, less validation."""
    networks, longest = plan(kind, gpus, batch).networks, 0.0
    beside = batch * costs["H100_train_ms"]["fcn32"] / 1000 / kind.speed  # on the side of a worker of another
    for network in networks:
        count = network.workers
        sums = GRADIENT_GB * 2 * (count - 1) / count / kind.links * (BETWEEN_NODES if count > kind.on_node else 1)
        step = math.ceil(batch / count) * costs["H100_train_ms"][network.name] / 1000 / kind.speed
        step += beside if 0.5 < network.gpus < 1 else 0.0
        longest = max(longest, SPLITS["train"] * TILES / batch * (step + sums))
    return longest / 60


def predict_minutes(costs: dict[str, Any], kind: Gpu, gpus: int, stage: str) -> tuple[float, str]:
    """Return the minutes of heatmaps or evaluation, and what is short: GPUs or their CPUs."""
    share = SPLITS["test"] if stage == "evaluate" else SPLITS["train"] + SPLITS["val"]
    on_gpu = costs["H100_predict_ms"][stage] / 1000 / kind.speed
    on_cpu = costs[f"{stage}_cpu_s_a_tile"] * kind.on_node / kind.cpus
    return share * TILES * max(on_gpu, on_cpu) / gpus / 60, "GPUs" if on_gpu >= on_cpu else "CPUs"


def stage_row(costs: dict[str, Any], kind: Gpu, gpus: int, batch: int) -> dict[str, Any]:
    """Return the minutes of each stage on a cluster."""
    heatmaps, short = predict_minutes(costs, kind, gpus, "heatmaps")
    evaluate, short_too = predict_minutes(costs, kind, gpus, "evaluate")
    networks = plan(kind, gpus, batch).networks
    return {
        "on": f"{gpus} {kind.name} ({math.ceil(gpus / kind.on_node)})",
        "batch": batch,
        "workers": " + ".join(str(network.workers) for network in networks),
        "over": next((network.backend.upper() for network in networks if network.backend), "-"),
        "epoch": epoch_minutes(costs, kind, gpus, batch),
        "heatmaps": heatmaps,
        "evaluate": evaluate,
        "short": " and ".join(sorted({short, short_too})),
    }


def sweep_row(costs: dict[str, Any], kind: Gpu, gpus: int) -> dict[str, Any]:
    """Return the hours of the full sweep on a cluster, where trials see all tiles, or those of `tune.tiles`."""
    file = read_sweep(Settings().tune.config)
    each, at_once = plan_sweep(file, cluster_of([nodes_of(kind, gpus)], []), Settings().fusion.batch_size)
    # of FCN-32's figure, by FLOPs: that of the fusion was not measured
    second = costs["H100_train_ms"]["fcn32"] / 1000 / kind.speed / tflops(Settings().members.crop)["fcn32"]
    learn, whole = tflops(Settings().fusion.crop)["fusion"], tflops(SIDE)["fusion"]
    seconds = Seconds(second * learn, second * whole / 3, costs["sample_cpu_s_a_tile"])
    tiles = Tiles(*(round(share * TILES) for share in SPLITS.values()), 0.0)
    walls = [
        sweep(file, seen, seconds, concurrency=at_once, network=each).wall / 3600
        for seen in (tiles, tiles.at_most(Settings().tune.most))
    ]
    return {
        "on": f"{gpus} {kind.name} ({math.ceil(gpus / kind.on_node)})",
        "at_once": at_once,
        "cpus": each.cpus,
        "all": walls[0],
        "drawn": walls[1],
    }


def section(costs: dict[str, Any]) -> str:
    """Return the section of capacity.md that follows from the costs, in Markdown."""
    parts = [
        _unit_lines(costs),
        _tiling_lines(costs),
        _plan_lines(),
        _network_lines(costs),
        _sweep_lines(costs),
        _driver_lines(costs),
    ]
    return "\n".join([BEGIN, *("\n".join([*lines, ""]) for lines in parts), END])


def _unit_lines(costs: dict[str, Any]) -> list[str]:
    rows = []
    for name, cost in json.loads(FILE.read_text()).items():
        value = costs[name]
        shown = ", ".join(f"{key} {_s(one)}" for key, one in value.items()) if isinstance(value, dict) else f"{value:g}"
        rows.append(f"| {cost['what']} | {shown} {cost['unit']} | {cost['from']} |")
    whole, crop = tflops(SIDE), tflops(Settings().members.crop)
    members, learned = (sum(counted[name] for name in MEMBERS) for counted in (whole, crop))
    each = ", ".join(_s(value) for value in whole.values())
    return [
        "| unit | cost | from |",
        "|---|---|---|",
        *rows,
        f"| FCN-32, -16, -8, fusion on a tile | {each} TFLOP | counted |",
        f"| members on a tile, with the fusion; learning from a crop of {Settings().members.crop} px | "
        f"{_s(members, 3)}, {_s(members + whole['fusion'], 3)}; {_s(3 * learned, 3)} TFLOP | counted |",
        f"| an L4 against that H100 | {KINDS[0].speed:.2f} | **assumed**: 30 TFLOP/s against 290 |",
        "| gradients of a member between GPUs of a node | "
        + ", ".join(f"{kind.name} {kind.links:g} GB/s" for kind in KINDS)
        + f"; between nodes {BETWEEN_NODES:g} times as long | **assumed** |",
    ]


def _tiling_lines(costs: dict[str, Any]) -> list[str]:
    written = TILES * costs["tile_MB"] / 1e6
    cores = SLIDES * costs["tissue_s_a_slide"] + TILES * costs["cut_s_a_tile"]
    fetched, driver = CUT_COPIES * SLIDES * SLIDE_GB, CUT_COPIES * SLIDES * costs["task_ms"] / 1000
    lines = [
        f"## Tiling ({_s(SLIDES)} slides, {_s(TILES)} tiles, {written:.1f} TB written)",
        "",
        "| CPU nodes | tissue and cutting, s | disks, s | network, s | driver, s | so, min | bottleneck |",
        "|---|---|---|---|---|---|---|",
    ]
    for nodes in CPU_NODES:
        busy = {
            "CPUs": max(cores / nodes / CPU_NODE["cpus"], cores / SLIDES),  # a core a slide at the least
            "disks": fetched / nodes / CPU_NODE["disk_GB_s"],
            "network": (fetched + 1000 * written) / nodes / CPU_NODE["network_GB_s"],
            "driver": driver,
        }
        most = max(busy, key=lambda name: busy[name])
        shown = " | ".join(_s(seconds) for seconds in busy.values())
        lines.append(f"| {nodes} | {shown} | {_s(busy[most] / 60)} | {most} |")
    return lines


def _plan_lines() -> list[str]:
    shown = " | ".join(f"{NAMES[name]} (data tasks)" for name in MEMBERS)
    lines = [
        "## Who trains where",
        "",
        f"Members of a run with batches of {PLANNED_BATCH}: workers x what each has. `tests/test_gpu_plans.py` places",
        "these and others with a scheduler of its own, on poor and rich nodes, and with heads with and without CPUs.",
        "",
        f"| GPUs (nodes) | CPUs of a node | how | {shown} |",
        "|---" * (len(MEMBERS) + 3) + "|",
    ]
    for kind in KINDS:
        for gpus in PLANNED:
            nodes = nodes_of(kind, gpus)
            planned = plan_training(MEMBERS, cluster_of([nodes], []), batch_size=PLANNED_BATCH, mode="auto")
            cells = [f"{network.ask()} ({network.data_tasks})" for network in planned.networks]
            cells += ["the same worker"] * (len(MEMBERS) - len(cells))
            on = f"{gpus} {kind.name} ({nodes.count})"
            lines.append(f"| {on} | {nodes.cpus:g} | {planned.mode} | {' | '.join(cells)} |")
    return lines


def _network_lines(costs: dict[str, Any]) -> list[str]:
    rows = [stage_row(costs, kind, gpus, batch) for kind in KINDS for gpus, batch in RUNS]
    return [
        "## Networks",
        "",
        f"Minutes of an epoch of the members ({_s(SPLITS['train'] * TILES)} tiles, the slowest member), of heatmaps",
        "of training and validation tiles, and of the evaluation of test tiles (a tenth). Reading is not counted.",
        "",
        "| GPUs (nodes) | batch | FCN-32 + -16 + -8 wide | gradients | epoch | heatmaps | evaluation | short there |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {row['on']} | {row['batch']} | {row['workers']} | {row['over']} | {_s(row['epoch'])} | "
            f"{_s(row['heatmaps'])} | {_s(row['evaluate'])} | {row['short']} |"
            for row in rows
        ),
    ]


def _sweep_lines(costs: dict[str, Any]) -> list[str]:
    rows = [sweep_row(costs, kind, gpus) for kind in KINDS for gpus in SWEEP_GPUS]
    most = Settings().tune.most
    return [
        f"## Sweep (`{Settings().tune.config}`)",
        "",
        f"Hours by the arithmetic of `--estimate`: trials see all tiles, or {_s(most['train'])} train and",
        f"{most['val']} val tiles, the default of `tune.tiles`. The fusion's steps are assumed to take FCN-32's time,",
        "by FLOPs.",
        "",
        "| GPUs (nodes) | trials at a time | CPUs of each | all tiles | `tune.tiles` |",
        "|---|---|---|---|---|",
        *(
            f"| {row['on']} | {row['at_once']} | {row['cpus']:g} | {_s(row['all'])} | {_s(row['drawn'])} |"
            for row in rows
        ),
    ]


def _driver_lines(costs: dict[str, Any]) -> list[str]:
    shards = math.ceil(TILES / Settings().tiles.shard)
    counts = SPLITS["test"] * TILES * costs["counts_B_a_tile"]
    mega = [
        ("index, in the store", TILES * costs["index_file_B_a_tile"]),
        ("the same in the footers of shards", TILES * costs["index_footer_B_a_tile"]),
        ("the same in the driver, and in each worker", TILES * costs["index_memory_B_a_tile"]),
        ("the same, sent to each worker", TILES * costs["index_sent_B_a_tile"]),
        ("counts of the test tiles in the driver", counts),
        ("the same if all were test tiles", TILES * costs["counts_B_a_tile"]),
    ]
    passes = 4  # read by training, heatmaps, the fusion, evaluation
    reads, tested = SPLITS["train"] * TILES, SPLITS["test"] * shards
    learned = (SPLITS["train"] + SPLITS["val"]) * shards
    before = read_costs("before")
    return [
        f"## Driver and store, at any number of GPUs ({_s(shards)} shards)",
        "",
        "| what | MB |",
        "|---|---|",
        *(f"| {name} | {_s(value / 1e6)} |" for name, value in mega),
        "",
        "| requests | now | before |",
        "|---|---|---|",
        f"| the index, if each of {passes} stages reads all splits | "
        f"{_s(passes * len(SPLITS) * costs['index_requests'])} | {_s(passes * before['index_requests'] * shards)} |",
        f"| an epoch of one member, at most | {_s(costs['read_requests'] * reads)} | "
        f"{_s(before['read_requests'] * reads)} |",
        f"| heatmaps of train and val tiles | {_s(costs['heatmaps_requests'] * learned)} | "
        f"{_s(before['heatmaps_requests'] * learned)} |",
        f"| where the fusion starts | {_s(costs['start_requests'] * SPLITS['val'] * shards)} | "
        f"{_s(before['start_requests'] * SPLITS['val'] * shards)} |",
        f"| evaluation of the test tiles | {_s(costs['evaluate_requests'] * tested)} | "
        f"{_s(before['evaluate_requests'] * tested)} |",
    ]


def in_document(text: str, section_text: str) -> str:
    """Return capacity.md with its section replaced."""
    require(BEGIN in text and END in text, f"{DOCUMENT.name} has no place for the tables")
    return re.sub(rf"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: section_text, text, flags=re.S)


def _s(value: float, digits: int = 2) -> str:
    """A number with so many digits that count, or none behind the point, and spaces between thousands."""
    if value >= 100:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.{digits}g}" if value < 10 else f"{value:.0f}"


if __name__ == "__main__":
    main()
