"""What a sweep takes from Ray Tune's trials, without Ray."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from apacs_ray.config.settings import FusionSettings
from apacs_ray.config.sweep import Distribution
from apacs_ray.distributed.tune import best_epoch_of, stopped_by_ctrl_c, within_ranges

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


def trial(epochs: list[dict[str, Any]] | None, config: dict[str, Any]) -> Any:
    return SimpleNamespace(config=config, metrics_dataframe=None if epochs is None else pd.DataFrame(epochs))


def test_a_trial_counts_by_its_own_epochs_and_the_setting_that_each_had() -> None:
    """Its second epoch took over another trial's weights, whose best is told as its own, and a changed rate."""
    epochs = [
        {"epoch": 0, "val_dice": 0.0, "best_val_dice": 0.0, "config/learning_rate": 1e-3},  # left its node in its first
        {
            "epoch": 1,
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
    assert best_epoch_of(trial(epochs, config)) == ({"learning_rate": 1e-3, "members": "fcn16+fcn8"}, 0.7)


@pytest.mark.parametrize("epochs", [None, [], [{"epoch": 0, "val_dice": 0.0, "config/dropout": 0.1}]])
def test_a_trial_that_told_nothing_has_no_score(epochs: list[dict[str, Any]] | None) -> None:
    assert best_epoch_of(trial(epochs, {"dropout": 0.1})) == ({"dropout": 0.1}, None)
