"""Credentials of S3 that Ray uses but never writes down.

Ray Tune writes the filesystem it is given into its state, in the run and in its logs' folder, and with pyarrow's own
that is with its keys. This one leaves them in the memory of Ray's head, where the processes of the cluster find them.
"""

from __future__ import annotations

import pickle
import uuid
from typing import Any

import pyarrow.fs as pafs

from apacs_ray.distributed.ray_internals import get_from_head, put_in_head
from apacs_ray.storage import S3Access, S3Store, Store, s3_options


class CredentialFreeS3(pafs.S3FileSystem):  # type: ignore[misc]
    """pyarrow's filesystem, pickled as the name under which its access lies in Ray's head."""

    def __init__(self, access: S3Access, name: str) -> None:
        super().__init__(**s3_options(access))
        self._name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._name,)


def ray_filesystem(store: Store) -> pafs.FileSystem | None:
    """Return what Ray Train and Ray Tune write their state in `store` with; None: a local path tells them enough."""
    if not isinstance(store, S3Store):
        return None
    name = uuid.uuid4().hex
    put_in_head(name, pickle.dumps(store.access))
    return CredentialFreeS3(store.access, name)


def _reopen(name: str) -> pafs.FileSystem:
    """In another process of the cluster; of another cluster, when a sweep is restored, as its environment says."""
    pickled = get_from_head(name)
    access = S3Access(None, None, None, None, None) if pickled is None else pickle.loads(pickled)  # ours, from memory
    return CredentialFreeS3(access, name)
