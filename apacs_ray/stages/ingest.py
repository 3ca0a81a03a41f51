"""Ingest: images with masks, whole slides, or synthetic smears become tile shards; what is defective becomes a reject.

What the data is decides who cuts it (`ingest_folder`, `ingest_slides`); this module keeps the books.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq

from apacs_ray.console import say
from apacs_ray.data.folders import is_folder_layout
from apacs_ray.data.rejects import Reject
from apacs_ray.data.shards import Receipt, shard_paths
from apacs_ray.distributed.data import REJECT_SCHEMA
from apacs_ray.errors import ApacsError, UsageError
from apacs_ray.runs.run import Counts, environment, fingerprint
from apacs_ray.slides.find import PLAIN, is_slide
from apacs_ray.stages.ingest_result import Cut, listed_data, open_store_file
from apacs_ray.stages.pipeline import Context, Outcome, Stage
from apacs_ray.storage import Entry, Store, open_store
from apacs_ray.synthetic import slide as synthetic

REJECTS = re.compile(r"rejects/ingest-[0-9a-f]{8}\.parquet")
# the same shard gives the same bytes with the same versions of these
CODECS = ("pillow", "numpy", "pyarrow", "scipy", "pyvips", "openslide-bin", "shapely", "tifffile", "simplejpeg")


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
        source = _versions(context.listed(data_store(context)))
        if not source:
            raise UsageError(f"{context.run.data}: nothing there")
    return fingerprint(
        stage="ingest",
        source=source,
        masks=_versions(context.listed(open_store(settings.data.masks))) if settings.data.masks else None,
        splits=open_store_file(settings.data.splits),
        mpps=open_store_file(settings.data.mpps),
        data=settings.data.model_dump(exclude={"max_rejects", "cache", "cache_gb"}),
        tiles=settings.tiles.model_dump(),
        seed=settings.run.seed,
        codecs={name: environment()["packages"].get(name) for name in CODECS},
    )


def _versions(entries: Sequence[Entry]) -> list[tuple[str, int, str]]:
    return sorted((entry.path, entry.size, entry.version) for entry in entries)


def _work(context: Context, mark: str) -> Outcome:
    from apacs_ray.stages.ingest_folder import cut_folder
    from apacs_ray.stages.ingest_slides import cut_slides, make_smears

    run = context.run
    store = data_store(context)
    if run.data is None:
        context.ray.start()
        make_smears(context, store)
    entries = listed_data(context, store)
    cut = (cut_folder if holds_folders(store.uri, entries) else cut_slides)(context, store, entries, mark)
    receipts = cut.receipts
    tile_rejects = [Reject(**reject) for receipt in receipts for reject in receipt.rejects]
    skipped = Counter(cut.skipped)
    for receipt in receipts:
        skipped.update(receipt.skipped)
    rows_out = sum(receipt.rows_out for receipt in receipts)
    counts = Counts(cut.tiles, rows_out, dict(skipped), len(tile_rejects))
    counts.reconcile("ingest")
    _write_rejects(run.store, mark, [*cut.rejects, *cut.annotation_rejects, *tile_rejects, *cut.defects])
    current = {receipt.path for receipt in receipts}
    for split in ("train", "val", "test"):
        for path in shard_paths(run.store, "tiles", split):
            if path not in current:
                run.store.delete(path)
    run.facts |= {
        "val_unit": cut.val_unit,
        "tiles": {split: _rows(receipts, split) for split in ("train", "val", "test")},
        "shards_reused": sum(receipt.reused for receipt in receipts),
        **cut.facts,
    }
    refused = len(cut.rejects) + len(cut.annotation_rejects) + len(tile_rejects)
    context.ray.gauges.rejects("ingest", refused)  # before they end the stage
    if not rows_out:
        raise ApacsError(_nothing_left(cut, len(tile_rejects), skipped, run.store))
    _require_within_limit(cut.unit, len(cut.rejects), cut.units, context)
    _require_within_limit("annotations", len(cut.annotation_rejects), cut.annotations, context)
    _require_within_limit("tiles", len(tile_rejects), cut.tiles, context)
    return Outcome(counts, {"val_unit": cut.val_unit, "rejected_units": len(cut.rejects)})


def holds_folders(uri: str, entries: Sequence[Entry]) -> bool:
    """Whether the data is folders of images and masks (else whole slides). Raises UsageError for both or neither."""
    folders = is_folder_layout(entries)
    suffixes = Counter(entry.path.rpartition(".")[2].lower() for entry in entries if is_slide(entry.path))
    if folders:
        slides = {suffix: count for suffix, count in suffixes.items() if suffix not in PLAIN}
        if slides:
            raise UsageError(
                f"{uri}: holds folders of images and masks, and slides ({_counted(slides)}): give one of them"
            )
        return True
    if not suffixes:
        others = Counter(entry.path.rpartition(".")[2].lower() for entry in entries)
        raise UsageError(
            f"{uri}: neither folders whose names hold train|val|test and input|groundtruth, nor slides "
            f"(found: {_counted(dict(others.most_common(4))) or 'nothing'})"
        )
    return False


def _counted(suffixes: dict[str, int]) -> str:
    return ", ".join(f"{count} .{suffix}" for suffix, count in suffixes.items())


def _rows(receipts: Sequence[Receipt], split: str) -> int:
    return sum(receipt.rows_out for receipt in receipts if f"/split={split}/" in receipt.path)


def _write_rejects(store: Store, mark: str, rejects: Sequence[Reject]) -> None:
    table = pa.Table.from_pylist([asdict(reject) for reject in rejects], REJECT_SCHEMA)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    path = f"rejects/ingest-{mark[:8]}.parquet"
    store.write(path, sink.getvalue())
    for entry in list(store.list("rejects")):
        if REJECTS.fullmatch(entry.path) and entry.path != path:
            store.delete(entry.path)


def _nothing_left(cut: Cut, tile_rejects: int, skipped: Counter[str], store: Store) -> str:
    """Why no tile is left, in one line."""
    why = [f"{len(cut.rejects)} of {cut.units} {cut.unit} rejected"]
    if tile_rejects:
        why.append(f"{tile_rejects} tiles rejected")
    if skipped.total():
        reasons = ", ".join(f"{reason} {count}" for reason, count in skipped.items() if count)
        why.append(f"{skipped.total()} tiles skipped ({reasons})")
    return f"ingest: no tile is left: {', '.join(why)}; the reasons are in {store.uri_of('rejects')}"


def _require_within_limit(unit: str, rejected: int, listed: int, context: Context) -> None:
    """Raise ApacsError when more was rejected than `data.max_rejects` allows."""
    text = context.settings.data.max_rejects
    limit = reject_limit(text, listed)
    if rejected > limit:
        raise ApacsError(
            f"ingest: {rejected} of {listed} {unit} rejected, data.max_rejects ({text}) allows {limit}; "
            f"the reasons are in {context.run.store.uri_of('rejects')}"
        )
    if rejected:
        say(f"ingest: {rejected} of {listed} {unit} rejected; the reasons are in {context.run.store.uri_of('rejects')}")


def reject_limit(text: str, listed: int) -> int:
    """How many of `listed` units `data.max_rejects` lets go: a count, a share, or the larger of 1 % and 5."""
    if text == "default":
        return max(5, listed // 100)
    if text.endswith("%"):
        return int(listed * float(text[:-1]) / 100)
    return int(text)


INGEST = Stage("ingest", "tiles", _fingerprint, _work)
