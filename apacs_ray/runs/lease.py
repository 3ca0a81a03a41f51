"""`run.lock`, which allows one writer a run.

The lock is created exclusively (a local link, or `If-None-Match: *` on S3) and holds its owner and a heartbeat. A
second start is refused and names the owner. A dead process on the same machine loses the lock at once; an owner
elsewhere without a heartbeat loses it after `STALE_AFTER` seconds; where its clock and ours disagree by more, whether
the lock changes while we look decides. Every change is conditional on the version last
seen: of two that take over at the same moment one fails, and an owner that was declared dead cannot commit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from apacs_ray.errors import ApacsError, StoreTroubleError
from apacs_ray.storage import Conflict, Store

LOCK = "run.lock"
HEARTBEAT_EVERY = 10.0  # s
STALE_AFTER = 60.0  # s
BEAT_TIMEOUT = 5.0  # s for which a heartbeat is tried again in a store in trouble: the next one follows
ORPHANS_END_WITHIN = 60.0  # s, for the Ray processes of a driver that was killed
_log = logging.getLogger(__name__)


class LeaseHeld(ApacsError):
    """Another process writes this run."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a run, as written in the lock.

    Attributes:
        owner: Random, the lease's identity.
        host: Name of its machine.
        boot: Id of that machine's last boot.
        pid: Of the process, valid in `pid_namespace` only.
        started: Unix time, s.
        heartbeat: Unix time of the last one, s.
        ray_session: Folder of the Ray that the process started; None before, and on a cluster that it joined.
        pid_namespace: As Linux names it; None elsewhere and in locks of earlier versions: the heartbeat alone counts.
        start_ticks: Clock ticks between boot and start, which tell the process from a later one of the same `pid`;
            None as `pid_namespace`.
    """

    owner: str
    host: str
    boot: str
    pid: int
    started: float
    heartbeat: float
    ray_session: str | None = None
    pid_namespace: str | None = None
    start_ticks: int | None = None

    @classmethod
    def myself(cls) -> Holder:
        """Return this process as a holder, from now on."""
        now, pid = time.time(), os.getpid()
        return cls(
            owner=uuid.uuid4().hex,
            host=socket.gethostname(),
            boot=_boot_id(),
            pid=pid,
            started=now,
            heartbeat=now,
            pid_namespace=_pid_namespace(),
            start_ticks=_start_ticks(pid),
        )

    def is_dead_here(self) -> bool:
        """Return whether the owner ran on this machine, where its pid is one of ours, and its process is gone."""
        if self.pid_namespace is None or self.start_ticks is None:
            return False
        here = (socket.gethostname(), _boot_id(), _pid_namespace())
        return (self.host, self.boot, self.pid_namespace) == here and _start_ticks(self.pid) != self.start_ticks

    def beats(self) -> bool:
        """Return whether the last heartbeat is so near to now, by this machine's clock, that the owner lives."""
        return abs(time.time() - self.heartbeat) < STALE_AFTER

    def when(self) -> str:
        """Return when the last heartbeat was, in words."""
        age = time.time() - self.heartbeat
        return f"{age:.0f} s ago" if age >= 0 else f"{-age:.0f} s ahead of this machine's clock"

    def describe(self) -> str:
        """Return process, host and start in words."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host} since {since}"


class Lease:
    """The right to write a run, kept alive by a thread until `release`."""

    def __init__(self, store: Store, holder: Holder, version: str) -> None:
        self.owner = holder.owner
        self._store = store
        self._holder = holder
        self._version = version
        self._mutex = threading.Lock()
        self._lost: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, store: Store) -> Lease:
        """Take the run at `store`.

        Args:
            store: The run's output.

        Returns:
            The lease, whose heartbeat has begun.

        Raises:
            LeaseHeld: Another process holds the run; the message names it.
        """
        mine = Holder.myself()
        try:
            return cls(store, mine, store.create(LOCK, _encode(mine)))
        except Conflict:
            held = _look(store)
        if held is None:  # released in between
            return cls.acquire(store)
        other, version = held
        if not other.is_dead_here() and not _silent(store, other, version):
            raise LeaseHeld(f"{store.uri}: held by {other.describe()}; wait until it ends, or choose another --output")
        if other.is_dead_here() and other.ray_session:
            _await_orphans(other.ray_session)
        try:
            return cls(store, mine, store.replace(LOCK, _encode(mine), version))
        except Conflict as error:
            raise LeaseHeld(f"{store.uri}: another start took this run over at the same moment") from error

    def note_ray_session(self, path: str) -> None:
        """Write the Ray session that this run started into the lock: a successor waits for its processes to end."""
        self._renew(replace(self._holder, ray_session=path), self._store)

    def check(self) -> None:
        """Raise ApacsError unless the run is still ours. Called before every commit."""
        if self._lost is None:
            with self._mutex:
                try:
                    lock = json.loads(self._store.read(LOCK))
                except FileNotFoundError:
                    lock = {}
                if lock.get("owner") != self.owner:
                    self._lost = "the lock names another owner"
        if self._lost is not None:
            raise ApacsError(f"{self._store.uri}: this run was taken over ({self._lost}); nothing was committed")

    def shorten_timeout(self) -> None:
        """Wait for a store in trouble from now on only as long as a heartbeat does, not as long as a commit."""
        self._store = self._store.with_timeout(BEAT_TIMEOUT)

    def release(self) -> None:
        """Give the run back."""
        self._stop.set()
        self._thread.join()
        self.shorten_timeout()
        with contextlib.suppress(StoreTroubleError):  # the next run takes the lock of a process that has ended
            if self._lost is None and self._store.version(LOCK) == self._version:
                self._store.delete(LOCK)

    def _beat(self) -> None:
        store, since = self._store.with_timeout(BEAT_TIMEOUT), None
        while not self._stop.wait(HEARTBEAT_EVERY):
            try:
                self._renew(self._holder, store)
            except (ApacsError, OSError) as error:  # `check` decides before anything is committed
                if since is None:
                    since = time.monotonic()
                    _log.warning("the run waits for its store: %s", error)
            else:
                if since is not None:
                    waited = time.monotonic() - since
                    _log.info("the store takes writes again, after %.0f s; the run goes on", waited)
                    since = None

    def _renew(self, holder: Holder, store: Store) -> None:
        with self._mutex:
            holder = replace(holder, heartbeat=time.time())
            try:
                self._version = store.replace(LOCK, _encode(holder), self._version)
                self._holder = holder
            except Conflict:
                held = _look(store)
                if held is not None and held[0].owner == self.owner:
                    self._version = held[1]  # our own write, of a heartbeat that seemed to fail
                    return
                self._lost = "its heartbeat found another owner's lock"
                self._stop.set()


def _look(store: Store) -> tuple[Holder, str] | None:
    """Return the holder and the lock's version, None without a lock. The content may be newer, never older."""
    version = store.version(LOCK)
    try:
        return None if version is None else (_decode(store.read(LOCK)), version)
    except FileNotFoundError:
        return None


def holder_of(store: Store) -> Holder | None:
    """Return who holds a run, as its lock says; None where nobody does."""
    held = _look(store)
    return None if held is None else held[0]


def _silent(store: Store, other: Holder, version: str) -> bool:
    """Return whether a lock whose heartbeat lies far from now has none: clocks of two machines may differ."""
    if other.beats():
        return False
    who, look = other.describe(), 2 * HEARTBEAT_EVERY
    _log.info(
        "%s: held by %s, last heartbeat %s: looking for %.0f s whether it lives", store.uri, who, other.when(), look
    )
    time.sleep(look)
    return store.version(LOCK) == version


def _encode(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=1).encode()


def _decode(content: bytes) -> Holder:
    try:
        holder = Holder(**json.loads(content))
        holder.describe()
    except (ValueError, TypeError, OSError, OverflowError, RecursionError) as error:
        raise ApacsError(
            f"{LOCK}: no lock that a run wrote ({error}); delete it when nobody writes this run"
        ) from error
    return holder


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _pid_namespace() -> str | None:
    """Return the namespace in which pids count: containers on their host's network share name and boot, not pids."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _start_ticks(pid: int) -> int | None:
    """Return the clock ticks between boot and start of a process (field 22 of its stat); None when it is gone.

    Not psutil's `create_time`, which adds the time of the boot: when the machine's clock is set, a process that lives
    would look like another, and lose its run.
    """
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = content.rpartition(b")")[2].split()  # from the third on: the name before may hold anything
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _await_orphans(ray_session: str) -> None:
    """Wait for the Ray processes of a killed driver: they notice within seconds, and might still be writing."""
    deadline = time.monotonic() + ORPHANS_END_WITHIN
    while pids := _processes_naming(ray_session):
        if time.monotonic() > deadline:
            raise LeaseHeld(f"Ray processes of a killed run are still there (pids {pids}); end them, then start again")
        time.sleep(0.2)


def _processes_naming(text: str) -> list[int]:
    """Return the pids of processes whose command line holds `text`."""
    processes = psutil.process_iter(["cmdline"])
    return [process.pid for process in processes if any(text in part for part in process.info["cmdline"] or ())]
