"""Kill the driver of a small run with SIGKILL at random moments, start it again each time, and compare the result.

An undisturbed run comes first. Then the same command is killed `--kills` times (a run that ends in between is begun
anew from nothing) and left alone once. Checked: tile shards byte for byte, metrics, weights, and that neither a
shard nor an epoch that was complete at a kill was done again: shards keep their time stamps, epochs the seconds
that their history says they took.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from measure import options, require, show  # noqa: E402

from apacs_ray.storage import LocalStore  # noqa: E402
from apacs_ray.synthetic.slide import slide_specs  # noqa: E402
from apacs_ray.synthetic.write import write_smear  # noqa: E402

OPTIONS = [
    "--tiles.size", "128", "--tiles.shard", "4", "--members.batch_size", "2", "--members.learning_rate", "1e-3",
    "--members.width", "0.05", "--members.epochs", "5", "--members.crop", "128", "--fusion.epochs", "4",
    "--fusion.batch_size", "4", "--fusion.learning_rate", "1e-4", "--fusion.from_best", "false",
]  # fmt: skip

SLIDES = ["--tiles.size", "256", "--tiles.shard", "6"]


@dataclass
class Progress:
    """The complete units at a kill: shards with their time stamps, seconds of each epoch by network folder."""

    stages: dict[str, str] = field(default_factory=dict)
    shards: dict[Path, int] = field(default_factory=dict)
    epochs: dict[str, dict[int, float]] = field(default_factory=dict)


def main() -> None:
    """Kill and restart a run, then compare it with an undisturbed one."""
    parser = options(__doc__ or "", "5 kills")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ingest", action="store_true", help="only the cutting of larger slides")
    arguments = parser.parse_args()
    kills = 1 if arguments.smoke else 5 if arguments.quick else arguments.kills
    moments, latest = random.Random(arguments.seed), 0.5 if arguments.smoke else 0.9  # of the undisturbed run's time
    with tempfile.TemporaryDirectory() as folder:
        plain, killed = Path(folder, "plain"), Path(folder, "killed")
        start = partial(_start, "ingest.py" if arguments.ingest or arguments.smoke else "full.py")
        _write_smears(Path(folder, "data"), *((3072, 3072) if arguments.ingest else (512, 384)))
        started = time.monotonic()
        start(plain).wait()
        whole = time.monotonic() - started
        require((plain / "tiles/_committed.json").exists(), "the undisturbed run did not end well")
        print(f"undisturbed run: {whole:.0f} s", flush=True)
        rows: list[dict[str, Any]] = []
        before = Progress()
        while len(rows) < kills:
            process, after = start(killed), moments.uniform(0.15, latest) * whole
            if _ends_within(process, after):
                _require_equal(plain, killed)
                shutil.rmtree(killed)
                before = Progress()
                continue
            process.kill()
            process.wait()
            progress = _progress(killed)
            doing = next((name for name, state in progress.stages.items() if state == "running"), "start")
            epochs = sum(map(len, progress.epochs.values()))
            rows.append({"after_s": after, "in": doing, "shards": len(progress.shards), "epochs": epochs})
            rows[-1]["done_again"] = ", ".join(_done_again(before, progress)) or "nothing"
            before = progress
            print(rows[-1], flush=True)
        require(start(killed).wait() == 0, "the last start failed")
        _require_equal(plain, killed)
        again = ", ".join(_done_again(before, _progress(killed))) or "nothing"
        title = f"{kills} kills: same shards, metrics and weights; done again in the last start: {again}"
        show(title, rows, arguments.json)
        require(all(row["done_again"] == "nothing" for row in [*rows, {"done_again": again}]), "work was done again")


def _write_smears(folder: Path, width: int, height: int) -> None:
    """Write the slides that both runs read: the same files, for their rows name them."""
    store = LocalStore(str(folder))
    for number, spec in enumerate(slide_specs(0, width, height)):
        write_smear(store, spec, number)


def _start(script: str, output: Path) -> subprocess.Popen[bytes]:
    arguments = ["--data", str(output.parent / "data"), "--output", str(output)]
    command = [
        sys.executable,
        str(ROOT / "pipelines" / script),
        *arguments,
        *(SLIDES if script == "ingest.py" else OPTIONS),
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    if status != 0:
        raise SystemExit(f"a start after a kill failed with status {status}")
    return True


def _progress(output: Path) -> Progress:
    progress = Progress()
    record = output / "run.json"
    if record.exists():
        progress.stages = {name: stage["state"] for name, stage in json.loads(record.read_text())["stages"].items()}
    for path in output.glob("*/split=*/*.parquet"):
        progress.shards[path.relative_to(output)] = path.stat().st_mtime_ns
    for path in output.glob("**/.state-*/attempt-*/epoch_*/state.json"):
        name = path.relative_to(output).as_posix().partition("/.state-")[0]
        history = json.loads(path.read_text())["history"]
        progress.epochs.setdefault(name, {}).update({record["epoch"]: record["seconds"] for record in history})
    for path in output.glob("**/history.csv"):
        lines = [line.split(",") for line in path.read_text().splitlines()]
        seconds = lines[0].index("seconds")
        name = path.parent.relative_to(output).as_posix()
        progress.epochs[name] = {int(line[0]): float(line[seconds]) for line in lines[1:]}
    return progress


def _done_again(before: Progress, after: Progress) -> list[str]:
    """Return the units that were complete before and yet were done once more."""
    again = [str(path) for path, stamp in before.shards.items() if after.shards.get(path, stamp) != stamp]
    for name, epochs in before.epochs.items():
        later = after.epochs.get(name, {})
        again += [f"{name} epoch {epoch}" for epoch, took in epochs.items() if later.get(epoch, took) != took]
    return again


def _require_equal(plain: Path, killed: Path) -> None:
    patterns = ("tiles/split=*/*.parquet", "*/model.safetensors", "*/*/model.safetensors", "evaluation/metrics.json")
    for pattern in patterns:
        for path in plain.glob(pattern):
            if (killed / path.relative_to(plain)).read_bytes() != path.read_bytes():
                raise SystemExit(f"{path.relative_to(plain)} differs from the undisturbed run's")


if __name__ == "__main__":
    main()
