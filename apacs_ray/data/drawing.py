"""Some of many tiles, in proportion from all slides. Pure arithmetic."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from apacs_ray.data.splits import seeded_rank


def draw_by_slide(slide_ids: Sequence[str], tile_ids: Sequence[str], most: int, seed: int) -> list[bool]:
    """Draw tiles, of each slide its share.

    The choice depends on `seed` and the names alone: the order of the tiles does not change it.

    Args:
        slide_ids: Of each tile.
        tile_ids: Of each tile, unique.
        most: How many are drawn, where there are more.
        seed: Of the choice.

    Returns:
        For each tile whether it is drawn.
    """
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, slide in enumerate(slide_ids):
        numbers[slide].append(number)
    drawn = [False] * len(slide_ids)
    for slide, count in slide_shares(Counter(slide_ids), most, seed).items():
        for number in sorted(numbers[slide], key=lambda number: seeded_rank(seed, tile_ids[number]))[:count]:
            drawn[number] = True
    return drawn


def slide_shares(tiles: Mapping[str, int], most: int, seed: int) -> dict[str, int]:
    """Share out a number of tiles among slides, in proportion to theirs.

    Every slide has one at least, where there are not more slides than tiles to share out; else so many slides have one
    each. What is left over when shares are rounded down goes to those that lost most by it.

    Args:
        tiles: Of each slide, above 0.
        most: How many are shared out, where there are more.
        seed: Decides between equals.

    Returns:
        The tiles of each slide that has a share; their sum is `most`, or that of all tiles.
    """
    left = min(most, sum(tiles.values()))
    names = sorted(tiles, key=lambda name: seeded_rank(seed, name))
    if left < len(names):
        return dict.fromkeys(names[:left], 1)
    shares: dict[str, int] = {}
    while True:  # one for each slide of less; what the others have to share is less then
        whole = sum(tiles[name] for name in names)
        small = [name for name in names if tiles[name] * left < whole]
        if not small:
            break
        shares |= dict.fromkeys(small, 1)
        left -= len(small)
        names = [name for name in names if name not in shares]
    rest = {}
    for name in names:
        shares[name], rest[name] = divmod(tiles[name] * left, whole)
    for name in sorted(names, key=lambda name: rest[name], reverse=True)[: left - sum(shares[name] for name in names)]:
        shares[name] += 1
    return shares
