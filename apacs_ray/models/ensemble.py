"""The whole ensemble: each image is passed once to the members, and their heatmaps to every fusion."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from apacs_ray.config.settings import MemberName
from apacs_ray.models.fusion import fuse
from apacs_ray.models.registry import MEMBERS
from apacs_ray.models.spec import ModelSpec


class Ensemble(nn.Module):
    """Frozen members, those that are needed, and any number of fusions, by key (`fusion`, `fusion_published`)."""

    def __init__(
        self, members: Mapping[MemberName, nn.Module], fusions: Mapping[str, tuple[ModelSpec, nn.Module]]
    ) -> None:
        super().__init__()
        self.members = nn.ModuleDict({name: members[name] for name in MEMBERS if name in members})
        self.fusions = nn.ModuleDict({key: network for key, (_, network) in fusions.items()})
        self._inputs = {key: spec.members for key, (spec, _) in fusions.items()}
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return, for RGB (N, 3, H, W) in 0..1, logits (N, 1, H, W) float32 of every member and every fusion."""
        logits: dict[str, Tensor] = {name: member(image) for name, member in self.members.items()}
        probabilities = {name: torch.sigmoid(output.float()) for name, output in logits.items()}
        for key, network in self.fusions.items():
            heatmaps = torch.cat([probabilities[name] for name in self._inputs[key]], dim=1)
            logits[key] = fuse(network, heatmaps, image)
        return logits
