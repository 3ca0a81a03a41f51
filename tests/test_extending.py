"""The examples of `docs/extending.md`, taken from the page and run."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tifffile
import torch
from torch.utils.flop_counter import FlopCounterMode

from apacs_ray.config.settings import DataSettings, Settings, TilesSettings
from apacs_ray.data.shards import Receipt, shard_path, write_table
from apacs_ray.data.tile_rows import TILE_SCHEMA
from apacs_ray.distributed.session import RaySession
from apacs_ray.errors import BadInput
from apacs_ray.evaluation import registry as metrics
from apacs_ray.evaluation.metrics import summarize
from apacs_ray.evaluation.per_tile import per_tile_schema, tile_row
from apacs_ray.models.registry import COST_SIDE, NETWORKS
from apacs_ray.models.spec import ModelSpec
from apacs_ray.models.weights import build, load_model, weights_bytes
from apacs_ray.runs.markers import Counts
from apacs_ray.runs.run import Run
from apacs_ray.slides import find
from apacs_ray.slides import open as slides
from apacs_ray.slides.cache import SlideCache
from apacs_ray.slides.find import find_slides
from apacs_ray.slides.manifest import SlideTask, inspect_slide, read_manifest
from apacs_ray.slides.open import open_slide
from apacs_ray.stages.ingest_result import IngestResult, UnitCounts
from apacs_ray.stages.stage import Committed, run_stage
from apacs_ray.storage import LocalStore
from apacs_ray.synthetic.slide import render, slide_specs
from apacs_ray.training.loss import tile_losses

PAGE = Path(__file__).resolve().parent.parent / "docs/extending.md"
LONGEST = 40  # lines of an example


def code(heading: str) -> str:
    """The code below a heading of the page."""
    part = PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", part, re.S))


@pytest.fixture
def example(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module that the code below a heading makes; the lists that it adds to are put back afterwards."""
    monkeypatch.setattr(slides, "READERS", [*slides.READERS])
    monkeypatch.setattr(find, "SUFFIXES", {*find.SUFFIXES})
    original, networks = [*metrics.METRICS], dict(NETWORKS)
    path = tmp_path / "example.py"
    path.write_text(code(request.param))
    spec = importlib.util.spec_from_file_location("example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "example", module)
    spec.loader.exec_module(module)
    yield module
    metrics.METRICS[:] = original
    for name in set(NETWORKS) - set(networks):
        del NETWORKS[name]


def test_every_example_of_the_page_is_tried_and_short() -> None:
    headings = re.findall(r"^## (.+)", PAGE.read_text(), re.M)
    assert headings == ["A network", "A slide reader", "A metric", "A stage"]
    for heading in headings:
        lines = [line for line in code(heading).splitlines() if line.strip()]
        assert 0 < len(lines) < LONGEST, heading


@pytest.mark.parametrize("example", ["A network"], indirect=True)
def test_a_network(example: ModuleType) -> None:
    spec = ModelSpec("member", "dilated", width=0.25, dropout=0.1)
    torch.manual_seed(0)
    model = build(spec)
    assert isinstance(model, example.Dilated)
    rng = np.random.default_rng(0)
    mask = np.zeros((1, 1, 64, 64), np.float32)
    mask[..., 16:48, 16:48] = 1
    image = torch.from_numpy((0.9 - 0.4 * mask + 0.02 * rng.standard_normal(mask.shape)).astype(np.float32))
    image, target = image.expand(-1, 3, -1, -1), torch.from_numpy(mask)
    assert model(image[..., :40, :33]).shape == (1, 1, 40, 33)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = tile_losses(model(image), target, torch.ones_like(target), 0.5).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    loaded = load_model(weights_bytes(model), spec)
    assert torch.equal(loaded(image), model.eval()(image))


@pytest.mark.parametrize("example", ["A network"], indirect=True)
def test_a_network_costs_what_its_entry_says(example: ModuleType) -> None:
    model = example.build_dilated(1.0, 0.0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 100, 100))
    per_px = counter.get_total_flops() / 100**2
    assert per_px * COST_SIDE**2 / 1e9 == pytest.approx(NETWORKS["dilated"].gflops, rel=0.01)


@pytest.mark.parametrize("example", ["A slide reader"], indirect=True)
def test_a_reader(example: ModuleType, tmp_path: Path) -> None:
    rgb, _ = render(slide_specs(0, 400, 300, train=1, test=0)[0])
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    np.save(folder / "a.npy", rgb)
    slide = open_slide(folder / "a.npy")
    assert isinstance(slide, example.ArraySlide)
    assert np.array_equal(slide.read(0, 0, 0, 400, 300), rgb)
    around = slide.read(0, -10, 290, 30, 20)
    assert (around[:, :10] == 255).all()
    assert (around[10:] == 255).all()
    assert np.array_equal(around[:10, 10:], rgb[290:, :20])
    assert np.array_equal(np.asarray(slide.read_image(0, 120, 120, 40, 40)), rgb[120:160, 120:160])
    assert (slide.read(0, 900, 900, 4, 4) == 255).all()

    tifffile.imwrite(folder / "b.tif", rgb, tile=(256, 256), photometric="rgb")
    data, output = LocalStore(tmp_path / "data"), LocalStore(tmp_path / "run")
    cache = SlideCache(tmp_path / "cache", 1 << 20)
    task = SlideTask(data, None, output, TilesSettings(size=100), DataSettings(mpp=0.5), cache, "0" * 16)
    engines, places = [], []
    for number, files in enumerate(find_slides(data.list()).slides):
        engines.append(inspect_slide(task, number, files).engine)
        rows = read_manifest(output, task.manifest_path(number))
        places.append([(row["x"], row["y"], row["tissue_fraction"]) for row in rows])
    assert engines == ["array", "vips"]
    assert places[0] == places[1]
    assert places[0]

    np.save(folder / "flat.npy", rgb[..., 0])
    with pytest.raises(BadInput, match="unsupported_slide"):
        open_slide(folder / "flat.npy")
    (folder / "cut.npy").write_bytes((folder / "a.npy").read_bytes()[:40])
    with pytest.raises(BadInput, match=r"cut\.npy"):
        open_slide(folder / "cut.npy")


@pytest.mark.parametrize("example", ["A metric"], indirect=True)
def test_a_metric(example: ModuleType) -> None:
    truth = np.zeros((64, 64), bool)
    truth[10:30, 10:30] = True
    masks = {"fusion": truth.copy(), "otsu": np.zeros_like(truth)}
    masks["fusion"][30:35, 10:30] = True
    tile = {"tile_id": "a", "slide_id": "s", "x": 0, "y": 0, "width": 64, "height": 64}
    once = {"once_left": 0, "once_top": 0, "once_right": 64, "once_bottom": 64}
    rows = [tile_row({**tile, **once}, masks, truth, border=0, disputed=["otsu"])]
    figures = summarize(pa.Table.from_pylist(rows, per_tile_schema(list(masks))), list(masks), 0)
    assert figures["fusion"]["area_error"] == pytest.approx(0.25)
    assert figures["otsu"]["area_error"] == -1
    assert figures["fusion"]["dice"] == pytest.approx(800 / 900)
    assert example.pool_area({"area_found": 3, "area_annotated": 0}) == {"area_error": None}


@pytest.mark.parametrize("example", ["A stage"], indirect=True)
def test_a_stage(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = LocalStore(tmp_path / "run")
    _write_tiles(store, {"s1": [1.0, 5.0, 3.0], "s2": [2.0]})
    units = UnitCounts(2, 2, 0)
    ingested = IngestResult(
        Counts(4, 4), "slides", units, units, {"train": 4, "val": 0, "test": 0}, "slide", 0, True, {}, {}, 0, {}
    )
    run = Run.open(store, Settings(), None)
    ray = RaySession(run)
    try:
        first = run_stage(run, ray, example.MeasureFocus(Committed("tiles", "a" * 16, ingested)))
        again = run_stage(run, ray, example.MeasureFocus(Committed("tiles", "a" * 16, ingested)))
        changed = example.MeasureFocus(Committed("tiles", "b" * 16, ingested))
        assert changed.fingerprint(Settings()) != first.fingerprint
    finally:
        ray.stop()
        run.close()
    assert first == again
    assert first.result.median == {"s1": 3.0, "s2": 2.0}
    assert store.read("focus/slides.csv").decode().splitlines() == ["slide_id,focus", "s1,3", "s2,2"]
    assert "measure_focus: unchanged, not done again" in capsys.readouterr().out


def _write_tiles(store: LocalStore, focus: dict[str, list[float]]) -> None:
    rows: list[dict[str, Any]] = []
    for slide, values in focus.items():
        for number, value in enumerate(values):
            row: dict[str, Any] = {field.name: 0 for field in TILE_SCHEMA}
            row |= {
                "tile_id": f"{slide}_{number}",
                "slide_id": slide,
                "x": number,
                "focus": value,
                "image": b"",
                "mask": None,
            }
            row |= dict.fromkeys(("image_format", "source_uri", "source_version"), "")
            rows.append(row)
    path = shard_path("tiles", "train", "a" * 16, 0)
    write_table(store, pa.Table.from_pylist(rows, TILE_SCHEMA), Receipt(path, len(rows), len(rows)))
