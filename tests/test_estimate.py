"""`--estimate`: its arithmetic by hand, and a real one against the run that it foretells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.runs import SMALL, run

from apacs_ray.commands.estimate import count_tiles
from apacs_ray.config.settings import DataSettings, TilesSettings, TuneSettings
from apacs_ray.config.sweep import Distribution, Scheduler, Sweep
from apacs_ray.config.training_settings import TrainingSettings
from apacs_ray.data.folders import Pair, find_pairs
from apacs_ray.distributed.resource_plan import Cluster, NetworkPlan, TrainingPlan, plan_training
from apacs_ray.estimate import lines
from apacs_ray.estimate.cutting import cut_pairs, spread
from apacs_ray.estimate.lines import Seconds, Tiles, pool, sweep, sweep_epochs, tiling, training
from apacs_ray.estimate.networks import ASSUMED_GPU, Inference, SampleTile, Training, assume, flops, measure
from apacs_ray.models.spec import ModelSpec
from apacs_ray.storage import Entry, LocalStore
from apacs_ray.testing.runs import read_json

TILES = Tiles(train=100, val=20, test=40, size=1e6)
MEMBERS = ["fcn32", "fcn16", "fcn8"]
COSTS = [Seconds(train, train / 3, load=0.1) for train in (1.0, 7.0, 7.0)]


def test_tiling_is_shared_by_all_cpus() -> None:
    line = tiling(TILES, each=0.5, opening=20, shard=4, cpus=10)
    assert (line.tiles, line.cpu_seconds, line.gpu_seconds) == (160, 100, 0)
    assert line.wall == pytest.approx(10)
    assert tiling(TILES, each=0.5, opening=0, shard=80, cpus=10).wall == pytest.approx(40)  # two tasks
    assert line.size == pytest.approx(160e6)


def test_members_at_the_same_time_share_the_cores() -> None:
    """Three runs of one thread on two cores: all their work, over two."""
    plan = plan_training(MEMBERS, Cluster(2, 0, 1, 2))
    line = training("train_members", TILES, 10, COSTS, plan, cpus=2)
    work = sum(10 * (100 * (one.train + 0.1) + 20 * (one.validate + 0.1)) for one in COSTS)
    assert line.cpu_seconds == pytest.approx(work)
    assert line.wall == pytest.approx(work / 2 + 3 * lines.RUN / 2)
    assert line.tiles == 3000


def test_members_together_read_a_tile_once() -> None:
    plan = plan_training(MEMBERS, Cluster(1, 0, 1, 1), mode="together")
    line = training("train_members", TILES, 1, COSTS, plan, cpus=1)
    assert line.wall == pytest.approx(100 * (15 + 0.1) + 20 * (5 + 0.1) + lines.RUN)


@pytest.mark.parametrize("gpus", [1, 2, 5, 8])
def test_gpus_are_shared_as_the_plan_says(gpus: int) -> None:
    """One: all in turn. Two and eight: FCN-32 on the side of a larger member. Five: whole ones for each."""
    plan = plan_training(MEMBERS, Cluster(12 * gpus, gpus, 1, 12 * gpus, 12), batch_size=4)
    fcn32, fcn16, fcn8 = (
        (100 * cost.train + 20 * cost.validate) / network.workers
        for cost, network in zip(COSTS, plan.networks, strict=True)
    )
    line = training("train_members", TILES, 1, COSTS, plan, cpus=12 * gpus)
    alone = sum(100 * cost.train + 20 * cost.validate for cost in COSTS)
    assert line.gpu_seconds == pytest.approx(alone)
    ends = {1: fcn32 + fcn16 + fcn8, 5: max(fcn32, fcn16, fcn8)}.get(gpus, max(fcn16, fcn8) + fcn32)
    starts = max(lines.RUN_AT_LEAST, 3 * lines.RUN / (12 * gpus))
    assert line.wall == pytest.approx(ends + starts)


def test_a_gpu_that_waits_for_tiles_goes_as_fast_as_they_come() -> None:
    network = NetworkPlan("fusion", 1, 4, 1.0, 2, data_tasks=2)
    line = training("train_fusion", TILES, 1, [Seconds(0.01, 0.01, load=0.4)], _alone(network), cpus=4)
    assert line.wall == pytest.approx(120 * 0.2 + lines.RUN_AT_LEAST)


def test_a_pool_ends_with_its_fullest_actor() -> None:
    line = pool("heatmaps", 10, 2.0, shard=2, actors=4, gpus=0.0, threads=1, size=10)
    assert (line.wall, line.cpu_seconds, line.size) == (lines.POOL + 8, 20, 100)


def _alone(network: NetworkPlan) -> TrainingPlan:
    return TrainingPlan((network,), "parallel")


def _sweep(scheduler: Scheduler) -> Sweep:
    space = {"learning_rate": Distribution.model_validate({"loguniform": [1e-4, 1e-3]})}
    return Sweep(trials=20, epochs=12, scheduler=scheduler, space=space)


def test_epochs_of_a_sweep() -> None:
    assert sweep_epochs(_sweep(Scheduler())) == 240
    asha = Scheduler(kind="async_hyperband", grace_period=3, reduction_factor=3)
    assert sweep_epochs(_sweep(asha)) == pytest.approx(20 * 3 + 20 / 3 * 6 + 20 / 9 * 3)
    network = NetworkPlan("fusion", 1, 1, 0.0, 1, 0)
    line = sweep(_sweep(Scheduler()), TILES, Seconds(1, 0, 0), concurrency=4, network=network)
    assert (line.tiles, line.cpu_seconds, line.wall) == (24000, 24000, 6000 + lines.SWEEP + 20 * lines.TRIAL / 4)


def test_trials_that_share_a_gpu_use_it_in_turn() -> None:
    def wall(seconds: Seconds, gpus: float, threads: int) -> float:
        network = NetworkPlan("fusion", 1, float(threads), gpus, threads, 0)
        return sweep(_sweep(Scheduler()), TILES, seconds, concurrency=4, network=network).wall

    starts = lines.SWEEP + 20 * lines.TRIAL / 4
    assert wall(Seconds(1, 0, 0), 1.0, 1) == 6000 + starts
    assert wall(Seconds(1, 0, 0), 0.25, 1) == 24000 + starts
    # four threads read ahead; the GPU is not what is short
    assert wall(Seconds(0, 0, 4), 0.25, 4) == (100 + 20) * 240 / 4 + starts


def test_a_sweep_counts_the_tiles_that_trials_see() -> None:
    most = TuneSettings(tiles=2000).most
    assert Tiles(570_400, 71_300, 71_300, 1.0).at_most(most) == Tiles(2000, 500, 71_300, 1.0)
    assert Tiles(100, 30, 10, 1.0).at_most(most) == Tiles(100, 30, 10, 1.0)


def test_units_are_drawn_from_all_over() -> None:
    assert spread(range(10), 3) == [0, 3, 6]
    assert spread(range(2), 3) == [0, 1]
    assert spread([], 3) == []


def test_tiles_by_split_from_a_sample() -> None:
    pairs = [_pair(number, "train" if number < 30 else "test") for number in range(50)]
    assert count_tiles(pairs, pairs[::10], [4, 4, 4, 2, 2], 0.2) == (77, 19, 64)


def _pair(number: int, split: str) -> Pair:
    entry = Entry(f"{number}.png", 10, "1")
    return Pair(split, str(number), entry, entry, str(number))  # type: ignore[arg-type]


@pytest.fixture
def tile(undisturbed: Path) -> SampleTile:
    import pyarrow.parquet as pq

    shard = next(undisturbed.glob("tiles/split=train/*.parquet"))
    row = pq.ParquetFile(shard).read(columns=["image", "mask"]).to_pylist()[0]
    return SampleTile(row["image"], row["mask"])


def test_networks_are_measured(tile: SampleTile) -> None:
    """On this machine, and assumed for a GPU, where seconds are as FLOPs."""
    threads = torch.get_num_threads()
    settings = TrainingSettings(batch_size=2, crop=48)
    specs = [ModelSpec("member", "fcn8", width=width) for width in (0.05, 0.2)]
    fusion = ModelSpec("fusion", "fusion", width=0.05)
    trainings = [Training(spec, settings, 1, 1) for spec in (*specs, fusion)]
    inference = Inference({"fusion": fusion}, 0.05, 1, "float32")
    found = measure(tile, trainings, inference)
    assert all(min(one.train, one.validate, one.load) > 0 for one in found.trainings)
    assert min(found.members, found.everything) > 0
    torch.set_num_threads(threads)
    small, large, _ = assume(tile, trainings, inference).trainings
    assert small.train == pytest.approx(3 * flops([specs[0]], (48, 48)) / ASSUMED_GPU)
    assert large.validate / small.validate == pytest.approx(flops([specs[1]], (64, 64)) / flops([specs[0]], (64, 64)))


def test_a_step_too_large_to_measure_is_measured_in_part(tile: SampleTile, monkeypatch: pytest.MonkeyPatch) -> None:
    from apacs_ray.estimate import networks

    spec = ModelSpec("member", "fcn32", width=0.05)
    size = tile.pixels()[1].shape
    cpu = torch.device("cpu")
    assert networks.affordable_part([spec], size, 3, cpu) == size
    monkeypatch.setattr(networks, "CPU_BUDGET", 3 * flops([spec], size) - 1)
    monkeypatch.setattr(networks, "SMALLEST", 8)
    assert networks.affordable_part([spec], size, 3, cpu) == (size[0] // 2, size[1] // 2)


def test_an_estimate_of_a_run(undisturbed: Path, cells: Path, tmp_path: Path) -> None:
    """All images are of one size, so the tiles are exact; nothing is left behind but the lock's absence."""
    output = tmp_path / "estimated"
    options = ["--data", str(cells), "--output", str(output), *SMALL, "--fusion.from_best", "true"]
    done = run(*options, "--estimate")
    assert done.status == 0, done.summary
    shown = {line.split()[1]: line.split() for line in done.text.splitlines() if line.startswith("│")}
    facts = read_json(undisturbed / "run.json")["stages"]["ingest"]["result"]["tiles"]
    seen = {name: int(shown[name][3]) for name in ("ingest", "train_members", "heatmaps", "evaluate")}
    assert seen == {
        "ingest": sum(facts.values()),
        "train_members": 3 * 3 * facts["train"],
        "heatmaps": facts["train"] + facts["val"],
        "evaluate": facts["test"],
    }
    assert {"tune_fusion", "train_fusion", "in"} <= shown.keys()
    assert [path.name for path in output.rglob("*") if path.is_file()] in ([], [".run.lock.guard"])
    assert run(*options, "--estimate", "--dry-run").status == 2


def test_a_sample_of_pairs(cells: Path, tmp_path: Path) -> None:
    """Tiles of the pairs that are good; of bad ones alone there is none to go on with."""
    store = LocalStore(str(cells))
    pairs = find_pairs(list(store.list()), root=store.uri).pairs
    sample = cut_pairs(store, pairs[:3], TilesSettings(size=64), DataSettings())
    assert sample.tiles == (4, 4, 4)
    assert sample.cut.count == 8
    assert sample.cut.tile is not None
    assert sample.cut.tile.pixels()[0].shape == (64, 64, 3)
    for part in ("Train", "Test"):
        for kind in ("Input", "GroundTruth"):
            folder = tmp_path / f"Cells_{part}_{kind}"
            folder.mkdir()
            (folder / "one.png").write_bytes(b"no picture")
    store = LocalStore(str(tmp_path))
    bad = find_pairs(list(store.list()), root=store.uri).pairs
    nothing = cut_pairs(store, bad, TilesSettings(size=64), DataSettings())
    assert (nothing.tiles, nothing.cut.count, nothing.cut.tile) == ((0, 0), 0, None)
