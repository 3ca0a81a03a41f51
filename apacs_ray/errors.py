"""The errors that a person reads: one line that names the input, what is wrong and what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence


class ApacsError(Exception):
    """A run cannot go on. The message is one line for a person; commands exit with `exit_status`."""

    exit_status = 1


class StoreTroubleError(ApacsError):
    """A store did not answer as it should in several attempts; later it may."""


class RefusedError(ApacsError):
    """A store refuses an object: there is no right to read it, or it lies in an archive."""


class TrainingError(ApacsError):
    """Training cannot go on, and all its workers have come to the same error."""


class UsageError(ApacsError):
    """The command or its settings cannot be carried out as given; nothing was started."""

    exit_status = 2


class BadInput(Exception):
    """A permanent defect of one input (file, pair, tile). The caller turns it into a reject row.

    Attributes:
        code: A stable snake_case word that scripts may rely on.
        reason: A sentence for a person.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}"


def few(names: Sequence[str], most: int = 3) -> str:
    """Return names for a line: the first ones, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def carried_message(error: object) -> str | None:
    """Return the message of an ApacsError that a worker raised.

    Ray passes a worker's exception on as text: the traceback, whose last words are the type and the message. Which of
    the errors that follow from each other has it differs: of an actor's start it is not the last.

    Args:
        error: As Ray raised it in the driver, or its text.

    Returns:
        One line, or None when the worker raised something else.
    """
    messages = [message for each in _chain(error) if (message := _apacs_message(each)) is not None]
    return messages[-1] if messages else None


def _apacs_message(error: object) -> str | None:
    if isinstance(error, ApacsError):
        return str(error)
    kinds = "ApacsError|UsageError|StoreTroubleError|RefusedError|TrainingError"
    messages = re.findall(rf"^(?:apacs_ray\.errors\.)?(?:{kinds}): (.+)$", str(error), re.MULTILINE)
    return messages[-1] if messages else None


def _chain(error: object) -> list[object]:
    """An error and what it followed from. Ray Train keeps the errors of its workers beside its own."""
    failures = list(getattr(error, "worker_failures", {}).values())
    chain: list[object] = [error, *failures[:1]]
    while (deeper := getattr(chain[-1], "cause", None) or getattr(chain[-1], "__cause__", None)) is not None:
        chain.append(deeper)
    return chain


def message_of(error: object) -> str:
    """Return the message at the bottom of an error that came to the driver through Ray.

    Ray Train keeps the errors of its workers beside its own, each with its cause; Ray Tune keeps their text.

    Returns:
        One line: the message of an ApacsError, else the last line of what there is.
    """
    chain = _chain(error)
    if (message := carried_message(error)) is not None:
        return message
    return (str(chain[-1]).strip() or repr(chain[-1])).splitlines()[-1]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters; of one without a message its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def gpu_too_small(error: Exception, section: str) -> str:
    """Return the message for training that ran out of GPU memory: which settings of `section` need less."""
    advice = f"raise {section}.accumulate, or lower {section}.batch_size or .crop"
    return f"the GPU's memory is too small: {advice} ({first_line(error)})"
