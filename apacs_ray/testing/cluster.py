"""A Ray cluster of several nodes on one machine: head and raylets as child processes, with ports and a token apart."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Node(Protocol):
    """`ray start --block`, or a driver with a Ray of its own: what is used here of `subprocess.Popen`."""

    @property
    def pid(self) -> int:
        """Its process id, also that of its session."""

    def poll(self) -> int | None:
        """Return the exit status, or None as long as it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit status."""


DEFAULT_PORT = 6379  # of Ray's head
FAKE_NODES = "[{cpus: 1, gpus: 0, count: 3}, {cpus: 1, gpus: 1, count: 1}]"  # as cluster/local.yaml says
START_TIMEOUT = 90  # s in which a head or a node starts
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


class RayCluster:
    """A head and the nodes that are added to it, until `stop`.

    Attributes:
        head: The head's process, `ray start --block`.
        nodes: The nodes beside it, also those that have ended.
        env: The environment in which `ray job` submits to it.
        metrics: URL of the head's metrics, for Prometheus.
    """

    def __init__(self, folder: Path, head_cpus: int = 2, autoscaling: Path | None = None, head_gpus: int = 0) -> None:
        """Start the head and wait until it answers.

        Args:
            folder: Where the token lies.
            head_cpus: CPUs of the head.
            autoscaling: The config of an autoscaler, which starts nodes by itself. They dial Ray's default port, so
                that must be free.
            head_gpus: GPUs of the head, a number that Ray believes: what asks for them computes on CPUs here.
        """
        gcs, dashboard, agent, metrics = _free_ports(4)
        scaled = [f"--autoscaling-config={autoscaling}"] if autoscaling else []
        fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "APACS_RAY_NODES": FAKE_NODES}
        gcs = DEFAULT_PORT if autoscaling else gcs
        token = folder / "token"
        token.write_text("a-token-of-this-test-and-no-other-one")
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._address = f"127.0.0.1:{gcs}"
        self._folder = f"/tmp/r{os.getpid()}-{gcs}"  # short: paths of sockets are limited
        self._env = {
            **clean,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_period_ms": "500",  # a node that was killed is missed after 3 s, not 15 to 30
            "RAY_health_check_initial_delay_ms": "500",
            **(fake if autoscaling else {}),
        }
        self.metrics = f"http://127.0.0.1:{metrics}/metrics"
        self.env = {**self._env, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        self._parts: list[Node] = []
        self.nodes: list[Node] = []
        self.head = self._start(
            "--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
            "--node-ip-address=127.0.0.1", f"--temp-dir={self._folder}", f"--num-cpus={head_cpus}",
            f"--num-gpus={head_gpus}", f"--dashboard-agent-listen-port={agent}", "--include-dashboard=true",
            f"--metrics-export-port={metrics}", *scaled,
        )  # fmt: skip
        try:
            self._wait(self._answers, self.head, "the head")
        except BaseException:
            self.stop()
            raise

    def ask(self, path: str) -> Any:
        """Return what the head's dashboard says at a path, as `ray job` asks it without importing all of Ray."""
        token = Path(self._env["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(
            f"{self.env['RAY_API_SERVER_ADDRESS']}/{path}", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    @property
    def joined(self) -> dict[str, str]:
        """The environment of a driver on this cluster."""
        return {**self._env, "RAY_ADDRESS": self._address}

    def add_node(self, cpus: int = 2, temporary: Path | None = None) -> Node:
        """Start another raylet and wait until it is there.

        Two that start at the same moment choose the same names for their sockets, and one of them ends.

        Args:
            cpus: Its CPUs.
            temporary: Its `TMPDIR`.

        Returns:
            Its process.
        """
        (agent,) = _free_ports(1)
        options = (f"--address={self._address}", f"--num-cpus={cpus}", f"--dashboard-agent-listen-port={agent}")
        node = self._start(*options, env={"TMPDIR": str(temporary)} if temporary else {})
        self._wait(lambda: any(t.startswith("ray::RuntimeEnvAgent") for t in processes(node).values()), node, "a node")
        self.nodes.append(node)
        return node

    def drain(self, node: Node, notice: int) -> None:
        """Tell the cluster, as a cloud does, that a node will be taken away in `notice` seconds. That is to be done."""
        raylet = next(title for title in processes(node).values() if "/raylet " in title)
        node_id = raylet.partition("--node_id=")[2].split()[0]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command = [*RAY, "drain-node", "--address", self._address, "--node-id", node_id, *reason]
        subprocess.run([*command, "--deadline-remaining-seconds", str(notice)], env=self._env, check=True)

    def stop(self) -> None:
        """End the nodes and the head, with all that runs there."""
        for part in reversed(self._parts):
            if part.poll() is None:
                os.killpg(part.pid, signal.SIGTERM)
        for part in self._parts:
            try:
                part.wait(timeout=8)
            except subprocess.TimeoutExpired:  # it waits half a minute for its parts, which have ended
                kill_node(part)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            self.ask("api/jobs/")
            return True
        return False

    def _wait(self, reached: Callable[[], bool], process: Node, name: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not reached():
            assert process.poll() is None, f"{name} did not start"
            assert time.monotonic() < deadline, f"{name} does not answer"
            time.sleep(0.1)

    def _start(self, *options: str, env: dict[str, str] | None = None) -> Node:
        process = subprocess.Popen(
            [*RAY, "start", "--block", *options],
            env={**self._env, **(env or {})},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._parts.append(process)
        return process


def processes(node: Node) -> dict[int, str]:
    """Return the command lines of a node's processes by pid; Ray's workers name themselves there."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == node.pid:
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended meanwhile
            continue
    return found


def listening(node: Node) -> set[str]:
    """Return the addresses at which a node's, or a driver's and its own Ray's, processes wait for connections."""
    at: dict[str, str] = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A":  # LISTEN
                words = [
                    bytes.fromhex(local.split(":")[0])[at : at + 4][::-1] for at in range(0, len(local) // 2 - 2, 4)
                ]
                address = ipaddress.ip_address(b"".join(words))
                at[f"socket:[{inode}]"] = str(getattr(address, "ipv4_mapped", None) or address)
    found = set()
    for pid in processes(node):
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):  # it has been closed meanwhile
                found.add(at.get(os.readlink(descriptor), ""))
    return found - {""}


def kill_node(process: Node) -> None:
    """Kill a raylet, or a driver, and all that it started, at once."""
    os.killpg(process.pid, signal.SIGKILL)
    for pid in processes(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=8)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
