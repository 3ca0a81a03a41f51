"""From listings to slides, their companions and their annotations."""

from __future__ import annotations

from pathlib import Path

import pytest

from apacs_ray.errors import UsageError
from apacs_ray.slides.find import find_slides, fov_origin, is_slide
from apacs_ray.stages.ingest import holds_folders
from apacs_ray.storage import Entry, open_store


def entries(*paths: str) -> list[Entry]:
    return [Entry(path, 10, "v") for path in paths]


def test_slides_with_companions_and_splits() -> None:
    found = find_slides(
        entries(
            "train/a.mrxs", "train/a/Slidedat.ini", "train/a/Data0000.dat", "train/a/Index.dat", "train/b.svs",
            "Test slides/c ä.ndpi", "notes.txt", "d/d.vms", "d/d.opt", "d/map.jpg", "e/1.dcm", "e/2.dcm",
        )
    )  # fmt: skip
    slides = {slide.slide_id: slide for slide in found.slides}
    assert set(slides) == {"a", "b", "c ä", "d", "1"}
    assert [entry.path for entry in slides["a"].files] == [
        "train/a.mrxs", "train/a/Data0000.dat", "train/a/Index.dat", "train/a/Slidedat.ini",
    ]  # fmt: skip
    assert (slides["a"].split, slides["c ä"].split, slides["d"].split) == ("train", "test", None)
    assert {entry.path for entry in slides["d"].files} == {"d/d.vms", "d/d.opt", "d/map.jpg"}
    assert len(slides["1"].files) == 2
    assert [entry.path for entry in found.ignored] == ["notes.txt"]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("a.geojson", "geojson"),
        ("a.json", "geojson"),
        ("a.xml", "asap"),
        ("a.png", "image"),
        ("a_mask.tif", "image"),
        ("a-Mask.tiff", "image"),
        ("masks/a.tif", "image"),
        ("a_100_200.png", "fovs"),
        ("a/x100_y200.png", "fovs"),
    ],
)
def test_annotations_beside_a_slide(path: str, kind: str) -> None:
    (slide,) = find_slides(entries("a.svs", path)).slides
    assert slide.kind == kind
    assert slide.annotation[0].path == path
    if kind == "fovs":
        assert fov_origin(slide.annotation[0]) == (100, 200)


def test_annotations_elsewhere() -> None:
    (slide,) = find_slides(entries("a.svs"), entries("deep/a.geojson", "deep/b.geojson")).slides
    assert [entry.path for entry in slide.annotation] == ["deep/a.geojson"]


def test_what_cannot_be_told_apart_is_rejected() -> None:
    found = find_slides(entries("a.svs", "a.geojson", "a.xml", "b.svs"), root="s3://x")
    assert [slide.slide_id for slide in found.slides] == ["b"]
    assert [(reject.uri, reject.code) for reject in found.rejects] == [("s3://x/a.svs", "duplicate_annotation")]
    twice = find_slides(entries("p/a.svs", "q/a.svs"))
    assert [slide.slide_id for slide in twice.slides] == ["p/a", "q/a"]
    assert find_slides(entries("p/a.svs", "q/a.svs", "a.geojson")).rejects[0].code == "duplicate_stem"
    named = find_slides(entries("P7-1.svs", "other.svs"), slide_regex=r"P\d+")
    assert [slide.slide_id for slide in named.slides] == ["P7"]
    assert [reject.code for reject in named.rejects] == ["bad_name"]


def test_slides_and_images_are_told_apart() -> None:
    assert is_slide("x/a.tif")
    assert not is_slide("masks/a.tif")
    assert not is_slide("x/a_mask.tif")
    assert not is_slide(".hidden.svs")
    assert holds_folders("d", entries("Train_Input/a.tif", "Train_GroundTruth/a.png"))
    assert not holds_folders("d", entries("train/a.tif"))
    with pytest.raises(UsageError, match=r"1 \.svs"):
        holds_folders("d", entries("Train_Input/a.tif", "b.svs"))
    with pytest.raises(UsageError, match=r"found: 2 \.txt"):
        holds_folders("d", entries("a.txt", "b.txt"))


def test_real_folder_of_slides() -> None:
    from conftest import SHARED

    folder = SHARED / "data" / "slides"
    if not folder.is_dir():
        pytest.skip(f"no real slides at {folder}")
    found = find_slides(open_store(str(folder)).list())
    assert len(found.slides) == 4
    mirax = next(slide for slide in found.slides if slide.path.endswith(".mrxs"))
    assert Path(mirax.path).name == "Mirax2-Fluorescence-1.mrxs"
    assert len(mirax.files) == 6
