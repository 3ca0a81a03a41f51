"""Checks of this machine: shared memory, disks, open files; the CPUs and the memory that a container leaves."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from apacs_ray.config.settings import Settings
from apacs_ray.distributed.session import ray_folder, require_short_path
from apacs_ray.doctor.finding import Finding
from apacs_ray.errors import ApacsError
from apacs_ray.storage import LocalStore, is_local, open_store

GIB = 1 << 30
SHARED_MEMORY = Path("/dev/shm")
# what Ray gives its object store by default: a share of the free memory, within these bounds
STORE_SHARE = 0.3
STORE_MOST = 200 * 10**9
STORE_BEYOND_SHARED_MEMORY = 10**10  # a larger store is limited to shared memory
FULLEST = 0.95  # share of a disk from which on Ray warns and stops spilling to it
SCARCE = 10 * GIB  # a run on real slides wants more
TOO_LITTLE = GIB
FEWEST_FILES = 4096
RAY_RAISES_TO = 65536


def check_shared_memory(path: Path = SHARED_MEMORY) -> Iterator[Finding]:
    """Check that Ray's object store fits into shared memory; else it lies on disk."""
    if not path.is_dir():
        yield Finding(
            "shared memory", "warning", f"no {path}", "Ray's objects go to disk, which is slow: mount a tmpfs"
        )
        return
    status = os.statvfs(path)
    free = status.f_bavail * status.f_frsize
    bound = min(STORE_MOST, max(STORE_BEYOND_SHARED_MEMORY, 0.95 * free))
    wanted = min(STORE_SHARE * available_memory(), bound)
    message = f"{path}: {_size(free)} free, Ray's object store takes {_size(wanted)}"
    if free >= wanted:
        yield Finding("shared memory", "ok", message)
        return
    advice = (
        f"docker run --shm-size={wanted * 1.1 / GIB:.1f}g (or --ipc=host), Kubernetes: an emptyDir of medium Memory"
    )
    yield Finding("shared memory", "warning", f"{message}: it would lie on disk, and NCCL may fail", advice)


def check_disks(settings: Settings, output: str, data: str | None) -> Iterator[Finding]:
    """Check the free space where the run writes on this machine."""
    if is_local(output):
        yield check_disk("disk: output", Path(open_store(output).full_path()), 0, "choose another --output")
    yield check_disk("disk: Ray", ray_folder(), 0, "set RAY_TMPDIR to a folder on a larger disk")
    if data is not None and not is_local(data):
        from apacs_ray.slides.cache import default_cache

        cache = Path(settings.data.cache or default_cache())
        advice = "--data.cache FOLDER on a larger disk, or a smaller --data.cache_gb"
        yield check_disk("disk: data.cache", cache, round(settings.data.cache_gb * GIB), advice)


def check_sockets() -> Iterator[Finding]:
    """Check that the path of Ray's folder is short enough for its sockets, where a run starts a Ray of its own."""
    if os.environ.get("RAY_ADDRESS", "local") not in ("", "local"):
        return
    try:
        require_short_path()
    except ApacsError as error:
        message, _, advice = str(error).partition("; ")
        yield Finding("sockets", "failed", message, advice)
    else:
        yield Finding("sockets", "ok", f"{ray_folder()}: short enough for Ray's sockets")


def check_disk(name: str, folder: Path, wanted: int, advice: str) -> Finding:
    """Check that the disk of `folder`, which need not exist yet, is not full and has room for `wanted` bytes."""
    place = existing_parent(folder)
    usage = shutil.disk_usage(place)
    taken = 1 - usage.free / usage.total if usage.total else 1.0
    cached = LocalStore(str(folder)).list() if wanted and folder.is_dir() else ()
    room = usage.free + sum(entry.size for entry in cached)  # what the cache holds already needs no room any more
    message = f"{folder}: {_size(usage.free)} free of {_size(usage.total)}"
    if not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
        return Finding(name, "failed", f"{folder}: this user may not write in {place}", advice)
    if usage.free < TOO_LITTLE:
        return Finding(name, "failed", message, f"make room, or {advice}")
    if taken > FULLEST:
        return Finding(
            name,
            "warning",
            f"{message}: {taken:.0%} full, and Ray spills nothing above {FULLEST:.0%}",
            f"make room, or {advice}",
        )
    if room < wanted:
        return Finding(name, "warning", f"{message}, data.cache_gb allows {_size(wanted)}", advice)
    if usage.free < SCARCE:
        return Finding(name, "warning", f"{message}: little for whole slides", f"make room, or {advice}")
    return Finding(name, "ok", message)


def existing_parent(folder: Path) -> Path:
    """Return `folder` itself, or the first folder above it that exists."""
    for place in (folder, *folder.parents):
        if place.is_dir():
            return place
    return Path("/")


def check_open_files() -> Iterator[Finding]:
    """Check that a process may open as many files as Ray wants. Ray raises its limit itself up to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    raised = RAY_RAISES_TO if hard == resource.RLIM_INFINITY else min(hard, RAY_RAISES_TO)
    limit = RAY_RAISES_TO if soft == resource.RLIM_INFINITY else max(soft, raised)
    message = f"{limit} at once (ulimit -n: {_limit(soft)}, hard: {_limit(hard)})"
    if limit < FEWEST_FILES:
        advice = f"ulimit -n {RAY_RAISES_TO} as root or in limits.conf; docker run --ulimit nofile={RAY_RAISES_TO}"
        yield Finding("open files", "warning", f"{message}: Ray wants {FEWEST_FILES}, connections may fail", advice)
    else:
        yield Finding("open files", "ok", message)


def usable_cpus(groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Count CPUs as Ray does: those of the machine, or what the container's quota leaves."""
    cpus = float(os.cpu_count() or 1)
    quota, period = _words(groups / "cpu.max"), ["100000"]
    if len(quota) == 2:
        quota, period = quota[:1], quota[1:]
    else:
        quota, period = _words(groups / "cpu/cpu.cfs_quota_us"), _words(groups / "cpu/cpu.cfs_period_us")
    if quota and period and quota[0].isdigit() and int(period[0]):
        cpus = min(cpus, int(quota[0]) / int(period[0]))
    return max(1.0, cpus // 1)


def available_memory(groups: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return the bytes of memory that this machine, or the container's limit, still gives."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        numbers = _words(groups / limit)[:1] + _words(groups / used)[:1]
        if len(numbers) == 2 and all(number.isdigit() for number in numbers):
            free = min(free, max(0, int(numbers[0]) - int(numbers[1])))
    return free


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _size(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / (1 << 20):.0f} MiB"
