"""`--dry-run`: what cutting the data will give and cost, before any of it is cut."""

from __future__ import annotations

from rich.table import Table

from apacs_ray.console import cell, console, say
from apacs_ray.distributed.session import RaySession
from apacs_ray.estimate.cutting import SLIDES, cut_some, spread
from apacs_ray.runs.run import Run
from apacs_ray.slides.manifest import SlideSummary
from apacs_ray.stages.ingest import Ingest
from apacs_ray.stages.ingest_slides import InspectedSlides, look_at_slides, make_smears
from apacs_ray.stages.source import Source
from apacs_ray.stages.stage import Job

SLIDES_SHOWN = 30


def dry_run(run: Run, ray: RaySession) -> None:
    """Write manifests and pictures, and say how many tiles, bytes and minutes it will be."""
    source = Source.of(run.store, run.data, run.settings)
    if source.is_synthetic:
        ray.start()
        make_smears(run.settings, source.store)
    if source.holds_folders:
        data = source.folder_data
        say(f"{len(data.pairs)} pairs of image and mask, {len(data.rejects)} rejects, {len(data.ignored)} others")
        return
    fingerprint = Ingest(source).fingerprint(run.settings)
    inspected = look_at_slides(Job(run, ray, Ingest.name), source, fingerprint)
    _print_table(inspected)
    with_tiles = [(number, summary) for number, summary in inspected.opened if summary.tiles]
    sample = cut_some(inspected.task, spread(with_tiles, SLIDES))
    cpus = ray.cluster().cpus
    if sample.count:
        size, minutes = sample.size / sample.count, inspected.tiles * sample.each / cpus / 60
        say(
            f"{inspected.tiles} tiles, about {inspected.tiles * size / 1e9:.2f} GB and {minutes:.1f} min on {cpus:.0f} "
            f"CPUs ({sample.each * 1000:.0f} ms and {size / 1e3:.0f} kB a tile, measured on {sample.count})"
        )
    else:
        say("no tile can be read")
    say(f"pictures: {run.store.uri_of(f'manifest/{fingerprint[:8]}')}/*.png")


def _masks(summary: SlideSummary) -> str:
    """What gives a slide's tiles their masks."""
    if summary.annotation_reject is not None:
        return "rejected"
    return (summary.slide.kind if summary.annotated else None) or "-"


def _print_table(inspected: InspectedSlides) -> None:
    table = Table(title="slides", title_justify="left")
    for heading in ("slide", "split", "engine", "um/px", "tiles", "skipped", "annotation"):
        table.add_column(heading, justify="right" if heading in ("um/px", "tiles", "skipped") else "left")
    for summary in inspected.summaries[:SLIDES_SHOWN]:
        slide = summary.slide
        if summary.reject is not None:
            table.add_row(cell(slide.slide_id), slide.split or "-", cell(f"rejected: {summary.reject.reason}"))
            continue
        mpp = "-" if summary.mpp is None else f"{summary.mpp * summary.downsample:.4g}"
        cells = (
            slide.split or "-",
            summary.engine,
            mpp,
            summary.tiles,
            sum(summary.skipped.values()),
            _masks(summary),
        )
        table.add_row(cell(slide.slide_id), *map(cell, cells))
    console.print(table)
    if len(inspected.summaries) > SLIDES_SHOWN:
        say(f"and {len(inspected.summaries) - SLIDES_SHOWN} more slides")
