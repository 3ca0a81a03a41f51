"""Where bytes live: one way to open a local folder or `s3://bucket/prefix`, here and in every worker.

A `Store` is a folder of objects (base). It can be pickled: it travels to Ray workers and opens its connections there.
One module a kind of store (local, s3); how S3 is reached (s3_access); which requests are tried again (retry).
"""

from apacs_ray.storage.base import SMALL, Conflict, Entry, Store, is_bad_path
from apacs_ray.storage.local import LocalStore, file_facts
from apacs_ray.storage.open import is_local, open_store
from apacs_ray.storage.s3 import S3Store
from apacs_ray.storage.s3_access import S3Access, s3_client, s3_options

__all__ = [
    "SMALL",
    "Conflict",
    "Entry",
    "LocalStore",
    "S3Access",
    "S3Store",
    "Store",
    "file_facts",
    "is_bad_path",
    "is_local",
    "open_store",
    "s3_client",
    "s3_options",
]
