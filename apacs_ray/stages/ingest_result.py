"""What ingest makes: tiles of one kind of data as they are written, and the result that the commit marker holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from apacs_ray.data.index_file import index_path
from apacs_ray.data.rejects import Reject
from apacs_ray.data.shards import Receipt, TileIndex, read_index
from apacs_ray.runs.markers import read_marker
from apacs_ray.stages.stage import StageResult
from apacs_ray.storage import Store


@dataclass(frozen=True)
class UnitCounts:
    """What became of the units of an input: listed = used + rejected."""

    listed: int
    used: int
    rejected: int


@dataclass(frozen=True)
class WrittenTiles:
    """Shards of pairs or of slides that are written, and what was refused before there were tiles.

    Attributes:
        unit: What the units are.
        units: How many there are.
        rejects: A row for each unit that is refused.
        receipts: Of the shards.
        tiles: How many were planned, with those that were skipped before a shard was written.
        val_unit: What is drawn for validation: slide, image or tile.
        skipped: Tiles that were skipped before a shard was written, by reason.
        annotations: How many there are; those that are refused leave their slides without masks.
        annotation_rejects: A row for each of these.
        defects: Parts of inputs, such as one polygon: rows among the rejects that count as no unit.
        splits_known: Whether every slide says its split.
        engines: How many slides each engine reads.
        ignored: Files that belong to nothing, by kind.
        ignored_files: How many these are.
        unreadable: Slides with tiles that could not be read: slide id -> the share that could.
        mpp: um per px of the tiles; None where it is not known, or not the same for all.
    """

    unit: Literal["pairs", "slides"]
    units: UnitCounts
    rejects: Sequence[Reject]
    receipts: Sequence[Receipt]
    tiles: int
    val_unit: str
    skipped: Mapping[str, int] = field(default_factory=dict)
    annotations: int = 0
    annotation_rejects: Sequence[Reject] = ()
    defects: Sequence[Reject] = ()
    splits_known: bool = True
    engines: Mapping[str, int] = field(default_factory=dict)
    ignored: Mapping[str, int] = field(default_factory=dict)
    ignored_files: int = 0
    unreadable: Mapping[str, str] = field(default_factory=dict)
    mpp: float | None = None

    @property
    def tile_rejects(self) -> list[Reject]:
        """Tiles that could not be read."""
        return [Reject(**reject) for receipt in self.receipts for reject in receipt.rejects]

    @property
    def all_skipped(self) -> Counter[str]:
        """Tiles that were skipped, by reason, before a shard was written or then."""
        skipped = Counter(self.skipped)
        for receipt in self.receipts:
            skipped.update(receipt.skipped)
        return skipped

    def of_split(self, split: str) -> list[Receipt]:
        """Return the receipts of a split's shards."""
        return [receipt for receipt in self.receipts if f"/split={split}/" in receipt.path]

    def rows(self, split: str) -> int:
        """Return how many tiles a split has."""
        return sum(receipt.rows_out for receipt in self.of_split(split))


@dataclass(frozen=True)
class IngestResult(StageResult):
    """Tiles as they are committed.

    `tiles` are rows by split, `index` is the hash of each split's index; the other fields are those of `WrittenTiles`.
    """

    unit: Literal["pairs", "slides"]
    units: UnitCounts
    annotations: UnitCounts
    tiles: dict[str, int]
    val_unit: str
    shards_reused: int
    splits_known: bool
    engines: dict[str, int]
    ignored: dict[str, int]
    ignored_files: int
    unreadable: dict[str, str]
    mpp: float | None = None
    index: dict[str, str] = field(default_factory=dict)  # empty in older runs


def read_committed_index(store: Store, split: str) -> TileIndex:
    """Return the index of a committed split, by its file where the run has one."""
    marker = read_marker(store, "tiles")
    sha256 = marker.result.get("index", {}).get(split) if marker is not None else None
    committed = (index_path(split, marker.fingerprint), sha256) if marker is not None and sha256 else None
    return read_index(store, split, committed=committed)
