"""Tile shards of images with masks: the plan (metadata only), and the writing of one shard.

The plan assigns every tile to a shard before any pixel is read. Tiles of one source lie next to each other, so that a
shard decodes each of its sources once.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from apacs_ray.config.settings import DataSettings, TilesSettings
from apacs_ray.data.folders import Pair
from apacs_ray.data.grid import Box, grid
from apacs_ray.data.image_header import probe_image
from apacs_ray.data.images import decode_image
from apacs_ray.data.masks import decode_mask, probe_mask
from apacs_ray.data.quality import measure
from apacs_ray.data.rejects import Reject
from apacs_ray.data.shards import Receipt, read_finished, shard_path, write_tiles
from apacs_ray.data.splits import assign_val
from apacs_ray.data.tile_rows import TILE_SCHEMA, TilePixels, TilePlace, tile_id, tile_row
from apacs_ray.data.units import one_unit
from apacs_ray.errors import BadInput
from apacs_ray.storage import Entry, Store

BYTES_PER_PIXEL = 8  # at most: four channels of 16 bits, not compressed
METADATA_BYTES = 64 << 20  # color profiles and what else scanners write into a file


@dataclass(frozen=True)
class Source:
    """A pair whose headers were read: its size at level 0, px."""

    pair: Pair
    width: int
    height: int


def probe_pair(store: Store, pair: Pair, max_pixels: int) -> Source | Reject:
    """Read the headers of an image and its mask; a defect is returned as a Reject that names the file it is in."""
    culprit = pair.image
    try:
        with one_unit(pair.image.path):  # from memory, so that an error is the file's and never the store's
            width, height = probe_image(io.BytesIO(_content(store, pair.image, max_pixels)), max_pixels)
        culprit = pair.mask
        with one_unit(pair.mask.path):
            mask_width, mask_height = probe_mask(_content(store, pair.mask, max_pixels), max_pixels)
        if (width, height) != (mask_width, mask_height):
            raise BadInput(
                "size_mismatch",
                f"the mask {pair.mask.path} has {mask_width} x {mask_height} px, "
                f"its image {pair.image.path} {width} x {height} px",
            )
    except BadInput as defect:
        return Reject.of(defect, store.uri_of(culprit.path), pair.slide_id)
    return Source(pair, width, height)


def _content(store: Store, entry: Entry, max_pixels: int) -> bytes:
    if entry.size == 0:
        raise BadInput("empty_file", f"{entry.path} has no bytes")
    if entry.size > BYTES_PER_PIXEL * max_pixels + METADATA_BYTES:
        raise BadInput("too_large", f"{entry.path}: {entry.size} bytes, more than data.max_pixels can need")
    return store.read(entry.path)


MANIFEST_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("shard", pa.int32()),
        ("image", pa.string()),
        ("mask", pa.string()),
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
        ("source_version", pa.string()),
        ("tile_id", pa.string()),
        ("slide_id", pa.string()),
        ("x", pa.int64()),
        ("y", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Manifest:
    """Every tile of a data set, each assigned to a shard: one table a shard."""

    shards: list[pa.Table]
    val_unit: str
    tiles: int


def plan_tiles(sources: Sequence[Source], tiles: TilesSettings, data: DataSettings, *, seed: int) -> Manifest:
    """Cut sources into tiles, choose the val part, and fill the shards of each split in order."""
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "test": []}
    ordered = sorted(sources, key=lambda source: (source.pair.split, source.pair.slide_id, source.pair.image.path))
    for source in ordered:
        rows[source.pair.split].extend(manifest_rows(source, tiles))
    val_unit = "given"
    if not rows["val"]:
        known = data.slide_regex is not None
        rows["train"], rows["val"], val_unit = _split_off_val(rows["train"], data.val_fraction, seed, known)
    shards = []
    for split, part in rows.items():
        for number, start in enumerate(range(0, len(part), tiles.shard)):
            chunk = [{**row, "split": split, "shard": number} for row in part[start : start + tiles.shard]]
            shards.append(pa.Table.from_pylist(chunk, MANIFEST_SCHEMA))
    return Manifest(shards, val_unit, sum(len(part) for part in rows.values()))


def manifest_rows(source: Source, tiles: TilesSettings) -> list[dict[str, Any]]:
    """Return the tiles of one source, as rows of the manifest that have no split and shard yet."""
    pair = source.pair
    common = {
        "image": pair.image.path,
        "mask": pair.mask.path,
        "source_width": source.width,
        "source_height": source.height,
        "source_version": f"{pair.image.version}+{pair.mask.version}",
        "slide_id": pair.slide_id,
    }
    boxes = grid(source.width, source.height, tiles.size, tiles.stride or tiles.size, tiles.last)
    return [{**common, **asdict(box), "tile_id": tile_id(pair.image_id, box.x, box.y)} for box in boxes]


def _split_off_val(
    rows: list[dict[str, Any]], fraction: float, seed: int, slides_known: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    chosen, unit = assign_val(rows, fraction, seed, slides_known=slides_known)
    train = [row for row, is_val in zip(rows, chosen, strict=True) if not is_val]
    val = [row for row, is_val in zip(rows, chosen, strict=True) if is_val]
    return train, val, unit


@dataclass(frozen=True)
class ShardTask:
    """The settings and stores that all shards of an ingest have in common."""

    data: Store
    output: Store
    tiles: TilesSettings
    settings: DataSettings
    fingerprint: str


def write_shard(task: ShardTask, plan: pa.Table) -> Receipt:
    """Write one shard: decode, cut, measure and encode its tiles; a finished shard is left as it is."""
    rows = plan.to_pylist()
    path = shard_path("tiles", rows[0]["split"], task.fingerprint, rows[0]["shard"])
    finished = read_finished(task.output, path)
    if finished is not None:
        return finished
    tiles: list[dict[str, Any]] = []
    skipped: dict[str, int] = {}
    rejects: list[dict[str, Any]] = []
    pixels = _Pixels(task)
    for row in rows:
        try:
            rgb, mask = pixels.cut(row)
            pixels.culprit = row["image"]
            with one_unit(row["tile_id"], again=True):
                tile = _measured(task, row, rgb, mask)
        except BadInput as defect:
            uri = task.data.uri_of(pixels.culprit)
            rejects.append(asdict(Reject.of(defect, uri, row["slide_id"], row["x"], row["y"])))
            continue
        if tile is None:
            skipped["background"] = skipped.get("background", 0) + 1
        else:
            tiles.append(tile)
    return write_tiles(
        task.output, pa.Table.from_pylist(tiles, TILE_SCHEMA), Receipt(path, len(rows), len(tiles), skipped, rejects)
    )


class _Pixels:
    """The decoded source of the current tile: tiles of a source follow each other, so one is enough."""

    def __init__(self, task: ShardTask) -> None:
        self.culprit = ""  # the file that the last BadInput is about
        self._task = task
        self._path: str | None = None
        self._decoded: tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]] | BadInput

    def cut(self, row: dict[str, Any]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Return RGB (H, W, 3) and mask (H, W) of a tile. Raises BadInput when its source is defective."""
        if row["image"] != self._path:
            self._path = row["image"]
            try:
                self._decoded = self._decode(row)
            except BadInput as defect:
                self._decoded = defect
        if isinstance(self._decoded, BadInput):
            raise self._decoded
        rgb, mask = self._decoded
        box = np.s_[row["y"] : row["y"] + row["height"], row["x"] : row["x"] + row["width"]]
        return rgb[box], mask[box]

    def _decode(self, row: dict[str, Any]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        data, settings = self._task.data, self._task.settings
        self.culprit = row["image"]
        with one_unit(row["image"], again=True):
            rgb = decode_image(data.read(row["image"]), settings.max_pixels)
            _require_size(rgb.shape[:2], row)
        self.culprit = row["mask"]
        with one_unit(row["mask"], again=True):
            mask = decode_mask(data.read(row["mask"]), settings.max_pixels, settings.mask_threshold)
            _require_size(mask.shape, row)
        return rgb, mask


def _require_size(shape: tuple[int, ...], row: dict[str, Any]) -> None:
    height, width = shape
    if (width, height) != (row["source_width"], row["source_height"]):
        stated = f"{row['source_width']} x {row['source_height']}"
        raise BadInput("size_mismatch", f"its pixels are {width} x {height}, its header said {stated}")


def _measured(
    task: ShardTask, row: dict[str, Any], rgb: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]
) -> dict[str, Any] | None:
    """Return the row of a tile; None for one of too little tissue."""
    tissue, focus = measure(rgb)
    if tissue < (task.tiles.min_tissue or 0.0):
        return None
    place = TilePlace(
        row["tile_id"],
        row["slide_id"],
        row["x"],
        row["y"],
        Box(row["x"], row["y"], row["width"], row["height"]),
        row["source_width"],
        row["source_height"],
        task.data.uri_of(row["image"]),
        row["source_version"],
        mpp=task.settings.mpp,
    )
    return tile_row(place, TilePixels(rgb, mask, tissue, focus), task.tiles)
