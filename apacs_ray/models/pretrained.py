"""Weights that a training starts from, other than random ones: ImageNet's, a released checkpoint's, or FCN-32's trunk.

The first two fit the published networks only (width 1). ImageNet networks expect RGB less a mean, over a deviation;
both are folded into the first convolution, so that ours still takes RGB in 0..1. Where the first convolution's frame of
zeros (100 px) enters, the result differs from theirs: their zeros are the mean color, ours are black.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import Any, Literal

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from apacs_ray.config.settings import Settings
from apacs_ray.config.training_settings import FusionSettings, MemberName, MembersSettings
from apacs_ray.errors import ApacsError, first_line
from apacs_ray.models.fusion import load_fcn32_trunk
from apacs_ray.models.registry import MEMBERS, NETWORKS, build_member
from apacs_ray.models.spec import ModelSpec, fusion_spec
from apacs_ray.models.weights import build, from_released, weights_bytes, without_wrappers
from apacs_ray.storage import Store, open_store

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB, as torchvision normalizes it
LARGEST = 2 << 30  # bytes of a checkpoint file


def pretrained_member(members: MembersSettings, name: MemberName) -> bytes | None:
    """Return safetensors of a whole member as `members.init` asks for; None when it starts at random.

    Raises:
        ApacsError: A file does not fit, or cannot be had.

    Returns:
        The content of a safetensors file, or None.
    """
    if members.init == "random":
        return None
    network = build_member(name, width=members.width, dropout=members.dropout)
    file = _member_file(members, name)
    state = download_imagenet(name) if file is None else _read(file)
    load_weights = load_imagenet if members.init == "imagenet" else load_released
    load_weights(network, name, state)
    return weights_bytes(network)


def pretrained_version(members: MembersSettings, name: MemberName) -> str | None:
    """Return the version of the file that a member starts from.

    Returns:
        None where it starts from no file.

    Raises:
        ApacsError: The file is not there.
    """
    return _version(_member_file(members, name), "members", members.init)


def published_fusion(fusion: FusionSettings, spec: ModelSpec) -> bytes | None:
    """Return safetensors of a fusion that starts as the released one; None when `fusion.init` does not ask for it.

    Raises:
        ApacsError: The file does not fit, or cannot be had.

    Returns:
        The content of a safetensors file, or None.
    """
    file = _fusion_file(fusion)
    if file is None:
        return None
    network = build(spec)
    state = _read(file)
    try:
        load_released(network, "fusion_published", state)
    except ApacsError as error:
        raise ApacsError(
            f"fusion.checkpoint: {fusion.checkpoint}: {error}; is it a fusion of fusion.members?"
        ) from error
    return weights_bytes(network)


def published_fusion_version(fusion: FusionSettings) -> str | None:
    """Return the version of the file that the fusion starts from.

    Returns:
        None where it starts from no file.

    Raises:
        ApacsError: The file is not there.
    """
    return _version(_fusion_file(fusion), "fusion", fusion.init)


def require_pretrained(settings: Settings) -> None:
    """Check the files that training starts from, before hours are spent on what comes before it.

    Raises:
        ApacsError: A file is not there, or does not fit the fusion.
    """
    for name in MEMBERS:
        pretrained_version(settings.members, name)
    published_fusion(settings.fusion, fusion_spec(settings.fusion, settings.fusion.width))


def pretrained_fusion(store: Store, spec: ModelSpec, trunk: Literal["random", "fcn32"], seed: int) -> bytes | None:
    """Return safetensors of a fusion that starts on the trunk of the run's FCN-32; None when it starts at random."""
    if trunk == "random":
        return None
    torch.manual_seed(seed)
    network = build(spec)
    load_fcn32_trunk(network, load_tensors(store.read("members/fcn32/model.safetensors")), spec.heatmap_init)
    return weights_bytes(network)


def read_checkpoint(content: bytes, name: str) -> Mapping[str, Any]:
    """Return the state dict in a `.pth` file, tensors only (`weights_only`); `name` is that of the file.

    Raises:
        ApacsError: The file is too large, or holds anything else.

    Returns:
        Tensors on the CPU by name.
    """
    size = max(len(content), _unpacked(content, name))
    if size > LARGEST:
        raise ApacsError(f"{name}: {size} bytes; a checkpoint of at most {LARGEST} is read")
    if not content:
        raise ApacsError(f"{name}: an empty file; fetch the checkpoint again")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise whatever it likes
        raise ApacsError(f"{name}: no checkpoint of tensors: {first_line(error)}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):  # as training scripts keep it
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ApacsError(f"{name}: expected a state dict of tensors, found a {type(state).__name__}")
    return without_wrappers(state)


def _unpacked(content: bytes, name: str) -> int:
    """Bytes of the parts of a `.pth`, which is a ZIP file; 0 for those of old that are none."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as parts:
            return sum(part.file_size for part in parts.infolist())
    except zipfile.BadZipFile:
        return 0
    except (ValueError, LookupError, NotImplementedError, OSError) as error:
        raise ApacsError(f"{name}: no checkpoint of tensors: {first_line(error)}") from error


def load_imagenet(network: nn.Module, name: MemberName, state: Mapping[str, Any]) -> None:
    """Put torchvision's AlexNet (FCN-32) or VGG-16 (FCN-16, FCN-8) into a member's trunk; the rest stays as it is.

    The classifier's first layers become the convolutions fc6 and fc7.

    Raises:
        ApacsError: A tensor is missing or does not fit.
    """
    wanted = network.state_dict()
    tensors: dict[str, Tensor] = {}
    for ours, theirs in NETWORKS[name].imagenet.items():
        for part in ("weight", "bias"):
            if f"{theirs}.{part}" not in state:
                raise ApacsError(f"{name}: the ImageNet weights lack {theirs}.{part}")
            tensor, target = state[f"{theirs}.{part}"].float(), wanted[f"{ours}.{part}"]
            if tensor.numel() != target.numel():
                shapes = f"{tuple(tensor.shape)} does not fit {tuple(target.shape)}"
                raise ApacsError(f"{name}: {theirs}.{part} {shapes}; pretrained weights need members.width 1.0")
            tensors[f"{ours}.{part}"] = tensor.reshape(target.shape)
    first = next(iter(NETWORKS[name].imagenet))
    mean, deviation = torch.tensor(MEAN)[:, None, None], torch.tensor(DEVIATION)[:, None, None]
    weight = tensors[f"{first}.weight"] / deviation
    tensors[f"{first}.bias"] = tensors[f"{first}.bias"] - (weight * mean).sum(dim=(1, 2, 3))
    tensors[f"{first}.weight"] = weight
    network.load_state_dict(tensors, strict=False)


def load_released(network: nn.Module, name: str, state: Mapping[str, Any]) -> None:
    """Put a released checkpoint into the network `name` of the registry. Raises ApacsError when it does not fit."""
    tensors = from_released(name, state)
    for key, value in network.state_dict().items():
        if tensors[key].shape != value.shape:
            raise ApacsError(
                f"{name}: {key} of the checkpoint has shape {tuple(tensors[key].shape)}, not {tuple(value.shape)}"
            )
    network.load_state_dict(tensors)


def download_imagenet(name: MemberName) -> Mapping[str, Any]:
    """Return ImageNet weights by torchvision's own download. Raises ApacsError when there is no way to them."""
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    weights = AlexNet_Weights.IMAGENET1K_V1 if name == "fcn32" else VGG16_Weights.IMAGENET1K_V1
    try:
        state: Mapping[str, Any] = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # torch.hub's for a file whose hash is another
        file = NETWORKS[name].imagenet_file
        raise ApacsError(
            f"{weights.url}: cannot be downloaded ({error}); members.checkpoint FOLDER takes {file} from there"
        ) from error
    return state


def _member_file(members: MembersSettings, name: MemberName) -> tuple[Store, str] | None:
    """The store and the name in it of the file that a member starts from."""
    if members.init == "random" or members.checkpoint is None:
        return None
    entry = NETWORKS[name]
    return open_store(members.checkpoint), entry.imagenet_file if members.init == "imagenet" else entry.released_file


def _fusion_file(fusion: FusionSettings) -> tuple[Store, str] | None:
    if fusion.init == "random" or fusion.checkpoint is None:
        return None
    folder, slash, name = fusion.checkpoint.rpartition("/")
    return open_store(folder or slash or "."), name


def _version(file: tuple[Store, str] | None, section: str, init: str) -> str | None:
    if file is None:
        return None
    store, name = file
    version = store.version(name)
    if version is None:
        raise ApacsError(f"{section}.checkpoint: {store.uri_of(name)}: no such file, which init {init} needs")
    return version


def _read(file: tuple[Store, str]) -> Mapping[str, Any]:
    store, name = file
    try:
        return read_checkpoint(store.read_small(name, LARGEST), name)
    except FileNotFoundError as error:
        raise ApacsError(f"{store.uri_of(name)}: no such file; name the released checkpoint") from error
    except OSError as error:  # a folder, or it may not be read
        raise ApacsError(f"{store.uri_of(name)}: cannot be read ({error}); give a file that may be read") from error
