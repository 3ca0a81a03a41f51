"""Choosing by counts on units: what is within chance of the best is not told from it, and doubt has an order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.programs import load_program

from apacs_ray.evaluation.selection import MOST_UNITS, paired_errors, pooled_dice, unit_numbers

selection = load_program(Path(__file__).resolve().parent.parent / "benchmarks/selection.py")
choose, wins = selection.choose, selection.wins


def units(seed: int, count: int, skills: tuple[float, ...], noise: float = 0.1) -> np.ndarray:
    """Units of unequal size and difficulty, on which candidates find a share of the cells by their skill."""
    rng = np.random.default_rng(seed)
    true = rng.integers(50, 4000, (count, 1))
    skill = np.clip(np.array(skills) + rng.normal(0, noise, (count, 1)) + rng.normal(0, noise / 4, (count, 1)), 0, 1)
    both = np.rint(true * skill).astype(np.int64)
    wrong = rng.integers(0, 40, both.shape)
    return np.stack([both, both + wrong, np.broadcast_to(true, both.shape)], axis=2)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    count=st.integers(1, 12),
    skills=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    errors=st.sampled_from([0.0, 1.0, 2.0]),
    order=st.randoms(use_true_random=False),
)
def test_what_is_chosen_is_within_chance_of_the_best_and_the_first_that_is(seed, count, skills, errors, order) -> None:
    rows = units(seed, count, tuple(skills))
    preferred = list(range(len(skills)))
    order.shuffle(preferred)
    chosen = choose(rows, preferred, errors)
    dice = pooled_dice(rows.sum(axis=0))
    best = int(dice.argmax())
    if errors == 0:
        assert dice[chosen] == dice.max()
        assert chosen == next(place for place in preferred if dice[place] == dice.max())
    elif (dice == dice.max()).sum() == 1:
        chance = errors * paired_errors(rows, best)
        near = [place for place in preferred if dice[best] - dice[place] <= chance[place]]
        assert chosen == near[0]
    if count == 1 and errors:
        assert chosen == preferred[0]  # one unit tells nothing


def test_the_error_is_that_of_the_difference_over_many_draws() -> None:
    """Whose units are drawn anew: the spread of the difference is what the jackknife says from one draw."""
    differences, said = [], []
    for seed in range(300):
        rows = units(seed, 24, (0.8, 0.78))
        dice = pooled_dice(rows.sum(axis=0))
        differences.append(dice[1] - dice[0])
        said.append(paired_errors(rows, 0)[1])
    assert np.std(differences) == pytest.approx(np.mean(said), rel=0.2)


def test_what_all_units_share_is_no_error() -> None:
    """Paired: two candidates that differ alike on every unit are told apart however much the units differ."""
    rng = np.random.default_rng(0)
    true = rng.integers(100, 10_000, 8) * 10
    first = np.stack([true // 2, true // 2, true], axis=1)
    second = np.stack([true * 6 // 10, true * 6 // 10, true], axis=1)
    rows = np.stack([first, second], axis=1)
    assert paired_errors(rows, 1)[0] == pytest.approx(0, abs=1e-12)
    assert choose(rows, [0, 1]) == 1


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), count=st.integers(1, 9), skills=st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_wins_are_shares_that_follow_the_candidates(seed, count, skills) -> None:
    rows = units(seed, count, tuple(skills))
    shares = wins(rows)
    assert shares.sum() == pytest.approx(1)
    assert (shares >= 0).all()
    assert wins(rows[:, ::-1])[::-1] == pytest.approx(shares)
    if count == 1:
        assert shares[pooled_dice(rows[0]) < pooled_dice(rows[0]).max()].sum() == 0


def test_who_always_wins_has_all_and_equals_share() -> None:
    rows = units(3, 10, (0.2, 0.9))
    assert wins(rows).tolist() == [0.0, 1.0]
    assert wins(np.concatenate([rows[:, 1:], rows[:, 1:]], axis=1)) == pytest.approx([0.5, 0.5])
    nothing = np.zeros((4, 3, 3), np.int64)
    assert wins(nothing) == pytest.approx([1 / 3] * 3)
    assert choose(nothing, [2, 0, 1]) == 2


@given(tiles=st.dictionaries(st.integers(0, 300), st.integers(0, 99), min_size=1, max_size=120))
@settings(max_examples=100, deadline=None)
def test_units_are_slides_where_there_are_enough_of_them(tiles: dict[int, int]) -> None:
    slide_of = {f"t{tile}": f"s{slide}" for tile, slide in tiles.items()}
    numbers = unit_numbers(list(slide_of.values()), list(slide_of))
    assert numbers == unit_numbers(list(slide_of.values())[::-1], list(slide_of)[::-1])
    assert numbers.keys() == slide_of.keys()
    slides = set(slide_of.values())
    names = slides if len(slides) >= 5 else slide_of.keys()
    assert set(numbers.values()) == set(range(min(len(names), MOST_UNITS)))
    if len(slides) >= 5:
        assert all(numbers[a] == numbers[b] for a in slide_of for b in slide_of if slide_of[a] == slide_of[b])
