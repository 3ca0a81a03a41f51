"""`segment --estimate`: its arithmetic by hand, its sample on a slide, and the command against the plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.runs import run
from support.segmentation import OneSlide, slide_of, with_settings, write_ensemble
from support.slide_files import picture, write_tiff

from apacs_ray.commands.estimate_segment import scaled
from apacs_ray.config.settings import DataSettings, TilesSettings
from apacs_ray.distributed.resource_plan import Nodes, cluster_of
from apacs_ray.distributed.tasks import plan_segment_pool
from apacs_ray.estimate import lines
from apacs_ray.estimate.networks import ASSUMED_GPU
from apacs_ray.estimate.segment_sample import LookedAt, SegmentSample, SlideToSample, sample_slides, window_flops
from apacs_ray.estimate.segmenting import (
    NOTHING,
    Machines,
    UnitCosts,
    Workload,
    bottleneck,
    bytes_moved,
    bytes_written,
    cpus_a_gpu,
    loads,
    segment_lines,
    wall_seconds,
)
from apacs_ray.inference.cutting import choose_cutting, window_memory
from apacs_ray.inference.model_files import find_models
from apacs_ray.inference.planning import Cutting
from apacs_ray.slides.cache import SlideCache
from apacs_ray.slides.manifest import SlideTask
from apacs_ray.slides.slide_files import SlideFiles
from apacs_ray.stages.segment_slides import ListedSlide
from apacs_ray.storage import Entry, LocalStore

WORK = Workload(slides=10, size=1000, pixels=5000, cores=20, core_pixels=800, window_pixels=1000, shards=20)
COSTS = UnitCosts(
    plan=4, read=0.1, networks=2, objects=0.5, files=0.25, glass=0.02, driver=0.5, part_bytes=2, file_bytes=3,
    glass_bytes=0.5,
)  # fmt: skip
GPUS = Machines(cpus=16, devices=4, gpus=True, nodes=2, tasks=8, writers=4, copies=3, disk=50, network=100)


def test_every_resource_is_busy_with_its_own_work() -> None:
    """Networks 2000 s of 4 GPUs; 100 of reading, 400 of objects, 200 + 100 of files; 3000 bytes copied."""
    busy = {load.resource: load.seconds for load in loads(WORK, COSTS, GPUS)}
    assert busy == {
        "GPUs": 500,
        "CPUs": pytest.approx(800 / 16),
        "tasks that read": pytest.approx(100 / 8),
        "tasks that find objects": pytest.approx(400 / 8),
        "tasks that write files": pytest.approx(300 / 4),
        "driver": 10,
        "disks": 3000 / 50 / 2,
        "network": (3000 + 1600) / 100 / 2,
    }
    assert bottleneck(WORK, COSTS, GPUS) == "GPUs"
    assert wall_seconds(WORK, COSTS, GPUS) == pytest.approx(lines.POOL + 4 + 500)
    assert bytes_moved(WORK, COSTS, GPUS) == 3000 + 1600
    assert bytes_written(WORK, COSTS) == 2400 + 2500
    assert cpus_a_gpu(WORK, COSTS) == pytest.approx(800 / 2000)


def test_more_gpus_show_what_is_short_next() -> None:
    many = replace(GPUS, devices=400, writers=400)
    assert bottleneck(WORK, COSTS, replace(many, cpus=64)) == "tasks that find objects"
    assert bottleneck(WORK, COSTS, replace(many, cpus=8, tasks=800)) == "CPUs (objects: 50% of their work)"
    assert bottleneck(WORK, COSTS, replace(many, cpus=800, tasks=800, disk=40)) == "disks"
    assert bottleneck(WORK, COSTS, replace(many, cpus=800, tasks=800, disk=None, network=10)) == "network"
    unlimited = replace(many, cpus=800, tasks=800, disk=None, network=None)
    assert bottleneck(WORK, COSTS, unlimited) == "tasks that write files"
    assert bottleneck(WORK, replace(COSTS, driver=2), unlimited) == "driver"


def test_without_gpus_networks_are_work_of_the_cores() -> None:
    cores = Machines(cpus=2, devices=2, gpus=False, nodes=1, tasks=4, writers=2)
    assert loads(WORK, COSTS, cores)[0].seconds == pytest.approx(2800 / 2)
    assert bottleneck(WORK, COSTS, cores) == "CPUs (networks: 71% of their work)"
    found = {line.stage: line for line in segment_lines(WORK, COSTS, cores)}
    assert (found["networks"].cpu_seconds, found["networks"].gpu_seconds) == (2000, 0)
    on_gpus = {line.stage: line for line in segment_lines(WORK, COSTS, GPUS)}["networks"]
    assert (on_gpus.cpu_seconds, on_gpus.gpu_seconds, on_gpus.wall) == (0, 2000, 500)
    assert sum(line.cpu_seconds for line in found.values()) == pytest.approx(40 + 2800)
    assert (found["files"].size, found["objects"].size) == (4900, 1600)


def test_slides_that_were_not_opened_are_as_those_of_their_kind() -> None:
    listed = [_listed(f"{name}.{kind}", size) for name, kind, size in
              (("a", "svs", 10), ("b", "svs", 30), ("c", "mrxs", 100), ("d", "svs", 60))]  # fmt: skip
    work = replace(NOTHING, slides=1, cores=4, size=10)
    looked = (LookedAt("a", None, work=work), LookedAt("b", None, "broken"), LookedAt("c", None, work=work))
    total = scaled(listed, listed[:3], SegmentSample(looked, None))
    assert total.cores == pytest.approx(4 * 100 / 40 + 4)
    assert total.slides == pytest.approx(4 * 2 / 3)


def _listed(path: str, size: int) -> ListedSlide:
    files = SlideFiles(path.partition(".")[0], path, None, (Entry(path, size, "1"),), path)
    return ListedSlide(files, None, None, "")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    return write_ensemble(tmp_path_factory.mktemp("model"), mpp=0.25)


def test_a_sample_of_a_slide(model: LocalStore, tmp_path: Path) -> None:
    """It is planned as segmentation plans it; one that does not open is named, and nothing is left."""
    slide = write_tiff(tmp_path / "a.tif", picture(500, 400))
    broken = tmp_path / "broken.svs"
    broken.write_bytes(b"no slide" * 100)
    settings = with_settings(core=256)
    models, output = find_models(model, settings), LocalStore(str(tmp_path / "out"))
    reading = SlideTask(
        LocalStore(str(tmp_path)), None, output, TilesSettings(), DataSettings(), SlideCache(tmp_path, 0), "0" * 16
    )
    slides = [SlideToSample(reading, slide_of(path), None) for path in (slide, broken)]
    cutting = Cutting(0.25, 256, models.halo, 3, False)
    sample = sample_slides(slides, cutting, model, models, settings, assumed=False)
    looked, refused = sample.slides
    plan = OneSlide(slide, model, tmp_path / "plain", settings).plan
    assert looked.plan == replace(plan, slide_id="a")
    assert looked.work is not None
    assert (looked.work.cores, looked.work.pixels) == (4, 500 * 400)
    assert looked.work.core_pixels == 500 * 400
    assert looked.work.window_pixels == 4 * 500 * 400  # all of it is within the halo of each core
    assert (refused.plan, bool(refused.reason)) == (None, True)
    assert not output.version("a/plan.json")
    costs = sample.costs
    assert costs is not None
    assert min(costs.plan, costs.read, costs.networks, costs.objects, costs.part_bytes, costs.driver) > 0
    on_gpu = sample_slides(slides, cutting, model, models, settings, assumed=True).costs
    assert on_gpu is not None
    flops = sum(window_flops(models, (384, 384), tta=False).values())
    assert on_gpu.networks == pytest.approx(flops / 384**2 / ASSUMED_GPU, rel=0.1)
    assert sum(window_flops(models, (384, 384), tta=True).values()) == 8 * flops


def test_nothing_to_be_had_of_slides_that_do_not_open(model: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides/broken.svs").write_bytes(b"no slide" * 100)
    given = ["--model", str(model.root), "--slides", str(tmp_path / "slides"), "--output", str(tmp_path / "out")]
    done = run(*given, "--estimate", script="segment.py")
    assert done.status == 1
    assert "of 1 slides that were tried 0 open" in done.text


def test_an_estimate_of_a_segmentation(model: LocalStore, tmp_path: Path) -> None:
    slides, output = tmp_path / "slides", tmp_path / "out"
    slides.mkdir()
    for number in range(5):  # of which three are opened; all of a size, so that the cores are exact
        write_tiff(slides / f"{number}.tif", picture(300, 200))
    how = ["--segment.core", "128", "--segment.tissue", "false"]
    given = ["--model", str(model.root), "--slides", str(slides), "--output", str(output), *how]
    done = run(*given, "--estimate", script="segment.py")
    assert done.status == 0, done.summary
    shown = {line.split()[1]: line.split() for line in done.text.splitlines() if line.startswith("│")}
    assert shown.keys() >= {"plan", "read", "networks", "objects", "files", "in"}
    assert [int(shown[step][3]) for step in ("plan", "read", "networks")] == [5, 5 * 6, 5 * 6]
    for words in ("slides: 3 of 5 were opened", "first bottleneck: CPUs", "TFLOP a core", "memory: a core of 128 px"):
        assert words in done.text
    assert [path.name for path in output.rglob("*") if path.is_file()] in ([], [".run.lock.guard"])


@pytest.mark.parametrize(("cpus", "core"), [(1, 2048), (10**6, 512)])
def test_the_core_follows_the_memory(model: LocalStore, cpus: int, core: int) -> None:
    settings = with_settings()
    models, pool = find_models(model, settings), plan_segment_pool(cluster_of([Nodes(cpus, 0, 1)], []))
    assert pool.actors == cpus
    cutting = choose_cutting(settings, models, workers=pool.actors, on_gpus=False)
    assert (cutting.core, cutting.halo, cutting.mpp) == (core, 480, 0.25)
    half = with_settings(precision="bfloat16")
    assert window_memory(half, models, core, 480) == window_memory(settings, models, core, 480) / 2
