"""Checkpoints written beside training, which waits only while its state is copied to the host."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from apacs_ray.training.state import Snapshot, TrainState, snapshot


class CheckpointWriter:
    """Writes states of several networks, one after the other, in a thread of its own.

    A network's next state waits until its last one is written, so that no more than one copy of each is held. As a
    context, it waits for what is still being written when the block ends, however that is.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: dict[str, Future[None]] = {}

    def write(self, name: str, state: TrainState, keep: Callable[[Snapshot], None]) -> None:
        """Copy a state, and let the thread keep it.

        Args:
            name: Of the network.
            state: As it is now; it may change once this returns.
            keep: Called in the thread with the copy.

        Raises:
            Exception: What `keep` raised for an earlier state, of any network.
        """
        for other, writing in list(self._writing.items()):
            if other == name or writing.done():
                self._writing.pop(other).result()
        self._writing[name] = self._thread.submit(keep, snapshot(state))

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._thread.shutdown()
        if error is None:
            for writing in self._writing.values():
                writing.result()
