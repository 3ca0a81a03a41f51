"""The folder layout: roles by name, pairs by stem, and no file lost."""

from __future__ import annotations

import unicodedata
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apacs_ray.data.folders import find_pairs, is_folder_layout
from apacs_ray.data.words import splits_of
from apacs_ray.storage import Entry


def listing(*paths, size=9):
    return [Entry(path, size, "v1") for path in paths]


def codes(folder_data):
    return [reject.code for reject in folder_data.rejects]


@pytest.mark.parametrize(
    ("image", "mask", "split"),
    [
        ("APACS23_Train_Input/7.jpg", "APACS23_Train_GroundTruth/7.png", "train"),
        ("train/input/7.JPG", "train/groundtruth/7.PNG", "train"),
        ("TEST-INPUT/7.tiff", "Test/ground_truth/7.tif", "test"),
        ("val_input/7.bmp", "val ground-truth/7.bmp", "val"),
        ("x/TestInput/deep/7.jpeg", "TestGroundTruth/7.png", "test"),
        ("input/validation/7.png", "GroundTruth/Val/7.png", "val"),
        ("apacs23testinput/7.png", "groundtruthtest/7.png", "test"),
        ("test_run/Train_Input/7.png", "test_run/Train_Groundtruth/7.png", "train"),
        ("Valencia/train/input/7.png", "train/validated/groundtruth/7.png", "train"),
        ("BatchTest/testis/input/7.png", "BatchTest/groundtruth/7.png", "test"),
        ("Training2 inputs/7.png", "training2/GroundTruth/7.png", "train"),
        ("TESTSET/input/7.png", "test-set/ground truth/7.png", "test"),
    ],
)
def test_folders_give_split_and_role(image, mask, split):
    folder_data = find_pairs(listing(mask, image), slide_regex=None)
    assert not folder_data.rejects
    (pair,) = folder_data.pairs
    assert (pair.split, pair.stem, pair.slide_id) == (split, "7", "7")
    assert (pair.image.path, pair.mask.path) == (image, mask)
    assert is_folder_layout((*folder_data.ignored, pair.image))


@pytest.mark.parametrize(
    "folder",
    ["", "input/", "train/", "latest_input/", "evaluation/input/", "train/images/", "Valencia/input/", "testis/input/"],
)
def test_other_folders_are_not_the_layout(folder):
    entries = listing(f"{folder}7.jpg")
    assert not is_folder_layout(entries)
    folder_data = find_pairs(entries)
    assert folder_data.ignored == tuple(entries)
    assert not folder_data.folders


@pytest.mark.parametrize(
    ("folder", "splits"),
    [
        *((name, {"train"}) for name in ("train", "TRAIN", "Training", "train2", "2train", "trainA", "TrainImages")),
        *((name, {"val"}) for name in ("val", "valid", "Validation", "val_set", "valset", "ValidationSet", "xVal")),
        *((name, {"test"}) for name in ("test", "tests", "testing", "Test-Set", "HETest", "TESTset", "inputtest")),
        *((name, {"train", "val"}) for name in ("train_val", "TrainVal", "trainval")),
        *((name, set()) for name in ("Valencia", "testis", "validated", "latest", "interval", "contest", "retrained")),
        *((name, set()) for name in ("untrained", "tester", "trainer", "Testosterone", "evaluation", "valve", "")),
    ],
)
def test_words_that_name_a_split(folder, splits):
    assert splits_of(folder) == splits


def test_patients_may_have_the_same_stems():
    listed = [f"train/{role}/{p}/i05.png" for role in ("input", "groundtruth") for p in ("p1", "p2")]
    listed += [f"{p}/Test_{role}/i05.png" for role in ("Input", "GroundTruth") for p in ("p1", "p2")]
    folder_data = find_pairs(listing(*listed, "val_input/p1/i05.png", "val_groundtruth/i05.png"))
    assert not folder_data.rejects
    assert {(pair.slide_id, pair.image.path, pair.mask.path) for pair in folder_data.pairs} == {
        ("train/p1/i05", "train/input/p1/i05.png", "train/groundtruth/p1/i05.png"),
        ("train/p2/i05", "train/input/p2/i05.png", "train/groundtruth/p2/i05.png"),
        ("test/p1/i05", "p1/Test_Input/i05.png", "p1/Test_GroundTruth/i05.png"),
        ("test/p2/i05", "p2/Test_Input/i05.png", "p2/Test_GroundTruth/i05.png"),
        ("val/i05", "val_input/p1/i05.png", "val_groundtruth/i05.png"),  # one of its stem, so its folder may differ
    }
    assert len({pair.image_id for pair in folder_data.pairs}) == 5


def test_a_stem_in_several_places_is_not_joined_across_them():
    listed = [
        "train/input/p1/a.png",
        "train/input/p2/a.png",
        "train/groundtruth/p1/a.png",
        "train/groundtruth/p3/a.png",
    ]
    folder_data = find_pairs(listing(*listed))
    assert [(pair.slide_id, pair.mask.path) for pair in folder_data.pairs] == [("p1/a", "train/groundtruth/p1/a.png")]
    assert {reject.uri: reject.code for reject in folder_data.rejects} == {
        "train/input/p2/a.png": "missing_mask",
        "train/groundtruth/p3/a.png": "missing_image",
    }
    assert "train/groundtruth/p1/a.png" in folder_data.rejects[0].reason


@pytest.mark.parametrize("mask", ["a_mask.png", "a-Mask.tif", "a masks.png", "a_GroundTruth.png", "a_label.png"])
def test_masks_may_say_that_they_are_masks(mask):
    (pair,) = find_pairs(listing("train/input/a.png", f"train/groundtruth/{mask}")).pairs
    assert pair.mask.path == f"train/groundtruth/{mask}"
    both = find_pairs(listing("train/input/a.png", f"train/groundtruth/{mask}", "train/groundtruth/a.png"))
    assert [pair.mask.path for pair in both.pairs] == ["train/groundtruth/a.png"]
    assert [reject.uri for reject in both.rejects] == [f"train/groundtruth/{mask}"]
    image = find_pairs(listing("train/input/a_mask.png", "train/groundtruth/a_mask.png"))
    assert [pair.stem for pair in image.pairs] == ["a_mask"]


def test_names_are_joined_by_stem_and_kept_verbatim():
    composed, decomposed = "Zo\u00eb 1.5\u00b5m", unicodedata.normalize("NFD", "Zo\u00eb 1.5\u00b5m")
    image, mask = f"Train Input/{decomposed}.jpg", f"Train GroundTruth/{composed}.png"
    (pair,) = find_pairs(listing(image, mask)).pairs
    assert (pair.image.path, pair.mask.path, pair.stem) == (image, mask, composed)
    assert pair.image_id == f"Train Input/{decomposed}"


def test_stems_are_case_sensitive():
    folder_data = find_pairs(listing("Train_Input/a.jpg", "Train_GroundTruth/A.png"))
    assert codes(folder_data) == ["missing_image", "missing_mask"]
    assert [reject.slide_id for reject in folder_data.rejects] == ["A", "a"]


def test_a_stem_in_two_splits_is_two_slides():
    paths = [
        f"{split}_{role}/{stem}.png"
        for split in ("Train", "Test")
        for role in ("Input", "GroundTruth")
        for stem in "ab"
    ]
    folder_data = find_pairs(listing(*paths, "Val_Input/c.png", "Val_GroundTruth/c.png"))
    assert [pair.slide_id for pair in folder_data.pairs] == ["train/a", "train/b", "c", "test/a", "test/b"]
    assert len({pair.image_id for pair in folder_data.pairs}) == 5
    assert folder_data.shared_slides == ()


def test_every_defect_has_its_code_and_root():
    ok = listing("Train_Input/ok.jpg", "Train_GroundTruth/ok.png")
    bad = listing(
        "Train_Input/lonely.jpg",
        "Train_GroundTruth/orphan.png",
        "Train_Input/twice.jpg",
        "Train_Input/twice.PNG",
        "Train_GroundTruth/twice.png",
        "Train_Input/notes.txt",
        "Train_Input/nosuffix",
        "Train_GroundTruth/zero.png",
        "Train_Test_Input/which.png",
    )
    folder_data = find_pairs([*ok, *bad, Entry("Train_Input/zero.jpg", 0, "v1")], root="s3://bucket/data set/")
    assert [pair.stem for pair in folder_data.pairs] == ["ok"]
    by_uri = {reject.uri: reject for reject in folder_data.rejects}
    root = "s3://bucket/data set/"
    assert {uri.removeprefix(root): reject.code for uri, reject in by_uri.items()} == {
        "Train_Input/lonely.jpg": "missing_mask",
        "Train_GroundTruth/orphan.png": "missing_image",
        "Train_GroundTruth/twice.png": "duplicate_stem",
        "Train_Input/notes.txt": "unknown_suffix",
        "Train_Input/nosuffix": "unknown_suffix",
        "Train_Input/zero.jpg": "empty_file",
        "Train_Test_Input/which.png": "ambiguous_folder",
    }
    reason = by_uri[root + "Train_GroundTruth/twice.png"].reason
    assert all(name in reason for name in ("twice.jpg", "twice.PNG", "twice.png"))
    assert sum(map(len, folder_data.rejected)) == len(bad) + 1


def test_normal_forms_of_one_stem_are_duplicates():
    stems = ["\u00e9", "e\u0301"]
    folder_data = find_pairs(listing(*(f"Train_Input/{stem}.jpg" for stem in stems), "Train_GroundTruth/\u00e9.png"))
    assert codes(folder_data) == ["duplicate_stem"]
    assert len(folder_data.rejected[0]) == 3


@pytest.mark.parametrize(
    "path",
    [
        "Train_Input/.DS_Store",
        "Train_Input/Thumbs.db",
        "Train_Input/._7.jpg",
        "__MACOSX/Train_Input/7.jpg",
        "Train_Input/",
        ".cache/train/input/7.png",
        "train/input/.Trash-1000/files/7.png",
        "train/input/#recycle/7.png",
        "train/@eaDir/input/7.png",
        "train/input/$RECYCLE.BIN/7.png",
        "README.md",
    ],
)
def test_files_of_the_system_are_counted_as_ignored(path):
    folder_data = find_pairs(listing(path))
    assert [entry.path for entry in folder_data.ignored] == [path]
    assert not folder_data.rejects


@pytest.mark.parametrize(
    ("regex", "slide"),
    [(r"^([A-Z]+\d+)_", "S12"), (r"^[A-Z]+\d+", "S12"), (r"(x)?_(\d+)$", None), (r"^$", None)],
)
def test_slide_regex(regex, slide):
    folder_data = find_pairs(listing("Train_Input/S12_003.jpg", "Train_GroundTruth/S12_003.png"), slide_regex=regex)
    if slide is None:
        assert codes(folder_data) == ["bad_name"]
        assert regex in folder_data.rejects[0].reason
    else:
        assert [pair.slide_id for pair in folder_data.pairs] == [slide]


def test_slides_in_two_splits_are_named():
    paths = [f"{split}_{role}/S1_{split}.png" for split in ("Train", "Test") for role in ("Input", "GroundTruth")]
    folder_data = find_pairs(listing(*paths), slide_regex=r"^(\w+)_")
    assert folder_data.shared_slides == ("S1",)
    assert {pair.slide_id for pair in folder_data.pairs} == {"S1"}


FOLDERS = [
    "Train_Input",
    "train/groundtruth",
    "Test Input",
    "Test_GroundTruth/more",
    "val_input",
    "Train_Val_Input",
    "train/groundtruth/p1",
    "Train_Input/p1",
    "p2/Train_Input",
    "Train_Input/.Trash-1",
    "other",
    "",
]
NAMES = st.tuples(
    st.sampled_from(["", ".", "a", "A", "b_1", "b_2", "a_mask", "\u00e9", "e\u0301", "a.b"]),
    st.sampled_from(["", ".jpg", ".JPG", ".png", ".tif", ".txt", "/"]),
).map("".join)
ENTRIES = st.lists(
    st.builds(
        lambda folder, name, size: Entry(f"{folder}/{name}".lstrip("/"), size, "v"),
        st.sampled_from(FOLDERS),
        NAMES,
        st.integers(0, 2),
    ),
    unique_by=lambda entry: entry.path,
    max_size=25,
)


@given(ENTRIES, st.sampled_from([None, r"_(\d)$", "."]), st.randoms())
def test_every_entry_is_in_one_pair_one_reject_or_ignored(entries, regex, random):
    folder_data = find_pairs(entries, slide_regex=regex)
    placed = Counter(folder_data.ignored)
    placed.update(entry for pair in folder_data.pairs for entry in (pair.image, pair.mask))
    placed.update(entry for unit in folder_data.rejected for entry in unit)
    assert placed == Counter(entries)
    rejects, rejected = folder_data.rejects, folder_data.rejected
    assert len(rejects) == len(rejected)
    assert all(any(entry.path == r.uri for entry in unit) for r, unit in zip(rejects, rejected, strict=True))
    assert len({pair.image_id for pair in folder_data.pairs}) == len(folder_data.pairs)
    if regex is None:
        assert len({pair.slide_id for pair in folder_data.pairs}) == len(folder_data.pairs)
    random.shuffle(entries)
    assert find_pairs(entries, slide_regex=regex) == folder_data


def test_real_cells(real_cells):
    paths = [path for path in real_cells.rglob("*") if path.is_file()]
    folder_data = find_pairs([Entry(p.relative_to(real_cells).as_posix(), p.stat().st_size, "v") for p in paths])
    assert Counter(pair.split for pair in folder_data.pairs) == {"train": 80, "test": 20}
    assert not folder_data.rejects
    assert len(folder_data.folders) == 4
