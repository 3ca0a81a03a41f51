"""Checks of data and output on S3 by the requests of a run: each right is tried by itself, within seconds."""

from __future__ import annotations

import contextlib
import email.utils
import functools
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from apacs_ray.doctor.answers import denied, explain
from apacs_ray.doctor.finding import Finding, examine
from apacs_ray.storage import S3Access, S3Store, s3_client

CONNECT_TIMEOUT, READ_TIMEOUT = 3.0, 5.0  # s, of one request; none is tried again
PYARROW_TIMEOUT = 15.0  # s for a read as workers read, which tries again by itself
CONTENT = b"written by apacs_ray doctor; may be deleted\n"
SKEW_WARNED, SKEW_REFUSED = 60.0, 900.0  # s; S3 refuses requests from the second on
FIRST_BYTES = "bytes=0-1023"
CONDITIONS = "a run's lock needs it: use a store with conditional writes (AWS S3, MinIO, Ceph) or a local --output"


@functools.lru_cache(maxsize=8)
def _client_without_retries(access: S3Access) -> Any:
    limits = Config(connect_timeout=CONNECT_TIMEOUT, read_timeout=READ_TIMEOUT, retries={"total_max_attempts": 1})
    return s3_client(access, limits)


@dataclass
class Bucket:
    """A prefix of a bucket, whose rights are tried one by one.

    Attributes:
        store: The prefix.
        name: The check that findings are of.
        skew: Seconds that the store's clock is ahead of ours, None before the first answer.
        missing: Rights that were denied.
        versions: Of the object written here, where the bucket keeps them.
    """

    store: S3Store
    name: str
    skew: float | None = None
    missing: list[str] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._client = _client_without_retries(self.store.access)

    def ask(self, right: str, operation: str, **arguments: Any) -> dict[str, Any] | None:
        """Make one request.

        Args:
            right: What the request needs, as in a policy.
            operation: A method of boto3's client.
            **arguments: Of the method, beside the bucket.

        Returns:
            The answer; None when the right is missing, which is noted.

        Raises:
            ClientError: The store refuses for another reason.
            BotoCoreError: There is no answer.
        """
        sent = time.time()
        try:
            answer: dict[str, Any] = getattr(self._client, operation)(Bucket=self.store.bucket, **arguments)
        except ClientError as error:
            self._note(error.response, sent)
            if denied(error):
                if right not in self.missing:
                    self.missing.append(right)
                return None
            raise
        self._note(answer, sent)
        return answer

    def first_objects(self) -> list[dict[str, Any]] | None:
        """List the first objects below the prefix; None without the right."""
        prefix = f"{self.store.prefix}/" if self.store.prefix else ""
        answer = self.ask("s3:ListBucket", "list_objects_v2", Prefix=prefix, MaxKeys=1000)
        return None if answer is None else answer.get("Contents", [])

    def findings(self) -> list[Finding]:
        """Return a failed line for each right that is missing."""
        advice = f"allow it in the policy of the user or role, and of the bucket: on arn:aws:s3:::{self.store.bucket}"
        below = f"/{self.store.prefix}/*".replace("//", "/")
        return [
            Finding(
                self.name,
                "failed",
                f"{self.store.uri}: {right} is denied",
                advice if right == "s3:ListBucket" else advice + below,
            )
            for right in self.missing
        ]

    def _note(self, answer: dict[str, Any], sent: float) -> None:
        metadata = answer.get("ResponseMetadata", {})
        with contextlib.suppress(KeyError, TypeError, ValueError):
            date = email.utils.parsedate_to_datetime(metadata["HTTPHeaders"]["date"])  # in whole seconds
            self.skew = date.timestamp() + 0.5 - (sent + time.time()) / 2
        if answer.get("VersionId", "null") != "null":
            self.versions.append(answer["VersionId"])


def check_data(bucket: Bucket) -> list[Finding]:
    """Check that the prefix can be listed and its first object read, by boto3 and as workers read."""
    store, name = bucket.store, bucket.name
    try:
        objects = bucket.first_objects()
        if objects is None:
            return bucket.findings()
        first = next((item["Key"] for item in objects if item["Size"]), None)
        if first is None:
            advice = f"aws s3 ls {store.uri}/ shows what is there; put images or slides there, or correct the prefix"
            return [Finding(name, "failed", f"{store.uri}: no objects there", advice)]
        bucket.ask("s3:GetObject", "get_object", Key=first, Range=FIRST_BYTES)
    except (ClientError, BotoCoreError) as error:
        return [explain(name, store, error)]
    if bucket.missing:
        return bucket.findings()
    path = first[len(store.prefix) + 1 :] if store.prefix else first
    return _read_as_workers(bucket, path) or [Finding(name, "ok", f"{store.uri}: lists, and reads {path}")]


def check_output(bucket: Bucket) -> list[Finding]:
    """Check each operation of a run there. One object, `.doctor-<random>`, is written and deleted."""
    store, name = bucket.store, bucket.name
    path = f".doctor-{secrets.token_hex(8)}"
    key = f"{store.prefix}/{path}" if store.prefix else path
    findings: list[Finding] = []
    try:
        bucket.first_objects()
        try:
            findings += _write(bucket, key)
            answer = _or_absent(bucket, "s3:GetObject", "get_object", Key=key)
            if answer is not None and answer["Body"].read()[: len(CONTENT)] != CONTENT:
                findings.append(Finding(name, "failed", f"{store.uri_of(path)}: reads otherwise than it was written"))
            if answer is not None:
                findings += _read_as_workers(bucket, path)
        finally:
            findings += _delete(bucket, key)
    except (ClientError, BotoCoreError) as error:
        return [*findings, explain(name, store, error)]
    findings = bucket.findings() + findings
    done = "lists, creates, reads and deletes; conditional writes are honoured"
    return findings or [Finding(name, "ok", f"{store.uri}: {done}")]


def _write(bucket: Bucket, key: str) -> list[Finding]:
    """Create exclusively, once more, then replace on a wrong and on the right condition."""

    def put(**condition: str) -> dict[str, Any] | None:
        return bucket.ask("s3:PutObject", "put_object", Key=key, Body=CONTENT, **condition)

    def refused(header: str, **condition: str) -> list[Finding]:
        try:
            put(**condition)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] in (404, 409, 412):
                return []
            raise
        message = f"{bucket.store.uri}: {header} is ignored, a write that it forbids was done"
        return [Finding(bucket.name, "failed", message, CONDITIONS)]

    try:
        made = put(IfNoneMatch="*")
        if made is None:
            return []
        findings = refused("If-None-Match: *", IfNoneMatch="*")
        if not findings:
            findings = refused("If-Match", IfMatch='"00000000000000000000000000000000"')
        if not findings:
            put(IfMatch=made["ETag"])
    except ClientError as error:
        status, code = error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"].get("Code", "")
        if status == 501 or code in ("NotImplemented", "InvalidArgument", "InvalidRequest", "PreconditionFailed"):
            message = f"{bucket.store.uri}: a conditional write is refused ({code or status})"
            return [Finding(bucket.name, "failed", message, CONDITIONS)]
        raise
    return findings


def _or_absent(bucket: Bucket, right: str, operation: str, **arguments: Any) -> dict[str, Any] | None:
    """Make a request as `Bucket.ask` does; None also without such an object, as after a write that was denied."""
    try:
        return bucket.ask(right, operation, **arguments)
    except ClientError as error:
        if error.response["Error"].get("Code") in ("NoSuchKey", "404"):
            return None
        raise


def _delete(bucket: Bucket, key: str) -> list[Finding]:
    """Delete what was written, in a bucket with versioning also its versions as far as that is allowed."""
    left = Finding(
        bucket.name,
        "failed",
        f"s3://{bucket.store.bucket}/{key} could not be deleted",
        "delete this small object when you have the right to",
    )
    written = "s3:PutObject" not in bucket.missing
    try:
        answer = bucket.ask("s3:DeleteObject", "delete_object", Key=key)
        for version in list(bucket.versions) if answer is not None else ():
            with contextlib.suppress(ClientError):  # s3:DeleteObjectVersion, which a run does not need
                bucket.ask("", "delete_object", Key=key, VersionId=version)
    except (ClientError, BotoCoreError):
        return [left] if written else []
    finally:
        if "" in bucket.missing:
            bucket.missing.remove("")
    return [left] if answer is None and written else []


def _read_as_workers(bucket: Bucket, path: str) -> list[Finding]:
    """Read by pyarrow, as Ray does: it has its own TLS and credentials chain. Returns no finding when that works."""

    def read() -> list[Finding]:
        with bucket.store.filesystem.open_input_file(bucket.store.full_path(path)) as file:
            file.read(1024)
        return []

    advice = "boto3 reads it, pyarrow does not: for a CA of your own set SSL_CERT_FILE too; check proxies and roles"
    return [
        Finding(bucket.name, "failed", f"{bucket.store.uri}: workers could not read: {finding.message}", advice)
        for finding in examine(bucket.name, read, PYARROW_TIMEOUT)
    ]


def check_clock(buckets: Sequence[Bucket]) -> list[Finding]:
    """Compare this machine's clock with the stores'; one line for the worst."""
    answered = [bucket for bucket in buckets if bucket.skew is not None]
    if not answered:
        return []
    worst = max(answered, key=lambda bucket: abs(bucket.skew or 0.0))
    skew = worst.skew or 0.0
    message = f"{abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the store of {worst.store.uri}"
    if abs(skew) < SKEW_WARNED:
        return [Finding("clock", "ok", message)]
    advice = "set this machine's clock: timedatectl set-ntp true, or start chronyd"
    if abs(skew) < SKEW_REFUSED:
        return [Finding("clock", "warning", f"{message}; S3 refuses from {SKEW_REFUSED:.0f} s on", advice)]
    return [Finding("clock", "failed", f"{message}; S3 refuses that", advice)]
