"""Some of many tiles, drawn from all slides: so many as are asked for, of each slide its share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from apacs_ray.data.drawing import draw_by_slide, slide_shares

COUNTS = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@given(COUNTS, st.integers(1, 400), st.integers(0, 2**31 - 1), st.randoms())
def test_each_slide_gives_its_share(counts: list[int], most: int, seed: int, random) -> None:
    tiles = {f"s{number}": count for number, count in enumerate(counts)}
    pairs = [(slide, f"{slide}_{number}") for slide, count in tiles.items() for number in range(count)]
    slides, names = zip(*pairs, strict=True)
    drawn = draw_by_slide(slides, names, most, seed)
    shares = {slide: sum(d for d, s in zip(drawn, slides, strict=True) if s == slide) for slide in tiles}
    assert sum(drawn) == min(most, len(pairs))
    if most < len(tiles):
        assert set(shares.values()) <= {0, 1}
    else:
        assert min(shares.values()) >= 1
        # those that have more than the one that every slide has share the rest, each within one of its part
        larger = [slide for slide in tiles if shares[slide] > 1]
        held, whole = (sum(kind[slide] for slide in larger) for kind in (shares, tiles))
        for slide in larger:
            assert abs(shares[slide] - tiles[slide] * held / whole) < 2
            assert shares[slide] <= tiles[slide] * min(most, len(pairs)) / len(pairs) + 1
    shuffled = random.sample(pairs, len(pairs))
    again = draw_by_slide([slide for slide, _ in shuffled], [name for _, name in shuffled], most, seed)
    assert {pair for pair, d in zip(pairs, drawn, strict=True) if d} == {
        pair for pair, d in zip(shuffled, again, strict=True) if d
    }


def test_the_shares_of_some_slides() -> None:
    assert slide_shares({"a": 100, "b": 50, "c": 50}, 20, 0) == {"a": 10, "b": 5, "c": 5}
    assert slide_shares({"a": 900, "b": 99, "c": 1}, 11, 0) == {"a": 9, "b": 1, "c": 1}
    assert slide_shares({"a": 5, "b": 5}, 100, 0) == {"a": 5, "b": 5}
    assert slide_shares({}, 5, 0) == {}


def test_the_seed_decides_and_every_tile_can_be_drawn() -> None:
    slides, tiles = ["a"] * 4 + ["b"] * 4, [f"t{number}" for number in range(8)]
    choices = {tuple(draw_by_slide(slides, tiles, 2, seed)) for seed in range(60)}
    assert all(any(choice[number] for choice in choices) for number in range(8))
