"""Whether the head of the cluster that a run has joined still answers.

Ray's own calls warn and wait for minutes when it is gone, and then name an actor. A thread looks at its port instead;
after `GONE_AFTER` seconds without an answer it stops the command as SIGTERM does.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

LOOK_EVERY, ANSWERS_WITHIN = 5.0, 3.0  # s
GONE_AFTER = 30.0  # s
ENDS_WITHIN = 15.0  # s, for the main thread to hear that the head is gone, which a call of Ray's may keep from it


def why_silent(host: str, port: int) -> str | None:
    """Return why nobody answers at an address; None where somebody does."""
    try:
        socket.create_connection((host, port), timeout=ANSWERS_WITHIN).close()
    except OSError as error:
        return f"nobody answers ({error.strerror or error})"
    return None


class HeadWatch:
    """Looks at the head until `close`."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        stop_command: Callable[[], object] = lambda: os.kill(os.getpid(), signal.SIGTERM),
        look_every: float = LOOK_EVERY,
        gone_after: float = GONE_AFTER,
    ) -> None:
        self._host, self._port = host, port
        self._stop_command = stop_command
        self._look_every, self._gone_after = look_every, gone_after
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="head", daemon=True).start()

    def why_gone(self) -> str | None:
        """Look now. Return the line of a run that ends because its head is gone; None where the head answers."""
        reason = why_silent(self._host, self._port)
        if reason is None:
            return None
        return (
            f"the head of the Ray cluster at {self._host}:{self._port} is gone: {reason}; start the cluster again, "
            "then the same command goes on from here"
        )

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _watch(self) -> None:
        answered = time.monotonic()
        while not self._closed.wait(self._look_every):
            reason = self.why_gone()
            if reason is None:
                answered = time.monotonic()
            elif time.monotonic() - answered >= self._gone_after:
                self._stop_command()
                if not self._closed.wait(ENDS_WITHIN):
                    print(f"error: {reason}", file=sys.stderr, flush=True)
                    os._exit(1)
                return
