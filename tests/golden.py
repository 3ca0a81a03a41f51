"""Weights and input by formula, for which the released networks' logits are known (see golden_logits.json)."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor, nn

from apacs_ray.models.spec import ModelSpec
from apacs_ray.models.weights import PUBLISHED_NAMES, build, from_published


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor that depends on its name only."""
    values = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return torch.from_numpy(values * np.float32(0.05))
    if "upscore" in name or "upsample" in name:
        return torch.from_numpy(values * np.float32(0.1))
    return torch.from_numpy(values * np.float32(np.sqrt(2 / np.prod(shape[1:]))))


def image(height: int, width: int) -> Tensor:
    """(1, 3, H, W) waves in 0..1."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [0.5 + 0.5 * np.sin(0.11 * (k + 1) * x + 0.07 * (3 - k) * y + k) for k in range(3)]
    return torch.from_numpy(np.stack(waves)[None].astype(np.float32))


def published(name: str, prefix: str = "") -> tuple[ModelSpec, nn.Module]:
    """A published network at width 1 with the golden weights, loaded under the released names."""
    spec = ModelSpec("fusion" if name == "fusion" else "member", name, head="published")
    with torch.device("meta"):
        model = build(spec)
    released = {}
    for ours, theirs in PUBLISHED_NAMES[name].items():
        for part in ("weight", "bias"):
            if f"{ours}.{part}" in (shapes := model.state_dict()):
                shape = tuple(shapes[f"{ours}.{part}"].shape)
                released[f"{prefix}{theirs}.{part}"] = weight(f"{name}.{theirs}.{part}", shape)
    model.load_state_dict(from_published(name, released), assign=True)
    return spec, model.eval()
