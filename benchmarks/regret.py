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
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402

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


def dice(counts: Counts) -> npt.NDArray[np.float64]:
    """Return pooled Dice of counts (..., 3) of both, predicted, true."""
    sums = counts.astype(np.float64)
    return 2 * sums[..., 0] / np.maximum(sums[..., 1] + sums[..., 2], 1)
