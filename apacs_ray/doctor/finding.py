"""What a check says, and what becomes of a check that breaks, hangs or would print a secret."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from apacs_ray.redact import printable, redact

State = Literal["ok", "warning", "failed"]
LIMIT = 60.0  # s that a check may take
SHOWN = 400  # characters of an error's message


@dataclass(frozen=True)
class Finding:
    """One line of the table. `advice` says what to do; it is empty where nothing is to be done."""

    name: str
    state: State
    found: str
    advice: str = ""


Check = Callable[[], Iterable[Finding]]


def examine(name: str, check: Check, limit: float = LIMIT) -> list[Finding]:
    """What `check` finds; a failed line more when it raises or takes longer than `limit` seconds."""
    findings: list[Finding] = []
    broken: list[BaseException] = []

    def work() -> None:
        try:
            findings.extend(check())
        except BaseException as error:  # whatever a broken installation raises  # noqa: BLE001
            broken.append(error)

    # a daemon: a file system or a library that hangs must not hold the process
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        advice = "something here does not answer (a network file system, a driver, a store): try it by hand"
        return [*findings, Finding(name, "failed", f"no result within {limit:g} s", advice)]
    return findings + [broken_check(name, error) for error in broken]


def broken_check(name: str, error: BaseException) -> Finding:
    """The failed line of an error that the check did not expect."""
    if isinstance(error, ImportError):
        advice = "install the package with its dependencies: pip install ."
    else:
        advice = "repair what the message names; if nothing is wrong there, please report it"
    return Finding(name, "failed", message_of(error), advice)


def message_of(error: BaseException) -> str:
    """An error in one line: its type, unless the message is a sentence of ours, and its message."""
    from apacs_ray.errors import ApacsError, BadInput

    text = " ".join(str(error).split())
    if not isinstance(error, ApacsError | BadInput):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def shown(finding: Finding, secrets: Iterable[str]) -> Finding:
    """The finding as it may be printed: no secret, no user in a URL, no control character."""

    def clean(text: str) -> str:
        return printable(redact(text, secrets))

    changes: dict[str, Any] = {"found": clean(finding.found), "advice": clean(finding.advice)}
    return replace(finding, **changes)
