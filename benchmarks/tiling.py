"""Tiles per second of this pipeline on one slide, as TIFF and as MIRAX, against bare processes and a plain loop.

bare: decode and encode, as ours does, in 2 processes. floor: the same work as ours (decode, tissue, focus, encode,
Parquet) in 2 processes. pipeline: its shard tasks on Ray Data with 2 CPUs. plain: OpenSlide's Python interface and
Pillow in 2 processes. All processes are warm and take turns; ratios are medians over the repetitions, in each of which
both ways had a turn. CPU: ms a tile of the processes, without Ray's. `--against PATH`: the floor of this checkout and
of the one at PATH, by turns. `--profile`: where the floor spends its time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cutting import WORKERS, Cut  # noqa: E402
from measure import options, require, show  # noqa: E402

PROFILED = {  # functions of the package, and what they do
    "read_box": "read, to RGB",
    "measure": "tissue and focus",
    "encode_image": "encode",
    "write_table": "parquet",
    "write_slide_shard": "all",
}
TIMEOUT = 60.0  # s in which a worker ends


def main() -> None:
    """Measure every way on each slide format and print the table."""
    parser = options(__doc__ or "", "a slide of 8000 x 8000 px, 3 repetitions")
    parser.add_argument("--side", type=int, help="px, side of the slide (default: 20000)")
    parser.add_argument("--formats", default="tif,mrxs", help="of the slide")
    parser.add_argument("--repetitions", type=int, help="turns of each way (default: 5)")
    parser.add_argument("--against", type=Path, help="compare with the package of this checkout")
    parser.add_argument("--profile", action="store_true", help="ms a tile by what they are spent on")
    arguments = parser.parse_args()
    side = arguments.side or (1024 if arguments.smoke else 8000 if arguments.quick else 20_000)
    repetitions = arguments.repetitions or (1 if arguments.smoke else 3 if arguments.quick else 5)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments.formats.split(","):
            data = Path(folder) / kind
            data.mkdir()
            cut = Cut(str(data), str(Path(folder) / f"out-{kind}"), times=2)
            if arguments.smoke:
                cut = replace(cut, tile=256, shard=4)
            write_slide(data / f"slide.{kind}", side, min(side, 4000))
            plan = Plan(cut, arguments.against, arguments.against is None, arguments.profile, repetitions)
            if arguments.smoke:  # each part of the program once
                last = kind == arguments.formats.split(",")[-1]
                plan = replace(plan, against=None if last else ROOT, pipeline=last, profile=last)
            rows += _measure(kind, plan)
    show(f"cutting a slide of {side} px into tiles of {cut.tile} px, {repetitions} repetitions", rows, arguments.json)


def write_slide(path: Path, side: int, smear: int = 4000) -> None:
    """Write a smear of `smear` px, repeated a whole number of times, so that every tile of the grid is full."""
    import numpy as np
    import pyvips

    from apacs_ray.synthetic.mrxs import MrxsLayout, write_mrxs
    from apacs_ray.synthetic.slide import render, slide_specs

    rgb, _ = render(slide_specs(0, smear, smear, train=1, test=0)[0])
    times = side // smear
    if path.suffix == ".tif":
        image = pyvips.Image.new_from_array(rgb).copy(interpretation="srgb", xres=4000, yres=4000)
        image.replicate(times, times).tiffsave(
            str(path), tile=True, pyramid=True, compression="jpeg", Q=85, tile_width=256, tile_height=256, bigtiff=True
        )
        return
    wide = np.concatenate([rgb, rgb[:, :256]], axis=1)
    wide = np.concatenate([wide, wide[:256]])
    layout = MrxsLayout(smear * times, smear * times, 7, 0.25, image=256, quality=85)
    write_mrxs(path, layout, lambda x, y, w, h: wide[y % smear : y % smear + h, x % smear : x % smear + w])


@dataclass(frozen=True)
class Plan:
    """The measurements of a slide."""

    cut: Cut
    against: Path | None
    pipeline: bool
    profile: bool
    repetitions: int


@dataclass(frozen=True)
class Turn:
    """The result of a turn of all processes of a way: tiles, seconds, CPU seconds."""

    tiles: int
    seconds: float
    cpu: float

    @property
    def rate(self) -> float:
        """Tiles a second."""
        return self.tiles / self.seconds


class Workers:
    """Processes that cut the same slide by the package of a checkout, each its part of the shards."""

    def __init__(self, package: Path, cut: Cut, name: str, count: int = WORKERS) -> None:
        self._processes = [_worker(package, cut, f"{name}-{part}", part, count) for part in range(count)]
        descriptions = [self._answer(process) for process in self._processes]
        for description in descriptions:
            imported = description["package"]
            require(Path(imported).is_relative_to(package), f"{imported} is not of {package}")
        self.tiles, self.inspect_s = descriptions[0]["tiles"], descriptions[0]["inspect_s"]

    def turn(self, way: str) -> Turn:
        """Tile the slide once in a way, in all processes."""
        answers = self._ask(way)
        tiles = sum(answer["tiles"] for answer in answers)
        require(tiles == self.tiles, f"{way}: {tiles} of {self.tiles} tiles were cut")
        return Turn(tiles, max(answer["seconds"] for answer in answers), sum(answer["cpu"] for answer in answers))

    def profile(self, way: str) -> dict[str, Any]:
        """Profile a turn of the first process, while the others do the same."""
        return self._ask(way, profile=True)[0]

    def end(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.communicate(timeout=TIMEOUT)  # closes its input

    def _ask(self, way: str, profile: bool = False) -> list[dict[str, Any]]:
        for process in self._processes:
            print(json.dumps({"way": way, "profile": profile}), file=process.stdin, flush=True)
        return [self._answer(process) for process in self._processes]

    def _answer(self, process: subprocess.Popen[str]) -> Any:
        assert process.stdout is not None
        line = process.stdout.readline()
        require(line, "a worker process failed; it said why above")
        return json.loads(line)


def _worker(package: Path, cut: Cut, name: str, part: int, of: int) -> subprocess.Popen[str]:
    order = {"cut": asdict(replace(cut, output=f"{cut.output}/{name}")), "part": part, "of": of}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks/cutting.py"), json.dumps(order)],
        env={**os.environ, "PYTHONPATH": str(package)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _measure(kind: str, plan: Plan) -> list[dict[str, Any]]:
    ours = Workers(ROOT, plan.cut, "ours")
    ways = {"floor": (ours, "floor"), "plain": (ours, "plain"), "bare": (ours, "bare")}
    if plan.pipeline:
        ways["pipeline"] = (Workers(ROOT, plan.cut, "pipeline", count=1), "pipeline")
    if plan.against:
        ways["against"] = (Workers(plan.against.resolve(), plan.cut, "against"), "floor")
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    for repetition in range(-1, plan.repetitions):  # the first warms up
        for name in ways if repetition % 2 else reversed(ways):
            workers, way = ways[name]
            turn = workers.turn(way)
            if repetition >= 0:
                turns[name].append(turn)
    if plan.profile:
        _profile(kind, ours)
        if plan.against:
            _profile(f"{kind}, {plan.against}", ways["against"][0])
    for workers in {id(workers): workers for workers, _ in ways.values()}.values():
        workers.end()
    return [
        {
            "slide": kind,
            "way": f"floor of {plan.against}" if name == "against" else name,
            "tiles_per_s": statistics.median(turn.rate for turn in done),
            **{f"to_{other}": _ratio(done, turns[other]) for other in ("floor", "plain", "against") if other in turns},
            **(_by_cpu(done, turns) if name != "pipeline" else {}),
            **({"inspect_s": ours.inspect_s} if name == "floor" else {}),
        }
        for name, done in turns.items()
    ]


def _ratio(turns: Sequence[Turn], others: Sequence[Turn]) -> float:
    """Return the median ratio of the rates: above 1 is faster."""
    return statistics.median(turn.rate / other.rate for turn, other in zip(turns, others, strict=True))


def _by_cpu(done: Sequence[Turn], turns: Mapping[str, Sequence[Turn]]) -> dict[str, float]:
    """Return the same by CPU time, which depends less on what else the machine does."""
    of = {name: statistics.median(turn.cpu / turn.tiles for turn in turns[name]) for name in turns}
    own = statistics.median(turn.cpu / turn.tiles for turn in done)
    return {"cpu_ms_a_tile": 1000 * own} | {
        f"cpu_to_{other}": of[other] / own for other in ("plain", "against") if other in turns
    }


def _profile(title: str, workers: Workers) -> None:
    """Print where the CPU time of a tile goes."""
    floor, plain = workers.profile("floor"), workers.profile("plain")
    parts = {label: floor["within"][name] for name, label in PROFILED.items() if name in floor["within"]}
    require("all" in parts, f"write_slide_shard was not seen among {sorted(floor['within'])}")
    if title.startswith("mrxs"):
        decoding = workers.profile("decoding")
        alone = 1000 * decoding["cpu"] / decoding["tiles"]
        parts |= {"OpenSlide's C call": alone, "to RGB": parts.get("read, to RGB", alone) - alone}
    parts["plain loop, all"] = 1000 * plain["cpu"] / plain["tiles"]
    show(f"{title}: CPU, ms a tile", [{"part": label, "ms": value} for label, value in parts.items()], None)
    for name, profile in (("floor", floor), ("plain loop", plain)):
        rows = [{"function": function, "ms": value} for function, value in profile["own"].items()]
        show(f"{title}: {name}, without what a function calls", rows, None)


if __name__ == "__main__":
    main()
