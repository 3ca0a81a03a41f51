"""Small ensembles with weights that find something, and a slide's segmentation in this process, step by step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from scipy import ndimage
from support.slide_files import picture

from apacs_ray.config.settings import DataSettings, SegmentSettings, TilesSettings
from apacs_ray.data.grid import Box
from apacs_ray.data.images import Rgb
from apacs_ray.evaluation.objects import components
from apacs_ray.inference.cores import spread
from apacs_ray.inference.model_files import find_models
from apacs_ray.inference.objects import STEPS
from apacs_ray.inference.planning import Cutting, make_plan
from apacs_ray.inference.predictor import Predictor
from apacs_ray.inference.segment_steps import PlannedSlide, RunNetworks, SegmentTask, finish_shard, read_windows
from apacs_ray.inference.segmenter import Segmented, Segmenter
from apacs_ray.inference.slide_plan import read_cells
from apacs_ray.models.spec import Head
from apacs_ray.outputs.slide_files import MASK, write_slide_files
from apacs_ray.slides.cache import SlideCache
from apacs_ray.slides.manifest import SlideTask, opened_slide
from apacs_ray.slides.slide_files import SlideFiles
from apacs_ray.slides.slide_window import read_window
from apacs_ray.storage import Entry, LocalStore
from apacs_ray.testing.ensembles import random_networks, write_networks

WIDTH = 0.02


def write_ensemble(
    folder: Path, head: Head = "refined", seed: int = 0, mpp: float | None = None, views: int = 1
) -> LocalStore:
    """Random networks, each with a bias by which about half of a picture is cell."""
    store = LocalStore(str(folder))
    write_networks(store, random_networks(picture(640, 640), width=WIDTH, head=head, seed=seed, mpp=mpp, views=views))
    return store


def slide_of(path: Path) -> SlideFiles:
    """The slide in a file, with its companions in a folder of the same name."""
    files = [path, *sorted((path.parent / path.stem).glob("*"))]
    entries = tuple(
        Entry(str(file.relative_to(path.parent)), file.stat().st_size, str(file.stat().st_mtime_ns)) for file in files
    )
    return SlideFiles(path.stem, path.stem, None, entries, path.stem)


class OneSlide:
    """The segmentation of one slide in this process: planned, then shard by shard, then its files."""

    def __init__(
        self, path: Path, model: LocalStore, output: Path, settings: SegmentSettings, cores_a_shard: int = 3
    ) -> None:
        self.models = find_models(model, settings)
        self.output = LocalStore(str(output))
        cache = SlideCache(output.parent / "cache", 0)
        self.files = slide_of(path)
        self.reading = SlideTask(
            LocalStore(str(path.parent)), None, self.output, TilesSettings(), DataSettings(), cache, "0" * 16
        )
        halo = self.models.halo if settings.halo is None else settings.halo
        cutting = Cutting(settings.mpp or self.models.mpp, settings.core or 512, halo, cores_a_shard, settings.tissue)
        self.parts = f"{self.files.slide_id}/.parts"
        self.plan = make_plan(self.reading, self.files, None, cutting, self.parts)
        self.task = SegmentTask(model, self.models.folders, self.output, settings)
        self.planned = PlannedSlide(self.files, self.reading, self.plan, self.parts)

    def shard(self, number: int) -> None:
        """Make a shard of cores."""
        windows = read_windows(self.task, self.planned, 0, number)
        finish_shard(self.task, [self.planned], RunNetworks(self.task)(windows))

    def run(self) -> Path:
        """Do all, and return the folder of the slide's files."""
        for number in range(self.plan.shards):
            self.shard(number)
        write_slide_files(self.output, self.parts, self.plan, self.task.settings, {})
        return Path(self.output.root) / self.plan.slide_id

    def mask(self) -> np.ndarray:
        """The mask of the files, (H, W) bool."""
        return np.asarray(tifffile.imread(self.run() / MASK, level=0)) > 0

    def seen_as_a_whole(self) -> Segmented:
        """What the networks say of the whole slide at once."""
        box = Box(0, 0, self.plan.width, self.plan.height)
        with opened_slide(self.reading, self.files) as slide:
            rgb: Rgb = read_window(slide, box, self.plan.downsample)
        how = self.task.settings
        predictor = Predictor.load(self.task.model, self.task.folders, threads=how.threads, precision=how.precision)
        return Segmenter(predictor, how.use, threshold=how.threshold, tta=how.tta)(rgb)

    def require_mask_of_whole(self) -> np.ndarray:
        """Return the mask of the files, which is that of the slide seen as a whole.

        Convolutions of another size add up in another order: where a logit is next to nothing its sign may differ.
        """
        found, box = self.seen_as_a_whole(), Box(0, 0, self.plan.width, self.plan.height)
        wanted = spread(read_cells(self.output, self.parts, self.plan), box)
        mask = self.mask()
        assert mask.shape == found.mask.shape
        differ = mask != (found.mask & wanted)
        threshold = round(self.task.settings.threshold * STEPS)
        unclear = np.abs(found.probability.astype(int) - threshold) <= 1
        assert not (differ & ~unclear).any(), f"{(differ & ~unclear).sum()} px differ"
        assert differ.sum() <= 3
        return mask


def with_settings(**changes: object) -> SegmentSettings:
    """The settings of a segmentation of pictures that are no smears."""
    return SegmentSettings.model_validate({"tissue": False, **changes})


def filled_by_scipy(mask: np.ndarray, least: float) -> np.ndarray:
    """The mask with what each object encloses, in areas (connected by sides) of less than `least` px."""
    whole = mask.copy()
    labels = components(mask)
    for number in range(1, labels.max(initial=0) + 1):
        one = labels == number
        areas, count = ndimage.label(ndimage.binary_fill_holes(one) & ~one)
        for area in range(1, count + 1):
            if (areas == area).sum() < least:
                whole |= areas == area
    return whole
