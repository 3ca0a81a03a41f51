"""The feed of training, without Ray: what is decoded together, how far ahead, and that nothing changes its order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apacs_ray.data.columns import bytes_in
from apacs_ray.data.shards import Place, TileIndex
from apacs_ray.distributed.training_data import (
    BLOCK_BYTES,
    MOST_ROWS,
    _pack,
    _unpack,
    blocks_of,
    datasets_of,
    sample_bytes,
)
from apacs_ray.storage import LocalStore
from apacs_ray.training.augment import Augmentation
from apacs_ray.training.batch import Sample
from apacs_ray.training.dataset import Heatmaps, TileDataset, one_by_one
from apacs_ray.training.sampler import SampleRef

MIB = 1 << 20
PHASES = st.lists(st.tuples(st.sampled_from(["train", "val"]), st.integers(1, 90)), max_size=8)


def refs_of(phases: list[tuple[str, int]]) -> list[SampleRef]:
    names = [phase for phase, count in phases for _ in range(count)]
    return [SampleRef(0, phase, 0, row, 1.0, row) for row, phase in enumerate(names)]  # type: ignore[arg-type]


@given(phases=PHASES, train=st.integers(1, 80 * MIB), val=st.integers(1, 80 * MIB), most=st.integers(1, 400 * MIB))
def test_blocks_and_datasets_keep_the_order_and_their_sizes(
    phases: list[tuple[str, int]], train: int, val: int, most: int
) -> None:
    refs, sizes = refs_of(phases), {"train": train, "val": val}
    parts = list(datasets_of(blocks_of(iter(refs), sizes), sizes, most))
    blocks = [block for part in parts for block in part]
    assert [ref for block in blocks for ref in block] == refs
    for block in blocks:
        (phase,) = {ref.phase for ref in block}
        assert len(block) == 1 or len(block) * sizes[phase] <= BLOCK_BYTES
        assert len(block) <= MOST_ROWS
    held = [sum(len(block) * sizes[block[0].phase] for block in part) for part in parts]
    assert all(size <= most or len(part) == 1 for size, part in zip(held, parts, strict=True))
    for number, (_, second) in enumerate(pairwise(parts)):
        opened = second[0]
        assert held[number] + len(opened) * sizes[opened[0].phase] > most


def index(tiles: int, largest: int) -> TileIndex:
    numbers = np.arange(tiles, dtype=np.int32)
    names = tuple(map(str, numbers))
    return TileIndex(("a",), numbers * 0, numbers * 0, numbers, names, names, largest, numbers.astype(np.float32))


@pytest.mark.parametrize(("crop", "expected"), [(1024, 1024 * 1024 * 7), (0, 4_000_000 * 7)])
def test_a_training_crop_is_not_as_large_as_a_validation_tile(crop: int, expected: int, tmp_path: object) -> None:
    heatmaps = Heatmaps(("fcn32", "fcn16", "fcn8"), "0" * 16)
    dataset = TileDataset(LocalStore(str(tmp_path)), heatmaps, Augmentation(crop, False, False))
    found = sample_bytes(dataset, {"train": index(3, 4_000_000), "val": index(2, 4_000_000)})
    assert found == {"train": expected, "val": 4_000_000 * 7}


class Slow(TileDataset):
    """Samples that are ready only when others were asked for, too."""

    def load(self, wanted: list[tuple[SampleRef, Place]]) -> list[Sample]:  # type: ignore[override]
        ((ref, place),) = wanted
        if threading.current_thread() is not threading.main_thread():
            BARRIER.wait(timeout=30)
        pixels = np.full((1, 1, 3), ref.row, np.uint8)
        return [Sample(ref, place.tile_id, pixels, pixels[:, :, 0])]


BARRIER = threading.Barrier(3)


def test_threads_read_ahead_and_keep_the_order(tmp_path: object) -> None:
    """Three at the same time: none would get past the barrier alone."""
    dataset = Slow(LocalStore(str(tmp_path)), None, Augmentation(0, False, False))
    refs = refs_of([("train", 30)])
    asked: list[int] = []

    def spied() -> Iterator[SampleRef]:
        for ref in refs:
            asked.append(ref.row)
            yield ref

    samples = one_by_one(dataset, {"train": index(30, 1)}, spied(), threads=3)
    first = next(samples)
    assert first.ref.row == 0
    assert len(asked) == 7  # two a thread, and the one that is given
    assert [sample.ref.row for sample in samples] == list(range(1, 30))


def test_without_threads_nothing_is_read_ahead(tmp_path: object) -> None:
    dataset = Slow(LocalStore(str(tmp_path)), None, Augmentation(0, False, False))
    refs = iter(refs_of([("train", 3)]))
    samples = one_by_one(dataset, {"train": index(3, 1)}, refs)
    assert next(samples).ref.row == 0
    assert next(refs).row == 1


@given(
    values=st.lists(st.none() | st.binary(max_size=9), max_size=12),
    parts=st.lists(st.integers(0, 12), max_size=3),
    wide=st.booleans(),
)
def test_bytes_of_a_column_are_read_where_they_lie(values: list[bytes | None], parts: list[int], wide: bool) -> None:
    array = pa.array(values, pa.large_binary() if wide else pa.binary())
    edges = [0, *sorted(min(part, len(values)) for part in parts), len(values)]
    column = pa.chunked_array([array[first:last] for first, last in pairwise(edges)], array.type)
    found = list(bytes_in(column))
    assert [None if one is None else one.tobytes() for one in found] == values
    stored = array.buffers()[2]
    memory = np.frombuffer(stored, np.uint8) if stored else np.zeros(0, np.uint8)
    assert all(np.shares_memory(one, memory) for one in found if one is not None and len(one))


def test_samples_travel_with_one_copy_each_way() -> None:
    rng = np.random.default_rng(0)
    shapes = [(5, 7), (5, 7), (6, 4)]
    samples = [
        Sample(ref, f"t{ref.row}", rng.integers(0, 256, (*shape, 6), np.uint8), np.ones(shape, np.uint8))
        for ref, shape in zip(refs_of([("train", 3)]), shapes, strict=True)
    ]
    samples[1] = replace(samples[1], inputs=np.rot90(samples[1].inputs, 2))  # as augmentation leaves it
    packed = _pack(samples)
    memory = np.frombuffer(packed["inputs"].chunk(0).buffers()[2], np.uint8)
    for sample, found in zip(samples, _unpack(packed), strict=True):
        assert (found.ref, found.tile_id) == (sample.ref, sample.tile_id)
        assert np.array_equal(found.inputs, sample.inputs)
        assert np.array_equal(found.mask, sample.mask)
        assert np.shares_memory(found.inputs, memory)
