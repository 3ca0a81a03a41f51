"""Stop a small run at random moments, start it again each time, at times with other settings; compare the result.

The driver is stopped by SIGKILL, SIGTERM and SIGHUP, each `--kills` times, after a random number of changes on disk and
a random part of a second: so all stages are met however busy the machine is. Between two starts the settings change at
random, so that a run of A goes on as B and as A again. Whenever a start is left to its end, and with the last one, all
files must equal those of an undisturbed run of the same settings, apart from times. After every stop no record may say
what is not on disk; what the two signals stop must end with status 130 and give the lock back.

Counted as done again: a shard or an epoch that was complete at a stop, and that the next start with the same settings
made once more. Shards keep their time stamps, epochs the seconds that their history says they took. What a start with
other settings withdraws is not counted.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from measure import options, require, show  # noqa: E402

from apacs_ray.storage import LocalStore  # noqa: E402
from apacs_ray.synthetic.slide import slide_specs  # noqa: E402
from apacs_ray.synthetic.write import write_smear  # noqa: E402
from apacs_ray.testing.wholeness import differences, lies  # noqa: E402

WHOLE = [
    "--tiles.size", "128", "--tiles.shard", "4", "--members.batch_size", "2", "--members.mode", "together",
    "--members.width", "0.02", "--members.epochs", "2", "--members.crop", "64", "--fusion.epochs", "2",
    "--fusion.batch_size", "4", "--fusion.crop", "64", "--fusion.from_best", "false",
]  # fmt: skip
SETTINGS = {
    "full.py": {
        "A": [*WHOLE, "--members.learning_rate", "1e-3", "--heatmaps.folds", "1"],
        "B": [*WHOLE, "--members.learning_rate", "2e-3", "--heatmaps.folds", "2"],
    },
    "ingest.py": {
        "A": ["--tiles.size", "256", "--tiles.shard", "6"],
        "B": ["--tiles.size", "256", "--tiles.shard", "5"],
    },
}
CHANGE = 1 / 3  # of the starts have other settings than the one before
LATEST = 0.5  # of the files of an undisturbed run: so many changes at most; each start goes on where the last stopped
PAUSE = 1.0  # s, at most, from the last of these changes to the signal
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130
END = 120.0  # s in which a driver that was asked to end does so

Units = dict[str, str]  # complete shards and epochs -> their time stamp, or the seconds that they took


class Driver(Protocol):
    """A process that runs a script."""

    pid: int

    def status(self) -> int | None:
        """Return its exit status, negative for a signal; None as long as it runs."""


@dataclass(frozen=True)
class Script:
    """A script of `pipelines/` as a user starts it."""

    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid

    def status(self) -> int | None:
        return self.process.poll()


@dataclass(frozen=True)
class Fork:
    """A script in a fork of a process that has imported everything, with all its work in there."""

    process: Any

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def status(self) -> int | None:
        return self.process.exitcode  # type: ignore[no-any-return]


def _run_alone(script: str, argv: list[str], log: str) -> None:
    """Be the driver of a run without Ray."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    from apacs_ray.commands.pipeline import main as command
    from apacs_ray.testing.alone import alone

    with alone():
        command(script, argv)


class Runs:
    """Runs of one script on the same slides: an undisturbed one of each setting, and the one that is stopped."""

    def __init__(self, folder: Path, script: str, *, alone: bool) -> None:
        self._folder, self._script = folder, script
        self._forks = multiprocessing.get_context("forkserver") if alone else None
        if self._forks:
            self._forks.set_forkserver_preload(["apacs_ray.testing.alone", "apacs_ray.inference.predictor"])
        self.settings = list(SETTINGS[script])
        self.stopped = folder / "stopped"

    def start(self, name: str, output: Path) -> Driver:
        """Start the script with the settings called `name`."""
        place = ["--data", str(self._folder / "data"), "--output", str(output)]
        argv, path = [*SETTINGS[self._script][name], *place], self._folder / "log"
        if self._forks:
            process = self._forks.Process(target=_run_alone, args=(self._script, argv, str(path)))
            process.start()
            return Fork(process)
        with path.open("ab") as log:
            return Script(
                subprocess.Popen(
                    [sys.executable, str(ROOT / "pipelines" / self._script), *argv],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which nohup ignores
                )
            )

    def undisturbed(self, name: str) -> Path:
        """Return the undisturbed run of the settings called `name`, made when it is first needed."""
        output = self._folder / f"undisturbed-{name}"
        if not output.exists():
            self.require(_end(self.start(name, output)) == 0, "an undisturbed run did not end well")
            self.require_whole(output, "an undisturbed run")
        return output

    def require_equal(self, name: str) -> None:
        """End the program unless the stopped run equals the undisturbed one."""
        changed = differences(self.stopped, self.undisturbed(name))
        self.require(not changed, f"not as in an undisturbed run of {name}: {', '.join(changed)}")

    def require_whole(self, output: Path, when: str) -> None:
        """End the program when a record of a run says what is not on disk."""
        found = lies(output)
        self.require(not found, f"{when}: {'; '.join(found)}")

    def require(self, condition: object, message: str) -> None:
        """End the program with the end of the log unless the condition holds."""
        if not condition:
            print((self._folder / "log").read_text()[-3000:], flush=True)
        require(condition, message)


def main() -> None:
    """Stop and restart a run, then compare it with undisturbed ones."""
    parser = options(__doc__ or "", "2 stops by each signal")
    parser.add_argument("--kills", type=int, default=10, help="stops by each signal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help="the driver does all work itself, without Ray")
    parser.add_argument("--ingest", action="store_true", help="only the cutting of larger slides")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    signals = [*SIGNALS] * (2 if arguments.quick else arguments.kills) if not arguments.smoke else [signal.SIGKILL]
    draw.shuffle(signals)
    with tempfile.TemporaryDirectory() as folder:
        script = "ingest.py" if arguments.ingest or arguments.smoke else "full.py"
        runs = Runs(Path(folder), script, alone=arguments.alone)
        _write_smears(Path(folder, "data"), *((3072, 3072) if arguments.ingest else (512, 512)))
        name = "A"
        started = time.monotonic()
        most = int(LATEST * len(_files(runs.undisturbed(name))))
        print(f"undisturbed run: {time.monotonic() - started:.0f} s", flush=True)
        rows: list[dict[str, Any]] = []
        units: Units = {}
        owners: dict[str, str] = {}  # unit -> the settings under which it was first seen complete
        ended = 0  # starts that came to their end
        while len(rows) < len(signals):
            how, changes, pause = signals[len(rows)], draw.randint(1, most), draw.uniform(0.0, PAUSE)
            driver = runs.start(name, runs.stopped)
            began = time.monotonic()
            await_changes(driver, runs.stopped, changes, pause)
            after = time.monotonic() - began
            status, took = stop_driver(driver, how)
            if status == 0:  # it came to its end first
                ended += 1
                runs.require_equal(name)
                units = _units(runs.stopped)
                owners = dict.fromkeys(units, name)
                name = draw.choice([other for other in runs.settings if other != name])
                continue
            expected = -signal.SIGKILL if how == signal.SIGKILL else INTERRUPTED
            runs.require(status == expected, f"after {how.name} in {name} the status is {status}, not {expected}")
            runs.require(
                how == signal.SIGKILL or not _holds(driver, runs.stopped), f"{how.name} in {name} left the lock"
            )
            runs.require_whole(runs.stopped, f"after {how.name} in {name}")
            now = _units(runs.stopped)
            again = _done_again(units, now)
            rows.append({"signal": how.name, "settings": name, "after_s": after, "ends_in_s": took})
            rows[-1] |= {"in": _doing(runs.stopped), "units": len(now), "done_again": ", ".join(again) or "nothing"}
            print(rows[-1], flush=True)
            # what was complete under other settings may be withdrawn under these
            units = {unit: was for unit, was in units.items() if owners[unit] == name or unit in now} | now
            owners = {unit: owners.get(unit, name) for unit in units}
            if draw.random() < CHANGE and not arguments.smoke:
                name = draw.choice([other for other in runs.settings if other != name])
        runs.require(_end(runs.start(name, runs.stopped)) == 0, "the last start failed")
        runs.require_equal(name)
        runs.require_whole(runs.stopped, "the last start")
        last = ", ".join(_done_again(units, _units(runs.stopped))) or "nothing"
        title = (
            f"{len(rows)} stops, {ended + 1} starts that came to their end: as undisturbed; "
            f"done again in the last start: {last}"
        )
        show(title, rows, arguments.json)
        require(all(row["done_again"] == "nothing" for row in [*rows, {"done_again": last}]), "work was done again")


def _write_smears(folder: Path, width: int, height: int) -> None:
    """Write the slides that all runs read: the same files, for their rows name them."""
    store = LocalStore(str(folder))
    for number, spec in enumerate(slide_specs(0, width, height, train=2, test=1)):
        write_smear(store, spec, number)


def await_changes(driver: Driver, output: Path, changes: int, pause: float) -> None:
    """Wait until so many files were made or replaced, and a while more; or until the driver ends."""
    before, seen = _files(output), set()
    while len(seen) < changes and driver.status() is None:
        seen |= _files(output) - before
        time.sleep(0.05)
    time.sleep(pause)


def _files(output: Path) -> set[tuple[str, int]]:
    """Return all files of a run with their time stamps."""
    found = set()
    for folder, _, names in os.walk(output):  # which passes over folders that go meanwhile
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                path = Path(folder, name)
                found.add((str(path), path.stat().st_mtime_ns))
    return found


def stop_driver(driver: Driver, how: signal.Signals) -> tuple[int, float]:
    """Signal a driver; return its exit status, and the seconds that it then took to end."""
    asked = time.monotonic()
    if driver.status() is None:
        os.kill(driver.pid, how)
    return _end(driver, END), time.monotonic() - asked


def _end(driver: Driver, most: float = math.inf) -> int:
    """Wait for the end of a driver and return its exit status."""
    deadline = time.monotonic() + most
    while (status := driver.status()) is None:
        if time.monotonic() > deadline:
            os.kill(driver.pid, signal.SIGKILL)
            raise SystemExit(f"a driver was not at its end after {most:.0f} s")
        time.sleep(0.05)
    return status


def _holds(driver: Driver, output: Path) -> bool:
    """Return whether the lock names a driver; one that still waits for what a killed one left leaves that one's."""
    lock = output / "run.lock"
    return lock.exists() and json.loads(lock.read_text())["pid"] == driver.pid


def _doing(output: Path) -> str:
    """Return the stage that a stopped run was in."""
    record = output / "run.json"
    stages = json.loads(record.read_text())["stages"] if record.exists() else {}
    return next((name for name, stage in stages.items() if stage["state"] in ("running", "stopped")), "between stages")


def _units(output: Path) -> Units:
    """Return all that is complete, each under the fingerprint of the settings that it is of."""
    units = {
        path.relative_to(output).as_posix(): str(path.stat().st_mtime_ns) for path in output.glob("*/split=*/*.parquet")
    }
    for path in output.glob("**/.state-*/attempt-*/epoch_*/state.json"):
        folder, _, state = path.relative_to(output).as_posix().partition("/.state-")
        try:
            history = json.loads(path.read_text())["history"]
        except ValueError:  # a kill cut it: not complete
            continue
        units |= {f"{folder} {state[:8]} epoch {epoch['epoch']}": f"{epoch['seconds']:.6g}" for epoch in history}
    for path in output.glob("**/history.csv"):
        folder = path.parent.relative_to(output)
        if (fingerprint := _trained_under(output, folder)) is None:
            continue
        lines = [line.split(",") for line in path.read_text().splitlines()]
        seconds = lines[0].index("seconds")
        units |= {f"{folder} {fingerprint} epoch {line[0]}": line[seconds] for line in lines[1:]}
    return units


def _trained_under(output: Path, folder: Path) -> str | None:
    """Return the fingerprint of the network in a folder whose training has ended, 8 digits; None when none says."""
    marks = sorted((output / folder).glob(".done-*"), key=lambda mark: mark.stat().st_mtime_ns)
    if marks:
        return marks[-1].name.removeprefix(".done-")
    marker = output / folder.parts[0] / "_committed.json"
    return json.loads(marker.read_text())["fingerprint"][:8] if marker.exists() else None


def _done_again(before: Units, after: Units) -> list[str]:
    """Return what was complete before and was yet made once more."""
    return [unit for unit, was in before.items() if after.get(unit, was) != was]


if __name__ == "__main__":
    main()
