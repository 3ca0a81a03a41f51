"""What each change of a run gains the fusion: pooled Dice of every model on validation and test, over data and seeds.

Data sets x seeds x variants. A variant is a few settings of the real command, whose stages run here in one process,
without Ray and without a sweep, on the GPU where there is one. Variants that change nothing for the members go on from
the same members, those that change nothing for the heatmaps from the same heatmaps. A row is printed, and added to the
file of rows, as soon as it is there; what stands in that file is not done again.

    python benchmarks/fusion_gains.py --seeds 11-15 --parallel 8 --output runs/gains --minutes 9
    python benchmarks/fusion_gains.py --data ../shared/data/real_cells --config configs/real_cells.yaml --seeds 0-2
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from measure import options, require, show  # noqa: E402

VARIANTS: dict[str, dict[str, str]] = {
    "plain": {"heatmaps.views": "1"},
    "views 4": {"heatmaps.views": "4"},
    "views 8": {"heatmaps.views": "8"},
    "folds 2": {"heatmaps.views": "4", "heatmaps.folds": "2"},
    "folds 4": {"heatmaps.views": "4", "heatmaps.folds": "4"},
    "fusion ema": {"heatmaps.views": "4", "fusion.ema": "0.98"},
    "fusion lr / 3": {"heatmaps.views": "4", "fusion.learning_rate": "3e-4", "fusion.epochs": "10"},
    "ema": {"heatmaps.views": "4", "members.ema": "0.98"},
    "stain 0.1": {"heatmaps.views": "4", "members.stain": "0.1"},
    "stain 0.3": {"heatmaps.views": "4", "members.stain": "0.3"},
    "jitter 0.1": {"heatmaps.views": "4", "members.jitter": "0.1"},
    "ignore 2": {"heatmaps.views": "4", "members.ignore_band": "2"},
    "boundary 2": {"heatmaps.views": "4", "members.boundary_weight": "2"},
    "deep 0.3": {"heatmaps.views": "4", "members.deep_supervision": "0.3"},
}
OF_MEMBERS = ("data.", "synthetic.", "tiles.", "members.")  # settings on which members depend
SMALLEST = {
    **{"synthetic.width": "256", "synthetic.height": "256", "tiles.size": "128", "tiles.shard": "4"},
    **{"members.width": "0.03", "members.epochs": "1", "members.crop": "96", "fusion.epochs": "1"},
}
QUICK = {"members.epochs": "3", "fusion.epochs": "2"}
ROWS, COUNTS = "rows.jsonl", "counts.jsonl"
WORK = "--work"  # makes this program the worker of one group, which it reads as JSON


@dataclass(frozen=True)
class Group:
    """Runs on the same members, one after the other in one folder.

    Attributes:
        data: URI; None: synthetic smears.
        config: File of settings, or None.
        seed: Of the run.
        members: Name of the first variant with these members.
        variants: Name -> settings, each of which the row of that name is measured with.
        folder: Of the runs.
        ended: Unix time, s, from which nothing more is begun.
        val_only: Whether test tiles are left alone.
    """

    data: str | None
    config: str | None
    seed: int
    members: str
    variants: dict[str, dict[str, str]]
    folder: str
    ended: float
    val_only: bool

    @property
    def name(self) -> str:
        """The data's, with the seed."""
        return f"{Path(self.data).name if self.data else 'smears'}-{self.seed}"

    def arguments(self, variant: str, output: Path) -> list[str]:
        """Return the command line of a variant."""
        given = {"fusion.from_best": "false", "run.seed": str(self.seed), **self.variants[variant]}
        line = ["--output", str(output)]
        line += ["--data", self.data] if self.data else []
        line += ["--config", self.config] if self.config else []
        return [*line, *(word for key, value in given.items() for word in (f"--{key}", value))]


def main() -> None:
    """Run what is not done yet, print its rows as they come, then the table of all."""
    parser = _parser()
    arguments = parser.parse_args()
    names = [name.strip() for name in arguments.variants.split(",")] if arguments.variants else list(VARIANTS)
    extra = {key: value for key, _, value in (text.partition("=") for text in arguments.set)}
    if arguments.smoke:
        names, extra = names if arguments.variants else ["plain", "views 4"], {**SMALLEST, **extra}
    elif arguments.quick:
        extra = {**QUICK, **extra}
    if unknown := [name for name in names if name not in VARIANTS]:
        parser.error(f"no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    with tempfile.TemporaryDirectory() as folder:
        output = arguments.output or Path(folder if arguments.smoke else "runs/gains")
        output.mkdir(parents=True, exist_ok=True)
        _measure_all(arguments, names, extra, output)


def _measure_all(arguments: argparse.Namespace, names: list[str], extra: dict[str, str], output: Path) -> None:
    rows_at = arguments.rows or output
    rows_at.mkdir(parents=True, exist_ok=True)
    done = {(row["data"], row["seed"], row["variant"]) for row in _read(rows_at / ROWS)}
    ended = time.time() + 60 * arguments.minutes
    groups = []
    for seed in _seeds("1" if arguments.smoke else arguments.seeds):
        for data in arguments.data or [None]:
            wanted = {name: {**extra, **VARIANTS[name]} for name in names}
            for group in _by_members(data, arguments.config, seed, wanted, output, ended, arguments.val_only):
                left = {name: how for name, how in group.variants.items() if (group.name, seed, name) not in done}
                if left:
                    groups.append(Group(**{**asdict(group), "variants": left}))
    lock = threading.Lock()
    with ThreadPoolExecutor(arguments.parallel) as pool:
        ingests = {(group.data, group.seed): group for group in groups}
        list(pool.map(lambda group: _run(group, "ingest", rows_at, lock), ingests.values()))
        list(pool.map(lambda group: _run(group, "train", rows_at, lock), groups))
    rows = [_shown(row) for row in _read(rows_at / ROWS)]
    require(rows, "nothing was measured; the logs lie in the output")
    show("Dice of the fusion by data, seed and variant", rows, arguments.json)


def _parser() -> argparse.ArgumentParser:
    parser = options(__doc__ or "", "few epochs")
    parser.add_argument("--data", action="append", help="a data set; may be repeated (default: synthetic smears)")
    parser.add_argument("--config", help="a file of settings")
    parser.add_argument("--seeds", default="11-12", help="such as 11-15 or 1,3")
    parser.add_argument("--variants", help=f"some of {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for every variant")
    parser.add_argument("--parallel", type=int, default=1, help="groups at a time, a process each")
    parser.add_argument("--minutes", type=float, default=1e4, help="after which nothing more is begun")
    parser.add_argument("--output", type=Path, help="folder of the runs")
    parser.add_argument("--rows", type=Path, help="folder of the rows (default: that of the runs)")
    parser.add_argument("--val-only", action="store_true", help="leave the test tiles alone")
    return parser


def _seeds(text: str) -> Iterator[int]:
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _by_members(
    data: str | None,
    config: str | None,
    seed: int,
    variants: dict[str, dict[str, str]],
    output: Path,
    ended: float,
    val_only: bool,
) -> Iterator[Group]:
    groups: dict[str, dict[str, dict[str, str]]] = {}
    for name, how in variants.items():
        key = json.dumps(sorted((key, value) for key, value in how.items() if key.startswith(OF_MEMBERS)))
        groups.setdefault(key, {})[name] = how
    for same in groups.values():
        yield Group(data, config, seed, next(iter(same)), same, str(output), ended, val_only)


def _run(group: Group, step: str, rows_at: Path, lock: threading.Lock) -> None:
    """Do a step of a group in a process of its own, and keep the rows that it prints."""
    if time.time() > group.ended:
        return
    log = Path(group.folder, f"{group.name}-{group.members.replace(' ', '_')}-{step}.log")
    command = [sys.executable, __file__, WORK, step, json.dumps(asdict(group))]
    with log.open("w") as others:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=others, text=True, env=_environment())
        for line in process.stdout or ():
            kind, _, tree = line.partition(" ")
            if kind not in (ROWS, COUNTS):
                others.write(line)
                continue
            with lock:
                with (rows_at / kind).open("a") as file:
                    file.write(tree)
                if kind == ROWS:
                    print(*(f"{key} {_word(value)}" for key, value in _shown(json.loads(tree)).items()), flush=True)
        if process.wait():
            print(f"{group.name}, {group.members}, {step}: failed, {log}: {log.read_text()[-1500:]}", flush=True)


def _environment() -> dict[str, str]:
    """One thread a process: several groups share the cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def _work(step: str, text: str) -> int:
    """In a process of its own: ingest the data of a group, or do its variants."""
    group = Group(**json.loads(text))
    cut = Path(group.folder, f"{group.name}-tiles")
    if step == "ingest":
        run_stages(group, next(iter(group.variants)), cut, ("ingest",))
        return 0
    output = Path(group.folder, f"{group.name}-{group.members.replace(' ', '_')}")
    if not output.exists():
        partial = output.with_name(f".{output.name}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(cut, partial, ignore=shutil.ignore_patterns("run.lock"))
        partial.rename(output)
    counted = set()
    for name in group.variants:
        if time.time() > group.ended:
            break
        row, heatmaps = _measure(group, name, output)
        if heatmaps not in counted:  # by their fingerprint
            counted.add(heatmaps)
            from regret import count_run

            counts = count_run(str(output), test=not group.val_only)
            print(COUNTS, json.dumps({"data": group.name, "variant": name, **counts}), flush=True)
        print(ROWS, json.dumps(row), flush=True)
    return 0


def run_stages(group: Group, variant: str, output: Path, names: Sequence[str]) -> Any:
    """Do stages of the real command; return the settings."""
    from apacs_ray.commands.shell import opened_run
    from apacs_ray.config.command_line import parse
    from apacs_ray.testing.alone import without_ray

    command = parse(group.arguments(variant, output), "full.py", "")
    with without_ray(), opened_run(command) as (run, ray):
        from apacs_ray.stages.pipeline import run_pipeline

        run_pipeline(run, ray, names)
    return command.settings


def _measure(group: Group, variant: str, output: Path) -> tuple[dict[str, Any], str]:
    """Train what is not trained yet; return the row, and the fingerprint of the heatmaps."""
    from apacs_ray.data.shards import read_index
    from apacs_ray.distributed.evaluation import EvaluateTask, evaluate_tiles
    from apacs_ray.distributed.tasks import PoolPlan
    from apacs_ray.evaluation.metrics import compare, summarize
    from apacs_ray.models.registry import MEMBERS
    from apacs_ray.models.spec import ModelSpec
    from apacs_ray.runs.markers import read_marker
    from apacs_ray.stages.pipeline import STAGES
    from apacs_ray.stages.train_fusion import fusion_folders
    from apacs_ray.stages.train_members import member_folder
    from apacs_ray.storage import open_store
    from apacs_ray.testing.alone import without_ray
    from apacs_ray.training.device import default_device, describe_device

    began = time.monotonic()
    settings = run_stages(group, variant, output, [stage.name for stage in STAGES if stage.name != "evaluate"])
    store = open_store(str(output))
    folders = {name: member_folder(name) for name in MEMBERS} | fusion_folders(settings)
    task = EvaluateTask(store, folders, settings.evaluate, MEMBERS[-1])
    spec = ModelSpec.from_json(store.read("fusion/model.json"))
    marker = read_marker(store, "heatmaps")
    require(marker is not None, f"{output}: no heatmaps")
    stages = json.loads(store.read("run.json"))["stages"]
    row: dict[str, Any] = {"data": group.name, "seed": group.seed, "variant": variant, "members": group.members}
    for split in ("val",) if group.val_only else ("val", "test"):
        with without_ray():
            paths = list(read_index(store, split).paths)
            per_tile = evaluate_tiles(task, paths, PoolPlan(1, 1.0, 0.0), lambda done: None)
        metrics = summarize(per_tile, task.models, settings.run.seed)
        compared = compare(per_tile, task.models, "fusion", settings.run.seed)
        row[split] = {model: figures["dice"] for model, figures in metrics.items()}
        row[f"{split}_fusion_less"] = {m: [c["dice_difference"], *(c["ci95"] or ())] for m, c in compared.items()}
    best = max(MEMBERS, key=lambda name: row["val"][name] or 0.0)
    row |= {
        "best_member": best,
        "start": spec.start.name if spec.start else "",
        "start_weights": dict(spec.start.weights) if spec.start else {},
        "epoch": spec.metrics["epoch"],
        "stage_s": {name: stage.get("seconds") for name, stage in stages.items()},
        "s": round(time.monotonic() - began, 1),
        "device": describe_device(default_device()),
        "settings": group.variants[variant],
    }
    return row, marker.fingerprint if marker else ""


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row of the table: Dice of each model, and the fusion less the member that is best on validation."""
    shown = {name: row[name] for name in ("data", "variant")}
    for split in ("val", "test"):
        for model in ("fcn32", "fcn16", "fcn8", "mean", "majority", "fusion"):
            if split in row:
                shown[f"{split}_{model}"] = row[split][model]
    split = "test" if "test" in row else "val"
    shown["best_member"] = row["best_member"]
    shown["less_best"] = row[f"{split}_fusion_less"][row["best_member"]][0]
    shown["95_%"] = " to ".join(f"{bound:+.4f}" for bound in row[f"{split}_fusion_less"][row["best_member"]][1:])
    rivals = [value for model, value in row[split].items() if model not in ("fusion", "otsu") and value is not None]
    shown["less_best_rival"] = (row[split]["fusion"] or 0.0) - max(rivals, default=0.0)
    return {**shown, "start": row["start"], "epoch": row["epoch"], "s": row["s"]}


def _word(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; a last one that was cut is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == [WORK]:
        raise SystemExit(_work(*sys.argv[2:]))
    main()
