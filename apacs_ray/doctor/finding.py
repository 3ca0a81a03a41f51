"""The findings of a check: one that raises or hangs becomes a failed finding; secrets are redacted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from apacs_ray.redact import printable, redact

State = Literal["ok", "warning", "failed"]
TIMEOUT = 60.0  # s that a check may take
LONGEST_MESSAGE = 400  # characters of an error's message


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        name: The check.
        state: ok, warning (a run works, with a drawback) or failed (a run would not work).
        message: What was found.
        advice: What to do, empty where nothing is to be done.
    """

    name: str
    state: State
    message: str
    advice: str = ""


Check = Callable[[], Iterable[Finding]]


def examine(name: str, check: Check, timeout: float = TIMEOUT) -> list[Finding]:
    """Run a check; add a failed line when it raises or takes longer than `timeout` seconds."""
    findings: list[Finding] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            findings.extend(check())
        except BaseException as error:  # whatever a broken installation raises  # noqa: BLE001
            errors.append(error)

    # a daemon: a file system or a library that hangs must not hold the process
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        advice = "something here does not answer (a network file system, a driver, a store): try it by hand"
        return [*findings, Finding(name, "failed", f"no result within {timeout:g} s", advice)]
    return findings + [failed_check(name, error) for error in errors]


def failed_check(name: str, error: BaseException) -> Finding:
    """Return the failed line of an error that the check did not expect."""
    if isinstance(error, ImportError):
        advice = "install the package with its dependencies: pip install ."
    else:
        advice = "repair what the message names; if nothing is wrong there, please report it"
    return Finding(name, "failed", message_of(error), advice)


def message_of(error: BaseException) -> str:
    """Put an error in one line: its type, unless the message is a sentence of ours, and its message."""
    from apacs_ray.errors import ApacsError, BadInput

    text = " ".join(str(error).split())
    if not isinstance(error, ApacsError | BadInput):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."


def redacted(finding: Finding, secrets: Iterable[str]) -> Finding:
    """Return the finding as it may be printed: no secret, no user in a URL, no control character."""

    def redact_all(text: str) -> str:
        return printable(redact(text, secrets))

    return replace(finding, message=redact_all(finding.message), advice=redact_all(finding.advice))
