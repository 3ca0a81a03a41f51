"""A fault at any write of any stage, then the same command again: what it leaves, against stages that nothing met.

Stages run in this process (`testing.alone`), on a store that fails at a write of choice (`testing.faulty_store`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from apacs_ray.config.settings import Settings
from apacs_ray.errors import ApacsError
from apacs_ray.runs.lease import LOCK
from apacs_ray.runs.run import Run
from apacs_ray.stages.pipeline import STAGES, run_pipeline
from apacs_ray.testing.alone import AloneSession
from apacs_ray.testing.faulty_store import Died, FaultyStore, Kind, OneProcess
from apacs_ray.testing.wholeness import differences, lies

NAMES = [stage.name for stage in STAGES]
Story = Literal["fresh", "after other", "other between"]
STORIES: tuple[Story, ...] = ("fresh", "after other", "other between")
SETTINGS: dict[str, dict[str, Any]] = {
    "tiles": {"size": 64, "shard": 4},
    "members": {"mode": "together", "width": 0.02, "epochs": 1, "crop": 48, "precision": "float32"},
    "fusion": {"epochs": 1, "crop": 48, "learning_rate": 1e-4},
}
OTHER = {  # what differs here makes other files in every stage, and more of them where that can be
    "tiles": {"size": 80, "shard": 3},
    "members": {**SETTINGS["members"], "epochs": 2, "learning_rate": 1e-3},
    "heatmaps": {"folds": 2},
    "fusion": {"epochs": 1, "crop": 48, "learning_rate": 1e-3, "compare": True},
    "evaluate": {"border": 1},
}
_SHARD = re.compile(r"\w+ .*/split=\w+/[^/]+\.parquet")
_EPOCH = re.compile(r"\w+ (.*/\.state-[^/]+)/attempt-\d+/(epoch_\d+)/state\.json")


@dataclass(frozen=True)
class Point:
    """A write at which a stage was struck, and what came of it.

    Attributes:
        write: What was to be written.
        raised: Whether the stage ended there.
        again: Shards and epochs that were complete and were yet made once more.
        defects: What is wrong; nothing, if all is well.
    """

    write: str
    raised: bool
    again: list[str] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)


class Site:
    """A folder for runs of the same data with two settings, the second of which come in between."""

    def __init__(self, folder: Path, data: str | None, settings: Mapping[str, Any], other: Mapping[str, Any]) -> None:
        self._folder, self._data = folder, data
        self._settings = Settings.model_validate(settings)
        self._other = Settings.model_validate(other)

    def count(self, stage: str, story: Story) -> int:
        """Return how many writes the stage makes in a story, when nothing fails."""
        output = self._copy(self._before(stage, story))
        return len(self._run(output, self._struck(story), stage, OneProcess()))

    def strike(self, stage: str, story: Story, at: int, kind: Kind) -> Point:
        """Let one write of a stage fail, run the stages again, and look at what both left.

        Args:
            stage: Its name.
            story: `fresh`: the stage was never done before. `after other`: it was done with the other settings.
                `other between`: it was done, then is struck with the other settings, and done as before again.
            at: Number of the write.
            kind: How it fails.

        Returns:
            What came of it.
        """
        output, fault = self._copy(self._before(stage, story)), OneProcess(at, kind)
        raised = False
        try:
            self._run(output, self._struck(story), stage, fault)
        except (Died, ApacsError):
            raised = True
        if at >= len(fault.writes):  # what threads write may be less this time
            return Point("none", raised)
        defects = [f"after the fault: {lie}" for lie in lies(output)]
        done = self._run(output, self._settings, stage, OneProcess())
        defects += [f"in the end: {lie}" for lie in lies(output)]
        defects += [f"differs: {path}" for path in differences(output, self.undisturbed(stage))]
        write = fault.writes[at].replace(f"{output}/", "")
        return Point(write, raised, _done_again(fault.writes[:at], done), defects)

    def _struck(self, story: Story) -> Settings:
        return self._other if story == "other between" else self._settings

    def undisturbed(self, stage: str, other: bool = False) -> Path:
        """Return a run that nothing met, whose last stage is this one."""
        output = self._folder / f"{'other' if other else 'run'}-until-{stage}"
        if not output.exists():
            if stage != NAMES[0]:
                shutil.copytree(self.undisturbed(NAMES[NAMES.index(stage) - 1], other), output)
            self._run(output, self._other if other else self._settings, stage, OneProcess())
        return output

    def _before(self, stage: str, story: Story) -> Path:
        """Return the run as it is when the stage is to be struck."""
        place = NAMES.index(stage)
        output = self._folder / f"{story} before {stage}"
        if not output.exists():
            if story != "fresh":
                shutil.copytree(self.undisturbed(stage, other=story == "after other"), output)
                if place:
                    self._run(output, self._struck(story), NAMES[place - 1], OneProcess())
            elif place:
                shutil.copytree(self.undisturbed(NAMES[place - 1]), output)
            else:
                output.mkdir()
        return output

    def _copy(self, before: Path) -> Path:
        output = self._folder / "run"  # always the same place, as reports name it
        shutil.rmtree(output, ignore_errors=True)
        return Path(shutil.copytree(before, output))

    def _run(self, output: Path, settings: Settings, last: str, fault: OneProcess) -> list[str]:
        """Run all stages up to `last`; return what was written since the run was opened."""
        run = Run.open(FaultyStore(str(output), fault), settings, self._data)
        try:
            run_pipeline(run, AloneSession(run), NAMES[: NAMES.index(last) + 1])
        finally:
            try:
                run.close()
            except Died:  # the lock of a process that is gone is taken over; this one lives on
                (output / LOCK).unlink()
        return fault.writes


def _done_again(complete: list[str], after: list[str]) -> list[str]:
    """Return shards and epochs of `complete` that are written in `after` as well."""
    return sorted(_units(complete) & _units(after))


def _units(writes: list[str]) -> set[str]:
    """Return the shards and the epochs that were stored."""
    shards = {write.partition(" ")[2] for write in writes if _SHARD.fullmatch(write) and write.startswith("write")}
    epochs = {"/".join(match.groups()) for write in writes if (match := _EPOCH.fullmatch(write)) is not None}
    return shards | epochs
