"""Local folders and S3 (a real HTTP endpoint) behave alike; one writer a run."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from apacs_ray.config.settings import Settings
from apacs_ray.distributed.cluster import joined_machines, refuse_local
from apacs_ray.errors import ApacsError, UsageError
from apacs_ray.runs import lease as lease_module
from apacs_ray.runs.lease import LOCK, Holder, Lease, LeaseHeld
from apacs_ray.runs.markers import Counts, Marker
from apacs_ray.runs.run import Run
from apacs_ray.storage import Conflict, Store, open_store

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["a.txt", "with space/ünï çödé.bin", "deep/er/50%.txt", "q?#&+.txt"]


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "run of mine"))
    return open_store(f"{request.getfixturevalue('s3')}/run of mine")


def test_names_are_taken_verbatim_everywhere(store: Store) -> None:
    for name in NAMES:
        store.write(name, name.encode())
    assert sorted(entry.path for entry in store.list()) == sorted(NAMES)
    assert [store.read(name) for name in NAMES] == [name.encode() for name in NAMES]
    assert {entry.size for entry in store.list("deep")} == {len(b"deep/er/50%.txt")}
    assert pickle.loads(pickle.dumps(store)).read(NAMES[1]) == NAMES[1].encode()
    store.delete_folder("deep")
    store.delete("a.txt")
    store.delete("a.txt")
    assert sorted(entry.path for entry in store.list()) == sorted({NAMES[1], NAMES[3]})
    assert store.version("a.txt") is None
    with pytest.raises(FileNotFoundError):
        store.read("a.txt")


def test_conditional_writes(store: Store) -> None:
    first = store.create("lock", b"one")
    with pytest.raises(Conflict):
        store.create("lock", b"two")
    second = store.replace("lock", b"three", first)
    with pytest.raises(Conflict):
        store.replace("lock", b"four", first)
    assert store.read("lock") == b"three"
    assert store.version("lock") == second


def test_a_listing_of_more_than_a_page(s3: str) -> None:
    store = open_store(f"{s3}/many")
    for number in range(1203):
        store.write(f"{number:05d}", b"")
    assert len(list(store.list())) == 1203
    store.delete_folder("")
    assert list(store.list()) == []


def test_credentials_and_region_of_a_profile(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(f"[profile lab]\nregion = eu-west-1\nendpoint_url = {endpoint}\n")
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = a\naws_secret_access_key = planted-secret\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    store = open_store(f"{s3}/p")
    store.write("x", b"1")
    assert store.read("x") == b"1"
    assert "planted-secret" not in repr(store)


def test_other_schemes_are_refused() -> None:
    with pytest.raises(UsageError, match="ftp://"):
        open_store("ftp://host/x")


def test_a_second_start_is_told_who_holds_the_run(store: Store) -> None:
    held = Lease.acquire(store)
    with pytest.raises(LeaseHeld, match=f"process {os.getpid()} on"):
        Lease.acquire(store)
    held.release()
    Lease.acquire(store).release()
    assert store.version(LOCK) is None


def test_a_dead_process_frees_its_run_at_once(tmp_path: Path) -> None:
    code = """
        import os, sys
        from apacs_ray.runs.lease import Lease
        from apacs_ray.storage import open_store
        Lease.acquire(open_store(sys.argv[1]))
        os._exit(9)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], cwd=ROOT, check=False)
    store = open_store(str(tmp_path))
    assert store.version(LOCK) is not None
    Lease.acquire(store).release()


def test_a_silent_owner_elsewhere_loses_the_run_and_cannot_commit(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_EVERY", 0.05)
    run = Run.open(store, Settings(), None)
    run.lease._stop.set()  # its heart stops
    run.lease._thread.join()
    content = json.loads(store.read(LOCK))
    old = replace(Holder(**content), host="elsewhere", heartbeat=time.time() - 100)
    store.write(LOCK, json.dumps(vars(old)).encode())
    successor = Lease.acquire(store)
    marker = Marker("ingest", "f", run.lease.owner, 0.0, 0.0, Counts(1, 1))
    with pytest.raises(ApacsError, match="taken over"):
        run.commit("tiles", marker)
    assert store.version("tiles/_committed.json") is None
    run.close()
    assert json.loads(store.read(LOCK))["owner"] == successor.owner
    successor.release()


def test_an_owner_elsewhere_with_a_heartbeat_keeps_the_run(store: Store) -> None:
    held = Lease.acquire(store)
    held._stop.set()
    held._thread.join()
    content = json.loads(store.read(LOCK))
    alive = replace(Holder(**content), host="elsewhere", heartbeat=time.time() - 5)
    store.write(LOCK, json.dumps(vars(alive)).encode())
    with pytest.raises(LeaseHeld, match="elsewhere"):
        Lease.acquire(store)


@pytest.mark.parametrize("ahead", [3600.0, 90.0, -3600.0])
@pytest.mark.parametrize("alive", [True, False])
def test_clocks_that_differ_do_not_decide_who_holds_a_run(
    store: Store, monkeypatch: pytest.MonkeyPatch, ahead: float, alive: bool
) -> None:
    held = Lease.acquire(store)
    held._stop.set()
    held._thread.join()
    other = replace(Holder(**json.loads(store.read(LOCK))), host="elsewhere")

    def beat(at: float) -> None:
        store.write(LOCK, json.dumps(vars(replace(other, heartbeat=at + ahead))).encode())

    now = time.time()
    beat(now)
    looked = []

    def look(seconds: float) -> None:
        looked.append(seconds)
        if alive:
            beat(now + 10)

    with monkeypatch.context() as patch:
        patch.setattr(lease_module.time, "sleep", look)
        if alive:
            with pytest.raises(LeaseHeld, match="elsewhere"):
                Lease.acquire(store)
        else:
            Lease.acquire(store).release()
    assert 0 < sum(looked) < 60


@pytest.fixture
def abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A run whose lock says that this process holds it, and that nobody keeps."""
    monkeypatch.setattr(lease_module, "HEARTBEAT_EVERY", 0.05)
    store = open_store(str(tmp_path))
    held = Lease.acquire(store)
    held._stop.set()
    held._thread.join()
    return store


def rewrite(store: Store, **changed: object) -> None:
    """Change what the lock says; None leaves it out."""
    content = {**json.loads(store.read(LOCK)), **changed}
    store.write(LOCK, json.dumps({key: value for key, value in content.items() if value is not None}).encode())


def test_a_living_owner_keeps_the_run_whatever_its_name_and_its_inode_say(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from apacs_ray.runs.lease import Lease
        from apacs_ray.storage import open_store
        Path("/proc/self/comm").write_text("a) Z (b")
        Lease.acquire(open_store(sys.argv[1]))
        print("held", flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    store = open_store(str(tmp_path))
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"held\n"
        rewrite(store, started=json.loads(store.read(LOCK))["started"] - 3)  # as /proc says when it made an inode anew
        with pytest.raises(LeaseHeld, match=f"process {owner.pid} on"):
            Lease.acquire(store)
        owner.kill()
    Lease.acquire(store).release()


def test_a_later_process_of_the_same_pid_does_not_hold_the_run(abandoned: Store) -> None:
    rewrite(abandoned, start_ticks=json.loads(abandoned.read(LOCK))["start_ticks"] - 1)
    Lease.acquire(abandoned).release()


@pytest.mark.parametrize("changed", [{"pid_namespace": "pid:[1]"}, {"pid_namespace": None, "start_ticks": None}])
def test_a_pid_of_another_container_or_of_an_old_lock_says_nothing(
    abandoned: Store, changed: dict[str, object]
) -> None:
    """Containers on their host's network have one host name and one boot; only the heartbeat tells."""
    rewrite(abandoned, pid=2**22 + 1, **changed)  # more than Linux gives
    with pytest.raises(LeaseHeld):
        Lease.acquire(abandoned)
    rewrite(abandoned, heartbeat=time.time() - 100)
    Lease.acquire(abandoned).release()


def test_a_lock_released_while_it_is_looked_at_is_free(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    held, read = Lease.acquire(store), type(store).read

    def late(self: Store, path: str) -> bytes:
        held.release()
        return read(self, path)

    monkeypatch.setattr(type(store), "read", late)
    Lease.acquire(store).release()


def test_a_local_output_is_refused_where_an_autoscaler_may_start_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "NodeManagerAddress": "10.0.0.1"}])
    monkeypatch.setenv("APACS_RAY_NODES", "[{cpus: 14, gpus: 0, count: 8}, {cpus: 44, gpus: 4, count: 2}]")
    monkeypatch.delenv("RAY_FAKE_CLUSTER", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert joined_machines() == 1  # a Ray of our own
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert joined_machines() == 11
    with pytest.raises(ApacsError, match="a local --output cannot be seen by all 11 nodes"):
        refuse_local(joined_machines(), "/runs/mine", "--output")
    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
    assert joined_machines() == 1


def test_counts_must_add_up(tmp_path: Path) -> None:
    run = Run.open(open_store(str(tmp_path)), Settings(), None)
    lost = Marker("ingest", "f", run.lease.owner, 0.0, 0.0, Counts(10, 7, {"background": 1}, 1))
    with pytest.raises(ApacsError, match="10 rows in, but 7 out"):
        run.commit("tiles", lost)
    run.commit("tiles", replace(lost, counts=Counts(10, 7, {"background": 1}, 2)))
    assert run.committed("tiles", "f") == replace(lost, counts=Counts(10, 7, {"background": 1}, 2))
    assert run.committed("tiles", "g") is None
    run.close()


@pytest.mark.parametrize("place", ["a file", "a file/below", "read-only/run", "gone/../a file/x"])
def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "a file").write_text("x")
    (tmp_path / "read-only").mkdir()
    (tmp_path / "read-only").chmod(0o500)
    if place.startswith("read-only") and os.access(tmp_path / "read-only", os.W_OK):
        pytest.skip("this user may write everywhere")
    store = open_store(str(tmp_path / place))
    for write in (
        lambda: Lease.acquire(store),
        lambda: store.write("members/x", b"x"),
        lambda: store.create("run.lock", b"x"),
    ):
        with pytest.raises(ApacsError, match=r"cannot write \(.+\); change that, or --output$"):
            write()
