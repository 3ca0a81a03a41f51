"""Stores that fail at random, cut answers or refuse writes, and a full disk: no data is lost or taken for whole."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import botocore.endpoint
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.runs import SMALL, run, start
from support.segmentation import OneSlide, with_settings, write_ensemble
from support.slide_files import picture as field
from support.slide_files import write_slide
from torch import nn

from apacs_ray.data.shard_rows import read_rows
from apacs_ray.data.shards import Receipt, write_table
from apacs_ray.doctor.answers import CREDENTIALS
from apacs_ray.errors import ApacsError, RefusedError, StoreTroubleError
from apacs_ray.models.registry import MEMBERS
from apacs_ray.outputs.slide_files import GEOJSON, MASK, OVERVIEW, PARQUET
from apacs_ray.runs import lease
from apacs_ray.runs.lease import LOCK, Lease, LeaseHeld
from apacs_ray.slides.cache import SlideCache
from apacs_ray.storage import Conflict, LocalStore, Store, open_store, retry
from apacs_ray.testing.runs import TIMEOUT, read_json, wait_for
from apacs_ray.testing.s3_proxy import KINDS, Behavior, Proxy, at_random, in_turn, refusing_writes
from apacs_ray.training.checkpoints import complete_checkpoints, keep_checkpoint
from apacs_ray.training.history import EpochRecord, read_history
from apacs_ray.training.state import TrainState, save_state, snapshot

CONTENT = np.random.default_rng(0).bytes(600_000)  # more than the last bytes that are read with the first request


@pytest.fixture
def store(between: Proxy, s3: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store behind the proxy, with short pauses between attempts."""
    monkeypatch.setattr(retry, "PAUSE", 0.002)
    monkeypatch.setattr(retry, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(botocore.endpoint, "time", SimpleNamespace(sleep=lambda pause: None))  # of an upload's parts
    return open_store(f"{s3}/run")


def reads(store: Store, tmp_path: Path) -> dict[str, Callable[[], object]]:
    """Every way to read `object` and `table.parquet` of a store, with a check of what was read."""

    def same(content: bytes, expected: bytes) -> None:
        assert content == expected

    def part() -> None:
        with store.open("object") as stream:
            stream.seek(1000)
            same(stream.read(100_000), CONTENT[1000:101_000])
            same(stream.read(), CONTENT[101_000:])

    def staged() -> None:
        entries = [entry for entry in store.list() if entry.path == "object"]
        cache = SlideCache(tmp_path / f"cache-{time.monotonic_ns()}", 1 << 30)
        with cache.staged(store, entries) as place:
            same((place / "object").read_bytes(), CONTENT)

    def rows() -> None:
        tiles = list(read_rows(store, [("table.parquet", 3, 1), ("table.parquet", 0, 0)], ["image"]))
        assert [tile["image"] for tile in tiles] == [picture(7), picture(0)]

    def pages() -> None:
        assert len(list(store.list("many"))) == 12

    def version() -> None:
        assert store.version("object") is not None

    def nothing() -> None:
        assert store.version("nothing") is None
        for ask in (store.read, store.open):
            with pytest.raises(FileNotFoundError):
                ask("nothing")

    return {
        "read": lambda: same(store.read("object"), CONTENT),
        "part": part,
        "staged": staged,
        "rows": rows,
        "pages": pages,
        "version": version,
        "nothing": nothing,
    }


def writes(store: Store, tmp_path: Path) -> dict[str, Callable[[], object]]:
    """Every way to write or delete, with a check of what the store then holds."""
    large = tmp_path / "large"
    large.write_bytes(CONTENT * 45)  # two parts

    def write() -> None:
        store.write("written", CONTENT)
        assert store.read("written") == CONTENT

    def upload() -> None:
        store.upload("uploaded", large)
        assert store.read("uploaded") == large.read_bytes()

    def conditional() -> None:
        store.delete("lock")
        first = store.create("lock", b"one")
        with pytest.raises(Conflict):
            store.create("lock", b"two")
        second = store.replace("lock", b"three", first)
        with pytest.raises(Conflict):
            store.replace("lock", b"four", first)
        assert (store.read("lock"), store.version("lock")) == (b"three", second)

    def folder() -> None:
        for number in range(3):
            store.write(f"folder/{number}", b"")
        store.delete_folder("folder")
        assert list(store.list("folder")) == []

    def by_ray() -> None:
        path = store.full_path("by Ray")
        with store.filesystem.open_output_stream(path) as stream:
            stream.write(CONTENT)
        assert store.read("by Ray") == CONTENT

    return {"write": write, "upload": upload, "conditional": conditional, "folder": folder, "by Ray": by_ray}


def picture(number: int) -> bytes:
    return CONTENT[number : number + 50_000]


def fill(store: Store) -> None:
    """What `reads` reads."""
    store.write("object", CONTENT)
    table = pa.table({"image": [picture(number) for number in range(8)], "other": list(range(8))})
    write_table(store, table, Receipt("table.parquet", 8, 8), group=2)
    for number in range(12):
        store.write(f"many/{number}", b"")


@pytest.fixture
def filled(s3: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    fill(store)
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "5")  # a page of a listing
    return store


def test_every_operation_outlives_every_kind_of_fault(filled: Store, between: Proxy, tmp_path: Path) -> None:
    for kind in KINDS:
        met = 0
        for seed, work in enumerate([*reads(filled, tmp_path).values(), *writes(filled, tmp_path).values()]):
            between.requests.clear()
            between.behavior = Behavior(draw=at_random({kind: 0.3}, seed), delay=0.01)
            work()
            met += between.met()[kind]
        assert met >= 10, kind


def test_what_is_cut_is_never_the_whole(filled: Store, between: Proxy, tmp_path: Path) -> None:
    filled = filled.with_timeout(0.02)
    for kind in ("truncated", "reset within"):
        between.behavior = Behavior(draw=at_random({kind: 1.0}, 0))
        operations = reads(filled, tmp_path)
        del operations["nothing"]  # the first line of an answer says that
        for name, work in operations.items():
            with pytest.raises(StoreTroubleError, match=filled.uri):
                work()
            assert not list(tmp_path.glob("cache-*/*/object")), name


HEAD = b'HTTP/1.1 200 OK\r\nETag: "abc"\r\nContent-Type: x\r\nContent-Length: 1000\r\nX-Other: 1\r\n\r\n'


@pytest.mark.parametrize("sent", [HEAD.index(b"Content-Type"), HEAD.index(b"1000") + 2, len(HEAD) - 3, len(HEAD) + 10])
def test_an_answer_is_not_whole_wherever_it_is_cut(s3: str, monkeypatch: pytest.MonkeyPatch, sent: int) -> None:
    """http.client takes a head that ends early for a whole one, then the body has no length to be held to."""

    def serve(listener: socket.socket) -> None:
        for _ in range(2):
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall((HEAD + bytes(1000))[:sent])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        store = open_store(s3).with_timeout(0)
        for read in (store.read, store.open):
            with pytest.raises(StoreTroubleError, match="object: cannot read"):
                read("object")
        thread.join(10)


def test_a_file_is_read_in_one_version(store: Store) -> None:
    store.write("empty", b"")
    with store.open("empty") as stream:
        assert stream.read() == b""
    with pytest.raises(FileNotFoundError, match="run/nothing"):
        store.open("nothing")
    store.write("object", CONTENT)
    with store.open("object") as stream:
        assert stream.size() == len(CONTENT)
        assert stream.read_at(10, len(CONTENT) - 5) == CONTENT[-5:]
        store.write("object", CONTENT[::-1])
        with pytest.raises(ApacsError, match="run/object: changed while it was read"):
            stream.read_at(10, 0)


def test_a_tile_is_read_with_two_requests(filled: Store, between: Proxy) -> None:
    between.requests.clear()
    list(read_rows(filled, [("table.parquet", 1, 0)], ["image", "other"]))
    assert [request.method for request in between.requests] == ["GET", "GET"]


def test_a_retry_ends_after_its_timeout_and_a_refusal_is_final(store: Store, between: Proxy, tmp_path: Path) -> None:
    between.behavior = Behavior(lambda method, listing: "SlowDown", status=503)
    with pytest.raises(StoreTroubleError, match=rf"^{store.uri}/object: cannot read \(.*SlowDown"):
        store.with_timeout(0.05).read("object")
    between.behavior = Behavior(lambda method, listing: "AccessDenied")
    between.requests.clear()
    (tmp_path / "file").write_bytes(b"content")
    operations: dict[str, Callable[[], object]] = {
        "read": lambda: store.read("object"),
        "open": lambda: store.open("object"),
        "list": lambda: list(store.list()),
        "version": lambda: store.version("object"),
        "write": lambda: store.write("object", b""),
        "upload": lambda: store.upload("object", tmp_path / "file"),
        "delete": lambda: store.delete("object"),
    }
    for number, (name, ask) in enumerate(operations.items(), 1):
        with pytest.raises(ApacsError, match=store.uri) as raised:
            ask()
        assert not isinstance(raised.value, StoreTroubleError), name
        assert len(between.requests) == number, name


def refusing_first(code: str, times: int) -> Behavior:
    """A store that refuses the next requests, as it may those that are signed with keys just renewed."""
    left = [code] * times
    status = 400 if "Token" in code else 403
    return Behavior(lambda method, listing: left.pop() if left else None, status=status)


@pytest.mark.parametrize("code", ["AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_a_refusal_by_a_store_that_has_answered_is_tried_again(
    store: Store, between: Proxy, tmp_path: Path, code: str
) -> None:
    fill(store)
    for name, work in (reads(store, tmp_path) | writes(store, tmp_path)).items():
        if name not in ("rows", "staged", "by Ray"):  # pyarrow asks by itself; the others ask as these do
            between.behavior = refusing_first(code, 3)
            work()  # each is a renewal of its own
            assert between.behavior.refuse("GET", False) is None, name


def test_objects_that_may_not_be_read_cost_half_a_minute_together(
    store: Store, between: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "RENEWAL", 0.1)
    store.write("object", CONTENT)
    costs = []
    for _ in range(20):
        between.behavior = Behavior(lambda method, listing: "AccessDenied")
        between.requests.clear()
        with pytest.raises(RefusedError, match="run/denied: cannot read"):
            store.read("denied")
        costs.append(len(between.requests))
        between.behavior = Behavior()
        assert store.read("object") == CONTENT
    assert costs[0] > 2
    assert costs[5:] == [1] * 15  # what the first left of the time is spent
    monkeypatch.setattr(retry, "RENEWAL_EVERY", 0.0)  # as if ten minutes had gone: keys may be renewed again
    between.behavior = refusing_first("AccessDenied", 2)
    assert store.read("object") == CONTENT


@pytest.mark.parametrize(
    ("code", "kind"), [("InvalidObjectState", RefusedError), ("RequestTimeTooSkewed", RefusedError)]
)
def test_a_refusal_that_no_renewal_changes_is_final(store: Store, between: Proxy, code: str, kind: type) -> None:
    store.write("object", CONTENT)
    between.requests.clear()
    between.behavior = Behavior(lambda method, listing: code)
    with pytest.raises(kind, match=code):
        store.read("object")
    assert len(between.requests) == 1


def test_keys_that_are_refused_are_no_fault_of_the_object(store: Store, between: Proxy) -> None:
    """An object that may not be read becomes a reject; with wrong keys all of them would."""
    between.behavior = Behavior(lambda method, listing: "InvalidAccessKeyId")
    with pytest.raises(ApacsError, match="InvalidAccessKeyId") as raised:
        store.read("object")
    assert not isinstance(raised.value, RefusedError)
    assert set(retry.KEY_CODES) == set(CREDENTIALS)  # which the doctor explains


@pytest.mark.parametrize("kind", ["lost", "truncated", "reset within"])
def test_a_conditional_write_whose_answer_is_lost_is_known_again(store: Store, between: Proxy, kind: str) -> None:
    between.behavior = Behavior(draw=in_turn(kind))
    first = store.create("lock", b"one")
    assert first == store.version("lock")
    between.behavior = Behavior(draw=in_turn(kind))
    second = store.replace("lock", b"two", first)
    assert second == store.version("lock")
    for fault in (kind, "reset"):  # another's is not ours, whatever was lost
        between.behavior = Behavior(draw=in_turn(fault))
        with pytest.raises(Conflict):
            store.create("lock", b"three")
        between.behavior = Behavior(draw=in_turn(fault))
        with pytest.raises(Conflict):
            store.replace("lock", b"three", first)
    with pytest.raises(Conflict):
        store.create("lock", b"two")  # what another wrote is not ours because it says the same
    assert store.read("lock") == b"two"


def test_a_lease_outlives_lost_answers_and_reports_a_store_in_trouble(
    store: Store,
    between: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    printed_log: None,
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_EVERY", 0.02)
    monkeypatch.setattr(lease, "BEAT_TIMEOUT", 0.0)
    output = ""

    def await_line(text: str) -> None:
        nonlocal output
        deadline = time.monotonic() + 20
        while text not in output:
            output += capsys.readouterr().out
            assert time.monotonic() < deadline, output
            time.sleep(0.01)

    between.behavior = Behavior(draw=in_turn("lost"))
    held = Lease.acquire(store)
    between.behavior = Behavior(draw=in_turn("lost"))  # a heartbeat that is given up, though it came
    await_line("the store takes writes again")
    held.check()
    with pytest.raises(LeaseHeld):
        Lease.acquire(store)
    output = ""
    between.behavior = refusing_writes()
    await_line("the run waits for its store: ")
    assert f"{store.uri}/{LOCK}: cannot write" in output
    assert output.count("waits") == 1
    between.behavior = Behavior(lambda method, listing: "SlowDown", status=503)
    held.release()  # it ends; the lock of a process that has ended gives way
    between.behavior = Behavior()
    assert store.version(LOCK) is not None


def test_from_and_to_a_failing_store_the_numbers_are_the_same(
    undisturbed: Path, cells: Path, s3: str, between: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 % of all requests meet each kind of fault, 14 % any; for a while in training nothing can be written."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-of-the-test")
    data, output = open_store(f"{s3}/cells"), open_store(f"{s3}/the run")
    for path in sorted(cells.rglob("*.*")):
        data.write(path.relative_to(cells).as_posix(), path.read_bytes())
    failing = Behavior(draw=at_random(dict.fromkeys(KINDS, 0.02), 0), delay=0.1)
    options = ["--data", data.uri, "--output", output.uri, *SMALL]
    between.behavior = failing
    process = start(*options)
    wait_for(
        process, lambda: any(entry.path.endswith("epoch_00000/state.json") for entry in output.list("members/fcn32"))
    )
    between.behavior = refusing_writes()
    told = ""
    while "the run waits for its store" not in told:
        line = process.stdout.readline()
        assert line, f"it ended: {told[-2000:]}"
        told += line
    between.behavior = failing
    text, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, text[-3000:]
    assert "the store takes writes again" in text
    told += text
    assert set(between.met()) >= {*KINDS, "SlowDown"}
    between.behavior = Behavior()
    for path in sorted(undisturbed.glob("tiles/split=*/*.parquet")):
        split = path.relative_to(undisturbed).parent.as_posix()
        (mine,) = [entry.path for entry in output.list(split) if entry.path.endswith(path.name[-13:])]
        with output.open(mine) as stream:
            assert without_source(pq.read_table(stream)) == without_source(pq.read_table(path))
    assert json.loads(output.read("evaluation/metrics.json")) == read_json(undisturbed / "evaluation/metrics.json")
    assert output.read("fusion/model.safetensors") == (undisturbed / "fusion/model.safetensors").read_bytes()
    everything = b"".join(output.read(entry.path) for entry in output.list()) + told.encode()
    assert not [secret for secret in (b"key-", b"secret-", b"token-") if secret + b"of-the-test" in everything]
    for name in MEMBERS:
        history = read_history(output.read(f"members/{name}/history.csv").decode())
        assert [record.epoch for record in history] == [0, 1, 2]
        weights = (undisturbed / f"members/{name}/model.safetensors").read_bytes()
        assert output.read(f"members/{name}/model.safetensors") == weights


def test_slides_from_and_to_a_failing_store_are_segmented_to_the_same_bytes(
    s3: str, between: Proxy, tmp_path: Path
) -> None:
    model = write_ensemble(tmp_path / "model")
    (tmp_path / "slides").mkdir()
    write_slide(tmp_path / "slides/a.mrxs", field(500, 400), margin=1)
    plain = OneSlide(
        tmp_path / "slides/a.mrxs", model, tmp_path / "plain", with_settings(core=128, use="fcn8"), cores_a_shard=32
    ).run()
    for folder in ("model", "slides"):
        there = open_store(f"{s3}/{folder}")
        for path in sorted((tmp_path / folder).rglob("*.*")):
            there.write(path.relative_to(tmp_path / folder).as_posix(), path.read_bytes())
    between.behavior = Behavior(draw=at_random(dict.fromkeys(KINDS, 0.01), 0), delay=0.1)
    places = ["--model", f"{s3}/model", "--slides", f"{s3}/slides", "--output", f"{s3}/out"]
    how = ["--segment.core", "128", "--segment.use", "fcn8", "--segment.tissue", "false"]
    done = run(*places, *how, script="segment.py")
    between.behavior = Behavior()
    assert done.status == 0, done.summary
    output = open_store(f"{s3}/out/a")
    for name in (MASK, GEOJSON, PARQUET, OVERVIEW):
        assert output.read(name) == (plain / name).read_bytes(), name


def without_source(tiles: pa.Table) -> pa.Table:
    """Tiles apart from where they come from, which differs between a folder and a bucket."""
    return tiles.drop_columns(["source_uri", "source_version"]).replace_schema_metadata()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_named_and_nothing_is_lost(small_disk: Path, tmp_path: Path) -> None:
    """Whole stages on a full disk: `benchmarks/store_faults.py`."""
    store = LocalStore(str(small_disk / "run"))
    held = Lease.acquire(store)
    model = nn.Linear(200, 200)  # 160 kB
    history = tuple(EpochRecord(epoch, 0.0, 0.0, 0.0, 0.5, 0.1, 1.0) for epoch in range(2))
    for epoch in range(2):
        state = TrainState(model, torch.optim.SGD(model.parameters()), history[: epoch + 1])
        save_state(tmp_path / f"{epoch}", snapshot(state))
    keep_checkpoint(store, "members", 1, tmp_path / "0")
    ballast, room = small_disk / "ballast", os.statvfs(small_disk)
    ballast.write_bytes(bytes((room.f_bavail - 20) * room.f_bsize))  # 80 kB are left
    full = r"cannot write \(No space left on device\); make room there, and the same command goes on$"
    with pytest.raises(ApacsError, match=rf"^{store.root}/members/.*/model.safetensors: {full}"):
        keep_checkpoint(store, "members", 1, tmp_path / "1")
    assert [checkpoint.epoch for checkpoint in complete_checkpoints(store, "members")] == [0]
    with pytest.raises(ApacsError, match=rf"^{small_disk}/local: cannot write a checkpoint .*No space.* set TMPDIR"):
        save_state(small_disk / "local", snapshot(state))
    with ballast.open("ab") as stream, pytest.raises(OSError, match="No space"):
        stream.write(bytes(200_000))
    with pytest.raises(ApacsError, match=rf"^{store.root}/lock: {full}"):
        store.create("lock", CONTENT)
    with pytest.raises(ApacsError, match=rf"^{store.root}/{LOCK}: {full}"):
        held.note_ray_session("a session")
    held.check()
    ballast.unlink()
    held.note_ray_session("a session")
    keep_checkpoint(store, "members", 1, tmp_path / "1")
    assert complete_checkpoints(store, "members")[-1].epoch == 1
    held.release()
    assert not list(small_disk.rglob("*.tmp"))
