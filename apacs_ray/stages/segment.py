"""Segmentation of whole slides: what is new or changed among them is segmented, and what is done stays as it is.

It is no stage of the pipeline, which ends in numbers: its output is a folder a slide, which counts when its
`slide.json` is there and names the fingerprint of the slide, the networks and the settings.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from apacs_ray.config.settings import Settings
from apacs_ray.console import say
from apacs_ray.data.rejects import Reject
from apacs_ray.data.units import one_unit
from apacs_ray.distributed.cluster import joined_machines, refuse_local
from apacs_ray.distributed.segment import TASK_CPUS, segment_shards
from apacs_ray.distributed.session import RaySession
from apacs_ray.distributed.tasks import SegmentPool, map_numbers, plan_segment_pool, start_task
from apacs_ray.distributed.waiting import OneAsk, told_of_waits
from apacs_ray.errors import ApacsError, BadInput, UsageError, few
from apacs_ray.inference.cutting import choose_cutting
from apacs_ray.inference.model_files import ModelFiles, find_models
from apacs_ray.inference.parts import part_path
from apacs_ray.inference.planning import Cutting, make_plan
from apacs_ray.inference.segment_steps import STAGE, PlannedSlide, SegmentTask
from apacs_ray.inference.slide_plan import SlidePlan, read_plan
from apacs_ray.outputs.slide_files import Found, write_slide_files
from apacs_ray.runs.run import Run
from apacs_ray.stages.rejects import require_within_limit, write_rejects
from apacs_ray.stages.segment_slides import ListedSlide, finished_record, forget_parts, list_slides
from apacs_ray.stages.stage import Job
from apacs_ray.storage import LocalStore, Store, open_store


@dataclass
class Outcome:
    """What became of the slides."""

    slides: int = 0
    kept: list[str] = field(default_factory=list)  # ids of those that were done already
    done: dict[str, tuple[Found, float]] = field(default_factory=dict)  # by slide id; seconds that its files took
    rejects: list[Reject] = field(default_factory=list)
    rejected_slides: int = 0

    @property
    def unchanged(self) -> int:
        """How many slides were done already."""
        return len(self.kept)


def find_work(run: Run, model: str, slides: Sequence[str]) -> tuple[Store, ModelFiles, list[ListedSlide], Outcome]:
    """Find the networks and the slides.

    Args:
        run: The output.
        model: URI of a run or of a folder of models.
        slides: URIs of folders with slides, or of single slides.

    Returns:
        Where the networks are, what they are, the slides to segment, and what is known of the others.

    Raises:
        UsageError: There are no slides, or the output or the model is none.
    """
    if run.stages.keys() - {STAGE}:
        raise UsageError(f"--output {run.store.uri}: holds a run that trains; choose another folder")
    store = open_store(model)
    models = find_models(store, run.settings.segment)
    listed, rejects = list_slides(run, models, slides)
    outcome = Outcome(len(listed) + len(rejects), rejects=rejects, rejected_slides=len(rejects))
    waiting = []
    for one in listed:
        record = finished_record(run.store, one)
        if record is None:
            waiting.append(one)
        else:
            outcome.kept.append(one.folder)
            outcome.rejects += [Reject(**reject) for reject in record["rejects"]]
    say(f"{STAGE}: {len(waiting)} slides to segment, {outcome.unchanged} unchanged")
    return store, models, waiting, outcome


def segment(run: Run, ray: RaySession, model: str, slides: Sequence[str]) -> Outcome:
    """Segment slides.

    Args:
        run: The output.
        ray: For the work.
        model: URI of a run or of a folder of models.
        slides: URIs of folders with slides, or of single slides.

    Returns:
        What became of them.

    Raises:
        UsageError: There are no slides, or the output or the model is none.
        ApacsError: More slides are rejected than `data.max_rejects` allows; their reasons are written.
    """
    job, settings = Job(run, ray, STAGE), run.settings
    store, models, waiting, outcome = find_work(run, model, slides)
    if waiting:
        run.record_start(STAGE, ())
        pool, cutting = start_segmenting(ray, (model, *slides), settings, models)
        planned = plan_slides(job, waiting, cutting, outcome)
        task = SegmentTask(store, dict(models.folders), run.store, settings.segment)
        _work(job, task, planned, pool, models, outcome)
    _close(job, outcome)
    return outcome


def start_segmenting(
    ray: RaySession, uris: Iterable[str], settings: Settings, models: ModelFiles
) -> tuple[SegmentPool, Cutting]:
    """Start Ray, choose what runs there and how slides are cut, and say so.

    Args:
        ray: To start.
        uris: Of slides and networks, which every node must see.
        settings: Of the segmentation.
        models: That segment.

    Returns:
        The pool, and how slides are cut.

    Raises:
        ApacsError: Not every node sees one of `uris`.
    """
    ray.start()
    for uri in uris:
        refuse_local(joined_machines(), uri, "--slides or --model")
    pool = plan_segment_pool(ray.cluster())
    cutting = choose_cutting(settings.segment, models, workers=pool.actors, on_gpus=pool.gpus > 0)
    say(f"{STAGE}: {_described(settings, models, cutting, pool)}")
    return pool, cutting


def plan_slides(
    job: Job, slides: Sequence[ListedSlide], cutting: Cutting, outcome: Outcome, *, keep: bool = True
) -> list[PlannedSlide]:
    """Open every slide, a task each; one that does not open becomes a reject of `outcome`.

    Args:
        job: The segmentation.
        slides: To plan; one that was begun keeps its plan.
        cutting: How the others are cut.
        outcome: Gets the rejects.
        keep: Whether plans stay in the output, so that the slides are cut by them; else nothing is left there.

    Returns:
        The slides that open, in order.
    """
    output = job.store

    def plan_of(one: ListedSlide) -> SlidePlan:
        begun = read_plan(output, one.parts)
        if begun is not None:
            return begun
        if keep:
            return make_plan(one.reading, one.files, one.region, cutting, one.parts)
        with tempfile.TemporaryDirectory() as scratch:
            reading = replace(one.reading, output=LocalStore(scratch))
            return make_plan(reading, one.files, one.region, cutting, one.parts)

    def work(number: int) -> str:
        one = slides[number]
        try:
            with one_unit(one.files.path):
                plan = plan_of(one)
        except BadInput as defect:
            uri = one.reading.data.uri_of(one.files.path)
            return json.dumps({"reject": asdict(Reject.of(defect, uri, one.files.slide_id, stage=STAGE))})
        return plan.to_json()

    planned: list[PlannedSlide] = []
    noted: dict[str, list[str]] = {}
    with job.progress() as progress:
        for number, text in enumerate(map_numbers(work, len(slides))):
            progress.show("slides planned", number + 1, len(slides))
            one, tree = slides[number], json.loads(text)
            if "reject" in tree:
                outcome.rejects.append(Reject(**tree["reject"]))
                outcome.rejected_slides += 1
                continue
            plan = SlidePlan.from_json(text)
            for note in plan.notes:
                noted.setdefault(note, []).append(plan.slide_id)
            names = {entry.path for entry in output.list(one.parts)}
            done = frozenset(shard for shard in range(plan.shards) if part_path(one.parts, shard) in names)
            planned.append(PlannedSlide(one.files, one.reading, plan, one.parts, done))
    for note, slide_ids in noted.items():
        say(f"{STAGE}: {few(slide_ids)}: {note}")
    return planned


def _work(
    job: Job,
    task: SegmentTask,
    slides: Sequence[PlannedSlide],
    pool: SegmentPool,
    models: ModelFiles,
    outcome: Outcome,
) -> None:
    """Make all shards, and the files of each slide as soon as its shards are there."""
    import ray as ray_library

    left = [len(slide.missing) for slide in slides]
    seconds: list[Counter[str]] = [Counter() for _ in slides]
    total = sum(slide.plan.cores for slide in slides)
    done = total - sum(slide.plan.cores_in(shard) for slide in slides for shard in slide.missing)
    ending: list[tuple[int, Any]] = []
    began = time.time()

    def busy() -> float:
        """The share of the time so far that the workers spent in networks."""
        return sum(each["networks"] for each in seconds) / (pool.actors * (time.time() - began))

    def end(number: int) -> None:
        while len(ending) >= pool.writers:
            collect()
        slide = slides[number]
        facts = _slide_facts(slide, task, models)
        ending.append((number, start_task(lambda: _files_of(task, slide, facts), cpus=TASK_CPUS)))

    def collect() -> None:
        number, reference = ending.pop(0)
        found, took = ray_library.get(reference)
        slide = slides[number]
        folder = slide.plan.slide_id
        outcome.rejects += found.rejects
        outcome.done[folder] = found, took
        timings = {**seconds[number], "files": took, "busy": busy()}
        timings = {step: round(value, 3) for step, value in timings.items()}
        job.store.write(f"{folder}/timings.json", json.dumps(timings, indent=1, sort_keys=True).encode())
        forget_parts(job.store, folder, [entry.path for entry in job.store.list(folder)])

    with job.progress() as progress:
        for number, slide in enumerate(slides):
            if not slide.missing:
                end(number)
        for receipt in segment_shards(task, slides, pool):
            done += receipt.cores
            progress.show("cores", done, total)
            seconds[receipt.slide].update(receipt.seconds)
            left[receipt.slide] -= 1
            if not left[receipt.slide]:
                end(receipt.slide)
        with told_of_waits({"a task": OneAsk(TASK_CPUS)}) as went_on:
            while ending:
                collect()
                went_on()
    share = f"; {pool.actors} workers spent {busy():.0%} of it in networks" if done else ""
    say(f"{STAGE}: {len(slides)} slides in {time.time() - began:.0f} s{share}")


def _files_of(task: SegmentTask, slide: PlannedSlide, facts: Mapping[str, Any]) -> tuple[Found, float]:
    """In a task: write the files of a slide; returns what was found, and the seconds it took."""
    began = time.perf_counter()
    found = write_slide_files(task.output, slide.parts, slide.plan, task.settings, facts)
    return found, round(time.perf_counter() - began, 3)


def _slide_facts(slide: PlannedSlide, task: SegmentTask, models: ModelFiles) -> dict[str, Any]:
    return {
        "fingerprint": slide.reading.fingerprint,
        "source": slide.reading.data.uri_of(slide.files.path),
        "models": dict(models.sha256),
        "model_mpp": models.mpp,
        "settings": task.settings.model_dump(mode="json"),
    }


def _close(job: Job, outcome: Outcome) -> None:
    """Write the rejects, and judge them. Raises ApacsError when too many slides are rejected."""
    write_rejects(job.store, f"rejects/{STAGE}.parquet", outcome.rejects)
    counts = {
        "rows_in": outcome.slides,
        "rows_out": len(outcome.done),
        "skipped": {"unchanged": outcome.unchanged},
        "rejected": outcome.rejected_slides,
    }
    regions = len(outcome.rejects) - outcome.rejected_slides
    if regions:
        say(f"{STAGE}: {regions} regions of slides cannot be read; the reasons are in {job.store.uri_of('rejects')}")
    try:
        require_within_limit(job, "slides", outcome.rejected_slides, outcome.slides)
        if outcome.rejected_slides == outcome.slides:
            raise ApacsError(f"{STAGE}: no slide is left; the reasons are in {job.store.uri_of('rejects')}")
    except ApacsError:
        job.run.record(STAGE, state="failed", **counts)
        raise
    job.run.record(STAGE, state="done", **counts)


def _described(settings: Settings, models: ModelFiles, cutting: Cutting, pool: SegmentPool) -> str:
    mpp = f"{cutting.mpp:g} um per px" if cutting.mpp else "the slides' own resolution (model.json names none)"
    device = "a GPU" if pool.gpus else f"{pool.cpus:g} CPU"
    return (
        f"{settings.segment.use} of {', '.join(models.folders)} at {mpp}, cores of {cutting.core} px with a halo of "
        f"{cutting.halo}, {pool.actors} worker{'s' * (pool.actors > 1)} of {device}"
    )
