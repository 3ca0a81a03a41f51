"""Tissue on small pictures of slides: cells count; pen, bubbles, coverslip edges and dust do not."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage
from support.slide_files import picture, write_slide, write_tiff
from support.smear_scenes import LevelSlide, Paint, Rgb, Scene, bare, jpeg, lit, painted, score, singles, smear

from apacs_ray.config.settings import TilesSettings
from apacs_ray.data.grid import Box
from apacs_ray.slides import tissue as tissue_module
from apacs_ray.slides.open import open_slide
from apacs_ray.slides.preview import COLORS, draw_preview
from apacs_ray.slides.reader import Level, SlideInfo
from apacs_ray.slides.regions import closed, grown, opened
from apacs_ray.slides.slide_grid import TilePlan, tiles_of
from apacs_ray.slides.small_picture import level_to_read
from apacs_ray.slides.tissue import ASSUMED_MPP, OUT, Tissue, find_tissue, tissue_mask
from apacs_ray.synthetic.mrxs import MrxsLayout, write_mrxs
from apacs_ray.synthetic.slide import render, slide_specs

GLASS = (240, 240, 236)


@pytest.fixture
def glass() -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 1.2, (400, 600, 3))
    return Image.fromarray(np.clip(np.array(GLASS) + noise, 0, 255).astype(np.uint8))


def drawn(picture: Image.Image) -> np.ndarray:
    return tissue_mask(np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6))))


def test_bare_glass_is_no_tissue(glass: Image.Image) -> None:
    assert drawn(glass).mean() < 0.002


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cells_of_a_smear_are_found(seed: int) -> None:
    """At the scale that is looked at: 8 um per px."""
    for spec in slide_specs(seed, 1600, 1600, mpp=1.0)[:2]:
        rgb, cells = render(spec)
        small = np.asarray(Image.fromarray(rgb).reduce(8))
        truth = np.asarray(Image.fromarray(cells.astype(np.uint8) * 255).reduce(8)) / 255
        tissue = tissue_mask(small)
        assert tissue[truth > 0.7].mean() > 0.85
        assert tissue[truth == 0].mean() < 0.35  # mucus and neutrophils


def test_pen_bubbles_edges_and_dust_are_not_tissue(glass: Image.Image) -> None:
    draw = ImageDraw.Draw(glass)
    draw.line([(30, 40), (200, 60), (330, 30)], fill=(20, 60, 180), width=14)  # blue pen
    draw.line([(400, 20), (560, 60)], fill=(15, 15, 18), width=14)  # black pen
    draw.ellipse([60, 130, 220, 290], outline=(150, 150, 150), width=2)  # bubble
    draw.line([(0, 330), (599, 322)], fill=(140, 140, 140), width=2)  # coverslip edge
    for x in range(300, 580, 35):
        draw.point((x, 380), fill=(60, 60, 60))  # dust
    tissue = drawn(glass)
    assert tissue.mean() < 0.01
    draw.ellipse([350, 150, 364, 164], fill=(190, 140, 170))  # a cell
    draw.ellipse([420, 180, 450, 205], fill=(150, 190, 200))  # a clump
    tissue = drawn(glass)
    assert tissue[150:165, 350:365].mean() > 0.6
    assert tissue[182:203, 422:448].mean() > 0.8


def test_the_black_of_no_scan_is_no_tissue() -> None:
    picture = np.zeros((200, 200, 3), np.uint8)
    picture[50:150, 50:150] = GLASS
    assert not tissue_mask(picture)[:45].any()


def test_the_share_of_a_tile() -> None:
    mask = np.zeros((10, 10), bool)
    mask[2:4, 2:6] = True
    tissue = Tissue(mask, np.zeros((10, 10, 3), np.uint8), 32.0)
    assert tissue.fraction(Box(64, 64, 0, 0), 128, 64) == 1.0
    assert tissue.fraction(Box(0, 0, 0, 0), 320, 320) == pytest.approx(0.08)
    assert tissue.fraction(Box(1000, 1000, 0, 0), 32, 32) == 0.0


SIDE = 1152  # px of 2 um: 81 tiles


@pytest.fixture(scope="module")
def scenes() -> dict[str, Scene]:
    return {
        "dense": smear(SIDE),
        "sparse": smear(SIDE, 3, crowding=0.1, inflammation=0.3, mucus=0.3),
        "bare": bare(SIDE),
    }


LIGHTS: dict[str, dict[str, Any]] = {
    "usual": {},
    "pale": {"stain": 0.22},
    "overstained": {"stain": 3.0},
    "cream": {"glass": (243, 236, 214)},
    "amber": {"glass": (236, 200, 130)},
    "gray": {"glass": (170, 170, 168)},
    "white": {"glass": (262, 262, 262)},  # the glass is overexposed
    "vignette": {"vignette": 0.2},
    "gradient": {"gradient": 0.3},
    "noisy": {"noise": 12.0},
    "pale on cream in a vignette": {"stain": 0.25, "glass": (243, 236, 214), "vignette": 0.15},
}


@pytest.mark.parametrize("light", LIGHTS)
@pytest.mark.parametrize("name", ["dense", "sparse", "bare"])
def test_cells_are_found_under_any_light(name: str, light: str, scenes: dict[str, Scene]) -> None:
    scores = score(lit(scenes[name], **LIGHTS[light]), scenes[name])
    assert scores.recall >= 0.97
    assert scores.false <= 4  # of tiles that touch those with cells, most of them


def _lines(color: tuple[int, int, int], width: int) -> Paint:
    def paint(draw: ImageDraw.ImageDraw) -> None:
        draw.line([(60, 90), (500, 40), (620, 110), (1100, 60)], fill=color, width=width)
        draw.line([(30, 200), (90, 1100)], fill=color, width=width)

    return paint


BLOOD = [(40, 920), (340, 860), (750, 970), (1050, 940), (1010, 1090), (190, 1110)]
ARTIFACTS: dict[str, Callable[[Rgb], Rgb]] = {
    "blue ink": lambda rgb: painted(rgb, _lines((40, 70, 190), 30), 2),
    "black ink": lambda rgb: painted(rgb, _lines((25, 25, 28), 30), 2),
    "thin red ink": lambda rgb: painted(rgb, _lines((200, 40, 50), 30), 2, alpha=0.45),
    "hair": lambda rgb: painted(rgb, _lines((90, 70, 55), 18)),
    "edge of the coverslip": lambda rgb: painted(rgb, _lines((150, 150, 150), 10), 2),
    "bubble": lambda rgb: painted(rgb, lambda draw: draw.ellipse([40, 40, 1110, 1110], outline=(70, 70, 72), width=24)),
    "blood": lambda rgb: painted(rgb, lambda draw: draw.polygon(BLOOD, fill=(205, 110, 100)), 6),
    "dust": lambda rgb: painted(rgb, _dust),
}


def _dust(draw: ImageDraw.ImageDraw) -> None:
    rng = np.random.default_rng(9)
    for x, y, size in rng.uniform((0, 0, 2), (SIDE, SIDE, 7), (90, 3)):
        draw.ellipse([x, y, x + size, y + size], fill=(60, 55, 50))


@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_what_is_no_smear_is_left_out_and_cells_beside_it_are_not(artifact: str, scenes: dict[str, Scene]) -> None:
    bare_glass = ARTIFACTS[artifact](lit(scenes["bare"]))
    alone = score(bare_glass, scenes["bare"])
    assert alone.false <= 3
    beside = score(ARTIFACTS[artifact](lit(scenes["sparse"])), scenes["sparse"])
    assert beside.recall >= 0.9
    assert beside.false <= 4


@pytest.mark.parametrize("fill", [255, 0])
@pytest.mark.parametrize("side", [128, 32])  # px of 2 um
@pytest.mark.parametrize("name", ["dense", "sparse", "bare"])
def test_positions_that_were_not_scanned_are_neither_glass_nor_tissue(
    name: str, side: int, fill: int, scenes: dict[str, Scene]
) -> None:
    holes = np.kron(np.random.default_rng(7).random((SIDE // side, SIDE // side)) < 0.33, np.ones((side, side), bool))
    rgb = lit(scenes[name], glass=(222, 223, 220))
    rgb[holes] = fill
    scores = score(rgb, scenes[name].without(holes))
    assert scores.recall >= 0.97
    assert scores.false <= 4


@pytest.mark.parametrize("surround", [(2, 2, 2), (75, 75, 75), (255, 255, 255), (238, 238, 232)])
def test_what_surrounds_the_scan_is_no_tissue(surround: tuple[int, int, int], scenes: dict[str, Scene]) -> None:
    outside = np.ones((SIDE, SIDE), bool)
    outside[128:-128, 200:-150] = False
    rgb = lit(scenes["sparse"], glass=(222, 223, 220))
    rgb[outside] = surround
    scores = score(rgb, scenes["sparse"].without(outside))
    assert scores.recall >= 0.97
    assert scores.false <= 2


def test_a_chain_of_small_cells_is_no_line() -> None:
    turns = np.linspace(0, 2 * np.pi, 100, endpoint=False)
    places = [(SIDE / 2 + 400 * np.cos(turn), SIDE / 2 + 400 * np.sin(turn)) for turn in turns]
    ring = singles(SIDE, places, ["parabasal"])
    assert score(lit(ring), ring).recall >= 0.97


def test_a_slide_that_does_not_say_its_scale(scenes: dict[str, Scene]) -> None:
    scores = score(lit(scenes["dense"]), scenes["dense"], mpp=None)
    assert scores.recall >= 0.97
    assert scores.false <= 4


def test_strong_compression_is_no_tissue(scenes: dict[str, Scene]) -> None:
    assert score(jpeg(lit(scenes["bare"]), 30), scenes["bare"]).false <= 2
    assert score(jpeg(lit(scenes["sparse"]), 30), scenes["sparse"]).recall >= 0.97


def test_real_fields_on_a_canvas(real_pap: Path) -> None:
    """Real cells, gray, each field with a background of its own."""
    for canvas in ((255, 255, 255), (243, 236, 214)):
        rgb, scene = np.empty((1024, 1024, 3), np.uint8), bare(1024)
        rgb[:] = canvas
        for number, path in enumerate(sorted((real_pap / "Train_Input").iterdir())[:16]):
            place = (
                slice(number // 4 * 256 + 60, number // 4 * 256 + 188),
                slice(number % 4 * 256 + 40, number % 4 * 256 + 168),
            )
            rgb[place] = np.asarray(Image.open(path).convert("RGB").reduce(4))
            mask = Image.open(real_pap / "Train_GroundTruth" / f"{path.stem}.png").convert("L")
            scene.cells[place] = np.asarray(mask.reduce(4)) > 127
            scene.things[place] = True
        scores = score(rgb, scene)
        assert scores.recall >= 0.95
        assert scores.false <= 1


def test_a_level_that_is_there_is_read_and_no_finer_one() -> None:
    def chosen(*downsamples: float, mpp: float | None = 0.25) -> tuple[float, int]:
        levels = tuple(Level(round(100_000 / d), round(50_000 / d), d) for d in downsamples)
        slide = LevelSlide(np.zeros((2, 2, 3), np.uint8))
        slide.info = SlideInfo("vips", levels, mpp, Box(0, 0, 100_000, 50_000))
        number, shrink = level_to_read(slide, mpp or ASSUMED_MPP)
        return downsamples[number], shrink

    assert chosen(1, 2, 4, 8, 16, 32, 64) == (32, 1)
    assert chosen(1, 4, 16, 64) == (16, 2)
    assert chosen(1, 40) == (40, 1)  # 10 um: a little coarse, but level 0 would be 5000 million px
    assert chosen(1, 64) == (1, 32)
    assert chosen(1, 4, 16, 64, mpp=0.5) == (16, 1)
    assert chosen(1, 4, 16, 64, mpp=None) == (16, 2)


def plan_of(rgb: Rgb, **settings: Any) -> list[TilePlan]:
    slide = LevelSlide(rgb)
    return list(tiles_of(TilesSettings(**settings), slide.info, find_tissue(slide), 1.0, slide.info.mpp))


def test_a_single_cell_keeps_its_tile_at_the_default_size() -> None:
    """2000 px of 0.5 um: a cell is a thousandth of that."""
    places = [(250, 250), (750, 250), (500, 760), (1250, 1250)]
    scene = singles(1500, places)
    tiles = plan_of(lit(scene))
    tiled = {(tile.box.x // 2000, tile.box.y // 2000) for tile in tiles if tile.skipped is None}
    # the third, a small one, lies on the border of two tiles: at least one has enough of it
    assert tiled - {(0, 1)} == {(0, 0), (1, 0), (1, 1), (2, 2)}
    assert all(0 < tile.tissue < 0.02 for tile in tiles if tile.skipped is None)
    by_share = plan_of(lit(scene), min_tissue_um2=np.inf)
    assert all(tile.skipped == "background" for tile in by_share)
    assert all(tile.skipped is None for tile in plan_of(lit(scene), min_tissue=0.0))


def test_every_skipped_tile_says_why() -> None:
    rgb = painted(lit(bare(1024)), lambda draw: draw.rectangle([300, 60, 330, 900], fill=(40, 70, 190)), 2)
    rgb[:, 768:] = 0
    reasons = Counter(tile.skipped for tile in plan_of(rgb, size=1024))  # 256 px of the level
    assert reasons == {"background": 8, "artifact": 4, "unscanned": 4}


def test_the_preview_shows_every_tile_and_why() -> None:
    rgb = painted(lit(smear(1024, 3, 0.15)), lambda draw: draw.rectangle([90, 60, 120, 900], fill=(40, 70, 190)), 2)
    rgb[:, 768:] = 0
    slide = LevelSlide(rgb)
    tissue = find_tissue(slide)
    tiles = tiles_of(TilesSettings(size=1024), slide.info, tissue, 1.0, 0.5)
    picture = np.asarray(
        Image.open(io.BytesIO(draw_preview(tissue, slide.info.bounds, [(t.area, t.skipped) for t in tiles])))
    )
    assert {tuple(color) for color in picture.reshape(-1, 3)} >= set(COLORS.values())


@pytest.mark.parametrize("side", [128, 256])
def test_holes_of_a_mirax_slide_are_unknown_not_bright(side: int, tmp_path: Path) -> None:
    """Glass of 222 beside a fill of 255; small holes are joined with glass in the stored images of higher levels."""
    rng = np.random.default_rng(4)
    rgb = np.clip(rng.normal(222, 2, (4096, 4096, 3)), 0, 255).astype(np.uint8)
    holes = rng.random((4096 // side, 4096 // side)) < 0.33
    holes[0, 0] = False

    def source(x: int, y: int, width: int, height: int) -> Rgb | None:
        return None if holes[y // side, x // side] else rgb[y : y + height, x : x + width]

    write_mrxs(tmp_path / "slide.mrxs", MrxsLayout(4096, 4096, 5, 0.5, image=side), source)
    slide = open_slide(tmp_path / "slide.mrxs")
    tissue = find_tissue(slide)
    slide.close()
    assert tissue.mask.mean() < 0.001
    assert tissue.excluded is not None
    assert 0.3 < (tissue.excluded == OUT).mean() < 0.9


def test_engines_tell_what_they_fill_in(tmp_path: Path) -> None:
    rgb = picture(512, 384)
    mirax = open_slide(write_slide(tmp_path / "a.mrxs", rgb, hole=(1, 1)))
    tiff = open_slide(write_tiff(tmp_path / "a.tif", rgb))
    for slide, hole in ((mirax, True), (tiff, False)):
        read, known = slide.read_known(0, -10, -20, 400, 300)
        expected = np.ones((300, 400), bool)
        expected[:20] = expected[:, :10] = False
        if hole:
            expected[148:276, 138:266] = False
        assert np.array_equal(known, expected)
        assert np.array_equal(read, slide.read(0, -10, -20, 400, 300))
        assert (read[~known] == slide.info.background).all()
        slide.close()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_squares_by_shifts_are_scipys(height: int, width: int, reach: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.3
    square = np.ones((2 * reach + 1, 2 * reach + 1), bool)
    assert np.array_equal(grown(mask, reach), ndimage.binary_dilation(mask, square))
    dense = ~mask
    side = np.ones((reach + 1, reach + 1), bool)
    assert np.array_equal(opened(dense, reach + 1), ndimage.binary_opening(dense, side))
    assert np.array_equal(closed(mask), ndimage.binary_closing(mask) | mask)


def test_bands_make_no_difference(monkeypatch: pytest.MonkeyPatch, scenes: dict[str, Scene]) -> None:
    rgb = np.asarray(Image.fromarray(lit(scenes["dense"])).reduce(4))
    whole = tissue_mask(rgb)
    monkeypatch.setattr(tissue_module, "BAND", rgb.shape[1] * 4)
    assert len(list(tissue_module.bands(*rgb.shape[:2]))) > 1
    assert (tissue_mask(rgb) != whole).mean() < 1e-3
