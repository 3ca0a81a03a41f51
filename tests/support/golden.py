"""Weights and input by formula, for which the released networks' logits are known (see golden_logits.json)."""

from __future__ import annotations

import zlib
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apacs_ray.models.registry import NETWORKS
from apacs_ray.models.spec import ModelSpec
from apacs_ray.models.weights import build, from_released


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


def _key(name: str) -> str:
    """The registry's name: the fusion that was released is the one with the published head."""
    return "fusion_published" if name == "fusion" else name


@cache
def released(name: str) -> dict[str, Tensor]:
    """The golden weights of a published network at width 1, under the released names."""
    with torch.device("meta"):
        shapes = build(_spec(name)).state_dict()
    tensors = {}
    for ours, theirs in NETWORKS[_key(name)].released.items():
        for part in ("weight", "bias"):
            if f"{ours}.{part}" in shapes:
                tensors[f"{theirs}.{part}"] = weight(f"{name}.{theirs}.{part}", tuple(shapes[f"{ours}.{part}"].shape))
    return tensors


def published(name: str, prefix: str = "") -> tuple[ModelSpec, nn.Module]:
    """A published network at width 1 with the golden weights, loaded under the released names."""
    with torch.device("meta"):
        model = build(_spec(name))
    state = {prefix + key: value for key, value in released(name).items()}
    model.load_state_dict(from_released(_key(name), state), assign=True)
    return _spec(name), model.eval()


def _spec(name: str) -> ModelSpec:
    return ModelSpec("fusion" if name == "fusion" else "member", name, head="published")


def reference(name: str, image: Tensor) -> Tensor:
    """Logits of a published network, layer by layer as its description has them, of the size that it returns.

    The fusion takes probabilities of FCN-32, FCN-16 and FCN-8 before RGB.
    """
    return _alex(name, image) if name in ("fcn32", "fusion") else _vgg(name, image)


def _layer(name: str, key: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    tensors = released(name)
    return F.conv2d(x, tensors[f"{key}.weight"], tensors[f"{key}.bias"], stride, padding)


def _up(name: str, key: str, x: Tensor, stride: int) -> Tensor:
    return F.conv_transpose2d(x, released(name)[f"{key}.weight"], stride=stride)


def _part(x: Tensor, offset: int, like: Tensor) -> Tensor:
    return x[:, :, offset : offset + like.shape[2], offset : offset + like.shape[3]]


def _alex(name: str, image: Tensor) -> Tensor:
    keys = [f"conv{number}" for number in range(1, 6)] + ["fc6", "fc7"]
    if name == "fusion":
        keys = [f"convolution.{index}" for index in (0, 3, 6, 8, 10, 14, 17)]
    x = F.max_pool2d(F.relu(_layer(name, keys[0], image, 4, 100)), 3, 2)
    x = F.max_pool2d(F.relu(_layer(name, keys[1], x, 1, 2)), 3, 2)
    for key in keys[2:5]:
        x = F.relu(_layer(name, key, x, 1, 1))
    x = F.max_pool2d(x, 3, 2, ceil_mode=True)
    for key in keys[5:]:
        x = F.relu(_layer(name, key, x))
    return _part(_up(name, "upscore", _layer(name, "score_fr", x), 32), 43, image)


def _vgg(name: str, image: Tensor) -> Tensor:
    def convs(x: Tensor, group: str, indices: tuple[int, ...], first_padding: int = 1) -> Tensor:
        for index in indices:
            x = F.relu(_layer(name, f"{group}.{index}", x, 1, first_padding if index == 0 else 1))
        return F.max_pool2d(x, 2)

    x = convs(image, "pool3", (0, 2), first_padding=100)
    pool3 = convs(convs(x, "pool3", (5, 7)), "pool3", (10, 12, 14))
    pool4 = convs(pool3, "pool4", (0, 2, 4))
    x = convs(pool4, "conv7", (0, 2, 4))
    x = F.relu(_layer(name, "conv7.10", F.relu(_layer(name, "conv7.7", x))))
    x = _up(name, "upsample2", _layer(name, "score_fr", x), 2)
    x = x + _part(_layer(name, "score_pool4", pool4), 5, x)
    if name == "fcn16":
        return _part(_up(name, "upsample16", x, 16), 27, image)
    x = _up(name, "upsample_pool4", x, 2)
    x = x + _part(_layer(name, "score_pool3", pool3), 9, x)
    return _part(_up(name, "upsample8", x, 8), 36, image)
