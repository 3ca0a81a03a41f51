"""What a run has left: whether its records say only what is on disk, and how it differs from another run."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from apacs_ray.data.index_file import index_hash, index_path
from apacs_ray.data.shards import shard_paths
from apacs_ray.errors import ApacsError
from apacs_ray.models.spec import ModelSpec
from apacs_ray.runs.markers import MARKER, Marker, read_marker, require_current
from apacs_ray.runs.run import CLAIMS
from apacs_ray.stages.pipeline import STAGES
from apacs_ray.storage import LocalStore, Store
from apacs_ray.training.dataset import Heatmaps
from apacs_ray.training.history import read_history

SPLITS = ("train", "val", "test")
# of a marker, they differ from run to run; `device` is not known to a start that finds all epochs done
TIMES = ("started", "seconds", "lease", "shards_reused")


def lies(output: Path) -> list[str]:
    """Return what the records of a run say that is not on disk; nothing for a run that is of one piece.

    Every marker is held against the files that it is of, by hash or count, and `run.json` against the markers.

    Args:
        output: The run, which nobody writes now.

    Returns:
        A sentence each.
    """
    store = LocalStore(str(output))
    found = []
    for stage in STAGES:
        marker = read_marker(store, stage.folder)
        if marker is not None:
            try:
                found += [f"{stage.folder}/{MARKER}: {defect}" for defect in _CHECKS[stage.name](store, marker)]
            except (OSError, LookupError, ValueError, ApacsError) as error:
                found.append(f"{stage.folder}/{MARKER}: {type(error).__name__}: {error}")
    return found + list(_record_lies(store))


def _record_lies(store: Store) -> Iterator[str]:
    try:
        stages = json.loads(store.read("run.json"))["stages"]
    except FileNotFoundError:
        return
    for stage in STAGES:
        record = stages.get(stage.name, {})
        if record.get("state") not in CLAIMS:
            continue
        marker = read_marker(store, stage.folder)
        if marker is None or (marker.fingerprint, marker.result) != (record["fingerprint"], record["result"]):
            yield f"run.json: {stage.name} is {record['state']}, which no marker says"
            continue
        try:
            require_current(store, stage.folder)
        except ApacsError as error:
            yield f"run.json: {stage.name} is {record['state']}, but {error}"


def _tiles(store: Store, marker: Marker) -> Iterator[str]:
    for split in SPLITS:
        paths = shard_paths(store, "tiles", split)
        rows = sum(_rows(store, path) for path in paths)
        if rows != marker.result["tiles"][split]:
            yield f"{marker.result['tiles'][split]} {split} tiles, on disk are {rows}"
        yield from _others(paths, f"tiles/split={split}/{marker.fingerprint[:8]}-")
        index = store.read(index_path(split, marker.fingerprint))
        if index_hash(index) != marker.result["index"][split]:
            yield f"its {split} index is not the one on disk"
        if pq.read_metadata(pa.BufferReader(index)).num_rows != rows:
            yield f"{rows} {split} tiles on disk, its index has others"
    indices = {index_path(split, marker.fingerprint) for split in SPLITS}
    if {entry.path for entry in store.list("tiles/_index")} != indices:
        yield "its indices are not those on disk"
    rejects = [entry.path for entry in store.list("rejects")]
    if rejects != [f"rejects/ingest-{marker.fingerprint[:8]}.parquet"]:
        yield f"its rejects are not those on disk ({rejects})"
    if marker.result["unit"] == "slides":
        yield from _others([e.path for e in store.list("manifest")], f"manifest/{marker.fingerprint[:8]}/")


def _networks(store: Store, marker: Marker) -> Iterator[str]:
    for name, network in marker.result["networks"].items():
        if hashlib.sha256(store.read(f"{network['folder']}/model.safetensors")).hexdigest() != network["sha256"]:
            yield f"{name} has other weights than were committed"
        spec = ModelSpec.from_json(store.read(f"{network['folder']}/model.json"))
        history = read_history(store.read(f"{network['folder']}/history.csv").decode())
        said = {key: network[key] for key in ("epoch", "epochs", "val_dice")}
        if spec.metrics != said:
            yield f"{name} {said}, model.json {spec.metrics}"
        if sum(record.epoch >= 0 for record in history) != network["epochs"]:
            yield f"{name} of {network['epochs']} epochs, history.csv of {len(history)}"


def _heatmaps(store: Store, marker: Marker) -> Iterator[str]:
    paths = [path for split in SPLITS for path in shard_paths(store, "heatmaps", split)]
    rows = sum(_rows(store, path) for path in paths)
    if rows != marker.counts.rows_out:
        yield f"{marker.counts.rows_out} heatmaps, on disk are {rows}"
    tiles = read_marker(store, "tiles")
    if tiles is not None and marker.inputs["tiles"] == tiles.fingerprint:
        stored = Heatmaps((), marker.fingerprint)
        expected = {stored.path(path) for split in ("train", "val") for path in shard_paths(store, "tiles", split)}
        if expected != set(paths):
            yield f"shards {sorted(expected ^ set(paths))} are not beside tiles"


def _sweep(store: Store, marker: Marker) -> Iterator[str]:
    if yaml.safe_load(store.read("tune/best.yaml"))["fusion"] != marker.result["best"]:
        yield "another best setting than best.yaml"
    trials = len(list(csv.reader(io.StringIO(store.read("tune/trials.csv").decode())))) - 1
    if trials != marker.counts.rows_in:
        yield f"{marker.counts.rows_in} trials, trials.csv has {trials}"


def _evaluation(store: Store, marker: Marker) -> Iterator[str]:
    metrics = json.loads(store.read("evaluation/metrics.json"))
    if {model: row["dice"] for model, row in metrics.items()} != marker.result["dice"]:
        yield "other figures than metrics.json"
    if (rows := _rows(store, "evaluation/per_tile.parquet")) != marker.counts.rows_out:
        yield f"{marker.counts.rows_out} tiles, per_tile.parquet has {rows}"
    for name in ("comparison.json", "report.html"):
        store.read(f"evaluation/{name}")


_CHECKS: dict[str, Callable[[Store, Marker], Iterator[str]]] = {
    "ingest": _tiles,
    "train_members": _networks,
    "heatmaps": _heatmaps,
    "tune_fusion": _sweep,
    "train_fusion": _networks,
    "evaluate": _evaluation,
}


def _others(paths: list[str], prefix: str) -> Iterator[str]:
    for path in paths:
        if not path.startswith(prefix):
            yield f"{path} is of another fingerprint"


def _rows(store: Store, path: str) -> int:
    with store.open(path) as stream:
        return int(pq.read_metadata(stream).num_rows)


def differences(output: Path, expected: Path) -> list[str]:
    """Return the files of a run that are not as in another, missing ones and such that are too many among them.

    What a run writes of times, of its owner and of Ray's random names is not compared, nor is the text of reports.
    """
    ours, theirs = contents(output), contents(expected)
    return sorted(path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path))


def contents(output: Path) -> dict[str, Any]:
    """Return what is the same in equal runs of every file of a run, by its path."""
    return {
        path.relative_to(output).as_posix(): _content(path)
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name not in ("run.lock", ".run.lock.guard")
    }


def _content(path: Path) -> Any:
    if path.name == MARKER:
        return _without(json.loads(path.read_text()), TIMES)
    if path.name == "run.json":
        record = json.loads(path.read_text())
        stages = {
            name: {**_without(stage, TIMES), "state": "done" if stage["state"] in CLAIMS else stage["state"]}
            for name, stage in record["stages"].items()
        }
        return {"settings": record["settings"], "data": record["data"], "stages": stages}
    if path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        return sorted(str(_without(row, ("seconds", "trial_id"))) for row in rows)
    if path.name == "report.html" or "tfevents" in path.name:
        return "with times"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _without(tree: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(tree, dict):
        return {key: _without(value, keys) for key, value in tree.items() if key not in keys}
    return tree
