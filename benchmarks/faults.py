"""Break a cluster in every stage of a small job, in every way; compare its files with those of an undisturbed run.

Each fault has a cluster of its own on this machine (a head without CPUs, two worker nodes) and one whole job, which it
strikes once in every stage, when the stage has made something and a worker is busy with the rest. What was lost is
replaced as a cloud would: a node by a new node; a driver, and a head with its driver, by the same command again. A
watcher looks at the run meanwhile and sees whether anything that was stored is made a second time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from measure import options, require, show  # noqa: E402

from apacs_ray.testing.cluster import RayCluster, kill_node, processes  # noqa: E402
from apacs_ray.testing.runs import SLOWLY, read_trials, run, start, write_cells  # noqa: E402

OPTIONS = [
    "--tiles.size", "64", "--tiles.shard", "2",
    "--members.mode", "together", "--members.width", "0.1", "--members.epochs", "3", "--members.crop", "64",
    "--members.batch_size", "2", "--members.precision", "float32", "--members.learning_rate", "0.001",
    "--fusion.learning_rate", "0.0001",
]  # fmt: skip
SWEEP = "trials: 2\nepochs: 3\nspace: {learning_rate: {loguniform: [0.001, 0.002]}}\n"
NOTICE = 15  # s from the notice of a preemption to the end of the node
TIMEOUT = 240.0  # s in which a stage ends after a fault


@dataclass(frozen=True)
class Moment:
    """When a stage is struck: a file of `pattern` is there, and a worker process says that it is busy with `work`."""

    pattern: str
    work: str


STAGES = {
    "ingest": Moment("tiles/split=*/*.parquet", "ray::MapBatches(checked)"),
    "train_members": Moment("members/fcn8/.state-*/attempt-*/epoch_00000/state.json", "ray::RayTrainWorker"),
    "heatmaps": Moment("heatmaps/split=*/*.parquet", "ray::MapWorker(MapBatches(Worker)).submit"),
    "tune_fusion": Moment("tune/.state-*/sweep/*/checkpoint_000000/state.json", "ray::ImplicitFunc.train"),
    "train_fusion": Moment("fusion/.state-*/attempt-*/epoch_00000/state.json", "ray::RayTrainWorker"),
    "evaluate": Moment("fusion/_committed.json", "ray::MapWorker(MapBatches(Worker)).submit"),
}
OUTPUTS = {  # of each stage, byte for byte
    "ingest": ["tiles/split=*/*.parquet", "rejects/*.parquet"],
    "train_members": ["members/*/model.safetensors", "members/*/model.json"],
    "heatmaps": ["heatmaps/split=*/*.parquet"],
    "tune_fusion": ["tune/best.yaml"],
    "train_fusion": ["fusion/model.safetensors", "fusion/model.json"],
    "evaluate": ["evaluation/metrics.json", "evaluation/per_tile.parquet"],
}
FOLDERS = dict(zip(STAGES, ("tiles", "members", "heatmaps", "tune", "fusion", "evaluation"), strict=True))


class Site:
    """Jobs on a cluster, one after the other: what a fault may break, and how it is replaced."""

    def __init__(self, folder: Path, data: Path, sweep: Path, script: str = "full.py") -> None:
        self.folder = folder
        self._script = script
        self._given = ["--data", str(data), *OPTIONS, "--tune.config", str(sweep)]
        self._clusters: list[RayCluster] = []
        self._ends: list[threading.Timer] = []
        self.new_cluster()
        self.begin(folder)

    def begin(self, folder: Path) -> None:
        """Start a new job, whose run and log are in `folder`."""
        folder.mkdir(exist_ok=True)
        self.folder, self.output = folder, folder / "run"
        self._argv = [*self._given, "--output", str(self.output)]
        self.submit()

    def new_cluster(self) -> None:
        """Start a cluster; what is left of an earlier one is not touched."""
        folder = self.folder / f"cluster-{len(self._clusters)}"
        folder.mkdir(parents=True)
        self.cluster = RayCluster(folder, head_cpus=0)
        self._clusters.append(self.cluster)
        self.nodes = [self.cluster.add_node(cpus=1) for _ in range(2)]

    def submit(self) -> None:
        """Start the command, or start it again."""
        env = {**self.cluster.joined, **SLOWLY, "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
        self.driver = start(*self._argv, script=self._script, env=env)
        threading.Thread(target=_drain_output, args=(self.driver, self.folder / "log"), daemon=True).start()

    def second(self) -> str:
        """Start the same command while the first runs; return its last line. Ends the program unless it is refused."""
        done = run(*self._argv, script=self._script, env=self.cluster.joined)
        if done.status != 1 or self.driver.poll() is not None:
            raise SystemExit(f"a second start was not refused: {done.summary}")
        return done.text.strip().splitlines()[-1]

    def replace(self, node: subprocess.Popen[bytes]) -> None:
        """Take a node out of those that count, and start another."""
        self.nodes.remove(node)
        self.nodes.append(self.cluster.add_node(cpus=1))

    def end_later(self, node: subprocess.Popen[bytes]) -> None:
        """Kill the node when its notice ends."""
        self._ends.append(threading.Timer(NOTICE, kill_node, [node]))
        self._ends[-1].start()

    def busy(self, work: str) -> tuple[int, subprocess.Popen[bytes]] | None:
        """Return a worker process that does `work`, and its node; None without one."""
        for node in self.nodes:
            for pid, title in processes(node).items():
                if title.startswith(work):
                    return pid, node
        return None

    def stop(self) -> None:
        """End the job and every cluster."""
        for end in self._ends:
            end.cancel()
        self.driver.kill()
        for cluster in self._clusters:
            cluster.stop()


def _drain_output(driver: subprocess.Popen[str], log: Path) -> None:
    with log.open("a") as lines:
        for line in driver.stdout or ():
            lines.write(line)
            lines.flush()


Strike = Callable[[Site, int, "subprocess.Popen[bytes]"], str]


def worker_killed(site: Site, pid: int, node: subprocess.Popen[bytes]) -> str:
    """Kill the busy worker process."""
    os.kill(pid, signal.SIGKILL)
    return "goes on"


def node_killed(site: Site, pid: int, node: subprocess.Popen[bytes]) -> str:
    """Kill all processes of the busy worker's node, and start a new node."""
    kill_node(node)
    site.replace(node)
    return "goes on"


def node_drained(site: Site, pid: int, node: subprocess.Popen[bytes]) -> str:
    """Drain the busy worker's node as before a preemption, kill it after the notice, and start a new node."""
    site.cluster.drain(node, NOTICE)
    site.end_later(node)
    site.replace(node)
    return "goes on"


def driver_killed(site: Site, pid: int, node: subprocess.Popen[bytes]) -> str:
    """Kill the driver and start the same command again."""
    site.driver.kill()
    site.driver.wait()
    site.submit()
    return "same command again takes over"


def head_killed(site: Site, pid: int, node: subprocess.Popen[bytes]) -> str:
    """Kill the head and its driver; start the same command on a new cluster."""
    kill_node(site.cluster.head)  # its workers' nodes live on until they notice
    site.driver.kill()  # which runs on the head
    site.driver.wait()
    site.new_cluster()
    site.submit()
    return "same command again, on a new cluster"


def second_submission(site: Site, pid: int, node: subprocess.Popen[bytes]) -> str:
    """Start the same command a second time, which must be refused."""
    if "held by process" not in (message := site.second()):
        raise SystemExit(f"a second start was refused with other words: {message}")
    return "second refused in a line, first goes on"


FAULTS: dict[str, Strike] = {
    "worker process killed": worker_killed,
    "node killed": node_killed,
    "node drained, then killed": node_drained,
    "driver killed": driver_killed,
    "head killed": head_killed,
    "second submission": second_submission,
}


class Watcher:
    """Records every stored unit (shard, epoch of a network, epoch of a trial) and how often it was made."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._made: dict[str, dict[Hashable, set[float]]] = defaultdict(lambda: defaultdict(set))
        self._left: dict[str, set[str]] = defaultdict(set)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join()

    def again(self, folder: str) -> str:
        """Say how many units below `folder` were made more than once, and where training left a node."""
        made = self._made[folder].values()
        if not made:
            return "nothing is stored before its end"
        twice = sum(len(times) - 1 for times in made)
        left = "".join(f"; left at {place}" for place in sorted(self._left[folder]))
        return f"{twice} of {len(made)}{left}"

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            paths: list[Path] = []
            with contextlib.suppress(OSError):  # a folder was deleted at this moment
                paths.extend(self._output.rglob("*"))
            for path in paths:
                with contextlib.suppress(OSError, ValueError, KeyError):  # written or deleted at this moment
                    self._look(path)

    def _look(self, path: Path) -> None:
        inside = path.relative_to(self._output)
        made = self._made[inside.parts[0]]
        if path.suffix == ".parquet" and inside.parts[0] in ("tiles", "heatmaps"):
            made[inside].add(path.stat().st_mtime_ns)
        elif path.name == "state.json":  # of a network's attempt, or of a trial
            state, network = json.loads(path.read_text()), inside.parts[-3 if inside.parts[0] == "tune" else 1]
            for record in state["history"]:
                made[network, record["epoch"]].add(record["seconds"])
            if state["part"]:
                self._left[inside.parts[0]].add(f"epoch {state['part']['epoch']} step {state['part']['steps']}")


def main() -> None:
    """Strike jobs with every fault, print what became of them, and fail when one left other results."""
    parser = options(__doc__ or "", "worker process and node killed only")
    parser.add_argument("--fault", choices=FAULTS, help="this one only")
    parser.add_argument("--keep", type=Path, help="keep the runs and their logs there")
    arguments = parser.parse_args()
    names = [arguments.fault] if arguments.fault else list(FAULTS)[: 2 if arguments.quick else None]
    stages, script = STAGES, "full.py"
    if arguments.smoke:
        names, stages, script = ["node killed"], {"ingest": STAGES["ingest"]}, "ingest.py"
    rows: list[dict[str, Any]] = []
    with _folder(arguments.keep) as folder:
        data, sweep = write_cells(folder / "cells", train=10, test=5), folder / "sweep.yaml"
        sweep.write_text(SWEEP)
        whole = time.monotonic()
        site = Site(folder / "undisturbed", data, sweep, script)
        try:
            _await(site, lambda: site.driver.poll() is not None, len(stages) * TIMEOUT)
            require(site.driver.returncode == 0, f"the undisturbed run failed:\n{_log(site)}")
            plain = site.output
            print(f"undisturbed, with its cluster: {time.monotonic() - whole:.0f} s", flush=True)
            for name in names:
                place = folder / name.replace(" ", "-").replace(",", "")
                if arguments.smoke:  # on the same cluster
                    site.begin(place)
                else:
                    site.stop()
                    site = Site(place, data, sweep, script)
                rows += _suffer(name, FAULTS[name], site, plain, stages)
                show("faults", rows, arguments.json)
        finally:
            site.stop()
    require(all(row["differences"] == "none" for row in rows), "a fault changed what a job leaves")


def _suffer(name: str, strike: Strike, site: Site, plain: Path, stages: Mapping[str, Moment]) -> list[dict[str, Any]]:
    """Run one job, which the fault strikes in every stage; return a row for each."""
    watcher = Watcher(site.output)
    rows = []
    for stage, moment in stages.items():
        worker = _await_moment(site, stage, moment)
        struck = time.monotonic()
        survived = strike(site, *worker)
        starts = 0
        while not _done(site, stage):
            _await(site, lambda stage=stage: _done(site, stage) or site.driver.poll() is not None, TIMEOUT)
            if not _done(site, stage) and starts == 0:
                starts += 1
                survived = f"stops ({_log(site).splitlines()[-1][:60]}); same command again goes on"
                site.submit()
        rows.append(
            {
                "fault": name,
                "in": stage,
                "survived": survived,
                "s_to_its_end": round(time.monotonic() - struck, 1),
            }
        )
    _await(site, lambda: site.driver.poll() is not None, TIMEOUT)
    watcher.stop()
    require(site.driver.returncode == 0, f"{name}: the job failed:\n{_log(site)}")
    for row in rows:
        row["stored_units_made_again"] = watcher.again(FOLDERS[row["in"]])
        row["differences"] = ", ".join(differences(row["in"], site.output, plain)) or "none"
    return rows


def _await_moment(site: Site, stage: str, moment: Moment) -> tuple[int, subprocess.Popen[bytes]]:
    """Wait until the stage is at work; return a busy worker and its node. Ends the program when that is missed."""
    workers: list[tuple[int, subprocess.Popen[bytes]]] = []

    def reached() -> bool:
        if _state(site, stage) == "running" and any(site.output.glob(moment.pattern)):
            workers.extend(filter(None, [site.busy(moment.work)]))
        return bool(workers) or _done(site, stage) or site.driver.poll() is not None

    _await(site, reached, TIMEOUT)
    if not workers:
        raise SystemExit(f"{stage}: the moment to strike was missed\n{_log(site)}")
    return workers[0]


def _await(site: Site, reached: Callable[[], bool], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not reached():
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing happened for {timeout:.0f} s\n{_log(site)}")
        time.sleep(0.01)


def _state(site: Site, stage: str) -> str | None:
    try:
        state: str | None = json.loads((site.output / "run.json").read_text())["stages"][stage]["state"]
    except (OSError, KeyError):
        return None
    return state


def _done(site: Site, stage: str) -> bool:
    return _state(site, stage) in ("done", "unchanged") and (site.output / FOLDERS[stage] / "_committed.json").exists()


def differences(stage: str, output: Path, plain: Path) -> Iterator[str]:
    """Yield files of a stage that differ from the undisturbed run, are missing or new; `counts` where those differ."""
    files = [{p.relative_to(run) for glob in OUTPUTS[stage] for p in run.glob(glob)} for run in (output, plain)]
    yield from (str(path) for path in files[0] ^ files[1])
    for path in sorted(files[0] & files[1]):
        if (output / path).read_bytes() != (plain / path).read_bytes():
            yield str(path)
    markers = [json.loads((run / FOLDERS[stage] / "_committed.json").read_text()) for run in (output, plain)]
    if markers[0]["counts"] != markers[1]["counts"] or markers[0]["fingerprint"] != markers[1]["fingerprint"]:
        yield "counts"
    if stage == "tune_fusion" and read_trials(output) != read_trials(plain):
        yield "trials.csv"


def _log(site: Site) -> str:
    text = (site.folder / "log").read_text()
    return "\n".join([line for line in text.splitlines() if not re.search(r"state-dump|[│━]", line)][-30:])


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        shutil.rmtree(keep, ignore_errors=True)
        keep.mkdir(parents=True)
        yield keep
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


if __name__ == "__main__":
    main()
