"""Curves for TensorBoard."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tensorboardX.crc32c import crc32c

from apacs_ray.storage import LocalStore
from apacs_ray.training.history import EpochRecord
from apacs_ray.training.tensorboard import read_events, write_curves, write_metrics

PATH = "tensorboard/members/fcn8/events.out.tfevents.curves"


def epochs(count: int, seconds: float = 2.0) -> tuple[EpochRecord, ...]:
    losses = [(epoch, 1 / (1 + epoch)) for epoch in range(count)]
    return tuple(
        EpochRecord(epoch, loss, 0.5, 2 * loss, 0.1 * epoch or math.nan, 1e-3, seconds) for epoch, loss in losses
    )


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def curve(store: LocalStore, tag: str) -> list[tuple[int, float]]:
    events = read_events(store.read(PATH))
    values = [(event.step, value) for event in events for value in event.summary.value]
    return [(step, round(value.simple_value, 6)) for step, value in values if value.tag == tag]


def test_every_epoch_has_its_point_and_an_undefined_dice_none(store: LocalStore) -> None:
    write_curves(store, "members/fcn8", epochs(3))
    assert curve(store, "loss/val") == [(0, 2.0), (1, 1.0), (2, 0.666667)]
    assert curve(store, "Dice/val") == [(1, 0.1), (2, 0.2)]


def test_a_longer_history_begins_with_the_same_bytes(store: LocalStore) -> None:
    """TensorBoard goes on reading where it stopped."""
    write_curves(store, "members/fcn8", epochs(2), {"lr": 0.1})
    before = store.read(PATH)
    write_curves(store, "members/fcn8", epochs(5), {"lr": 0.1})
    after = store.read(PATH)
    assert after.startswith(before)
    assert len(after) > len(before)


def test_a_new_training_in_the_same_folder_begins_anew(store: LocalStore) -> None:
    write_curves(store, "members/fcn8", epochs(5, seconds=1000))
    old = read_events(store.read(PATH))[0].wall_time
    write_curves(store, "members/fcn8", epochs(1))
    assert read_events(store.read(PATH))[0].wall_time > old
    assert curve(store, "loss/train") == [(0, 1.0)]


def test_every_model_has_its_test_metrics(store: LocalStore) -> None:
    """An undefined one is left out, as in `metrics.json`."""
    row = {"dice": 0.9, "iou": None, "accuracy": 0.97, "boundary_iou": 0.5, "tp": 3}
    write_metrics(store, {"fusion": row, "otsu": row | {"dice": 0.7}})
    found = {}
    for model in ("fusion", "otsu"):
        events = read_events(store.read(f"tensorboard/evaluation/{model}/events.out.tfevents.curves"))
        found[model] = {value.tag: round(value.simple_value, 6) for event in events for value in event.summary.value}
    assert found["fusion"] == {"test/Dice": 0.9, "test/accuracy": 0.97, "test/boundary IoU": 0.5}
    assert found["otsu"]["test/Dice"] == 0.7


def test_records_carry_their_checksums_and_a_cut_file_gives_its_whole_events(store: LocalStore) -> None:
    write_curves(store, "members/fcn8", epochs(2), {"head": "refined", "lr": 0.1})
    content = store.read(PATH)
    length = int.from_bytes(content[:8], "little")
    crc = crc32c(content[:8])
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert int.from_bytes(content[8:12], "little") == masked
    assert content[12 : 12 + length] == read_events(content)[0].SerializeToString()
    ends = (len(content), len(content) - 1, 16 + length, 11)
    assert [len(read_events(content[:end])) for end in ends] == [4, 3, 1, 0]
    setting = read_events(content)[1].summary.value[0]
    assert setting.tag.startswith("setting")
    assert b"| head | refined |" in setting.tensor.string_val[0]
