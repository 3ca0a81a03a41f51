"""What choosing the fusion's start on validation costs: Dice on test of what a rule chooses, less the best there.

    python benchmarks/regret.py RUN [RUN ...]        finished run folders, by their stored heatmaps
    python benchmarks/regret.py --counts FILE.jsonl  what `fusion_gains.py` has counted

Candidates are weights of the members' logits, in tenths. Of each the pixels found are counted by tile, once; rules then
choose by the tiles of validation. No rule sees a test tile. Without arguments three small slides are rendered, and
members with random weights stand in.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
from measure import options, require, show  # noqa: E402
from selection import choose, wins  # noqa: E402

from apacs_ray.evaluation.selection import pooled_dice  # noqa: E402

Counts = npt.NDArray[np.int64]
SHARE = 10
WEIGHTS = [
    (left / SHARE, middle / SHARE, (SHARE - left - middle) / SHARE)
    for left, middle in itertools.product(range(SHARE + 1), repeat=2)
    if left + middle <= SHARE
]


@dataclass(frozen=True)
class Part:
    """The tiles of a split: slide of each, and (tiles, candidates, 3) pixels of both, predicted, true."""

    slides: tuple[str, ...]
    counts: Counts


def count_run(uri: str, *, test: bool = True) -> dict[str, Any]:
    """Count what every candidate finds in the tiles of a run: train and validation as stored, test by the members now.

    Returns:
        A JSON tree: split -> `slides`, and `both`, `predicted` by tile and candidate, `true` by tile.
    """
    from apacs_ray.config.settings import Settings
    from apacs_ray.data.shards import read_index
    from apacs_ray.inference.predictor import Predictor
    from apacs_ray.models.registry import MEMBERS
    from apacs_ray.runs.markers import read_marker
    from apacs_ray.stages.train_members import member_folder
    from apacs_ray.storage import open_store
    from apacs_ray.training.augment import Augmentation
    from apacs_ray.training.dataset import Heatmaps, TileDataset

    store = open_store(uri)
    marker = read_marker(store, "heatmaps")
    if marker is None:
        raise SystemExit(f"{uri}: no heatmaps are stored there; give the folder of a finished run")
    settings = Settings.model_validate(json.loads(store.read("run.json"))["settings"])
    views, whole = settings.heatmaps.views, Augmentation(0, False, False)
    stored = TileDataset(store, Heatmaps(MEMBERS, marker.fingerprint), whole)
    splits = {}
    for split in ("train", "val"):
        index = read_index(store, split)
        tiles = (stored.decode(index.place(row)) for row in range(len(index)))
        splits[split] = _encoded(index.slide_ids, [_count(inputs[:, :, :3], mask) for inputs, mask in tiles])
    if test:
        predictor = Predictor.load(
            store,
            {name: member_folder(name) for name in MEMBERS},
            threads=settings.evaluate.threads,
            precision=settings.evaluate.precision,
        )
        index, plain = read_index(store, "test"), TileDataset(store, None, whole)
        rows = []
        for row in range(len(index)):
            rgb, mask = plain.decode(index.place(row))
            found = predictor.probabilities(rgb, views)
            heatmaps = np.stack([np.rint(found[name] * 255).astype(np.uint8) for name in MEMBERS], axis=2)
            rows.append(_count(heatmaps, mask))
        splits["test"] = _encoded(index.slide_ids, rows)
    return {"views": views, "folds": settings.heatmaps.folds, "seed": settings.run.seed, "splits": splits}


def _count(heatmaps: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8]) -> Counts:
    """(candidates, 3) pixels of both, predicted, true."""
    import torch

    from apacs_ray.training.device import default_device
    from apacs_ray.training.start import LOGITS

    device = default_device()
    logits = torch.from_numpy(LOGITS[heatmaps].reshape(-1, 3)).to(device)
    cell = torch.from_numpy(mask.reshape(-1)).to(device).bool()
    found = logits @ torch.tensor(WEIGHTS, dtype=torch.float32, device=device).T >= 0
    both, predicted = found[cell].sum(dim=0), found.sum(dim=0)
    return torch.stack([both, predicted, torch.full_like(both, int(cell.sum()))], dim=1).cpu().numpy()


def _encoded(slides: Sequence[str], rows: Sequence[Counts]) -> dict[str, Any]:
    counts = np.stack(rows)
    both, predicted, true = (counts[:, :, part] for part in range(3))
    return {
        "slides": list(slides),
        "both": both.tolist(),
        "predicted": predicted.tolist(),
        "true": true[:, 0].tolist(),
    }


def decoded(tree: Mapping[str, Any]) -> Part:
    """Return a split of `count_run`."""
    both = np.array(tree["both"], np.int64)
    true = np.broadcast_to(np.array(tree["true"], np.int64)[:, None], both.shape)
    return Part(tuple(tree["slides"]), np.stack([both, np.array(tree["predicted"], np.int64), true], axis=2))


def rules(parts: Mapping[str, Part], seed: int) -> dict[str, tuple[float, ...]]:
    """Return the weights of the members that each rule chooses, in tenths."""
    singles = [WEIGHTS.index(one) for one in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))]
    pairs = [WEIGHTS.index(one) for one in ((0.0, 0.5, 0.5), (0.5, 0.0, 0.5), (0.5, 0.5, 0.0))]
    mean = _nearest((1 / 3, 1 / 3, 1 / 3))
    finest = singles[::-1]
    chosen: dict[str, int] = {}
    for name, splits in (("val", ("val",)), ("train and val", ("train", "val"))):
        units = units_of(
            np.concatenate([parts[split].counts for split in splits]),
            [slide for split in splits for slide in parts[split].slides],
        )
        plain = [*finest, mean]
        chosen[f"{name}: best of members and mean"] = _of(choose, units, plain, 0.0)
        chosen[f"{name}: the same with means of two"] = _of(choose, units, [*plain, *pairs], 0.0)
        chosen[f"{name}: mean, unless 1 error worse"] = _of(choose, units, [mean, *finest], 1.0)
        chosen[f"{name}: mean, means of two, unless 1 error worse"] = _of(choose, units, [mean, *pairs, *finest], 1.0)
        chosen[f"{name}: finest, unless 1 error worse"] = _of(choose, units, plain, 1.0)
        hedged = _nearest(tuple(wins(units[:, singles], seed)))
        chosen[f"{name}: members by their wins"] = hedged
        chosen[f"{name}: members by their wins, unless 1 error worse"] = _of(choose, units, [hedged, *plain], 1.0)
        chosen[f"{name}: best of all weights"] = _of(choose, units, list(range(len(WEIGHTS))), 0.0)
        everyone = [mean, *(place for place in range(len(WEIGHTS)) if place != mean)]
        within = pooled_dice(units.sum(axis=0))
        chosen[f"{name}: mean of the best tenth of all weights"] = _nearest(
            tuple(np.mean([WEIGHTS[place] for place in sorted(everyone, key=lambda at: -within[at])[:7]], axis=0))
        )
    return {name: WEIGHTS[place] for name, place in chosen.items()}


def _of(choose: Any, units: Counts, candidates: list[int], errors: float) -> int:
    candidates = list(dict.fromkeys(candidates))
    return candidates[choose(units[:, candidates], range(len(candidates)), errors)]


def _nearest(weights: Sequence[float]) -> int:
    return min(range(len(WEIGHTS)), key=lambda at: sum((a - b) ** 2 for a, b in zip(WEIGHTS[at], weights, strict=True)))


def units_of(counts: Counts, slides: Sequence[str]) -> Counts:
    """Return counts (tiles, ...) of slides where there are enough of them, else as they are."""
    from apacs_ray.evaluation.metrics import ENOUGH_SLIDES

    names = sorted(set(slides))
    if len(names) < ENOUGH_SLIDES:
        return counts
    pooled = np.zeros((len(names), *counts.shape[1:]), np.int64)
    np.add.at(pooled, [names.index(slide) for slide in slides], counts)
    return pooled


def regrets(tree: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return of each rule what it chose, its Dice on test, and how far below the best; and Dice on test of others."""
    parts = {split: decoded(part) for split, part in tree["splits"].items()}
    found = pooled_dice(parts["test"].counts.sum(axis=0))
    plain = {
        "fcn32": WEIGHTS.index((1.0, 0.0, 0.0)),
        "fcn16": WEIGHTS.index((0.0, 1.0, 0.0)),
        "fcn8": WEIGHTS.index((0.0, 0.0, 1.0)),
        "mean": _nearest((1 / 3, 1 / 3, 1 / 3)),
    }
    rivals = {name: float(found[place]) for name, place in plain.items()}
    rows = []
    for rule, weights in rules(parts, int(tree["seed"])).items():
        reached = float(found[WEIGHTS.index(weights)])
        rows.append({"rule": rule, "weights": weights, "dice": reached, "regret": max(rivals.values()) - reached})
    return rows, rivals | {"best_weights": float(found.max())}


def main() -> None:
    """Print the regret of every rule on every run, then their means."""
    parser = options(__doc__ or "", "nothing less")
    parser.add_argument("runs", nargs="*", help="folders of finished runs")
    parser.add_argument("--counts", type=Path, help="what fusion_gains.py has counted")
    arguments = parser.parse_args()
    trees = [json.loads(line) for line in arguments.counts.read_text().splitlines()] if arguments.counts else []
    trees += [{"data": Path(uri).name, "variant": "", **count_run(uri)} for uri in arguments.runs]
    with tempfile.TemporaryDirectory() as folder:
        if not trees:
            trees = [_stand_in(Path(folder))]
    rows: list[dict[str, Any]] = []
    for tree in trees:
        if "test" not in tree["splits"]:
            continue
        found, rivals = regrets(tree)
        rows += found
        print(tree["data"], tree["variant"], " ".join(f"{name} {value:.4f}" for name, value in rivals.items()))
        for row in found:
            print(f"    {row['dice']:.4f} {row['regret']:+.4f} {row['weights']} {row['rule']}", flush=True)
    require(rows, "no run with test tiles")
    names = list(dict.fromkeys(row["rule"] for row in rows))
    table = []
    for name in names:
        values = [row["regret"] for row in rows if row["rule"] == name]
        table.append({"rule": name, "runs": len(values), "mean_regret": float(np.mean(values)), "worst": max(values)})
    show("Dice on test below the best member or mean there", table, arguments.json)


def _stand_in(folder: Path) -> dict[str, Any]:
    """Count a run of the smallest size."""
    import fusion_gains

    group = fusion_gains.Group(None, None, 1, "plain", {"plain": fusion_gains.SMALLEST}, str(folder), math.inf, False)
    output = folder / "run"
    fusion_gains.run_stages(group, "plain", output, ("ingest", "train_members", "heatmaps"))
    return {"data": "smears-1", "variant": "plain", **count_run(str(output))}


if __name__ == "__main__":
    main()
