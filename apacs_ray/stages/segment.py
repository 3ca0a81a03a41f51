"""Segmentation of whole slides: what is new or changed among them is segmented, and what is done stays as it is.

It is no stage of the pipeline, which ends in numbers: its output is a folder a slide, which counts when its
`slide.json` is there and names the fingerprint of the slide, the networks and the settings.
"""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from apacs_ray.config.settings import Settings
from apacs_ray.console import say
from apacs_ray.data.rejects import REJECT_SCHEMA, Reject
from apacs_ray.data.units import one_unit
from apacs_ray.distributed.cluster import joined_machines, refuse_local
from apacs_ray.distributed.segment import in_tasks, segment_shards, start_task
from apacs_ray.distributed.session import RaySession
from apacs_ray.distributed.tasks import PoolPlan, plan_pool
from apacs_ray.errors import ApacsError, BadInput, UsageError
from apacs_ray.inference.model_files import ModelFiles, find_models
from apacs_ray.inference.planning import Cutting, make_plan
from apacs_ray.inference.segment_steps import STAGE, PlannedSlide, SegmentTask
from apacs_ray.inference.slide_plan import SlidePlan, read_plan
from apacs_ray.outputs.slide_files import write_slide_files
from apacs_ray.runs.run import Run
from apacs_ray.stages.ingest import reject_limit
from apacs_ray.stages.segment_slides import ListedSlide, finished_record, forget_parts, list_slides
from apacs_ray.storage import open_store

GIB = 1 << 30
CORES = (4096, 2048, 1024, 512)  # px, the largest first
BYTES_A_PIXEL = 640  # of a window, at width 1 in float32: what FCN-8's first block holds at a time, and some
SHARD_BYTES = 96 << 20  # of windows that are one block on their way


@dataclass
class Outcome:
    """What became of the slides."""

    slides: int = 0
    unchanged: int = 0
    done: list[dict[str, Any]] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    rejected_slides: int = 0


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
    settings = run.settings
    if run.stages.keys() - {STAGE}:
        raise UsageError(f"--output {run.store.uri}: holds a run that trains; choose another folder")
    store = open_store(model)
    models = find_models(store, settings.segment)
    listed, rejects = list_slides(run, models, slides)
    outcome = Outcome(len(listed) + len(rejects), rejects=rejects, rejected_slides=len(rejects))
    waiting = []
    for one in listed:
        record = finished_record(run.store, one)
        if record is None:
            waiting.append(one)
        else:
            outcome.unchanged += 1
            outcome.rejects += [Reject(**reject) for reject in record["rejects"]]
    say(f"{STAGE}: {len(waiting)} slides to segment, {outcome.unchanged} unchanged")
    if waiting:
        run.record_start(STAGE, ())
        ray.start()
        for uri in (model, *slides):
            refuse_local(joined_machines(), uri, "--slides or --model")
        pool = _beside_tasks(plan_pool(ray.cluster(), len(waiting) * 1000))
        cutting = _cutting(settings, models, pool)
        say(f"{STAGE}: {_described(settings, models, cutting, pool)}")
        planned = _plan(run, ray, waiting, cutting, outcome)
        task = SegmentTask(store, dict(models.folders), run.store, settings.segment)
        _work(run, ray, task, planned, pool, models, outcome)
    return _closed(run, outcome)


def _beside_tasks(pool: PoolPlan) -> PoolPlan:
    """Leave half of the CPUs to the tasks that feed the networks and those that take their masks, on one CPU too."""
    return pool if pool.gpus else replace(pool, cpus=pool.cpus / 2)


def _cutting(settings: Settings, models: ModelFiles, pool: PoolPlan) -> Cutting:
    """Choose sizes: the core once, from the memory of a worker; a slide that was begun keeps what its plan says."""
    how = settings.segment
    halo = models.halo if how.halo is None else how.halo
    core = how.core or _largest_core(models, halo, pool, how.precision)
    window = 3 * (core + 2 * halo) ** 2
    return Cutting(how.mpp or models.mpp, core, halo, max(1, SHARD_BYTES // window), how.tissue)


def _largest_core(models: ModelFiles, halo: int, pool: PoolPlan, precision: str) -> int:
    import psutil

    width = max(spec.width for spec in models.specs.values())
    room = psutil.virtual_memory().total / 2 / pool.actors
    if pool.gpus:
        import torch

        room = torch.cuda.get_device_properties(0).total_memory / 2 if torch.cuda.is_available() else 8 * GIB
    each = BYTES_A_PIXEL * max(width, 0.125) * (0.5 if precision == "bfloat16" else 1)
    largest = CORES[0] if pool.gpus else CORES[1]  # on CPUs also small slides are to keep all workers busy
    fitting = [side for side in CORES if side <= largest and (side + 2 * halo) ** 2 * each <= room]
    return fitting[0] if fitting else CORES[-1]


def _plan(
    run: Run, ray: RaySession, slides: Sequence[ListedSlide], cutting: Cutting, outcome: Outcome
) -> list[PlannedSlide]:
    """Open every slide; one that does not open is a reject."""
    output = run.store

    def work(number: int) -> str:
        one = slides[number]
        try:
            with one_unit(one.files.path):
                plan = read_plan(output, one.parts) or make_plan(one.reading, one.files, one.region, cutting, one.parts)
        except BadInput as defect:
            uri = one.reading.data.uri_of(one.files.path)
            return json.dumps({"reject": asdict(Reject.of(defect, uri, one.files.slide_id, stage=STAGE))})
        return plan.to_json()

    planned: list[PlannedSlide] = []
    with _progress(ray) as progress:
        for number, text in enumerate(in_tasks(work, len(slides))):
            progress.show("slides planned", number + 1, len(slides))
            one, tree = slides[number], json.loads(text)
            if "reject" in tree:
                outcome.rejects.append(Reject(**tree["reject"]))
                outcome.rejected_slides += 1
                continue
            plan = SlidePlan.from_json(text)
            for note in plan.notes:
                say(f"{STAGE}: {plan.slide_id}: {note}")
            names = {entry.path for entry in output.list(one.parts)}
            done = frozenset(n for n in range(plan.shards) if f"{one.parts}/cores-{n:06d}.parquet" in names)
            planned.append(PlannedSlide(one.files, one.reading, plan, one.parts, done))
    return planned


def _work(
    run: Run,
    ray: RaySession,
    task: SegmentTask,
    slides: Sequence[PlannedSlide],
    pool: PoolPlan,
    models: ModelFiles,
    outcome: Outcome,
) -> None:
    """Make all shards, and the files of each slide as soon as its shards are there."""
    import ray as ray_library

    left = [len(slide.missing) for slide in slides]
    seconds: list[Counter[str]] = [Counter() for _ in slides]
    total = sum(slide.plan.cores for slide in slides)
    done = total - sum(
        min(slide.plan.shard, slide.plan.cores - shard * slide.plan.shard)
        for slide in slides
        for shard in slide.missing
    )
    ending: list[tuple[int, Any]] = []
    began = time.time()
    most = max(1, pool.actors)  # slides whose files are made at a time

    def end(number: int) -> None:
        while len(ending) >= most:
            collect()
        slide = slides[number]
        facts = _slide_facts(slide, task, models)
        ending.append((number, start_task(lambda: _files_of(task, slide, facts))))

    def collect() -> None:
        number, reference = ending.pop(0)
        record = json.loads(ray_library.get(reference))
        slide = slides[number]
        outcome.rejects += [Reject(**reject) for reject in record.pop("rejects")]
        outcome.done.append({"slide": slide.plan.slide_id, **record})
        timings = {**{step: round(value, 3) for step, value in seconds[number].items()}, "files": record["seconds"]}
        folder = slide.plan.slide_id
        run.store.write(f"{folder}/timings.json", json.dumps(timings, indent=1, sort_keys=True).encode())
        forget_parts(run.store, folder, [entry.path for entry in run.store.list(folder)])

    with _progress(ray) as progress:
        for number, slide in enumerate(slides):
            if not slide.missing:
                end(number)
        for receipt in segment_shards(task, slides, pool, 2 * pool.actors):
            done += receipt.cores
            progress.show("cores", done, total)
            seconds[receipt.slide].update(receipt.seconds)
            left[receipt.slide] -= 1
            if not left[receipt.slide]:
                end(receipt.slide)
        while ending:
            collect()
    say(f"{STAGE}: {len(slides)} slides in {time.time() - began:.0f} s")


def _files_of(task: SegmentTask, slide: PlannedSlide, facts: dict[str, Any]) -> str:
    """In a task: write the files of a slide."""
    from apacs_ray.data.shards import read_receipt
    from apacs_ray.inference.parts import part_path

    began = time.perf_counter()
    rejects: list[dict[str, Any]] = []
    for shard in range(slide.plan.shards):
        receipt = read_receipt(task.output, part_path(slide.parts, shard))
        if receipt is None:
            raise ApacsError(f"{task.output.uri_of(part_path(slide.parts, shard))}: gone since it was written")
        rejects += receipt.rejects
    how = task.settings
    found = write_slide_files(
        task.output,
        slide.parts,
        slide.plan.slide_id,
        slide.plan,
        origin=how.origin,
        simplify=how.simplify,
        least=slide.least_px(how),
        maps=how.maps,
        facts={**facts, "rejects": rejects},
    )
    seconds = round(time.perf_counter() - began, 3)
    return json.dumps({**asdict(found), "seconds": seconds, "rejects": rejects})


def _slide_facts(slide: PlannedSlide, task: SegmentTask, models: ModelFiles) -> dict[str, Any]:
    return {
        "fingerprint": slide.reading.fingerprint,
        "source": slide.reading.data.uri_of(slide.files.path),
        "models": dict(models.sha256),
        "model_mpp": models.mpp,
        "settings": task.settings.model_dump(mode="json"),
    }


def _closed(run: Run, outcome: Outcome) -> Outcome:
    """Write the rejects, and judge them."""
    table = pa.Table.from_pylist([asdict(reject) for reject in outcome.rejects], REJECT_SCHEMA)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    run.store.write(f"rejects/{STAGE}.parquet", sink.getvalue())
    counts = {
        "rows_in": outcome.slides,
        "rows_out": len(outcome.done),
        "skipped": {"unchanged": outcome.unchanged},
        "rejected": outcome.rejected_slides,
    }
    text, place = run.settings.data.max_rejects, run.store.uri_of("rejects")
    limit = reject_limit(text, outcome.slides)
    failed = outcome.rejected_slides > limit or outcome.rejected_slides == outcome.slides
    run.record(STAGE, state="failed" if failed else "done", **counts)
    if failed:
        raise ApacsError(
            f"{STAGE}: {outcome.rejected_slides} of {outcome.slides} slides rejected, data.max_rejects ({text}) allows "
            f"{limit}; the others are done, the reasons are in {place}"
        )
    if outcome.rejects:
        say(f"{STAGE}: {outcome.rejected_slides} of {outcome.slides} slides rejected; the reasons are in {place}")
    return outcome


def _described(settings: Settings, models: ModelFiles, cutting: Cutting, pool: PoolPlan) -> str:
    mpp = f"{cutting.mpp:g} um per px" if cutting.mpp else "the slides' own resolution (model.json names none)"
    device = "a GPU" if pool.gpus else f"{pool.cpus:g} CPU"
    return (
        f"{settings.segment.use} of {', '.join(models.folders)} at {mpp}, cores of {cutting.core} px with a halo of "
        f"{cutting.halo}, {pool.actors} workers of {device}"
    )


def _progress(ray: RaySession) -> Any:
    from functools import partial

    from apacs_ray.console import bars

    return bars(STAGE, partial(ray.metrics.rows, STAGE))
