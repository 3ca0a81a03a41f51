"""Ingest of the data set's folder layout: images and masks joined by stem."""

from __future__ import annotations

from apacs_ray.console import say
from apacs_ray.data.image_tiles import ShardTask, plan_tiles
from apacs_ray.distributed.data import probe_pairs, write_shards
from apacs_ray.errors import ApacsError
from apacs_ray.stages.ingest_result import UnitCounts, WrittenTiles
from apacs_ray.stages.source import Source
from apacs_ray.stages.stage import Job


def ingest_folder(job: Job, source: Source, fingerprint: str) -> WrittenTiles:
    """Probe all pairs, plan their tiles, and write the shards."""
    settings, store = job.settings, source.store
    data, pairs = source.folder_data, source.pairs
    if data.shared_slides:
        names = ", ".join(sorted(data.shared_slides)[:3])
        say(f"ingest: slides in more than one split, so results leak: {names}")
    if settings.data.slide_regex is None:
        say("ingest: slides unknown: validation by image")
    job.ray.start()
    with job.progress() as progress:
        sources, defective = probe_pairs(
            store, pairs, settings.data.max_pixels, lambda done: progress.show("headers", done, len(pairs))
        )
        manifest = plan_tiles(sources, settings.tiles, settings.data, seed=settings.run.seed)
        task = ShardTask(store, job.store, settings.tiles, settings.data, fingerprint)
        receipts = write_shards(task, manifest.shards, lambda done: progress.show("tiles", done, manifest.tiles))
    if len(sources) + len(defective) != len(pairs):
        raise ApacsError(f"ingest: {len(pairs)} pairs listed, {len(sources)} + {len(defective)} came back (a defect)")
    rejects = [*data.rejects, *defective]
    return WrittenTiles(
        unit="pairs",
        units=UnitCounts(len(pairs) + len(data.rejects), len(sources), len(rejects)),
        rejects=rejects,
        receipts=receipts,
        tiles=manifest.tiles,
        val_unit=manifest.val_unit,
        ignored=data.left.counts(),
        ignored_files=len(data.ignored),
        mpp=settings.data.mpp,
    )
