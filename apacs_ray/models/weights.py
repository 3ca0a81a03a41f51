"""Models on disk: weights as safetensors, what they are in `ModelSpec`. Nothing is ever unpickled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from apacs_ray.errors import ApacsError
from apacs_ray.models.fusion import START, build_fusion
from apacs_ray.models.registry import NETWORKS, build_member
from apacs_ray.models.spec import ModelSpec

_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")


def build(spec: ModelSpec) -> nn.Module:
    """Return a freshly initialized network. Raises ApacsError when there is no such member."""
    if spec.kind == "member":
        return build_member(spec.name, width=spec.width, dropout=spec.dropout)
    return build_fusion(
        spec.head,
        spec.members,
        width=spec.width,
        dropout=spec.dropout,
        heatmap_init=spec.heatmap_init,
        start=spec.start,
    )


def weights_bytes(model: nn.Module) -> bytes:
    """Return the weights as safetensors (contiguous, on the CPU), without a DDP wrapper's prefix."""
    tensors = without_wrappers(model.state_dict())
    return save_tensors({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def load_model(weights: bytes, spec: ModelSpec) -> nn.Module:
    """Return the trained network that `spec` describes, in eval mode. Raises ApacsError naming what does not fit."""
    with _Undrawn():
        model = build(spec)
    try:
        tensors = load_tensors(weights)
    except SafetensorError as error:
        raise ApacsError(f"{spec.name}: no safetensors file ({error})") from error
    _assign(model, tensors, spec.name)
    return model.eval()


class _Undrawn(TorchFunctionMode):
    """Weights are left as they are in memory, where a loaded file replaces them.

    On the meta device torch would draw them in Python, for which it first imports its compiler (1.2 s).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _assign(model: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    expected = model.state_dict()
    tensors = {key: value for key, value in expected.items() if key.startswith(START)} | dict(tensors)
    for key, value in expected.items():
        if key not in tensors:
            raise ApacsError(f"{name}: the weights lack {key}; do they belong to another architecture?")
        if tensors[key].shape != value.shape:
            shapes = f"{tuple(tensors[key].shape)}, the network wants {tuple(value.shape)}"
            raise ApacsError(f"{name}: {key} has shape {shapes}; do width and head in model.json fit?")
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise ApacsError(f"{name}: the weights hold {extra[0]}, which the network does not have")
    # half or double precision, as other tools store weights, would end in the first convolution
    whole = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    model.load_state_dict(whole, assign=True)


def without_wrappers(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without the prefixes of DDP (`module.`) and of `torch.compile` (`_orig_mod.`)."""
    return {_WRAPPERS.sub("", key): value for key, value in state.items()}


def from_released(name: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a released checkpoint under our names.

    Args:
        name: A network of the registry that has been released.
        state: The checkpoint; keys may carry the prefixes of wrappers.

    Raises:
        ApacsError: A tensor is missing.

    Returns:
        Tensors by our names.
    """
    state = without_wrappers(state)
    renamed = {}
    for ours, theirs in NETWORKS[name].released.items():
        for part in ("weight", "bias"):
            if part == "bias" and ours.startswith("up"):
                continue
            key = f"{theirs}.{part}"
            if key not in state:
                raise ApacsError(f"{name}: the released checkpoint lacks {key}")
            renamed[f"{ours}.{part}"] = state[key]
    return renamed
