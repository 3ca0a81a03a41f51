"""The grid, the part of a tile that counts, tile names, and the two measures of a tile."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.slide_files import write_tiff

from apacs_ray.config.settings import DataSettings, TilesSettings
from apacs_ray.data.folders import find_pairs
from apacs_ray.data.grid import Box, grid, owned_region
from apacs_ray.data.image_tiles import ShardTask, plan_tiles, probe_pair, write_shard
from apacs_ray.data.quality import focus, tissue_fraction
from apacs_ray.data.tile_rows import TILE_SCHEMA, tile_id
from apacs_ray.slides.cache import SlideCache
from apacs_ray.slides.find import find_slides
from apacs_ray.slides.manifest import SlideTask, inspect_slide
from apacs_ray.slides.slide_tiles import SlideShard, write_slide_shard
from apacs_ray.storage import open_store

SIDES = st.integers(1, 90)
LAST = st.sampled_from(["keep", "shift", "drop"])


@st.composite
def grids(draw):
    size = draw(st.integers(1, 40))
    return draw(SIDES), draw(SIDES), size, draw(st.integers(1, size)), draw(LAST)


def coverage(width, height, boxes):
    count = np.zeros((height, width), int)
    for box in boxes:
        count[box.y : box.y + box.height, box.x : box.x + box.width] += 1
    return count


@settings(deadline=None)
@given(SIDES, SIDES, st.integers(1, 40))
def test_keep_without_overlap_covers_each_pixel_once(width, height, size):
    boxes = grid(width, height, size, size, "keep")
    assert (coverage(width, height, boxes) == 1).all()
    assert all(0 < box.width <= size and 0 < box.height <= size for box in boxes)


@settings(deadline=None)
@given(grids())
def test_keep_and_shift_cover_everything_and_drop_only_whole_tiles(axes):
    width, height, size, stride, last = axes
    boxes = grid(*axes)
    count = coverage(width, height, boxes)  # also fails to broadcast where a box leaves the image
    full = (min(size, width), min(size, height))
    assert boxes == sorted(boxes, key=lambda box: (box.y, box.x))
    assert len({(box.x, box.y) for box in boxes}) == len(boxes)
    assert all(box.x + box.width <= width and box.y + box.height <= height for box in boxes)
    if last != "drop":
        assert (count > 0).all()
    if last != "keep":
        assert all((box.width, box.height) == full for box in boxes)
    if last == "drop":
        assert (count[: full[1], : full[0]] > 0).all()
        rest_x, rest_y = (
            width - max(b.x + b.width for b in boxes),
            height - max(b.y + b.height for b in boxes),
        )
        assert rest_x < stride
        assert rest_y < stride


@settings(deadline=None)
@given(grids())
@example((50, 41, 20, 20, "shift"))
@example((50, 41, 20, 3, "shift"))
def test_the_regions_that_count_part_the_covered_pixels(axes):
    width, height, *_ = axes
    boxes = grid(*axes)
    counted = np.zeros((height, width), int)
    for box in boxes:
        left, top, right, bottom = owned_region(box.x, box.y, *axes)
        assert 0 <= left <= right <= box.width
        assert 0 <= top <= bottom <= box.height
        counted[box.y + top : box.y + bottom, box.x + left : box.x + right] += 1
    assert (counted == (coverage(width, height, boxes) > 0)).all()


def test_grid_by_hand():
    assert grid(300, 300, 2000, 2000, "drop") == [Box(0, 0, 300, 300)]
    assert grid(2000, 2000, 2000, 2000, "keep") == [Box(0, 0, 2000, 2000)]
    assert grid(25, 10, 10, 10, "keep") == [Box(0, 0, 10, 10), Box(10, 0, 10, 10), Box(20, 0, 5, 10)]
    assert [box.x for box in grid(25, 10, 10, 10, "shift")] == [0, 10, 15]
    assert [box.x for box in grid(25, 10, 10, 10, "drop")] == [0, 10]
    assert [box.x for box in grid(30, 10, 10, 5, "keep")] == [0, 5, 10, 15, 20]  # none that adds no pixel
    assert grid(25, 4, 10, 10, "drop") == [Box(0, 0, 10, 4), Box(10, 0, 10, 4)]  # a narrow image is not lost


def test_overlaps_are_cut_in_their_middle():
    assert owned_region(10, 0, 25, 10, 10, 10, "shift") == (
        0,
        0,
        7,
        10,
    )  # 15..20 is shared with the tile at 15
    assert owned_region(15, 0, 25, 10, 10, 10, "shift") == (2, 0, 10, 10)


SOURCES = st.text("aZ9_./~% -é\u0301", min_size=1, max_size=6)


@settings(deadline=None)
@given(st.lists(st.tuples(SOURCES, st.integers(0, 12), st.integers(0, 12)), unique=True, min_size=2, max_size=8))
@example([("a_1", 2, 3), ("a", 1, 2)])
@example([("a/b", 0, 0), ("a~b", 0, 0), ("a%2Fb", 0, 0), ("a b", 0, 0), ("a%20b", 0, 0)])
def test_tile_ids_differ_and_are_safe(places):
    ids = [tile_id(*place) for place in places]
    assert len(set(ids)) == len(places)
    assert not any(set(name) & set('/\\ :*?"<>|') for name in ids)


def test_tile_id_is_readable():
    assert tile_id("Test_Input/Zelle 7", 2000, 0) == "Test_Input~Zelle%207_2000_0"


def test_the_schema_refuses_what_must_not_be_null(tmp_path):
    assert "split" not in TILE_SCHEMA.names
    row = {field.name: None for field in TILE_SCHEMA}
    with pytest.raises(pa.ArrowInvalid, match="non-nullable"):
        pq.write_table(pa.Table.from_pylist([row], TILE_SCHEMA), tmp_path / "tile.parquet")


def flat(color, size=64):
    return np.full((size, size, 3), color, np.uint8)


def test_tissue_is_stained_or_dark_but_not_unscanned():
    for background in [(255, 255, 255), (240, 238, 232), (0, 0, 0)]:
        assert tissue_fraction(flat(background)) == 0
    for tissue in [(230, 180, 200), (150, 200, 195), (90, 80, 120), (120, 120, 120)]:
        assert tissue_fraction(flat(tissue)) == 1
    half = flat((245, 245, 245))
    half[:, :32] = (230, 180, 200)
    assert tissue_fraction(half) == 0.5


def test_focus_falls_with_blur_and_is_zero_without_structure():
    from scipy import ndimage

    spots = ndimage.gaussian_filter(np.random.default_rng(0).random((128, 128)), 3)
    sharp = (255 * (spots - spots.min()) / np.ptp(spots)).astype(np.uint8)
    blurred = ndimage.gaussian_filter(sharp.astype(float), 6).astype(np.uint8)
    as_rgb = [np.repeat(gray[:, :, None], 3, axis=2) for gray in (sharp, blurred)]
    assert focus(as_rgb[0]) > 4 * focus(as_rgb[1]) > 0
    assert focus(flat((200, 180, 190))) == 0


def test_focus_in_its_unit():
    step = flat(0, 16)
    step[:, 8:] = 100  # shrunk to columns 0 0 100 100, whose Laplacian is 0 100 -100 0
    assert focus(step) == pytest.approx(5000, rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_measures_of_the_smallest_tiles(size):
    assert tissue_fraction(flat((90, 80, 120), size)) == 1
    assert focus(flat((90, 80, 120), size)) == 0


def rows_of_pairs(folder, output, least):
    store, target = open_store(str(folder)), open_store(str(output))
    tiles = TilesSettings(size=32, image_format="png", min_tissue=least)
    sources = [probe_pair(store, pair, 1 << 20) for pair in find_pairs(store.list()).pairs]
    (plan,) = plan_tiles(sources, tiles, DataSettings(), seed=0).shards
    receipt = write_shard(ShardTask(store, target, tiles, DataSettings(), "0" * 16), plan)
    return read_shard(target, receipt), receipt


def rows_of_slide(folder, output, least):
    store, target = open_store(str(folder)), open_store(str(output))
    tiles = TilesSettings(size=256, image_format="png", min_tissue=least, min_tissue_um2=np.inf)
    task = SlideTask(store, None, target, tiles, DataSettings(), SlideCache(output / "cache", 1), "0" * 16)
    (slide,) = find_slides(store.list()).slides
    summary = inspect_slide(task, 0, slide)
    shard = SlideShard("train", 0, 0, tuple(range(summary.tiles)))
    return read_shard(target, write_slide_shard(task, summary, shard)), summary


def read_shard(store, receipt):
    with store.open(receipt.path) as stream:
        return pq.read_table(stream, partitioning=None).to_pylist()


def test_a_tile_of_an_image_is_skipped_by_the_share_that_its_row_stores(tmp_path):
    rgb = np.full((32, 256, 3), 240, np.uint8)
    for tile in range(8):
        rgb[: 4 * (tile + 1), 32 * tile : 32 * (tile + 1)] = (180, 120, 190)  # an eighth more in every tile
    for role, pixels in (("input", rgb), ("groundtruth", np.zeros((32, 256), bool))):
        (tmp_path / "in" / "test" / role).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "in" / "test" / role / "a.png")
    rows, _ = rows_of_pairs(tmp_path / "in", tmp_path / "all", 0.0)
    assert [row["tissue_fraction"] for row in rows] == [(tile + 1) / 8 for tile in range(8)]
    for least in (0.5, 0.51, 1.0):
        left, receipt = rows_of_pairs(tmp_path / "in", tmp_path / f"{least}", least)
        assert left == [row for row in rows if row["tissue_fraction"] >= least]
        assert receipt.skipped == {"background": 8 - len(left)}


def test_a_tile_of_a_slide_is_skipped_by_the_share_that_its_row_stores(tmp_path):
    (tmp_path / "in").mkdir()
    y, x = np.mgrid[:2048, :2048]
    rgb = np.full((2048, 2048, 3), 240, np.uint8)
    rgb[np.hypot(y - 900, x - 1000) < 500] = (180, 120, 190)
    rgb = (rgb - np.random.default_rng(0).integers(0, 6, rgb.shape)).astype(np.uint8)
    write_tiff(tmp_path / "in" / "a.tif", rgb)
    rows, summary = rows_of_slide(tmp_path / "in", tmp_path / "all", 0.0)
    assert summary.tiles == len(rows) == 64
    fractions = sorted({row["tissue_fraction"] for row in rows})
    assert len(fractions) > 4
    for least in (fractions[1], fractions[2], fractions[-1]):
        left, summary = rows_of_slide(tmp_path / "in", tmp_path / f"{least}", least)
        assert left == [row for row in rows if row["tissue_fraction"] >= least]
        assert sum(summary.skipped.values()) == 64 - len(left) > 0
