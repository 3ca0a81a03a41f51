"""Checks of a segmentation: the networks, the slides, how their resolutions fit, and the memory for a core."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from apacs_ray.config.command_line import SegmentCommand
from apacs_ray.data.slide_tables import read_mpps, read_table_text
from apacs_ray.distributed.resource_plan import Cluster
from apacs_ray.distributed.tasks import plan_segment_pool
from apacs_ray.doctor.finding import Finding, message_of
from apacs_ray.errors import ApacsError, BadInput
from apacs_ray.inference.cutting import CORES, choose_cutting, window_memory
from apacs_ray.inference.memory import GIB, worker_memory
from apacs_ray.inference.model_files import ModelFiles, find_models
from apacs_ray.inference.planning import MPP_NOTE
from apacs_ray.inference.predictor import load_ensemble
from apacs_ray.runs.run import RUN_JSON
from apacs_ray.slides.listing import FoundSlides, slides_at
from apacs_ray.slides.manifest import mpp_of
from apacs_ray.slides.open import open_slide
from apacs_ray.slides.reader import SlideInfo
from apacs_ray.slides.slide_files import SlideFiles
from apacs_ray.storage import LocalStore, open_store

RETRAIN = "give the --output of a finished run, or the folder of its models; or finish that run: apacs-ray full"


class SegmentChecks:
    """The checks of one segmentation; the later ones use what the earlier ones found."""

    def __init__(self, command: SegmentCommand) -> None:
        """Check what `command` would do."""
        self._command = command
        self._models: ModelFiles | None = None

    def check_model(self) -> Iterator[Finding]:
        """Check that the networks are there, whole and of one piece."""
        uri, settings = self._command.model, self._command.settings.segment
        store = open_store(uri)
        try:
            models = find_models(store, settings)
            load_ensemble(store, models.folders)
        except FileNotFoundError as error:
            yield Finding("model", "failed", f"{uri}: a model has no weights ({message_of(error)})", RETRAIN)
            return
        except ApacsError as error:
            yield Finding("model", "failed", str(error), RETRAIN)
            return
        self._models = models
        width = max(spec.width for spec in models.specs.values())
        names = f"{uri}: {settings.use} of {', '.join(models.folders)}, width {width:g}"
        vouched = "as its run committed them"
        if store.version(RUN_JSON) is None:
            vouched = "a folder, not a run: nothing says whether they were trained for each other"
        yield Finding("model", "ok", f"{names}; {vouched}")

    def check_slides(self) -> Iterator[Finding]:
        """Check that slides are found, that the first of each place opens, and at which resolution it would be seen."""
        regex = self._command.settings.data.slide_regex
        for uri in self._command.slides:
            try:
                found = slides_at(uri, regex)
            except ApacsError as error:
                yield Finding("slides", "failed", str(error), "correct --slides, or put the slides there")
                continue
            refused = len(found.data.slide_rejects)
            if not found.slides:
                advice = "docs/inputs.md names the formats; give a folder of slides, or a slide"
                yield Finding("slides", "failed", f"{uri}: no slides there ({refused} are refused)", advice)
                continue
            yield from self._check_first(uri, found)

    def check_cores(self, cluster: Cluster) -> Iterator[Finding]:
        """Check that a worker has the memory for a core."""
        if self._models is None:
            return
        settings, pool = self._command.settings.segment, plan_segment_pool(cluster)
        on_gpus = pool.gpus > 0
        cutting = choose_cutting(settings, self._models, workers=pool.actors, on_gpus=on_gpus)
        needed = window_memory(settings, self._models, cutting.core, cutting.halo)
        there = worker_memory(pool.actors, on_gpus=on_gpus)
        workers = f"{pool.actors} worker{'s' * (pool.actors != 1)} of {'a GPU' if on_gpus else 'a CPU'}"
        message = (
            f"{workers}, cores of {cutting.core} px with a halo of {cutting.halo}: about {needed / GIB:.1f} GiB of the "
            f"{there / GIB:.1f} that each has"
        )
        smaller = [core for core in CORES if core < cutting.core]
        advice = " or ".join(
            [*(f"--segment.core {core}" for core in smaller[:1]), "--segment.precision bfloat16", "fewer CPUs for Ray"]
        )
        state = "ok" if needed <= there / 2 else "warning" if needed <= there else "failed"
        yield Finding("cores", state, message, "" if state == "ok" else advice)  # type: ignore[arg-type]

    def _check_first(self, uri: str, found: FoundSlides) -> Iterator[Finding]:
        slide = found.slides[0]
        count = f"{uri}: {len(found.slides)} slide{'s' * (len(found.slides) != 1)}"
        if refused := len(found.data.slide_rejects):
            count += f", {refused} refused"
        if not isinstance(found.store, LocalStore):
            yield Finding("slides", "ok", f"{count}; none is opened here, it would be copied: --estimate opens a few")
            return
        settings = self._command.settings.data
        try:
            reader = open_slide(Path(found.store.root) / slide.path, settings.engine, settings.plane)
        except BadInput as defect:
            advice = "it would be a reject, the others go on; rejects say why in rejects/segment.parquet"
            yield Finding("slides", "warning", f"{count}; {slide.path} does not open: {defect.reason}", advice)
            return
        info = reader.info
        reader.close()
        box = info.bounds
        yield Finding("slides", "ok", f"{count}; {slide.path} opens: {box.width} x {box.height} px, {info.engine}")
        yield self._resolution(slide, info)

    def _resolution(self, slide: SlideFiles, info: SlideInfo) -> Finding:
        """Compare a slide's um per px with those that the networks learned from."""
        data, wanted = self._command.settings.data, self._command.settings.segment.mpp
        trained = None if self._models is None else self._models.mpp
        mpp = mpp_of(read_mpps(read_table_text(data.mpps)), data, slide, info)
        if mpp is None:
            advice = "say it: --data.mpp X, or --data.mpps FILE.csv where slides differ"
            return Finding("resolution", "warning", f"{slide.path}: its um per px are not known; seen as it is", advice)
        if trained is None and wanted is None:
            advice = "say it: --segment.mpp X, the um per px of the tiles that they learned from"
            message = f"{slide.path}: {mpp:g} um per px; those of the networks' training are not known: seen as it is"
            return Finding("resolution", "warning", message, advice)
        seen = wanted or trained
        assert seen is not None
        message = f"{slide.path}: {mpp:g} um per px, seen at {seen:g}"
        if trained is not None:
            message += f"; trained at {trained:g} ({mpp / trained:.2f} times)"
            if abs(seen / trained - 1) > MPP_NOTE:
                advice = "leave --segment.mpp out: cells have another size than the networks learned"
                return Finding("resolution", "warning", message, advice)
        if mpp > seen * (1 + MPP_NOTE):
            advice = "use slides of at least this resolution, or networks that were trained on coarser ones (tiles.mpp)"
            return Finding("resolution", "warning", f"{message}: it is enlarged", advice)
        return Finding("resolution", "ok", message)
