"""`--dry-run`: what cutting the data will give and cost, before any of it is cut."""

from __future__ import annotations

from rich.table import Table

from apacs_ray.console import cell, console, say
from apacs_ray.data.folders import find_pairs
from apacs_ray.estimate.cutting import SLIDES, cut_some, spread
from apacs_ray.slides.manifest import SlideSummary
from apacs_ray.stages.ingest import INGEST, data_store, holds_folders
from apacs_ray.stages.ingest_result import listed_data, say_found
from apacs_ray.stages.ingest_slides import Inspected, look_at_slides, make_smears
from apacs_ray.stages.pipeline import Context

SLIDES_SHOWN = 30


def dry_run(context: Context) -> None:
    """Write manifests and pictures, and say how many tiles, bytes and minutes it will be."""
    store = data_store(context)
    if context.run.data is None:
        context.ray.start()
        make_smears(context, store)
    entries = listed_data(context, store)
    if holds_folders(store.uri, entries):
        found = find_pairs(entries, root=store.uri, slide_regex=context.settings.data.slide_regex)
        say(f"{len(found.pairs)} pairs of image and mask, {len(found.rejects)} rejects, {len(found.ignored)} others")
        say_found(found)
        return
    mark = INGEST.fingerprint(context)
    seen = look_at_slides(context, store, entries, mark)
    _table(seen)
    cut = cut_some(seen.task, spread([one for one in seen.good if one[1].tiles], SLIDES))
    cpus = context.ray.cluster().cpus
    if cut.count:
        size, minutes = cut.size / cut.count, seen.tiles * cut.each / cpus / 60
        say(
            f"{seen.tiles} tiles, about {seen.tiles * size / 1e9:.2f} GB and {minutes:.1f} min on {cpus:.0f} CPUs "
            f"({cut.each * 1000:.0f} ms and {size / 1e3:.0f} kB a tile, measured on {cut.count})"
        )
    else:
        say("no tile can be read")
    say(f"pictures: {context.run.store.uri_of(f'manifest/{mark[:8]}')}/*.png")


def _masks(summary: SlideSummary) -> str:
    """What gives a slide's tiles their masks."""
    if summary.annotation_reject is not None:
        return "rejected"
    return (summary.slide.kind if summary.annotated else None) or "-"


def _table(seen: Inspected) -> None:
    table = Table(title="slides", title_justify="left")
    for heading in ("slide", "split", "engine", "um/px", "tiles", "skipped", "annotation"):
        table.add_column(heading, justify="right" if heading in ("um/px", "tiles", "skipped") else "left")
    for summary in seen.summaries[:SLIDES_SHOWN]:
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
    if len(seen.summaries) > SLIDES_SHOWN:
        say(f"and {len(seen.summaries) - SLIDES_SHOWN} more slides")
