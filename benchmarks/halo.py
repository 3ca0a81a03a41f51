"""Exact tiling by its halo: px of a million whose mask in cores is not that of the slide seen as a whole.

Random networks on a synthetic smear, about half of whose px are cell: many logits lie near zero, so that more differs
than with trained networks. From its exact halo on (`inference.halo`) a network may differ only where floats are summed
in another order.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from measure import options, require, show
from segmenting import all_cores, part

from apacs_ray.inference.halo import exact_halo
from apacs_ray.inference.predictor import Predictor
from apacs_ray.models.ensemble import Ensemble
from apacs_ray.models.registry import MEMBERS
from apacs_ray.models.spec import Head
from apacs_ray.synthetic.slide import render, slide_specs
from apacs_ray.testing.ensembles import random_networks

HALOS = (0, 128, 192, 256, 480, 512)  # px
UNCLEAR = 1e-3  # logits that sums of floats in another order may move across zero
HEADS: dict[str, Head] = {"fusion": "refined", "fusion_published": "published"}


def main() -> None:
    """Count the px that differ for each network and halo, and fail when there are some behind an exact halo."""
    parser = options(__doc__ or "", "only the cores with others on all sides, which depend on a halo the most")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1, as segment.threads)")
    arguments = parser.parse_args()
    width, side, core, halos = 0.125, 2048, 512, HALOS
    if arguments.smoke:
        width, side, core, halos = 0.01, 192, 64, (0, 256, 512)
    rgb, _ = render(slide_specs(0, side, side, train=1, test=0)[0])
    networks = {key: random_networks(rgb[:640, :640], width=width, head=head) for key, head in HEADS.items()}
    fusions = {key: networks[key]["fusion"] for key in HEADS}
    members = {name: networks["fusion"][name][1] for name in MEMBERS}  # of equal seeds
    predictor = Predictor(Ensemble(members, fusions), threads=arguments.threads, precision="float32")
    whole = _logits(predictor, rgb)
    exact = {name: exact_halo((name,)) for name in MEMBERS}
    exact |= {key: exact_halo(MEMBERS, fusions[key][0]) for key in HEADS}
    rows: list[dict[str, Any]] = []
    for halo in halos:
        different: Counter[str] = Counter()
        pixels = 0
        for one, window in all_cores(side, side, core, halo):
            if arguments.quick and {one.box.x, one.box.y} & {0, side - core}:
                continue
            pixels += one.box.width * one.box.height
            x, y = one.box.x - window.x, one.box.y - window.y
            for name, logits in _logits(predictor, part(rgb, window)).items():
                found, wanted = logits[y : y + core, x : x + core], part(whole[name], one.box)
                differ = (found >= 0) != (wanted >= 0)
                different[name] += int(differ.sum())
                wrong = int((differ & (np.abs(wanted) > UNCLEAR)).sum())
                require(halo < exact[name] or not wrong, f"{name}: {wrong} px differ behind a halo of {halo} px")
        rows.append({"halo": halo, **{f"{name}_ppm": 1e6 * different[name] / pixels for name in whole}})
    show(f"px that differ from the whole of {side} x {side}, cores of {core}, width {width:g}", rows, arguments.json)


@torch.inference_mode()
def _logits(predictor: Predictor, rgb: np.ndarray) -> dict[str, np.ndarray]:
    outputs = predictor.batch(predictor.to_device([rgb]))
    return {name: logits[0].cpu().numpy() for name, logits in outputs.items()}


if __name__ == "__main__":
    main()
