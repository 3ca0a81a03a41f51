"""The manifest of a slide: which of its tiles are worth reading, found without reading any of them.

A manifest is a small Parquet file in the run, `manifest/<fingerprint>/<number>.parquet`, with a row for each tile to
read; its footer holds what the slide is and why other tiles were skipped. Shards then name ranges of its rows.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from apacs_ray.config.settings import DataSettings, TilesSettings
from apacs_ray.data.rejects import Reject
from apacs_ray.data.shards import open_table
from apacs_ray.data.tile_rows import tile_id
from apacs_ray.data.units import one_unit
from apacs_ray.errors import BadInput
from apacs_ray.slides.annotations.names import fov_origin
from apacs_ray.slides.cache import SlideCache
from apacs_ray.slides.mask_sources import NO_MASK, MaskSource, open_masks
from apacs_ray.slides.open import open_slide
from apacs_ray.slides.preview import draw_preview
from apacs_ray.slides.reader import Slide, SlideInfo
from apacs_ray.slides.slide_files import SlideFiles
from apacs_ray.slides.slide_grid import TilePlan, grid_size, tiles_of
from apacs_ray.slides.tissue import ASSUMED_MPP, Tissue, find_tissue
from apacs_ray.storage import Entry, Store

NATIVE_TOLERANCE = 0.01  # share by which `tiles.mpp` may differ from the slide's mpp without resampling
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
        ("tissue_fraction", pa.float64()),  # 0..1, by the slide's tissue mask: `tiles.min_tissue` is compared with it
    ]
)


@dataclass(frozen=True)
class SlideSummary:
    """The account of one slide before any tile is read."""

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
        """Return the summary as the text that a manifest's footer holds."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SlideSummary:
        """Return the summary of such a text."""
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
    """The settings and stores that the inspection of all slides has in common."""

    data: Store
    masks: Store | None
    output: Store
    tiles: TilesSettings
    settings: DataSettings
    cache: SlideCache
    fingerprint: str
    mpps: dict[str, float] = field(default_factory=dict)  # of `data.mpps`, by slide id

    def manifest_path(self, number: int) -> str:
        """Return the path of the manifest of slide `number` in the run."""
        return f"manifest/{self.fingerprint[:8]}/{number:06d}.parquet"

    def annotation_store(self, slide: SlideFiles) -> Store:
        """Return the store in which the annotation of a slide lies."""
        return self.masks if self.masks and slide.annotation_in == "masks" else self.data


def inspect_slide(task: SlideTask, number: int, slide: SlideFiles) -> SlideSummary:
    """Find a slide's tissue and write its manifest and preview; a manifest that is there already is left as it is.

    An annotation that cannot be used is a reject; its slide stays, and its tiles have no masks.

    Args:
        task: how slides are cut.
        number: of the slide in the run; names its manifest.
        slide: to inspect.

    Returns:
        The summary; of a slide that does not open one with its reject, and there is no manifest.
    """
    path = task.manifest_path(number)
    if task.output.version(path) is not None:
        with task.output.open(path) as stream:
            summary = SlideSummary.from_json(pq.read_metadata(stream).metadata[FOOTER].decode())
        return replace(summary, slide=slide)  # the listing, not the old manifest, says which files are read
    try:
        with one_unit(slide.path), opened_slide(task, slide) as reader:
            info = reader.info
            tissue = find_tissue(reader, mpp_of(task.mpps, task.settings, slide, info))
            tiles, summary = plan_slide(task, slide, info, tissue)
            preview = draw_preview(tissue, info.bounds, [(tile.area, tile.skipped) for tile in tiles])
            summary = _with_annotation(task, summary, info)
    except BadInput as defect:
        return SlideSummary(slide, reject=Reject.of(defect, task.data.uri_of(slide.path), slide.slide_id))
    task.output.write(path.replace(".parquet", ".png"), preview)
    rows = [_row(slide.image_id, tile) for tile in tiles if tile.skipped is None]
    table = pa.Table.from_pylist(rows, MANIFEST_SCHEMA.with_metadata({FOOTER: summary.to_json().encode()}))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    task.output.write(path, sink.getvalue())
    return summary


def _with_annotation(task: SlideTask, summary: SlideSummary, info: SlideInfo) -> SlideSummary:
    """Return the summary with what its slide's annotation turned out to be."""
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
def opened_slide(task: SlideTask, slide: SlideFiles) -> Iterator[Slide]:
    """Open a slide, staged if need be, and close it after use.

    Args:
        task: where slides lie, and how they are opened.
        slide: to open.

    Yields:
        The open slide.
    """
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
    """Open the masks of an annotated slide, staged if need be, while they are in use.

    Args:
        task: where annotations lie, and how they are read.
        slide: whose masks.
        info: what the slide says of itself.
        rules: `mask_rules` of its summary; without them all pixels of mask images are read to find them.

    Yields:
        The masks.
    """
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


def mpp_of(mpps: Mapping[str, float], settings: DataSettings, slide: SlideFiles, info: SlideInfo) -> float | None:
    """Return um per level-0 px: what `data.mpps` says of this slide, else the slide itself, else `data.mpp` for all."""
    return mpps.get(slide.slide_id) or info.mpp or settings.mpp


def downsample_to(wanted: float | None, mpp: float | None) -> float:
    """Return level-0 px per px at `wanted` um per px; 1 where that is about the slide's own, or either is unknown."""
    downsample = wanted / mpp if wanted and mpp else 1.0
    return 1.0 if abs(downsample - 1) < NATIVE_TOLERANCE else downsample


def plan_slide(
    task: SlideTask, slide: SlideFiles, info: SlideInfo, tissue: Tissue
) -> tuple[list[TilePlan], SlideSummary]:
    """Lay the grid over a slide and judge each of its tiles.

    Args:
        task: how slides are cut.
        slide: whose manifest it will be.
        info: what the slide says of itself.
        tissue: its tissue mask.

    Returns:
        Every tile in reading order, skipped ones too, and the slide's summary.
    """
    mpp = mpp_of(task.mpps, task.settings, slide, info)
    notes = [*info.notes]
    if mpp is None:
        unused = ", tiles.mpp is not kept" if task.tiles.mpp else ""
        notes.append(f"no mpp: cut at native resolution{unused}, tissue is looked for as at {ASSUMED_MPP} um/px")
    downsample = downsample_to(task.tiles.mpp, mpp)
    tiles = list(tiles_of(task.tiles, info, tissue, downsample, mpp))
    skipped: Counter[str] = Counter(tile.skipped for tile in tiles if tile.skipped is not None)
    count = len(tiles) - skipped.total()
    width, height = grid_size(info.bounds, downsample)
    summary = SlideSummary(slide, info.engine, mpp, downsample, width, height, count, dict(skipped), tuple(notes))
    return tiles, summary


def _row(image_id: str, tile: TilePlan) -> dict[str, Any]:
    """Return the manifest row of a tile."""
    x, y, box = tile.area.x, tile.area.y, tile.box
    place = {"tile_id": tile_id(image_id, x, y), "x": x, "y": y, "column": box.x, "row": box.y}
    return {**place, "width": box.width, "height": box.height, "tissue_fraction": tile.tissue}


def read_manifest(store: Store, path: str, rows: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Return rows of a manifest, all or those numbers."""
    with store.open(path) as stream:
        table = open_table(stream, path).read()
    return (table if rows is None else table.take(list(rows))).to_pylist()
