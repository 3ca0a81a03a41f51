"""Kill a training while a checkpoint is being written, each time another part of it; compare with an undisturbed one.

Three small networks train in one process, by the worker of Ray Train in its local mode. Checkpoints are due all the
time, and the store is slow: each file of one is held before and after it is written. The driver is killed (SIGKILL) at
a random moment of a checkpoint; a kill that found none in flight does not count. After each, the newest checkpoint
that is whole is what the next start must go on from, no older one than any that had been written; the histories in it
go on from those of the kill before, without an epoch twice. At its end weights and histories must be those of a run
without kills, slow store or checkpoints within epochs, apart from times. A training that ends before all kills is
compared, and begun again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kills import Fork, stop_driver  # noqa: E402
from measure import options, require, show  # noqa: E402

from apacs_ray.storage import LocalStore  # noqa: E402
from apacs_ray.synthetic.slide import slide_specs  # noqa: E402
from apacs_ray.synthetic.write import write_smear  # noqa: E402
from apacs_ray.testing.wholeness import differences, lies  # noqa: E402
from apacs_ray.training.checkpoints import Checkpoint, complete_checkpoints  # noqa: E402

SETTINGS = [
    "--tiles.size", "128", "--members.mode", "together", "--members.batch_size", "2", "--members.width", "0.02",
    "--members.crop", "64", "--members.patience", "0", "--fusion.from_best", "false",
]  # fmt: skip
OFTEN = 1e-4  # minutes between checkpoints: after every step that asks
HOLD = 0.05  # s, at most, before and after each of a checkpoint's three files
MOST = 12  # checkpoints that a start may finish before it is killed
NETWORKS = ("fcn32", "fcn16", "fcn8")
BEGIN, END, RESUME = "begin", "end", "resume"

Places = dict[str, tuple[int, int]]  # network -> epoch and step with which its training goes on


def main() -> None:
    """Kill and start again, then compare."""
    parser = options(__doc__ or "", "3 kills")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    kills = 1 if arguments.smoke else 3 if arguments.quick else arguments.kills
    epochs = 2 if arguments.smoke else arguments.epochs
    with tempfile.TemporaryDirectory() as folder:
        training = Training(Path(folder), epochs, random.Random(arguments.seed))
        rows: list[dict[str, Any]] = []
        ends = 0
        while len(rows) < kills:
            row = training.kill()
            if row is None:
                training.require_equal()
                training.begin_anew()
                ends += 1
            elif row["in_flight"]:
                rows.append(row)
                print(row, flush=True)
        training.end()
        title = (
            f"{len(rows)} kills while a checkpoint was in flight, trainings of {epochs} epochs: {ends + 1}; nothing "
            "lost beyond the last whole checkpoint, no epoch twice, weights and histories as undisturbed"
        )
        show(title, rows, arguments.json)


class Training:
    """The undisturbed training, and the one that is killed."""

    def __init__(self, folder: Path, epochs: int, draw: random.Random) -> None:
        self._folder, self._draw = folder, draw
        self._settings = [*SETTINGS, "--members.epochs", str(epochs)]
        self._forks = multiprocessing.get_context("forkserver")
        self._forks.set_forkserver_preload(
            ["apacs_ray.testing.alone", "apacs_ray.training.loop", "ray.data", "ray.train.torch"]
        )
        self._output, self._undisturbed = folder / "killed", folder / "undisturbed"
        self._events = folder / "events"
        self._before: dict[str, list[dict[str, Any]]] = {}
        self._reached: Places = {}
        store = LocalStore(str(folder / "data"))
        for number, spec in enumerate(slide_specs(0, 512, 512, train=2, test=1)):
            write_smear(store, spec, number)
        for script in ("ingest.py", "train_members.py"):
            self._require_end(self._start(script, self._undisturbed, slow=False))
            if script == "ingest.py":
                shutil.copytree(self._undisturbed, folder / "ingested")
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget the training that was killed."""
        shutil.rmtree(self._output, ignore_errors=True)
        shutil.copytree(self._folder / "ingested", self._output)
        self._before, self._reached = {}, {}

    def kill(self) -> dict[str, Any] | None:
        """Start the training, kill it while it writes a checkpoint, and check what it has left.

        Returns:
            What was found; None when it came to its end before.
        """
        self._events.write_text("")
        driver = self._start("train_members.py", self._output, slow=True)
        wanted, pause = self._draw.randint(1, MOST), self._draw.uniform(0.0, 6 * HOLD)
        while len(self._told(BEGIN)) < wanted and driver.status() is None:
            time.sleep(0.002)
        time.sleep(pause)
        status, _ = stop_driver(driver, signal.SIGKILL)
        if status == 0:
            return None
        self._require(status == -signal.SIGKILL, f"the training ended with status {status}")
        self._require_resumed()
        begun, ended = self._told(BEGIN), self._told(END)
        self._check_states(ended)
        newest = {name: len(checkpoint.state["history"]) for name, checkpoint in self._newest().items()}
        in_flight = len(begun) > len(ended)
        files = sorted(path.name for path in (self._output / begun[-1][0]).glob("*")) if in_flight and begun else []
        return {
            "in_flight": in_flight,
            "written": len(ended),
            "files_there": ", ".join(files) or "none",
            "epochs": " + ".join(str(newest.get(name, 0)) for name in NETWORKS),
        }

    def end(self) -> None:
        """Let the training come to its end, and compare it."""
        self._events.write_text("")
        self._require_end(self._start("train_members.py", self._output, slow=False))
        self._require_resumed()
        self.require_equal()

    def require_equal(self) -> None:
        """End the program unless weights, histories and records are those of the undisturbed training."""
        found = [*differences(self._output, self._undisturbed), *lies(self._output)]
        self._require(not found, f"not as undisturbed: {', '.join(found)}")
        for name in NETWORKS:
            weights = [
                (output / f"members/{name}/model.safetensors").read_bytes()
                for output in (self._output, self._undisturbed)
            ]
            self._require(weights[0] == weights[1], f"{name} has other weights")

    def _require_resumed(self) -> None:
        """Require that each network went on from what the kill before had left whole; before the first from nothing."""
        for name, epoch, step in self._told(RESUME):
            expected = self._reached.get(name, (0, 0))
            self._require((int(epoch), int(step)) == expected, f"{name} went on from {epoch}, {step}, not {expected}")

    def _check_states(self, written: Sequence[Sequence[str]]) -> None:
        """Require that nothing which was written is lost, and that no epoch was trained twice."""
        newest = self._newest()
        reached = {name: checkpoint.place for name, checkpoint in newest.items()}
        for name, place in self._reached.items():
            self._require(reached.get(name, (0, 0)) >= place, f"{name} was at {place}, is at {reached.get(name)}")
        for _, name, epoch, step in written:
            place = (int(epoch), int(step))
            self._require(reached.get(name, (0, 0)) >= place, f"the checkpoint {place} of {name} is lost")
        for name, checkpoint in newest.items():
            history, before = checkpoint.state["history"], self._before.get(name, [])
            numbers = [record["epoch"] for record in history]
            self._require(numbers == list(range(len(history))), f"epochs of {name}: {numbers}")
            # with the seconds that each took: an epoch that was trained again would have others
            self._require(history[: len(before)] == before, f"an epoch of {name} that was whole was trained again")
            self._before[name] = history
        self._reached = reached

    def _newest(self) -> dict[str, Checkpoint]:
        store = LocalStore(str(self._output))
        found = {name: complete_checkpoints(store, f"members/{name}") for name in NETWORKS}
        return {name: checkpoints[-1] for name, checkpoints in found.items() if checkpoints}

    def _told(self, what: str) -> list[list[str]]:
        """What the driver of now has told of: begun and written checkpoints, networks that went on."""
        lines = [line.split() for line in self._events.read_text().splitlines()]
        return [words[1:] for words in lines if words[0] == what]

    def _start(self, script: str, output: Path, *, slow: bool) -> Fork:
        argv = [*self._settings, "--data", str(self._folder / "data"), "--output", str(output)]
        if slow:
            argv += ["--run.checkpoint_minutes", str(OFTEN)]
        arguments = (script, argv, str(self._folder / "log"), str(self._events), self._draw.random() if slow else None)
        process = self._forks.Process(target=_drive, args=arguments)
        process.start()
        return Fork(process)

    def _require_end(self, driver: Fork) -> None:
        while (status := driver.status()) is None:
            time.sleep(0.02)
        self._require(status == 0, "a start that was left alone failed")

    def _require(self, condition: object, message: str) -> None:
        if not condition:
            print((self._folder / "log").read_text()[-3000:], flush=True)
        require(condition, message)


def _drive(script: str, argv: list[str], log: str, events: str, seed: float | None) -> None:
    """Be the driver of a run without Ray; with a seed, one whose store is slow with checkpoints, and that tells."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    from apacs_ray.commands.pipeline import main as command
    from apacs_ray.testing.alone import alone

    _tell_of_checkpoints(events, seed)
    with alone():
        command(script, argv)


def _tell_of_checkpoints(events: str, seed: float | None) -> None:
    """Let this process write a line for each checkpoint that it begins, has written, or goes on from."""
    from apacs_ray.distributed import ddp_worker, interruptions

    descriptor = os.open(events, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    upload, keep, resume = LocalStore.upload, ddp_worker.keep_checkpoint, ddp_worker.resume_newest

    def tell(*words: object) -> None:
        os.write(descriptor, f"{' '.join(map(str, words))}\n".encode())

    def held_upload(store: LocalStore, path: str, source: Path) -> None:
        time.sleep(draw.uniform(0.0, HOLD))
        upload(store, path, source)
        time.sleep(draw.uniform(0.0, HOLD))

    def told_keep(store: Any, folder: str, attempt: int, local: Path, *others: Any) -> None:
        state = json.loads((local / "state.json").read_text())
        part = state["part"]
        place = (state["epoch"], part["steps"]) if part else (state["epoch"] + 1, 0)
        step = f"_step_{part['steps']:05d}" if part else ""
        name = folder.split("/")[1]
        where = (f"{folder}/attempt-{attempt}/epoch_{state['epoch']:05d}{step}", name, *place)
        tell(BEGIN, *where)
        keep(store, folder, attempt, local, *others)
        tell(END, *where)

    def told_resume(trainer: Any, store: Any, state: str) -> None:
        resume(trainer, store, state)
        tell(RESUME, state.split("/")[1], *trainer.place)

    ddp_worker.resume_newest = told_resume
    if seed is not None:
        draw = random.Random(seed)
        interruptions.ASK_EVERY = 0.0  # after every step
        LocalStore.upload = held_upload  # type: ignore[method-assign]
        ddp_worker.keep_checkpoint = told_keep


if __name__ == "__main__":
    main()
