"""Kill the driver of a small run with SIGKILL at random moments, start it again each time, and compare the end.

An undisturbed run comes first. Then the same command is killed `--kills` times (a run that ends in between is begun
anew from nothing) and left alone once. Checked: tile shards byte for byte, metrics, weights, and that neither a
shard nor an epoch that was complete at a kill was done again: shards keep their time stamps, epochs the seconds
that their history says they took.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from apacs_ray.data.synthetic import slide_specs  # noqa: E402
from apacs_ray.slides.smears import write_smear  # noqa: E402
from apacs_ray.storage import LocalStore  # noqa: E402

OPTIONS = [
    "--tiles.size", "128", "--tiles.shard", "4", "--members.batch_size", "2", "--members.learning_rate", "1e-3",
    "--members.width", "0.05", "--members.epochs", "5", "--members.crop", "128", "--fusion.epochs", "4",
    "--fusion.crop", "128", "--fusion.from_best", "false",
]  # fmt: skip

SLIDES = ["--tiles.size", "256", "--tiles.shard", "6"]


@dataclass
class Standing:
    """What was complete at a kill: shards with their time stamps, seconds of each epoch by network folder."""

    stages: dict[str, str] = field(default_factory=dict)
    shards: dict[Path, int] = field(default_factory=dict)
    epochs: dict[str, dict[int, float]] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 kills")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ingest", action="store_true", help="only the cutting of larger slides")
    parser.add_argument("--json", type=Path, help="write the table there")
    arguments = parser.parse_args()
    kills = 5 if arguments.quick else arguments.kills
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        plain, killed = Path(folder, "plain"), Path(folder, "killed")
        _write_smears(Path(folder, "data"), *((3072, 3072) if arguments.ingest else (512, 384)))
        started = time.monotonic()
        _start(plain).wait()
        whole = time.monotonic() - started
        if not (plain / "tiles/_committed.json").exists():
            raise SystemExit(f"the undisturbed run did not end well; try: {' '.join(_command(plain))}")
        print(f"undisturbed run: {whole:.0f} s\n{'kill':>4} {'after s':>8}  {'in':<14} shards epochs  done again")
        rows: list[str] = []
        before = Standing()
        while len(rows) < kills:
            process, after = _start(killed), moments.uniform(0.15, 0.9) * whole
            if _ends_within(process, after):
                _require_equal(plain, killed)
                shutil.rmtree(killed)
                before = Standing()
                continue
            process.kill()
            process.wait()
            standing = _standing(killed)
            again = _done_again(before, standing)
            before = standing
            doing = next((name for name, state in standing.stages.items() if state == "running"), "start")
            epochs = sum(map(len, standing.epochs.values()))
            rows.append(doing)
            print(
                f"{len(rows):>4} {after:8.1f}  {doing:<14} {len(standing.shards):>6} {epochs:>6}  {again or 'nothing'}"
            )
        if _start(killed).wait() != 0:
            raise SystemExit("the last start failed")
        _require_equal(plain, killed)
        again = _done_again(before, _standing(killed))
        print(
            f"after {kills} kills: same shards, metrics and weights; done again in the last start: {again or 'nothing'}"
        )
        if arguments.json:
            arguments.json.write_text(json.dumps([{"in": doing} for doing in rows], indent=1))


def _write_smears(folder: Path, width: int, height: int) -> None:
    """The slides that both runs read: the same files, for their rows name them."""
    store = LocalStore(str(folder))
    for number, spec in enumerate(slide_specs(0, width, height)):
        write_smear(store, spec, number)


def _command(output: Path) -> list[str]:
    script, options = ("ingest.py", SLIDES) if "--ingest" in sys.argv else ("full.py", OPTIONS)
    data = ["--data", str(output.parent / "data"), "--output", str(output)]
    return [sys.executable, str(ROOT / "pipelines" / script), *data, *options]


def _start(output: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(_command(output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    if status != 0:
        raise SystemExit(f"a start after a kill failed with status {status}")
    return True


def _standing(output: Path) -> Standing:
    standing = Standing()
    with_record = output / "run.json"
    if with_record.exists():
        standing.stages = {
            name: stage["state"] for name, stage in json.loads(with_record.read_text())["stages"].items()
        }
    for path in output.glob("*/split=*/*.parquet"):
        standing.shards[path.relative_to(output)] = path.stat().st_mtime_ns
    for path in output.glob("**/.state-*/attempt-*/epoch_*/state.json"):
        name = path.relative_to(output).as_posix().partition("/.state-")[0]
        history = json.loads(path.read_text())["history"]
        standing.epochs.setdefault(name, {}).update({record["epoch"]: record["seconds"] for record in history})
    for path in output.glob("**/history.csv"):
        lines = [line.split(",") for line in path.read_text().splitlines()]
        seconds = lines[0].index("seconds")
        name = path.parent.relative_to(output).as_posix()
        standing.epochs[name] = {int(line[0]): float(line[seconds]) for line in lines[1:]}
    return standing


def _done_again(before: Standing, after: Standing) -> list[str]:
    """What was complete before and yet was done once more."""
    again = [str(path) for path, stamp in before.shards.items() if after.shards.get(path, stamp) != stamp]
    for name, epochs in before.epochs.items():
        known = after.epochs.get(name, {})
        again += [f"{name} epoch {epoch}" for epoch, took in epochs.items() if known.get(epoch, took) != took]
    return again


def _require_equal(plain: Path, killed: Path) -> None:
    patterns = ("tiles/split=*/*.parquet", "*/model.safetensors", "*/*/model.safetensors", "evaluation/metrics.json")
    for pattern in patterns:
        for path in plain.glob(pattern):
            if (killed / path.relative_to(plain)).read_bytes() != path.read_bytes():
                raise SystemExit(f"{path.relative_to(plain)} differs from the undisturbed run's")


if __name__ == "__main__":
    main()
