"""What ingest takes from a listing: one role a file, nothing lost unheard, an error where nothing is left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.runs import run
from support.slide_files import picture, write_tiff

from apacs_ray.config.settings import DataSettings, Settings
from apacs_ray.data.folders import FolderData
from apacs_ray.data.ignored import Ignored
from apacs_ray.errors import UsageError
from apacs_ray.stages.source import Source, say_found
from apacs_ray.storage import LocalStore, Store, open_store
from apacs_ray.testing.runs import ROOT


def touch(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def roles(store: Store, masks: str | None) -> tuple[set[str], set[str]]:
    """The paths that are data, and those that are masks."""
    source = Source(store, Settings(data=DataSettings(masks=masks)), LocalStore("/nowhere"))
    return {entry.path for entry in source.entries}, {entry.path for entry in source.mask_entries}


def test_what_lies_below_data_masks_leaves_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "d"
    touch(data, "train/a.tif", "seg/a.png", "seg/deep/b.png", "segments/c.tif")
    (tmp_path / "link").symlink_to(data / "seg")
    (data / "also").symlink_to(data / "seg")
    monkeypatch.chdir(tmp_path)
    for masks in (
        f"{data}/seg",
        f"{data}/seg/",
        "d/seg",
        f"{data}/train/../seg",
        f"file://{data}/seg",
        "link",
        "d/also",
    ):
        paths_by_role = roles(open_store(str(data)), masks)
        assert paths_by_role == ({"train/a.tif", "segments/c.tif"}, {"a.png", "deep/b.png"}), masks


def test_data_below_data_masks_and_data_that_is_data_masks(tmp_path: Path) -> None:
    touch(tmp_path, "slides/a.tif", "slides/a.geojson", "b.geojson")
    store = open_store(str(tmp_path / "slides"))
    assert roles(store, str(tmp_path)) == ({"a.tif", "a.geojson"}, {"b.geojson"})
    assert roles(store, f"{tmp_path}/slides/.") == ({"a.tif", "a.geojson"}, set())
    assert roles(store, None) == ({"a.tif", "a.geojson"}, set())
    with pytest.raises(UsageError, match="nothing there"):
        roles(store, str(tmp_path / "none"))


def test_roles_in_a_bucket(s3: str) -> None:
    store = open_store(f"{s3}/d")
    for path in ("train/a.tif", "seg/a.png", "segments/c.tif"):
        store.write(path, b"x")
    assert roles(store, f"{s3}/d/seg/") == ({"train/a.tif", "segments/c.tif"}, {"a.png"})
    assert roles(store, f"{s3}/d") == ({"train/a.tif", "seg/a.png", "segments/c.tif"}, set())
    assert roles(store.child("train"), s3) == ({"a.tif"}, {"d/seg/a.png", "d/segments/c.tif"})


def test_the_line_of_folders_stays_short(capsys: pytest.CaptureFixture[str]) -> None:
    folders = tuple(f"train/patient {number} of the first batch (train input)" for number in range(500))
    say_found(FolderData((), (), (), Ignored(), folders, ()))
    (line,) = capsys.readouterr().out.splitlines()
    assert "patient 0 of" in line
    assert line.endswith("more")
    assert len(line) < 400


LIST = """
import os, sys
from apacs_ray.console import print_log, say
from apacs_ray.storage import LocalStore
print_log()
say("ready")  # whatever is imported late is imported now: the next user may not read it
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
print(sorted(entry.path for entry in LocalStore(sys.argv[1]).list()))
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_folders_that_may_not_be_listed_are_logged(open_folder: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become a user that may not read its own files")
    if not all(path.stat().st_mode & 0o001 for path in open_folder.parents):
        pytest.skip("other users do not reach the folder of temporary files")
    touch(open_folder, "d/open/a.tif", "d/closed/b.tif", "d/names only/c.tif", "d/names only/d.tif")
    (open_folder / "d/closed").chmod(0o700)
    (open_folder / "d/names only").chmod(0o744)
    command = [sys.executable, "-c", LIST, str(open_folder / "d")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['open/a.tif']"
    assert "d/closed: cannot be listed (Permission denied)" in done.stdout
    assert "d/names only: 2 files may not be read" in done.stdout
    assert done.stdout.count("\n") == 4  # and that it is ready


def test_a_folder_that_is_not_there_is_no_news(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(LocalStore(str(tmp_path)).list("none")) == []
    assert capsys.readouterr().out == ""


def rejects(output: Path) -> dict[str, str]:
    (path,) = output.glob("rejects/*.parquet")
    return {Path(row["uri"]).name: row["code"] for row in pq.read_table(path).to_pylist()}


def test_an_ingest_that_leaves_no_slide_fails_and_its_rejects_are_written(tmp_path: Path) -> None:
    data = tmp_path / "d"
    (data / "train").mkdir(parents=True)
    write_tiff(data / "train/empty.tif", np.full((512, 512, 3), 240, np.uint8))
    for name in ("a.dcm", "b.dcm", "c.svs"):
        (data / "train" / name).write_text("no slide")
    done = run("--data", str(data), "--output", str(tmp_path / "o"), "--tiles.size", "256", script="ingest.py")
    assert done.status == 1, done.summary
    assert (
        "ingest: no tile is left: 3 of 4 slides rejected, 4 tiles skipped (background 4); the reasons are in"
        in done.text
    )
    assert rejects(tmp_path / "o") == dict.fromkeys(("a.dcm", "b.dcm", "c.svs"), "unsupported_slide")
    assert "Traceback" not in done.text


def test_an_ingest_that_leaves_no_pair_fails_and_its_rejects_are_written(tmp_path: Path) -> None:
    for folder, name in (("Train_Input", "a"), ("Train_GroundTruth", "b"), ("Test_Input", "c")):
        (tmp_path / "d" / folder).mkdir(parents=True)
        Image.fromarray(picture(64, 64)).save(tmp_path / "d" / folder / f"{name}.png")
    done = run("--data", str(tmp_path / "d"), "--output", str(tmp_path / "o"))  # before any training
    assert done.status == 1, done.summary
    assert "ingest: no tile is left: 3 of 3 pairs rejected; the reasons are in" in done.text
    assert rejects(tmp_path / "o") == {"a.png": "missing_mask", "b.png": "missing_image", "c.png": "missing_mask"}


def used(data: Path, output: Path) -> list[tuple[str, ...]]:
    return Source(open_store(str(data)), Settings(), open_store(str(output))).used


def test_files_that_belong_to_nothing_are_no_input(tmp_path: Path) -> None:
    """A README or a Thumbs.db that is added must not throw trained members away."""
    data = tmp_path / "data"
    touch(data, "Train_Input/a.jpg", "Train_GroundTruth/a.png", "Train_Input/b.jpg", "Train_GroundTruth/b.png")
    before = used(data, tmp_path / "run")
    touch(data, "Thumbs.db", "README.md", "Train_Input/Thumbs.db", "Train_Input/.hidden.jpg", "notes/x.txt")
    assert used(data, tmp_path / "run") == before
    (data / "Train_Input" / "a.jpg").write_bytes(b"another")
    changed = used(data, tmp_path / "run")
    assert changed != before
    touch(data, "Train_Input/alone.jpg")  # a reject, which rejects/ names
    assert used(data, tmp_path / "run") != changed


def test_the_run_s_own_folder_never_is_data(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.svs", "test/b.svs")
    before = used(tmp_path, tmp_path / "runs" / "data")
    touch(tmp_path, "runs/data/train/c.svs", "runs/data/manifest/1.png")
    assert used(tmp_path, tmp_path / "runs" / "data") == before
    assert len(used(tmp_path, tmp_path / "elsewhere")) > len(before)
    with pytest.raises(UsageError, match="--output is the folder of --data"):
        used(tmp_path, tmp_path)
