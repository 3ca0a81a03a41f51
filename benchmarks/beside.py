"""CPU of what is done beside the networks with a tile of 2000 x 2000 px: decoding, encoding heatmaps, evaluation.

One thread, CPU seconds, as others may use the machine. The tile is of a synthetic smear; logits follow the distance
from its cells' outlines, with noise, so that masks have outlines and specks as trained networks' have.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import numpy.typing as npt
from measure import options, require, show
from scipy import ndimage

from apacs_ray.data.images import Mask, encode_image, encode_mask
from apacs_ray.evaluation.judged import judged
from apacs_ray.evaluation.predictions import sigmoid
from apacs_ray.models.registry import MEMBERS
from apacs_ray.synthetic.slide import render, slide_specs
from apacs_ray.training.dataset import decode_pixels, decode_tile_mask, encode_heatmaps


def main() -> None:
    """Measure each step and print the table."""
    arguments = options(__doc__ or "", "a tile of 1000 px").parse_args()
    side, repetitions = 2000, 7
    if arguments.quick:
        side = 1000
    if arguments.smoke:
        side, repetitions = 200, 1
    rgb, cells = render(slide_specs(0, side, side, train=1, test=0)[0])
    truth = cells.astype(bool)
    image, mask = encode_image(rgb, "jpeg", 95, "4:4:4"), encode_mask(cells)
    logits = {name: _logits(truth, number) for number, name in enumerate((*MEMBERS, "fusion"))}
    place = {"tile_id": "t", "slide_id": "s", "x": 0, "y": 0, "width": side, "height": side}
    tile = {**place, "once_left": 0, "once_top": 0, "once_right": side, "once_bottom": side}

    def heatmaps() -> bytes:
        return encode_heatmaps({name: sigmoid(logits[name]) for name in MEMBERS})

    def evaluation() -> dict[str, Any]:
        return judged(rgb, logits, tile, decode_tile_mask(mask).view(bool), border=0, member="fcn8")

    steps: dict[str, Callable[[], object]] = {
        "decoding the image": lambda: decode_pixels(image),
        "heatmaps: probabilities, PNG": heatmaps,
        "evaluation: mask, predictions, counts": evaluation,
    }
    row = evaluation()
    require(row["fusion_tp"] > row["fusion_fp"] + row["fusion_fn"] > 0, f"the fusion's counts are {row}")
    rows = [{"step": name, "CPU_ms": 1000 * _cpu_seconds(work, repetitions)} for name, work in steps.items()]
    show(f"a tile of {side} px beside the networks", rows, arguments.json)


def _logits(truth: Mask, seed: int) -> npt.NDArray[np.float32]:
    """Logits of a network that finds most cells."""
    distance = ndimage.distance_transform_edt(truth) - ndimage.distance_transform_edt(~truth)
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(truth.shape), 4)
    values: npt.NDArray[np.float32] = (0.5 * distance + 2 * noise / noise.std()).clip(-15, 15).astype(np.float32)
    return values


def _cpu_seconds(work: Callable[[], object], repetitions: int) -> float:
    seconds = []
    for _ in range(repetitions):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return median(seconds)


if __name__ == "__main__":
    main()
