"""What tests share: one moto S3 server a process, whole runs that are made once, and where the real data lies."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from support.runs import SMALL, SWEPT, Once, end_all, fork_server, run

from apacs_ray.testing import runs
from apacs_ray.testing.s3_proxy import Behavior, Proxy, proxy

DEADLINE = 1200  # s
SHARED = Path(__file__).resolve().parents[2] / "shared"


# Examples are the same in every run of the tests, and may take as long as a busy machine needs.
settings.register_profile("same", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("same")

# Files with whole runs, the longest first: each of their tests goes to the process that is free. The other files stay
# together, for their fixtures.
WHOLE_RUNS = ("test_failures", "test_jobs", "test_store_faults", "test_pipeline", "test_estimate")
TOGETHER = ("test_failures",)  # their tests share a cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first, so that none is left when all else is done, and groups for `--dist loadgroup`."""
    items.sort(key=lambda item: WHOLE_RUNS.index(item.path.stem) if item.path.stem in WHOLE_RUNS else len(WHOLE_RUNS))
    for item in items:
        if item.path.stem not in WHOLE_RUNS or item.path.stem in TOGETHER:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session", autouse=True)
def ended_server() -> Iterator[None]:
    """The server of forks ends with the session."""
    yield
    if fork_server.cache_info().currsize:
        fork_server().close()


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """A test that hangs is ended, and with any test what it started."""

    def hangs(*_: object) -> None:
        raise TimeoutError(f"the test has not ended in {DEADLINE} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(DEADLINE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    end_all()


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once(name, make)`: the folder of this name, which the first to ask makes, among all processes of the tests."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder = shared / "once" / name
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "made").exists():
                assert not (folder / "tried").exists(), f"{name}: another process failed to make it"
                (folder / "tried").touch()
                make(folder / "files")
                (folder / "made").touch()
        return folder / "files"

    return made


@pytest.fixture(scope="session")
def real_cells() -> Path:
    """Real cell images in the data set's layout; they are not part of the repository."""
    folder = SHARED / "data" / "real_cells"
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}")
    return folder


@pytest.fixture(scope="session")
def real_pap() -> Path:
    """Real Pap-stained fields in the data set's layout; they are not part of the repository."""
    folder = SHARED / "data" / "real_pap"
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}")
    return folder


@pytest.fixture(scope="session")
def cells(once: Once) -> Path:
    """A small data set in the folder layout."""

    def write(folder: Path) -> None:
        runs.write_cells(folder / "my cells")

    return once("cells", write) / "my cells"


@pytest.fixture(scope="session")
def undisturbed(cells: Path, once: Once) -> Path:
    """One run without a disturbance, by a script that is started, not forked; the others must come to the same."""

    def make(output: Path) -> None:
        done = runs.run("--data", str(cells), "--output", str(output), *SMALL)
        assert done.status == 0, done.summary

    return once("undisturbed", make)


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sweep whose trials take seconds, so that they can be met in the act."""
    path = tmp_path_factory.mktemp("sweep") / "sweep.yaml"
    path.write_text("trials: 2\nepochs: 25\nspace: {learning_rate: {loguniform: [0.001, 0.002]}}\n")
    return path


@pytest.fixture(scope="session")
def swept(undisturbed: Path, cells: Path, sweep: Path, once: Once) -> Path:
    """The undisturbed run with a sweep, and the fusion that this gives."""

    def make(output: Path) -> None:
        shutil.copytree(undisturbed, output)
        done = run("--data", str(cells), "--output", str(output), *SMALL, *SWEPT, str(sweep))
        assert done.status == 0, done.summary

    return once("swept", make)


@pytest.fixture
def untrained(undisturbed: Path, tmp_path: Path) -> Path:
    """The run as it is when its tiles are cut."""
    output = tmp_path / "untrained"
    shutil.copytree(undisturbed, output)
    for folder in ("members", "heatmaps", "fusion", "evaluation"):
        shutil.rmtree(output / folder)
    return output


@pytest.fixture
def own_log() -> Iterator[None]:
    """The log is set up as before when a test that prints it has ended."""
    from apacs_ray.console import LOGGER

    logger = logging.getLogger(LOGGER)
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture
def printed_log(own_log: None) -> None:
    """What our modules log is printed, as in a driver."""
    from apacs_ray.console import print_log

    print_log()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A real HTTP S3 endpoint on the loopback address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket; the environment points at its endpoint. Returns `s3://bucket`."""
    import boto3

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-the-test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    client = boto3.client("s3")
    name = f"bucket-{os.urandom(4).hex()}"
    client.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    return f"s3://{name}"


@pytest.fixture(scope="session")
def one_proxy(s3_endpoint: str) -> Iterator[Proxy]:
    with proxy(s3_endpoint) as running:
        yield running


@pytest.fixture
def between(one_proxy: Proxy, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that stands between the bucket `s3` and us, and behaves until a test says otherwise."""
    one_proxy.behavior = Behavior()
    one_proxy.requests.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", one_proxy.url)
    yield one_proxy
    one_proxy.behavior = Behavior()
