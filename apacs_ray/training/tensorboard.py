"""Curves for TensorBoard: an event file a network with its whole history, and one a model with its test metrics.

The files are written whole, where tensorboardX's `SummaryWriter` appends: an object store cannot append, and each start
of a training would have a file, which begins at its own time, so that a resumed run would leave a gap.
"""

from __future__ import annotations

import math
import re
import struct
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from apacs_ray.storage import Store
from apacs_ray.training.history import EpochRecord

CURVES = "tensorboard"  # the folder in a run: `tensorboard --logdir <output>/tensorboard`
NAME = "events.out.tfevents.curves"  # TensorBoard takes files with `tfevents` in their name
CURVES_FILE = re.compile(rf"{CURVES}/.*/{re.escape(NAME)}")  # what a run writes there; nothing else is ours
TESTED = {"Dice": "dice", "IoU": "iou", "accuracy": "accuracy", "boundary IoU": "boundary_iou"}
_HEAD, _CRC = struct.Struct("<QI"), 4  # a record: its length, a checksum of that, the event, a checksum of that


def write_curves(
    store: Store, name: str, history: tuple[EpochRecord, ...], setting: Mapping[str, Any] | None = None
) -> None:
    """Write `tensorboard/<name>/events.out.tfevents.curves` with loss, Dice and learning rate of every epoch.

    The file is replaced as a whole and begins with the same bytes as before, which is what TensorBoard needs to follow
    it. Epochs lie apart by the seconds they took, whatever a run stood still between. `setting` (of a trial) becomes
    text.
    """
    path = curves_path(name)
    history = tuple(record for record in history if record.epoch >= 0)  # a start has no loss of training
    began = _began(store, path, len(history))
    if began is None:
        began = time.time() - sum(record.seconds for record in history)
    events = [Event(wall_time=began, file_version="brain.Event:2")]
    if setting:
        events.append(Event(wall_time=began, summary=_text("setting", setting)))
    now = began
    for record in history:
        now += record.seconds
        events.append(Event(wall_time=now, step=record.epoch, summary=_scalars(record)))
    store.write(path, _encode(events))


def curves_path(name: str) -> str:
    """Return the path of the file of the curves called `name`."""
    return f"{CURVES}/{name}/{NAME}"


def write_metrics(store: Store, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `tensorboard/evaluation/<model>/...` with the pooled figures of each model over the test tiles."""
    now = time.time()
    for model, row in metrics.items():
        values = {name: row[key] for name, key in TESTED.items() if row[key] is not None}
        shown = [Summary.Value(tag=f"test/{name}", simple_value=value) for name, value in values.items()]
        events = [
            Event(wall_time=now, file_version="brain.Event:2"),
            Event(wall_time=now, summary=Summary(value=shown)),
        ]
        store.write(curves_path(f"evaluation/{model}"), _encode(events))


def read_events(content: bytes) -> list[Event]:
    """Return the events of an event file; a cut one gives those that are whole."""
    events, start = [], 0
    while start + _HEAD.size <= len(content):
        (length, _) = _HEAD.unpack_from(content, start)
        end = start + _HEAD.size + length
        if end + _CRC > len(content):
            break
        events.append(Event.FromString(content[start + _HEAD.size : end]))
        start = end + _CRC
    return events


def _began(store: Store, path: str, epochs: int) -> float | None:
    """When the training began whose curves lie there; None when they are of another, which had come further."""
    try:
        events = read_events(store.read(path))
    except FileNotFoundError:
        return None
    return events[0].wall_time if events and events[-1].step < epochs else None


def _scalars(record: EpochRecord) -> Summary:
    values = {
        "loss/train": record.train_loss,
        "loss/val": record.val_loss,
        "Dice/train": record.train_dice,
        "Dice/val": record.val_dice,
        "learning rate": record.learning_rate,
        "seconds": record.seconds,
    }
    shown = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if not math.isnan(value)]
    return Summary(value=shown)


def _text(tag: str, setting: Mapping[str, Any]) -> Summary:
    from tensorboardX.summary import text

    rows = [f"| {name} | {setting[name]} |" for name in sorted(setting)]
    return text(tag, "\n".join(["| name | value |", "| --- | --- |", *rows]))


def _encode(events: list[Event]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, NAME)
        writer = RecordWriter(str(path))
        for event in events:
            writer.write(event.SerializeToString())
        writer.close()
        return path.read_bytes()
