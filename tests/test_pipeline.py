"""Whole runs: locally, from and to S3, killed at every stage and resumed, and as a submitted job."""

from __future__ import annotations

import csv
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from support.geojson import collection, polygon
from support.runs import SMALL, Once, run, start
from support.slide_files import write_slide, write_tiff

from apacs_ray.data.grid import Box
from apacs_ray.models.spec import ModelSpec
from apacs_ray.runs.lease import Lease
from apacs_ray.slides.open import open_slide
from apacs_ray.slides.reader import read_box
from apacs_ray.storage import open_store
from apacs_ray.synthetic.slide import render, slide_specs
from apacs_ray.testing.runs import SLOWLY, kill_when, read_json
from apacs_ray.training.dataset import decode_pixels

COUNTS = ("tp", "fp", "tn", "fn")


def test_what_a_run_leaves(undisturbed: Path) -> None:
    record = read_json(undisturbed / "run.json")
    assert {name: stage["state"] for name, stage in record["stages"].items()} == dict.fromkeys(
        ("ingest", "train_members", "heatmaps", "train_fusion", "evaluate"), "done"
    )
    for stage in record["stages"].values():
        assert stage["rows_in"] == stage["rows_out"] + sum(stage["skipped"].values()) + stage["rejected"]
    assert record["stages"]["ingest"]["result"]["val_unit"] == "image"
    assert not (undisturbed / "run.lock").exists()
    tiles = pq.read_table(undisturbed / "tiles")
    assert tiles.num_rows == 4 * 14  # 80 x 70 px: 64 + 16 by 64 + 6
    assert len(set(tiles["tile_id"].to_pylist())) == tiles.num_rows
    assert set(tiles["split"].to_pylist()) == {"train", "val", "test"}
    metrics = read_json(undisturbed / "evaluation/metrics.json")
    assert list(metrics) == ["fcn32", "fcn16", "fcn8", "majority", "mean", "fusion", "otsu"]
    for row in metrics.values():
        assert sum(row[count] for count in COUNTS) == 4 * 80 * 70
    for name in ("fcn32", "fcn16", "fcn8"):
        spec = ModelSpec.from_json((undisturbed / f"members/{name}/model.json").read_bytes())
        assert (spec.name, spec.training_data) == (name, record["stages"]["ingest"]["fingerprint"])
        assert (undisturbed / f"members/{name}/history.csv").read_text().count("\n") == 4
    curves = sorted(path.parent.relative_to(undisturbed / "tensorboard") for path in undisturbed.rglob("*tfevents*"))
    trained, tested = ["fusion", "members/fcn16", "members/fcn32", "members/fcn8"], [f"evaluation/{m}" for m in metrics]
    assert list(map(str, curves)) == sorted([*trained, *tested])
    page = (undisturbed / "evaluation/report.html").read_text()
    assert "fïeld" in page or "f%C3%AFeld" in page
    assert "http://" not in page
    assert not [path for path in undisturbed.rglob("*") if path.name.startswith((".state-", ".done-"))]


def test_the_same_command_again_does_nothing(undisturbed: Path, cells: Path, tmp_path: Path) -> None:
    output = tmp_path / "again"
    shutil.copytree(undisturbed, output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
    done = run("--data", str(cells), "--output", str(output), *SMALL)
    assert done.status == 0, done.summary
    assert done.text.count("unchanged, not done again") == 5
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")} == before


def test_a_held_run_is_refused(cells: Path, tmp_path: Path) -> None:
    held = Lease.acquire(open_store(str(tmp_path / "run")))
    done = run("--data", str(cells), "--output", str(tmp_path / "run"), *SMALL)
    held.release()
    assert done.status == 1
    assert f"held by process {os.getpid()}" in done.text


def test_a_stage_script_says_what_must_come_first(cells: Path, tmp_path: Path) -> None:
    done = run("--data", str(cells), "--output", str(tmp_path / "run"), *SMALL, script="evaluate.py")
    assert done.status == 1
    assert "stage ingest is not done" in done.text
    assert "pipelines/ingest.py" in done.text


def test_changed_fusion_settings_redo_fusion_and_evaluation_only(undisturbed: Path, swept: Path) -> None:
    states = {name: stage["state"] for name, stage in read_json(swept / "run.json")["stages"].items()}
    redone = ("tune_fusion", "train_fusion", "evaluate")
    assert states == dict.fromkeys(("ingest", "train_members", "heatmaps"), "unchanged") | dict.fromkeys(redone, "done")
    best = yaml.safe_load((swept / "tune/best.yaml").read_text())["fusion"]
    assert 0.001 <= best["learning_rate"] <= 0.002
    trials = list(csv.DictReader((swept / "tune/trials.csv").open()))
    assert sorted(float(trial["val_dice_error"]) for trial in trials)[0] == 0.0
    assert read_json(swept / "tune/_committed.json")["result"]["trial"] in {trial["trial_id"] for trial in trials}
    before, after = (read_json(run / "evaluation/metrics.json") for run in (undisturbed, swept))
    assert after["fcn8"] == before["fcn8"]


@pytest.mark.parametrize(
    "how",
    [
        "searcher: optuna\nconcurrency: 1\nresources: {cpu: 0.4, workers: 2}\nscheduler: {kind: async_hyperband}\n",
        "scheduler: {kind: pbt, interval: 1}\n",
    ],
    ids=["optuna and several workers", "pbt"],
)
def test_other_ways_to_sweep(undisturbed: Path, cells: Path, tmp_path: Path, how: str) -> None:
    output = tmp_path / "swept"
    shutil.copytree(undisturbed, output)
    sweep = tmp_path / "sweep.yaml"
    members = "members: {choice: [[fcn32, fcn16], [fcn16, fcn8]]}"
    space = f"{{learning_rate: {{loguniform: [0.0001, 0.01]}}, trunk: {{choice: [random, fcn32]}}, {members}}}"
    sweep.write_text(f"trials: 2\nepochs: 2\n{how}space: {space}\n")
    options = [*SMALL, "--fusion.from_best", "true", "--tune.config", str(sweep), "--tune.tiles", "8"]
    done = run("--data", str(cells), "--output", str(output), *options, script="tune_fusion.py")
    assert done.status == 0, done.summary
    assert read_json(output / "tune/_committed.json")["result"]["tiles"] == {"train": 8, "val": 2}
    assert "which saw 8 of " in (output / "tune/best.yaml").read_text()
    best = yaml.safe_load((output / "tune/best.yaml").read_text())["fusion"]
    assert best["members"] in (["fcn32", "fcn16"], ["fcn16", "fcn8"])
    lines = (output / "tune/trials.csv").read_text().splitlines()
    assert len(lines) == 3
    assert all(line.split(",")[2] for line in lines[1:])  # counted by unit, by one process or by several
    trials = {line.split(",")[0] for line in lines[1:]}
    assert {path.parent.name for path in output.glob("tensorboard/tune/*/*")} == trials
    # under PBT a trial that takes over finished weights has nothing left to do
    assert max(line.split(",")[3] for line in lines[1:]) == "2"


def test_killed_and_resumed_the_numbers_are_the_same(undisturbed: Path, cells: Path, tmp_path: Path) -> None:
    """While actors work, within an epoch, between two; `benchmarks/faults.py` and `kills.py` do it in every stage."""
    output = tmp_path / "killed"
    shutil.copytree(undisturbed, output)
    for folder in ("heatmaps", "fusion", "evaluation"):
        shutil.rmtree(output / folder)
    often = ["--run.checkpoint_minutes", "0.0001"]  # at every look for what interrupts an epoch
    for pattern in (
        "heatmaps/split=*/*.parquet",
        "fusion/.state-*/attempt-1/epoch_00000_step_*/state.json",
        "fusion/.state-*/attempt-*/epoch_00000/state.json",
    ):
        process = start("--data", str(cells), "--output", str(output), *SMALL, *often, env=SLOWLY)
        died = kill_when(process, lambda p=pattern: any(output.glob(p)))
        assert died.status == -signal.SIGKILL
    for snapshot in output.glob("fusion/.state-*/attempt-*/*.json"):  # as a kill in the middle of a write
        snapshot.write_bytes(snapshot.read_bytes()[:20])
    done = run("--data", str(cells), "--output", str(output), *SMALL)
    assert done.status == 0, done.summary
    assert read_json(output / "evaluation/metrics.json") == read_json(undisturbed / "evaluation/metrics.json")
    for path in [*undisturbed.glob("heatmaps/split=*/*.parquet"), undisturbed / "fusion/model.safetensors"]:
        assert (output / path.relative_to(undisturbed)).read_bytes() == path.read_bytes()
    history = (output / "fusion/history.csv").read_text().splitlines()[1:]
    assert [line.split(",")[0] for line in history] == ["-1", "0", "1"]  # what it starts from, and two epochs


def test_ctrl_c_ends_a_run_cleanly(cells: Path, untrained: Path) -> None:
    output = untrained
    process = start("--data", str(cells), "--output", str(output), *SMALL)
    done = kill_when(process, lambda: any(output.glob("members/*/.state-*/attempt-1")), signal.SIGINT)
    assert done.status == 130, done.summary
    assert "goes on from here" in done.text
    assert "Traceback" not in done.text
    assert not (output / "run.lock").exists()


def test_bad_input_is_rejected_and_the_limit_is_kept(cells: Path, tmp_path: Path) -> None:
    data = tmp_path / "bad cells"
    shutil.copytree(cells, data)
    (data / "Cells_Train_Input/alone.jpg").write_bytes((data / "Cells_Train_Input/fïeld 00.jpg").read_bytes())
    cut = data / "Cells_Train_Input/fïeld 01.jpg"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 4 // 5])  # within the pixels, behind the header
    options = ["--data", str(data), "--output", str(tmp_path / "run"), *SMALL]
    done = run(*options, script="ingest.py")
    assert done.status == 0, done.summary
    (rejects,) = (tmp_path / "run/rejects").glob("*.parquet")
    found = pq.read_table(rejects).to_pylist()
    assert sorted(row["code"] for row in found) == ["missing_mask", *["truncated"] * 4]
    record = read_json(tmp_path / "run/run.json")["stages"]["ingest"]
    assert (record["rows_in"], record["rows_out"], record["rejected"]) == (56, 52, 4)
    strict = run(*options, "--data.max_rejects", "0", "--tiles.quality", "90", script="ingest.py")
    assert strict.status == 1
    assert "data.max_rejects (0) allows 0" in strict.text


@pytest.fixture(scope="session")
def slides(once: Once) -> Path:
    """Slides of several kinds, one of them with QuPath's polygons and a bounds offset, and two that do not open."""
    return once("slides", lambda folder: write_slides(folder / "my slides")) / "my slides"


def write_slides(folder: Path) -> None:
    for number, spec in enumerate(slide_specs(5, 512, 384, train=2, test=2)):
        rgb, cells = render(spec)
        path = folder / spec.split / f"slïde {number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number == 0:
            write_slide(path.with_suffix(".mrxs"), rgb, margin=1, codec="PNG")
            areas = [polygon([[0, 0], [300, 0], [300, 200], [0, 200]]), polygon([[1, 1], [2, 2], [3, 3]])]
            path.with_suffix(".geojson").write_bytes(collection(*areas))
        elif number == 3:
            write_tiff(path.with_suffix(".tif"), rgb, mpp=None)  # neither mpp nor annotation
        else:
            write_tiff(path.with_suffix(".tif"), rgb, kind="ome" if number == 1 else "classic")
            Image.fromarray(cells).save(path.parent / f"{path.name}_mask.png")
    (folder / "train/broken.svs").write_bytes(b"no slide" * 100)
    write_slide(folder / "test/gone.mrxs", rgb)
    (folder / "test/gone/Data0000.dat").unlink()


TILES = ["--tiles.size", "128", "--tiles.shard", "4", "--tiles.image_format", "png"]


@pytest.fixture(scope="session")
def tiled(slides: Path, once: Once) -> Path:
    """A run of `ingest.py` on the slides, undisturbed, in `run`, and in `text` what it printed."""

    def make(output: Path) -> None:
        done = run("--data", str(slides), "--output", str(output / "run"), *TILES, script="ingest.py")
        assert done.status == 0, done.summary
        (output / "text").write_text(done.text)

    return once("tiled", make)


def tile_table(output: Path) -> dict[str, dict[str, Any]]:
    return {row["tile_id"]: row for row in pq.read_table(output / "tiles").to_pylist()}


def test_slides_become_tiles(tiled: Path) -> None:
    output, text = tiled / "run", (tiled / "text").read_text()
    record = read_json(output / "run.json")
    assert record["stages"]["ingest"]["result"]["units"] == {"listed": 6, "used": 4, "rejected": 2}
    assert record["stages"]["ingest"]["result"]["engines"] == {"openslide": 1, "vips": 3}
    (rejects,) = (output / "rejects").glob("*.parquet")
    found = {Path(row["uri"]).name: row for row in pq.read_table(rejects).to_pylist()}
    assert (found["broken.svs"]["code"], found["gone.mrxs"]["code"]) == ("unsupported_slide", "missing_file")
    assert "Data0000.dat" in found["gone.mrxs"]["reason"]
    assert "no mpp" in text
    assert found["slïde 0.geojson"]["reason"].startswith("annotation 1:")  # the polygon without area
    rows = tile_table(output)
    assert {row["downsample"] for row in rows.values()} == {1.0}
    for row in rows.values():
        slide = open_slide(Path(row["source_uri"]))
        expected = read_box(slide, Box(row["x"], row["y"], 0, 0), 1.0, row["width"], row["height"])
        assert np.array_equal(decode_pixels(row["image"]), expected)
        if "slïde 3" in row["slide_id"]:
            assert row["mask"] is None
            assert row["mpp"] is None
        elif "slïde 0" in row["slide_id"]:
            x, y = np.meshgrid(row["x"] - 128 + np.arange(row["width"]), row["y"] - 128 + np.arange(row["height"]))
            assert np.array_equal(decode_pixels(row["mask"]), (x < 300) & (y < 200))
        else:
            truth = np.asarray(Image.open(Path(row["source_uri"]).with_name(f"{row['slide_id']}_mask.png")))
            part = truth[row["y"] : row["y"] + row["height"], row["x"] : row["x"] + row["width"]]
            assert np.array_equal(decode_pixels(row["mask"]), part)


def test_killed_slides_resume_to_the_same_shards_also_from_s3(
    slides: Path, tiled: Path, s3: str, tmp_path: Path
) -> None:
    data = open_store(f"{s3}/the slides")
    for path in slides.rglob("*.*"):
        if path.is_file():
            data.write(path.relative_to(slides).as_posix(), path.read_bytes())
    killed = tmp_path / "killed"
    options = ["--data", data.uri, "--output", str(killed), "--data.cache", str(tmp_path / "cache"), *TILES]
    for pattern in ("manifest/*/*.parquet", "tiles/split=*/*.parquet"):
        died = kill_when(start(*options, script="ingest.py"), lambda p=pattern: any(killed.glob(p)))
        assert died.status == -signal.SIGKILL
    done = run(*options, script="ingest.py")
    assert done.status == 0, done.summary
    first, second = tile_table(tiled / "run"), tile_table(killed)
    assert first.keys() == second.keys()
    for name, row in first.items():
        for column in ("image", "mask", "x", "y", "split", "tissue_fraction", "focus"):
            assert second[name][column] == row[column]


def test_a_dry_run_plans_and_draws(slides: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = run("--data", str(slides), "--output", str(output), "--dry-run", *TILES)
    assert done.status == 0, done.summary
    assert "tiles, about" in done.text
    assert len(list(output.glob("manifest/*/*.png"))) == 4
    assert not (output / "tiles").exists()
    refused = run("--data", str(slides), "--output", str(tmp_path / "no"), "--data.splits", str(tmp_path / "none.csv"))
    assert refused.status == 2
