"""Scripts started by forking a process that has imported torch and Ray: a driver then starts in no time.

What runs is the script itself, in a session, with an environment and an output of its own. Nothing of Ray has been
started where it is forked. `ForkServer` is the side of the tests; run as a program, this file is the server.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import apacs_ray
from apacs_ray.distributed.session import prepare_ray

IMPORTED = ("torch", "torch._dynamo", "torchvision", "matplotlib.pyplot", "ray.data", "ray.train.torch", "ray.tune")
FOREVER = 1e9  # s


class Output:
    """What a process prints, read as it comes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._unread = b""

    def readline(self) -> str:
        """Return the next line; an empty text at the end."""
        while b"\n" not in self._unread and self._more(FOREVER):
            pass
        line, newline, self._unread = self._unread.partition(b"\n")
        return (line + newline).decode(errors="replace")

    def read(self, deadline: float) -> str | None:
        """Return what is left when it ends; None when that is not before `deadline` (s, monotonic)."""
        while self._more(max(0.0, deadline - time.monotonic())):
            if time.monotonic() > deadline:
                return None
        text, self._unread = self._unread.decode(errors="replace"), b""
        return text

    def close(self) -> None:
        """Close it; later calls do nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _more(self, seconds: float) -> bool:
        """Whether more may come after what has come within these seconds."""
        if self._descriptor < 0:
            return False
        if not select.select([self._descriptor], [], [], seconds)[0]:
            return True
        part = os.read(self._descriptor, 1 << 16)
        self._unread += part
        if not part:
            self.close()
        return bool(part)


class ForkedProcess:
    """A script that runs; what is used of `subprocess.Popen[str]`."""

    def __init__(self, server: ForkServer, pid: int, output: int) -> None:
        self._server = server
        self.pid = pid
        self.returncode: int | None = None
        self.stdout = Output(output)

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, or None as long as it runs."""
        if self.returncode is None:
            self.returncode = self._server.status(self.pid)
        return self.returncode

    def wait(self, timeout: float = FOREVER) -> int:
        """Wait for its end and return the exit status."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return status

    def communicate(self, timeout: float = FOREVER) -> tuple[str, None]:
        """Wait for its end and return what it printed since it was last read."""
        deadline = time.monotonic() + timeout
        text = self.stdout.read(deadline)
        if text is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        self.wait(max(5.0, deadline - time.monotonic()))
        return text, None

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The process that forks, and what it told of those that it forked."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._socket, theirs = socket.socketpair()
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**clean, "PYTHONPATH": str(root)},
                start_new_session=True,
            )
        self._unread = b""
        self._ended: dict[int, int] = {}

    def start(self, *argv: str, script: str, env: Mapping[str, str]) -> ForkedProcess:
        """Fork a script of `pipelines/` with this environment."""
        output, theirs = os.pipe()
        order = {"script": str(self._root / "pipelines" / script), "argv": argv, "env": dict(env), "cwd": os.getcwd()}
        message = json.dumps(order).encode()
        socket.send_fds(self._socket, [len(message).to_bytes(4, "big")], [theirs])
        self._socket.sendall(message)
        os.close(theirs)
        while (said := self._hear())["what"] != "started":
            pass
        return ForkedProcess(self, said["pid"], output)

    def status(self, pid: int) -> int | None:
        """Return how a process ended, or None as long as it runs."""
        while b"\n" in self._unread or select.select([self._socket], [], [], 0)[0]:
            self._hear()
        return self._ended.get(pid)

    def close(self) -> None:
        """End it, with what it forked."""
        self._socket.close()
        self._process.wait(timeout=30)

    def _hear(self) -> dict[str, Any]:
        while b"\n" not in self._unread:
            part = self._socket.recv(1 << 16)
            assert part, "the server of forks has ended"
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        if said["what"] == "ended":
            self._ended[said["pid"]] = os.waitstatus_to_exitcode(said["status"])
        return said


def end_session(leader: int) -> None:
    """End a driver and its Ray at once, all that runs in its session."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if os.getsid(int(folder.name)) == leader:
                os.kill(int(folder.name), signal.SIGKILL)


def serve(asked: socket.socket) -> None:
    """Fork what is asked for, and tell of the ends, until nobody asks any more."""
    prepare_ray()  # Ray reads its environment when it is imported
    ours = [module.name for module in pkgutil.walk_packages(apacs_ray.__path__, "apacs_ray.")]
    for name in [*IMPORTED, *ours]:
        with contextlib.suppress(ImportError):  # the scripts that need it fail by it
            if not name.endswith("__main__"):
                importlib.import_module(name)
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: set[int] = set()
    while True:
        ready, _, _ = select.select([asked, wake], [], [])
        if wake in ready:
            os.read(wake, 1 << 10)
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    running.discard(ended[0])
                    _tell(asked, what="ended", pid=ended[0], status=ended[1])
        if asked in ready:
            size, descriptors, _, _ = socket.recv_fds(asked, 4, 1)
            if not size:
                break
            (output,) = descriptors
            message = b""
            while len(message) < int.from_bytes(size, "big"):
                message += asked.recv(int.from_bytes(size, "big") - len(message))
            pid = os.fork()
            if not pid:
                for descriptor in (asked.detach(), wake, woken):
                    os.close(descriptor)
                _become(json.loads(message), output)
            os.close(output)
            running.add(pid)
            _tell(asked, what="started", pid=pid)
    for pid in running:  # also where the tests were killed
        end_session(pid)


def _tell(asked: socket.socket, **said: Any) -> None:
    asked.sendall(json.dumps(said).encode() + b"\n")


def _become(order: dict[str, Any], output: int) -> NoReturn:
    """Be what `python script argv...` would be."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.close(output)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    tempfile.tempdir = None  # as TMPDIR says now
    sys.argv = [order["script"], *order["argv"]]
    status = 1
    try:
        runpy.run_path(order["script"], run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # as the interpreter does  # noqa: BLE001
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # torch would take seconds to leave
