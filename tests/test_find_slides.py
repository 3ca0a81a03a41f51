"""From listings to slides, their companions and their annotations, and no file lost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from apacs_ray.errors import BadInput, UsageError
from apacs_ray.slides.annotations.names import fov_origin, stem_of
from apacs_ray.slides.companions import Heads, read_heads
from apacs_ray.slides.find import find_slides, is_slide
from apacs_ray.slides.slide_files import SlideData, SlideFiles
from apacs_ray.stages.source import holds_folders, require_clear
from apacs_ray.storage import Entry, LocalStore, open_store


def entries(*paths: str) -> list[Entry]:
    return [Entry(path, 10, "v") for path in paths]


def paths(files: Sequence[Entry]) -> list[str]:
    return [entry.path for entry in files]


def by_id(slide_data: SlideData) -> dict[str, SlideFiles]:
    return {slide.slide_id: slide for slide in slide_data.slides}


def test_slides_with_companions_and_splits() -> None:
    slide_data = find_slides(
        entries(
            "train/a.mrxs", "train/a/Slidedat.ini", "train/a/Data0000.dat", "train/a/Index.dat", "train/b.svs",
            "Test slides/c ä.ndpi", "notes.txt", "d/d.vms", "d/d.opt", "d/map.jpg", "e/1.dcm", "e/2.dcm",
        ),
        heads=Heads({"e/1.dcm": "1.2", "e/2.dcm": "1.2"}, {"d/d.vms": frozenset({"d.opt", "map.jpg"})}),
    )  # fmt: skip
    slides = by_id(slide_data)
    assert set(slides) == {"a", "b", "c ä", "d", "1"}
    assert paths(slides["a"].files) == [
        "train/a.mrxs", "train/a/Data0000.dat", "train/a/Index.dat", "train/a/Slidedat.ini",
    ]  # fmt: skip
    assert (slides["a"].split, slides["c ä"].split, slides["d"].split) == ("train", "test", None)
    assert set(paths(slides["d"].files)) == {"d/d.vms", "d/d.opt", "d/map.jpg"}
    assert len(slides["1"].files) == 2
    assert paths(slide_data.ignored) == ["notes.txt"]
    assert slide_data.folders == ("Test slides (test)", "d (no split)", "e (no split)", "train (train)")


# --- companions


def test_companions_swallow_no_slide_and_no_annotation() -> None:
    """One .dcm or .vms took every file of its folder."""
    heads = Heads({"a.dcm": "1.2", "b.dcm": "1.3", "c.dcm": "1.2"}, {"v.vms": frozenset({"v.opt", "x.svs", "x.xml"})})
    listed = entries("a.dcm", "b.dcm", "c.dcm", "v.vms", "V.opt", "v.xml", "x.svs", "x.xml", "b.geojson", "report.pdf")
    slide_data = find_slides(listed, heads=heads)
    assert {slide.slide_id: paths(slide.files) for slide in slide_data.slides} == {
        "a": ["a.dcm", "c.dcm"], "b": ["b.dcm"], "v": ["v.vms", "V.opt"], "x": ["x.svs"],
    }  # fmt: skip
    assert {slide.slide_id: paths(slide.annotation) for slide in slide_data.slides if slide.kind} == {
        "b": ["b.geojson"], "v": ["v.xml"], "x": ["x.xml"],
    }  # fmt: skip
    assert paths(slide_data.left.others) == ["report.pdf"]


@pytest.mark.parametrize(
    "name", ["a", "c", "c.dcm", "1.2.840.99", "Case 7", "case 7", "A.DCM"], ids=lambda name: name.replace(" ", "_")
)
def test_the_annotation_of_a_dicom_slide_is_called_after_a_file_the_folder_or_the_series(name: str) -> None:
    heads = Heads({"Case 7/a.dcm": "1.2.840.99", "Case 7/c.dcm": "1.2.840.99", "d.dcm": "1.4"})
    slide_data = find_slides(entries("Case 7/a.dcm", "Case 7/c.dcm", "d.dcm"), entries(f"{name}.geojson"), heads=heads)
    assert {slide.slide_id: (slide.kind, slide.annotation_in) for slide in slide_data.slides} == {
        "a": ("geojson", "masks"), "d": (None, "data"),
    }  # fmt: skip


@pytest.mark.parametrize("folder", ["s15", "S15", "s15/deeper"])
@pytest.mark.parametrize("name", ["s15.mrxs", "s15.MRXS", "S15.Mrxs"])
def test_the_folder_of_an_mrxs_in_any_case(name: str, folder: str) -> None:
    (slide,) = find_slides(entries(name, f"{folder}/Slidedat.ini", f"{folder}/Data0000.dat")).slides
    assert len(slide.files) == 3


def test_two_mrxs_whose_names_differ_in_case_keep_their_folders() -> None:
    slide_data = find_slides(entries("a.mrxs", "A.mrxs", "a/Slidedat.ini", "A/Slidedat.ini"))
    assert {slide.path: paths(slide.files)[1:] for slide in slide_data.slides} == {
        "a.mrxs": ["a/Slidedat.ini"], "A.mrxs": ["A/Slidedat.ini"],
    }  # fmt: skip


def test_what_lies_in_the_folder_of_an_mrxs() -> None:
    listed = entries(
        "a.mrxs", "a/Slidedat.ini", "a/x.tif", "a/b.svs", "a/a.geojson", "a/b.geojson", "p.mrxs", "p/q.tif"
    )
    slides = by_id(find_slides(listed))
    assert paths(slides["a"].files) == ["a.mrxs", "a/Slidedat.ini", "a/x.tif"]
    assert paths(slides["a"].annotation) == ["a/a.geojson"]
    assert paths(slides["b"].annotation) == ["a/b.geojson"]
    assert paths(slides["q"].files) == ["p/q.tif"]  # a patient's folder, which holds no data of an MRXS


def write_dicom(path: Path, series: str | None, *, implicit: bool = False, ahead: int = 0) -> None:
    """A DICOM file with a series, behind a text of `ahead` bytes."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3.4"
    data.add_new(0x00104000, "UT", "x" * ahead)
    if series is not None:
        data.SeriesInstanceUID = series
    data.add_new(0x7FE00010, "OW", b"\0" * 100_000)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True, implicit_vr=implicit, little_endian=True)


@pytest.mark.parametrize("where", ["local", "s3"])
def test_heads_are_read(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    write_dicom(tmp_path / "a.dcm", "1.2.3")
    write_dicom(tmp_path / "b.DCM", "1.2.3", implicit=True, ahead=200_000)  # behind the first bytes
    write_dicom(tmp_path / "none.dcm", None)
    (tmp_path / "text.dcm").write_text("no DICOM")
    (tmp_path / "empty.dcm").touch()
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "a.dcm").read_bytes()[:200])
    (tmp_path / ".hidden.dcm").write_text("not looked at")
    index = (
        "[Virtual Microscope Specimen]\r\nNoLayers=1\r\nImageFile=C:\\scan\\Ä.jpg\r\nImageFile(1,0)= Ä(1,0).jpg \r\n"
    )
    (tmp_path / "v.vms").write_text(index + "MapFile=map.jpg\r\nPhysicalWidth=12\r\n", encoding="cp1252")
    store = LocalStore(str(tmp_path))
    if where == "s3":
        remote = open_store(request.getfixturevalue("s3"))
        for path in tmp_path.iterdir():
            remote.write(path.name, path.read_bytes())
        heads = read_heads(remote, list(remote.list()))
    else:
        heads = read_heads(store, list(store.list()))
    assert heads.series == {"a.dcm": "1.2.3", "b.DCM": "1.2.3"}
    assert heads.named == {"v.vms": frozenset({"ä.jpg", "ä(1,0).jpg", "map.jpg"})}
    assert {path: defect.code for path, defect in heads.refused.items()} == {
        "cut.dcm": "unreadable", "empty.dcm": "unsupported_slide", "none.dcm": "unreadable",
        "text.dcm": "unsupported_slide",
    }  # fmt: skip
    slide_data = find_slides(store.list(), heads=heads, root="d")
    assert [slide.slide_id for slide in slide_data.slides] == ["a", "v"]
    assert {row.uri for row in slide_data.rejects} == {"d/cut.dcm", "d/empty.dcm", "d/none.dcm", "d/text.dcm"}


def test_a_file_that_is_gone_is_its_own_reject(tmp_path: Path) -> None:
    heads = read_heads(LocalStore(str(tmp_path)), entries("gone.dcm", "gone.vms"))
    assert [defect.code for defect in heads.refused.values()] == ["unreadable"] * 2


def test_real_dicom_of_several_series() -> None:
    from conftest import SHARED

    if not (SHARED / "data" / "dicom").is_dir():
        pytest.skip(f"no real DICOM at {SHARED / 'data' / 'dicom'}")
    store = open_store(str(SHARED / "data" / "dicom"))
    listed = list(store.list())
    slide_data = find_slides(listed, heads=read_heads(store, listed))
    assert sorted(len(slide.files) for slide in slide_data.slides) == [1, 1, 4]
    assert not slide_data.rejects


# --- names


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (["a.svs", "b.tif"], {"a.svs": "a", "b.tif": "b"}),
        (["train/A.svs", "train/A.tif"], {"train/A.svs": "A.svs", "train/A.tif": "A.tif"}),
        (["p/A.svs", "q/A.tif", "q/B.tif"], {"p/A.svs": "A.svs", "q/A.tif": "A.tif", "q/B.tif": "B"}),
        (["p/a.svs", "q/a.svs"], {"p/a.svs": "p/a", "q/a.svs": "q/a"}),
        (["p/a.svs", "q/a.svs", "q/a.tif"], {"p/a.svs": "p/a", "q/a.svs": "q/a", "q/a.tif": "a.tif"}),
        (["a.ome.tif", "b.OME.TIFF", "c.ome.svs"], {"a.ome.tif": "a", "b.OME.TIFF": "b", "c.ome.svs": "c.ome"}),
        (["a.ome.tif", "a.tif"], {"a.ome.tif": "a.ome.tif", "a.tif": "a.tif"}),
        (["A.svs", "A.tif", "A.svs.tif"], {"A.svs": "./A.svs", "A.tif": "A.tif", "A.svs.tif": "A.svs"}),
    ],
)
def test_each_slide_has_an_id_of_its_own(listed: list[str], expected: dict[str, str]) -> None:
    slide_data = find_slides(entries(*listed))
    assert {slide.path: slide.slide_id for slide in slide_data.slides} == expected
    assert len({slide.image_id for slide in slide_data.slides}) == len(listed)


def test_tile_ids_are_kept_where_nothing_clashes() -> None:
    slide_data = find_slides(entries("p/a.ome.tif", "p/b.svs", "p/c.svs", "p/c.tif"))
    assert {slide.path: slide.image_id for slide in slide_data.slides} == {
        "p/a.ome.tif": "p/a.ome", "p/b.svs": "p/b", "p/c.svs": "p/c.svs", "p/c.tif": "p/c.tif",
    }  # fmt: skip


def test_a_stem_of_several_slides_is_refused_in_a_table() -> None:
    slides = find_slides(entries("A.svs", "A.tif", "B.svs")).slides
    require_clear(slides, {"A.svs", "A.tif", "B", "elsewhere"}, "data.splits")
    with pytest.raises(UsageError, match=r"data\.mpps: 'A' may be each of 2 slides, call them A\.svs, A\.tif"):
        require_clear(slides, {"A", "B"}, "data.mpps")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train/validated/a.svs", "train"),
        ("train/Valencia/a.svs", "train"),
        ("Valencia/a.svs", None),
        ("testis/a.svs", None),
        ("BatchTest/a.svs", "test"),
        ("HETest2/a.svs", "test"),
        ("test/train/a.svs", "train"),
        ("a_test.svs", None),
        ("x/TestSet 2/a.svs", "test"),
    ],
)
def test_splits_of_folders(path: str, split: str | None) -> None:
    (slide,) = find_slides(entries(path)).slides
    assert slide.split == split


def test_a_folder_that_names_two_splits_is_refused_unless_a_table_gives_them() -> None:
    listed = entries("train_test/a.svs", "train_test/a.geojson", "train_test/val/b.svs")
    slide_data = find_slides(listed)
    assert [(row.uri, row.code) for row in slide_data.rejects] == [("/train_test/a.svs", "ambiguous_folder")]
    assert paths(slide_data.rejected[0]) == ["train_test/a.svs", "train_test/a.geojson"]
    assert [slide.split for slide in slide_data.slides] == ["val"]
    assert [slide.split for slide in find_slides(listed, split_given=True).slides] == [None, None]


# --- annotations

ANNOTATIONS = [
    ("a.svs", "a.geojson", "geojson"),
    ("a.svs", "a.json", "geojson"),
    ("a.svs", "a.xml", "xml"),
    ("a.svs", "a.svs.xml", "xml"),
    ("a.svs", "a.svs.geojson", "geojson"),
    ("a.svs", "a.geojson.gz", "geojson"),
    ("a.svs", "a.geojson.zip", "geojson"),
    ("a.svs", "a.JSON.GZ", "geojson"),
    ("a.svs", "a_annotations.geojson", "geojson"),
    ("a.ome.tif", "a.geojson", "geojson"),
    ("a.ome.tif", "a.ome.geojson", "geojson"),
    ("a.ome.tif", "a.ome.tif.geojson", "geojson"),
    ("a.ome.tif", "a_mask.ome.tif", "image"),
    ("G10.tif", "g10.geojson", "geojson"),
    ("g10.TIF", "G10.Tif.GeoJSON", "geojson"),
    ("a b.svs", "a  b .geojson", "geojson"),
    (" a.svs", "a.geojson", "geojson"),
    ("a .svs", "a.svs.geojson ", "geojson"),
    ("é.svs", "e\u0301.geojson", "geojson"),
    ("a.svs", "a.png", "image"),
    ("a.svs", "a_mask.tif", "image"),
    ("a.svs", "a-Mask.tiff", "image"),
    ("a.svs", "a mask.png", "image"),
    ("a.svs", "a_masks.png", "image"),
    ("a.svs", "a.svs_mask.png", "image"),
    ("a.svs", "a-labelled.png", "image"),
    ("a.svs", "a_ground_truth.bmp", "image"),
    ("a.svs", "a_mask.jpg", "image"),
    ("a.svs", "masks/a.tif", "image"),
    ("a.svs", "a_100_200.png", "fovs"),
    ("a.svs", "a_100_200_mask.png", "fovs"),
    ("a.svs", "a_mask_100_200.png", "fovs"),
    ("a.svs", "A_X100_Y200_Labels.PNG", "fovs"),
    ("a.svs", "a/x100_y200.png", "fovs"),
    ("a.svs", "a/masks/100_200_mask.png", "fovs"),
    ("a.svs", "a [x=100,y=200,w=512,h=512].png", "fovs"),
    ("a.svs", "a [d=1,x=100,y=200,w=512,h=512]-labelled.png", "fovs"),
    ("a.svs", "a.svs [d=1.0,x=100,y=200,w=512,h=512].tif", "fovs"),
    ("a_mask.svs", "a_mask.geojson", "geojson"),
    ("a_100_200.svs", "a_100_200.png", "image"),
]


@pytest.mark.parametrize(("slide_path", "path", "kind"), ANNOTATIONS)
@pytest.mark.parametrize("where", ["data", "masks"])
def test_annotations_are_found_by_name(slide_path: str, path: str, kind: str, where: str) -> None:
    below = [path] if where == "masks" else []
    (slide,) = find_slides(entries(slide_path, *([] if below else [path])), entries(*below)).slides
    assert slide.kind == kind
    assert paths(slide.annotation) == [path]
    assert slide.annotation_in == where
    assert slide.doubtful == (where == "data" and path in ("a.png", "a_100_200.png") and kind == "image")
    if kind == "fovs":
        from_bounds = "[" in path
        assert fov_origin(slide.annotation[0], (7, 9)) == ((107, 209) if from_bounds else (100, 200))


def test_annotations_elsewhere() -> None:
    slide_data = find_slides(entries("a.svs"), entries("deep/a.geojson", "deep/b.geojson"))
    assert paths(slide_data.slides[0].annotation) == ["deep/a.geojson"]
    assert paths(slide_data.left.strays) == ["deep/b.geojson"]


def test_annotations_of_no_slide_are_named() -> None:
    listed = entries("a.svs", "b.geojson", "coco.json", "b_mask.png", "b.png", "masks/c.tif", "b [x=0,y=0,w=1,h=1].png")
    left = find_slides(listed).left
    assert set(paths(left.strays)) == {
        "b.geojson", "coco.json", "b_mask.png", "masks/c.tif", "b [x=0,y=0,w=1,h=1].png",
    }  # fmt: skip
    assert paths(left.others) == ["b.png"]
    sentence = str(left.describe())
    assert all(name in sentence for name in ("5 x annotation of no slide", "coco.json", "1 x file of another"))


def test_annotations_go_to_the_slide_that_they_name_in_full_or_lie_beside() -> None:
    same = by_id(find_slides(entries("A.svs", "A.tif", "A.svs.geojson", "A.tif_mask.png")))
    assert (same["A.svs"].kind, same["A.tif"].kind) == ("geojson", "image")
    apart = by_id(find_slides(entries("p/a.svs", "q/a.svs", "p/a.geojson", "q/masks/a.png")))
    assert (apart["p/a"].kind, apart["q/a"].kind) == ("geojson", "image")
    below = by_id(find_slides(entries("x/p/a.svs", "x/q/a.svs"), entries("p/a.geojson", "q/a.xml")))
    assert (below["x/p/a"].kind, below["x/q/a"].kind) == ("geojson", "xml")
    cases = by_id(find_slides(entries("a.svs", "A.ndpi", "a.geojson", "A.xml")))
    assert (cases["a"].kind, cases["A"].kind) == ("geojson", "xml")


def test_what_cannot_be_distinguished_is_rejected() -> None:
    slide_data = find_slides(entries("a.svs", "a.geojson", "a.xml", "b.svs"), root="s3://x")
    assert [(slide.slide_id, slide.kind) for slide in slide_data.slides] == [("a", None), ("b", None)]
    assert [(reject.uri, reject.code) for reject in slide_data.rejects] == [
        ("s3://x/a.geojson", "duplicate_annotation")
    ]
    assert all(name in slide_data.rejects[0].reason for name in ("a.geojson", "a.xml"))
    twice = find_slides(entries("p/a.svs", "q/a.svs"))
    assert [slide.slide_id for slide in twice.slides] == ["p/a", "q/a"]
    unclear = find_slides(entries("p/a.svs", "q/a.svs", "a.geojson"), root="d")
    assert [(reject.uri, reject.code) for reject in unclear.rejects] == [("d/a.geojson", "duplicate_stem")]
    assert len(unclear.slides) == 2
    named = find_slides(entries("P7-1.svs", "other.svs"), slide_regex=r"P\d+")
    assert [slide.slide_id for slide in named.slides] == ["P7"]
    assert [reject.code for reject in named.rejects] == ["bad_name"]


def test_an_annotation_in_both_places_is_refused() -> None:
    slide_data = find_slides(entries("a.svs", "a.geojson"), entries("a.png"), root="d", masks_root="m")
    (reject,) = slide_data.rejects
    assert (reject.uri, reject.code, slide_data.slides[0].kind) == ("d/a.geojson", "duplicate_annotation", None)
    assert "a.png (data.masks)" in reject.reason
    assert paths(slide_data.rejected[0]) == ["a.geojson", "a.png"]


@pytest.mark.parametrize(
    ("others", "kind", "previews"),
    [
        (["a.geojson", "a.png"], "geojson", ["a.png"]),
        (["a_mask.png", "a.png"], "image", ["a.png"]),
        (["a_0_0.png", "a.bmp"], "fovs", ["a.bmp"]),
        (["a_0_0.png", "a_0_0_mask.png"], "fovs", ["a_0_0.png"]),
        (["a_mask.png", "a_label.png"], "image", ["a_label.png"]),
        (["a.jpg"], None, ["a.jpg"]),
        (["a.png", "a.jpeg"], "image", ["a.jpeg"]),
        (["a.geojson", "a_0_0.jpg"], "geojson", ["a_0_0.jpg"]),
    ],
)
def test_pictures_yield_to_masks(others: list[str], kind: str | None, previews: list[str]) -> None:
    slide_data = find_slides(entries("a.svs", *others))
    assert not slide_data.rejects
    assert slide_data.slides[0].kind == kind
    assert paths(slide_data.left.previews) == previews


def test_fields_of_view_are_refused_one_by_one() -> None:
    listed = ["a.svs", "a_0_0.png", "a_5_5_mask.png", "a_5_5_mask.bmp", "a [d=2,x=0,y=9,w=8,h=8].png"]
    slide_data = find_slides(entries(*listed))
    assert paths(slide_data.slides[0].annotation) == ["a_0_0.png"]
    assert sorted(reject.code for reject in slide_data.rejects) == ["bad_annotation", "duplicate_annotation"]


def test_slides_and_images_are_distinguished() -> None:
    assert is_slide("x/a.tif")
    assert not is_slide("masks/a.tif")
    assert not is_slide("x/a_mask.tif")
    assert not is_slide("x/a_0_0_mask.tif")
    assert not is_slide(".hidden.svs")
    assert is_slide("unmasked/a.tif")
    assert is_slide("labeled/a.tif")
    assert holds_folders("d", entries("Train_Input/a.tif", "Train_GroundTruth/a.png"))
    assert not holds_folders("d", entries("train/a.tif"))
    with pytest.raises(UsageError, match=r"1 \.svs"):
        holds_folders("d", entries("Train_Input/a.tif", "b.svs"))
    with pytest.raises(UsageError, match=r"found: 2 \.txt"):
        holds_folders("d", entries("a.txt", "b.txt"))


# --- no file is lost

HIDDEN = [
    ".Trash-1000/files/old.svs", ".snapshot/daily.0/old.svs", "__MACOSX/._a.svs", ".ipynb_checkpoints/a.svs",
    "#recycle/old.svs", "@eaDir/a.svs@SynoEAStream", "$RECYCLE.BIN/a.svs", "lost+found/a.svs",
    "System Volume Information/a.svs", "train/Thumbs.db", "train/desktop.ini", "train/.DS_Store", "train/._a.svs",
    "~$a.svs",
]  # fmt: skip


def test_hidden_and_system_files_are_ignored_and_reported() -> None:
    slide_data = find_slides(entries("train/a.svs", *HIDDEN), entries(".Trash-1/a.geojson"))
    assert [slide.path for slide in slide_data.slides] == ["train/a.svs"]
    assert paths(slide_data.left.hidden) == [*sorted(HIDDEN), ".Trash-1/a.geojson"]
    assert (slide_data.left.others, slide_data.left.strays) == ((), ())
    sentence = str(slide_data.left.describe())
    assert f"{len(HIDDEN) + 1} x hidden or system file" in sentence
    assert all(
        name in sentence for name in ("#recycle", ".Trash-1000", ".snapshot", "$RECYCLE.BIN", ".ipynb_checkpoints")
    )


FOLDERS = ["", "train/", "test/p1/", "Train_Val/", "a/", "A/", "train/a/", "masks/", ".Trash-1/", "#recycle/", "x\n/"]
STEMS = [
    "a",
    "A",
    "b",
    "a.ome",
    "a_mask",
    "a_0_0",
    "a_0_0_mask",
    "0_0",
    "a [x=0,y=0,w=1,h=1]",
    "é",
    "e\u0301",
    "\udcff",
]
SUFFIXES = [
    ".svs", ".tif", ".mrxs", ".MRXS", ".dcm", ".vms", ".opt", ".dat", ".jpg", ".png", ".geojson", ".json.gz", ".xml",
    ".svs.geojson", ".txt", "",
]  # fmt: skip
PATHS = st.builds("{}{}{}".format, st.sampled_from(FOLDERS), st.sampled_from(STEMS), st.sampled_from(SUFFIXES)) | (
    st.sampled_from(["a/Slidedat.ini", "A/Slidedat.ini", "train/a/Index.dat", "../a.svs", "train//b.svs", "a.svs/"])
)
LISTS = st.lists(st.builds(Entry, PATHS, st.integers(0, 2), st.just("v")), unique_by=lambda e: e.path, max_size=30)


@given(LISTS, LISTS, st.sampled_from([None, r"^(.)", "b"]), st.data())
def test_every_file_is_a_slide_s_or_rejected_or_ignored(
    listed: list[Entry], masks: list[Entry], regex: str | None, data: st.DataObject
) -> None:
    heads = Heads()
    for entry in listed:
        match entry.path.rpartition(".")[2]:
            case "dcm" if data.draw(st.booleans()):
                heads.series[entry.path] = data.draw(st.sampled_from(["1.2", "1.3", "a"]))
            case "dcm":
                heads.refused[entry.path] = BadInput("unreadable", "cut")
            case "vms":
                heads.named[entry.path] = frozenset(data.draw(st.lists(st.sampled_from(["a.opt", "a.svs", "b.jpg"]))))
    slide_data = find_slides(listed, masks, slide_regex=regex, root="d", masks_root="m", heads=heads)
    placed = Counter(slide_data.ignored)
    for slide in slide_data.slides:
        placed.update((*slide.files, *slide.annotation))
        assert (slide.kind is None) == (not slide.annotation)
        assert set(slide.annotation) <= set(listed if slide.annotation_in == "data" else masks)
    for files in slide_data.rejected:
        placed.update(files)
    assert placed == Counter([*listed, *masks])
    assert len(slide_data.rejects) == len(slide_data.rejected)
    assert len({slide.image_id for slide in slide_data.slides}) == len(slide_data.slides)
    if regex is None:
        assert len({slide.slide_id for slide in slide_data.slides}) == len(slide_data.slides)
    again = data.draw(st.permutations(listed))
    assert find_slides(again, masks, slide_regex=regex, root="d", masks_root="m", heads=heads) == slide_data


def test_ten_thousand_files_take_seconds() -> None:
    listed = [
        f"{'train' if number % 2 else 'test'}/p{number % 97}/s{number}{suffix}"
        for number in range(2500)
        for suffix in (".tif", ".geojson", "_0_0_mask.png", ".txt")
    ]
    started = time.perf_counter()
    slide_data = find_slides(entries(*listed))
    assert time.perf_counter() - started < 10
    assert len(slide_data.slides) == 2500


def test_stems() -> None:
    names = ["x/a.svs", "a.ome.tif", "a.OME.TIFF", "a.b.tif", "a", ".svs", "a\nb.tif"]
    assert [stem_of(name) for name in names] == ["a", "a", "a", "a.b", "a", "", "a\nb"]


def test_real_folder_of_slides() -> None:
    from conftest import SHARED

    folder = SHARED / "data" / "slides"
    if not folder.is_dir():
        pytest.skip(f"no real slides at {folder}")
    slide_data = find_slides(open_store(str(folder)).list())
    assert len(slide_data.slides) == 4
    mirax = next(slide for slide in slide_data.slides if slide.path.endswith(".mrxs"))
    assert Path(mirax.path).name == "Mirax2-Fluorescence-1.mrxs"
    assert len(mirax.files) == 6
