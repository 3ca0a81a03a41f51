"""Segmentation of one slide in this process, for the benchmarks of segmentation: as `segment` does, without Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from apacs_ray.config.settings import DataSettings, SegmentSettings, TilesSettings
from apacs_ray.data.grid import Box
from apacs_ray.data.images import Rgb
from apacs_ray.inference.cores import Core, cores_of
from apacs_ray.inference.model_files import find_models
from apacs_ray.inference.planning import Cutting, make_plan
from apacs_ray.inference.segment_steps import PlannedSlide, RunNetworks, SegmentTask, finish_shard, read_windows
from apacs_ray.inference.slide_plan import lattice_size
from apacs_ray.outputs.slide_files import MASK, Found, write_slide_files
from apacs_ray.slides.cache import SlideCache
from apacs_ray.slides.find import find_slides
from apacs_ray.slides.manifest import SlideTask, opened_slide
from apacs_ray.slides.slide_window import read_window
from apacs_ray.storage import LocalStore
from apacs_ray.testing.ensembles import Networks, write_networks

STEPS = ("read", "networks", "objects", "files")  # objects: with writing the part


class Segmenting:
    """A slide that is segmented by the refined fusion, in float32, every px of it; `found` is what was found."""

    def __init__(self, slide: Path, networks: Networks, output: Path, core: int, threads: int) -> None:
        """Write the networks, and plan the slide."""
        model = LocalStore(str(output / "model"))
        write_networks(model, networks)
        settings = SegmentSettings(tissue=False, core=core, threads=threads)
        models = find_models(model, settings)
        data = LocalStore(str(slide.parent))
        (files,) = find_slides(data.list()).slides
        store = LocalStore(str(output / "slides"))
        cache = SlideCache(output / "cache", 0)
        self._reading = SlideTask(data, None, store, TilesSettings(), DataSettings(), cache, "0" * 16)
        self._parts = f"{files.slide_id}/.parts"
        self.plan = make_plan(self._reading, files, None, Cutting(None, core, models.halo, 4, False), self._parts)
        self._task = SegmentTask(model, models.folders, store, settings)
        self._slide = PlannedSlide(files, self._reading, self.plan, self._parts)
        self._networks = RunNetworks(self._task)
        self.found = Found()

    def __call__(self) -> dict[str, float]:
        """Segment the slide.

        Returns:
            Seconds of each of `STEPS`.
        """
        seconds = dict.fromkeys(STEPS, 0.0)
        for shard in range(self.plan.shards):
            windows = read_windows(self._task, self._slide, 0, shard)
            (receipt,) = finish_shard(self._task, [self._slide], self._networks(windows)).to_pylist()
            for step in ("read", "networks", "objects"):
                seconds[step] += receipt[step]
        began = time.perf_counter()
        self.found = write_slide_files(self._task.output, self._parts, self.plan, self._task.settings, {})
        seconds["files"] = time.perf_counter() - began
        return seconds

    def pixels(self) -> Rgb:
        """Return the whole slide, (H, W, 3)."""
        with opened_slide(self._reading, self._slide.files) as slide:
            return read_window(slide, Box(0, 0, self.plan.width, self.plan.height), 1.0)

    def mask(self) -> npt.NDArray[np.bool_]:
        """Return the mask that was written, (H, W)."""
        import tifffile

        path = Path(self._task.output.uri_of(f"{self.plan.slide_id}/{MASK}"))
        return np.asarray(tifffile.imread(path, level=0)) > 0


def all_cores(width: int, height: int, core: int, halo: int) -> Iterator[tuple[Core, Box]]:
    """Yield every core of a slide and its window."""
    for one in cores_of(width, height, core, halo, np.ones(lattice_size(width, height), bool)):
        assert one.window is not None
        yield one, one.window


def part(rgb: Rgb, box: Box) -> Rgb:
    """Return a window of a slide in memory."""
    return rgb[box.y : box.y + box.height, box.x : box.x + box.width]


def ppm(mask: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> float:
    """Return how many px of a million differ."""
    return 1e6 * float((mask != other).mean())


def gaussian(side: int) -> npt.NDArray[np.float32]:
    """Return weights of a window, (side, side): sigma an eighth of its side, as MONAI's and nnU-Net's."""
    ramp = np.exp(-0.5 * ((np.arange(side) - (side - 1) / 2) / (side / 8)) ** 2)
    return np.maximum(np.outer(ramp, ramp), 1e-3).astype(np.float32)


def starts(length: int, window: int) -> list[int]:
    """Return where windows with half overlap begin; the last one ends with the slide."""
    last = max(length - window, 0)
    count = math.ceil(last / (window // 2)) + 1
    return [min(number * (window // 2), last) for number in range(count)]
