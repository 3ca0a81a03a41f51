"""Work in threads, ahead of who asks for it: in order, so much and no more."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(work: Callable[[T], R], items: Iterable[T], threads: int, most: int) -> Generator[R]:
    """Yield `work(item)` of every item, in order, computed in threads while the consumer is busy with earlier ones.

    `items` are taken in the consumer's thread, so one such iterator may be the items of another: what comes between,
    such as networks, then runs in the consumer's thread, beside the work before and behind it.

    Args:
        work: What is done; where threads are to help, it leaves Python's lock alone most of the time.
        items: What it is done with.
        threads: That do it.
        most: Items that are taken beside the one that is asked for: no more wait, are at work, or are done.

    Yields:
        A result for each item. What fails, an item or the work, is raised in its turn: when all before it were
        yielded.
    """
    source = iter(items)
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        while True:
            try:
                item = next(source)
            except StopIteration:
                break
            except Exception:
                while waiting:  # what fails among them came before
                    yield waiting.popleft().result()
                raise
            waiting.append(pool.submit(work, item))
            del item  # the consumer may be the last to hold it
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
