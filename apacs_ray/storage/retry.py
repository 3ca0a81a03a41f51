"""Where a request to S3 is tried again: which troubles pass, how long, and with which pauses.

Each request is tried by `with_retries` and not by boto3, whose budget of retries an outage uses up: the requests after
it would fail at the first trouble.
"""

from __future__ import annotations

import functools
import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, ParamValidationError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from apacs_ray.errors import ApacsError, RefusedError, StoreTroubleError
from apacs_ray.redact import redact

T = TypeVar("T")
TIMEOUT = 300.0  # s for which a request is tried again
PAUSE, LONGEST_PAUSE = 0.1, 20.0  # s between two attempts, doubled each time
LOGGED_AFTER = 10.0  # s of waiting that a person should know of
BUSY_STATUSES = (429, 500, 502, 503, 504)  # answers of a store that may do better later
BUSY_CODES = ("SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "OperationAborted")
RENEWAL = 30.0  # s for which a store may refuse keys that were just renewed
RENEWAL_EVERY = 600.0  # s; within them refusals are waited out once
# answers to keys, whatever they ask for; a role's are renewed on the way
KEY_CODES = (
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidToken",
    "TokenRefreshRequired",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "SignatureDoesNotMatch",
    "AuthFailure",
)
DENIED_CODES = ("AccessDenied", "Forbidden", "403", "400")  # of the object or of the keys; the last two to HEAD
_log = logging.getLogger(__name__)


class IncompleteAnswer(Exception):
    """An answer, or its body, ended too early."""


FAILURES = (
    ClientError,
    BotoCoreError,
    Boto3Error,  # of an upload
    ResponseParserError,
    HTTPError,  # urllib3's own: boto3 lets it through when the body of an error is cut
    IncompleteAnswer,
)


class Refusals:
    """Until when requests that a bucket refuses are tried again, of one process.

    A bucket that has answered may refuse for a while when a role's keys were just renewed. So refused requests are
    tried again until `RENEWAL` seconds after the first of them; then refusals are final at once, until `RENEWAL_EVERY`
    seconds have gone. Thousands of objects that may not be read thus cost half a minute together, not each. A request
    that is answered after it was refused ends that time: it was a renewal, and the next one has its own. A bucket that
    never answered here is not waited for: its keys, or the rights they give, are wrong.
    """

    def __init__(self) -> None:
        self._answered = False
        self._since: float | None = None  # s, monotonic

    def deadline(self) -> float:
        """Return when a request that is refused now is given up: s, monotonic."""
        now = time.monotonic()
        if not self._answered:
            return now
        if self._since is None or now - self._since > RENEWAL_EVERY:
            self._since = now
        return self._since + RENEWAL

    def note_answer(self, *, refused: bool) -> None:
        """Note that a request was answered, and whether it had been refused before."""
        self._answered = True
        if refused:
            self._since = None


@functools.cache
def _refusals(bucket: str) -> Refusals:
    return Refusals()


def with_retries(
    bucket: str, failure: str, request: Callable[[], T], timeout: float, expected: Sequence[int] = ()
) -> T:
    """Make a request, again for `timeout` seconds while the store is in trouble.

    The wait between two attempts is random and at most doubles, so that workers do not come back all at once. A person
    reads in the log when it takes longer than `LOGGED_AFTER` seconds.

    Args:
        bucket: That is asked; how long its refusals are tried again is a matter of the bucket (`Refusals`).
        failure: The words with which an error begins: the object's URI and what cannot be done.
        request: Makes one attempt.
        timeout: Seconds from the first attempt after which none is begun.
        expected: HTTP statuses of errors that the caller understands.

    Returns:
        What `request` returns.

    Raises:
        StoreTroubleError: The store was in trouble all the time.
        RefusedError: The store refused this object.
        ApacsError: The store refused the keys, or in another way, which no later attempt changes.
        ClientError: An answer with an `expected` status, as it came.
    """
    started, pause, logged = time.monotonic(), PAUSE, False
    refusals, refused = _refusals(bucket), False
    while True:
        try:
            answer = request()
        except FAILURES as error:
            if http_status(error) in expected:
                refusals.note_answer(refused=refused)
                raise
            now, deadline, kind = time.monotonic(), started + timeout, _kind(error)
            if code_of(error) in (*KEY_CODES, *DENIED_CODES):
                deadline, refused = min(deadline, refusals.deadline()), True
            elif kind is not StoreTroubleError:
                deadline = now
            waited = now - started
            if now + pause > deadline:
                after = f"; tried for {waited:.0f} s" if waited >= LOGGED_AFTER else ""
                raise kind(f"{failure} ({redact(str(error))}){after}") from error
            if waited > LOGGED_AFTER and not logged:
                logged = True
                left, reason = deadline - now, redact(str(error))
                _log.warning("waiting for the store, %.0f s at most: %s (%s)", left, failure, reason)
        else:
            refusals.note_answer(refused=refused)
            if logged:
                _log.info("the store answers again after %.0f s", time.monotonic() - started)
            return answer
        time.sleep(random.uniform(pause / 2, pause))
        pause = min(2 * pause, LONGEST_PAUSE, RENEWAL / 10 if refused else LONGEST_PAUSE)


def http_status(error: BaseException) -> int:
    """Return the HTTP status of a store's answer, 0 when there was no answer."""
    return int(error.response["ResponseMetadata"].get("HTTPStatusCode", 0)) if isinstance(error, ClientError) else 0


def code_of(error: BaseException) -> str:
    """Return the code of a store's answer, which is the status where it has none; empty when there was no answer."""
    error = _cause(error)
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def _cause(error: BaseException) -> BaseException:
    hidden = error.__context__ if isinstance(error, Boto3Error) else None  # of an upload
    return hidden or error


def _kind(error: BaseException) -> type[ApacsError]:
    """Return what an error is when it is given up: trouble, in which the same request may succeed later, or final."""
    error = _cause(error)
    status, code = http_status(error), code_of(error)
    if isinstance(error, ClientError):
        if status in BUSY_STATUSES or code in BUSY_CODES:
            return StoreTroubleError
        return RefusedError if status == 403 and code not in KEY_CODES else ApacsError
    return ApacsError if isinstance(error, NoCredentialsError | ParamValidationError) else StoreTroubleError
