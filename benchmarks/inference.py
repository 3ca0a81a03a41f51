"""The whole ensemble on one tile: `inference.Predictor` against a textbook float32 loop over the same networks.

Textbook: contiguous layout, float32 of IEEE (PyTorch's default on GPUs is TF32); the tile is given to FCN-32, FCN-16,
FCN-8 and the fusion one after the other. Ours: `Predictor` in all precisions, freed memory kept; each way in a process
of its own. The fusion is the published one; the last row is with the refined head. All cores take part (evaluation
fixes the threads of a worker).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from measure import Elsewhere, alternate, forward_flops, matmul_peak, medians, options, require, show
from torch import nn

from apacs_ray.distributed.tasks import KEEP_MEMORY
from apacs_ray.inference.predictor import Predictor
from apacs_ray.models.ensemble import Ensemble
from apacs_ray.models.fusion import build_fusion
from apacs_ray.models.registry import build_member
from apacs_ray.models.spec import MEMBERS, Head, ModelSpec
from apacs_ray.training.device import set_arithmetic

REFINED = "ours bfloat16, refined head"


def main() -> None:
    """Measure the ensemble in every way and print the table."""
    arguments = options(__doc__, "a tile of 512 x 512 px, 3 repetitions").parse_args()
    side, width, repetitions = 2000, 1.0, 5
    if arguments.quick:
        side, repetitions = 512, 3
    if arguments.smoke:
        side, width, repetitions = 64, 0.05, 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = matmul_peak(device, torch.bfloat16, smoke=arguments.smoke)
    environment = KEEP_MEMORY["env_vars"]
    ways = {
        "textbook float32": Elsewhere(partial(textbook, side, width), {}),
        "ours float32": Elsewhere(partial(ours, side, width, "published", "float32"), environment),
        "ours tf32": Elsewhere(partial(ours, side, width, "published", "tf32"), environment),
        "ours bfloat16": Elsewhere(partial(ours, side, width, "published", "bfloat16"), environment),
        REFINED: Elsewhere(partial(ours, side, width, "refined", "bfloat16"), environment),
    }
    _require_same({name: way() for name, way in ways.items()})
    seconds = medians(alternate(ways, repetitions, warm=False))
    rows = []
    for name, value in seconds.items():
        flops = _flops("refined" if name == REFINED else "published", side, width)
        row = {"way": name, "s": value, "ratio": seconds["textbook float32"] / value, "TFLOP": flops / 1e12}
        row |= {"TFLOP_per_s": flops / value / 1e12, "share_of_bf16_peak": flops / value / peak}
        rows.append({**row, "peak_GiB": ways[name].peak_memory() / 2**30})
        ways[name].end()
    if device.type == "cpu":
        print("GPU: not measured (no CUDA device here); the same command measures it where there is one")
    show(f"ensemble on one tile of {side} x {side} px; bfloat16 peak {peak / 1e12:.3g} TFLOP/s", rows, arguments.json)


def _require_same(logits: Mapping[str, Any]) -> None:
    """Require the same mean logit of each network in all ways; the heads are two networks with other weights."""
    textbook = logits["textbook float32"]
    for name, relative, absolute, networks in (
        ("ours float32", 1e-4, 1e-3, 4),
        ("ours tf32", 0.01, 0.02, 4),
        ("ours bfloat16", 0.02, 0.1, 4),
        (REFINED, 0.02, 0.1, 3),
    ):
        same = np.allclose(logits[name][:networks], textbook[:networks], relative, absolute)
        require(same, f"{name}: mean logits {logits[name]}, the textbook's are {textbook}")


def _flops(head: Head, side: int, width: float) -> int:
    networks: list[tuple[Callable[[], nn.Module], int]] = [
        (partial(build_member, name, width=width), 3) for name in MEMBERS
    ]
    networks.append((partial(build_fusion, head, MEMBERS, width=width), 6))
    return sum(forward_flops(build, (1, channels, side, side)) for build, channels in networks)


def _tile(side: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)


def _ensemble(head: Head, width: float) -> Ensemble:
    torch.manual_seed(0)
    spec = ModelSpec("fusion", "fusion", width=width, head=head)
    members = {name: build_member(name, width=width) for name in MEMBERS}
    return Ensemble(members, {"fusion": (spec, build_fusion(head, MEMBERS, width=width))})


def ours(side: int, width: float, head: Head, precision: str) -> Callable[[], object]:
    """Set up the predictor of a run."""
    predictor, rgb = (
        Predictor(_ensemble(head, width), threads=torch.get_num_threads(), precision=precision),
        _tile(side),
    )
    return lambda: [float(logits.mean()) for logits in predictor.logits(rgb).values()]


def textbook(side: int, width: float) -> Callable[[], object]:
    """Set up one network after the other, as a textbook writes it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_arithmetic("float32")
    ensemble, rgb = _ensemble("published", width).to(device), _tile(side)

    @torch.no_grad()
    def work() -> list[float]:
        image = torch.from_numpy(rgb).to(device).permute(2, 0, 1)[None].contiguous().float() / 255
        logits = [member(image) for member in ensemble.members.values()]
        heatmaps = [torch.sigmoid(output) for output in logits]
        logits.append(ensemble.fusions["fusion"](torch.cat([*heatmaps, image], dim=1)))
        return [float(output.cpu().numpy().mean()) for output in logits]

    return work


if __name__ == "__main__":
    main()
