"""The only list of networks: name, kind, how each is built, what it costs, and where pretrained weights for it are.

To add a member, write its class, an entry here, and its name in `config.training_settings.MemberName`, which lies below
and cannot import this. Nothing here imports torch until a network is built: settings, plans and metrics need the names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from apacs_ray.config.training_settings import MemberName
from apacs_ray.errors import ApacsError

if TYPE_CHECKING:
    from torch import nn

COST_SIDE = 1000  # px, of the square tile for which `gflops` are counted


@dataclass(frozen=True)
class NetworkEntry:
    """A network that can be trained.

    Attributes:
        name: Its key in settings, folders and metrics.
        kind: `member` (RGB in) or `fusion` (heatmaps and RGB in).
        gflops: 10^9 floating-point operations of a forward pass at `COST_SIDE` x `COST_SIDE` px and width 1, as torch's
            `FlopCounterMode` counts them (tests/test_models.py counts again).
        reach: px from an output pixel to the furthest input that it depends on, in either direction; of a fusion from
            the heatmaps and RGB on (tests/test_halo.py finds it by gradient).
        build: Returns a member, freshly initialized, for a width and a dropout probability; a fusion is built by
            `fusion.build_fusion`, from its head and its members.
        released: The layers of the checkpoint that the paper's authors released, by the name of ours.
        released_file: Name of that checkpoint.
        imagenet: The layers of torchvision's ImageNet network, by the name of ours, the first convolution first.
        imagenet_file: Name of its weights, as torchvision calls them less the hash.
    """

    name: str
    kind: Literal["member", "fusion"]
    gflops: float
    reach: int
    build: Callable[[float, float], nn.Module] | None = None
    released: Mapping[str, str] = field(default_factory=dict)
    released_file: str = ""
    imagenet: Mapping[str, str] = field(default_factory=dict)
    imagenet_file: str = ""


def build_member(name: str, *, width: float = 1.0, dropout: float = 0.5) -> nn.Module:
    """Return a freshly initialized member; at width 1 exactly the published network.

    Raises:
        ApacsError: There is no member of this name.

    Returns:
        The network, in training mode.
    """
    entry = NETWORKS.get(name)
    if entry is None or entry.build is None:
        raise ApacsError(f"{name}: no such member; there is {', '.join(MEMBERS)}")
    return entry.build(width, dropout)


def cost(name: str) -> float:
    """Return the GFLOPs of a forward pass of the network `name`, for plans; of an unknown one those of the fusion."""
    return NETWORKS.get(name, NETWORKS["fusion"]).gflops


def _fcn32(width: float, dropout: float) -> nn.Module:
    from apacs_ray.models.fcn import FCN32, initialize

    return initialize(FCN32(width=width, dropout=dropout))


def _fcn16(width: float, dropout: float) -> nn.Module:
    from apacs_ray.models.fcn import FCN16, initialize

    return initialize(FCN16(width=width, dropout=dropout))


def _fcn8(width: float, dropout: float) -> nn.Module:
    from apacs_ray.models.fcn import FCN8, initialize

    return initialize(FCN8(width=width, dropout=dropout))


_ALEX_LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7")
_ALEX_IMAGENET = dict(
    zip(
        (f"trunk.{layer}" for layer in _ALEX_LAYERS),
        ("features.0", "features.3", "features.6", "features.8", "features.10", "classifier.1", "classifier.4"),
        strict=True,
    )
)
_VGG_LAYERS = tuple(
    f"trunk.block{block}.{2 * conv}" for block, convs in enumerate((2, 2, 3, 3, 3), 1) for conv in range(convs)
)
_VGG_IMAGENET = dict(
    zip(
        (*_VGG_LAYERS, "trunk.fc6", "trunk.fc7"),
        (
            *(f"features.{index}" for index in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
            "classifier.0",
            "classifier.3",
        ),
        strict=True,
    )
)
_VGG_RELEASED = dict(
    zip(
        (*_VGG_LAYERS, "trunk.fc6", "trunk.fc7"),
        (
            *(f"pool3.{index}" for index in (0, 2, 5, 7, 10, 12, 14)),
            *(f"pool4.{index}" for index in (0, 2, 4)),
            *(f"conv7.{index}" for index in (0, 2, 4, 7, 10)),
        ),
        strict=True,
    )
) | {"score": "score_fr", "score_pool4": "score_pool4", "up_score": "upsample2"}

_FUSION_RELEASED = dict(
    zip(
        (f"trunk.{layer}" for layer in _ALEX_LAYERS),
        (f"convolution.{index}" for index in (0, 3, 6, 8, 10, 14, 17)),
        strict=True,
    )
) | {"score": "score_fr", "upscore": "upscore"}

_ENTRIES = (
    NetworkEntry(
        "fcn32",
        "member",
        gflops=152.9,
        reach=233,
        build=_fcn32,
        released={f"trunk.{layer}": layer for layer in _ALEX_LAYERS} | {"score": "score_fr", "upscore": "upscore"},
        released_file="fcn32.pth",
        imagenet=_ALEX_IMAGENET,
        imagenet_file="alexnet.pth",
    ),
    NetworkEntry(
        "fcn16",
        "member",
        gflops=1102.3,
        reach=241,
        build=_fcn16,
        released=_VGG_RELEASED | {"up_final": "upsample16"},
        released_file="fcn16.pth",
        imagenet=_VGG_IMAGENET,
        imagenet_file="vgg16.pth",
    ),
    NetworkEntry(
        "fcn8",
        "member",
        gflops=1102.3,
        reach=250,
        build=_fcn8,
        released=_VGG_RELEASED | {"score_pool3": "score_pool3", "up_pool4": "upsample_pool4", "up_final": "upsample8"},
        released_file="fcn8.pth",
        imagenet=_VGG_IMAGENET,
        imagenet_file="vgg16.pth",
    ),
    NetworkEntry("fusion", "fusion", gflops=179.1, reach=208),  # the refined head on three members
    NetworkEntry("fusion_published", "fusion", gflops=157.1, reach=233, released=_FUSION_RELEASED),
)

NETWORKS: Mapping[str, NetworkEntry] = {entry.name: entry for entry in _ENTRIES}
MEMBERS: tuple[MemberName, ...] = tuple(name for name, entry in NETWORKS.items() if entry.kind == "member")  # type: ignore[misc]
FUSIONS: tuple[str, ...] = tuple(name for name, entry in NETWORKS.items() if entry.kind == "fusion")
