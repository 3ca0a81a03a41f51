"""Trained networks on single tiles: each image is read once and given to all networks, as in the paper."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from apacs_ray.config.settings import MemberName
from apacs_ray.errors import ApacsError
from apacs_ray.evaluation.predictions import sigmoid
from apacs_ray.models.ensemble import Ensemble
from apacs_ray.models.spec import ModelSpec
from apacs_ray.models.weights import load_model
from apacs_ray.storage import Store

Array = npt.NDArray[np.float32]


class Predictor:
    """An ensemble on one device, with a fixed number of threads and precision, one tile at a time."""

    def __init__(self, ensemble: Ensemble, *, threads: int, precision: str) -> None:
        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._half = precision == "bfloat16"
        self._ensemble = ensemble.to(self._device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        if self._half:
            _halve_convolutions(self._ensemble)

    @classmethod
    def load(cls, store: Store, folders: Mapping[str, str], *, threads: int, precision: str) -> Predictor:
        """Load `folders` (model key -> folder in the store): three members, and fusions by key."""
        return cls(load_ensemble(store, folders), threads=threads, precision=precision)

    @torch.inference_mode()
    def logits(self, rgb: npt.NDArray[np.uint8]) -> dict[str, Array]:
        """Run all networks on one tile.

        Args:
            rgb: (H, W, 3) uint8.

        Returns:
            Model key -> logits (H, W) float32.

        Raises:
            ApacsError: The GPU's memory is too small for it.
        """
        try:
            return self._logits(rgb)
        except torch.OutOfMemoryError as error:
            raise ApacsError(
                f"the GPU's memory is too small for all networks on a tile of {rgb.shape[1]} x {rgb.shape[0]} px: set "
                f"evaluate.precision bfloat16, or a smaller tiles.size ({str(error).splitlines()[0][:200]})"
            ) from error

    def _logits(self, rgb: npt.NDArray[np.uint8]) -> dict[str, Array]:
        return {name: output[0].cpu().numpy() for name, output in self.batch(self.to_device(rgb[None])).items()}

    def to_device(self, rgb: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Return pictures (N, H, W, 3) uint8 as `batch` takes them."""
        pixels = torch.from_numpy(np.array(rgb))  # a copy: decoded pictures are read-only
        if self._device.type == "cuda":
            pixels = pixels.pin_memory().to(self._device, non_blocking=True)
        return pixels.permute(0, 3, 1, 2)  # channels_last, as pictures are stored

    @torch.inference_mode()
    def batch(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run all networks on pictures of one size.

        Args:
            images: (N, 3, H, W) uint8, on the device.

        Returns:
            Model key -> logits (N, H, W) float32, on the device.
        """
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
            outputs = self._ensemble(images.float() / 255)
        return {name: output[:, 0].float() for name, output in outputs.items()}

    def probabilities(self, rgb: npt.NDArray[np.uint8]) -> dict[str, Array]:
        """Return probabilities (H, W) float32 in 0..1 of every network."""
        return {name: sigmoid(logits) for name, logits in self.logits(rgb).items()}


def _halve_convolutions(network: nn.Module) -> None:
    """Keep the weights that autocast would cast for every tile as bfloat16; scores and upsampling stay float32."""
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module.to(torch.bfloat16)


def load_ensemble(store: Store, folders: Mapping[str, str]) -> Ensemble:
    """Return the networks in `folders` (model key -> folder in the store): three members, and fusions by key."""
    members: dict[MemberName, torch.nn.Module] = {}
    fusions: dict[str, tuple[ModelSpec, torch.nn.Module]] = {}
    for key, folder in folders.items():
        spec = ModelSpec.from_json(store.read(f"{folder}/model.json"))
        model = load_model(store.read(f"{folder}/model.safetensors"), spec)
        if spec.kind == "member":
            members[key] = model  # type: ignore[index]
        else:
            fusions[key] = (spec, model)
    return Ensemble(members, fusions)
