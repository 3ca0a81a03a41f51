"""Commit markers: what they hold, damaged ones, chains of them, and the weights that they name by hash."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apacs_ray.config.settings import Settings
from apacs_ray.errors import ApacsError
from apacs_ray.inference.predictor import Predictor, read_weights
from apacs_ray.models.registry import MEMBERS
from apacs_ray.models.spec import ModelSpec
from apacs_ray.runs.markers import MARKER, Counts, Marker, read_marker, require_current
from apacs_ray.runs.run import RUN_JSON
from apacs_ray.stages.train_members import member_network
from apacs_ray.stages.train_networks import KEPT, Network, done_mark, encode_mark, is_trained
from apacs_ray.storage import LocalStore


def commit(store: LocalStore, folder: str, fingerprint: str, **inputs: str) -> None:
    marker = Marker(f"stage of {folder}", fingerprint, "lease", 0.0, 1.0, Counts(1, 1), {}, inputs, f"{folder}.py")
    store.write(f"{folder}/{MARKER}", marker.encode())


@given(fingerprint=st.text("0123456789abcdef", min_size=16, max_size=16), rows=st.integers(0, 10**9))
def test_a_marker_comes_back(fingerprint: str, rows: int) -> None:
    marker = Marker("ingest", fingerprint, "me", 1.5, 2.5, Counts(rows, rows), {"tiles": {"train": rows}}, {"a": "b"})
    assert Marker.decode(marker.encode()) == marker


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"stage": "ingest"}', b'{"counts": 3}', b"\xff", b"[" * 99999]
)
def test_a_damaged_marker_commits_nothing(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no marker of this version"):
        Marker.decode(content)
    store = LocalStore(str(tmp_path))
    store.write(f"tiles/{MARKER}", content)
    assert read_marker(store, "tiles") is None


def test_a_result_without_a_number_is_no_json() -> None:
    with pytest.raises(ValueError, match="JSON"):
        Marker("s", "f", "l", 0.0, 0.0, Counts(0, 0), {"val_dice": float("nan")}).encode()


def test_a_chain_is_checked_to_its_begin(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    commit(store, "tiles", "1")
    commit(store, "members", "2", tiles="1")
    commit(store, "fusion", "3", members="2", tiles="1")
    assert require_current(store, "fusion").fingerprint == "3"
    commit(store, "members", "4", tiles="1")
    with pytest.raises(
        ApacsError, match=r"stage of fusion is outdated, as stage of members was done anew; .*fusion\.py"
    ):
        require_current(store, "fusion")
    commit(store, "fusion", "5", members="4", tiles="1")
    commit(store, "tiles", "6")
    with pytest.raises(
        ApacsError, match=r"stage of members is outdated, as stage of tiles was done anew; .*members\.py"
    ):
        require_current(store, "fusion")
    store.delete(f"tiles/{MARKER}")
    with pytest.raises(ApacsError, match="nothing is committed in tiles/"):
        require_current(store, "members")


MODELS = ("members/fcn32", "members/fcn8", "fusion", "fusion_published")


def commit_models(store: LocalStore, stage: str, fingerprint: str, **inputs: str) -> None:
    """Commit a stage's models, whose weights are their folder and the fingerprint."""
    networks = {}
    for folder in (folder for folder in MODELS if folder.startswith(stage)):
        weights = f"{folder} {fingerprint}".encode()
        store.write(f"{folder}/model.safetensors", weights)
        networks[folder] = {"folder": folder, "sha256": hashlib.sha256(weights).hexdigest()}
    marker = Marker(
        stage, fingerprint, "l", 0.0, 0.0, Counts(1, 1), {"networks": networks}, inputs, f"train_{stage}.py"
    )
    store.write(f"{stage}/{MARKER}", marker.encode())


def test_models_of_a_run_are_read_when_they_are_of_one_piece(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    commit_models(store, "members", "1")
    commit_models(store, "fusion", "2", members="1")
    store.write(RUN_JSON, b"{}")
    weights = [f"{folder} {1 if 'members' in folder else 2}".encode() for folder in MODELS]
    assert list(read_weights(store, MODELS)) == weights

    store.write("members/fcn8/model.safetensors", b"others")
    with pytest.raises(ApacsError, match=r"fcn8/model\.safetensors: not the weights .*/train_members\.py"):
        list(read_weights(store, MODELS))
    assert list(read_weights(store, MODELS[:1])) == weights[:1]

    commit_models(store, "members", "3")  # trained anew
    with pytest.raises(ApacsError, match=r"fusion is outdated, as members was done anew; .*train_fusion\.py"):
        list(read_weights(store, MODELS))
    store.delete(f"members/{MARKER}")  # being trained anew
    with pytest.raises(ApacsError, match=r"nothing is committed in members/"):
        list(read_weights(store, MODELS))

    store.delete(RUN_JSON)  # models that were copied out of their run
    assert len(list(read_weights(store, MODELS))) == 4
    with pytest.raises(FileNotFoundError):
        list(read_weights(store, ["fusion_other"]))


def test_a_predictor_takes_no_models_of_two_trainings(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    store = LocalStore(str(tmp_path / "run"))
    folders = {name: f"members/{name}" for name in MEMBERS} | {"fusion": "fusion"}
    assert Predictor.load(store, folders, threads=1, precision="float32")
    marker = read_marker(store, "members")
    assert marker is not None
    store.write(f"members/{MARKER}", replace(marker, fingerprint="0" * 16).encode())
    with pytest.raises(ApacsError, match=r"is outdated, as train_members was done anew"):
        Predictor.load(store, folders, threads=1, precision="float32")


@pytest.mark.parametrize("changed", KEPT)
def test_a_done_mark_is_of_the_files_that_it_names(changed: str, tmp_path: Path) -> None:
    """Settings that are tried in turn (folds 2, 3, 2) train to the same folder, and may come to equal weights."""
    store = LocalStore(str(tmp_path))
    network: Network = member_network(Settings(), "fcn8", "heatmaps/folds/1/fcn8")
    assert isinstance(network.spec, ModelSpec)
    first = dict.fromkeys(KEPT, b"first")
    for fingerprint, kept in (("a" * 16, first), ("b" * 16, {**first, changed: b"second"})):
        assert not is_trained(store, network, fingerprint)
        for name, content in kept.items():
            store.write(f"{network.folder}/{name}", content)
        store.write(done_mark(network, fingerprint), encode_mark(kept))
        assert is_trained(store, network, fingerprint)
    assert not is_trained(store, network, "a" * 16)
    for earlier in (b"", hashlib.sha256(b"first").hexdigest().encode()):  # as earlier versions wrote it
        store.write(done_mark(network, "c" * 16), earlier)
        assert not is_trained(store, network, "c" * 16)
