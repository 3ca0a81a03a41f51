"""The fusion network: the members' heatmaps and RGB in, one segmentation out.

Published head: the FCN-32 network on 6 input channels (5 with two members), heatmaps first. Refined head: the same
trunk and inputs, but scores from strides 4, 8, 16 and 32 and a light path at full resolution are added to a weighted
mean of the members' logits. Its scores start at zero, so it starts as that mean and learns the correction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from apacs_ray.config.training_settings import HeatmapInit, MemberName
from apacs_ray.errors import ApacsError
from apacs_ray.models.fcn import FCN32, AlexTrunk, crop, initialize, pad_to, scaled
from apacs_ray.models.layers import Score, Upsample
from apacs_ray.models.spec import CLAMP, FusionStart, Head

START = "start."  # of the names of tensors that older files of a refined fusion lack: it starts as the mean


class MembersLogit(nn.Module):
    """sum(weight * logit) / temperature + bias of the members' clamped logits: what a refined fusion starts as."""

    weights: Tensor
    temperature: Tensor
    bias: Tensor

    def __init__(self, weights: Sequence[float], temperature: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32))
        self.register_buffer("temperature", torch.tensor(temperature, dtype=torch.float32))
        self.register_buffer("bias", torch.tensor(bias, dtype=torch.float32))

    def forward(self, heatmaps: Tensor) -> Tensor:
        """Return logits (N, 1, H, W) float32 for probabilities (N, M, H, W)."""
        with torch.autocast(heatmaps.device.type, enabled=False):
            logits = torch.logit(heatmaps.float(), eps=CLAMP) * self.weights[:, None, None]
            return logits.sum(dim=1, keepdim=True) / self.temperature + self.bias


class RefinedFusion(nn.Module):
    """FCN-8-like skips on the AlexNet trunk, as a residual onto a combination of the members' logits.

    Feature i of a map with stride s lies at input pixel s * i + a (a = -95, -91, -83 for conv1, pool1, pool2 and 13
    for fc7); a bilinear transposed convolution of kernel 2 s - 1 puts it at s * i + s - 1. The crop offsets s - 1 - a
    therefore align every map with the input exactly.
    """

    SKIPS = ((4, 98), (8, 98), (16, 98), (32, 18))  # stride, crop offset

    def __init__(self, start: MembersLogit, *, width: float, dropout: float) -> None:
        super().__init__()
        self.start = start
        self.members = members = len(start.weights)
        self.trunk = AlexTrunk(members + 3, width, dropout)
        self.dropout = nn.Dropout2d(dropout)
        channels = (
            self.trunk.conv1.out_channels,
            self.trunk.conv1.out_channels,
            self.trunk.conv2.out_channels,
            self.trunk.fc7.out_channels,
        )
        self.scores = nn.ModuleList(Score(count) for count in channels)
        self.ups = nn.ModuleList(Upsample(1, 2 * stride - 1, stride) for stride, _ in self.SKIPS)
        fine = scaled(32, width)
        self.fine = nn.Sequential(
            nn.Conv2d(members + 3, fine, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(fine, fine, 3, padding=1),
            nn.ReLU(),
        )
        self.fine_score = Score(fine)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 1, H, W) for probabilities and RGB (N, M + 3, H, W) in 0..1."""
        height, width = x.shape[2:]
        *skips, deep = self.trunk(pad_to(x, AlexTrunk.produced))
        logits = self.start(x[:, : self.members]) + self.fine_score(self.fine(x))
        features = (*skips, self.dropout(deep))
        for feature, score, up, (_, offset) in zip(features, self.scores, self.ups, self.SKIPS, strict=True):
            logits = logits + crop(up(score(feature)), offset, height, width)
        return logits


def build_fusion(
    head: Head,
    members: tuple[MemberName, ...],
    *,
    width: float = 1.0,
    dropout: float = 0.5,
    heatmap_init: HeatmapInit = "random",
    start: FusionStart | None = None,
) -> nn.Module:
    """Return a freshly initialized fusion network.

    Input (N, M + 3, H, W) in 0..1, the probabilities of `members` first, then RGB; output logits (N, 1, H, W).
    `heatmap_init`: how the first layer treats the heatmaps at the start: like any channel (`random`), not at all
    (`zero`), or as the mean over the RGB filters (`mean`). `start`: what the refined head starts as (None: the mean of
    the members' logits).

    Returns:
        The network, in training mode.
    """
    count = len(members)
    network: FCN32 | RefinedFusion
    if head == "published":
        network = FCN32(in_channels=count + 3, width=width, dropout=dropout)
        initialize(network, heatmaps=count)
    else:
        if start is None:
            combined = MembersLogit([1 / count] * count)
        else:
            combined = MembersLogit([start.weights[name] for name in members], start.temperature, start.bias)
        network = RefinedFusion(combined, width=width, dropout=dropout)
        initialize(network, heatmaps=count)
        for score in (*network.scores, network.fine_score):
            nn.init.zeros_(score.weight)
    with torch.no_grad():
        filters = network.trunk.conv1.weight
        if heatmap_init == "zero":
            filters[:, :count] = 0
        elif heatmap_init == "mean":
            filters[:, :count] = filters[:, count:].mean(dim=1, keepdim=True)
    return network


def load_fcn32_trunk(network: nn.Module, member: Mapping[str, Tensor], heatmap_init: HeatmapInit) -> None:
    """Put the trunk of a trained FCN-32 of the same width into a fusion, which has the same shapes behind its input.

    In the first layer the filters on RGB are FCN-32's; those on heatmaps stay as `build_fusion` started them, and as
    the `mean` are that of FCN-32's.

    Raises:
        ApacsError: The fusion has another width.
    """
    wanted = network.state_dict()
    tensors = {key: value.clone() for key, value in member.items() if key.startswith("trunk.")}
    first = "trunk.conv1.weight"
    filters = wanted[first].clone()
    if filters.shape[0] != tensors[first].shape[0]:
        raise ApacsError("fusion.trunk fcn32: fusion.width must be members.width")
    filters[:, -3:] = tensors[first]
    if heatmap_init == "mean":
        filters[:, :-3] = tensors[first].mean(dim=1, keepdim=True)
    network.load_state_dict({**wanted, **tensors, first: filters})


def fuse(network: nn.Module, probabilities: Tensor, image: Tensor) -> Tensor:
    """Return logits of the fusion for member probabilities (N, M, H, W) and RGB (N, 3, H, W)."""
    fused: Tensor = network(torch.cat([probabilities, image], dim=1))
    return fused
