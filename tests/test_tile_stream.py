"""Tiles through the networks: what runs beside what, how far ahead, in which batches, and whose error ends it."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from apacs_ray.data.ahead import ahead
from apacs_ray.distributed.resource_plan import Nodes, cluster_of
from apacs_ray.distributed.tasks import MOST_THREADS, plan_pool
from apacs_ray.inference import memory
from apacs_ray.inference.memory import GIB, tiles_a_batch, workers_a_gpu
from apacs_ray.inference.predictor import Predictor
from apacs_ray.inference.tile_stream import TileStream
from apacs_ray.models.ensemble import Ensemble
from apacs_ray.models.registry import MEMBERS, build_member

TIMEOUT = 30  # s, for what would never come


class Meeting:
    """Events by name, which wait for each other: each is told once it has begun."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self._changed = threading.Condition()

    def tell(self, name: str) -> None:
        with self._changed:
            self.told.append(name)
            self._changed.notify_all()

    def wait_for(self, name: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: name in self.told, TIMEOUT), f"{name} does not begin"


class Told(Predictor):
    """Says of a tile its mean, and notes which tiles came together; no networks."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def logits_of(self, tiles: Sequence[np.ndarray], views: int = 1) -> list[dict[str, Any]]:
        self.batches.append([int(tile[0, 0, 0]) for tile in tiles])
        return [{"mean": np.full((1, 1), tile.mean(), np.float32)} for tile in tiles]


def stored(value: int, side: int = 4) -> dict[str, Any]:
    sink = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(sink, "PNG")
    return {"number": value, "image": sink.getvalue()}


def finish(row: Any, rgb: np.ndarray, logits: Any) -> tuple[int, float]:
    return row["number"], float(logits["mean"][0, 0])


def test_tiles_are_decoded_and_finished_beside_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a tile passes the networks the next one is decoded and the last one finished: each waits for the other."""
    tiles, meeting = 6, Meeting()
    decode = TileStream.run.__globals__["decode_pixels"]

    def decoded(content: bytes) -> np.ndarray:
        pixels: np.ndarray = decode(content)
        meeting.tell(f"decode {pixels[0, 0, 0]}")
        return pixels

    class Slow(Told):
        def logits_of(self, tiles_now: Sequence[np.ndarray], views: int = 1) -> list[dict[str, Any]]:
            number = int(tiles_now[0][0, 0, 0])
            meeting.tell(f"networks {number}")
            if number + 1 < tiles:
                meeting.wait_for(f"decode {number + 1}")
            if number:
                meeting.wait_for(f"finish {number - 1}")
            return super().logits_of(tiles_now, views)

    def finished(row: Any, rgb: np.ndarray, logits: Any) -> tuple[int, float]:
        number = row["number"]
        meeting.tell(f"finish {number}")
        if number + 1 < tiles:
            meeting.wait_for(f"networks {number + 1}")
        return finish(row, rgb, logits)

    monkeypatch.setattr("apacs_ray.inference.tile_stream.decode_pixels", decoded)
    results = TileStream().run(map(stored, range(tiles)), lambda row: predictor, finished)
    predictor = Slow()
    assert list(results) == [(number, float(number)) for number in range(tiles)]


@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (2, 1), (1, 4), (3, 2)])
def test_what_waits_is_bounded(threads: int, batch: int) -> None:
    """Rows that were taken, less those that are given: a batch, those decoded for the next, and those that finish."""
    taken, most = 0, 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal taken
        for number in range(40):
            taken += 1
            yield stored(number)

    given, predictor = [], Told()
    for result in TileStream(threads, batch).run(rows(), lambda row: predictor, finish):
        most = max(most, taken - len(given))
        given.append(result)
    assert given == [(number, float(number)) for number in range(40)]
    assert most <= 2 * batch + 2 * threads + 1


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(st.tuples(st.sampled_from([4, 5]), st.sampled_from([0, 1])), max_size=20),
    threads=st.integers(1, 3),
    batch=st.integers(1, 5),
)
def test_batches_are_neighbors_of_one_size_and_one_predictor(
    kinds: list[tuple[int, int]], threads: int, batch: int
) -> None:
    predictors = Told(), Told()
    rows = [{**stored(number, side), "fold": fold} for number, (side, fold) in enumerate(kinds)]
    results = list(TileStream(threads, batch).run(rows, lambda row: predictors[row["fold"]], finish))
    assert results == [(number, float(number)) for number in range(len(kinds))]
    for fold, predictor in enumerate(predictors):
        assert [n for numbers in predictor.batches for n in numbers] == [n for n, k in enumerate(kinds) if k[1] == fold]
        for numbers in predictor.batches:
            assert len(numbers) <= batch
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            assert len({kinds[number] for number in numbers}) == 1
    runs = sum(1 for number, kind in enumerate(kinds) if not number or kinds[number - 1] != kind)
    assert sum(len(predictor.batches) for predictor in predictors) <= runs + len(kinds) // batch


def test_the_first_tile_that_fails_ends_it_with_its_own_error() -> None:
    rows = [stored(number) for number in range(8)]
    rows[5]["image"] = b"\x89PNG no picture"

    def failing(row: Any, rgb: np.ndarray, logits: Any) -> tuple[int, float]:
        if row["number"] == 4:
            raise ValueError("tile 4")
        return finish(row, rgb, logits)

    for work, ready, error in ((failing, 4, "tile 4"), (finish, 5, "cannot identify image file")):
        results = TileStream(threads=3).run(rows, lambda row: Told(), work)
        assert [next(results)[0] for _ in range(ready)] == list(range(ready))
        with pytest.raises((ValueError, OSError), match=error):
            next(results)


def test_a_batch_that_a_gpu_cannot_take_passes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    predictor = Predictor(
        Ensemble({name: build_member(name, width=0.02) for name in MEMBERS}, {}), threads=1, precision="float32"
    )
    tiles = [np.random.default_rng(number).integers(0, 256, (40, 36, 3), np.uint8) for number in range(5)]
    alone, seen, batch = [predictor.logits(tile) for tile in tiles], [], predictor.batch

    def small(images: torch.Tensor, views: int = 1) -> dict[str, torch.Tensor]:
        seen.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch(images, views)

    monkeypatch.setattr(predictor, "batch", small)
    together = predictor.logits_of(tiles)
    assert seen == [5, 2, 1, 1, 3, 1, 2, 1, 1]
    for one, other in zip(together, alone, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in MEMBERS)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 30), st.integers(1, 4), st.integers(0, 9), st.integers(0, 40))
def test_work_ahead_keeps_its_order_and_its_bound(count: int, threads: int, most: int, fails: int) -> None:
    taken, given = [], []

    def items() -> Iterator[int]:
        for number in range(count):
            if number == fails:
                raise ValueError(f"item {number}")
            taken.append(number)
            yield number

    with pytest.raises(ValueError, match=f"item {fails}") if fails < count else contextlib.nullcontext():
        for result in ahead(lambda number: number * number, items(), threads, most):
            given.append(result)
            assert len(taken) - len(given) <= most
    assert given == [number * number for number in range(min(count, fails))]


@pytest.mark.parametrize("ensembles", [1, 3, 5])
@pytest.mark.parametrize("gib", [16, 24, 80, 141])
@pytest.mark.parametrize(
    ("side", "width", "precision"), [(2000, 1.0, "bfloat16"), (2000, 1.0, "float32"), (512, 0.5, "tf32")]
)
def test_batches_and_processes_fit_a_gpu_together(
    monkeypatch: pytest.MonkeyPatch, gib: int, side: int, width: float, precision: str, ensembles: int
) -> None:
    """With folds a process comes to hold the members of each, and those of all tiles."""
    monkeypatch.setattr(memory, "worker_memory", lambda workers, on_gpus: float(gib * GIB))
    batch = tiles_a_batch(side, width, precision, ensembles=ensembles)
    assert 1 <= batch <= max(1, round(memory.BUSY_PIXELS / side**2))
    together = workers_a_gpu(side, width, precision, batch, ensembles=ensembles)
    networks = memory.BYTES_A_PROCESS * width + (ensembles - 1) * memory.BYTES_AN_ENSEMBLE * width**2
    each = networks + batch * (side + memory.MARGIN) ** 2 * memory.pixel_bytes(width, precision)
    assert together == 1 or together * each <= gib * GIB
    for gpus, nodes in ((1, 1), (8, 1), (64, 8)):
        pool = plan_pool(
            cluster_of([Nodes(16.0 * gpus / nodes, gpus / nodes, nodes)], []), 5000, a_gpu=together, batch=batch
        )
        assert pool.batch == batch, "equal batches on any number of GPUs"
        assert 1 <= pool.threads <= min(MOST_THREADS, 16 * gpus // pool.actors)
    assert plan_pool(cluster_of([Nodes(16.0, 0, 4)], []), 5000).batch == 1
