"""Ingest of whole slides: tissue, grid, annotations and shards; and the synthetic smears, which are slides as well."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from apacs_ray.config.settings import Settings
from apacs_ray.console import say
from apacs_ray.data.rejects import Reject
from apacs_ray.data.shards import Receipt
from apacs_ray.data.slide_tables import read_mpps, read_table_text
from apacs_ray.data.words import Split
from apacs_ray.distributed.data import inspect_slides, render_smears, write_slide_shards
from apacs_ray.errors import BadInput
from apacs_ray.slides.cache import SlideCache
from apacs_ray.slides.manifest import NATIVE_TOLERANCE, SlideSummary, SlideTask
from apacs_ray.slides.open import READERS
from apacs_ray.slides.slide_tiles import SlideShard, plan_shards
from apacs_ray.stages.ingest_result import UnitCounts, WrittenTiles
from apacs_ray.stages.source import Source, require_clear
from apacs_ray.stages.stage import Job
from apacs_ray.storage import Store
from apacs_ray.synthetic import slide as synthetic

MANIFEST = re.compile(r"manifest/[0-9a-f]{8}/\d{6,}\.(parquet|png)")  # what a run writes there; nothing else is ours
NOTES_SHOWN = 5


def make_smears(settings: Settings, store: Store) -> None:
    """Render the synthetic smears of a run as slides, those that are not there yet."""
    sizes = settings.synthetic
    specs = synthetic.slide_specs(
        settings.run.seed,
        sizes.width,
        sizes.height,
        train=sizes.train_slides,
        test=sizes.test_slides,
        mpp=sizes.mpp,
    )
    render_smears(store, specs)


@dataclass(frozen=True)
class InspectedSlides:
    """Slides whose tissue is found and whose manifests are written: how to read them, and a summary each."""

    task: SlideTask
    source: Source
    summaries: Sequence[SlideSummary]

    @property
    def opened(self) -> list[tuple[int, SlideSummary]]:
        """Slides that open, by their number."""
        return [(number, summary) for number, summary in enumerate(self.summaries) if summary.reject is None]

    @property
    def rejects(self) -> list[Reject]:
        """Slides that were refused."""
        late = [summary.reject for summary in self.summaries]
        return [*self.source.slide_data.slide_rejects, *(reject for reject in late if reject is not None)]

    @property
    def annotation_rejects(self) -> list[Reject]:
        """Annotations that were refused; their slides stay without masks."""
        late = [summary.annotation_reject for summary in self.summaries]
        return [*self.source.slide_data.annotation_rejects, *(reject for reject in late if reject is not None)]

    @property
    def annotations(self) -> int:
        """How many annotations there are, refused ones included."""
        rejected = len(self.source.slide_data.annotation_rejects)
        return rejected + sum(slide.kind is not None for slide in self.source.slides)

    @property
    def skipped(self) -> Counter[str]:
        """Tiles that are not worth reading, by reason."""
        total: Counter[str] = Counter()
        for _, summary in self.opened:
            total.update(summary.skipped)
        return total

    @property
    def tiles(self) -> int:
        """Tiles to read."""
        return sum(summary.tiles for _, summary in self.opened)


def slide_task(source: Source, output: Store, fingerprint: str) -> SlideTask:
    """Return how the slides of a source are read and where their tiles go."""
    settings = source.settings
    cache = SlideCache.of(settings.data)
    mpps = read_mpps(read_table_text(settings.data.mpps))
    require_clear(source.slides, mpps, "data.mpps")
    return SlideTask(source.store, source.masks_store, output, settings.tiles, settings.data, cache, fingerprint, mpps)


def look_at_slides(job: Job, source: Source, fingerprint: str) -> InspectedSlides:
    """Open every slide, find its tissue, and write its manifest."""
    slides = source.slides
    unknown = sum(slide.split is None for slide in slides)
    if unknown:
        say(f"ingest: no split is known for {unknown} slides (no data.splits, no folder): they become train")
    task = slide_task(source, job.store, fingerprint)
    job.ray.start()
    with job.progress() as progress:
        summaries = inspect_slides(task, slides, lambda done: progress.show("slides", done, len(slides)))
    _say_notes(summaries)
    engines = Counter(summary.engine for summary in summaries if summary.reject is None)
    names = {reader.engine: reader.name for reader in READERS}
    read = ", ".join(f"{count} by {names[engine]}" for engine, count in sorted(engines.items()))
    say(f"ingest: {len(slides)} slides{f' ({read})' if read else ''}, {sum(s.tiles for s in summaries)} tiles")
    return InspectedSlides(task, source, summaries)


def ingest_slides(job: Job, source: Source, fingerprint: str) -> WrittenTiles:
    """Inspect every slide, plan the shards over all of them, and write them."""
    inspected = look_at_slides(job, source, fingerprint)
    splits: list[Split] = [summary.slide.split or "train" for _, summary in inspected.opened]
    shards, val_unit = plan_shards(inspected.task, inspected.opened, splits, job.settings.run.seed)
    with job.progress() as progress:
        receipts = write_slide_shards(
            inspected.task, inspected.summaries, shards, lambda done: progress.show("tiles", done, inspected.tiles)
        )
    for old in list(job.store.list("manifest")):
        if MANIFEST.fullmatch(old.path) and not old.path.startswith(f"manifest/{fingerprint[:8]}/"):
            job.store.delete(old.path)
    data, rejects = source.slide_data, inspected.rejects
    return WrittenTiles(
        unit="slides",
        units=UnitCounts(len(source.slides) + len(data.slide_rejects), len(inspected.opened), len(rejects)),
        rejects=rejects,
        receipts=receipts,
        tiles=inspected.tiles + sum(inspected.skipped.values()),
        val_unit=val_unit,
        skipped=dict(inspected.skipped),
        annotations=inspected.annotations,
        annotation_rejects=inspected.annotation_rejects,
        defects=_defects(inspected),
        splits_known=all(slide.split is not None for slide in source.slides),
        engines=dict(Counter(summary.engine for _, summary in inspected.opened)),
        ignored=data.left.counts(),
        ignored_files=len(data.ignored),
        unreadable=_unreadable(inspected.summaries, shards, receipts),
        mpp=common_mpp([summary for _, summary in inspected.opened if summary.tiles]),
    )


def common_mpp(summaries: Sequence[SlideSummary]) -> float | None:
    """Return the um per px of the tiles of all slides; None where it is not known, or not the same for all."""
    mpps = [None if summary.mpp is None else summary.mpp * summary.downsample for summary in summaries]
    known = sorted(mpp for mpp in mpps if mpp is not None)
    if not known or len(known) < len(mpps) or known[-1] > (1 + 2 * NATIVE_TOLERANCE) * known[0]:
        return None
    return known[len(known) // 2]


def _defects(inspected: InspectedSlides) -> list[Reject]:
    """A row for each part of an annotation that is no area."""
    return [
        Reject.of(
            BadInput("bad_annotation", defect),
            inspected.task.annotation_store(summary.slide).uri_of(summary.slide.annotation[0].path),
            summary.slide.slide_id,
        )
        for summary in inspected.summaries
        for defect in summary.defects
    ]


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
