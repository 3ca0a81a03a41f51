"""What a sweep takes from Ray Tune's trials, without Ray."""

from __future__ import annotations

import csv
import io
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from apacs_ray.config.settings import Settings, TuneSettings
from apacs_ray.config.sweep import Distribution
from apacs_ray.config.training_settings import FusionSettings
from apacs_ray.data.shards import TileIndex
from apacs_ray.distributed.trial import TrialTask
from apacs_ray.distributed.tune import TrialResult, best_epoch_of, stopped_by_ctrl_c, within_ranges
from apacs_ray.models.registry import MEMBERS
from apacs_ray.models.spec import FusionStart, start_key
from apacs_ray.runs.markers import Counts
from apacs_ray.stages.heatmaps import HeatmapsResult
from apacs_ray.stages.ingest_result import IngestResult, UnitCounts
from apacs_ray.stages.stage import Committed
from apacs_ray.stages.tune_fusion import TuneFusion, best_trial, chance, draw_tiles, trials_csv
from apacs_ray.storage import LocalStore

SPACE = {
    name: Distribution.model_validate(drawn)
    for name, drawn in {
        "dropout": {"uniform": [0.0, 0.9]},
        "learning_rate": {"loguniform": [1e-4, 1e-2]},
        "members": {"choice": [["fcn32", "fcn16"], ["fcn16", "fcn8"]]},
    }.items()
}


def test_what_population_based_training_changes_stays_possible() -> None:
    """It multiplies by 0.8 or 1.2: a dropout of 0.9 would become 1.08."""
    setting = {"dropout": 0.9 * 1.2, "learning_rate": 1e-4 * 0.8, "members": "fcn16+fcn8"}
    assert within_ranges(SPACE, setting) == {"dropout": 0.9, "learning_rate": 1e-4, "members": "fcn16+fcn8"}
    FusionSettings.model_validate({"dropout": within_ranges(SPACE, setting)["dropout"]})


def test_ctrl_c_ends_a_sweep_that_listens_and_one_that_does_not() -> None:
    """Also when nothing of an exception would come out of where it is."""
    heard: list[int] = []

    def sweep(listens: bool) -> None:
        with stopped_by_ctrl_c():
            if listens:
                signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))  # as Tune does
            signal.raise_signal(signal.SIGINT)
            heard.append(0)  # a sweep that listens ends by itself

    before = signal.getsignal(signal.SIGINT)
    for listens, told in ((True, [signal.SIGUSR1, 0]), (False, [])):
        heard.clear()
        with pytest.raises(KeyboardInterrupt):
            sweep(listens)
        assert heard == told
        assert signal.getsignal(signal.SIGINT) == before


def sweep_stage(train: int, val: int) -> TuneFusion:
    """The sweep of a run with so many tiles."""
    none = UnitCounts(0, 0, 0)
    tiles = {"train": train, "val": val, "test": 0}
    ingest = IngestResult(Counts(0, 0), "pairs", none, none, tiles, "image", 0, True, {}, {}, 0, {})
    heatmaps = HeatmapsResult(Counts(0, 0), 1, {})
    return TuneFusion(Committed("tiles", "1" * 16, ingest), Committed("heatmaps", "2" * 16, heatmaps))


def test_a_sweep_of_fewer_tiles_than_may_be_drawn_stays_valid() -> None:
    def printed(tiles: int, train: int, val: int) -> str:
        return sweep_stage(train, val).fingerprint(Settings(tune=TuneSettings(tiles=tiles)))

    of_all = printed(0, 100, 25)
    assert {printed(tiles, 100, 25) for tiles in (100, 101, 2000)} == {of_all}
    others = [printed(99, 100, 25), printed(98, 100, 25), printed(100, 100, 26), printed(2000, 100, 501)]
    assert len({of_all, *others}) == 5
    assert printed(0, 10**6, 10**6) == of_all


def test_trials_see_tiles_of_all_slides_and_no_tile_is_copied() -> None:
    slides = [f"s{number % 7}" for number in range(70)]
    numbers = np.arange(70, dtype=np.int32)
    index = TileIndex(
        ("a", "b"),
        numbers // 35,
        numbers % 35 // 2,
        numbers % 2,
        tuple(f"t{number}" for number in numbers),
        tuple(slides),
        9,
        numbers.astype(np.float32),
    )
    indices = {"train": index, "val": index.select(numbers < 6)}
    drawn = draw_tiles(indices, TuneSettings(tiles=14), 3)
    assert Counter(drawn["train"].slide_ids) == dict.fromkeys(slides, 2)
    assert len(drawn["val"]) == 3
    places = {index.place(number) for number in range(70)}
    assert {drawn["train"].place(number) for number in range(14)} <= places
    assert draw_tiles(indices, TuneSettings(tiles=70), 3) == indices
    assert draw_tiles(indices, TuneSettings(tiles=0), 3) == indices


def trial(epochs: list[dict[str, Any]] | None, config: dict[str, Any]) -> Any:
    return SimpleNamespace(config=config, metrics_dataframe=None if epochs is None else pd.DataFrame(epochs))


def test_a_trial_counts_by_its_own_epochs_and_the_setting_that_each_had() -> None:
    """Its second epoch took over another trial's weights, whose best is told as its own, and a changed rate."""
    epochs = [
        {"epoch": 0, "val_dice": 0.0, "best_val_dice": 0.0, "config/learning_rate": 1e-3},  # left its node in its first
        {
            "epoch": 1,
            "val_units": "[[1,2,3],[4,5,6]]",
            "val_dice": 0.7,
            "best_val_dice": 0.7,
            "config/learning_rate": 1e-3,
            "config/members": "fcn16+fcn8",
        },
        {
            "epoch": 2,
            "val_dice": 0.6,
            "best_val_dice": 0.9,
            "config/learning_rate": 2e-3,
            "config/members": "fcn32+fcn16",
        },
    ]
    config = {"learning_rate": 2e-3, "members": "fcn32+fcn16"}
    units = [[1, 2, 3], [4, 5, 6]]
    assert best_epoch_of(trial(epochs, config)) == ({"learning_rate": 1e-3, "members": "fcn16+fcn8"}, 0.7, units)


@pytest.mark.parametrize("epochs", [None, [], [{"epoch": 0, "val_dice": 0.0, "config/dropout": 0.1}]])
def test_a_trial_that_told_nothing_has_no_score(epochs: list[dict[str, Any]] | None) -> None:
    assert best_epoch_of(trial(epochs, {"dropout": 0.1})) == ({"dropout": 0.1}, None, [])


@pytest.mark.parametrize("deterministic", [True, False])
def test_trials_give_equal_bits_where_that_is_asked_for(tmp_path: Path, deterministic: bool) -> None:
    task = TrialTask(
        LocalStore(tmp_path), {}, FusionSettings(), 1.0, "0" * 16, 1, 0, "source", "tune", 0, 60.0,
        pretrained="weights", deterministic=deterministic,
    )  # fmt: skip
    assert task.training({"dropout": 0.1}, "trial").deterministic is deterministic


class TestTaken:
    """Which trial is taken where several are good."""

    @staticmethod
    def result(name: str, rate: float, units: list[list[int]]) -> TrialResult:
        both, predicted, true = map(sum, zip(*units, strict=True))
        dice = 2 * both / (predicted + true)
        return TrialResult(name, {"learning_rate": rate}, dice, 1, 1.0, None, units)

    def test_within_chance_the_most_careful_one_beyond_it_the_best(self) -> None:
        steady = [[50, 60, 70]] * 8
        lucky = [[58, 60, 70], *[[50, 60, 70]] * 7]  # better, on one unit of eight
        better = [[54, 60, 70]] * 8  # on all
        trials = [self.result("a", 1e-4, steady), self.result("b", 1e-3, lucky)]
        assert trials[1].val_dice > trials[0].val_dice
        assert best_trial(trials, FusionSettings(), {}).trial_id == "a"
        assert best_trial([*trials, self.result("c", 1e-2, better)], FusionSettings(), {}).trial_id == "c"
        errors = chance(trials, trials[1])
        assert errors["b"] == 0
        assert errors["a"] == pytest.approx(trials[1].val_dice - trials[0].val_dice, rel=0.05)

    def test_the_table_tells_errors_against_the_trial_that_others_are_compared_with(self) -> None:
        """Not against a better one that leaves the best member out, nor against one that failed."""
        starts = {
            start_key(members): FusionStart("any", {}, val_dice=dice)
            for members, dice in ((MEMBERS, 0.8), (("fcn32",), 0.7))
        }
        steady, better = [[50, 60, 70]] * 8, [[50, 60, 70], *[[54, 60, 70]] * 7]
        without = self.result("without", 1e-2, better)
        failed = replace(self.result("failed", 1e-2, better), error="it broke")
        trials = [
            self.result("a", 1e-4, steady),
            self.result("b", 1e-3, [[51, 60, 70], *steady[1:]]),
            replace(without, setting={**without.setting, "members": ["fcn32"]}),
            failed,
        ]
        rows = {
            row["trial_id"]: row for row in csv.DictReader(io.StringIO(trials_csv(trials, FusionSettings(), starts)))
        }
        found = {name: float(row["val_dice_error"]) for name, row in rows.items() if row["val_dice_error"]}
        assert found["b"] == 0
        assert found["without"] > found["a"] > 0
        assert rows["failed"]["val_dice_error"] == ""

    def test_published_heads_which_start_nowhere_are_judged_by_what_they_reach(self) -> None:
        starts = {start_key(members): FusionStart("any", {}, val_dice=0.8) for members in (MEMBERS, ("fcn32",))}
        starts[start_key(("fcn32",))] = FusionStart("any", {}, val_dice=0.7)
        trials = [self.result("all", 1e-4, [[50, 60, 70]] * 8), self.result("one", 1e-2, [[54, 60, 70]] * 8)]
        trials[1] = replace(trials[1], setting={**trials[1].setting, "members": ["fcn32"]})
        assert best_trial(trials, FusionSettings(), starts).trial_id == "all"
        assert best_trial(trials, FusionSettings(head="published"), starts).trial_id == "one"
        drawn = [trials[0], replace(trials[1], setting={**trials[1].setting, "head": "published"})]
        assert best_trial(drawn, FusionSettings(), starts).trial_id == "one"

    def test_what_tells_of_no_units_is_judged_by_its_dice(self) -> None:
        trials = [self.result("a", 1e-4, [[50, 60, 70]] * 8), self.result("b", 1e-3, [[54, 60, 70]] * 8)]
        for silent in ([replace(trials[0], val_units=[]), trials[1]], [trials[0], replace(trials[1], val_units=[])]):
            assert best_trial(silent, FusionSettings(), {}).trial_id == "b"
