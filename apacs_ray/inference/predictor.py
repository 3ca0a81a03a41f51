"""Trained networks on single tiles: each image is read once and given to all networks, as in the paper."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from apacs_ray.config.training_settings import MemberName
from apacs_ray.errors import ApacsError, first_line
from apacs_ray.evaluation.predictions import sigmoid
from apacs_ray.models.ensemble import Ensemble
from apacs_ray.models.layers import Score
from apacs_ray.models.registry import FUSIONS
from apacs_ray.models.spec import ModelSpec
from apacs_ray.models.views import over_views
from apacs_ray.models.weights import load_model
from apacs_ray.runs.markers import Marker, require_current
from apacs_ray.runs.run import RUN_JSON
from apacs_ray.storage import Store
from apacs_ray.training.device import set_arithmetic

Array = npt.NDArray[np.float32]


class Predictor:
    """An ensemble on one device, with a fixed number of threads and precision."""

    def __init__(self, ensemble: Ensemble, *, threads: int, precision: str) -> None:
        torch.set_num_threads(threads)
        set_arithmetic(precision)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._half = precision == "bfloat16"
        self._ensemble = ensemble.to(self._device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        if self._half:
            _halve_convolutions(self._ensemble)

    @classmethod
    def load(cls, store: Store, folders: Mapping[str, str], *, threads: int, precision: str) -> Predictor:
        """Load `folders` as `load_ensemble` does, which also says what it raises."""
        return cls(load_ensemble(store, folders), threads=threads, precision=precision)

    @torch.inference_mode()
    def logits(self, rgb: npt.NDArray[np.uint8], views: int = 1) -> dict[str, Array]:
        """Run all networks on one tile.

        Args:
            rgb: (H, W, 3) uint8.
            views: As `batch` takes it.

        Returns:
            Model key -> logits (H, W) float32.

        Raises:
            ApacsError: The GPU's memory is too small for it.
        """
        return self.logits_of([rgb], views)[0]

    @torch.inference_mode()
    def logits_of(self, tiles: Sequence[npt.NDArray[np.uint8]], views: int = 1) -> list[dict[str, Array]]:
        """Run all networks on tiles of one size together; where a GPU's memory is too small for all, on fewer.

        Args:
            tiles: (H, W, 3) uint8 each.
            views: As `batch` takes it.

        Returns:
            What `logits` returns, for each.

        Raises:
            ApacsError: The GPU's memory is too small for one of them.
        """
        try:
            outputs = self.batch(self.to_device(tiles), views)
            arrays = {name: output.cpu().numpy() for name, output in outputs.items()}
            return [{name: array[number] for name, array in arrays.items()} for number in range(len(tiles))]
        except torch.OutOfMemoryError as error:
            height, width = tiles[0].shape[:2]
            if len(tiles) == 1:
                raise ApacsError(
                    f"the GPU's memory is too small for all networks on a tile of {width} x {height} px: set "
                    f"evaluate.precision bfloat16, or a smaller tiles.size ({first_line(error)})"
                ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = len(tiles) // 2
        return self.logits_of(tiles[:half], views) + self.logits_of(tiles[half:], views)

    def to_device(self, tiles: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
        """Return pictures of one size, (H, W, 3) uint8 each, as `batch` takes them."""
        pixels = torch.from_numpy(np.stack(tiles))  # a copy: decoded pictures are read-only
        if self._device.type == "cuda":
            pixels = pixels.pin_memory().to(self._device, non_blocking=True)
        return pixels.permute(0, 3, 1, 2)  # channels_last, as pictures are stored

    @torch.inference_mode()
    def batch(self, images: torch.Tensor, views: int = 1) -> dict[str, torch.Tensor]:
        """Run all networks on pictures of one size.

        Args:
            images: (N, 3, H, W) uint8, on the device.
            views: Of each, over which logits are averaged, as `over_views` takes it.

        Returns:
            Model key -> logits (N, H, W) float32, on the device.
        """
        return {name: output[:, 0] for name, output in over_views(self._run, images, views).items()}

    def _run(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits (N, 1, H, W) float32 of pictures as they are."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
            outputs = self._ensemble(images.float() / 255)
        return {name: output.float() for name, output in outputs.items()}

    def probabilities(self, rgb: npt.NDArray[np.uint8], views: int = 1) -> dict[str, Array]:
        """Return probabilities (H, W) float32 in 0..1 of every network, of logits as `logits` returns them."""
        return {name: sigmoid(logits) for name, logits in self.logits(rgb, views).items()}


def _halve_convolutions(network: nn.Module) -> None:
    """Keep the weights that autocast would cast for every tile as bfloat16; scores and upsampling stay float32."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module, Score):
            module.to(torch.bfloat16)


def load_ensemble(store: Store, folders: Mapping[str, str]) -> Ensemble:
    """Load three members, and fusions by key.

    Args:
        store: A run, or a folder of models.
        folders: Model key -> folder in the store.

    Raises:
        ApacsError: The models of a run are not of one piece, or what is there is no model.
        FileNotFoundError: A model is not there.

    Returns:
        The networks, in eval mode.
    """
    members: dict[MemberName, torch.nn.Module] = {}
    fusions: dict[str, tuple[ModelSpec, torch.nn.Module]] = {}
    for (key, folder), weights in zip(folders.items(), read_weights(store, folders.values()), strict=True):
        spec = ModelSpec.from_json(store.read(f"{folder}/model.json"))
        model = load_model(weights, spec)
        if spec.kind == "member":
            members[key] = model  # type: ignore[index]
        else:
            fusions[key] = (spec, model)
    return Ensemble(members, fusions)


def read_weights(store: Store, folders: Iterable[str]) -> Iterator[bytes]:
    """Read the weights of models, of a run only what it committed and what no later command made outdated.

    Everything that uses a run's models reads them here. The members of folds are for the stage that trains them.

    Args:
        store: A run, or a folder of models, of which nothing is known.
        folders: In the store.

    Yields:
        Of each folder the content of its safetensors file.

    Raises:
        ApacsError: A stage of the run is not done, an earlier one was done anew since, or the file is another.
        FileNotFoundError: A model is not there.
    """
    markers: dict[str, Marker] = {}
    is_run = store.version(RUN_JSON) is not None
    for folder in folders:
        weights = store.read(f"{folder}/model.safetensors")
        stage = "members" if folder.startswith("members/") else "fusion" if folder in FUSIONS else None
        if is_run and stage is not None:
            if stage not in markers:
                markers[stage] = require_current(store, stage)
            marker = markers[stage]
            hashes = {network["folder"]: network["sha256"] for network in marker.result["networks"].values()}
            if hashlib.sha256(weights).hexdigest() != hashes.get(folder):
                raise ApacsError(
                    f"{store.uri_of(folder)}/model.safetensors: not the weights that {marker.stage} committed; run "
                    f"python pipelines/{marker.script} with the options of the run"
                )
        yield weights
