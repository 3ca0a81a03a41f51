"""What choosing a trial of the sweep on validation costs: Dice on test of what a rule chooses, less the best there.

    python benchmarks/sweep_regret.py RUN [RUN ...] --trials 6 --epochs 3 --output runs/sweep

Of each finished run (such as `fusion_gains.py` leaves) the fusion is trained with settings drawn from a sweep's space,
from the run's stored heatmaps, in this process and without Ray. After every epoch the pixels found are counted by tile,
on validation and test. Rules then choose by the tiles of validation; no rule sees a test tile. What is counted is added
to a file, and not done again. Without arguments three small slides are rendered.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
from measure import options, require, show  # noqa: E402
from regret import units_of  # noqa: E402

from apacs_ray.evaluation.selection import paired_errors, pooled_dice  # noqa: E402

Counts = npt.NDArray[np.int64]
FILE = "trials.jsonl"


def main() -> None:
    """Count what is not counted yet, then print the regret of every rule, on every run and on average."""
    parser = options(__doc__ or "", "two trials of two epochs")
    parser.add_argument("runs", nargs="*", help="folders of finished runs")
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--sweep", default="tune_configs/fusion_asha.yaml", help="whose space settings are drawn from")
    parser.add_argument("--output", type=Path, default=Path("runs/sweep"))
    arguments = parser.parse_args()
    if arguments.quick or arguments.smoke:
        arguments.trials, arguments.epochs = 2, 2
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.runs:
            arguments.runs, arguments.output = [_stand_in(Path(folder))], Path(folder)
        arguments.output.mkdir(parents=True, exist_ok=True)
        for run in arguments.runs:
            _count(run, arguments)
        trees = [json.loads(line) for line in (arguments.output / FILE).read_text().splitlines()]
    _print(trees, arguments)


def _stand_in(folder: Path) -> str:
    """Make a run of the smallest size."""
    import fusion_gains

    group = fusion_gains.Group(None, None, 1, "plain", {"plain": fusion_gains.SMALLEST}, str(folder), math.inf, False)
    fusion_gains.run_stages(group, "plain", folder / "run", ("ingest", "train_members", "heatmaps"))
    return str(folder / "run")


def _count(uri: str, arguments: argparse.Namespace) -> None:
    """Train the trials of a run that are not in the file yet."""
    from apacs_ray.config.sweep import read_sweep

    file = arguments.output / FILE
    lines = file.read_text().splitlines() if file.exists() else []
    done = {(tree["run"], tree["trial"]) for tree in map(json.loads, lines)}
    drawn = random.Random(0)
    settings = [_draw(read_sweep(arguments.sweep).space, drawn) for _ in range(arguments.trials)]
    left = [trial for trial in range(arguments.trials) if (uri, trial) not in done]
    if not left:
        return
    trials = Trials(uri, arguments.epochs)
    for trial in left:
        tree = {"run": uri, "trial": trial, "setting": settings[trial], **trials.train(settings[trial])}
        with file.open("a") as lines_of_file:
            lines_of_file.write(json.dumps(tree) + "\n")
        print(Path(uri).name, trial, settings[trial], flush=True)


def _draw(space: Mapping[str, Any], source: random.Random) -> dict[str, Any]:
    setting: dict[str, Any] = {}
    for name, drawn in space.items():
        if drawn.kind == "loguniform":
            low, high = map(math.log, drawn.values)
            setting[name] = math.exp(source.uniform(low, high))
        elif drawn.kind == "uniform":
            setting[name] = source.uniform(*drawn.values)
        else:
            setting[name] = source.choice(drawn.values)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in setting.items()}


class Trials:
    """Trainings of the fusion on the heatmaps of one run; the decoded tiles are kept."""

    def __init__(self, uri: str, epochs: int) -> None:
        from apacs_ray.config.settings import Settings
        from apacs_ray.data.shards import read_index
        from apacs_ray.inference.predictor import Predictor
        from apacs_ray.models.registry import MEMBERS
        from apacs_ray.models.spec import FusionStart
        from apacs_ray.runs.markers import read_marker
        from apacs_ray.stages.train_members import member_folder
        from apacs_ray.storage import open_store
        from apacs_ray.training.augment import Augmentation
        from apacs_ray.training.dataset import Heatmaps, TileDataset

        store = self._store = open_store(uri)
        marker = read_marker(store, "heatmaps")
        if marker is None:
            raise SystemExit(f"{uri}: no heatmaps are stored there; give the folder of a finished run")
        self._settings = Settings.model_validate(json.loads(store.read("run.json"))["settings"])
        self._epochs = epochs
        self._starts = {key: FusionStart(**start) for key, start in marker.result["starts"].items()}
        whole = Augmentation(0, False, False)
        stored, plain = (
            TileDataset(store, Heatmaps(MEMBERS, marker.fingerprint), whole),
            TileDataset(store, None, whole),
        )
        indices = {split: read_index(store, split) for split in ("train", "val", "test")}
        self.slides = {split: list(index.slide_ids) for split, index in indices.items()}
        self._groups = indices["train"].groups()
        self._tiles = {
            split: [stored.decode(indices[split].place(row)) for row in range(len(indices[split]))]
            for split in ("train", "val")
        }
        predictor = Predictor.load(
            store, {name: member_folder(name) for name in MEMBERS}, threads=1, precision="float32"
        )
        self._tiles["test"] = []
        for row in range(len(indices["test"])):
            rgb, mask = plain.decode(indices["test"].place(row))
            found = predictor.probabilities(rgb, self._settings.heatmaps.views)
            heatmaps = [np.rint(found[name] * 255).astype(np.uint8) for name in MEMBERS]
            self._tiles["test"].append((np.dstack([*heatmaps, rgb]), mask))

    def train(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Train one; return Dice and counts by tile (both, predicted, true) of the start and of each epoch."""
        import torch

        from apacs_ray.models.pretrained import pretrained_fusion
        from apacs_ray.models.registry import MEMBERS
        from apacs_ray.models.spec import fusion_spec
        from apacs_ray.models.weights import build, load_model
        from apacs_ray.stages.train_fusion import overlay
        from apacs_ray.training.augment import Augmentation, augment
        from apacs_ray.training.batch import Sample, batches
        from apacs_ray.training.device import default_device
        from apacs_ray.training.loop import Trainer
        from apacs_ray.training.sampler import schedule

        how = overlay(self._settings.fusion, {**setting, "epochs": self._epochs, "patience": 0})
        spec = fusion_spec(how, how.width, starts=self._starts)
        seed, device = self._settings.run.seed, default_device()
        torch.manual_seed(seed)
        weights = pretrained_fusion(self._store, spec, how.trunk, seed)
        trainer = Trainer(build(spec) if weights is None else load_model(weights, spec), how, seed=seed, device=device)
        channels = [*(MEMBERS.index(member) for member in how.members), 3, 4, 5]
        augmentation = Augmentation(how.crop, how.flips, how.turns)
        counted = {split: [self._found(trainer, split, channels)] for split in ("val", "test")}
        refs = schedule(
            self._groups,
            0,
            epochs=range(self._epochs),
            first_step=0,
            batch_size=how.batch_size,
            rank=0,
            world=1,
            seed=seed,
        )

        def samples() -> Any:
            for ref in refs:
                inputs, mask = self._tiles["train"][ref.row]
                yield Sample(ref, str(ref.row), *augment(inputs[:, :, channels], mask, ref.seed, augmentation))

        steps, epoch = -(-len(self._tiles["train"]) // how.batch_size), 0
        trainer.begin_epoch()
        for batch in batches(samples(), how.batch_size):
            if batch.epoch > epoch:
                for split in counted:
                    counted[split].append(self._found(trainer, split, channels))
                trainer.end_epoch()
                trainer.begin_epoch()
                epoch = batch.epoch
            trainer.take(batch, steps)
        for split in counted:
            counted[split].append(self._found(trainer, split, channels))
        return {
            "slides": {split: self.slides[split] for split in counted},
            "counts": {split: np.stack(epochs).tolist() for split, epochs in counted.items()},
        }

    def _found(self, trainer: Any, split: str, channels: list[int]) -> Counts:
        """(tiles, 3) pixels of both, predicted, true."""
        import torch

        network = trainer.model.eval()
        rows = []
        with torch.inference_mode():
            for inputs, mask in self._tiles[split]:
                pixels = torch.from_numpy(np.ascontiguousarray(inputs[:, :, channels])).to(trainer.device)
                logits = network(pixels[None].permute(0, 3, 1, 2).float() / 255)[0, 0].cpu().numpy()
                found, true = logits >= 0, mask.astype(bool)
                rows.append((int((found & true).sum()), int(found.sum()), int(true.sum())))
        network.train()
        return np.array(rows, np.int64)


def rules(val: Counts, rates: list[float]) -> dict[str, tuple[int, int]]:
    """Return the trial and the epoch (0: the start) that each rule takes.

    Args:
        val: (trials, epochs + 1, units, 3) of validation.
        rates: Learning rate of each trial.
    """
    pooled = pooled_dice(val.sum(axis=2))  # (trials, epochs + 1)
    best = tuple(map(int, np.unravel_index(pooled.argmax(), pooled.shape)))
    flat = val.reshape(-1, *val.shape[2:]).transpose(1, 0, 2)  # (units, trials * epochs, 3)
    behind = pooled.max() - pooled
    chance = paired_errors(flat, int(pooled.argmax())).reshape(pooled.shape)
    near, about = behind <= chance, behind <= 2 * chance
    means = pooled[:, 1:].mean(axis=1)
    chosen = {"highest Dice of any epoch": best}
    steady = int(means.argmax())
    chosen["highest mean over epochs, its best epoch"] = (steady, int(pooled[steady].argmax()))
    last = int(pooled[:, -1].argmax())
    chosen["highest Dice of the last epoch, its best epoch"] = (last, int(pooled[last].argmax()))
    order = sorted(range(len(rates)), key=lambda trial: rates[trial])
    slow = next(trial for trial in order if near[trial].any())
    chosen["lowest learning rate within 1 error"] = (slow, int(pooled[slow].argmax()))
    contenders = [trial for trial in order if pooled[trial, 0] == pooled[:, 0].max()]
    trained = {trial: 1 + int(pooled[trial, 1:].argmax()) for trial in contenders}  # a trial is known by its best epoch
    top = max(contenders, key=lambda trial: pooled[trial, trained[trial]])
    errors_to = paired_errors(flat, top * pooled.shape[1] + trained[top]).reshape(pooled.shape)
    taken = next(
        trial
        for trial in contenders
        if pooled[top, trained[top]] - pooled[trial, trained[trial]] <= errors_to[trial, trained[trial]]
    )
    chosen["of those that start best the lowest learning rate within 1 error (the stage)"] = (
        taken,
        int(pooled[taken].argmax()),
    )
    for errors, places in ((1, near), (2, about)):
        epoch, _, trial = min((int(epoch), -pooled[trial, epoch], int(trial)) for trial, epoch in np.argwhere(places))
        chosen[f"earliest epoch within {errors} error{'s' * (errors > 1)}"] = (trial, epoch)
    return chosen


def _print(trees: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    rows = []
    for run in dict.fromkeys(tree["run"] for tree in trees):
        same = [tree for tree in trees if tree["run"] == run]
        val, test = (np.array([tree["counts"][split] for tree in same], np.int64) for split in ("val", "test"))
        units = units_of(np.moveaxis(val, 2, 0), same[0]["slides"]["val"])
        found = pooled_dice(test.sum(axis=2))
        best = float(found.max())
        kept = [found[trial, int(pooled_dice(val[trial].sum(axis=1)).argmax())] for trial in range(len(same))]
        for rule, (trial, epoch) in rules(
            np.moveaxis(units, 0, 2), [t["setting"]["learning_rate"] for t in same]
        ).items():
            rows.append(
                {
                    "run": Path(run).name,
                    "rule": rule,
                    "trial": trial,
                    "epoch": epoch,
                    "dice": float(found[trial, epoch]),
                    "start": float(found[:, 0].max()),
                    "regret": best - float(found[trial, epoch]),
                    "regret_of_trials": float(max(kept)) - float(found[trial, epoch]),
                }
            )
            print(*(f"{key} {value:.4f}" if isinstance(value, float) else value for key, value in rows[-1].items()))
    require(rows, "nothing was counted")
    table = []
    for rule in dict.fromkeys(row["rule"] for row in rows):
        of_rule = [row for row in rows if row["rule"] == rule]
        table.append(
            {
                "rule": rule,
                "runs": len(of_rule),
                "over_start": float(np.mean([row["dice"] - row["start"] for row in of_rule])),
                "mean_regret": float(np.mean([row["regret"] for row in of_rule])),
                "worst": max(row["regret"] for row in of_rule),
                "mean_regret_of_trials": float(np.mean([row["regret_of_trials"] for row in of_rule])),
            }
        )
    show("Dice on test below the best trial and epoch there", table, arguments.json)


if __name__ == "__main__":
    main()
