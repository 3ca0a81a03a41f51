"""The memory of training on a GPU: counted without computing, and batches that fit."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apacs_ray.models.registry import build_member
from apacs_ray.training.memory import STATE, USABLE, fitting_batch, input_side, step_memory, training_memory

GIB = 1 << 30
# of an H100 with torch 2.11, bfloat16, batches of 4: torch.cuda.max_memory_allocated
MEASURED = {("fcn32", 1024): 1.6, ("fcn32", 2000): 2.9, ("fcn16", 1024): 7.6, ("fcn8", 1024): 7.6, ("fcn8", 2000): 19.0}


@pytest.mark.parametrize(("name", "side"), MEASURED)
def test_what_is_counted_is_what_a_gpu_was_seen_to_take(name: str, side: int) -> None:
    counted = training_memory(partial(build_member, name), (4, 3, side, side), half=True)  # type: ignore[arg-type]
    assert 0.9 * MEASURED[name, side] * GIB < counted < 1.3 * MEASURED[name, side] * GIB


def test_float32_takes_more_and_states_are_counted() -> None:
    build = partial(build_member, "fcn8", width=0.1)
    halves, whole = (training_memory(build, (2, 3, 200, 200), half=half) for half in (True, False))
    assert halves < whole
    smallest = training_memory(build, (1, 3, 1, 1), half=False)
    assert smallest > STATE * sum(weight.numel() for weight in build().parameters())


@given(batch=st.integers(1, 9), share=st.floats(0.01, 2))
@settings(max_examples=15, deadline=None)
def test_the_batch_that_fits_is_the_largest_of_its_halves(batch: int, share: float) -> None:
    build = partial(build_member, "fcn32", width=0.05)
    memory = share * training_memory(build, (batch, 3, 256, 256), half=True) / USABLE
    found = fitting_batch([build], (batch, 3, 256, 256), half=True, memory=memory)
    halves = [batch]
    while halves[-1] > 1:
        halves.append(-(-halves[-1] // 2))
    assert found in halves
    for larger in halves[: halves.index(found)]:
        assert training_memory(build, (larger, 3, 256, 256), half=True) > USABLE * memory
    assert found == 1 or training_memory(build, (found, 3, 256, 256), half=True) <= USABLE * memory


def test_networks_that_are_stepped_in_turn_hold_each_others_states() -> None:
    small, large = (partial(build_member, name, width=0.1) for name in ("fcn32", "fcn8"))
    shape = (2, 3, 200, 200)
    state = STATE * sum(weight.numel() for weight in small().parameters())
    assert step_memory([small, large], shape, half=True) == state + training_memory(large, shape, half=True)
    alone = step_memory([large], shape, half=True)
    assert alone == training_memory(large, shape, half=True)
    assert fitting_batch([large], shape, half=True, memory=alone / USABLE + 1) == 2
    assert fitting_batch([small, large], shape, half=True, memory=alone / USABLE + 1) == 1


@pytest.mark.parametrize(("crop", "largest", "side"), [(1024, 512**2, 512), (256, 512**2, 256), (0, 100 * 50, 71)])
def test_the_largest_input_is_no_larger_than_the_largest_tile(crop: int, largest: int, side: int) -> None:
    assert input_side(crop, largest) == side
