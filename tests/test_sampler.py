"""The order of training, for any number of workers: nothing lost, nothing twice, the same global batches."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apacs_ray.training.sampler import SampleRef, permutation, schedule

GROUPS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def streams(
    groups: list[int], n_val: int, batch: int, world: int, window: int = 6, epochs: int = 2
) -> list[list[SampleRef]]:
    return [
        list(
            schedule(
                groups,
                n_val,
                epochs=range(epochs),
                batch_size=batch,
                rank=rank,
                world=world,
                seed=3,
                window=window,
            )
        )
        for rank in range(world)
    ]


def steps(stream: list[SampleRef], epoch: int) -> dict[int, list[SampleRef]]:
    found: dict[int, list[SampleRef]] = {}
    for ref in stream:
        if ref.epoch == epoch and ref.phase == "train":
            found.setdefault(ref.step, []).append(ref)
    return found


CASES = given(
    groups=GROUPS,
    n_val=st.integers(0, 12),
    batch=st.integers(1, 9),
    world=st.integers(1, 5),
    window=st.sampled_from([1, 6, 1000]),
)


@CASES
@settings(max_examples=60, deadline=None)
def test_every_tile_once_and_every_rank_in_step(
    groups: list[int], n_val: int, batch: int, world: int, window: int
) -> None:
    ranks = streams(groups, n_val, batch, world, window)
    for epoch in range(2):
        cut = [steps(stream, epoch) for stream in ranks]
        weighing = [ref for stream in cut for refs in stream.values() for ref in refs if ref.weight > 0]
        assert Counter(ref.row for ref in weighing) == Counter(range(sum(groups)))
        assert set().union(*cut) == set(range(-(-sum(groups) // batch)))
        for step in cut[0]:
            refs = [stream[step] for stream in cut]
            assert len({len(mine) for mine in refs}) == 1  # so every rank cuts the same micro batches
            assert sum(ref.weight for mine in refs for ref in mine) == pytest.approx(world)
            tiles = sum(ref.weight > 0 for mine in refs for ref in mine)
            assert {ref.weight for mine in refs for ref in mine} <= {0.0, world / tiles}
            assert len(refs[0]) == -(-tiles // world)  # no more repeats than needed
        val = [ref.row for stream in ranks for ref in stream if ref.epoch == epoch and ref.phase == "val"]
        assert Counter(val) == Counter(range(n_val))


@CASES
@settings(max_examples=60, deadline=None)
def test_global_batches_and_seeds_do_not_depend_on_the_world(
    groups: list[int], n_val: int, batch: int, world: int, window: int
) -> None:
    def globally(ranks: list[list[SampleRef]]) -> list[tuple[int, int, int, int]]:
        refs = [ref for stream in ranks for ref in stream if ref.phase == "train" and ref.weight > 0]
        refs.sort(key=lambda ref: (ref.epoch, ref.step))  # stable: ranks stay in order inside a batch
        return [(ref.epoch, ref.step, ref.row, ref.seed) for ref in refs]

    alone = globally(streams(groups, n_val, batch, 1, window))
    assert globally(streams(groups, n_val, batch, world, window)) == alone


def test_an_epoch_ends_with_its_validation() -> None:
    for stream in streams([4, 3], 3, 2, 2):
        turns = [(ref.epoch, ref.phase, ref.step) for ref in stream]
        assert turns == sorted(turns, key=lambda turn: (turn[0], turn[1] == "val", turn[2]))


def test_going_on_from_an_epoch_gives_what_an_undisturbed_run_gives() -> None:
    whole = list(schedule([4, 3], 3, epochs=range(4), batch_size=2, rank=1, world=2, seed=3))
    rest = list(schedule([4, 3], 3, epochs=range(2, 4), batch_size=2, rank=1, world=2, seed=3))
    assert rest == [ref for ref in whole if ref.epoch >= 2]
    middle = list(schedule([4, 3], 3, epochs=range(1, 4), first_step=2, batch_size=2, rank=1, world=2, seed=3))
    done = [ref for ref in whole if ref.epoch == 1 and ref.phase == "train" and ref.step < 2]
    assert middle == [ref for ref in whole if ref.epoch >= 1 and ref not in done]
    assert done


def test_epochs_and_seeds_differ() -> None:
    assert permutation([30], 1, 0) != permutation([30], 1, 1) != permutation([30], 2, 1)
    refs = streams([30], 0, 4, 1)[0]
    assert len({ref.seed for ref in refs}) == 60


def test_a_window_reads_few_row_groups_at_a_time() -> None:
    groups = [16] * 40
    order = permutation(groups, seed=0, epoch=0, window=64)
    assert sorted(order) == list(range(640))
    for start in range(0, 640, 64):
        assert len({row // 16 for row in order[start : start + 64]}) == 4
    assert order[:64] != sorted(order[:64])
    far_apart = permutation(groups, seed=0, epoch=0, window=1000)  # fits one window: a full permutation
    assert len({row // 16 for row in far_apart[:64]}) > 20
