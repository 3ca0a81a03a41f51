"""Reading whole slides: both engines, MIRAX of our own writing, levels, bounds, resampling, damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from support.slide_files import picture, write_slide, write_tiff

from apacs_ray.config.settings import DataSettings, TilesSettings
from apacs_ray.data.grid import Box
from apacs_ray.distributed.data import of_one_slide, shard_rows, shards_a_task, write_rows
from apacs_ray.errors import BadInput
from apacs_ray.slides.cache import SlideCache
from apacs_ray.slides.find import find_slides
from apacs_ray.slides.manifest import SlideTask, inspect_slide
from apacs_ray.slides.open import open_slide
from apacs_ray.slides.openslide_engine import OpenSlideSlide
from apacs_ray.slides.reader import Slide, read_box
from apacs_ray.slides.slide_grid import level0_point, qupath_point
from apacs_ray.slides.slide_tiles import SlideShard, write_slide_shard
from apacs_ray.storage import open_store


@pytest.fixture(scope="module")
def real_slides(request: pytest.FixtureRequest) -> Path:
    from conftest import SHARED

    folder = SHARED / "data" / "slides"
    if not folder.is_dir():
        pytest.skip(f"no real slides at {folder}")
    return folder


@pytest.mark.parametrize("kind", ["classic", "bigtiff", "ome"])
def test_tiff_pyramids_are_read_by_libvips(tmp_path: Path, kind: str) -> None:
    rgb = picture(700, 500)
    slide = open_slide(write_tiff(tmp_path / "a.tif", rgb, kind=kind, compression="deflate"))
    assert slide.info.engine == "vips"
    assert slide.info.mpp == pytest.approx(0.25)
    assert [(level.width, level.height) for level in slide.info.levels][:2] == [(700, 500), (350, 250)]
    assert np.array_equal(slide.read(0, 0, 0, 700, 500), rgb)
    assert np.array_equal(slide.read(0, 650, 460, 100, 80)[:40, :50], rgb[460:, 650:])
    assert (slide.read(0, 650, 460, 100, 80)[40:] == 255).all()
    assert np.abs(slide.read(1, 0, 0, 350, 250).astype(int) - rgb[::2, ::2]).mean() < 12
    slide.close()


@pytest.mark.parametrize("kind", ["classic", "bigtiff"])
def test_both_engines_give_the_same_pixels(tmp_path: Path, kind: str) -> None:
    path = write_tiff(tmp_path / "a.tif", picture(600, 600), kind=kind)
    ours, theirs = open_slide(path, "vips"), open_slide(path, "openslide")
    assert (ours.info.engine, theirs.info.engine) == ("vips", "openslide")
    assert ours.info.levels == theirs.info.levels
    for level in range(len(ours.info.levels)):
        size = ours.info.levels[level]
        assert np.array_equal(ours.read(level, 3, 5, size.width - 9, 40), theirs.read(level, 3, 5, size.width - 9, 40))


def test_mirax_of_our_writing_is_read_exactly(tmp_path: Path) -> None:
    rgb = picture(640, 512)
    path = write_slide(tmp_path / "slide.mrxs", rgb, margin=2, hole=(1, 2), codec="PNG", fill=(240, 235, 230))
    slide = open_slide(path)
    info = slide.info
    assert info.engine == "openslide"
    assert info.mpp == 0.25
    assert info.bounds == Box(256, 256, 640, 512)
    assert info.background == (240, 235, 230)
    assert [level.downsample for level in info.levels] == [1.0, 2.0, 4.0]
    expected = rgb.copy()
    expected[256:384, 128:256] = (240, 235, 230)  # the hole
    assert np.array_equal(slide.read(0, 256, 256, 640, 512), expected)
    assert (slide.read(0, 0, 0, 256, 256) == (240, 235, 230)).all()
    halved = expected.reshape(256, 2, 320, 2, 3).mean(axis=(1, 3))
    assert np.abs(slide.read(1, 128, 128, 320, 256) - halved).max() <= 1


def test_a_slide_without_holes_has_no_bounds_offset(tmp_path: Path) -> None:
    slide = open_slide(write_slide(tmp_path / "s.mrxs", picture(256, 256), levels=2))
    assert slide.info.bounds == Box(0, 0, 256, 256)


def test_jpeg_in_mirax_is_what_the_file_holds(tmp_path: Path) -> None:
    rgb = picture(256, 256)
    slide = open_slide(write_slide(tmp_path / "s.mrxs", rgb, levels=2, quality=95))
    assert np.abs(slide.read(0, 0, 0, 256, 256).astype(int) - rgb).mean() < 2


@pytest.mark.parametrize("downsample", [1.0, 1.5, 2.0, 3.7])
def test_tiles_at_any_scale_fit_together(tmp_path: Path, downsample: float) -> None:
    """Two tiles side by side are what one wide tile is, to the rounding of where the second begins."""
    slide = open_slide(write_tiff(tmp_path / "a.tif", picture(1200, 900), compression="deflate"))
    size = 120
    whole = np.asarray(read_box(slide, Box(40, 30, 0, 0), downsample, 2 * size, size)).astype(int)
    left = read_box(slide, Box(40, 30, 0, 0), downsample, size, size)
    assert np.abs(whole[:, :size] - left).max() <= 1
    offset = size * downsample
    if offset == int(offset):
        right = read_box(slide, Box(40 + int(offset), 30, 0, 0), downsample, size, size)
        assert np.abs(whole[:, size:] - right).max() <= 1


def test_resampling_keeps_things_where_they_are(tmp_path: Path) -> None:
    rgb = np.full((400, 600, 3), 255, np.uint8)
    rgb[150:250, 300:400] = 0  # a square centered on (350, 200)
    slide = open_slide(write_tiff(tmp_path / "a.tif", rgb, compression="deflate"))
    for downsample in (1.0, 1.3, 2.0, 2.6):
        tile = np.asarray(read_box(slide, Box(100, 50, 0, 0), downsample, int(450 / downsample), int(300 / downsample)))
        dark = 255 - tile[..., 0].astype(float)
        rows, columns = np.indices(dark.shape)
        x = 100 + ((columns + 0.5) * dark).sum() / dark.sum() * downsample
        y = 50 + ((rows + 0.5) * dark).sum() / dark.sum() * downsample
        assert (x, y) == pytest.approx((350, 200), abs=0.1)


@pytest.mark.parametrize("downsample", [1.0, 1.25, 2.0, 1.7])
def test_a_tile_knows_where_it_lies(downsample: float) -> None:
    """Grid -> level 0 -> QuPath, with a bounds offset: whole numbers, half a pixel off the ideal place at most."""
    bounds = Box(1536, 2048, 100_000, 100_000)
    for column in range(0, 40_000, 2000):
        x, y = level0_point(bounds, Box(column, 2 * column, 2000, 2000), downsample)
        assert qupath_point(x, y, bounds) == (round(column * downsample), round(2 * column * downsample))
        assert abs(x - bounds.x - column * downsample) <= 0.5


def test_real_slides_are_openslides_pixels(real_slides: Path) -> None:
    for name, engine, mpp in (
        ("CMU-1-Small-Region.svs", "vips", 0.499),
        ("TCGA-CR-7395-01A-01-TS1.svs", "openslide", None),
    ):
        ours = open_slide(real_slides / name)
        assert ours.info.engine == engine
        assert ours.info.mpp == mpp
        with openslide.OpenSlide(real_slides / name) as theirs:
            assert theirs.dimensions == (ours.info.width, ours.info.height)
            expected = np.asarray(theirs.read_region((333, 777), 0, (600, 500)).convert("RGB"))
        assert np.array_equal(ours.read(0, 333, 777, 600, 500), expected)


def test_slides_that_do_not_open_say_why(real_slides: Path, tmp_path: Path) -> None:
    for name, code, words in (
        ("broken.svs", "unsupported_slide", "no such format"),
        ("Mirax2-Fluorescence-1.mrxs", "unreadable", "Index.dat"),
    ):
        with pytest.raises(BadInput, match=words) as raised:
            open_slide(real_slides / name)
        assert raised.value.code == code
    (tmp_path / "empty.svs").touch()
    with pytest.raises(BadInput, match="no bytes"):
        open_slide(tmp_path / "empty.svs")


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "s.mrxs", picture(256, 256))
    (tmp_path / "s/Data0000.dat").unlink()
    with pytest.raises(BadInput, match=r"Data0000\.dat"):
        open_slide(path)


def test_one_bad_region_leaves_the_others(tmp_path: Path) -> None:
    """OpenSlide refuses everything after an error; the reader opens the slide again."""
    path = write_slide(tmp_path / "s.mrxs", picture(512, 512), levels=2)
    data = tmp_path / "s/Data0000.dat"
    content = bytearray(data.read_bytes())
    first = content.index(b"\xff\xd8\xff")
    content[first : first + 600] = bytes(600)  # the first image of level 0
    data.write_bytes(content)
    slide = OpenSlideSlide(path)
    good = slide.read(0, 256, 256, 100, 100)
    with pytest.raises(BadInput, match="unreadable_region"):
        slide.read(0, 0, 0, 100, 100)
    assert np.array_equal(slide.read(0, 256, 256, 100, 100), good)


def test_a_damaged_tiff_tile_is_an_error_and_not_white(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", picture(512, 512))
    content = bytearray(path.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 400] = bytes(400)
    path.write_bytes(content)
    slide = open_slide(path)
    assert slide.info.engine == "vips"
    good = sum(_reads(slide, x, y) for y in range(0, 512, 128) for x in range(0, 512, 128))
    assert 8 <= good < 16


def _reads(slide: Slide, x: int, y: int) -> bool:
    try:
        slide.read(0, x, y, 128, 128)
    except BadInput:
        return False
    return True


def test_a_slide_that_is_fetched_is_cut_by_few_tasks() -> None:
    shards = [SlideShard("train", number, number // 6, (number,)) for number in range(18)]
    groups = list(of_one_slide(shards, 4))
    assert [len(group) for group in groups] == [4, 2] * 3
    assert [shard for group in groups for shard in group] == shards
    assert all(len({shard.slide for shard in group}) == 1 for group in groups)
    # 1000 slides of 6 shards on 10 and on 100 nodes of 32 CPUs: a task for each slide; one slide on one node: six tasks
    assert (shards_a_task(6000, 320), shards_a_task(6000, 3200), shards_a_task(6, 32)) == (75, 7, 1)


def test_a_task_writes_each_of_its_shards(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_tiff(tmp_path / "data" / "s.tif", picture(96, 64))
    store = open_store(str(tmp_path / "data"))
    (slide,) = find_slides(store.list()).slides
    settings = TilesSettings(size=32, min_tissue=0.0)
    output = open_store(str(tmp_path / "run"))
    task = SlideTask(store, None, output, settings, DataSettings(), SlideCache(tmp_path / "cache", 1 << 30), "0" * 16)
    summary = inspect_slide(task, 0, slide)
    shards = [SlideShard("train", 0, 0, (0, 1, 2, 3)), SlideShard("test", 0, 0, (4, 5))]
    receipts = write_rows(task, shard_rows([summary], shards))
    assert [(receipt.rows_in, receipt.rows_out) for receipt in receipts] == [(4, 4), (2, 2)]
    for receipt, shard in zip(receipts, shards, strict=True):
        alone = write_slide_shard(task, summary, shard)
        assert alone.reused
        assert (alone.path, alone.rows_out) == (receipt.path, receipt.rows_out)


@pytest.mark.parametrize(("width", "height"), [(1, 40), (41, 1), (41, 40)])
@pytest.mark.parametrize("downsample", [0.5, 1.6, 2.0])
def test_what_lies_outside_of_a_slide_does_not_shade_its_edge(
    tmp_path: Path, width: int, height: int, downsample: float
) -> None:
    rgb = np.full((height, width, 3), (90, 40, 140), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", rgb, photometric="rgb", tile=(16, 16), metadata=None)
    slide = open_slide(tmp_path / "a.tif")
    sides = max(1, int(width / downsample)), max(1, int(height / downsample))
    assert (np.asarray(read_box(slide, Box(0, 0, 0, 0), downsample, *sides)) == (90, 40, 140)).all()
