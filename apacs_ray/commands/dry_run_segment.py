"""`segment --dry-run`: every slide opened and planned, and what would run where, before any network runs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from apacs_ray.commands.dry_run import SLIDES_SHOWN
from apacs_ray.console import cell, console, say
from apacs_ray.distributed.segment import TASK_CPUS
from apacs_ray.distributed.session import RaySession
from apacs_ray.inference.segment_steps import STAGE, PlannedSlide
from apacs_ray.runs.run import Run
from apacs_ray.stages.rejects import reject_limit
from apacs_ray.stages.segment import Outcome, find_work, plan_slides, start_segmenting
from apacs_ray.stages.stage import Job


def dry_run_segment(run: Run, ray: RaySession, model: str, slides: Sequence[str]) -> None:
    """Say which slides are rejected, done or to be segmented, in how many cores, and what would run where.

    Every slide that is not done is opened (those of another machine are copied to the cache, as a run does). No network
    runs, and plans are not kept: the run chooses the size of its cores where it runs.

    Args:
        run: The output.
        ray: For the planning.
        model: URI of a run or of a folder of models.
        slides: URIs of folders with slides, or of single slides.

    Raises:
        UsageError: There are no slides, or the output or the model is none.
    """
    _, models, waiting, outcome = find_work(run, model, slides)
    planned: list[PlannedSlide] = []
    if waiting:
        pool, cutting = start_segmenting(ray, (model, *slides), run.settings, models)
        planned = plan_slides(Job(run, ray, STAGE), waiting, cutting, outcome, keep=False)
        say(
            f"{STAGE}: beside these at most {pool.tasks} tasks that read windows, {pool.tasks} that find objects and "
            f"{pool.writers} that write a slide's files, of {TASK_CPUS} CPU each"
        )
    _print_slides(outcome, planned)
    shards = sum(len(slide.missing) for slide in planned)
    cores = sum(slide.plan.cores_in(shard) for slide in planned for shard in slide.missing)
    pixels = sum(slide.plan.width * slide.plan.height for slide in planned)
    say(f"to do: {len(planned)} slides of {pixels / 1e6:.1f} Mpx, {cores} cores in {shards} shards")
    text, rejected = run.settings.data.max_rejects, outcome.rejected_slides
    limit = reject_limit(text, outcome.slides)
    if rejected > limit:
        say(f"{rejected} of {outcome.slides} slides rejected, data.max_rejects ({text}) allows {limit}: it would fail")
    elif rejected == outcome.slides:
        say("no slide is left: it would fail")


def _print_slides(outcome: Outcome, planned: Sequence[PlannedSlide]) -> None:
    """Print a row a slide: first what is rejected, then what is to do, then what is done."""
    refused = [reject for reject in outcome.rejects if reject.x is None]  # the others are regions of slides that open
    rows = [
        *((reject.slide_id or reject.uri, "", "", "", f"rejected: {reject.reason}") for reject in refused),
        *(_row(slide) for slide in planned),
        *((slide_id, "", "", "", "unchanged") for slide_id in outcome.kept),
    ]
    counts = (
        f"{outcome.slides} slides: {len(planned)} to segment, {outcome.unchanged} unchanged, {len(refused)} rejected"
    )
    table = Table(title=counts, title_justify="left")
    for heading in ("slide", "um/px", "px", "cores", "what becomes of it"):
        table.add_column(heading, justify="right" if heading in ("um/px", "px", "cores") else "left")
    for row in rows[:SLIDES_SHOWN]:
        table.add_row(*map(cell, row))
    console.print(table)
    if len(rows) > SLIDES_SHOWN:
        say(f"and {len(rows) - SLIDES_SHOWN} more slides")


def _row(slide: PlannedSlide) -> tuple[str, str, str, str, str]:
    plan = slide.plan
    mpp = "-" if plan.output_mpp is None else f"{plan.output_mpp:.4g}"
    every = -(-plan.width // plan.core) * -(-plan.height // plan.core)
    cores = f"{plan.cores} of {every}, {plan.core} px"
    begun = f"goes on: {len(slide.done)} of {plan.shards} shards are there" if slide.done else "segmented"
    return plan.slide_id, mpp, f"{plan.width} x {plan.height}", cores, begun
