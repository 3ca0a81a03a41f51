"""Pipeline scripts as jobs on a cluster."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable

from apacs_ray.testing.cluster import RAY, RayCluster
from apacs_ray.testing.runs import ROOT, TIMEOUT, T

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class Job:
    """A pipeline script as a job on a cluster; `env` is set in all its processes."""

    def __init__(self, cluster: RayCluster, script: str, *argv: str, env: dict[str, str] | None = None) -> None:
        self._cluster = cluster
        place = ["--working-dir", str(ROOT), "--runtime-env-json", json.dumps({"env_vars": env or {}})]
        told = self._ray("submit", "--no-wait", *place, "--", sys.executable, script, *argv)
        self.id = told.partition("Job '")[2].partition("'")[0]

    def status(self) -> str:
        """Return its status, as in `SUCCEEDED`."""
        return str(self._cluster.ask(f"api/jobs/{self.id}")["status"])

    def logs(self) -> str:
        """Return what it printed."""
        return self._ray("logs", self.id)

    def stop(self) -> None:
        """Ask it to end, by SIGTERM."""
        self._ray("stop", self.id)

    def until(self, reached: Callable[[], T]) -> T:
        """Wait until `reached` says something true.

        Returns:
            What it said.

        Raises:
            AssertionError: The job ended before, or `reached` never said so.
        """
        deadline = time.monotonic() + TIMEOUT
        while not (found := reached()):
            ended = self.status() in ENDED
            if ended and (found := reached()):  # it may have ended between the two
                break
            assert not ended, f"the job ended too early: {self.logs()[-2000:]}"
            assert time.monotonic() < deadline, self.logs()[-2000:]
            time.sleep(0.2)
        return found

    def end(self) -> str:
        """Wait for the end and return its status."""
        self.until(lambda: self.status() in ENDED)
        return self.status()

    def _ray(self, *argv: str) -> str:
        done = subprocess.run([*RAY, "job", *argv], env=self._cluster.env, capture_output=True, text=True, check=True)
        return done.stdout
