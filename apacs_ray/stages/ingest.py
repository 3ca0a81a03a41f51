"""Ingest: images and masks (or synthetic smears) become tile shards; what is defective becomes a reject."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, replace

import pyarrow as pa
import pyarrow.parquet as pq

from apacs_ray.adapters.ingest import REJECT_SCHEMA, probe_pairs, render_smears, write_shards
from apacs_ray.console import bars, say
from apacs_ray.data import synthetic
from apacs_ray.data.folder import FolderData, Pair, Reject, find_pairs
from apacs_ray.data.ingest import ShardTask, plan_tiles
from apacs_ray.data.shards import Receipt, shard_paths
from apacs_ray.data.splits import read_splits
from apacs_ray.errors import ApacsError, UsageError
from apacs_ray.run import Counts, environment, fingerprint
from apacs_ray.settings import Settings
from apacs_ray.stages.pipeline import Context, Outcome, Stage
from apacs_ray.storage import Store, open_store

CODECS = (
    "pillow",
    "numpy",
    "pyarrow",
    "scipy",
)  # the same shard gives the same bytes with the same versions of these


def data_store(context: Context) -> Store:
    """Where the source images are: `--data`, or the synthetic smears of this run."""
    if context.run.data is not None:
        return open_store(context.run.data)
    return context.run.store.child(f"synthetic/{fingerprint(**_smears(context))[:8]}")


def _smears(context: Context) -> dict[str, object]:
    """What the synthetic smears depend on."""
    settings = context.settings
    return {
        "smears": settings.synthetic.model_dump(),
        "version": synthetic.VERSION,
        "seed": settings.run.seed,
    }


def _fingerprint(context: Context) -> str:
    settings = context.settings
    if context.run.data is None:
        source: object = _smears(context)
    else:
        source = sorted((entry.path, entry.size, entry.version) for entry in data_store(context).list())
        if not source:
            raise UsageError(f"{context.run.data}: nothing there")
    splits = open_store_file(settings.data.splits)
    return fingerprint(
        stage="ingest",
        source=source,
        splits=splits,
        data=settings.data.model_dump(exclude={"max_rejects"}),
        tiles=settings.tiles.model_dump(),
        seed=settings.run.seed,
        codecs={name: environment()["packages"][name] for name in CODECS},
    )


def open_store_file(uri: str | None) -> str | None:
    """The text of a small file at a URI. Raises UsageError when it is not there."""
    if uri is None:
        return None
    folder, _, name = uri.rpartition("/")
    try:
        return open_store(folder or ".").read(name).decode("utf-8-sig")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise UsageError(f"{uri}: no such text file") from error


def _work(context: Context, mark: str) -> Outcome:
    run, settings = context.run, context.settings
    store = data_store(context)
    if run.data is None:
        context.ray.start()
        render_smears(store, _specs(settings))
    found = find_pairs(store.list(), root=store.uri, slide_regex=settings.data.slide_regex)
    pairs = _with_given_splits(found.pairs, open_store_file(settings.data.splits))
    _require_parts(store, found, pairs)
    if found.shared_slides:
        names = ", ".join(sorted(found.shared_slides)[:3])
        say(f"ingest: slides in more than one split, so results leak: {names}")
    if settings.data.slide_regex is None:
        say("ingest: slides unknown: validation by image")
    context.ray.start()
    with bars() as shown:
        sources, defective = probe_pairs(
            store, pairs, settings.data.max_pixels, lambda done: shown.show("headers", done, len(pairs))
        )
        manifest = plan_tiles(sources, settings.tiles, settings.data, seed=settings.run.seed)
        task = ShardTask(store, run.store, settings.tiles, settings.data, mark)
        receipts = write_shards(task, manifest.shards, lambda done: shown.show("tiles", done, manifest.tiles))
    pair_rejects = [*found.rejects, *defective]
    tile_rejects = [Reject(**reject) for receipt in receipts for reject in receipt.rejects]
    if len(sources) + len(defective) != len(pairs):
        raise ApacsError(f"ingest: {len(pairs)} pairs listed, {len(sources)} + {len(defective)} came back (a defect)")
    rows_out = sum(receipt.rows_out for receipt in receipts)
    skipped: dict[str, int] = {}
    for receipt in receipts:
        for reason, count in receipt.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    counts = Counts(manifest.tiles, rows_out, skipped, len(tile_rejects))
    counts.reconcile("ingest")
    _write_rejects(run.store, mark, [*pair_rejects, *tile_rejects])
    current = {receipt.path for receipt in receipts}
    for split in ("train", "val", "test"):
        for path in shard_paths(run.store, "tiles", split):
            if path not in current:
                run.store.delete(path)
    run.facts |= {
        "val_unit": manifest.val_unit,
        "tiles": {split: _rows(receipts, split) for split in ("train", "val", "test")},
        "pairs": {
            "listed": len(pairs) + len(found.rejects),
            "used": len(sources),
            "rejected": len(pair_rejects),
        },
        "ignored_files": len(found.ignored),
        "shards_reused": sum(receipt.reused for receipt in receipts),
    }
    _require_within_limit("pairs", len(pair_rejects), len(pairs) + len(found.rejects), context)
    _require_within_limit("tiles", len(tile_rejects), manifest.tiles, context)
    return Outcome(counts, {"val_unit": manifest.val_unit, "pair_rejects": len(pair_rejects)})


def _specs(settings: Settings) -> list[synthetic.SlideSpec]:
    made = settings.synthetic
    return synthetic.slide_specs(
        settings.run.seed, made.width, made.height, train=made.train_slides, test=made.test_slides
    )


def _with_given_splits(pairs: Sequence[Pair], table: str | None) -> list[Pair]:
    """Pairs with the split that `data.splits` gives their slide, where there is such a file."""
    if table is None:
        return list(pairs)
    given = read_splits(table)
    missing = sorted({pair.slide_id for pair in pairs} - set(given))
    if missing:
        raise UsageError(f"data.splits: {len(missing)} slides have no line there, first {missing[0]!r}")
    return [replace(pair, split=given[pair.slide_id]) for pair in pairs]


def _require_parts(store: Store, found: FolderData, pairs: Sequence[Pair]) -> None:
    """Raise UsageError unless there is something to train on and something to test on."""
    for part in ("train", "test"):
        if not any(pair.split == part for pair in pairs):
            seen = ", ".join(found.folders) or "no folder whose name holds train|val|test and input|groundtruth"
            raise UsageError(
                f"{store.uri}: no {part} image with a mask of the same stem (found: {seen}; "
                f"{len(found.rejects)} files rejected)"
            )


def _rows(receipts: Sequence[Receipt], split: str) -> int:
    return sum(receipt.rows_out for receipt in receipts if f"/split={split}/" in receipt.path)


def _write_rejects(store: Store, mark: str, rejects: Sequence[Reject]) -> None:
    table = pa.Table.from_pylist([asdict(reject) for reject in rejects], REJECT_SCHEMA)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    path = f"rejects/ingest-{mark[:8]}.parquet"
    store.write(path, sink.getvalue())
    for entry in list(store.list("rejects")):
        if entry.path.startswith("rejects/ingest-") and entry.path != path:
            store.delete(entry.path)


def _require_within_limit(unit: str, rejected: int, listed: int, context: Context) -> None:
    """Raise ApacsError when more was rejected than `data.max_rejects` allows."""
    text = context.settings.data.max_rejects
    limit = reject_limit(text, listed)
    if rejected > limit:
        raise ApacsError(
            f"ingest: {rejected} of {listed} {unit} rejected, data.max_rejects ({text}) allows {limit}; "
            f"the reasons are in {context.run.store.uri_of('rejects')}"
        )


def reject_limit(text: str, listed: int) -> int:
    """How many of `listed` units `data.max_rejects` lets go: a count, a share, or the larger of 1 % and 5."""
    if text == "default":
        return max(5, listed // 100)
    if text.endswith("%"):
        return int(listed * float(text[:-1]) / 100)
    return int(text)


INGEST = Stage("ingest", "tiles", _fingerprint, _work)
