"""How S3 is reached: credentials, region and endpoint, resolved once, and the clients that are opened with them.

boto3's session resolves them (environment, profile, instance role, `AWS_ENDPOINT_URL`) and makes our requests. Ray
stores its own state through pyarrow's `S3FileSystem`: static keys are handed to that explicitly, since left alone it
ignores a profile's region and endpoint; keys that expire are left to the SDK's own chain, which renews them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import boto3
import pyarrow.fs as pafs
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from apacs_ray.errors import UsageError
from apacs_ray.redact import redact, register_secrets

CONNECT_TIMEOUT, READ_TIMEOUT = 10, 60  # s until a connection stands, and between two pieces of an answer
UPLOAD_RETRIES = {"mode": "legacy", "total_max_attempts": 6}  # of an upload's parts: this mode has no budget for them
PYARROW_ATTEMPTS = 13  # of one request, over three minutes and a half: throttling (503 SlowDown) is normal


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


def resolve_access() -> S3Access:
    """Resolve credentials, region and endpoint as boto3 does.

    Returns:
        The access, which can be pickled.

    Raises:
        UsageError: There are no credentials, or what AWS is configured with cannot be used.
    """
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
    """Open boto3's S3 client, with its limits of time and attempts in `config`."""
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
def request_client(access: S3Access) -> Any:
    """Open, once a process, the client that asks once: `with_retries` asks again."""
    return s3_client(access, _limits({"total_max_attempts": 1}))


@functools.lru_cache(maxsize=8)
def upload_client(access: S3Access) -> Any:
    """Open, once a process, the client for uploads, which tries each part again by itself."""
    return s3_client(access, _limits(UPLOAD_RETRIES))


def _limits(retries: dict[str, Any]) -> Config:
    return Config(connect_timeout=CONNECT_TIMEOUT, read_timeout=READ_TIMEOUT, retries=retries, max_pool_connections=32)


@functools.lru_cache(maxsize=8)
def s3_filesystem(access: S3Access) -> pafs.FileSystem:
    """Open pyarrow's filesystem of S3, once a process."""
    return pafs.S3FileSystem(**s3_options(access))


def s3_options(access: S3Access) -> dict[str, Any]:
    """Return the arguments that pyarrow's `S3FileSystem` is opened with."""
    options: dict[str, Any] = {
        # the standard strategy has a budget, which an outage uses up
        "retry_strategy": pafs.AwsDefaultS3RetryStrategy(max_attempts=PYARROW_ATTEMPTS),
        "allow_delayed_open": True,  # one request for a small file, not three
        "check_directory_existence_before_creation": True,  # nor one for each folder above it
        "connect_timeout": CONNECT_TIMEOUT,
        "request_timeout": READ_TIMEOUT,
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
