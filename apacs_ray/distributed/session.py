"""Joining or starting Ray for one run.

A run joins a cluster only when `RAY_ADDRESS` is set (a submitted job has it); else it starts its own on this machine
and ends it.
"""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path

from apacs_ray.console import say
from apacs_ray.distributed.cluster import head_of, joined_cluster, joined_machines, refuse_local, why_unreachable
from apacs_ray.distributed.head_watch import HeadWatch
from apacs_ray.distributed.metrics import RunMetrics
from apacs_ray.distributed.ray_internals import (
    is_too_long_for_sockets,
    listen_on_loopback,
    says_it_was_too_slow,
    session_folder,
    session_folder_option,
    set_private_variables,
    without_its_signal_handlers,
    without_log_level_line,
)
from apacs_ray.distributed.resource_plan import Cluster
from apacs_ray.distributed.signals import stop_on_signals
from apacs_ray.errors import ApacsError, message_of
from apacs_ray.runs.provenance import ROOT
from apacs_ray.runs.run import Run
from apacs_ray.storage.own_folder import own_folder


class RaySession:
    """Ray for one run, started when a stage first needs it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._started = False
        self._watch: HeadWatch | None = None  # of a cluster that was joined
        self.metrics = RunMetrics()

    def start(self) -> None:
        """Join or start Ray; later calls do nothing.

        Raises:
            ApacsError: Nobody answers at `RAY_ADDRESS`, Ray does not start here, or a local path meets several nodes.
        """
        if self._started:
            return
        prepare_ray()
        address = os.environ.get("RAY_ADDRESS", "")
        with without_log_level_line(), without_its_signal_handlers():
            if address:
                _join(address)
            else:
                _start_local()
                self._run.lease.note_ray_session(session_folder())
        if address not in ("", "local"):
            self._watch = HeadWatch(*head_of(address))
        stop_on_signals()  # Ray put handlers of its own in their place
        self._started = True
        self.metrics.open()
        machines = joined_machines()
        refuse_local(machines, self._run.store.uri, "--output")
        refuse_local(machines, self._run.data, "--data")

    def stop(self, *, failed: bool = False) -> None:
        """Leave the cluster, or end the one that was started.

        Args:
            failed: Whether something ended the run before it was done.

        Raises:
            ApacsError: It failed, and the head of the cluster is gone: whatever ended it, this is why.
        """
        if self._started:
            import ray

            self._started = False
            gone = None
            if self._watch is not None:
                gone = self._watch.why_gone()
                self._watch.close()
            if gone is None:  # else Ray would wait for the head
                self.metrics.close()
                ray.shutdown()
            elif failed:
                raise ApacsError(gone)

    def cluster(self) -> Cluster:
        """Return what the cluster has, or what its autoscaler may give it."""
        return joined_cluster()


def _join(address: str) -> None:
    import ray

    if (reason := why_unreachable(address)) is not None:
        raise ApacsError(
            f"RAY_ADDRESS {address}: {reason}; unset it to run on this machine, or give HOST:PORT of a cluster's head"
        )
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise ApacsError(
            f"RAY_ADDRESS {address}: cannot be joined ({message_of(error)}); apacs-ray doctor says more"
        ) from error


def _start_local() -> None:
    """Start a Ray of our own; once more where this machine was too busy for it."""
    import ray

    require_short_path()
    folder = private_session_folder()
    for last in (False, True):
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
                **session_folder_option(folder),
            )
            return
        except BaseException as error:
            ray.shutdown()  # also where a signal came: what has started by then would stay
            if not isinstance(error, Exception):
                raise
            if not says_it_was_too_slow(error):
                raise ApacsError(f"Ray does not start on this machine: {message_of(error)}") from error
            if last:
                raise ApacsError(
                    "Ray did not start on this machine, twice: it is too busy or short of memory; try again later, or "
                    "free it"
                ) from error
            say("Ray did not start in time: this machine is busy; once more")


def prepare_ray() -> None:
    """Set what Ray reads when it is imported, here and (by inheritance) in its workers."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    set_private_variables()
    if not os.environ.get("RAY_ADDRESS"):
        _keep_to_ourselves()
        path = os.environ.get("PYTHONPATH")
        if str(ROOT) not in (path or "").split(os.pathsep):
            os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([path] if path else [])])


def _keep_to_ourselves() -> None:
    """A Ray of our own: every port on the loopback address, and a token that only this run's processes know."""
    listen_on_loopback()
    for library in ("GLOO", "NCCL"):  # among the workers of one training
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    if not any(f"RAY_AUTH_{name}" in os.environ for name in ("MODE", "TOKEN", "TOKEN_PATH")):
        # left alone, Ray makes one for all clusters, in a file that every user of the machine may read
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def ray_folder() -> Path:
    """Return where a Ray of our own keeps sockets, logs and spilled objects: where a variable says, else our folder."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        if name in os.environ:
            return Path(os.environ[name]) / "ray"
    return Path(f"/tmp/apacs_ray-{os.getuid()}/ray")


def require_short_path() -> None:
    """Raise ApacsError where the path of Ray's folder leaves no room for the names of its sockets."""
    if is_too_long_for_sockets(str(ray_folder())):
        name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
        raise ApacsError(f"{name} {os.environ[name]}: too long a path for Ray's sockets; set RAY_TMPDIR to a short one")


def private_session_folder() -> str | None:
    """Make a folder of this user's own for Ray's sockets and logs, which Ray itself opens to everybody.

    Returns:
        Its path; None where `RAY_TMPDIR` or `TMPDIR` says where they are to be, as paths of sockets are limited to 107
        characters.
    """
    if "RAY_TMPDIR" in os.environ or "TMPDIR" in os.environ:
        return None
    own_folder(str(ray_folder().parent))
    return str(ray_folder())
