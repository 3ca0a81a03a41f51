"""A store in a prefix of an S3 bucket, or of a service that speaks its protocol.

`with_retries` (retry) makes every request.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
from botocore.exceptions import ClientError

from apacs_ray.errors import ApacsError
from apacs_ray.storage.base import Conflict, Entry, Store
from apacs_ray.storage.retry import BUSY_CODES, TIMEOUT, IncompleteAnswer, http_status, with_retries
from apacs_ray.storage.s3_access import S3Access, request_client, s3_filesystem, upload_client

T = TypeVar("T")
# bytes read with the first request to a file: all of a small one, or the footer of a Parquet file, which of a shard of
# 128 tiles of 2000 px has 130 kB
TAIL = 256 << 10


@dataclass(frozen=True)
class S3Store(Store):
    """A prefix of an S3 bucket. Keys of objects are taken verbatim.

    Attributes:
        bucket: Its name.
        prefix: Without slashes at its ends; empty for the whole bucket.
        access: How the bucket is reached.
        timeout: Seconds for which a request is tried again.
    """

    bucket: str
    prefix: str
    access: S3Access
    timeout: float = TIMEOUT

    @property
    def uri(self) -> str:  # type: ignore[override]
        """Bucket and prefix."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix and path else self.prefix or path

    @property
    def _client(self) -> Any:
        return request_client(self.access)

    def child(self, path: str) -> S3Store:
        """Return the store of a longer prefix."""
        return replace(self, prefix=self._key(path))

    def with_timeout(self, seconds: float) -> S3Store:
        """Return this store with `seconds` as the time for which a request is tried again."""
        return replace(self, timeout=seconds)

    def _request(self, path: str, failure: str, request: Callable[[], T], expected: Sequence[int] = ()) -> T:
        return with_retries(self.bucket, f"{self.uri_of(path)}: {failure}", request, self.timeout, expected)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Yield every object below folder `prefix`, a page of the listing at a time."""
        key = self._key(prefix)
        strip = len(self.prefix) + 1 if self.prefix else 0
        arguments = {"Bucket": self.bucket, "Prefix": f"{key.rstrip('/')}/" if key else ""}
        while True:
            page = self._request(prefix, "cannot be listed", lambda: self._client.list_objects_v2(**arguments))
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # a folder made by a console
                    yield Entry(item["Key"][strip:], item["Size"], item["ETag"].strip('"'))
            if not page["IsTruncated"]:
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def read(self, path: str) -> bytes:
        """Return all bytes of an object. Raises FileNotFoundError."""

        def get() -> bytes:
            return body_of(self._client.get_object(Bucket=self.bucket, Key=self._key(path)))

        try:
            return self._request(path, "cannot read", get, (404,))
        except ClientError as error:
            raise FileNotFoundError(f"{self.uri_of(path)}: is not there") from error

    def open(self, path: str) -> pa.NativeFile:
        """Open one version of an object for random access. Raises FileNotFoundError."""
        return pa.PythonFile(ObjectFile(self._client, self.bucket, self._key(path), self.timeout), mode="r")

    def version(self, path: str) -> str | None:
        """Return the ETag of an object, None when there is none."""

        def head() -> str:
            return etag_of(self._client.head_object(Bucket=self.bucket, Key=self._key(path)))

        try:
            return self._request(path, "cannot read", head, (404,))
        except ClientError:
            return None

    def write(self, path: str, content: bytes) -> None:
        """Replace an object as a whole."""
        self._put(path, content)

    def create(self, path: str, content: bytes) -> str:
        """Write an object that must not exist and return its ETag. Raises Conflict when it exists."""
        return self._put(path, content, IfNoneMatch="*")

    def replace(self, path: str, content: bytes, version: str) -> str:
        """Replace an object whose ETag must still be `version` and return the new ETag. Raises Conflict."""
        return self._put(path, content, IfMatch=version)

    def _put(self, path: str, content: bytes, **condition: str) -> str:
        attempts = 0

        def put() -> str:
            nonlocal attempts
            attempts += 1
            return etag_of(self._client.put_object(Bucket=self.bucket, Key=self._key(path), Body=content, **condition))

        try:
            return self._request(path, "cannot write", put, (404, 409, 412) if condition else ())
        except ClientError as error:
            if error.response["Error"].get("Code") == "NoSuchBucket":  # no other writer's object was met there
                raise ApacsError(f"{self.uri_of(path)}: cannot write ({error})") from error
            version = self.version(path) if attempts > 1 else None
            if version is not None and self.read(path) == content:
                return version  # our own write, whose answer was lost
            raise Conflict(self.uri_of(path)) from error

    def upload(self, path: str, source: Path) -> None:
        """Replace an object by a local file, in parts where it is large."""

        def put() -> None:
            try:
                upload_client(self.access).upload_file(str(source), self.bucket, self._key(path))
            except KeyError as error:  # the ETag of a part
                raise IncompleteAnswer("an answer to a part was cut") from error

        self._request(path, "cannot write", put)

    def delete(self, path: str) -> None:
        """Remove an object; no error when it is gone already."""
        key = self._key(path)
        self._request(path, "cannot delete", lambda: self._client.delete_object(Bucket=self.bucket, Key=key))

    def delete_folder(self, path: str) -> None:
        """Remove every object below `path`, 1000 with a request."""
        keys = [entry.path for entry in self.list(path)]

        def delete(objects: Sequence[dict[str, str]]) -> None:
            answer = self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True})
            for failed in answer.get("Errors", ()):
                kind = IncompleteAnswer if failed["Code"] in BUSY_CODES else ApacsError
                raise kind(f"s3://{self.bucket}/{failed['Key']}: cannot delete ({failed['Code']})")

        for start in range(0, len(keys), 1000):
            objects = [{"Key": self._key(key)} for key in keys[start : start + 1000]]
            self._request(path, "cannot delete", functools.partial(delete, objects))

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The pyarrow filesystem of S3, opened once a process."""
        return s3_filesystem(self.access)

    def full_path(self, path: str = "") -> str:
        """Return bucket and key, as pyarrow wants them."""
        return f"{self.bucket}/{self._key(path)}".rstrip("/")


class ObjectFile(io.RawIOBase):
    """Random access to one version of an object.

    Raises FileNotFoundError without such an object, ApacsError when it was replaced while it was read, and the errors
    of `with_retries`.
    """

    def __init__(self, client: Any, bucket: str, key: str, timeout: float) -> None:
        super().__init__()
        self._client, self._bucket, self._key, self._timeout = client, bucket, key, timeout
        self._position = 0
        self._version: str | None = None
        try:
            self._tail, self._size = self._get(f"bytes=-{TAIL}")
        except ClientError as error:
            if http_status(error) == 404:
                raise FileNotFoundError(f"s3://{bucket}/{key}: is not there") from error
            self._tail, self._size = b"", 0  # an empty object has no last bytes

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position, in bytes from the start, the position or the end (`whence`), and return it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Return the position in bytes from the start."""
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        """Read from the position on.

        Args:
            size: Bytes to read at most; all that follow when negative.

        Returns:
            The bytes, fewer than `size` only at the end of the object.

        Raises:
            ApacsError: The object was replaced since it was opened, or the store refuses.
        """
        start = self._position
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
        self._position = end
        return content

    def _get(self, span: str) -> tuple[bytes, int]:
        """Return the bytes of a range, and the size of the whole object."""
        same = {"IfMatch": self._version} if self._version else {}

        def get() -> tuple[bytes, int]:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key, Range=span, **same)
            content = body_of(answer)
            self._version = etag_of(answer)
            if not same and answer["ResponseMetadata"]["HTTPStatusCode"] == 200:
                return content, len(content)  # a store may answer so when the object is smaller than the range
            match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange", ""))
            if not match or int(match[2]) - int(match[1]) + 1 != len(content):
                raise IncompleteAnswer(f"{span} asked, {answer.get('ContentRange')} with {len(content)} bytes came")
            return content, int(match[3])

        failure = f"s3://{self._bucket}/{self._key}: cannot read"
        return with_retries(self._bucket, failure, get, self._timeout, (404, 412, 416))


def body_of(answer: Any) -> bytes:
    """Read the body of an answer to GetObject. botocore holds it to the length in the head, where that has come.

    Args:
        answer: As boto3 returns it.

    Returns:
        All bytes.

    Raises:
        IncompleteAnswer: The head was cut before the length of the body; http.client takes that for a whole head.
    """
    if "ContentLength" not in answer:
        raise IncompleteAnswer("the head of the answer is cut")
    content: bytes = answer["Body"].read()
    return content


def etag_of(answer: Any) -> str:
    """Return the ETag in the head of an answer. Raises IncompleteAnswer when the head is cut."""
    etag = str(answer.get("ETag", ""))
    if not etag or etag.count('"') % 2:
        raise IncompleteAnswer("the head of the answer is cut")
    return etag
