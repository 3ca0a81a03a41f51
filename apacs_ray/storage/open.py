"""From a URI to its store."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from apacs_ray.errors import UsageError
from apacs_ray.redact import uri_defect
from apacs_ray.storage.base import Store
from apacs_ray.storage.local import LocalStore
from apacs_ray.storage.s3 import S3Store
from apacs_ray.storage.s3_access import resolve_access


def is_local(uri: str) -> bool:
    """Return whether only this machine sees what lies at `uri`."""
    return "://" not in uri or urlsplit(uri).scheme == "file"


def open_store(uri: str) -> Store:
    """Open the store at a local path or `s3://bucket/prefix`. Nothing needs to be there yet.

    Args:
        uri: A path, with `~` for the home folder, `file://PATH`, or `s3://bucket/prefix`; keys are taken verbatim.

    Returns:
        A `LocalStore` or an `S3Store`.

    Raises:
        UsageError: Another scheme, no bucket, credentials inside the URI, or none for S3 anywhere else.
    """
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
    return S3Store(bucket, prefix.strip("/"), resolve_access())
