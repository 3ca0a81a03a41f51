"""A run in its `--output`: the lease, which stages are committed, and `run.json`.

A stage's output counts once its marker `<folder>/_committed.json` exists; the marker is one small object, written last,
and names the fingerprint of everything the output depends on. A stage whose marker carries the wanted fingerprint is
not done again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from apacs_ray.config.settings import Settings
from apacs_ray.errors import ApacsError
from apacs_ray.runs.lease import BEAT_TIMEOUT, Lease
from apacs_ray.storage import Store

MARKER = "_committed.json"
RUN_JSON = "run.json"
FORMAT_VERSION = 3  # of what a run leaves behind; part of every fingerprint
PACKAGES = (
    "ray",
    "torch",
    "torchvision",
    "pyarrow",
    "numpy",
    "scipy",
    "pillow",
    "pyvips",
    "openslide-bin",
    "tifffile",
    "shapely",
    "safetensors",
    "boto3",
)
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Counts:
    """What became of a stage's units. Rows in = rows out + skips + rejects, always."""

    rows_in: int
    rows_out: int
    skipped: dict[str, int] = field(default_factory=dict)
    rejected: int = 0

    def reconcile(self, stage: str) -> None:
        """Raise ApacsError when units were lost or invented."""
        accounted = self.rows_out + sum(self.skipped.values()) + self.rejected
        if accounted != self.rows_in:
            raise ApacsError(
                f"{stage}: {self.rows_in} rows in, but {self.rows_out} out + {sum(self.skipped.values())} skipped + "
                f"{self.rejected} rejected = {accounted}; nothing was committed (a defect: please report it)"
            )


@dataclass(frozen=True)
class Marker:
    """A committed output."""

    stage: str
    fingerprint: str
    lease: str
    started: float
    seconds: float
    counts: Counts
    info: dict[str, Any] = field(default_factory=dict)

    def encode(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def decode(cls, content: bytes) -> Marker:
        tree = json.loads(content)
        return cls(**{**tree, "counts": Counts(**tree["counts"])})


class Run:
    """An open run: this process holds its lease."""

    def __init__(self, store: Store, settings: Settings, data: str | None, lease: Lease) -> None:
        self.store = store
        self.settings = settings
        self.data = data
        self.lease = lease
        self.stages: dict[str, dict[str, Any]] = {}
        self.facts: dict[str, Any] = {}
        self._started = time.time()

    @classmethod
    def open(cls, store: Store, settings: Settings, data: str | None) -> Run:
        """Take the run's lease. Raises LeaseHeld."""
        run = cls(store, settings, data, Lease.acquire(store))
        if store.version(RUN_JSON) is not None:
            previous = json.loads(store.read(RUN_JSON))
            run.stages, run.facts = previous.get("stages", {}), previous.get("facts", {})
        return run

    def committed(self, folder: str, fingerprint: str) -> Marker | None:
        """The marker in `folder` when it carries `fingerprint`."""
        marker = self.marker(folder)
        return marker if marker is not None and marker.fingerprint == fingerprint else None

    def marker(self, folder: str) -> Marker | None:
        """The marker in `folder`, whatever its fingerprint."""
        try:
            return Marker.decode(self.store.read(f"{folder}/{MARKER}"))
        except FileNotFoundError:
            return None

    def withdraw(self, folder: str) -> None:
        """Take back a commit, before its output is replaced."""
        self.store.delete(f"{folder}/{MARKER}")

    def commit(self, folder: str, marker: Marker) -> None:
        """Make the output in `folder` count. Refused when the lease is lost or the counts do not add up."""
        marker.counts.reconcile(marker.stage)
        self.lease.check()
        self.store.write(f"{folder}/{MARKER}", marker.encode())

    def record(self, stage: str, **state: Any) -> None:
        """Write a stage's state to `run.json`."""
        self.stages[stage] = {**self.stages.get(stage, {}), **state}
        self.write_record()

    def write_record(self) -> None:
        """Write `run.json`: what a reader needs to judge and repeat this run."""
        self.lease.check()
        record = {
            "format": FORMAT_VERSION,
            "data": self.data,
            "started": self._started,
            "settings": self.settings.model_dump(mode="json"),
            "environment": environment(),
            "source": {"path": str(ROOT), "hash": source_hash(), "git": git_commit()},
            "facts": self.facts,
            "stages": self.stages,
        }
        self.store.write(RUN_JSON, json.dumps(record, indent=1).encode())

    def shorten_timeout(self) -> None:
        """A stage failed: what is still written on the way out is not waited for as long."""
        self.store = self.store.with_timeout(BEAT_TIMEOUT)
        self.lease.shorten_timeout()

    def close(self) -> None:
        self.lease.release()


def fingerprint(**parts: Any) -> str:
    """16 hex digits over everything an output depends on."""
    text = json.dumps({"format": FORMAT_VERSION, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def source_hash() -> str:
    """Hash over the package's source files: driver and workers must run the same code."""
    digest = hashlib.sha256()
    package = ROOT / "apacs_ray"
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def require_source(expected: str) -> None:
    """Called in every worker process. Raises ApacsError when it imported another copy of this package."""
    if source_hash() != expected:
        raise ApacsError(
            f"a worker runs another copy of apacs_ray ({ROOT}) than the driver; submit with --working-dir, "
            "or install the same version on every node"
        )


@functools.cache
def git_commit() -> str | None:
    """The commit of a checkout, with '+' when it has changes; None outside git."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


@functools.cache
def environment() -> Mapping[str, Any]:
    """Versions and machine, without importing the packages."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"python": sys.version.split()[0], "platform": platform.platform(), "packages": versions}
