"""Neighboring items together, as many as a bound allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def portions(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Yield neighboring items whose sizes are `most` together at most, or one item that is larger."""
    portion: list[T] = []
    held = 0
    for item in items:
        own = size(item)
        if portion and held + own > most:
            yield portion
            portion, held = [], 0
        portion.append(item)
        held += own
    if portion:
        yield portion
