"""The whole ensemble: each image is passed once to the members, and their heatmaps to every fusion."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from apacs_ray.config.training_settings import MemberName
from apacs_ray.models.fusion import fuse
from apacs_ray.models.registry import MEMBERS
from apacs_ray.models.spec import ModelSpec
from apacs_ray.models.views import over_views


class Ensemble(nn.Module):
    """Frozen members, those that are needed, and any number of fusions, by key (`fusion`, `fusion_published`)."""

    def __init__(
        self, members: Mapping[MemberName, nn.Module], fusions: Mapping[str, tuple[ModelSpec, nn.Module]]
    ) -> None:
        super().__init__()
        self.members = nn.ModuleDict({name: members[name] for name in MEMBERS if name in members})
        self.fusions = nn.ModuleDict({key: network for key, (_, network) in fusions.items()})
        self._inputs = {key: (spec.members, spec.views) for key, (spec, _) in fusions.items()}
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return, for RGB (N, 3, H, W) in 0..1, logits (N, 1, H, W) float32 of every member and every fusion.

        Members answer for the picture as it is; a fusion reads the mean of their logits over its views.

        Args:
            image: (N, 3, H, W) in 0..1.

        Returns:
            Logits by key.
        """
        logits = self._say(image)
        averaged: dict[int, dict[str, Tensor]] = {1: dict(logits)}
        for key, network in self.fusions.items():
            members, views = self._inputs[key]
            if views not in averaged:
                averaged[views] = over_views(self._say, image, views, averaged[1])
            heatmaps = torch.cat([torch.sigmoid(averaged[views][name].float()) for name in members], dim=1)
            logits[key] = fuse(network, heatmaps, image)
        return logits

    def _say(self, image: Tensor) -> dict[str, Tensor]:
        """Return what the members say of a picture as it is."""
        return {name: member(image) for name, member in self.members.items()}
