"""`segment --estimate`: what slides will take on the cluster at hand, from a few of them, before any is segmented."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from rich.table import Table

from apacs_ray.commands.estimate import chosen_of, kind_of, say_where, show_lines
from apacs_ray.config.settings import Settings
from apacs_ray.console import cell, console, say
from apacs_ray.distributed.cluster import has_gpus, joined_machines
from apacs_ray.distributed.session import RaySession
from apacs_ray.distributed.tasks import SegmentPool, run_in_task
from apacs_ray.errors import ApacsError
from apacs_ray.estimate.cutting import SLIDES
from apacs_ray.estimate.networks import ASSUMED_GPU
from apacs_ray.estimate.segment_sample import LookedAt, SegmentSample, SlideToSample, sample_slides, window_flops
from apacs_ray.estimate.segmenting import (
    NOTHING,
    Machines,
    UnitCosts,
    Workload,
    bottleneck,
    bytes_moved,
    bytes_written,
    cpus_a_gpu,
    segment_lines,
    wall_seconds,
)
from apacs_ray.inference.cutting import window_memory
from apacs_ray.inference.memory import GIB, worker_memory
from apacs_ray.inference.model_files import ModelFiles
from apacs_ray.inference.planning import Cutting
from apacs_ray.inference.segment_steps import STAGE
from apacs_ray.runs.run import Run
from apacs_ray.stages.segment import find_work, start_segmenting
from apacs_ray.stages.segment_slides import ListedSlide

MEGAPIXEL = 10**6


def estimate_segment(run: Run, ray: RaySession, model: str, slides: Sequence[str]) -> None:
    """Say what segmenting the slides that are not done yet will take. Nothing is segmented, and nothing is kept.

    Args:
        run: The output.
        ray: For the sample.
        model: URI of a run or of a folder of models.
        slides: URIs of folders with slides, or of single slides.

    Raises:
        ApacsError: Of the slides that were tried, none can be read.
    """
    settings = run.settings
    store, models, waiting, _ = find_work(run, model, slides)
    if not waiting:
        return
    began = time.perf_counter()
    pool, cutting = start_segmenting(ray, (model, *slides), settings, models)
    cluster, gpu_there = ray.cluster(), has_gpus()
    chosen = _chosen(waiting)
    sampled = [SlideToSample(one.reading, one.files, one.region) for one in chosen]
    assumed = pool.gpus > 0 and not gpu_there
    work = partial(sample_slides, sampled, cutting, store, models, settings.segment, assumed=assumed)
    sample = run_in_task(work, cpus=min(1.0, cluster.cpus), gpus=pool.gpus if gpu_there else 0.0)
    _show_slides(sample.slides, len(waiting))
    if sample.costs is None:
        opened = sum(one.plan is not None for one in sample.slides)
        raise ApacsError(f"{STAGE}: of {len(chosen)} slides that were tried {opened} open, and no core can be read")
    total = scaled(waiting, chosen, sample)
    nodes = joined_machines()
    remote = not all(one.reading.data.is_local for one in waiting)
    machines = Machines(
        cluster.cpus,
        pool.actors,
        pool.gpus > 0,
        nodes,
        pool.tasks,
        pool.writers,
        copies=float(min(nodes, total.shards) + 1) if remote else 0.0,
    )
    _show_estimate(total, sample.costs, machines)
    _show_cores(total, settings, models, cutting, pool)
    say_where(cluster, time.perf_counter() - began)
    if assumed:
        say(f"no GPU is there yet: {ASSUMED_GPU / 1e12:.0f} TFLOP/s were assumed of each, nothing was measured")


def _chosen(waiting: Sequence[ListedSlide]) -> list[ListedSlide]:
    """A few slides of each kind, from all over the listing."""
    names = {files.slide_id for files in chosen_of([one.files for one in waiting], SLIDES)}
    return [one for one in waiting if one.files.slide_id in names]


def scaled(waiting: Sequence[ListedSlide], chosen: Sequence[ListedSlide], sample: SegmentSample) -> Workload:
    """Return the work of all slides, if those of a kind are as the chosen ones: slides of more bytes have more.

    Args:
        waiting: All slides.
        chosen: Those that were opened.
        sample: What they turned out to be, in their order.

    Returns:
        The work; slides that do not open are none.
    """
    total = NOTHING
    for kind in {kind_of(one.files) for one in chosen}:
        size, tried = (sum(one.files.size for one in some if kind_of(one.files) == kind) for some in (waiting, chosen))
        found = NOTHING
        for one, looked in zip(chosen, sample.slides, strict=True):
            if kind_of(one.files) == kind and looked.work is not None:
                found += looked.work
        total += found.times(size / max(1, tried))
    slides = sum(looked.work is not None for looked in sample.slides) / len(chosen) * len(waiting)
    return replace(total, slides=slides)


def _show_slides(slides: Sequence[LookedAt], count: int) -> None:
    title = f"slides: {len(slides)} of {count} were opened" + (
        "; the others are taken to be like them" * (len(slides) < count)
    )
    table = Table(title=title, title_justify="left")
    for heading in ("slide", "um/px", "px", "segmented", "cores", "px seen per px", "note"):
        table.add_column(heading, justify="left" if heading in ("slide", "note") else "right")
    for one in slides:
        if one.plan is None or one.work is None:
            table.add_row(cell(one.slide_id), "", "", "", "", "", cell(f"rejected: {one.reason}"))
            continue
        plan = one.plan
        ratio = one.work.window_pixels / one.wanted_pixels if one.wanted_pixels else 0.0
        cells = (
            one.slide_id,
            "-" if plan.output_mpp is None else f"{plan.output_mpp:.4g}",
            f"{plan.width} x {plan.height}",
            f"{one.wanted_pixels / one.work.pixels:.1%}",
            plan.cores,
            f"{ratio:.2f}",
            "; ".join(plan.notes),
        )
        table.add_row(*map(cell, cells))
    console.print(table)


def _show_estimate(work: Workload, costs: UnitCosts, machines: Machines) -> None:
    show_lines(segment_lines(work, costs, machines), unit="slides, cores", wall=wall_seconds(work, costs, machines))
    say(
        "reading, networks, objects and files go on at the same time; of each the wall time is what it would take alone"
    )
    say(f"first bottleneck: {bottleneck(work, costs, machines)}")
    if machines.gpus:
        say(f"CPUs that a GPU needs so that it never waits: {cpus_a_gpu(work, costs):.1f}")
    read = f"{work.size / 1e9:.2f} GB of slides"
    if machines.copies:
        moved = bytes_moved(work, costs, machines) / 1e9
        read += f", copied {machines.copies:.0f} times, to each node that reads one: {moved:.2f} GB over the network"
    say(f"{read}; {bytes_written(work, costs) / 1e9:.2f} GB are written")


def _show_cores(work: Workload, settings: Settings, models: ModelFiles, cutting: Cutting, pool: SegmentPool) -> None:
    flops = window_flops(models, (1024, 1024), tta=settings.segment.tta)
    each = {name: count / 1024**2 * MEGAPIXEL / 1e12 for name, count in flops.items()}
    mean = work.window_pixels / work.cores / MEGAPIXEL
    networks = ", ".join(f"{name} {mean * count:.3g}" for name, count in each.items())
    total = sum(each.values()) * work.window_pixels / MEGAPIXEL
    say(f"TFLOP a core (of {mean:.1f} Mpx with its halo): {networks}; {total:.4g} in all")
    needed = window_memory(settings.segment, models, cutting.core, cutting.halo)
    there = worker_memory(pool.actors, on_gpus=pool.gpus > 0)
    of = "a GPU" if pool.gpus else "this machine's memory, for each worker,"
    say(f"memory: a core of {cutting.core} px takes about {needed / GIB:.1f} GiB; {of} has {there / GIB:.1f}")
