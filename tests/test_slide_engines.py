"""Which engine reads a slide, which of a file's images is the slide, and what its scale is."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from support.slide_files import picture, write_ndpi, write_slide, write_tiff

from apacs_ray.errors import BadInput
from apacs_ray.slides.mpp import ome_scale, square_mpp
from apacs_ray.slides.open import NEVER_PLAIN, open_slide
from apacs_ray.slides.reader import level_downsample

OME = '<OME xmlns="x"><Image><Pixels {}/></Image></OME>'


def whole(path: Path, **options: object) -> np.ndarray:
    slide = open_slide(path, **options)  # type: ignore[arg-type]
    try:
        return slide.read(0, 0, 0, slide.info.width, slide.info.height)
    finally:
        slide.close()


def test_an_ndpi_is_openslides(tmp_path: Path) -> None:
    rgb = picture(1024, 512)
    path = write_ndpi(tmp_path / "a.ndpi", rgb)
    assert openslide.OpenSlide.detect_format(str(path)) == "hamamatsu"
    slide = open_slide(path)
    assert (slide.info.engine, slide.info.mpp) == ("openslide", 0.5)
    assert np.abs(slide.read(0, 0, 0, 1024, 512).astype(int) - rgb).mean() < 3
    with pytest.raises(BadInput):
        open_slide(path, engine="vips")
    assert {"ventana", "trestle", "hamamatsu"} == NEVER_PLAIN


def test_what_the_tiff_engine_does_not_decode_openslide_does(tmp_path: Path) -> None:
    pytest.importorskip("imagecodecs", reason="writes ZSTD")
    rgb = picture(300, 200)
    tifffile.imwrite(tmp_path / "z.tif", rgb, photometric="rgb", tile=(64, 64), compression="zstd")
    slide = open_slide(tmp_path / "z.tif")
    assert slide.info.engine == "openslide"
    assert np.array_equal(slide.read(0, 0, 0, 300, 200), rgb)
    tifffile.imwrite(tmp_path / "l.tif", rgb, photometric="rgb", tile=(64, 64), compression="lzma")
    with pytest.raises(BadInput, match=r"libvips does not decode LZMA.*OpenSlide: Unsupported TIFF compression"):
        open_slide(tmp_path / "l.tif")


@pytest.mark.parametrize("order", [(64, 512), (512, 64)])
def test_the_largest_image_is_the_slide(order: tuple[int, int], tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as writer:
        for side in order:
            metadata = {"axes": "YXS", "PhysicalSizeX": 128 / side, "PhysicalSizeY": 128 / side}
            writer.write(picture(side, side, side), photometric="rgb", tile=(64, 64), metadata=metadata)
    slide = open_slide(tmp_path / "a.ome.tif")
    assert (slide.info.width, slide.info.mpp) == (512, 0.25)
    assert np.array_equal(slide.read(0, 0, 0, 512, 512), picture(512, 512, 512))
    assert any("largest" in note for note in slide.info.notes) == (order[0] == 64)


def test_a_focal_plane_is_chosen_and_reported(tmp_path: Path) -> None:
    sharp = picture(256, 256)
    blurred = np.full_like(sharp, sharp.mean())
    stack = np.stack([blurred, blurred, sharp, blurred])
    tifffile.imwrite(
        tmp_path / "z.ome.tif", stack, ome=True, photometric="rgb", tile=(64, 64), metadata={"axes": "ZYXS"}
    )
    assert np.array_equal(whole(tmp_path / "z.ome.tif"), sharp)  # 2 of 0..3 is the middle
    assert np.array_equal(whole(tmp_path / "z.ome.tif", plane="0"), blurred)
    assert np.array_equal(whole(tmp_path / "z.ome.tif", plane="sharpest"), sharp)
    assert "plane 2" in open_slide(tmp_path / "z.ome.tif").info.notes[0]
    with pytest.raises(BadInput, match="no plane 4"):
        open_slide(tmp_path / "z.ome.tif", plane="4")


def test_channels_that_lie_apart_are_joined(tmp_path: Path) -> None:
    rgb = picture(256, 128)
    planes = np.ascontiguousarray(rgb.transpose(2, 0, 1))
    options = {"photometric": "minisblack", "tile": (64, 64)}
    tifffile.imwrite(tmp_path / "c.ome.tif", planes, ome=True, metadata={"axes": "CYX"}, **options)
    assert np.array_equal(whole(tmp_path / "c.ome.tif"), rgb)
    stack = np.stack([planes, planes // 2])  # two planes of three channels
    tifffile.imwrite(tmp_path / "zc.ome.tif", stack, ome=True, metadata={"axes": "ZCYX"}, **options)
    assert np.array_equal(whole(tmp_path / "zc.ome.tif", plane="0"), rgb)
    stack = stack.transpose(1, 0, 2, 3)
    tifffile.imwrite(
        tmp_path / "cz.ome.tif", np.ascontiguousarray(stack), ome=True, metadata={"axes": "CZYX"}, **options
    )
    assert np.array_equal(whole(tmp_path / "cz.ome.tif", plane="1"), rgb // 2)
    tifffile.imwrite(tmp_path / "two.ome.tif", planes[:2], ome=True, metadata={"axes": "CYX"}, **options)
    with pytest.raises(BadInput, match="2 channels"):
        open_slide(tmp_path / "two.ome.tif")


@pytest.mark.parametrize("engine", ["auto", "openslide"])
@pytest.mark.parametrize(("what", "words"), [("turned", "orientation"), ("deep", "16 bits")])
def test_both_engines_refuse_what_they_would_show_differently(
    engine: str, what: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / f"{what}.tif"
    rgb = picture(128, 128)
    options = {"extratags": [(274, "H", 1, 3, True)]} if what == "turned" else {}
    data = rgb if what == "turned" else rgb.astype(np.uint16) * 16
    tifffile.imwrite(path, data, photometric="rgb", tile=(64, 64), metadata=None, **options)
    with pytest.raises(BadInput, match=words):
        open_slide(path, engine=engine)  # type: ignore[arg-type]


@pytest.mark.parametrize("compression", ["lzw", "deflate", "jpeg", "webp"])
def test_a_slide_that_is_replaced_is_read_anew(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "s.tif"
    for seed in range(2):
        rgb = picture(256, 256, seed)
        write_tiff(path, rgb, compression=compression, lossless=True)
        assert np.abs(whole(path).astype(int) - rgb).mean() < 4


def test_mirax_names_in_any_case_and_files_that_are_missing(tmp_path: Path) -> None:
    rgb = picture(256, 256)
    write_slide(tmp_path / "a.mrxs", rgb, levels=2, codec="PNG")
    (tmp_path / "a.mrxs").rename(tmp_path / "a.MRXS")
    (tmp_path / "a").rename(tmp_path / "A")
    assert np.array_equal(whole(tmp_path / "a.MRXS"), rgb)
    (tmp_path / "A" / "Data0000.dat").rename(tmp_path / "A" / "elsewhere")
    with pytest.raises(BadInput, match=r"missing_file: a\.MRXS: Data0000\.dat is missing"):
        open_slide(tmp_path / "a.MRXS")
    (tmp_path / "A").rename(tmp_path / "B")
    with pytest.raises(BadInput, match=r"missing_file: a\.MRXS: its folder a/"):
        open_slide(tmp_path / "a.MRXS")


@given(st.integers(64, 200_000), st.integers(64, 200_000), st.integers(0, 8), st.sampled_from([math.floor, math.ceil]))
def test_levels_that_were_halved_have_the_power_of_two(width: int, height: int, halvings: int, cut: object) -> None:
    scale = 1 << halvings
    sides = [max(1, cut(side / scale)) for side in (width, height)]  # type: ignore[operator]
    if min(width, height) >= 4 * scale:
        assert level_downsample((width, height), (sides[0], sides[1])) == scale


def test_levels_of_other_scales() -> None:
    assert level_downsample((2001, 1001), (1000, 500)) == 2
    assert level_downsample((507, 16384), (31, 1024)) == 16
    assert level_downsample((90000, 60000), (30000, 20000)) == 3
    assert level_downsample((10000, 8000), (4000, 3200)) == 2.5


@pytest.mark.parametrize(
    ("scale", "mpp", "noted"),
    [
        ((0.25, 0.25), 0.25, False),
        ((0.25, 0.2501), 0.25, False),
        ((0.25, None), 0.25, False),
        ((None, None), None, False),
        ((0.5, 0.25), None, True),
        ((352.8, 352.8), None, False),  # 72 dpi
        ((0.0, 0.0), None, False),
        ((math.inf, 0.25), 0.25, False),
        ((math.nan, math.nan), None, False),
    ],
)
def test_one_rule_for_what_is_said_of_the_scale(scale: tuple[float, float], mpp: float | None, noted: bool) -> None:
    known, note = square_mpp(scale)
    assert known == mpp
    assert (note is not None) == noted


@pytest.mark.parametrize(
    "attributes",
    [
        'PhysicalSizeX="0.5" PhysicalSizeY="0.5" SizeX="9" SizeY="8"',
        "PhysicalSizeYUnit='\u03bcm' PhysicalSizeXUnit='\u00b5m' PhysicalSizeY='.5' PhysicalSizeX='.5' "
        "SizeY='8' SizeX='9'",
        'PhysicalSizeXUnit="nm" PhysicalSizeX="500" SizeX="9" PhysicalSizeY="500" PhysicalSizeYUnit="nm" SizeY="8"',
        'PhysicalSizeX="0,5" PhysicalSizeY="0,5" SizeX="9" SizeY="8"',
    ],
)
def test_ome_xml_is_read_as_xml(attributes: str) -> None:
    assert ome_scale(OME.format(attributes), 9, 8) == (0.5, 0.5)
    assert ome_scale(OME.format(attributes), 9, 7) == (None, None)


def test_both_engines_say_the_same_scale(tmp_path: Path) -> None:
    for number, (x, y, unit, mpp) in enumerate(
        [(20000, 20000, "CENTIMETER", 0.5), (20000, 40000, "CENTIMETER", None), (72, 72, "INCH", None)]
    ):
        path = tmp_path / f"{number}.tif"
        tifffile.imwrite(
            path, picture(128, 128), photometric="rgb", tile=(64, 64), metadata=None,
            resolution=(x, y), resolutionunit=unit,
        )  # fmt: skip
        for engine in ("vips", "openslide"):
            assert open_slide(path, engine=engine).info.mpp == mpp  # type: ignore[arg-type]
