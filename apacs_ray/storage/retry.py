"""Requests to S3 and the troubles they meet: which pass, how long each is tried again; no cut answer is the whole.

Each request is tried by this module and not by boto3, whose budget of retries an outage uses up: the requests after it
would fail at the first trouble. boto3 also takes a body that ends too early for the whole one.
"""

from __future__ import annotations

import io
import random
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, ParamValidationError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from apacs_ray.console import say
from apacs_ray.errors import ApacsError, RefusedError, StoreTroubleError
from apacs_ray.redact import redact

T = TypeVar("T")
TIMEOUT = 300.0  # s that a request is tried again
PAUSE, LONGEST_PAUSE = 0.1, 20.0  # s between two attempts, doubled each time
SAID_AFTER = 10.0  # s of waiting that a person should know of
BUSY = (429, 500, 502, 503, 504)  # answers of a store that may do better later
BUSY_CODES = ("SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "OperationAborted")
TAIL = 64 << 10  # bytes read with the first request to a file: the footer of a Parquet file, or all of a small one


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


def with_retries(what: str, ask: Callable[[], T], timeout: float, expected: Sequence[int] = ()) -> T:
    """What `ask()` returns; asked again for `timeout` seconds while the store is in trouble.

    Raises StoreTroubleError after that, RefusedError for a 403 and ApacsError for other refusals, each beginning with
    `what`; answers with an
    `expected` status are the caller's, as they are.
    """
    started, pause, said = time.monotonic(), PAUSE, False
    while True:
        try:
            answer = ask()
        except FAILURES as error:
            if status(error) in expected:
                raise
            if not _may_pass(error):
                kind = RefusedError if status(error) == 403 else ApacsError
                raise kind(f"{what} ({redact(str(error))})") from error
            waited = time.monotonic() - started
            if waited + pause > timeout:
                after = f"; tried for {waited:.0f} s" if timeout >= SAID_AFTER else ""
                raise StoreTroubleError(f"{what} ({redact(str(error))}){after}") from error
            if waited > SAID_AFTER and not said:
                said = True
                say(f"waiting for the store, {timeout - waited:.0f} s at most: {what} ({error})")
        else:
            if said:
                say(f"the store answers again after {time.monotonic() - started:.0f} s")
            return answer
        time.sleep(random.uniform(pause / 2, pause))  # not all workers at the same moment
        pause = min(2 * pause, LONGEST_PAUSE)


def status(error: BaseException) -> int:
    """The HTTP status of a store's answer, 0 when there was none."""
    return int(error.response["ResponseMetadata"].get("HTTPStatusCode", 0)) if isinstance(error, ClientError) else 0


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, Boto3Error) and error.__context__ is not None:  # of an upload: it hides what happened
        error = error.__context__
    if isinstance(error, ClientError):
        return status(error) in BUSY or error.response.get("Error", {}).get("Code") in BUSY_CODES
    return not isinstance(error, NoCredentialsError | ParamValidationError)


class ObjectFile(io.RawIOBase):
    """Random access to one version of an object. Raises FileNotFoundError, and what `with_retries` raises."""

    def __init__(self, client: Any, bucket: str, key: str, timeout: float) -> None:
        super().__init__()
        self._client, self._bucket, self._key, self._timeout = client, bucket, key, timeout
        self._place = 0
        self._version: str | None = None
        try:
            self._tail, self._size = self._get(f"bytes=-{TAIL}")
        except ClientError as error:
            if status(error) == 404:
                raise FileNotFoundError(f"s3://{bucket}/{key}: is not there") from error
            self._tail, self._size = b"", 0  # an empty object has no last bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1, /) -> bytes:
        start = self._place
        end = self._size if size < 0 else min(start + size, self._size)
        if start >= end:
            return b""
        before = self._size - len(self._tail)  # bytes that are not in memory
        if start >= before:
            content = self._tail[start - before : end - before]
        else:
            try:
                content, _ = self._get(f"bytes={start}-{end - 1}")
            except ClientError as error:
                raise ApacsError(f"s3://{self._bucket}/{self._key}: changed while it was read ({error})") from error
        self._place = end
        return content

    def _get(self, span: str) -> tuple[bytes, int]:
        """The bytes of a range, and the size of the whole object."""
        same = {"IfMatch": self._version} if self._version else {}

        def ask() -> tuple[bytes, int]:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key, Range=span, **same)
            content = whole_body(answer)
            self._version = version_in(answer)
            if not same and answer["ResponseMetadata"]["HTTPStatusCode"] == 200:
                return content, len(content)  # what a store may do that has less than was asked
            found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange", ""))
            if not found or int(found[2]) - int(found[1]) + 1 != len(content):
                raise IncompleteAnswer(f"{span} asked, {answer.get('ContentRange')} with {len(content)} bytes came")
            return content, int(found[3])

        return with_retries(f"s3://{self._bucket}/{self._key}: cannot read", ask, self._timeout, (404, 412, 416))


def whole_body(answer: Any) -> bytes:
    """The body of an answer to GetObject. Raises IncompleteAnswer when it is cut."""
    content: bytes = answer["Body"].read()
    if answer.get("ContentLength") != len(content):
        raise IncompleteAnswer(f"{len(content)} of {answer.get('ContentLength')} bytes came")
    return content


def version_in(answer: Any) -> str:
    """The ETag in the head of an answer. Raises IncompleteAnswer when the head is cut: http.client takes that."""
    version = str(answer.get("ETag", ""))
    if not version or version.count('"') % 2:
        raise IncompleteAnswer("the head of the answer is cut")
    return version
