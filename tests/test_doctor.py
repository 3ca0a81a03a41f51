"""`python -m apacs_ray doctor`: what it finds on machines and stores that would not do."""

from __future__ import annotations

import email.utils
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import boto3
import numpy as np
import pytest
from ray._common.utils import get_default_ray_temp_dir
from support.segmentation import write_ensemble
from support.slide_files import picture, write_tiff

from apacs_ray.commands.doctor import doctor
from apacs_ray.config.command_line import parse, parse_segment
from apacs_ray.distributed.probe import ClusterProbe, cause
from apacs_ray.distributed.resource_plan import Nodes, cluster_of
from apacs_ray.distributed.session import private_session_folder
from apacs_ray.doctor import cluster, codecs, devices, folders, machine, objects, segmenting, tables, versions
from apacs_ray.doctor.finding import Finding, examine, redacted
from apacs_ray.doctor.gpu_memory import check_gpu_memory
from apacs_ray.doctor.stores import Stores
from apacs_ray.errors import ApacsError, UsageError
from apacs_ray.runs.lease import LOCK, Holder, Lease
from apacs_ray.storage import LocalStore, open_store
from apacs_ray.testing.s3_proxy import Behavior, Proxy

ROOT = Path(__file__).resolve().parent.parent


def only(findings: object) -> Finding:
    (finding,) = list(findings)  # type: ignore[call-overload]
    return finding


def contents(uri: str) -> list[str]:
    return sorted(entry.path for entry in open_store(uri).list())


# what any check may do


def test_a_check_that_raises_or_hangs_becomes_a_failed_line() -> None:
    def breaks() -> Iterator[Finding]:
        yield Finding("first", "ok", "fine")
        raise ValueError("two\nlines")

    first, second = examine("second", breaks)
    assert (first.state, second.name, second.state, second.message) == (
        "ok",
        "second",
        "failed",
        "ValueError: two lines",
    )
    assert second.advice
    hung = only(examine("slow", lambda: time.sleep(5) or (), timeout=0.05))
    assert hung.state == "failed"
    assert "0.05 s" in hung.message


def test_no_secret_and_no_control_character_is_shown() -> None:
    text = "at http://me:pa/ss@host:9000/x with s3cr3t/key and s3cr3t%2Fkey\x1b[31m"
    finding = redacted(Finding("a", "failed", text, "s3cr3t/key"), {"s3cr3t/key", "at"})
    assert finding.message == "at http://***@host:9000/x with *** and ***?[31m"
    assert finding.advice == "***"


# this machine


def test_packages_that_are_missing_or_out_of_range() -> None:
    assert only(versions.check_packages()).state == "ok"
    texts = [f.message for f in versions.check_packages(["no-such-package>=1", "numpy<1", "numpy; python_version<'3'"])]
    assert len(texts) == 2
    assert "no-such-package is not installed" in texts[0]
    assert "numpy" in texts[1]
    assert "<1" in texts[1]


def test_requirements_without_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the image, which holds the source and pyproject.toml, and in a copy of the source alone."""

    def not_installed(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", not_installed)
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["numpy>=2"]\n')
    assert versions.requirements(tmp_path) == ["numpy>=2"]
    monkeypatch.setattr(versions, "requirements", lambda: not_installed("apacs_ray"))
    finding = only(versions.check_packages())
    assert finding.state == "warning"
    assert "pyproject.toml" in finding.advice


def test_the_torch_pair_and_the_devices(tmp_path: Path) -> None:
    settings = parse(["--data", "x"], "doctor", "").settings
    assert only(versions.check_torch()).state == "ok"
    assert only(devices.check_cpu(settings)).state == "ok"
    import torch

    if not torch.cuda.is_available():
        assert "runs on the CPU" in only(devices.check_gpus(settings, tmp_path / "none")).message
        driver = tmp_path / "version"
        driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27")
        finding = only(devices.check_gpus(settings, driver))
        assert finding.state == "warning"
        assert "470.82.01" in finding.message


@pytest.mark.parametrize(
    "check", [codecs.check_pillow, codecs.check_simplejpeg, codecs.check_vips, codecs.check_openslide]
)
def test_codecs_work_here(check: object) -> None:
    assert {finding.state for finding in check()} == {"ok"}  # type: ignore[operator]


def test_a_codec_that_swaps_channels_is_found() -> None:
    assert codecs.compare("x", np.ascontiguousarray(codecs.picture()[:, :, ::-1]), codecs.LOSS, "p").state == "failed"
    assert codecs.compare("x", codecs.picture()[:-1], codecs.LOSS, "p").state == "failed"


def test_shared_memory_disk_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 1 << 50)
    monkeypatch.setattr(machine, "STORE_BEYOND_SHARED_MEMORY", 1 << 49)
    monkeypatch.setattr(machine, "STORE_MOST", 1 << 49)
    finding = only(machine.check_shared_memory(tmp_path))
    assert finding.state == "warning"
    assert "--shm-size" in finding.advice
    assert machine.check_disk("disk", tmp_path / "a/b", 0, "x").state == "ok"
    assert machine.check_disk("disk", tmp_path / "a/b", 1 << 60, "x").state == "warning"
    monkeypatch.setattr(machine, "FULLEST", 0.0)
    assert "make room" in machine.check_disk("disk", tmp_path / "a/b", 0, "x").advice
    monkeypatch.setattr(machine, "TOO_LITTLE", 1 << 60)
    assert machine.check_disk("disk", tmp_path, 0, "x").state == "failed"
    monkeypatch.setattr(machine, "FEWEST_FILES", 1 << 40)
    assert "ulimit" in only(machine.check_open_files()).advice


def test_the_disk_of_ray_is_where_ray_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse(["--data", "x"], "doctor", "").settings
    for name in ("TMPDIR", "RAY_TMPDIR"):  # the second is heeded before the first
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
        assert str(machine.ray_folder()) == get_default_ray_temp_dir()
        assert f"{folder}/ray: " in only(machine.check_disks(settings, "s3://bucket/run", None)).message
    monkeypatch.setattr(machine, "TOO_LITTLE", 1 << 60)
    assert only(machine.check_disks(settings, "s3://bucket/run", None)).state == "failed"
    monkeypatch.delenv("TMPDIR")
    monkeypatch.delenv("RAY_TMPDIR")
    assert str(machine.ray_folder()) == private_session_folder()


def test_cpus_and_memory_of_a_container(tmp_path: Path) -> None:
    assert machine.usable_cpus(tmp_path) == os.cpu_count()
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.usable_cpus(tmp_path) == os.cpu_count()
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert machine.usable_cpus(tmp_path) == 1
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert machine.available_memory(tmp_path) == 2000000


# local folders


@pytest.fixture
def readable_only() -> Iterator[Path]:
    """A folder in which this process may read and not write, although tests may run as root."""
    folder = Path(tempfile.mkdtemp())
    (folder / "a.png").write_bytes(b"x")
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_local_output_leaves_nothing(tmp_path: Path) -> None:
    finding = only(folders.check_output(LocalStore(str(tmp_path / "new/run"))))
    assert finding.state == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")
    assert only(folders.check_output(LocalStore(str(tmp_path / "run")))).state == "ok"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
    assert only(folders.check_output(LocalStore(str(tmp_path / "run/run.json")))).state == "failed"
    below = only(folders.check_output(LocalStore(str(tmp_path / "run/run.json/a/b"))))
    assert below.message.startswith(f"{tmp_path}/run/run.json is a file; ")


def test_a_read_only_folder(readable_only: Path) -> None:
    assert only(folders.check_data(LocalStore(str(readable_only)))).state == "ok"
    for output in (readable_only, readable_only / "runs/new"):
        finding = only(folders.check_output(LocalStore(str(output))))
        assert finding.state == "failed"
        assert str(readable_only) in finding.advice
    assert [path.name for path in readable_only.iterdir()] == ["a.png"]
    assert machine.check_disk("disk", readable_only, 0, "x").state == "failed"


def test_local_data(tmp_path: Path) -> None:
    assert "no such folder" in only(folders.check_data(LocalStore(str(tmp_path / "none")))).message
    assert "no file" in only(folders.check_data(LocalStore(str(tmp_path)))).message
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a [b].png").write_bytes(b"x")
    finding = only(folders.check_data(LocalStore(str(tmp_path))))
    assert finding.state == "ok"
    assert "deep/a [b].png" in finding.message
    assert only(folders.check_data(LocalStore(str(tmp_path / "deep/a [b].png")))).state == "failed"


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    def findings(text: str | None, name: str) -> list[Finding]:
        table = tmp_path / "table.csv"
        table.unlink(missing_ok=True)
        if text is not None:
            table.write_text(text)
        data = parse(["--data", "x", f"--data.{name}", str(table)], "doctor", "").settings.data
        return [*tables.check_splits(data), *tables.check_mpps(data)]

    for name in ("splits", "mpps"):
        missing = only(findings(None, name))
        assert (missing.name, missing.state) == (f"data.{name}", "failed")
        assert "table.csv: no such text file" in missing.message
    assert only(findings("slide_id,mpp\na,0.25\n", "mpps")).state == "ok"
    assert only(findings("slide_id,split\na,train\nb,test\n", "splits")).message.endswith("table.csv: 2 slides")
    for name, line in (("split", "b,trane"), ("mpp", "b,-1")):
        wrong = only(findings(f"slide_id,{name}\na,{'train' if name == 'split' else 1}\n{line}\n", f"{name}s"))
        assert wrong.state == "failed"
        assert "line 3" in wrong.message


# S3


def test_a_bucket_that_does_is_left_as_it_was(s3: str) -> None:
    open_store(s3).write("cells/a b.png", b"pixels")
    stores = Stores()
    assert only(stores.check_data("data", f"{s3}/cells")).message.endswith("reads a b.png")
    assert only(stores.check_output("output", f"{s3}/runs/one")).state == "ok"
    assert only(stores.check_output("output", s3)).state == "ok"
    assert only(stores.check_clock()).state == "ok"
    assert contents(s3) == ["cells/a b.png"]
    assert "no objects" in only(stores.check_data("data", f"{s3}/nothing")).message


def test_a_bucket_with_versions_keeps_none_of_ours(s3: str) -> None:
    client, bucket = boto3.client("s3"), s3.removeprefix("s3://")
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    assert only(Stores().check_output("output", f"{s3}/run")).state == "ok"
    left = client.list_object_versions(Bucket=bucket)
    assert "Versions" not in left
    assert "DeleteMarkers" not in left


def test_no_such_bucket(s3: str) -> None:
    for finding in (
        only(Stores().check_data("data", "s3://no-such-bucket/x")),
        only(Stores().check_output("output", "s3://no-such-bucket/x")),
    ):
        assert finding.state == "failed"
        assert "no bucket no-such-bucket" in finding.message


RIGHTS = {
    "s3:ListBucket": ("GET", True),
    "s3:GetObject": ("GET", False),
    "s3:PutObject": ("PUT", False),
    "s3:DeleteObject": ("DELETE", False),
}


def test_a_missing_right_is_named(s3: str, between: Proxy) -> None:
    store = open_store(s3)
    store.write("cells/a.png", b"pixels")
    for right, request in RIGHTS.items():
        between.behavior = Behavior(lambda *received, request=request: "AccessDenied" if received == request else None)
        findings = list(Stores().check_output("output", f"{s3}/run"))
        assert right in findings[0].message
        assert "policy" in findings[0].advice
        if request[0] == "GET":
            assert right in only(Stores().check_data("data", f"{s3}/cells")).message
        between.behavior = Behavior()
        left = sorted(entry.path for entry in store.list("run"))
        if right == "s3:DeleteObject":  # what cannot be deleted is named
            assert [finding.message for finding in findings[1:]] == [f"{s3}/{left[0]} could not be deleted"]
        else:
            assert len(findings) == 1
            assert left == []


def test_every_missing_right_is_named(s3: str, between: Proxy) -> None:
    between.behavior.refuse = lambda method, lists: "AccessDenied"
    text = " ".join(finding.message for finding in Stores().check_output("output", f"{s3}/run"))
    for right in RIGHTS:
        assert f"{right} is denied" in text


def test_wrong_credentials(s3: str, between: Proxy) -> None:
    for code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"):
        between.behavior.refuse = lambda method, lists, code=code: code
        finding = only(Stores().check_output("output", s3))
        assert code in finding.message
        assert "AWS_SECRET_ACCESS_KEY" in finding.advice


def test_no_credentials_and_no_profile(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    assert "AWS_PROFILE" in only(Stores().check_data("data", s3)).advice
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    assert "no-such-profile" in only(Stores().check_data("data", s3)).message


def test_a_store_that_ignores_or_refuses_conditions(s3: str, between: Proxy) -> None:
    for header in ("If-None-Match", "If-Match"):
        between.behavior = Behavior(forgotten={header.lower()})
        finding = only(Stores().check_output("output", f"{s3}/run"))
        assert finding.state == "failed"
        assert header in finding.message
        assert contents(s3) == []
    between.behavior = Behavior(lambda method, lists: "NotImplemented" if method == "PUT" else None, status=501)
    assert "conditional write is refused" in only(Stores().check_output("output", f"{s3}/run")).message


@pytest.mark.parametrize(("ahead", "state"), [(300, "warning"), (-300, "warning"), (3600, "failed")])
def test_a_clock_that_is_wrong(s3: str, between: Proxy, ahead: int, state: str) -> None:
    between.behavior.headers["Date"] = email.utils.formatdate(time.time() + ahead, usegmt=True)
    stores = Stores()
    list(stores.check_data("data", s3))
    finding = only(stores.check_clock())
    assert finding.state == state
    assert ("behind" if ahead > 0 else "ahead") in finding.message


def test_nobody_listens_and_nobody_answers(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "READ_TIMEOUT", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        began = time.monotonic()
        finding = only(Stores().check_data("data", s3))
        assert time.monotonic() - began < 5
        assert "no answer" in finding.message
    finding = only(Stores().check_output("output", s3))
    assert f"nobody answers at http://127.0.0.1:{port}" in finding.message


def test_something_else_answers(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        finding = only(Stores().check_output("output", s3))
        server.shutdown()
    assert finding.state == "failed"
    assert "AWS_ENDPOINT_URL" in finding.advice


def test_credentials_in_the_uri_are_not_repeated() -> None:
    finding = only(Stores().check_data("data", "s3://AKIA123:hidden/key@bucket/x"))
    assert finding.state == "failed"
    assert "hidden" not in finding.message + finding.advice


def test_a_lock_is_looked_at_as_a_run_does(tmp_path: Path) -> None:
    stores, uri = Stores(), str(tmp_path / "run")
    assert only(stores.check_lock(uri)).state == "ok"
    held = Lease.acquire(LocalStore(uri))
    finding = only(stores.check_lock(uri))
    assert finding.state == "failed"
    assert f"held by process {os.getpid()}" in finding.message
    held.release()
    for ahead, words in ((3600, "ahead of this machine's clock"), (-3600, "s ago")):
        elsewhere = replace(Holder.myself(), host="elsewhere", heartbeat=time.time() + ahead)
        LocalStore(uri).write(LOCK, json.dumps(vars(elsewhere)).encode())
        finding = only(stores.check_lock(uri))
        assert (finding.state, words in finding.message) == ("warning", True)
    assert list(stores.check_lock(f"{uri}/run.lock/below")) == []  # which the check of the output tells


def test_a_folder_that_is_too_long_for_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    assert only(machine.check_sockets()).state == "ok"
    monkeypatch.setenv("TMPDIR", f"/tmp/{'x' * 80}")
    finding = only(machine.check_sockets())
    assert finding.state == "failed"
    assert finding.message.startswith("TMPDIR /tmp/xxx")
    assert "RAY_TMPDIR" in finding.advice
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")  # whose Ray is elsewhere
    assert list(machine.check_sockets()) == []


# the cluster


MEMORY = [(f"memory: {what}", "ok") for what in ("members", "fusion", "trials")]


@pytest.mark.parametrize(
    ("gib", "members", "fusion", "trials"),
    [
        (80, "fcn32: 4 tiles of 1024 px take 1.7 GiB of 0.2 GPU; fcn16: 2 tiles", "4 tiles", "of 0.25 GPU"),
        (6, "too much; fcn16: 1 tile of 1024 px takes 4.3 GiB of 0.8 GPU, so a step of 2 is", "take 4.0", "too much"),
        (2, "fcn8: 1 tile of 1024 px takes 4.3 GiB of 0.8 GPU, which is too much", "into 4 passes", "too much"),
    ],
)
def test_steps_that_do_not_fit_the_memory_of_a_gpu(gib: int, members: str, fusion: str, trials: str) -> None:
    settings = parse(
        ["--data", "/cells", "--output", "/runs", "--members.precision", "bfloat16"], "doctor", ""
    ).settings
    four = cluster_of([Nodes(48, 4, 1)], [])
    findings = list(check_gpu_memory(settings, four, gib << 30))
    assert [finding.name for finding in findings] == [name for name, _ in MEMORY]
    for finding, expected in zip(findings, (members, fusion, trials), strict=True):
        assert f"has {gib}.0 GiB: " in finding.message
        assert expected in finding.message
        assert finding.state == ("warning" if "too much" in finding.message else "ok")
        assert ("lower" in finding.advice) == (finding.state == "warning")
    assert list(check_gpu_memory(settings, cluster_of([Nodes(48, 0, 1)], []), gib << 30)) == []


def test_the_plan_for_this_machine_and_for_a_cluster(monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    here = parse(["--data", "/cells", "--output", "/runs"], "doctor", "")
    assert [finding.name for finding in cluster.check_cluster(here)] == ["cluster", "plan", "sweep"]
    with socket.create_server(("127.0.0.1", 0)) as head:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{head.getsockname()[1]}")
        two = ClusterProbe(cluster_of([Nodes(16, 2, 2)], []), 2)
        states = [(finding.name, finding.state) for finding in cluster.check_cluster(here, lambda: two)]
        assert states == [
            ("cluster", "ok"),
            ("cluster", "failed"),
            ("cluster", "failed"),
            ("plan", "ok"),
            ("sweep", "ok"),
            *MEMORY,
        ]
        remote = parse(["--data", f"{s3}/cells", "--output", f"{s3}/run"], "doctor", "")
        findings = list(cluster.check_cluster(remote, lambda: two))
        assert [finding.state for finding in findings] == ["ok"] * 6
        assert "GPU" in findings[1].message
        assert "20 trials, 16 at a time, each 1 worker x 0.25 GPU + 2 CPU" in findings[2].message
        assert "not known here: fusion: 4 tiles of 1024 px take 4.0 GiB, 1 tile" in findings[4].message

        def refused() -> ClusterProbe:
            raise ApacsError("Ray did not join: version mismatch")

        assert "version mismatch" in only(cluster.check_cluster(remote, refused)).message
    nobody = only(cluster.check_cluster(here))
    assert nobody.state == "failed"
    assert "nobody answers" in nobody.message
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    assert "job server" in only(cluster.check_cluster(here)).message
    for address, words in (("host", "no HOST:PORT"), ("ray://127.0.0.1:1", "nobody answers"), ("host:x", "no HOST")):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert words in only(cluster.check_cluster(here)).message


def test_a_sweep_that_would_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "this_machine", lambda: cluster_of([Nodes(16, 2, 1)], []))
    config = tmp_path / "sweep.yaml"
    given = ("--tune.config", str(config))

    def sweep(*options: str) -> list[Finding]:
        findings = cluster.check_cluster(parse(["--data", "/cells", "--output", "/runs", *options], "doctor", ""))
        return [finding for finding in findings if finding.name == "sweep"]

    space = "trials: 4\nepochs: 2\nspace: {dropout: {uniform: [0.0, 0.5]}}\n"
    config.write_text(f"{space}resources: {{cpu: 1, gpu: 1, workers: 4}}\n")
    too_large = only(sweep(*given))
    assert too_large.state == "failed"
    assert "2 GPUs" in too_large.message
    assert sweep(*given, "--fusion.from_best", "false") == []

    config.write_text(f"{space}searcher: magic\n")
    with pytest.raises(UsageError, match=r"sweep\.yaml: searcher"):
        doctor(given)
    config.write_text(f"{space}searcher: optuna\n")
    assert only(sweep(*given)).state == "ok"
    monkeypatch.setitem(sys.modules, "optuna", None)  # as where it is not installed
    with pytest.raises(UsageError, match="optuna"):
        doctor(given)


def test_the_error_that_says_why_ray_did_not_join() -> None:
    text = (
        "RuntimeError: Failed to connect to GCS\n"
        "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: token is missing. Note: and so on.\n\n"
        'Traceback (most recent call last):\n  File "worker.py", line 2008, in init\n'
        "ConnectionError: Failed to connect to Ray cluster at 192.0.2.2:41149\n"
    )
    assert cause(text) == "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: token is missing"
    assert cause("one\nFatal: last\n") == "Fatal: last"
    assert cause("") == ""


# the command


def call(*argv: str, **env: str) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"COLUMNS": "400", **env}
    done = subprocess.run(
        [sys.executable, "-m", "apacs_ray", *argv], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_the_command(s3: str) -> None:
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    open_store(s3).write("cells/a.png", b"pixels")
    status, text = call("doctor", "--data", f"{s3}/cells", "--output", f"{s3}/run", RAY_AUTH_TOKEN="planted-token")
    assert status == 0, text
    for words in ("OpenSlide MIRAX", "s3://", "clock", "training", "a run would work"):
        assert words in text
    assert "Traceback" not in text
    assert secret not in text
    assert "planted-token" not in text
    assert contents(s3) == ["cells/a.png"]


def test_usage() -> None:
    for argv in (("operate",), ("doctor", "--tiles.size", "wide")):
        status, text = call(*argv)
        assert status == 2, text
        assert "Traceback" not in text


def test_a_failed_check_is_exit_status_1(
    s3: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://someone:planted-word@127.0.0.1:9")
    monkeypatch.setenv("COLUMNS", "400")
    assert doctor(["--data", f"{s3}/cells", "--output", str(tmp_path / "run")]) == 1
    text = capsys.readouterr().out
    assert "nobody answers at http://***@127.0.0.1:9" in text
    assert "planted-word" not in text
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in text
    assert list(tmp_path.iterdir()) == []


# segmentation


def test_a_segmentation_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user asks for it: by the options of `segment`."""
    monkeypatch.setenv("COLUMNS", "400")
    model = write_ensemble(tmp_path / "model", mpp=0.25)
    (tmp_path / "slides").mkdir()
    write_tiff(tmp_path / "slides/a.tif", picture(300, 200), mpp=0.5)
    options = ["--model", str(model.root), "--slides", str(tmp_path / "slides"), "--output", str(tmp_path / "out")]
    status, text = call("doctor", *options)
    assert status == 0, text
    for words in ("fusion of fcn32, fcn16, fcn8, fusion", "1 slide; a.tif opens: 300 x 200 px", "it is enlarged"):
        assert words in text
    assert re.search(r"2.00 times.*cores of \d+ px with a halo of 480", text, re.S)
    assert "training" not in re.sub(r"trained.*", "", text).partition("cluster")[2]
    assert not (tmp_path / "out").exists()


@pytest.fixture
def checks(tmp_path: Path) -> Callable[..., segmenting.SegmentChecks]:
    model = write_ensemble(tmp_path / "model", mpp=0.25)
    (tmp_path / "slides").mkdir()
    write_tiff(tmp_path / "slides/a.tif", picture(300, 200), mpp=0.25)

    def of(*more: str) -> segmenting.SegmentChecks:
        given = ["--model", str(model.root), "--slides", str(tmp_path / "slides"), "--output", str(tmp_path / "out")]
        return segmenting.SegmentChecks(parse_segment([*given, *more], "doctor", ""))

    return of


def test_networks_that_are_not_whole(checks: Callable[..., segmenting.SegmentChecks], tmp_path: Path) -> None:
    assert only(checks().check_model()).state == "ok"
    weights = tmp_path / "model/fusion/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    cut = only(checks().check_model())
    assert (cut.state, bool(cut.advice)) == ("failed", True)
    weights.unlink()
    gone = only(checks().check_model())
    assert gone.state == "failed"
    assert "has no weights" in gone.message
    (tmp_path / "model/run.json").write_text("{}")
    weights.write_bytes(whole)
    uncommitted = only(checks().check_model())
    assert (uncommitted.state, "no finished run" in uncommitted.message) == ("failed", True)
    shutil.rmtree(tmp_path / "model")
    assert "no fusion/model.json there" in only(checks().check_model()).message


def test_slides_and_their_resolution(checks: Callable[..., segmenting.SegmentChecks], tmp_path: Path) -> None:
    def resolution(*more: str) -> Finding:
        one = checks(*more)
        list(one.check_model())
        return next(finding for finding in one.check_slides() if finding.name == "resolution")

    assert resolution().state == "ok"
    assert "another size" in resolution("--segment.mpp", "0.5").advice
    assert resolution("--segment.mpp", "0.26").state == "ok"
    slides = tmp_path / "slides"
    write_tiff(slides / "a.tif", picture(300, 200), mpp=None)
    unknown = resolution()
    assert (unknown.state, "--data.mpp" in unknown.advice) == ("warning", True)
    assert resolution("--data.mpp", "0.25").state == "ok"
    (slides / "a.tif").write_bytes(b"no slide" * 100)
    closed = only(checks().check_slides())
    assert (closed.state, "does not open" in closed.message) == ("warning", True)
    (slides / "a.tif").unlink()
    assert "nothing there" in only(checks().check_slides()).message


def test_a_core_that_does_not_fit_the_memory(checks: Callable[..., segmenting.SegmentChecks]) -> None:
    """Of a cluster of many CPUs each worker has little; a core that is given is not made smaller."""
    for cpus, more, state in ((1, [], "ok"), (10**6, [], "failed"), (1, ["--segment.core", "65536"], "failed")):
        one = checks(*more)
        list(one.check_model())
        finding = only(one.check_cores(cluster_of([Nodes(cpus, 0, 1)], [])))
        assert finding.state == state, finding.message
        assert (finding.advice == "") == (state == "ok")
