"""What the driver says of a sweep's trials while Ray Tune runs them.

A module of its own, as a class of Ray's is in it: everything else of a sweep can be imported without Ray.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune import Callback

from apacs_ray.console import say
from apacs_ray.distributed.trial import FAILURE, error_line


class TrialListener(Callback):  # type: ignore[misc]
    """Tells how many trials have ended, and whether they failed. Ray Tune pickles it; `on_done` stays behind."""

    def __init__(self, on_done: Callable[[int], None]) -> None:
        self._on_done: Callable[[int], None] | None = on_done
        self._done = 0

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Count it, and say why it failed."""
        self._done += 1
        if self._on_done is not None:
            self._on_done(self._done)
        if failure := (trial.last_result or {}).get(FAILURE):
            say(f"trial {trial.trial_id}: failed: {error_line(failure)}")

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Say that it goes on."""
        say(f"trial {trial.trial_id}: lost its worker or node; goes on from its last checkpoint")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Say why it ended."""
        say(f"trial {trial.trial_id}: failed: {error_line(trial.get_error() or 'it left no error')}")

    def __getstate__(self) -> dict[str, Any]:
        return {"_on_done": None, "_done": self._done}
