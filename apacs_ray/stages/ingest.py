"""Ingest: images with masks, whole slides, or synthetic smears become tile shards; what is defective becomes a reject.

What the data is decides who cuts it (`ingest_folder`, `ingest_slides`); this module keeps the books.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from apacs_ray.config.settings import Settings
from apacs_ray.data.index_file import INDEX_FILE, index_path
from apacs_ray.data.shards import shard_paths, write_index
from apacs_ray.data.slide_tables import read_table_text
from apacs_ray.errors import ApacsError, UsageError
from apacs_ray.runs.markers import Counts
from apacs_ray.runs.provenance import environment, fingerprint
from apacs_ray.stages.ingest_folder import ingest_folder
from apacs_ray.stages.ingest_result import IngestResult, UnitCounts, WrittenTiles
from apacs_ray.stages.ingest_slides import ingest_slides, make_smears
from apacs_ray.stages.rejects import require_within_limit, write_rejects
from apacs_ray.stages.source import Source, smears_inputs
from apacs_ray.stages.stage import Job, Stage, delete_others
from apacs_ray.storage import Store

REJECTS = re.compile(r"rejects/ingest-[0-9a-f]{8}\.parquet")
SPLITS = ("train", "val", "test")
# the same shard gives the same bytes with the same versions of these
CODECS = ("pillow", "numpy", "pyarrow", "scipy", "pyvips", "openslide-bin", "shapely", "tifffile", "simplejpeg")


@dataclass(frozen=True)
class Ingest(Stage[IngestResult]):
    """Cut the data into tile shards."""

    name: ClassVar[str] = "ingest"
    script: ClassVar[str] = "ingest.py"
    folder: ClassVar[str] = "tiles"
    result_type: ClassVar[type[IngestResult]] = IngestResult

    source: Source

    def fingerprint(self, settings: Settings) -> str:
        """Return the fingerprint of the data's files, of how they are cut, and of the codecs."""
        data: object = smears_inputs(settings)
        if not self.source.is_synthetic:
            if not self.source.listing:
                raise UsageError(f"{self.source.store.uri}: nothing there")
            data = self.source.used
        return fingerprint(
            stage=self.name,
            source=data,
            splits=read_table_text(settings.data.splits),
            mpps=read_table_text(settings.data.mpps),
            data=settings.data.fingerprint_inputs(),
            tiles=settings.tiles.fingerprint_inputs(),
            seed=settings.run.seed,
            codecs={name: environment()["packages"].get(name) for name in CODECS},
        )

    def work(self, job: Job, fingerprint: str) -> IngestResult:
        """Write `tiles/`, `manifest/` and `rejects/`.

        Returns:
            What became of the units and the tiles.

        Raises:
            ApacsError: when no tile is left, or more is rejected than `data.max_rejects` allows.
        """
        if self.source.is_synthetic:
            job.ray.start()
            make_smears(job.settings, self.source.store)
        cut = ingest_folder if self.source.holds_folders else ingest_slides
        written = cut(job, self.source, fingerprint)
        tile_rejects, skipped = written.tile_rejects, written.all_skipped
        rows = {split: written.rows(split) for split in SPLITS}
        counts = Counts(written.tiles, sum(rows.values()), dict(skipped), len(tile_rejects))
        counts.reconcile(self.name)
        rejects = [*written.rejects, *written.annotation_rejects, *tile_rejects, *written.defects]
        table = f"rejects/ingest-{fingerprint[:8]}.parquet"
        write_rejects(job.store, table, rejects)
        delete_others(job.store, "rejects", REJECTS, [table])
        _delete_other_shards(job.store, {receipt.path for receipt in written.receipts})
        rejected = len(written.rejects) + len(written.annotation_rejects) + len(tile_rejects)
        job.ray.metrics.rejects(self.name, rejected)  # before they end the stage
        if not counts.rows_out:
            raise ApacsError(_nothing_left(written, job.store))
        require_within_limit(job, written.unit, len(written.rejects), written.units.listed)
        require_within_limit(job, "annotations", len(written.annotation_rejects), written.annotations)
        require_within_limit(job, "tiles", len(tile_rejects), written.tiles)
        index = {split: write_index(job.store, split, fingerprint, written.of_split(split)) for split in SPLITS}
        delete_others(job.store, "tiles/_index", INDEX_FILE, {index_path(split, fingerprint) for split in SPLITS})
        refused_annotations = len(written.annotation_rejects)
        return IngestResult(
            counts,
            unit=written.unit,
            units=written.units,
            annotations=UnitCounts(written.annotations, written.annotations - refused_annotations, refused_annotations),
            tiles=rows,
            val_unit=written.val_unit,
            shards_reused=sum(receipt.reused for receipt in written.receipts),
            splits_known=written.splits_known,
            engines=dict(written.engines),
            ignored=dict(written.ignored),
            ignored_files=written.ignored_files,
            unreadable=dict(written.unreadable),
            mpp=written.mpp,
            index=index,
        )


def _delete_other_shards(store: Store, current: set[str]) -> None:
    for split in SPLITS:
        for path in shard_paths(store, "tiles", split):
            if path not in current:
                store.delete(path)


def _nothing_left(written: WrittenTiles, store: Store) -> str:
    """Why no tile is left, in one line."""
    reasons = [f"{len(written.rejects)} of {written.units.listed} {written.unit} rejected"]
    if written.tile_rejects:
        reasons.append(f"{len(written.tile_rejects)} tiles rejected")
    skipped = written.all_skipped
    if skipped.total():
        counted = ", ".join(f"{reason} {count}" for reason, count in skipped.items() if count)
        reasons.append(f"{skipped.total()} tiles skipped ({counted})")
    return f"ingest: no tile is left: {', '.join(reasons)}; the reasons are in {store.uri_of('rejects')}"
