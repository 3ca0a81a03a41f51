"""Where bytes live: one way to open a local path or `s3://bucket/prefix`, here and in every worker.

boto3's session resolves credentials, region and endpoint (environment, profile, instance role, `AWS_ENDPOINT_URL`),
and makes our requests. Ray stores its own state through pyarrow's `S3FileSystem`: static keys are handed to that
explicitly, since left alone it ignores a profile's region and endpoint; keys that expire are left to the SDK's own
chain, which renews them. Keys of objects are taken verbatim.
A `Store` can be pickled: it travels to Ray workers and opens its connections there.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import stat
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import boto3
import pyarrow as pa
import pyarrow.fs as pafs
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from apacs_ray.console import say
from apacs_ray.errors import ApacsError, UsageError
from apacs_ray.redact import redact, register_secrets, uri_defect
from apacs_ray.storage.own_folder import open_own_file
from apacs_ray.storage.retry import (
    BUSY_CODES,
    TIMEOUT,
    IncompleteAnswer,
    ObjectFile,
    version_in,
    whole_body,
    with_retries,
)

T = TypeVar("T")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
SMALL = 64 << 20  # bytes of a table, a record or a description that a person or a run wrote
CONNECT, READ = 10, 60  # s until a connection stands, and between two pieces of an answer
PARTS = {"mode": "legacy", "total_max_attempts": 6}  # retries of an upload's parts: this mode has no budget for them
ATTEMPTS = 13  # of a request of pyarrow's, over three minutes and a half: throttling (503 SlowDown) is normal


@dataclass(frozen=True)
class Entry:
    """One listed object: path below the listed store ('/'-separated, verbatim), size in bytes, version (ETag, or
    size and mtime)."""

    path: str
    size: int
    version: str


class Conflict(Exception):
    """A conditional write met another writer's object."""


class Store(ABC):
    """A folder of bytes at `uri`. Paths are relative to it; a write appears at once or not at all."""

    uri: str

    @abstractmethod
    def child(self, path: str) -> Store:
        """The store below `path`."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every object below folder `prefix`, recursively, in no particular order; S3 is read in pages."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """All bytes of an object. Raises FileNotFoundError."""

    def read_small(self, path: str, most: int = SMALL) -> bytes:
        """As `read`, of a file that others may have written. Raises ApacsError when it has more than `most` bytes."""
        with self.open(path) as stream:
            if stream.size() > most:
                raise ApacsError(f"{self.uri_of(path)}: {stream.size()} bytes, where at most {most} are read")
            return cast(bytes, stream.read())

    @abstractmethod
    def version(self, path: str) -> str | None:
        """The object's version, None when there is none."""

    @abstractmethod
    def write(self, path: str, content: bytes) -> None:
        """Replace an object as a whole."""

    @abstractmethod
    def upload(self, path: str, source: Path) -> None:
        """Replace an object by a local file, of any size."""

    @abstractmethod
    def create(self, path: str, content: bytes) -> str:
        """Write an object that must not exist and return its version. Raises Conflict when it does."""

    @abstractmethod
    def replace(self, path: str, content: bytes, version: str) -> str:
        """Replace an object that must still be at `version`; returns the new one. Raises Conflict."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove an object; no error when it is gone already."""

    @abstractmethod
    def delete_folder(self, path: str) -> None:
        """Remove everything below `path`."""

    @property
    @abstractmethod
    def filesystem(self) -> pafs.FileSystem:
        """pyarrow's filesystem for this store, opened once a process."""

    @abstractmethod
    def full_path(self, path: str = "") -> str:
        """`path` as `filesystem` wants it."""

    def with_timeout(self, seconds: float) -> Store:
        """This store, that waits so long when it is in trouble. What is local has no such trouble."""
        return self

    @property
    def is_local(self) -> bool:
        """Whether only this machine sees it."""
        return isinstance(self, LocalStore)

    def uri_of(self, path: str) -> str:
        """The URI of an object, for people and for tile rows."""
        return f"{self.uri.rstrip('/')}/{path}"

    def open(self, path: str) -> pa.NativeFile:
        """A random-access reader. Raises FileNotFoundError."""
        return self.filesystem.open_input_file(self.full_path(path))


@dataclass(frozen=True)
class LocalStore(Store):
    """A folder of this machine."""

    root: str

    @property
    def uri(self) -> str:  # type: ignore[override]
        return self.root

    def child(self, path: str) -> LocalStore:
        return LocalStore(os.path.join(self.root, path))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        base = os.path.join(self.root, prefix)
        above: dict[str, set[tuple[int, int]]] = {base: set()}  # folder -> those it lies in, links followed
        for folder, folders, files in os.walk(base, onerror=_say_not_listed, followlinks=True):
            inside = above.pop(folder) | {_identity(folder)}
            # a link to a folder that it lies in would lead round and round
            folders[:] = sorted(name for name in folders if _identity(os.path.join(folder, name)) not in inside)
            above |= {os.path.join(folder, name): inside for name in folders}
            closed = 0  # files that may not even be looked at
            for name in sorted(files):
                full = os.path.join(folder, name)
                try:
                    status = os.stat(full)
                except PermissionError:
                    closed += 1
                    continue
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.ELOOP):  # removed meanwhile; a link to nowhere or to itself
                        continue
                    raise
                if stat.S_ISREG(status.st_mode):  # to read a pipe or a device may never end
                    relative = os.path.relpath(full, self.root).replace(os.sep, "/")
                    yield Entry(relative, status.st_size, _local_version(status))
            if closed:
                say(f"{folder}: {closed} files may not be read and are left out; correct the folder's rights")

    def read(self, path: str) -> bytes:
        return Path(self.root, path).read_bytes()

    def version(self, path: str) -> str | None:
        try:
            return _local_version(os.stat(os.path.join(self.root, path)))
        except FileNotFoundError:
            return None

    def write(self, path: str, content: bytes) -> None:
        self._place(path, lambda beside: beside.write_bytes(content))

    def upload(self, path: str, source: Path) -> None:
        self._place(path, lambda beside: shutil.copyfile(source, beside))

    def _place(self, path: str, put: Callable[[Path], object]) -> None:
        target = self._own(path)
        beside = _beside(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            put(beside)
            beside.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise _cannot_write(target, error) from error

    def create(self, path: str, content: bytes) -> str:
        target = self._own(path)
        # a linked name appears complete and only once when this process dies between (O_EXCL may leave it empty)
        beside = _beside(target)
        with _full_disk_named(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                beside.write_bytes(content)
                os.link(beside, target)
            except FileExistsError as error:
                raise Conflict(str(target)) from error
            finally:
                beside.unlink(missing_ok=True)
        return _local_version(os.stat(target))

    def replace(self, path: str, content: bytes, version: str) -> str:
        import fcntl

        target = self._own(path)
        guard = target.with_name(f".{target.name}.guard")
        with _full_disk_named(guard), open_own_file(guard) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.version(path) != version:
                raise Conflict(path)
            self.write(path, content)
            return cast(str, self.version(path))

    def delete(self, path: str) -> None:
        self._own(path).unlink(missing_ok=True)

    def delete_folder(self, path: str) -> None:
        shutil.rmtree(self._own(path), ignore_errors=True)  # removes links, never what they lead to

    def _own(self, path: str) -> Path:
        """The file to write or delete at `path`. Raises ApacsError when that would be outside this store."""
        target = Path(self.root, path)
        root = os.path.realpath(self.root)
        parent = os.path.realpath(target.parent if path else target)
        if (is_bad_path(path) and path) or os.path.commonpath([root, parent]) != root:
            raise ApacsError(
                f"{path!r} leads out of {self.root}, where nothing is written; remove the link or the file"
            )
        return target

    @property
    def filesystem(self) -> pafs.FileSystem:
        return pafs.LocalFileSystem()

    def full_path(self, path: str = "") -> str:
        return os.path.join(self.root, path) if path else self.root


@dataclass(frozen=True)
class S3Access:
    """How to reach S3, resolved once by boto3 on the driver. Static keys are None where the SDK's chain renews them."""

    region: str | None
    endpoint: str | None
    access_key: str | None
    secret_key: str | None
    session_token: str | None

    def __post_init__(self) -> None:
        register_secrets(self.access_key, self.secret_key, self.session_token)

    def __setstate__(self, state: dict[str, Any]) -> None:  # in a worker
        self.__dict__.update(state)
        self.__post_init__()

    def __repr__(self) -> str:  # secrets never reach a log
        return redact(f"S3Access(region={self.region!r}, endpoint={self.endpoint!r})")


@dataclass(frozen=True)
class S3Store(Store):
    """A prefix of an S3 bucket, or of a store that speaks its protocol."""

    bucket: str
    prefix: str
    access: S3Access
    timeout: float = TIMEOUT  # s

    @property
    def uri(self) -> str:  # type: ignore[override]
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix and path else self.prefix or path

    @property
    def _client(self) -> Any:
        return _s3_client(self.access)

    def child(self, path: str) -> S3Store:
        return replace(self, prefix=self._key(path))

    def with_timeout(self, seconds: float) -> S3Store:
        return replace(self, timeout=seconds)

    def _ask(self, path: str, failed: str, ask: Callable[[], T], expected: Sequence[int] = ()) -> T:
        return with_retries(f"{self.uri_of(path)}: {failed}", ask, self.timeout, expected)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        key = self._key(prefix)
        strip = len(self.prefix) + 1 if self.prefix else 0
        asked = {"Bucket": self.bucket, "Prefix": f"{key.rstrip('/')}/" if key else ""}
        while True:
            page = self._ask(prefix, "cannot be listed", lambda: self._client.list_objects_v2(**asked))
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # a folder made by a console
                    yield Entry(item["Key"][strip:], item["Size"], item["ETag"].strip('"'))
            if not page["IsTruncated"]:
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def read(self, path: str) -> bytes:
        def ask() -> bytes:
            return whole_body(self._client.get_object(Bucket=self.bucket, Key=self._key(path)))

        try:
            return self._ask(path, "cannot read", ask, (404,))
        except ClientError as error:
            raise FileNotFoundError(f"{self.uri_of(path)}: is not there") from error

    def open(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(ObjectFile(self._client, self.bucket, self._key(path), self.timeout), mode="r")

    def version(self, path: str) -> str | None:
        def ask() -> str:
            return version_in(self._client.head_object(Bucket=self.bucket, Key=self._key(path)))

        try:
            return self._ask(path, "cannot read", ask, (404,))
        except ClientError:
            return None

    def write(self, path: str, content: bytes) -> None:
        self._put(path, content)

    def create(self, path: str, content: bytes) -> str:
        return self._put(path, content, IfNoneMatch="*")

    def replace(self, path: str, content: bytes, version: str) -> str:
        return self._put(path, content, IfMatch=version)

    def _put(self, path: str, content: bytes, **condition: str) -> str:
        attempts = 0

        def ask() -> str:
            nonlocal attempts
            attempts += 1
            return version_in(
                self._client.put_object(Bucket=self.bucket, Key=self._key(path), Body=content, **condition)
            )

        try:
            return self._ask(path, "cannot write", ask, (404, 409, 412) if condition else ())
        except ClientError as error:
            if error.response["Error"].get("Code") == "NoSuchBucket":  # nobody's write was met there
                raise ApacsError(f"{self.uri_of(path)}: cannot write ({error})") from error
            version = self.version(path) if attempts > 1 else None
            if version is not None and self.read(path) == content:
                return version  # our own write, whose answer was lost
            raise Conflict(self.uri_of(path)) from error

    def upload(self, path: str, source: Path) -> None:
        def ask() -> None:
            try:
                _s3_client(self.access, parts=True).upload_file(str(source), self.bucket, self._key(path))
            except KeyError as error:  # the ETag of a part
                raise IncompleteAnswer("an answer to a part was cut") from error

        self._ask(path, "cannot write", ask)

    def delete(self, path: str) -> None:
        self._ask(path, "cannot delete", lambda: self._client.delete_object(Bucket=self.bucket, Key=self._key(path)))

    def delete_folder(self, path: str) -> None:
        keys = [entry.path for entry in self.list(path)]

        def ask(objects: Sequence[dict[str, str]]) -> None:
            answer = self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True})
            for failed in answer.get("Errors", ()):
                kind = IncompleteAnswer if failed["Code"] in BUSY_CODES else ApacsError
                raise kind(f"s3://{self.bucket}/{failed['Key']}: cannot delete ({failed['Code']})")

        for start in range(0, len(keys), 1000):
            objects = [{"Key": self._key(key)} for key in keys[start : start + 1000]]
            self._ask(path, "cannot delete", functools.partial(ask, objects))

    @property
    def filesystem(self) -> pafs.FileSystem:
        return _s3_filesystem(self.access)

    def full_path(self, path: str = "") -> str:
        return f"{self.bucket}/{self._key(path)}".rstrip("/")


def is_bad_path(path: str) -> bool:
    """Whether a path below a store could lead out of a folder, or is no text: absolute, `..`, empty parts, NUL."""
    parts = path.split("/")
    return any(part in ("", ".", "..") for part in parts) or "\0" in path or not _is_text(path)


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # a file name in another encoding
        return False
    return True


def _say_not_listed(error: OSError) -> None:
    """Tell of a folder whose files are not seen; that it is not there is no news, a run asks for many."""
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        say(f"{error.filename}: cannot be listed ({error.strerror}), so nothing in it is seen; correct its rights")


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError:  # removed meanwhile; nothing will be found in it
        return (-1, -1)
    return (status.st_dev, status.st_ino)


def _beside(target: Path) -> Path:
    """A name of its own for a file that becomes `target`; short, as a name may be 255 bytes long."""
    return target.with_name(f".{target.name[:40]}.{uuid.uuid4().hex[:8]}.tmp")


def is_local(uri: str) -> bool:
    """Whether only this machine sees what lies there."""
    return "://" not in uri or urlsplit(uri).scheme == "file"


def open_store(uri: str) -> Store:
    """The store at a local path or `s3://bucket/prefix`. Raises UsageError for other schemes and credentials."""
    if (defect := uri_defect(uri)) is not None:
        raise UsageError(defect)
    if "://" not in uri:
        return LocalStore(os.path.abspath(os.path.expanduser(uri)))
    scheme = urlsplit(uri).scheme
    if scheme == "file":
        return LocalStore(uri.removeprefix("file://"))
    if scheme != "s3":
        raise UsageError(f"{uri}: give a local path or s3://bucket/prefix")
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")  # by hand: keys may hold spaces, '?', '#'
    if not bucket:
        raise UsageError(f"{uri}: names no bucket")
    return S3Store(bucket, prefix.strip("/"), _resolve_access())


def _resolve_access() -> S3Access:
    try:
        session = boto3.Session()
        client = session.client("s3")
    except (BotoCoreError, ValueError) as error:
        raise UsageError(f"S3: cannot be set up: {redact(str(error))}") from error
    meta = client.meta
    endpoint = None if ".amazonaws.com" in meta.endpoint_url else meta.endpoint_url
    credentials = session.get_credentials()
    if credentials is None:
        raise UsageError("S3: no credentials found (environment, profile or instance role)")
    region = meta.region_name if meta.region_name not in (None, "aws-global") else session.region_name
    if hasattr(credentials, "refresh_needed"):  # temporary: whoever needs them renews them
        return S3Access(region, endpoint, None, None, None)
    return S3Access(region, endpoint, credentials.access_key, credentials.secret_key, credentials.token)


def s3_client(access: S3Access, config: Config) -> Any:
    """boto3's client, with its limits of time and attempts in `config`."""
    return boto3.Session().client(
        "s3",
        region_name=access.region,
        endpoint_url=access.endpoint,
        aws_access_key_id=access.access_key,
        aws_secret_access_key=access.secret_key,
        aws_session_token=access.session_token,
        config=config,
    )


@functools.lru_cache(maxsize=8)
def _s3_client(access: S3Access, *, parts: bool = False) -> Any:
    """A client that asks once, or (`parts`) one for uploads."""
    retries = PARTS if parts else {"total_max_attempts": 1}
    limits = Config(connect_timeout=CONNECT, read_timeout=READ, retries=retries, max_pool_connections=32)
    return s3_client(access, limits)


@functools.lru_cache(maxsize=8)
def _s3_filesystem(access: S3Access) -> pafs.FileSystem:
    return pafs.S3FileSystem(**s3_options(access))


def s3_options(access: S3Access) -> dict[str, Any]:
    """What pyarrow's `S3FileSystem` is opened with."""
    options: dict[str, Any] = {
        "retry_strategy": pafs.AwsDefaultS3RetryStrategy(max_attempts=ATTEMPTS),  # the standard one has a budget
        "allow_delayed_open": True,  # one request for a small file, not three
        "check_directory_existence_before_creation": True,  # nor one for each folder above it
        "connect_timeout": CONNECT,
        "request_timeout": READ,
    }
    if access.region:
        options["region"] = access.region
    if access.endpoint:
        parts = urlsplit(access.endpoint)
        options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc + parts.path.rstrip("/")}
    if access.access_key:
        options |= {"access_key": access.access_key, "secret_key": access.secret_key}
    if access.session_token:
        options["session_token"] = access.session_token
    return options


@contextlib.contextmanager
def _full_disk_named(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise _cannot_write(target, error) from error
        raise


def _cannot_write(target: Path, error: OSError) -> ApacsError:
    full = error.errno in NO_SPACE
    advice = "make room there, and the same command goes on" if full else "change that, or --output"
    return ApacsError(f"{target}: cannot write ({error.strerror}); {advice}")


def _local_version(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"
