"""Ingest of whole slides: tissue, grid, annotations and shards; and the synthetic smears, which are slides as well."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apacs_ray.console import say
from apacs_ray.data.rejects import Reject
from apacs_ray.data.shards import Receipt
from apacs_ray.data.slide_tables import read_mpps
from apacs_ray.data.words import Split
from apacs_ray.distributed.data import render_smears
from apacs_ray.distributed.slides import inspect_slides, write_slide_shards
from apacs_ray.errors import BadInput, UsageError
from apacs_ray.slides.cache import SlideCache, default_cache
from apacs_ray.slides.companions import read_heads
from apacs_ray.slides.find import find_slides
from apacs_ray.slides.manifest import SlideSummary, SlideTask
from apacs_ray.slides.slide_files import SlideData, SlideFiles
from apacs_ray.slides.slide_tiles import SlideShard, plan_shards
from apacs_ray.stages.ingest_result import (
    Cut,
    listed_masks,
    open_store_file,
    require_clear,
    say_found,
    with_given_splits,
)
from apacs_ray.stages.pipeline import Context
from apacs_ray.storage import Entry, Store
from apacs_ray.synthetic import slide as synthetic

MANIFEST = re.compile(r"manifest/[0-9a-f]{8}/\d{6,}\.(parquet|png)")  # what a run writes there; nothing else is ours
GIB = 1 << 30
NOTES_SHOWN = 5
ENGINES = {"vips": "libvips", "openslide": "OpenSlide"}


def make_smears(context: Context, store: Store) -> None:
    """Render the synthetic smears of this run as slides, those that are not there yet."""
    made = context.settings.synthetic
    specs = synthetic.slide_specs(
        context.settings.run.seed, made.width, made.height, train=made.train_slides, test=made.test_slides, mpp=made.mpp
    )
    render_smears(store, specs)


@dataclass(frozen=True)
class Inspected:
    """Slides that were looked at: how to read them, the listing, and a summary each."""

    task: SlideTask
    found: SlideData
    slides: Sequence[SlideFiles]
    summaries: Sequence[SlideSummary]

    @property
    def good(self) -> list[tuple[int, SlideSummary]]:
        """Slides that open, by their number."""
        return [(number, summary) for number, summary in enumerate(self.summaries) if summary.reject is None]

    @property
    def rejects(self) -> list[Reject]:
        """Slides that were refused."""
        return [*self.found.slide_rejects, *(one.reject for one in self.summaries if one.reject is not None)]

    @property
    def annotation_rejects(self) -> list[Reject]:
        """Annotations that were refused; their slides stay without masks."""
        late = [one.annotation_reject for one in self.summaries if one.annotation_reject is not None]
        return [*self.found.annotation_rejects, *late]

    @property
    def annotations(self) -> int:
        """How many annotations there are, refused ones included."""
        return len(self.found.annotation_rejects) + sum(slide.kind is not None for slide in self.slides)

    @property
    def skipped(self) -> Counter[str]:
        """Tiles that are not worth reading, by reason."""
        total: Counter[str] = Counter()
        for _, summary in self.good:
            total.update(summary.skipped)
        return total

    @property
    def tiles(self) -> int:
        """Tiles to read."""
        return sum(summary.tiles for _, summary in self.good)


def slides_to_cut(
    context: Context, store: Store, entries: Sequence[Entry], mark: str
) -> tuple[SlideTask, SlideData, list[SlideFiles]]:
    """How slides are read, what the listing (`listed_data`) holds, and the slides with their splits.

    No slide is opened yet; of DICOM and VMS the first bytes are read, which tell what belongs together.
    """
    run, settings = context.run, context.settings
    masks, below = listed_masks(context, store)
    found = find_slides(
        entries,
        below,
        slide_regex=settings.data.slide_regex,
        root=store.uri,
        masks_root=masks.uri if masks else "",
        heads=read_heads(store, entries),
        split_given=settings.data.splits is not None,
    )
    say_found(found)
    slides = with_given_splits(found.slides, settings.data.splits)
    _require_splits(context, store, slides, found.slide_rejects)
    cache = SlideCache(Path(settings.data.cache or default_cache()), round(settings.data.cache_gb * GIB))
    mpps = read_mpps(open_store_file(settings.data.mpps))
    require_clear(slides, mpps, "data.mpps")
    return SlideTask(store, masks, run.store, settings.tiles, settings.data, cache, mark, mpps), found, slides


def look_at_slides(context: Context, store: Store, entries: Sequence[Entry], mark: str) -> Inspected:
    """Find every slide and its tissue, and write its manifest."""
    task, found, slides = slides_to_cut(context, store, entries, mark)
    context.ray.start()
    with context.bars() as shown:
        summaries = inspect_slides(task, slides, lambda done: shown.show("slides", done, len(slides)))
    _say_notes(summaries)
    engines = Counter(summary.engine for summary in summaries if summary.reject is None)
    read = ", ".join(f"{count} by {ENGINES[engine]}" for engine, count in sorted(engines.items()))
    say(f"ingest: {len(slides)} slides{f' ({read})' if read else ''}, {sum(s.tiles for s in summaries)} tiles")
    return Inspected(task, found, slides, summaries)


def cut_slides(context: Context, store: Store, entries: Sequence[Entry], mark: str) -> Cut:
    """Inspect every slide, plan the shards over all of them, and write them."""
    run = context.run
    seen = look_at_slides(context, store, entries, mark)
    splits: list[Split] = [summary.slide.split or "train" for _, summary in seen.good]
    shards, val_unit = plan_shards(seen.task, seen.good, splits, context.settings.run.seed)
    with context.bars() as shown:
        receipts = write_slide_shards(
            seen.task, seen.summaries, shards, lambda done: shown.show("tiles", done, seen.tiles)
        )
    units = len(seen.slides) + len(seen.found.slide_rejects)
    facts = {
        "slides": {"listed": units, "used": len(seen.good), "rejected": len(seen.rejects)},
        "annotations": {"listed": seen.annotations, "rejected": len(seen.annotation_rejects)},
        "splits_known": all(slide.split is not None for slide in seen.slides),
        "engines": dict(Counter(summary.engine for _, summary in seen.good)),
        "ignored_files": len(seen.found.ignored),
        "ignored": seen.found.left.counts(),
        "unreadable": _unreadable(seen.summaries, shards, receipts),
    }
    for old in list(run.store.list("manifest")):
        if MANIFEST.fullmatch(old.path) and not old.path.startswith(f"manifest/{mark[:8]}/"):
            run.store.delete(old.path)
    planned = seen.tiles + sum(seen.skipped.values())
    return Cut(
        receipts,
        seen.rejects,
        "slides",
        units,
        planned,
        val_unit,
        dict(seen.skipped),
        facts,
        seen.annotations,
        seen.annotation_rejects,
        _defects(seen),
    )


def _defects(seen: Inspected) -> list[Reject]:
    """A row for each part of an annotation that is no area."""
    return [
        Reject.of(
            BadInput("bad_annotation", defect),
            seen.task.annotation_store(summary.slide).uri_of(summary.slide.annotation[0].path),
            summary.slide.slide_id,
        )
        for summary in seen.summaries
        for defect in summary.defects
    ]


def _require_splits(context: Context, store: Store, slides: Sequence[SlideFiles], rejects: Sequence[Reject]) -> None:
    """Raise UsageError when training would not know which slides to train and test on; without training, say so.

    Where no slide is left the reasons are the rejects, which are written first.
    """
    unknown = [slide.slide_id for slide in slides if slide.split is None]
    if context.training:
        if unknown:
            raise UsageError(
                f"{store.uri}: to train or to test? {len(unknown)} slides say neither, first {unknown[0]!r}: put them "
                "in folders named train, val and test, or name their splits in data.splits"
            )
        for part in ("train", "test"):
            if slides and not any(slide.split == part for slide in slides):
                refused = f"; {len(rejects)} rejected, first {rejects[0].uri}: {rejects[0].reason}" if rejects else ""
                raise UsageError(f"{store.uri}: no {part} slide among {len(slides)}{refused}")
    elif unknown:
        say(f"ingest: no split is known for {len(unknown)} slides (no data.splits, no folder): they become train")


def _say_notes(summaries: Sequence[SlideSummary]) -> None:
    refused = [s for s in summaries if s.annotation_reject is not None]
    notes = [
        f"{one.slide.slide_id}: its annotation is rejected and its tiles have no masks: {one.annotation_reject.reason}"
        for one in refused
        if one.annotation_reject is not None
    ]
    notes += [f"{summary.slide.slide_id}: {note}" for summary in summaries for note in summary.notes]
    notes += [f"{s.slide.slide_id}: {len(s.defects)} annotations are no area" for s in summaries if s.defects]
    for note in notes[:NOTES_SHOWN]:
        say(f"ingest: {note}")
    if len(notes) > NOTES_SHOWN:
        say(f"ingest: {len(notes) - NOTES_SHOWN} more notes of this kind, in the manifests")


def _unreadable(
    summaries: Sequence[SlideSummary], shards: Sequence[SlideShard], receipts: Sequence[Receipt]
) -> dict[str, str]:
    """Slides with tiles that could not be read: slide id -> the share that could."""
    lost: Counter[int] = Counter()
    for shard, receipt in zip(shards, receipts, strict=True):
        lost[shard.slide] += len(receipt.rejects)
    shares = {}
    for number, count in lost.items():
        if count:
            summary = summaries[number]
            shares[summary.slide.slide_id] = f"{1 - count / summary.tiles:.1%}"
            say(f"ingest: {summary.slide.slide_id}: {count} of {summary.tiles} tiles cannot be read")
    return shares
