"""Ingest of the data set's folder layout: images and masks joined by stem."""

from __future__ import annotations

from collections.abc import Sequence

from apacs_ray.console import say
from apacs_ray.data.folders import FolderData, Pair, find_pairs
from apacs_ray.data.image_tiles import ShardTask, plan_tiles
from apacs_ray.distributed.data import probe_pairs, write_shards
from apacs_ray.errors import ApacsError, UsageError
from apacs_ray.stages.ingest_result import Cut, say_found, with_given_splits
from apacs_ray.stages.pipeline import Context
from apacs_ray.storage import Entry, Store


def cut_folder(context: Context, store: Store, entries: Sequence[Entry], mark: str) -> Cut:
    """Probe all pairs, plan their tiles, and write the shards."""
    run, settings = context.run, context.settings
    found = find_pairs(entries, root=store.uri, slide_regex=settings.data.slide_regex)
    say_found(found)
    pairs = with_given_splits(found.pairs, settings.data.splits)
    _require_parts(context, store, found, pairs)
    if found.shared_slides:
        names = ", ".join(sorted(found.shared_slides)[:3])
        say(f"ingest: slides in more than one split, so results leak: {names}")
    if settings.data.slide_regex is None:
        say("ingest: slides unknown: validation by image")
    context.ray.start()
    with context.bars() as shown:
        sources, defective = probe_pairs(
            store, pairs, settings.data.max_pixels, lambda done: shown.show("headers", done, len(pairs))
        )
        manifest = plan_tiles(sources, settings.tiles, settings.data, seed=settings.run.seed)
        task = ShardTask(store, run.store, settings.tiles, settings.data, mark)
        receipts = write_shards(task, manifest.shards, lambda done: shown.show("tiles", done, manifest.tiles))
    if len(sources) + len(defective) != len(pairs):
        raise ApacsError(f"ingest: {len(pairs)} pairs listed, {len(sources)} + {len(defective)} came back (a defect)")
    rejects = [*found.rejects, *defective]
    units = len(pairs) + len(found.rejects)
    facts = {
        "pairs": {"listed": units, "used": len(sources), "rejected": len(rejects)},
        "ignored_files": len(found.ignored),
        "ignored": found.left.counts(),
    }
    return Cut(receipts, rejects, "pairs", units, manifest.tiles, manifest.val_unit, facts=facts)


def _require_parts(context: Context, store: Store, found: FolderData, pairs: Sequence[Pair]) -> None:
    """Raise UsageError when training would have nothing to train on, or nothing to test on.

    Where no pair is left the reasons are the rejects, which are written first.
    """
    for part in ("train", "test") if context.training and pairs else ():
        if not any(pair.split == part for pair in pairs):
            refused = f"; {len(found.rejects)} rejected, first {found.rejects[0].reason}" if found.rejects else ""
            seen = ", ".join(found.folders[:5])
            raise UsageError(f"{store.uri}: no {part} image with a mask of the same stem (found: {seen}{refused})")
