"""A Ray cluster of a test's own on this machine: head and raylets as child processes, with ports and token apart."""

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
from pathlib import Path
from typing import Any

Node = subprocess.Popen[bytes] | subprocess.Popen[str]  # `ray start --block`, or a driver with a Ray of its own
DEFAULT_PORT = 6379  # of Ray's head
FAKE_NODES = "[{cpus: 1, gpus: 0, count: 3}, {cpus: 1, gpus: 1, count: 1}]"  # as cluster/local.yaml says
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


class RayCluster:
    """Starts with a head of `head_cpus`; `env` is what joins or submits to it.

    With an `autoscaling` config this starts nodes by itself. They dial the default port, so that must be free.
    """

    def __init__(self, folder: Path, head_cpus: int = 2, autoscaling: Path | None = None) -> None:
        gcs, dashboard, agent, metrics = _free_ports(4)
        scaled = [f"--autoscaling-config={autoscaling}", "--num-gpus=0"] if autoscaling else []
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
        self.metrics = f"http://127.0.0.1:{metrics}/metrics"  # of the head, for Prometheus
        self.env = {**self._env, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        self._parts: list[Node] = []
        self.head = self._start(
            "--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
            "--node-ip-address=127.0.0.1", f"--temp-dir={self._folder}", f"--num-cpus={head_cpus}",
            f"--dashboard-agent-listen-port={agent}", "--include-dashboard=true",
            f"--metrics-export-port={metrics}", *scaled,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                self.ask("api/jobs/")
                return
            assert self.head.poll() is None, "the head did not start"
            assert time.monotonic() < deadline, "the head does not answer"
            time.sleep(0.1)

    def ask(self, path: str) -> Any:
        """What the head's dashboard says at a path: the commands of `ray job` do no more, and import all of Ray."""
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
        """Another raylet, with CPUs and maybe a temporary folder of its own; returns when it is there.

        Two that start at the same moment choose the same names for their sockets, and one of them ends.
        """
        (agent,) = _free_ports(1)
        options = (f"--address={self._address}", f"--num-cpus={cpus}", f"--dashboard-agent-listen-port={agent}")
        node = self._start(*options, env={"TMPDIR": str(temporary)} if temporary else {})
        while not any(title.startswith("ray::RuntimeEnvAgent") for title in processes(node).values()):
            assert node.poll() is None, "a node did not start"
            time.sleep(0.05)
        return node

    def drain(self, node: Node, notice: int) -> None:
        """Tell the cluster, as a cloud does, that a node will be taken away in `notice` seconds. That is to be done."""
        raylet = next(title for title in processes(node).values() if "/raylet " in title)
        node_id = raylet.partition("--node_id=")[2].split()[0]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command = [*RAY, "drain-node", "--address", self._address, "--node-id", node_id, *reason]
        subprocess.run([*command, "--deadline-remaining-seconds", str(notice)], env=self._env, check=True)

    def stop(self) -> None:
        for part in reversed(self._parts):
            if part.poll() is None:
                os.killpg(part.pid, signal.SIGTERM)
        for part in self._parts:
            try:
                part.wait(timeout=8)
            except subprocess.TimeoutExpired:  # it waits half a minute for its parts, which have ended
                kill_node(part)
        shutil.rmtree(self._folder, ignore_errors=True)

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
    """Command lines of a node's processes by pid. Ray's workers, each in a process group, name themselves there."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == node.pid:
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended meanwhile
            continue
    return found


def listening(node: Node) -> set[str]:
    """Addresses at which a node's processes, or a driver's and those of its own Ray, wait for connections."""
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
    """A raylet and all its workers, at once."""
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
