"""Joining or starting Ray for one run.

A run joins a cluster only when `RAY_ADDRESS` is set (a submitted job has it); else it starts its own on this machine
and ends it.
"""

from __future__ import annotations

import logging
import os
import secrets

from apacs_ray.distributed.cluster import joined_cluster, joined_machines, refuse_local
from apacs_ray.distributed.metrics import RunMetrics
from apacs_ray.distributed.ray_internals import (
    listen_on_loopback,
    session_folder,
    session_folder_option,
    set_private_variables,
)
from apacs_ray.distributed.resource_plan import Cluster
from apacs_ray.distributed.signals import stop_on_signals
from apacs_ray.runs.provenance import ROOT
from apacs_ray.runs.run import Run
from apacs_ray.storage.own_folder import own_folder


class RaySession:
    """Ray for one run, started when a stage first needs it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._started = False
        self.metrics = RunMetrics()

    def start(self) -> None:
        """Join or start Ray; later calls do nothing. Raises ApacsError when a local path meets several nodes."""
        if self._started:
            return
        prepare_ray()
        import ray

        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
                **session_folder_option(_private_sessions()),
            )
            self._run.lease.note_ray_session(session_folder())
        stop_on_signals()  # Ray put handlers of its own in their place
        self._started = True
        self.metrics.open()
        machines = joined_machines()
        refuse_local(machines, self._run.store.uri, "--output")
        refuse_local(machines, self._run.data, "--data")

    def stop(self) -> None:
        """Leave the cluster, or end the one that was started."""
        if self._started:
            import ray

            self.metrics.close()
            ray.shutdown()
            self._started = False

    def cluster(self) -> Cluster:
        """Return what the cluster has, or what its autoscaler may give it."""
        return joined_cluster()


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


def _private_sessions() -> str | None:
    """Make a folder of this user's own for Ray's sockets and logs, which Ray itself opens to everybody.

    Returns:
        Its path; None where `RAY_TMPDIR` or `TMPDIR` says where they are to be, as paths of sockets are limited to 107
        characters.
    """
    if "RAY_TMPDIR" in os.environ or "TMPDIR" in os.environ:
        return None
    return str(own_folder(f"/tmp/apacs_ray-{os.getuid()}") / "ray")
