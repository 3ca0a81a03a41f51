"""Segmentation of a slide: seconds by step, against its networks alone and against windows that are blended.

One process without Ray, freed memory kept, float32, random networks with the refined fusion, a synthetic smear
repeated to the slide's size; every px is segmented. *ours* does all: read, networks, objects, parts, files. The others
do less: they begin with the whole slide in memory and end with its mask. *networks alone*: the windows of our cores.
*blended*: windows of the same size with half overlap, their probabilities weighted by a Gaussian and divided by the
weights; a plain loop, and MONAI's `SlidingWindowInferer` where it is installed. All have the same networks
(`Predictor`). With `--part PX` only the slide's upper left part of so many px is blended, and seconds are multiplied by
how many more windows the whole slide has: each costs the same. `differ_ppm`: px of a million of a smaller slide whose
mask is not that of the slide seen as a whole.
Targets: less than 35 % outside the networks at width 0.125, and twice as fast as blending.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from measure import options, require, show
from segmenting import STEPS, Segmenting, all_cores, gaussian, part, ppm, starts
from tiling import write_slide

from apacs_ray.distributed.tasks import KEEP_MEMORY
from apacs_ray.inference.predictor import Predictor
from apacs_ray.models.ensemble import Ensemble
from apacs_ray.models.registry import MEMBERS
from apacs_ray.synthetic.slide import render, slide_specs
from apacs_ray.testing.ensembles import Networks, random_networks

UNCLEAR = 1e-4  # from the threshold, probabilities that sums of floats in another order may move across it


@dataclass(frozen=True)
class Case:
    """A slide of `side` px, a multiple of `smear`, in cores of `core` px, by networks of `width`.

    Attributes:
        compared: px, side of the slide on which masks are compared, in cores of `compared_core`; 0: they are not.
    """

    width: float
    side: int
    smear: int
    core: int
    compared: int
    compared_core: int


FULL = [Case(0.125, 20_000, 4000, 4096, 2048, 512), Case(1.0, 4096, 4096, 2048, 2048, 512)]
QUICK = [Case(0.125, 4096, 4096, 2048, 2048, 512), Case(1.0, 2048, 2048, 1024, 0, 0)]
SMOKE = [Case(0.01, 192, 192, 96, 160, 32)]


def main() -> None:
    """Measure every way and print the tables."""
    parser = options(__doc__ or "", "slides of 4096 and 2048 px")
    parser.add_argument("--width", type=float, help="the case of this width only")
    parser.add_argument("--side", type=int, help="px, side of the slide, a multiple of 2048")
    parser.add_argument("--core", type=int, help="px, side of a core")
    parser.add_argument("--part", type=int, help="px, side of what is blended of the slide (default: all of it)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1, as segment.threads)")
    arguments = parser.parse_args()
    memory = KEEP_MEMORY["env_vars"]
    if not arguments.smoke and not memory.items() <= os.environ.items():  # it counts from a process's beginning
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | memory)
    cases = SMOKE if arguments.smoke else QUICK if arguments.quick else FULL
    rows: list[dict[str, Any]] = []
    for case in cases:
        if arguments.width not in (None, case.width):
            continue
        if arguments.side:
            case = replace(case, side=arguments.side, smear=2048)
        if arguments.core:
            case = replace(case, core=arguments.core)
        rows += _measure(case, arguments.part or case.side, arguments.threads)
    show("segmentation of a slide", rows, arguments.json)


def _measure(case: Case, side: int, threads: int) -> list[dict[str, Any]]:
    picture, _ = render(slide_specs(1, min(640, case.smear), min(640, case.smear), train=1, test=0)[0])
    networks = random_networks(picture, width=case.width)
    with tempfile.TemporaryDirectory() as folder:
        differ = _differences(case, networks, Path(folder, "compared"), threads)
        work = _segmenting(case.side, case.smear, case.core, networks, Path(folder, "slide"), threads)
        rgb, ways = work.pixels(), Ways(networks, work, threads)
        clock, cpu = time.perf_counter(), time.process_time()
        steps = work()
        ours = {"s": time.perf_counter() - clock, "CPU_s": time.process_time() - cpu}
        print(f"ours: {ours['s']:.0f} s, {ours['CPU_s']:.0f} s of CPU", flush=True)
        timed = {}
        for name, way in ways.all().items():
            if way is not None:
                blends = name in Ways.BLENDED
                seconds = _timed(lambda way=way, here=rgb[:side, :side] if blends else rgb: way(here))
                times = ways.windows(case.side) / ways.windows(side) if blends else 1.0
                timed[name] = {unit: value * times for unit, value in seconds.items()} | {"scaled": times}
                print(f"{name}: {seconds['s']:.0f} s, {seconds['CPU_s']:.0f} s of CPU, x {times:.4g}", flush=True)
    outside = sum(steps[step] for step in STEPS if step != "networks")
    what = {"width": case.width, "side": case.side, "core": case.core}
    rows = [
        {
            "way": "ours",
            **what,
            **ours,
            **{f"{step}_s": steps[step] for step in STEPS},
            "objects": work.found.objects,
            "outside": outside / sum(steps.values()),
            "differ_ppm": differ.get("ours"),
        }
    ]
    for name in ways.all():
        row = {"way": name, **what, "differ_ppm": differ.get(name)}
        if name in timed:
            to_ours = {"to_ours": timed[name]["s"] / ours["s"], "CPU_to_ours": timed[name]["CPU_s"] / ours["CPU_s"]}
            rows.append({**row, **timed[name], **to_ours})
        else:
            rows.append({**row, "s": "not installed"})
    return rows


def _segmenting(side: int, smear: int, core: int, networks: Networks, folder: Path, threads: int) -> Segmenting:
    (folder / "data").mkdir(parents=True)
    write_slide(folder / "data/slide.tif", side, smear)
    return Segmenting(folder / "data/slide.tif", networks, folder, core, threads)


def _differences(case: Case, networks: Networks, folder: Path, threads: int) -> dict[str, float]:
    """Return for each way how many px of a million are not as the networks say that see the whole slide."""
    if not case.compared:
        return {}
    work = _segmenting(case.compared, case.compared, case.compared_core, networks, folder, threads)
    work()
    rgb, ways = work.pixels(), Ways(networks, work, threads)
    probability = ways.probability(rgb)
    whole = probability >= 0.5
    require(0.05 < whole.mean() < 0.95, f"the mask of the whole is {whole.mean():.0%} cell; nothing would be compared")
    mask = work.mask()
    wrong = int(((mask != whole) & (np.abs(probability - 0.5) > UNCLEAR)).sum())
    require(not wrong, f"{wrong} px of our mask are not those of the whole")
    return {"ours": ppm(mask, whole)} | {name: ppm(way(rgb), whole) for name, way in ways.all().items() if way}


def _timed(work: Callable[[], object]) -> dict[str, float]:
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return {"s": time.perf_counter() - clock, "CPU_s": time.process_time() - cpu}


class Ways:
    """Other ways to the mask (H, W) of a slide in memory, (H, W, 3) uint8."""

    BLENDED = ("blended, plain loop", "blended, MONAI")

    def __init__(self, networks: Networks, work: Segmenting, threads: int) -> None:
        members = {name: networks[name][1] for name in MEMBERS}
        ensemble = Ensemble(members, {"fusion": networks["fusion"]})
        self._predictor = Predictor(ensemble, threads=threads, precision="float32")
        self._core, self._halo = work.plan.core, work.plan.halo
        self._window = min(self._core + 2 * self._halo, work.plan.width, work.plan.height)

    def all(self) -> dict[str, Callable[[np.ndarray], np.ndarray] | None]:
        """Return them by name; None where it cannot be done here."""
        monai = importlib.util.find_spec("monai")
        return {
            "networks alone": self.alone,
            **dict(zip(self.BLENDED, (self.blended, self.monai if monai else None), strict=True)),
        }

    def windows(self, side: int) -> int:
        """Return how many windows a part of `side` x `side` px has that are blended."""
        require(side >= self._window, f"--part {side}: less than a window of {self._window} px")
        return len(starts(side, self._window)) ** 2

    @torch.inference_mode()
    def probability(self, rgb: np.ndarray) -> np.ndarray:
        """Return probabilities (H, W) float32 of the fusion."""
        logits = self._predictor.batch(self._predictor.to_device([rgb]))["fusion"][0]
        return torch.sigmoid(logits).cpu().numpy()

    def alone(self, rgb: np.ndarray) -> np.ndarray:
        """Return the mask of cores behind their halos."""
        mask = np.empty(rgb.shape[:2], bool)
        for core, window in all_cores(*rgb.shape[1::-1], self._core, self._halo):
            x, y, box = core.box.x - window.x, core.box.y - window.y, core.box
            found = self.probability(part(rgb, window))[y : y + box.height, x : x + box.width]
            mask[box.y : box.y + box.height, box.x : box.x + box.width] = found >= 0.5
        return mask

    def blended(self, rgb: np.ndarray) -> np.ndarray:
        """Return the mask of the weighted mean over windows, as a textbook writes it."""
        side, weights = self._window, gaussian(self._window)
        total, weight = (np.zeros(rgb.shape[:2], np.float32) for _ in range(2))
        for y in starts(rgb.shape[0], side):
            for x in starts(rgb.shape[1], side):
                place = np.s_[y : y + side, x : x + side]
                total[place] += weights * self.probability(rgb[place])
                weight[place] += weights
        return total >= 0.5 * weight

    def monai(self, rgb: np.ndarray) -> np.ndarray:
        """Return the mask that MONAI blends."""
        from monai.inferers import SlidingWindowInferer

        def network(windows: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(self._predictor.batch(windows)["fusion"])[:, None]

        inferer = SlidingWindowInferer(self._window, sw_batch_size=1, overlap=0.5, mode="gaussian")
        with torch.inference_mode():
            found = inferer(self._predictor.to_device([rgb]).float(), network)
        return found[0, 0].cpu().numpy() >= 0.5


if __name__ == "__main__":
    main()
