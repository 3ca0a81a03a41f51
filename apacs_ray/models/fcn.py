"""The three members: FCN-32 on an AlexNet trunk, FCN-16 and FCN-8 on a VGG-16 trunk, as APACS23 published them.

Every network maps RGB (N, 3, H, W) in 0..1 to logits (N, 1, H, W) for every H and W. Where the published geometry
yields fewer pixels than the input has, the input is zero-padded on the right and bottom to the next size that suffices.
With `stages` the logits are (N, K, H, W): before each finer score joined, the finest and last as without (deep
supervision).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apacs_ray.models.layers import Dense, Score, Upsample

N = TypeVar("N", bound=nn.Module)
SMALLEST = 32  # px: what is smaller, such as a sliver at a slide's edge, is padded
BRIGHTNESS, CONTRAST = 0.84, 0.11  # mean and standard deviation of RGB in a stained smear, about
MARGIN = 100  # px of zeros around the input: the first convolution's padding


def scaled(channels: int, width: float) -> int:
    """Return a published channel count at `width`: a multiple of 8, at least 8."""
    return max(8, round(channels * width / 8) * 8)


def crop(x: Tensor, offset: int, height: int, width: int) -> Tensor:
    """Return `height` x `width` of `x` (N, C, ., .) from `offset` in both directions."""
    return x[:, :, offset : offset + height, offset : offset + width]


def sufficient(size: int, produced: Callable[[int], int]) -> int:
    """Return the smallest side >= `size` for which the network yields at least `size` pixels."""
    side = max(size, SMALLEST)
    while produced(side) < size:
        side += 1
    return side


def joined(maps: Tensor, score: Tensor, offset: int, *, stages: bool) -> Tensor:
    """Return the newest maps with a finer score added; with `stages` the earlier ones stay before them.

    Args:
        maps: (K * N, 1, H, W), of K stages, the newest last.
        score: (N, 1, ., .).
        offset: px of the score's that lie before the maps, in both directions.
        stages: Whether earlier stages are wanted.

    Returns:
        (N, 1, H, W), with `stages` ((K + 1) * N, 1, H, W).
    """
    newest = maps[-score.shape[0] :] + crop(score, offset, *maps.shape[2:])
    return torch.cat([maps, newest]) if stages else newest


def by_stage(maps: Tensor, count: int) -> Tensor:
    """Return the maps (K * N, 1, H, W) of `count` = N tiles as (N, K, H, W)."""
    return maps.reshape(-1, count, *maps.shape[2:]).transpose(0, 1)


def pad_to(x: Tensor, produced: Callable[[int], int]) -> Tensor:
    """Return `x` zero-padded right and bottom until the network yields every pixel."""
    height, width = x.shape[2:]
    bottom = sufficient(height, produced) - height
    right = sufficient(width, produced) - width
    return F.pad(x, (0, right, 0, bottom)) if bottom or right else x


def initialize(network: N, heatmaps: int = 0) -> N:
    """Start a network at random, as in the paper, and return it: He initialization, biases at zero.

    Stained cells on bright glass fill a small part of 0..1, which alone makes the first epochs idle. So the first
    convolution starts as if RGB were normalized by `BRIGHTNESS` and `CONTRAST`; `heatmaps` channels before RGB are not.

    Returns:
        `network`.
    """
    first = True
    for module in network.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if isinstance(module, Score) else "relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
            if first:
                with torch.no_grad():
                    module.weight[:, heatmaps:] /= CONTRAST
                    module.bias -= BRIGHTNESS * module.weight[:, heatmaps:].sum(dim=(1, 2, 3))
        first = False
    return network


class AlexTrunk(nn.Module):
    """conv1 ... fc7 of FCN-32, on `in_channels` channels. Strides: conv1 4, pool1 8, pool2 16, fc7 32."""

    def __init__(self, in_channels: int, width: float, dropout: float) -> None:
        super().__init__()
        c64, c192, c384, c256, c4096 = (scaled(channels, width) for channels in (64, 192, 384, 256, 4096))
        self.conv1 = nn.Conv2d(in_channels, c64, 11, stride=4, padding=MARGIN)
        self.conv2 = nn.Conv2d(c64, c192, 5, padding=2)
        self.conv3 = nn.Conv2d(c192, c384, 3, padding=1)
        self.conv4 = nn.Conv2d(c384, c256, 3, padding=1)
        self.conv5 = nn.Conv2d(c256, c256, 3, padding=1)
        self.fc6 = Dense(c256, c4096, 6)
        self.fc7 = nn.Conv2d(c4096, c4096, 1)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return features after conv1 (stride 4), pool1 (8), pool2 (16) and fc7 (32)."""
        conv1 = F.relu(self.conv1(x))
        pool1 = F.max_pool2d(conv1, 3, 2)
        pool2 = F.max_pool2d(F.relu(self.conv2(pool1)), 3, 2)
        y = F.relu(self.conv3(pool2))
        y = F.relu(self.conv4(y))
        y = F.relu(self.conv5(y))
        y = self.dropout(F.max_pool2d(y, 3, 2, ceil_mode=True))
        y = self.dropout(F.relu(self.fc6(y)))
        y = F.relu(self.fc7(y))
        return conv1, pool1, pool2, y

    @staticmethod
    def produced(side: int) -> int:
        """Return the pixels that FCN-32 yields for an input side: its upsampled score less the crop offset 43."""
        conv1 = (side + 2 * MARGIN - 11) // 4 + 1
        pool2 = ((conv1 - 3) // 2 + 1 - 3) // 2 + 1
        fc6 = -(-(pool2 - 3) // 2) + 1 - 5
        return (fc6 - 1) * 32 + 63 - 43 if fc6 > 0 else 0


class FCN32(nn.Module):
    """FCN-32: stride 32, one upsampling. `in_channels` 3, or 5 or 6 as the published fusion."""

    OFFSET = 43

    def __init__(self, *, in_channels: int = 3, width: float = 1.0, dropout: float = 0.5) -> None:
        super().__init__()
        self.trunk = AlexTrunk(in_channels, width, dropout)
        self.dropout = nn.Dropout2d(dropout)
        self.score = Score(self.trunk.fc7.out_channels)
        self.upscore = Upsample(1, 63, 32)

    def forward(self, x: Tensor, stages: bool = False) -> Tensor:
        """Return logits (N, 1, H, W) for `x` (N, C, H, W) in 0..1; it has one stage."""
        height, width = x.shape[2:]
        *_, y = self.trunk(pad_to(x, AlexTrunk.produced))
        y = self.score(self.dropout(y))
        return crop(self.upscore(y), self.OFFSET, height, width)


def _block(channels: int, out: int, convs: int, first_padding: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number in range(convs):
        layers += [nn.Conv2d(channels, out, 3, padding=first_padding if number == 0 else 1), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, nn.MaxPool2d(2))


class VGGTrunk(nn.Module):
    """VGG-16 up to fc7, as FCN-16 and FCN-8 use it. Strides: pool3 8, pool4 16, fc7 32."""

    def __init__(self, width: float, dropout: float) -> None:
        super().__init__()
        c64, c128, c256, c512, c4096 = (scaled(channels, width) for channels in (64, 128, 256, 512, 4096))
        self.block1 = _block(3, c64, 2, first_padding=MARGIN)
        self.block2 = _block(c64, c128, 2)
        self.block3 = _block(c128, c256, 3)
        self.block4 = _block(c256, c512, 3)
        self.block5 = _block(c512, c512, 3)
        self.fc6 = Dense(c512, c4096, 7)
        self.fc7 = nn.Conv2d(c4096, c4096, 1)
        self.dropout = nn.Dropout2d(dropout)
        self.pool3_channels, self.pool4_channels, self.channels = c256, c512, c4096

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return features after pool3 (stride 8), pool4 (16) and fc7 (32)."""
        pool3 = self.block3(self.block2(self.block1(x)))
        pool4 = self.block4(pool3)
        y = self.dropout(F.relu(self.fc6(self.block5(pool4))))
        y = self.dropout(F.relu(self.fc7(y)))
        return pool3, pool4, y

    @staticmethod
    def fc7_side(side: int) -> int:
        """Return the side of fc7's features for an input side."""
        return (side + 2 * MARGIN - 2) // 32 - 6


class FCN16(nn.Module):
    """FCN-16: the score at stride 32 joined by one from pool4."""

    OFFSET_POOL4, OFFSET = 5, 27

    def __init__(self, *, width: float = 1.0, dropout: float = 0.5) -> None:
        super().__init__()
        self.trunk = VGGTrunk(width, dropout)
        self.score = Score(self.trunk.channels)
        self.score_pool4 = Score(self.trunk.pool4_channels)
        self.up_score = Upsample(1, 4, 2)
        self.up_final = Upsample(1, 32, 16)

    def forward(self, x: Tensor, stages: bool = False) -> Tensor:
        """Return logits (N, 1, H, W) for `x` (N, C, H, W) in 0..1; with `stages` (N, 2, H, W)."""
        height, width = x.shape[2:]
        _, pool4, y = self.trunk(pad_to(x, self.produced))
        y = joined(self.up_score(self.score(y)), self.score_pool4(pool4), self.OFFSET_POOL4, stages=stages)
        logits = crop(self.up_final(y), self.OFFSET, height, width)
        return by_stage(logits, len(x)) if stages else logits

    @classmethod
    def produced(cls, side: int) -> int:
        """Return the pixels that the network yields for an input side."""
        fc7 = VGGTrunk.fc7_side(side)
        return (2 * fc7 + 1) * 16 + 32 - cls.OFFSET if fc7 > 0 else 0


class FCN8(nn.Module):
    """FCN-8: the scores at strides 32 and 16 joined by one from pool3."""

    OFFSET_POOL4, OFFSET_POOL3, OFFSET = 5, 9, 36

    def __init__(self, *, width: float = 1.0, dropout: float = 0.5) -> None:
        super().__init__()
        self.trunk = VGGTrunk(width, dropout)
        self.score = Score(self.trunk.channels)
        self.score_pool4 = Score(self.trunk.pool4_channels)
        self.score_pool3 = Score(self.trunk.pool3_channels)
        self.up_score = Upsample(1, 4, 2)
        self.up_pool4 = Upsample(1, 4, 2)
        self.up_final = Upsample(1, 16, 8)

    def forward(self, x: Tensor, stages: bool = False) -> Tensor:
        """Return logits (N, 1, H, W) for `x` (N, C, H, W) in 0..1; with `stages` (N, 3, H, W)."""
        height, width = x.shape[2:]
        pool3, pool4, y = self.trunk(pad_to(x, self.produced))
        y = joined(self.up_score(self.score(y)), self.score_pool4(pool4), self.OFFSET_POOL4, stages=stages)
        y = joined(self.up_pool4(y), self.score_pool3(pool3), self.OFFSET_POOL3, stages=stages)
        logits = crop(self.up_final(y), self.OFFSET, height, width)
        return by_stage(logits, len(x)) if stages else logits

    @classmethod
    def produced(cls, side: int) -> int:
        """Return the pixels that the network yields for an input side."""
        fc7 = VGGTrunk.fc7_side(side)
        return (2 * (2 * fc7 + 2) + 1) * 8 + 16 - cls.OFFSET if fc7 > 0 else 0
