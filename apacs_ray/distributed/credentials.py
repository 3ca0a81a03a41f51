"""Ray's access to S3 without keys at rest.

Ray Tune writes the filesystem it is given into its state, in the run and in its logs' folder, and with pyarrow's own
that is with its keys. This one leaves them in the memory of Ray's head, where the processes of the cluster find them.
"""

from __future__ import annotations

import pickle
import uuid
from typing import Any

import pyarrow.fs as pafs

from apacs_ray.storage import S3Access, S3Store, Store, s3_options

_NAMESPACE = b"apacs_ray"


class KeylessS3(pafs.S3FileSystem):  # type: ignore[misc]
    """pyarrow's filesystem, pickled as the name under which its access lies in Ray's head."""

    def __init__(self, access: S3Access, name: str) -> None:
        super().__init__(**s3_options(access))
        self._name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._name,)


def ray_filesystem(store: Store) -> pafs.FileSystem | None:
    """What Ray Train and Ray Tune are to write their state of `store` with; None: a local path tells them enough."""
    if not isinstance(store, S3Store):
        return None
    from ray.experimental import internal_kv

    name = uuid.uuid4().hex
    internal_kv._internal_kv_put(name.encode(), pickle.dumps(store.access), namespace=_NAMESPACE)
    return KeylessS3(store.access, name)


def forward_no_keys() -> None:
    """Keep Ray Tune from putting the driver's AWS keys into the runtime environment of trials, which Ray logs.

    Trials have their store's keys from their task.
    """
    from ray.tune.execution import class_cache

    kept = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")}
    class_cache.ENV_VARS_TO_PROPAGATE = kept


def _reopen(name: str) -> pafs.FileSystem:
    """In another process of the cluster; of another cluster, when a sweep is restored, as its environment says."""
    from ray.experimental import internal_kv

    found = internal_kv._internal_kv_get(name.encode(), namespace=_NAMESPACE)
    access = S3Access(None, None, None, None, None) if found is None else pickle.loads(found)  # our own, from memory
    return KeylessS3(access, name)
