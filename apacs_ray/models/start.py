"""Weights that training starts from, other than random ones: ImageNet's, or a released checkpoint's.

Both fit the published networks only (width 1). ImageNet networks expect RGB less a mean, over a deviation; both are
folded into the first convolution, so that ours still takes RGB in 0..1. Where the first convolution's frame of zeros
(100 px) enters, the result differs from theirs: their zeros are the mean color, ours are black.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any, Literal

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from apacs_ray.config.settings import MemberName
from apacs_ray.errors import ApacsError
from apacs_ray.models.fusion import start_from_fcn32
from apacs_ray.models.spec import ModelSpec
from apacs_ray.models.weights import build, from_published, weights_bytes
from apacs_ray.storage import Store

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB, as torchvision normalizes it
LARGEST = 2 << 30  # bytes of a checkpoint file
IMAGENET_FILES: dict[MemberName, str] = {"fcn32": "alexnet.pth", "fcn16": "vgg16.pth", "fcn8": "vgg16.pth"}
RELEASED_FILES: dict[MemberName, str] = {"fcn32": "fcn32.pth", "fcn16": "fcn16.pth", "fcn8": "fcn8.pth"}

_ALEX = {"conv1": 0, "conv2": 3, "conv3": 6, "conv4": 8, "conv5": 10}
_VGG = {
    f"block{block}.{2 * conv}": index
    for (block, conv), index in zip(
        ((block, conv) for block, convs in enumerate((2, 2, 3, 3, 3), 1) for conv in range(convs)),
        (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
        strict=True,
    )
}
_DENSE = {"fcn32": (1, 4), "fcn16": (0, 3), "fcn8": (0, 3)}  # the classifier's layers that become fc6 and fc7


def read_checkpoint(content: bytes, name: str) -> Mapping[str, Any]:
    """The state dict of a `.pth` file, tensors only (`weights_only`). Raises ApacsError."""
    size = max(len(content), _unpacked(content))
    if size > LARGEST:
        raise ApacsError(f"{name}: {size} bytes; a checkpoint of at most {LARGEST} is read")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise ApacsError(f"{name}: no checkpoint of tensors: {str(error).splitlines()[0][:200]}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ApacsError(f"{name}: expected a state dict of tensors, found a {type(state).__name__}")
    return state


def _unpacked(content: bytes) -> int:
    """Bytes of the parts of a `.pth`, which is a ZIP file; 0 for those of old that are none."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as parts:
            return sum(part.file_size for part in parts.infolist())
    except zipfile.BadZipFile:
        return 0


def start_from_imagenet(network: nn.Module, name: MemberName, state: Mapping[str, Any]) -> None:
    """Put torchvision's AlexNet (FCN-32) or VGG-16 (FCN-16, FCN-8) into a member's trunk; the rest stays as it is.

    The classifier's first layers become the convolutions fc6 and fc7. Raises ApacsError when a tensor does not fit.
    """
    wanted = network.state_dict()
    layers = {f"trunk.{ours}": f"features.{index}" for ours, index in (_ALEX if name == "fcn32" else _VGG).items()}
    layers |= {f"trunk.fc{number}": f"classifier.{index}" for number, index in zip((6, 7), _DENSE[name], strict=True)}
    tensors: dict[str, Tensor] = {}
    for ours, theirs in layers.items():
        for part in ("weight", "bias"):
            if f"{theirs}.{part}" not in state:
                raise ApacsError(f"{name}: the ImageNet weights lack {theirs}.{part}")
            tensor, target = state[f"{theirs}.{part}"].float(), wanted[f"{ours}.{part}"]
            if tensor.numel() != target.numel():
                shapes = f"{tuple(tensor.shape)} does not fit {tuple(target.shape)}"
                raise ApacsError(f"{name}: {theirs}.{part} {shapes}; pretrained weights need members.width 1.0")
            tensors[f"{ours}.{part}"] = tensor.reshape(target.shape)
    first = "trunk.conv1" if name == "fcn32" else "trunk.block1.0"
    mean, deviation = torch.tensor(MEAN)[:, None, None], torch.tensor(DEVIATION)[:, None, None]
    weight = tensors[f"{first}.weight"] / deviation
    tensors[f"{first}.bias"] = tensors[f"{first}.bias"] - (weight * mean).sum(dim=(1, 2, 3))
    tensors[f"{first}.weight"] = weight
    network.load_state_dict(tensors, strict=False)


def start_from_released(network: nn.Module, name: MemberName, state: Mapping[str, Any]) -> None:
    """Put a released checkpoint into a member. Raises ApacsError when it does not fit."""
    tensors = from_published(name, state)
    for key, value in network.state_dict().items():
        if tensors[key].shape != value.shape:
            raise ApacsError(
                f"{name}: {key} of the checkpoint has shape {tuple(tensors[key].shape)}, not {tuple(value.shape)}"
            )
    network.load_state_dict(tensors)


def fusion_weights(store: Store, spec: ModelSpec, trunk: Literal["random", "fcn32"], seed: int) -> bytes | None:
    """Safetensors of a fusion that starts on the trunk of the run's FCN-32; None when it starts at random."""
    if trunk == "random":
        return None
    torch.manual_seed(seed)
    network = build(spec)
    start_from_fcn32(network, load_tensors(store.read("members/fcn32/model.safetensors")), spec.heatmap_init)
    return weights_bytes(network)


def download_imagenet(name: MemberName) -> Mapping[str, Any]:
    """ImageNet weights by torchvision's own download. Raises ApacsError when there is no way to them."""
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    weights = AlexNet_Weights.IMAGENET1K_V1 if name == "fcn32" else VGG16_Weights.IMAGENET1K_V1
    try:
        state: Mapping[str, Any] = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # torch.hub's for a file whose hash is another
        file = IMAGENET_FILES[name]
        raise ApacsError(
            f"{weights.url}: cannot be downloaded ({error}); members.checkpoint FOLDER takes {file} from there"
        ) from error
    return state
