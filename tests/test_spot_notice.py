"""cluster/spot_notice.py against metadata services that say nothing, nonsense, and at last that the node will go."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from apacs_ray.testing.cluster import RayCluster, kill_node, processes

SCRIPT = Path(__file__).resolve().parent.parent / "cluster" / "spot_notice.py"
TOKEN = "token-of-the-instance"
PATHS = {"aws": "/latest/meta-data/spot/instance-action", "gcp": "/computeMetadata/v1/instance/preempted"}
TERMINATE = '{"action": "terminate", "time": "2100-01-01T00:00:00Z"}'
HANG, CUT = "hang", "cut"
Answer = str | bytes | int  # a text, or a status


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # beside it
    spec = importlib.util.spec_from_file_location("spot_notice", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "spot_notice", module)
    spec.loader.exec_module(module)
    return module


@contextmanager
def metadata(cloud: str, answers: list[Answer]) -> Iterator[tuple[str, list[str]]]:
    """A metadata service that gives these answers in turn, taking them from the list, and then the last one for ever.

    Yields its URL and the paths that were asked for.
    """
    asked: list[str] = []
    over = threading.Event()

    class Service(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            assert self.path == "/latest/api/token"
            assert int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) > 0
            self._say(TOKEN)

        def do_GET(self) -> None:
            asked.append(self.path)
            name, value = ("X-aws-ec2-metadata-token", TOKEN) if cloud == "aws" else ("Metadata-Flavor", "Google")
            assert self.headers[name] == value
            self._say(answers.pop(0) if len(answers) > 1 else answers[0])

        def _say(self, answer: Answer) -> None:
            if answer == HANG:
                over.wait(10)
            elif answer != CUT:
                text = answer.encode() if isinstance(answer, str) else answer if isinstance(answer, bytes) else b""
                self.send_response(answer if isinstance(answer, int) else 200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            over.set()
            server.shutdown()


def test_what_ec2_says(script: ModuleType) -> None:
    now = datetime(2026, 5, 4, 12, 0, tzinfo=UTC).timestamp()
    for action in ("terminate", "stop", "hibernate"):
        assert script.aws_seconds(f'{{"action": "{action}", "time": "2026-05-04T12:01:30Z"}}', now) == 90
    assert script.aws_seconds('{"action": "stop", "time": "2026-05-04T14:01:30+02:00"}', now) == 90
    for time_of_end, seconds in (("2026-05-04T11:00:00Z", 1), ("2026-05-04T15:00:00Z", 120), ("at noon", 120)):
        assert script.aws_seconds(json.dumps({"action": "terminate", "time": time_of_end}), now) == seconds
    for text in ("[]", "null", "7", '{"action": "none", "time": "2026-05-04T12:01:30Z"}', '{"time": 3}'):
        assert script.aws_seconds(text, now) is None
    with pytest.raises(ValueError, match="Expecting value"):
        script.aws_seconds("<html>", now)


def test_what_compute_engine_says(script: ModuleType) -> None:
    assert script.gcp_seconds("TRUE\n") == 30
    for text in ("FALSE", "", "<html>TRUE</html>", "true"):
        assert script.gcp_seconds(text) is None


@pytest.mark.parametrize(
    ("cloud", "nothing", "notice", "seconds"),
    [("aws", 404, TERMINATE, 120), ("gcp", "FALSE", "TRUE", 30)],
    ids=["aws", "gcp"],
)
def test_it_goes_on_asking_and_telling(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cloud: str,
    nothing: str | int,
    notice: str,
    seconds: int,
) -> None:
    """A service that fails in every way, and a GCS that accepts the second time only."""
    told: list[tuple[str, str, int]] = []

    def drain(*order: object) -> str | None:
        told.append(order)  # type: ignore[arg-type]
        return "GCS is busy" if len(told) == 1 else None

    monkeypatch.setattr(script, "METADATA_TIMEOUT", 0.3)
    monkeypatch.setattr(script, "local_node", lambda address: "node-a")
    monkeypatch.setattr(script, "drain", drain)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    answers: list[Answer] = [nothing, HANG, CUT, 500, "<html>", b"\xff\xfe", "", "9" * 100_000, nothing, notice]
    polls = len(answers)
    with metadata(cloud, answers) as (url, asked):
        assert script.watch(replace(script.CLOUDS[cloud], every=0.01), url, "10.0.0.1:6379") == 0
    assert asked == [PATHS[cloud]] * polls
    assert [(address, node) for address, node, _ in told] == [("10.0.0.1:6379", "node-a")] * 2
    assert all(seconds - 5 <= left <= seconds for _, _, left in told)
    first, second = capsys.readouterr().out.splitlines()
    assert f"ends in {seconds} s; draining node node-a" in first
    assert second.endswith("GCS is busy")


def test_it_ends_with_its_raylet(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when another has been started since, which has a script of its own."""
    nodes = iter(["node-a", "node-a", "node-b"])
    monkeypatch.setattr(script, "local_node", lambda address: next(nodes))
    with metadata("gcp", ["FALSE"]) as (url, asked):
        assert script.watch(replace(script.CLOUDS["gcp"], every=0.01), url, "10.0.0.1:6379") == 0
    assert len(asked) == 1
    monkeypatch.setattr(script, "local_node", lambda address: None)
    assert script.watch(script.CLOUDS["gcp"], "http://127.0.0.1:9", "10.0.0.1:6379") == 1


DRIVER = """
import json, time, ray
from ray._private.state import state
ray.init(log_to_driver=False)

@ray.remote(num_cpus=1)
class Busy:  # a node without work would end as soon as it is drained
    def node(self):
        return ray.get_runtime_context().get_node_id()

busy = Busy.remote()
print(ray.get(busy.node.remote()), flush=True)
while not (draining := state.get_draining_nodes()):
    time.sleep(0.1)
print(json.dumps({node: end / 1000 - time.time() for node, end in draining.items()}))
"""


def test_a_node_with_a_notice_is_drained(tmp_path: Path) -> None:
    cluster = RayCluster(tmp_path, head_cpus=0)
    answers: list[Answer] = [HANG, "<html>", "FALSE"]
    started: list[subprocess.Popen[str]] = []
    try:
        node = cluster.add_node(1)
        raylet = next(title for title in processes(cluster.head).values() if "/raylet " in title)
        address = raylet.rpartition(" --gcs-address=")[2].split()[0]
        with metadata("gcp", answers) as (url, _):
            for command in ([str(SCRIPT), "gcp", address, "--url", url], ["-c", DRIVER]):
                options: dict[str, Any] = {"env": cluster.joined, "stdout": subprocess.PIPE, "text": True}
                started.append(subprocess.Popen([sys.executable, *command], **options))
            watching, driver = started
            assert driver.stdout is not None
            busy = driver.stdout.readline().strip()
            answers.append("TRUE")
            draining = json.loads(driver.communicate(timeout=60)[0])
            log, _ = watching.communicate(timeout=30)
        assert list(draining) == [busy]
        assert 15 < draining[busy] <= 30
        assert watching.returncode == 0
        assert f"notice: this instance ends in 30 s; draining node {busy}" in log.splitlines()[0]
        for part in (node, cluster.head):  # they would wait for what runs there to end
            kill_node(part)
    finally:
        for process in started:
            process.kill()
        cluster.stop()
