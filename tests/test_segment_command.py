"""`segment.py` as a user runs it: new slides only, damaged ones rejected, killed and begun again to the same bytes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.runs import run, start
from support.segmentation import OneSlide, with_settings, write_ensemble
from support.slide_files import picture, write_slide, write_tiff

from apacs_ray.outputs.slide_files import GEOJSON, MASK, OVERVIEW, PARQUET, SLIDE_JSON
from apacs_ray.storage import LocalStore
from apacs_ray.testing.cluster import RayCluster
from apacs_ray.testing.runs import kill_when

HOW = ["--segment.core", "128", "--segment.use", "fcn8", "--segment.tissue", "false"]
ROOT = Path(__file__).resolve().parent.parent
FILES = (MASK, GEOJSON, PARQUET, OVERVIEW)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    return write_ensemble(tmp_path_factory.mktemp("model"))


def test_only_new_slides_are_done_and_a_kill_changes_nothing(model: LocalStore, tmp_path: Path) -> None:
    slides, output = tmp_path / "slïdes", tmp_path / "out"
    (slides / "deep").mkdir(parents=True)
    write_tiff(slides / "deep/a.tif", picture(300, 200))
    (slides / "broken.svs").write_bytes(b"no slide" * 100)
    command = ["--model", str(model.root), "--slides", str(slides), "--output", str(output), *HOW]
    first = run(*command, script="segment.py")
    assert first.status == 0, first.summary
    (reject,) = pq.read_table(output / "rejects/segment.parquet").to_pylist()
    assert (reject["slide_id"], reject["stage"]) == ("broken", "segment")
    stage = json.loads((output / "run.json").read_text())["stages"]["segment"]
    assert (stage["state"], stage["rows_in"], stage["rows_out"], stage["rejected"]) == ("done", 2, 1, 1)
    before = (output / "a" / SLIDE_JSON).stat().st_mtime_ns

    write_slide(slides / "b.mrxs", picture(900, 800, seed=1), margin=1)
    process = start(*command, script="segment.py")
    died = kill_when(process, lambda: any(output.glob("b/.parts-*/cores-*.parquet")))
    assert died.status == -signal.SIGKILL
    assert not (output / "b" / SLIDE_JSON).exists()
    write_tiff(slides / "c.tif", picture(300, 130))
    there = _files_of(output)
    dry = run(*command, "--dry-run", "--data.max_rejects", "0", script="segment.py")
    assert dry.status == 0, dry.summary
    assert _files_of(output) == there
    rows = {line.split()[1]: line for line in dry.text.splitlines() if re.match(r"│ \w", line)}
    assert [*rows] == ["broken", "b", "c", "a"]
    parts = len(list(output.glob("b/.parts-*/cores-*.parquet")))
    for slide, what in (
        ("broken", "rejected: "),
        ("b", f"goes on: {parts} of "),
        ("c", "6 of 6, 128 px"),
        ("a", "unchanged"),
    ):
        assert what in rows[slide]
    assert "4 slides: 2 to segment, 1 unchanged, 1 rejected" in dry.text
    assert "1 of 4 slides rejected, data.max_rejects (0) allows 0: it would fail" in dry.text
    assert re.search(r"2 workers of 0\.5 CPU.*at most 4 tasks that read", dry.text, re.S)
    again = run(*command, script="segment.py")
    assert again.status == 0, again.summary
    assert "3 slides to segment, 1 unchanged" in again.text
    assert (output / "a" / SLIDE_JSON).stat().st_mtime_ns == before
    assert not list(output.glob("*/.parts-*"))

    settings = with_settings(core=128, use="fcn8")
    plain = OneSlide(slides / "b.mrxs", model, tmp_path / "plain", settings).run()
    for name in FILES:
        assert (output / "b" / name).read_bytes() == (plain / name).read_bytes(), name
    record = json.loads((output / "b" / SLIDE_JSON).read_text())
    assert record["files"].keys() == set(FILES)
    documented = (ROOT / "docs/outputs.md").read_text().partition("\n## SLIDE/slide.json\n")[2]
    assert sorted(record) == sorted(re.findall(r"^\| `(\w+)` ", documented, re.M))
    assert record["readable"] == 1


def test_where_ray_has_a_gpu_the_files_are_the_same(model: LocalStore, tmp_path: Path) -> None:
    """Which is a number here; but Ray Data takes other arguments for what asks for GPUs."""
    slides, output = tmp_path / "slides", tmp_path / "out"
    slides.mkdir()
    write_tiff(slides / "a.tif", picture(400, 300))
    command = ["--model", str(model.root), "--slides", str(slides), "--output", str(output), *HOW]
    cluster = RayCluster(tmp_path, head_gpus=1)
    try:
        there = run(*command, script="segment.py", env=cluster.joined)
    finally:
        cluster.stop()
    assert there.status == 0, there.summary
    assert "1 worker of a GPU" in there.text
    alone = OneSlide(slides / "a.tif", model, tmp_path / "alone", with_settings(core=128, use="fcn8")).run()
    for name in FILES:
        assert (output / "a" / name).read_bytes() == (alone / name).read_bytes(), name


def _files_of(output: Path) -> dict[Path, int]:
    """When each file was written, but those of the lease, which every command takes."""
    return {
        path: path.stat().st_mtime_ns
        for path in output.rglob("*")
        if path.is_file() and not path.name.startswith((".run.lock", "run.lock"))
    }


def test_damaged_slides_among_others_are_rejects(model: LocalStore, tmp_path: Path) -> None:
    slides, output = tmp_path / "slides", tmp_path / "out"
    slides.mkdir()
    for number in range(15):
        write_tiff(slides / f"whole-{number:02d}.tif", picture(70 + 3 * number, 64, seed=number))
    whole = (slides / "whole-00.tif").read_bytes()
    (slides / "noise.svs").write_bytes(bytes(range(256)) * 9)
    (slides / "empty.tif").touch()
    (slides / "cut.tif").write_bytes(whole[: len(whole) // 2])
    (slides / "header.tif").write_bytes(whole[:8])
    (slides / "alone.mrxs").write_bytes(b"no folder beside it")
    command = ["--model", str(model.root), "--slides", str(slides), "--output", str(output), *HOW]
    done = run(*command, script="segment.py")
    assert done.status == 0, done.summary
    rejects = pq.read_table(output / "rejects/segment.parquet").to_pylist()
    assert sorted(row["uri"].rpartition("/")[2] for row in rejects) == [
        "alone.mrxs", "cut.tif", "empty.tif", "header.tif", "noise.svs",
    ]  # fmt: skip
    assert all(row["reason"] for row in rejects)
    assert sorted(path.parent.name for path in output.glob(f"*/{SLIDE_JSON}")) == [
        f"whole-{number:02d}" for number in range(15)
    ]
    stage = json.loads((output / "run.json").read_text())["stages"]["segment"]
    assert (stage["rows_in"], stage["rows_out"], stage["rejected"]) == (20, 15, 5)
    strict = run(*command, "--data.max_rejects", "4", script="segment.py")
    assert strict.status == 1, strict.summary
    assert "15 unchanged" in strict.text


def test_it_is_a_function_too(model: LocalStore, tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", picture(300, 200))
    script = (
        "import apacs_ray, sys\n"
        "how = apacs_ray.Settings.model_validate({'segment': {'use': 'fcn8', 'tissue': False}})\n"
        "found = apacs_ray.segment(sys.argv[1], sys.argv[2], sys.argv[3], how)\n"
        "print('objects', {slide: one.objects for slide, (one, _) in found.done.items()}, found.unchanged)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, str(model.root), str(tmp_path / "a.tif"), str(tmp_path / "out")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    record = json.loads((tmp_path / "out/a" / SLIDE_JSON).read_text())
    assert record["objects"] > 0
    assert f"objects {{'a': {record['objects']}}} 0" in process.stdout


def test_what_cannot_be_is_told_in_a_line(model: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    write_tiff(tmp_path / "slides/a.tif", picture(64, 64))
    given = ["--output", str(tmp_path / "out")]
    cases = [
        (["--model", str(tmp_path / "nothing"), "--slides", str(tmp_path / "slides")], "no fusion/model.json there"),
        (["--model", str(model.root), "--slides", str(tmp_path / "nothing")], "nothing there"),
        (["--model", str(model.root), "--slides", str(model.root)], "no slides there"),
        (["--model", str(model.root), "--slides", str(tmp_path / "slides"), "--segment.core", "100"], "segment.core"),
        (
            ["--model", str(model.root), "--slides", str(tmp_path / "slides"), "--segment.roi", "nothing.geojson"],
            "segment.roi nothing.geojson: no such file",
        ),
    ]
    for more, told in cases:
        done = run(*more, *given, script="segment.py")
        assert done.status == 2, done.summary
        assert told in done.text.splitlines()[-1]
        assert "Traceback" not in done.text
