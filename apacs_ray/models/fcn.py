"""The three members: FCN-32 on an AlexNet trunk, FCN-16 and FCN-8 on a VGG-16 trunk, as APACS23 published them.

Every network maps RGB (N, 3, H, W) in 0..1 to logits (N, 1, H, W) for every H and W. Where the published geometry
yields fewer pixels than the input has, the input is zero-padded on the right and bottom to the next size that suffices.
Scores and upsampling run in float32 outside autocast: better numerically, and on CPUs bfloat16 is slow or unsafe there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)
SMALLEST = 32  # px: what is smaller, such as a sliver at a slide's edge, is padded
BRIGHTNESS, CONTRAST = 0.84, 0.11  # mean and standard deviation of RGB in a stained smear, about
MARGIN = 100  # px of zeros around the input: the first convolution's padding


def scaled(channels: int, width: float) -> int:
    """Return a published channel count at `width`: a multiple of 8, at least 8."""
    return max(8, round(channels * width / 8) * 8)


class Upsample(nn.Module):
    """A transposed convolution C -> C without bias, in float32, started as bilinear interpolation.

    `weight` is (C, C, kernel, kernel) as `nn.ConvTranspose2d` has it. A kernel of at most twice the stride gives each
    output px the sum over 2 x 2 input px: so it is computed as a convolution to stride x stride phases, which are then
    put in their places. cuDNN's transposed convolution of one channel takes a hundred times as long on a GPU.
    """

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        if not stride < kernel <= 2 * stride:
            raise ValueError(f"a kernel of {kernel} px for a stride of {stride}")
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(channels, channels, kernel, kernel))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as bilinear interpolation, each channel by itself."""
        size = self.weight.shape[-1]
        factor = (size + 1) // 2
        center = factor - 1 if size % 2 else factor - 0.5
        ramp = 1 - (torch.arange(size) - center).abs() / factor
        with torch.no_grad():
            self.weight.zero_()
            for channel in range(self.weight.shape[0]):
                self.weight[channel, channel] = torch.outer(ramp, ramp)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` (N, C, H, W) upsampled, float32; of (side - 1) * stride + kernel px."""
        channels, kernel, stride = self.weight.shape[0], self.weight.shape[-1], self.stride
        height, width = ((side - 1) * stride + kernel for side in x.shape[2:])
        with torch.autocast(x.device.type, enabled=False):
            missing = 2 * stride - kernel
            taps = F.pad(self.weight.float(), (0, missing, 0, missing))
            taps = taps.reshape(channels, channels, 2, stride, 2, stride)  # in, out, tap, phase, tap, phase
            # the later half of a kernel meets the earlier px
            taps = taps.flip(2, 4).permute(1, 3, 5, 0, 2, 4).reshape(-1, channels, 2, 2)
            return F.pixel_shuffle(F.conv2d(x.float(), taps, padding=1), stride)[:, :, :height, :width]


class Dense(nn.Conv2d):
    """A convolution without padding whose kernel is large: a fully connected layer of the classification network.

    On GPUs in half precision it is a matrix product of windows, forward and backward: cuDNN's heuristics choose kernels
    without tensor cores for it, which took half of FCN-32's and a third of FCN-8's whole training step on an H100.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return features (N, out, H - kernel + 1, W - kernel + 1) of `x` (N, in, H, W)."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        if self.bias is None or x.device.type != "cuda" or dtype.itemsize != 2:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = WindowProduct.apply(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        return y


class WindowProduct(torch.autograd.Function):
    """A convolution of stride 1 without padding as matrix products, a band of rows at a time; channels last."""

    MOST = 1 << 28  # values of windows at a time

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return (N, O, H - k + 1, W - k + 1) of `x` (N, C, H, W) and `weight` (O, C, k, k), all of one dtype."""
        ctx.save_for_backward(x, weight)
        matrix = _as_matrix(weight)
        y = x.new_empty(x.shape[0], *_windows(x, weight).shape[1:3], weight.shape[0])
        for band in _bands(x, weight):
            windows = _windows(x, weight)[:, band].reshape(-1, matrix.shape[1])
            y[:, band] = torch.addmm(bias, windows, matrix.t()).view(y[:, band].shape)
        return y.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the input, the weight and the bias; sums over windows are of float32 at least."""
        x, weight = ctx.saved_tensors
        gradient, matrix, kernel = gradients[0].permute(0, 2, 3, 1), _as_matrix(weight), weight.shape[-1]
        exact = torch.promote_types(x.dtype, torch.float32)
        of_matrix = torch.zeros_like(matrix, dtype=exact)
        of_x = torch.zeros_like(x.permute(0, 2, 3, 1), dtype=exact) if ctx.needs_input_grad[0] else None
        for band in _bands(x, weight):
            part = gradient[:, band].reshape(-1, matrix.shape[0])
            of_matrix += part.t() @ _windows(x, weight)[:, band].reshape(-1, matrix.shape[1])
            if of_x is not None:
                of_windows = (part @ matrix).view(*gradient[:, band].shape[:3], kernel, kernel, -1)
                height, width = of_windows.shape[1:3]
                for row in range(kernel):
                    for column in range(kernel):
                        top = band.start + row
                        of_x[:, top : top + height, column : column + width] += of_windows[:, :, :, row, column]
        of_weight = of_matrix.view(weight.shape[0], kernel, kernel, -1).permute(0, 3, 1, 2).to(weight.dtype)
        of_bias = gradient.sum(dim=(0, 1, 2), dtype=exact).to(weight.dtype)
        return None if of_x is None else of_x.permute(0, 3, 1, 2).to(x.dtype), of_weight, of_bias


def _as_matrix(weight: Tensor) -> Tensor:
    """(O, k * k * C) of (O, C, k, k)."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def _windows(x: Tensor, weight: Tensor) -> Tensor:
    """(N, h, w, k, k, C), a view of (N, C, H, W)."""
    kernel = weight.shape[-1]
    return x.permute(0, 2, 3, 1).unfold(1, kernel, 1).unfold(2, kernel, 1).permute(0, 1, 2, 4, 5, 3)


def _bands(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """Rows of the output whose windows are at most `WindowProduct.MOST` values."""
    count, height, width, *window = _windows(x, weight).shape
    rows = max(1, WindowProduct.MOST // (count * width * math.prod(window)))
    for first in range(0, height, rows):
        yield slice(first, min(first + rows, height))


class Score(nn.Conv2d):
    """A 1 x 1 convolution to class scores, in float32."""

    def __init__(self, channels: int, classes: int = 1) -> None:
        super().__init__(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (N, classes, H, W) float32 of features (N, C, H, W)."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def crop(x: Tensor, offset: int, height: int, width: int) -> Tensor:
    """Return `height` x `width` of `x` (N, C, ., .) from `offset` in both directions."""
    return x[:, :, offset : offset + height, offset : offset + width]


def sufficient(size: int, produced: Callable[[int], int]) -> int:
    """Return the smallest side >= `size` for which the network yields at least `size` pixels."""
    side = max(size, SMALLEST)
    while produced(side) < size:
        side += 1
    return side


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

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 1, H, W) for `x` (N, C, H, W) in 0..1."""
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

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 1, H, W) for `x` (N, C, H, W) in 0..1."""
        height, width = x.shape[2:]
        _, pool4, y = self.trunk(pad_to(x, self.produced))
        y = self.up_score(self.score(y))
        y = y + crop(self.score_pool4(pool4), self.OFFSET_POOL4, *y.shape[2:])
        return crop(self.up_final(y), self.OFFSET, height, width)

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

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 1, H, W) for `x` (N, C, H, W) in 0..1."""
        height, width = x.shape[2:]
        pool3, pool4, y = self.trunk(pad_to(x, self.produced))
        y = self.up_score(self.score(y))
        y = y + crop(self.score_pool4(pool4), self.OFFSET_POOL4, *y.shape[2:])
        y = self.up_pool4(y)
        y = y + crop(self.score_pool3(pool3), self.OFFSET_POOL3, *y.shape[2:])
        return crop(self.up_final(y), self.OFFSET, height, width)

    @classmethod
    def produced(cls, side: int) -> int:
        """Return the pixels that the network yields for an input side."""
        fc7 = VGGTrunk.fc7_side(side)
        return (2 * (2 * fc7 + 2) + 1) * 8 + 16 - cls.OFFSET if fc7 > 0 else 0
