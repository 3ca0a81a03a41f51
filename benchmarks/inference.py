"""The whole ensemble on one tile: `inference.Predictor` against a textbook float32 loop over the same networks.

Textbook: contiguous layout, float32; the tile is given to FCN-32, FCN-16, FCN-8 and the fusion one after the other.
Ours: `Predictor` in both precisions, freed memory kept; each way in a process of its own. The fusion is the published
one; the last row is with the refined head. All cores take part (evaluation fixes the threads of a worker).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from measure import Elsewhere, alternate, forward_flops, matmul_peak, medians, options, show
from torch import nn

from apacs_ray.adapters.session import KEEP_MEMORY
from apacs_ray.inference import Predictor
from apacs_ray.models.ensemble import Ensemble
from apacs_ray.models.fcn import build_member
from apacs_ray.models.fusion import build_fusion
from apacs_ray.models.spec import MEMBERS, Head, ModelSpec


def main() -> None:
    arguments = options(__doc__, "a tile of 512 x 512 px, 3 repetitions").parse_args()
    side = 512 if arguments.quick else 2000
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = matmul_peak(device, torch.bfloat16)
    kept = KEEP_MEMORY["env_vars"]
    ways = {
        "textbook float32": Elsewhere(partial(textbook, side), {}),
        "ours float32": Elsewhere(partial(ours, side, "published", "float32"), kept),
        "ours bfloat16": Elsewhere(partial(ours, side, "published", "bfloat16"), kept),
        "ours bfloat16, refined head": Elsewhere(partial(ours, side, "refined", "bfloat16"), kept),
    }
    seconds = medians(alternate(ways, 3 if arguments.quick else 5))
    rows = []
    for name, value in seconds.items():
        flops = _flops("refined" if "refined" in name else "published", side)
        row = {"way": name, "s": value, "ratio": seconds["textbook float32"] / value, "TFLOP": flops / 1e12}
        row |= {"TFLOP_per_s": flops / value / 1e12, "share_of_bf16_peak": flops / value / peak}
        rows.append({**row, "peak_GiB": ways[name].peak_memory() / 2**30})
        ways[name].end()
    if device.type == "cpu":
        print("GPU: not measured (no CUDA device here); the same command measures it where there is one")
    show(f"ensemble on one tile of {side} x {side} px; bfloat16 peak {peak / 1e12:.3g} TFLOP/s", rows, arguments.json)


def _flops(head: Head, side: int) -> int:
    networks: list[tuple[Callable[[], nn.Module], int]] = [(partial(build_member, name), 3) for name in MEMBERS]
    networks.append((partial(build_fusion, head, MEMBERS), 6))
    return sum(forward_flops(build, (1, channels, side, side)) for build, channels in networks)


def _tile(side: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)


def _ensemble(head: Head) -> Ensemble:
    torch.manual_seed(0)
    spec = ModelSpec("fusion", "fusion", head=head)
    members = {name: build_member(name) for name in MEMBERS}
    return Ensemble(members, {"fusion": (spec, build_fusion(head, MEMBERS))})


def ours(side: int, head: Head, precision: str) -> Callable[[], object]:
    """The predictor of a run."""
    predictor, rgb = Predictor(_ensemble(head), threads=torch.get_num_threads(), precision=precision), _tile(side)
    return lambda: len(predictor.logits(rgb))


def textbook(side: int) -> Callable[[], object]:
    """One network after the other, as a textbook writes it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ensemble, rgb = _ensemble("published").to(device), _tile(side)

    @torch.no_grad()
    def work() -> int:
        image = torch.from_numpy(rgb).to(device).permute(2, 0, 1)[None].contiguous().float() / 255
        logits = [member(image) for member in ensemble.members.values()]
        heatmaps = [torch.sigmoid(output) for output in logits]
        logits.append(ensemble.fusions["fusion"](torch.cat([*heatmaps, image], dim=1)))
        return len([output.cpu().numpy() for output in logits])

    return work


if __name__ == "__main__":
    main()
