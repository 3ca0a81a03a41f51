"""The errors a person reads: one line that names the input, what is wrong and what to do."""

from __future__ import annotations

import re


class ApacsError(Exception):
    """A run cannot go on. The message is one line for a person; scripts exit with `exit_status`."""

    exit_status = 1


class StoreTroubleError(ApacsError):
    """A store does not answer as it should, after several attempts; later it may."""


class RefusedError(ApacsError):
    """A store answers, and refuses this object: no right to read it, or it lies in an archive."""


class TrainingError(ApacsError):
    """Training cannot go on, and all its workers have found so."""


class UsageError(ApacsError):
    """The command or its settings cannot be carried out as given; nothing was started."""

    exit_status = 2


class BadInput(Exception):
    """A permanent defect of one input (file, pair, tile). The caller turns it into a reject row.

    `code` is a stable snake_case word that scripts may count on; `reason` is a sentence for a person.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}"


def carried_message(error: BaseException) -> str | None:
    """The message of an ApacsError that a worker raised; None when it raised something else.

    Ray passes a worker's exception on as text: the traceback, whose last words are the type and the message.
    """
    kinds = "ApacsError|UsageError|StoreTroubleError|RefusedError"
    found = re.findall(rf"^(?:apacs_ray\.errors\.)?(?:{kinds}): (.+)$", str(error), re.MULTILINE)
    return found[-1] if found else None


def gpu_too_small(error: Exception, section: str) -> str:
    """What a person is told when training ran out of GPU memory: the settings of `section` that need less."""
    advice = f"raise {section}.accumulate, or lower {section}.batch_size or .crop"
    return f"the GPU's memory is too small: {advice} ({str(error).splitlines()[0][:200]})"
