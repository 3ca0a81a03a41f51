"""Segmentation of slides: the mask of the whole slide, however it is cut; and files that say what the mask says."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from support.segmentation import OneSlide, filled_by_scipy, with_settings, write_ensemble
from support.slide_files import picture, write_slide, write_tiff

from apacs_ray.data.grid import Box
from apacs_ray.errors import ApacsError, BadInput
from apacs_ray.evaluation.objects import EIGHT
from apacs_ray.evaluation.predictions import predictions
from apacs_ray.inference.predictor import Predictor
from apacs_ray.inference.segmenter import Segmenter
from apacs_ray.models.registry import MEMBERS
from apacs_ray.outputs.slide_files import GEOJSON, MASK, OVERVIEW, PARQUET, SLIDE_JSON
from apacs_ray.slides.open import open_slide
from apacs_ray.storage import LocalStore

USES = ["fcn32", "fcn16", "fcn8", "mean", "majority", "fusion"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LocalStore]:
    folder = tmp_path_factory.mktemp("models")
    return {head: write_ensemble(folder / head, head) for head in ("refined", "published")}  # type: ignore[arg-type]


SIDES = st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 96, 128, 129, 255, 257, 320]), st.integers(1, 400))


@given(
    width=SIDES,
    height=SIDES,
    core=st.sampled_from([32, 64, 96, 160, 512]),
    use=st.sampled_from([*USES, "published"]),
    mpp=st.sampled_from([None, None, 0.4]),
    shard=st.integers(1, 4),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_mask_is_that_of_the_whole_slide(
    models: dict[str, LocalStore],
    tmp_path_factory: pytest.TempPathFactory,
    width: int,
    height: int,
    core: int,
    use: str,
    mpp: float | None,
    shard: int,
) -> None:
    folder = tmp_path_factory.mktemp("slide")
    write_tiff(folder / "a.tif", picture(width, height, seed=width))
    how = with_settings(core=core, use="fusion" if use == "published" else use, mpp=mpp)
    model = models["published" if use == "published" else "refined"]
    one = OneSlide(folder / "a.tif", model, folder / "out", how, shard)
    assert one.plan.halo == {"fusion": 480, "published": 512}.get(use, 256)
    one.require_mask_of_whole()


@given(
    cut=st.sampled_from([(1024, 1), (1024, 2), (2048, 1)]),
    more=st.sampled_from([1, 33, 300]),
    thin=st.sampled_from([1, 31, 33, 160]),
    tall=st.booleans(),
    use=st.sampled_from([*USES, "published"]),
    mpp=st.sampled_from([None, None, 0.4]),
    shard=st.integers(1, 3),
)
@settings(max_examples=14, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_also_in_cores_as_large_as_a_run_has_them(
    models: dict[str, LocalStore],
    tmp_path_factory: pytest.TempPathFactory,
    cut: tuple[int, int],
    more: int,
    thin: int,
    tall: bool,
    use: str,
    mpp: float | None,
    shard: int,
) -> None:
    """A field a little longer than one or two cores: their windows do not hold it whole."""
    folder, (core, times) = tmp_path_factory.mktemp("slide"), cut
    size = times * core + more, thin
    scale = 0.25 / (mpp or 0.25)
    write_tiff(folder / "a.tif", picture(*(math.ceil(side / scale) for side in (size[::-1] if tall else size))))
    how = with_settings(core=core, use="fusion" if use == "published" else use, mpp=mpp)
    model = models["published" if use == "published" else "refined"]
    one = OneSlide(folder / "a.tif", model, folder / "out", how, shard)
    assert one.plan.cores == times + 1
    one.require_mask_of_whole()


@pytest.mark.parametrize("kind", ["tif", "mrxs"])
def test_also_of_larger_slides_with_bounds(models: dict[str, LocalStore], tmp_path: Path, kind: str) -> None:
    rgb = picture(1100, 900)
    if kind == "tif":
        write_tiff(tmp_path / "a.tif", rgb, kind="ome")
    else:
        write_slide(tmp_path / "a.mrxs", rgb, margin=1)
    one = OneSlide(tmp_path / f"a.{kind}", models["refined"], tmp_path / "out", with_settings(core=512, use="fcn8"))
    assert (one.plan.bounds.x, one.plan.bounds.y) == ((0, 0) if kind == "tif" else (128, 128))
    assert 0.1 < one.require_mask_of_whole().mean() < 0.9


def test_too_small_a_halo_is_seen(models: dict[str, LocalStore], tmp_path: Path) -> None:
    """The comparison above would find it."""
    write_tiff(tmp_path / "a.tif", picture(700, 600))
    one = OneSlide(tmp_path / "a.tif", models["refined"], tmp_path / "out", with_settings(core=128, halo=64))
    with pytest.raises(AssertionError, match="px differ"):
        one.require_mask_of_whole()


def test_tta_agrees_over_cores(models: dict[str, LocalStore], tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", picture(450, 333))
    one = OneSlide(
        tmp_path / "a.tif", models["refined"], tmp_path / "out", with_settings(core=128, tta=True, use="fcn8")
    )
    mask = one.require_mask_of_whole()
    plain = OneSlide(tmp_path / "a.tif", models["refined"], tmp_path / "plain", with_settings(core=128, use="fcn8"))
    assert not np.array_equal(mask, plain.mask())


@pytest.mark.parametrize("side", [450, 448])
def test_a_fusion_over_views_of_its_members_agrees_over_cores(tmp_path: Path, side: int) -> None:
    write_tiff(tmp_path / "a.tif", picture(side, 352))
    masks = []
    for views in (1, 4):
        model = write_ensemble(tmp_path / f"{views}", views=views)
        one = OneSlide(tmp_path / "a.tif", model, tmp_path / f"out{views}", with_settings(core=128))
        masks.append(one.require_mask_of_whole())
    assert not np.array_equal(*masks)


@pytest.mark.parametrize("origin", ["bounds", "corner"])
def test_files_say_what_the_mask_says(models: dict[str, LocalStore], tmp_path: Path, origin: str) -> None:
    write_slide(tmp_path / "a b.mrxs", picture(600, 500), margin=1)
    how = with_settings(core=256, use="fcn8", origin=origin, simplify=0.5, mpp=0.4)
    one = OneSlide(tmp_path / "a b.mrxs", models["refined"], tmp_path / "out", how)
    folder = one.run()
    mask = tifffile.imread(folder / MASK, level=0) > 0
    labels, count = ndimage.label(mask, EIGHT)
    record = json.loads((folder / SLIDE_JSON).read_text())
    assert (record["objects"], record["cell_px"]) == (count, int(mask.sum()))
    assert record["cell_um2"] == pytest.approx(mask.sum() * 0.4**2)
    rows = pq.read_table(folder / PARQUET).to_pylist()
    features = json.loads(gzip.decompress((folder / GEOJSON).read_bytes()))["features"]
    assert len(rows) == len(features) == count
    assert [row["object_id"] for row in rows] == [feature["id"] for feature in features]
    shift = 128 if origin == "corner" else 0
    for row, feature in zip(rows, features, strict=True):
        shape = shapely.geometry.shape(feature["geometry"])
        assert shape.is_valid
        assert shape.equals(shapely.from_wkb(row["geometry"]))
        x, y = ((row["centroid_x"] - shift) / 1.6, (row["centroid_y"] - shift) / 1.6)
        inside = shapely.affinity.affine_transform(shape, [1 / 1.6, 0, 0, 1 / 1.6, -shift / 1.6, -shift / 1.6])
        assert inside.distance(shapely.Point(x, y)) < 40
        left, top, right, bottom = (
            round(value / 1.6 - shift / 1.6) for value in (row["left"], row["top"], row["right"], row["bottom"])
        )
        part = labels[top:bottom, left:right]
        label = next(number for number in np.unique(part) if number and (labels == number).sum() == row["pixels"])
        ys, xs = np.nonzero(labels == label)
        assert (ys.mean() + 0.5, xs.mean() + 0.5) == (pytest.approx(y, abs=0.02), pytest.approx(x, abs=0.02))
        assert inside.area == pytest.approx(row["pixels"], rel=0.3, abs=3)
    assert (folder / OVERVIEW).stat().st_size > 1000


def test_the_same_bytes_however_it_is_cut_and_once_more(models: dict[str, LocalStore], tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", picture(500, 420))
    contents = []
    for number, (core, shard) in enumerate([(512, 4), (128, 3), (128, 1)]):
        how = with_settings(core=core, use="fcn16")
        folder = OneSlide(tmp_path / "a.tif", models["refined"], tmp_path / f"out{number}", how, shard).run()
        rows = sorted(pq.read_table(folder / PARQUET).to_pylist(), key=lambda row: row["object_id"])
        files = {name: (folder / name).read_bytes() for name in (MASK, OVERVIEW, GEOJSON, PARQUET)}
        contents.append((rows, files))
    for row, other in zip(contents[0][0], contents[1][0], strict=True):
        for name in ("probability", "disagreement"):  # other sizes of convolutions add up in another order
            assert row.pop(name) == pytest.approx(other.pop(name), abs=1e-4)
        assert row == other
    assert contents[0][1][MASK] == contents[1][1][MASK]
    assert contents[1][1] == contents[2][1]


@given(core=st.sampled_from([32, 96, 512]), area=st.sampled_from([0.5, 3.0, 40.0]))
@settings(max_examples=8, deadline=None)
def test_small_objects_are_taken_out_however_it_is_cut(
    models: dict[str, LocalStore], tmp_path_factory: pytest.TempPathFactory, core: int, area: float
) -> None:
    folder = tmp_path_factory.mktemp("small")
    write_tiff(folder / "a.tif", picture(300, 260, seed=3))
    every = OneSlide(folder / "a.tif", models["refined"], folder / "all", with_settings(core=core, use="fcn16")).mask()
    how = with_settings(core=core, use="fcn16", min_area_um2=area)
    files = OneSlide(folder / "a.tif", models["refined"], folder / "out", how).run()
    labels, _ = ndimage.label(every, EIGHT)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    large = sizes * 0.25**2 >= area
    mask = tifffile.imread(files / MASK, level=0) > 0
    assert np.array_equal(mask, large[labels])
    record = json.loads((files / SLIDE_JSON).read_text())
    assert (record["objects"], record["cell_px"]) == (large.sum(), mask.sum())
    assert sorted(pq.read_table(files / PARQUET)["pixels"].to_pylist()) == sorted(sizes[large].tolist())


@pytest.mark.parametrize("core", [32, 96, 512])
def test_holes_are_filled_in_every_file(models: dict[str, LocalStore], tmp_path: Path, core: int) -> None:
    write_tiff(tmp_path / "a.tif", picture(300, 260, seed=3))
    how = with_settings(core=core, use="fcn16", fill_holes_um2=20.0, min_area_um2=3.0)
    files = OneSlide(tmp_path / "a.tif", models["refined"], tmp_path / "out", how).run()
    plain = with_settings(core=core, use="fcn16")
    every = OneSlide(tmp_path / "a.tif", models["refined"], tmp_path / "all", plain).mask()
    labels, _ = ndimage.label(filled_by_scipy(every, 20.0 / 0.25**2), EIGHT)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    expected = (sizes * 0.25**2 >= 3.0)[labels]
    assert (expected & ~every).sum() > 20
    mask = tifffile.imread(files / MASK, level=0) > 0
    assert np.array_equal(mask, expected)
    record = json.loads((files / SLIDE_JSON).read_text())
    rows = pq.read_table(files / PARQUET)
    assert (record["objects"], record["cell_px"]) == (len(rows), mask.sum())
    assert sum(rows["pixels"].to_pylist()) == mask.sum()


@pytest.mark.parametrize(("core", "downsample"), [(96, 4), (512, 32), (64, 1)])
def test_maps_are_means_of_probability_and_disagreement(
    models: dict[str, LocalStore], tmp_path: Path, core: int, downsample: int
) -> None:
    write_tiff(tmp_path / "a.tif", picture(333, 219))
    one = OneSlide(tmp_path / "a.tif", models["refined"], tmp_path / "out", with_settings(core=core, maps=downsample))
    files = one.run()
    found = one.seen_as_a_whole()
    for name, values in (("probability", found.probability), ("disagreement", found.disagreement)):
        image = tifffile.imread(files / f"{name}.ome.tif", level=0)
        assert image.shape == (-(-219 // downsample), -(-333 // downsample))
        for row, column in [(0, 0), (1, 2), (image.shape[0] - 1, image.shape[1] - 1)]:
            y, x = row * downsample, column * downsample
            mean = values[y : y + downsample, x : x + downsample].mean() / 257
            assert image[row, column] == pytest.approx(mean, abs=0.51)


def test_the_overview_shows_the_slide_as_sharp_as_it_is(models: dict[str, LocalStore], tmp_path: Path) -> None:
    """Tissue is looked for on a much smaller picture."""
    write_slide(tmp_path / "a.mrxs", picture(384, 256), margin=1)
    files = OneSlide(tmp_path / "a.mrxs", models["refined"], tmp_path / "out", with_settings(use="fcn8")).run()
    shown = np.asarray(Image.open(files / OVERVIEW).convert("RGB")).astype(int)
    slide = open_slide(tmp_path / "a.mrxs")
    read = slide.read(0, slide.info.bounds.x, slide.info.bounds.y, 384, 256).astype(int)
    slide.close()
    assert shown.shape == (256, 384, 3)
    mask = tifffile.imread(files / MASK, level=0) > 0
    inner = ndimage.binary_erosion(mask) | ~mask
    assert np.array_equal(shown[inner], read[inner])


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_a_plain_picture_is_a_slide(models: dict[str, LocalStore], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"field.{suffix}"
    Image.fromarray(picture(150, 120)).save(path)
    one = OneSlide(path, models["refined"], tmp_path / "out", with_settings(core=64, use="fcn8"))
    assert one.require_mask_of_whole().shape == (120, 150)
    assert json.loads((tmp_path / "out/field" / SLIDE_JSON).read_text())["mpp"] is None
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BadInput):
        open_slide(path)


def test_the_picture_in_a_mirax_file_is_never_taken_for_the_slide(tmp_path: Path) -> None:
    rgb = picture(300, 200)
    write_slide(tmp_path / "a.mrxs", rgb)
    Image.fromarray(rgb[:50, :60]).save(tmp_path / "preview.jpg")
    (tmp_path / "a.mrxs").write_bytes((tmp_path / "preview.jpg").read_bytes())  # as scanners write it
    slide = open_slide(tmp_path / "a.mrxs")
    assert slide.info.engine == "openslide"
    slide.close()
    (tmp_path / "b.mrxs").write_bytes((tmp_path / "preview.jpg").read_bytes())  # without its folder
    with pytest.raises(BadInput):
        open_slide(tmp_path / "b.mrxs")


@pytest.mark.parametrize(("fits", "tta"), [(700 * 700, False), (620 * 780, True), (590 * 610, False)])
def test_a_window_beyond_the_memory_of_a_gpu_gives_the_same_mask(
    models: dict[str, LocalStore], monkeypatch: pytest.MonkeyPatch, fits: int, tta: bool
) -> None:
    """Only how much fits is simulated."""
    folders = {name: f"members/{name}" for name in MEMBERS} | {"fusion": "fusion"}
    predictor = Predictor.load(models["refined"], folders, threads=1, precision="float32")
    segmenter, rgb, keep = Segmenter(predictor, "fcn8", tta=tta), picture(1000, 700), Box(256, 32, 488, 600)
    whole = segmenter(rgb, keep, 256)
    run, sizes = predictor._run, []

    def limited(images: torch.Tensor) -> dict[str, torch.Tensor]:
        if images[0, 0].numel() > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sizes.append(images.shape)
        return run(images)

    monkeypatch.setattr(predictor, "_run", limited)
    if fits < 600 * 600:  # what 256 px need at least
        with pytest.raises(ApacsError, match=r"^the GPU's memory is too small .*segment.use to one member"):
            segmenter(rgb, keep, 256)
        return
    parts = segmenter(rgb, keep, 256)
    assert len(sizes) >= (16 if tta else 2)
    assert np.array_equal(parts.mask, whole.mask)
    for name in ("probability", "disagreement"):
        one, other = getattr(parts, name).astype(int), getattr(whole, name).astype(int)
        assert one.shape == (600, 488)
        assert np.abs(one - other).max() <= 7  # 1e-4


@pytest.mark.parametrize("use", USES)
def test_a_pixel_is_cell_by_the_rule_of_evaluation(models: dict[str, LocalStore], use: str) -> None:
    folders = {name: f"members/{name}" for name in MEMBERS} | {"fusion": "fusion"}
    predictor = Predictor.load(models["refined"], folders, threads=1, precision="float32")
    rgb = picture(160, 130)
    assert np.array_equal(Segmenter(predictor, use)(rgb).mask, predictions(predictor.logits(rgb), rgb)[use])
