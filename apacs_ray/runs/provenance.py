"""Where outputs come from: fingerprints of what they depend on, the hash of this package's source, versions, commit."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apacs_ray.errors import ApacsError

FORMAT_VERSION = 4  # of what a run leaves behind; part of every fingerprint
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
    """Called in every worker process. Raises ApacsError when it imported another source than the driver."""
    if source_hash() != expected:
        raise ApacsError(
            f"a worker runs another source of apacs_ray ({ROOT}) than the driver: it was changed during the run (then "
            "start the same command again), or is another copy (submit with --working-dir, or install the same version "
            "on every node)"
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
