"""From a slide to the tiles that are worth reading: metadata only, one manifest a slide.

A manifest is a small Parquet file in the run, `manifest/<fingerprint>/<number>.parquet`, with a row for each tile to
read; its footer holds what the slide is and why other tiles were skipped. Shards then name ranges of its rows.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from apacs_ray.config.settings import DataSettings, TilesSettings
from apacs_ray.data.folders import Reject
from apacs_ray.data.shards import open_table
from apacs_ray.data.tiles import Box, grid, tile_id
from apacs_ray.data.units import one_unit
from apacs_ray.errors import BadInput
from apacs_ray.slides.cache import SlideCache
from apacs_ray.slides.find import SlideFiles, fov_origin
from apacs_ray.slides.mask_sources import MaskSource, open_masks
from apacs_ray.slides.open import open_slide
from apacs_ray.slides.preview import picture_of
from apacs_ray.slides.reader import Slide, SlideInfo
from apacs_ray.slides.tissue import ASSUMED_MPP, SkipReason, Tissue, find_tissue
from apacs_ray.storage import Entry, Store

MIN_TISSUE = 0.02  # share of a tile that must be tissue, unless tiles.min_tissue says otherwise
NATIVE = 0.01  # a wanted mpp this close to the slide's own means the slide's own: nothing is resampled
NO_MASK = "no_mask"  # of a picture beside a slide that is none of its masks: nothing is wrong with it
FOOTER = b"apacs_ray.slide"
MANIFEST_SCHEMA = pa.schema(
    [
        ("tile_id", pa.string()),
        ("x", pa.int64()),  # level-0 px
        ("y", pa.int64()),
        ("column", pa.int64()),  # the same place in the grid's own px, from the slide's bounds on
        ("row", pa.int64()),
        ("width", pa.int32()),  # tile px
        ("height", pa.int32()),
        ("tissue_fraction", pa.float64()),  # 0..1, by the slide's tissue mask: what decided
    ]
)


@dataclass(frozen=True)
class SlideSummary:
    """What became of one slide before any tile was read."""

    slide: SlideFiles
    engine: str = ""
    mpp: float | None = None  # um per level-0 px
    downsample: float = 1.0  # level-0 px per tile px
    grid_width: int = 0  # tile px
    grid_height: int = 0
    tiles: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a person should know
    defects: tuple[str, ...] = ()  # parts of its annotation that are no area
    reject: Reject | None = None  # of the slide
    annotation_reject: Reject | None = None  # of its annotation
    annotated: bool = False  # whether its tiles have masks
    mask_rules: tuple[int, ...] = ()  # which values of its mask images are cells, `MaskSource.rules`

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SlideSummary:
        tree = json.loads(text)
        files = tree["slide"]
        slide = SlideFiles(
            **{
                **files,
                "files": tuple(Entry(**entry) for entry in files["files"]),
                "annotation": tuple(Entry(**entry) for entry in files["annotation"]),
            }
        )
        rejects = {
            name: None if tree[name] is None else Reject(**tree[name]) for name in ("reject", "annotation_reject")
        }
        return cls(
            **{
                **tree,
                "slide": slide,
                **rejects,
                "notes": tuple(tree["notes"]),
                "defects": tuple(tree["defects"]),
                "mask_rules": tuple(tree["mask_rules"]),
            }
        )


@dataclass(frozen=True)
class SlideTask:
    """What the inspection of every slide has in common."""

    data: Store
    masks: Store | None
    output: Store
    tiles: TilesSettings
    settings: DataSettings
    cache: SlideCache
    fingerprint: str
    mpps: dict[str, float] = field(default_factory=dict)  # of `data.mpps`, by slide id

    def manifest_path(self, number: int) -> str:
        return f"manifest/{self.fingerprint[:8]}/{number:06d}.parquet"

    def annotation_store(self, slide: SlideFiles) -> Store:
        """Where the annotation of a slide lies."""
        return self.masks if self.masks and slide.annotation_in == "masks" else self.data


def inspect_slide(task: SlideTask, number: int, slide: SlideFiles) -> SlideSummary:
    """Find a slide's tissue and write its manifest; a manifest that is there already is left as it is.

    A slide that does not open is a summary with its reject, and no manifest. An annotation that cannot be used is a
    reject as well; its slide stays, and its tiles have no masks.
    """
    path = task.manifest_path(number)
    if task.output.version(path) is not None:
        with task.output.open(path) as stream:
            summary = SlideSummary.from_json(pq.read_metadata(stream).metadata[FOOTER].decode())
        return replace(summary, slide=slide)  # which files are read, the data says
    try:
        with one_unit(slide.path), opened(task, slide) as opened_slide:
            info = opened_slide.info
            tissue = find_tissue(opened_slide, mpp_of(task, slide, info))
            rows, summary = plan_slide(task, slide, info, tissue)
            tiles = tiles_of(task.tiles, info, tissue, summary.downsample, summary.mpp)
            picture = picture_of(tissue, info.bounds, [(tile.area, tile.skipped) for tile in tiles])
            summary = _with_annotation(task, summary, info)
    except BadInput as defect:
        return SlideSummary(slide, reject=Reject.of(defect, task.data.uri_of(slide.path), slide.slide_id))
    task.output.write(path.replace(".parquet", ".png"), picture)
    table = pa.Table.from_pylist(rows, MANIFEST_SCHEMA.with_metadata({FOOTER: summary.to_json().encode()}))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    task.output.write(path, sink.getvalue())
    return summary


def _with_annotation(task: SlideTask, summary: SlideSummary, info: SlideInfo) -> SlideSummary:
    """The summary with what its slide's annotation turned out to be."""
    slide = summary.slide
    if slide.kind is None:
        return summary
    first = slide.annotation[0].path
    try:
        with one_unit(first), opened_masks(task, slide, info) as masks:
            return replace(summary, annotated=True, defects=tuple(masks.defects), mask_rules=masks.rules)
    except BadInput as defect:
        if defect.code == NO_MASK:
            return replace(summary, notes=(*summary.notes, defect.reason))
        uri = task.annotation_store(slide).uri_of(first)
        return replace(summary, annotation_reject=Reject.of(defect, uri, slide.slide_id))


@contextlib.contextmanager
def opened(task: SlideTask, slide: SlideFiles) -> Iterator[Slide]:
    """The slide, staged if need be, while it is in use."""
    with task.cache.staged(task.data, slide.files) as folder:
        reader = open_slide(folder / slide.path, task.settings.engine, task.settings.plane)
        try:
            yield reader
        finally:
            reader.close()


@contextlib.contextmanager
def opened_masks(
    task: SlideTask, slide: SlideFiles, info: SlideInfo, rules: Sequence[int] = ()
) -> Iterator[MaskSource]:
    """The masks of an annotated slide, staged if need be, while they are in use; `rules` are those of its summary."""
    settings = task.settings
    assert slide.kind is not None
    bounds = info.bounds.x, info.bounds.y
    with task.cache.staged(task.annotation_store(slide), slide.annotation) as beside:
        files = [
            (beside / entry.path, *(fov_origin(entry, bounds) if slide.kind == "fovs" else (0, 0)))
            for entry in slide.annotation
        ]
        yield open_masks(
            slide.kind,
            files,
            info,
            classes=settings.mask_classes,
            threshold=settings.mask_threshold,
            max_pixels=settings.max_pixels,
            doubtful=slide.doubtful,
            rules=rules,
        )


def mpp_of(task: SlideTask, slide: SlideFiles, info: SlideInfo) -> float | None:
    """um per level-0 px: what `data.mpps` says of this slide, what the slide says, what `data.mpp` says of all."""
    return task.mpps.get(slide.slide_id) or info.mpp or task.settings.mpp


def plan_slide(
    task: SlideTask, slide: SlideFiles, info: SlideInfo, tissue: Tissue
) -> tuple[list[dict[str, Any]], SlideSummary]:
    """The tiles of a slide that hold tissue, as manifest rows in reading order, and the slide's summary."""
    tiles = task.tiles
    mpp = mpp_of(task, slide, info)
    notes = [*info.notes]
    if mpp is None:
        kept = ", tiles.mpp is not kept" if tiles.mpp else ""
        notes.append(f"no mpp: cut at native resolution{kept}, tissue is looked for as at {ASSUMED_MPP} um/px")
    downsample = tiles.mpp / mpp if tiles.mpp and mpp else 1.0
    if abs(downsample - 1) < NATIVE:
        downsample = 1.0
    rows: list[dict[str, Any]] = []
    skipped: Counter[str] = Counter()
    for tile in tiles_of(tiles, info, tissue, downsample, mpp):
        if tile.skipped is not None:
            skipped[tile.skipped] += 1
            continue
        x, y, box = tile.area.x, tile.area.y, tile.box
        place = {"tile_id": tile_id(slide.image_id, x, y), "x": x, "y": y, "column": box.x, "row": box.y}
        rows.append({**place, "width": box.width, "height": box.height, "tissue_fraction": tile.tissue})
    width, height = grid_size(info.bounds, downsample)
    summary = SlideSummary(slide, info.engine, mpp, downsample, width, height, len(rows), dict(skipped), tuple(notes))
    return rows, summary


@dataclass(frozen=True)
class TilePlan:
    """One tile of a slide: its `box` in the grid's px, its `area` in level-0 px (whole px), the share (0..1) of it
    that is tissue, and why it is skipped (None: it is kept)."""

    box: Box
    area: Box
    tissue: float
    skipped: SkipReason | None


def grid_size(bounds: Box, downsample: float) -> tuple[int, int]:
    """Width and height of a slide's grid, tile px."""
    return max(1, int(bounds.width / downsample)), max(1, int(bounds.height / downsample))


def tiles_of(
    tiles: TilesSettings, info: SlideInfo, tissue: Tissue, downsample: float, mpp: float | None
) -> Iterator[TilePlan]:
    """Every tile of a slide, in reading order."""
    share = MIN_TISSUE if tiles.min_tissue is None else tiles.min_tissue
    px_um2 = ((mpp or ASSUMED_MPP) * downsample) ** 2
    width, height = grid_size(info.bounds, downsample)
    for box in grid(width, height, tiles.size, tiles.stride or tiles.size, tiles.last):
        x, y = level0(info.bounds, box, downsample)
        wide, high = box.width * downsample, box.height * downsample
        least = min(share, tiles.min_tissue_um2 / (box.width * box.height * px_um2))  # a share, or an area as one
        found, skipped = tissue.judge(Box(x, y, 0, 0), wide, high, least)
        yield TilePlan(box, Box(x, y, round(wide), round(high)), found, skipped)


def level0(bounds: Box, box: Box, downsample: float) -> tuple[int, int]:
    """Level-0 px where a tile begins: whole, so that a tile's row in the table says exactly where its pixels are."""
    return bounds.x + round(box.x * downsample), bounds.y + round(box.y * downsample)


def qupath_point(x: float, y: float, bounds: Box) -> tuple[float, float]:
    """Level-0 px as QuPath counts them: from the slide's bounds on."""
    return x - bounds.x, y - bounds.y


def read_manifest(store: Store, path: str, rows: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Rows of a manifest, all or these."""
    with store.open(path) as stream:
        table = open_table(stream, path).read()
    return (table if rows is None else table.take(list(rows))).to_pylist()
