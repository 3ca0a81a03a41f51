"""Untrained ensembles whose masks are neither empty nor full, for tests and benchmarks of segmentation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor, nn

from apacs_ray.data.images import Rgb
from apacs_ray.models.fusion import build_fusion
from apacs_ray.models.registry import MEMBERS, build_member
from apacs_ray.models.spec import Head, ModelSpec
from apacs_ray.storage import Store

Networks = Mapping[str, tuple[ModelSpec, nn.Module]]


@torch.no_grad()
def random_networks(
    picture: Rgb, *, width: float, head: Head = "refined", seed: int = 0, mpp: float | None = None, views: int = 1
) -> Networks:
    """Return random members and a fusion on them, each with a bias by which about half of `picture` is cell.

    Args:
        picture: (H, W, 3) uint8, by which they are biased.
        width: Of all networks; 1 is as published.
        head: Of the fusion.
        seed: The members of equal seeds are equal, whatever the head.
        mpp: um per px that their descriptions name.
        views: Of a picture, over which the fusion reads its members.

    Returns:
        Their descriptions and modules in eval mode, by key: the members', then `fusion`.
    """
    torch.manual_seed(seed)
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    networks: dict[str, tuple[ModelSpec, nn.Module]] = {}
    heatmaps = []
    for name in MEMBERS:
        member = build_member(name, width=width).eval()
        _center(member.score, member(image))
        heatmaps.append(torch.sigmoid(member(image)))
        networks[name] = ModelSpec("member", name, width=width, mpp=mpp), member
    fusion = build_fusion(head, MEMBERS, width=width).eval()
    for score in [*getattr(fusion, "scores", ()), getattr(fusion, "fine_score", None)]:
        if score is not None:  # they begin at zero
            nn.init.normal_(score.weight, std=0.1)
    last = fusion.fine_score if head == "refined" else fusion.score
    _center(last, fusion(torch.cat([*heatmaps, image], dim=1)))
    return networks | {"fusion": (ModelSpec("fusion", "fusion", width=width, head=head, mpp=mpp, views=views), fusion)}


def write_networks(store: Store, networks: Networks) -> None:
    """Write networks as a folder of models that `--model` takes."""
    for key, (spec, network) in networks.items():
        folder = key if spec.kind == "fusion" else f"members/{key}"
        store.write(f"{folder}/model.json", spec.to_json())
        weights = {name: value.contiguous() for name, value in network.state_dict().items()}
        store.write(f"{folder}/model.safetensors", save(weights))


def _center(score: Tensor | nn.Module, logits: Tensor) -> None:
    assert isinstance(score, nn.Conv2d)
    assert score.bias is not None
    score.bias -= logits.median() + logits.std() / 50  # off what flat areas have
