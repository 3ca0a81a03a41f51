"""Where a request to S3 is tried again: which troubles pass, how long, and with which pauses.

Each request is tried by `with_retries` and not by boto3, whose budget of retries an outage uses up: the requests after
it would fail at the first trouble.
"""

from __future__ import annotations

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


def with_retries(failure: str, request: Callable[[], T], timeout: float, expected: Sequence[int] = ()) -> T:
    """Make a request, again for `timeout` seconds while the store is in trouble.

    The wait between two attempts is random and at most doubles, so that workers do not come back all at once. A person
    reads in the log when it takes longer than `LOGGED_AFTER` seconds.

    Args:
        failure: The words with which an error begins: the object's URI and what cannot be done.
        request: Makes one attempt.
        timeout: Seconds from the first attempt after which none is begun.
        expected: HTTP statuses of errors that the caller understands.

    Returns:
        What `request` returns.

    Raises:
        StoreTroubleError: The store was in trouble all the time.
        RefusedError: The store answered 403.
        ApacsError: The store refused in another way, which no later attempt changes.
        ClientError: An answer with an `expected` status, as it came.
    """
    started, pause, logged = time.monotonic(), PAUSE, False
    while True:
        try:
            answer = request()
        except FAILURES as error:
            if http_status(error) in expected:
                raise
            if not _may_pass(error):
                kind = RefusedError if http_status(error) == 403 else ApacsError
                raise kind(f"{failure} ({redact(str(error))})") from error
            waited = time.monotonic() - started
            if waited + pause > timeout:
                after = f"; tried for {waited:.0f} s" if timeout >= LOGGED_AFTER else ""
                raise StoreTroubleError(f"{failure} ({redact(str(error))}){after}") from error
            if waited > LOGGED_AFTER and not logged:
                logged = True
                left, reason = timeout - waited, redact(str(error))
                _log.warning("waiting for the store, %.0f s at most: %s (%s)", left, failure, reason)
        else:
            if logged:
                _log.info("the store answers again after %.0f s", time.monotonic() - started)
            return answer
        time.sleep(random.uniform(pause / 2, pause))
        pause = min(2 * pause, LONGEST_PAUSE)


def http_status(error: BaseException) -> int:
    """Return the HTTP status of a store's answer, 0 when there was no answer."""
    return int(error.response["ResponseMetadata"].get("HTTPStatusCode", 0)) if isinstance(error, ClientError) else 0


def _may_pass(error: BaseException) -> bool:
    """Return whether the same request may succeed later."""
    if isinstance(error, Boto3Error) and error.__context__ is not None:  # of an upload: it hides the cause
        error = error.__context__
    if isinstance(error, ClientError):
        return http_status(error) in BUSY_STATUSES or error.response.get("Error", {}).get("Code") in BUSY_CODES
    return not isinstance(error, NoCredentialsError | ParamValidationError)
