"""Training checkpoints: model and optimizer as safetensors, the rest as JSON that is written last. No pickle.

Dropout, augmentation and order derive from (seed, epoch, step), so a state needs no generator: training that
goes on from it equals training that was never interrupted.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apacs_ray.errors import ApacsError
from apacs_ray.storage import file_facts
from apacs_ray.training.history import EpochPart, EpochRecord

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
LAST = "last."  # of the names of the weights in training, in the optimizer's file, where the model's file has averages


@dataclass(frozen=True)
class TrainState:
    """The content of a checkpoint as live objects; `part` is the epoch in progress, None at the end of one.

    `average` holds the moving average of the weights, where one is kept.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    history: tuple[EpochRecord, ...]
    part: EpochPart | None = None
    average: nn.Module | None = None


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint, copied to the host: training may go on while it is written.

    `weights` are as in `plain_state`, the averages where there are some; `moments` the tensors of the optimizer by
    `<parameter>.<name>`, and then the weights in training by `last.<name>`; `tree` is `state.json` but for the facts
    about files.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    tree: dict[str, Any]


def snapshot(state: TrainState) -> Snapshot:
    """Copy a training's state to the host."""
    moments, rest = _flatten(state.optimizer.state_dict())
    history = [asdict(record) for record in state.history]
    epoch = state.part.epoch if state.part else history[-1]["epoch"]
    part = asdict(state.part) if state.part else None
    tree = {"epoch": epoch, "part": part, "history": history, "optimizer": rest}
    if state.average is None:
        return Snapshot(plain_state(state.model), moments, tree)
    last = {f"{LAST}{name}": value for name, value in plain_state(state.model).items()}
    return Snapshot(plain_state(state.average), {**moments, **last}, tree)


def save_state(folder: Path, state: Snapshot) -> None:
    """Write a checkpoint to a local folder; `state.json`, with size and hash of the others, comes last.

    Raises:
        ApacsError: It cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state.weights, folder / MODEL)
        save_file(state.moments, folder / OPTIMIZER)
        tree = {**state.tree, "files": {name: file_facts(folder / name) for name in (MODEL, OPTIMIZER)}}
        (folder / STATE).write_text(json.dumps(tree, indent=1))
    except (OSError, SafetensorError) as error:
        raise ApacsError(
            f"{folder}: cannot write a checkpoint ({error}); make room there, or set TMPDIR to a larger disk"
        ) from error


def load_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None = None
) -> TrainState:
    """Put a checkpoint into `model`, `optimizer` and, where one is kept, the `average`.

    Returns:
        All, with the history and the epoch in progress.

    Raises:
        ApacsError: A file is missing or damaged, or of a training with other settings; all are left as they were.
    """
    tree = _read_tree(folder / STATE)
    for name in (MODEL, OPTIMIZER):
        if not (folder / name).is_file() or file_facts(folder / name) != tree["files"].get(name):
            raise ApacsError(f"{folder / name}: damaged checkpoint (size or hash is not what {STATE} says)")
    kept, tensors = load_file(folder / MODEL), load_file(folder / OPTIMIZER)
    last = {name.removeprefix(LAST): tensors.pop(name) for name in list(tensors) if name.startswith(LAST)}
    if bool(last) != (average is not None):
        raise ApacsError(f"{folder / OPTIMIZER}: of a training with another setting of ema than this one")
    bare = bare_model(model)
    expected = {name: value.shape for name, value in bare.state_dict().items()}
    for weights in (kept, last or kept):
        if expected != {name: value.shape for name, value in weights.items()}:
            raise ApacsError(f"{folder / MODEL}: the weights belong to another network than the one in training")
    if average is not None:
        average.load_state_dict(kept)
    bare.load_state_dict(last or kept)
    optimizer.load_state_dict(_unflatten(tensors, tree["optimizer"]))
    _restore_layout(optimizer)
    history = tuple(EpochRecord(**record) for record in tree["history"])
    part = tree.get("part")
    in_progress = EpochPart(**{**part, "sums": tuple(part["sums"])}) if part else None
    return TrainState(model, optimizer, history, in_progress, average)


def bare_model(model: nn.Module) -> nn.Module:
    """Return the network itself, without the wrapper that DDP puts around it."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict on the CPU, contiguous, without a DDP wrapper's prefix."""
    return {name: _copied(value) for name, value in bare_model(model).state_dict().items()}


def _restore_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give moments the strides of their parameter: fused optimizers walk both in memory order, unchecked."""
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _read_tree(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ApacsError(f"{path}: incomplete checkpoint ({error})") from error
    if not isinstance(tree, dict) or not {"files", "history", "optimizer"} <= set(tree):
        raise ApacsError(f"{path}: not the state of a training")
    return tree


def _copied(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, scalars = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = _copied(value)
            else:
                scalars[f"{index}.{name}"] = value
    return tensors, {"scalars": scalars, "groups": state["param_groups"]}


def _unflatten(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **rest["scalars"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": rest["groups"]}
