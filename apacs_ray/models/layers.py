"""Layers of the networks that torch has too, computed so that GPUs and CPUs are quick at them.

Scores and upsampling run in float32 outside autocast: better numerically, and on CPUs bfloat16 is slow or unsafe there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
