"""Hostile input: secrets stay unseen, nothing is unpickled, no name leads out, no small file becomes a large one."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from PIL import Image
from support.geojson import INFO, collection, polygon
from support.runs import TILE, run
from support.slide_files import picture, write_tiff
from test_report import Page, context

from apacs_ray import storage
from apacs_ray.commands.shell import opened_run
from apacs_ray.config.command_line import default_output, parse
from apacs_ray.config.settings import DataSettings, Settings, TilesSettings
from apacs_ray.config.yaml import read_yaml
from apacs_ray.console import cell, console, print_log, say
from apacs_ray.data.folders import find_pairs
from apacs_ray.data.image_tiles import ShardTask, Source, plan_tiles, probe_pair, write_shard
from apacs_ray.data.images import decode_image
from apacs_ray.data.shard_rows import read_rows
from apacs_ray.data.shards import open_table, read_index, read_receipt
from apacs_ray.data.slide_tables import read_mpps, read_splits
from apacs_ray.data.tile_rows import tile_id
from apacs_ray.distributed.session import RaySession, prepare_ray
from apacs_ray.errors import ApacsError, BadInput, UsageError
from apacs_ray.models import pretrained
from apacs_ray.models.spec import ModelSpec
from apacs_ray.models.weights import load_model
from apacs_ray.redact import redact
from apacs_ray.report.page import build_report
from apacs_ray.runs.lease import LOCK, Lease
from apacs_ray.runs.markers import MARKER, Marker
from apacs_ray.runs.run import RUN_JSON, Run
from apacs_ray.slides.annotations import rasterize as polygons
from apacs_ray.slides.annotations import shapes, unpack
from apacs_ray.slides.annotations.rasterize import fill
from apacs_ray.slides.annotations.read import read_annotations
from apacs_ray.slides.cache import SlideCache
from apacs_ray.slides.find import find_slides
from apacs_ray.slides.manifest import read_manifest
from apacs_ray.slides.mask_sources import ImageMask
from apacs_ray.slides.open import open_slide
from apacs_ray.slides.tiff_tiles import TiffTiles
from apacs_ray.stages.evaluate import read_rejects
from apacs_ray.stages.stage import Job, Stage, StageResult, run_stage
from apacs_ray.storage import Entry, LocalStore, S3Store, open_store, retry
from apacs_ray.storage.own_folder import own_folder
from apacs_ray.testing.runs import ROOT, read_json
from apacs_ray.testing.s3_proxy import proxy
from apacs_ray.training.checkpoints import FILES, complete_checkpoints, fetch, keep_checkpoint
from apacs_ray.training.dataset import decode_pixels
from apacs_ray.training.history import EpochRecord

KEY_ID, SECRET, TOKEN = "PLANTEDKEYID0001", "planted/secret+of=the-test", "planted-session-token"
NAMES = [
    "new\nline",
    "\x1b[31mred\x1b]0;title\x07",
    "<img src=x onerror=alert(1)>",
    "[bold]a[/bold]",
    "{{7*7}}",
    "%s$x$",
]


def clear_of_secrets(text: str | bytes) -> bool:
    content = text.encode() if isinstance(text, str) else text
    forms = [form for secret in (KEY_ID, SECRET, TOKEN) for form in (secret, secret.encode().hex(), repr(secret)[1:-1])]
    return not any(form.encode() in content for form in forms)


# --- secrets

URIS = [
    f"s3://{KEY_ID}:{SECRET}@bucket/cells",
    f"s3://{KEY_ID}:{SECRET}@bucket",
    f"https://user:{SECRET}@host/cells",
    f"https://bucket.s3.amazonaws.com/cells?X-Amz-Credential={KEY_ID}&X-Amz-Signature={TOKEN}",
    f"s3://bucket/cells.csv?AWSAccessKeyId={KEY_ID}&Signature={TOKEN}",
]


@pytest.mark.parametrize("uri", URIS)
@pytest.mark.parametrize(
    "option", ["--data", "--output", "--data.masks", "--members.checkpoint", "--fusion.checkpoint"]
)
def test_uris_with_credentials_are_refused_and_not_repeated(uri: str, option: str) -> None:
    with pytest.raises(UsageError, match=rf"{option.strip('-')}: the URI .*not shown") as refused:
        parse([option, uri], "full.py", "")
    assert clear_of_secrets(str(refused.value))
    with pytest.raises(UsageError) as refused:
        open_store(uri)
    assert clear_of_secrets(str(refused.value))


def test_a_command_with_credentials_in_it_starts_nothing(tmp_path: Path) -> None:
    done = run("--data", URIS[1], "--output", str(tmp_path / "run"), script="ingest.py")
    assert done.status == 2
    assert clear_of_secrets(done.text)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def planted(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket, and secrets in the environment."""
    for name, value in (("ACCESS_KEY_ID", KEY_ID), ("SECRET_ACCESS_KEY", SECRET), ("SESSION_TOKEN", TOKEN)):
        monkeypatch.setenv(f"AWS_{name}", value)
    return s3


def messages(store: storage.Store) -> Iterator[str]:
    """What goes wrong with every way to use a store, as it is printed."""
    store = store.with_timeout(0)
    uses: list[Callable[[], object]] = [
        lambda: list(store.list()),
        lambda: store.read("x"),
        lambda: store.version("x"),
        lambda: store.write("x", b""),
        lambda: store.create("x", b""),
        lambda: store.delete("x"),
        lambda: Lease.acquire(store),
    ]
    for use in uses:
        try:
            use()
        except ApacsError as error:
            yield str(error)
        except OSError as error:  # of pyarrow, which reads: these pass `redact` where they are printed
            yield redact(str(error))


def test_no_failure_of_a_store_tells_a_secret(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    printed = list(messages(open_store("s3://no-such-bucket-here/run")))
    with proxy(endpoint) as between:  # a store that repeats what it was sent, as some do to be helpful
        between.behavior.refuse = lambda *_: f"Denied {KEY_ID} with {SECRET} and {TOKEN}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
        printed += messages(open_store(f"{planted}/run"))
        closed = between.url
    monkeypatch.setenv("AWS_ENDPOINT_URL", closed.replace("://", f"://user:{TOKEN}@"))
    store = open_store(f"{planted}/run")
    assert isinstance(store, S3Store)
    printed += [*messages(store), repr(store), f"{store.access}"]
    assert len(printed) > 18
    assert clear_of_secrets("\n".join(printed))


def test_what_a_stage_dies_of_is_kept_and_told_without_secrets(planted: str, tmp_path: Path) -> None:
    class Dies(Stage[StageResult]):
        name, script, folder, result_type = "ingest", "ingest.py", "tiles", StageResult

        def fingerprint(self, settings: Settings) -> str:
            return "0" * 16

        def work(self, job: Job, fingerprint: str) -> StageResult:
            raise RuntimeError(f"a worker died, its environment: {dict(os.environ)}")

    opened = Run.open(open_store(str(tmp_path)), Settings(), None)
    with pytest.raises(RuntimeError):
        run_stage(opened, RaySession(opened), Dies())
    opened.close()
    assert "a worker died" in read_json(tmp_path / RUN_JSON)["stages"]["ingest"]["error"]
    assert clear_of_secrets((tmp_path / RUN_JSON).read_bytes())
    code = f"""
        from apacs_ray.commands.shell import run_command
        def dies():
            raise RuntimeError("at https://me:{SECRET}@host?X-Amz-Signature={TOKEN} {KEY_ID} {SECRET} \\x1b[31m")
        run_command(dies)
    """
    command = [sys.executable, "-c", "if True:" + code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "RuntimeError: at https://***@host" in done.stderr
    assert "\x1b" not in done.stderr
    assert clear_of_secrets(done.stdout + done.stderr)


SWEEP = """
    import os, sys
    from apacs_ray.distributed.session import RaySession, joined_cluster, prepare_ray
    prepare_ray()
    from apacs_ray.distributed.trial import TrialTask
    from apacs_ray.distributed.tune import sweep
    from apacs_ray.runs.run import Run
    from apacs_ray.config.settings import Settings
    from apacs_ray.config.training_settings import FusionSettings
    from apacs_ray.storage import open_store
    from apacs_ray.config.sweep import Sweep
    from unittest import mock
    store = open_store(sys.argv[1])
    ray = RaySession(mock.Mock(store=store, data=None))
    ray.start()
    task = TrialTask(store, {}, FusionSettings(), 0.02, "f", 1, 0, "another source", "tune/.state-1", 0, 600.0)
    plan = Sweep.model_validate({"trials": 1, "epochs": 1, "space": {"dropout": {"uniform": [0.1, 0.2]}}})
    (trial,) = sweep(task, plan, joined_cluster(), print)
    assert "another source of apacs_ray" in trial.error, trial.error
    ray.stop()
"""


def test_no_secret_reaches_the_state_the_runtime_environment_or_the_logs_of_a_sweep(
    planted: str, tmp_path: Path
) -> None:
    folder = Path(f"/tmp/s{os.getpid()}")  # short: paths of sockets are limited
    token = "planted-token-of-ray-0123456789"
    clear = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = clear | {"RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    try:
        command = [sys.executable, "-c", "if True:" + SWEEP, f"{planted}/run"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        state = open_store(f"{planted}/run")
        objects = {entry.path: state.read(entry.path) for entry in state.list()}
        assert any(path.endswith("tuner.pkl") for path in objects)
        logs = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
        assert any(path.endswith("runtime_env_agent.log") for path in logs)
        for path, content in {**objects, **logs, "stdout and stderr": (done.stdout + done.stderr).encode()}.items():
            assert clear_of_secrets(content), path
            assert token.encode() not in content, path
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def test_a_local_ray_has_a_token_of_its_own_unless_one_is_given() -> None:
    clear = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    tokens = set()
    for _ in range(2):
        with mock.patch.dict(os.environ, clear, clear=True):
            prepare_ray()
            assert os.environ["RAY_AUTH_MODE"] == "token"
            tokens.add(os.environ["RAY_AUTH_TOKEN"])
    assert len(tokens) == 2
    with mock.patch.dict(os.environ, clear | {"RAY_AUTH_TOKEN_PATH": "/mine"}, clear=True):
        prepare_ray()
        assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.usefixtures("planted", "printed_log")
def test_what_is_logged_is_printed_once_and_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("apacs_ray.storage.retry")
    print_log()  # again
    logger.warning("\x1b[31mno answer (%s) at %s", f"{KEY_ID} {SECRET}", f"https://me:{TOKEN}@host/x?sig={TOKEN}")
    try:
        raise OSError(f"refused: {SECRET}")
    except OSError:
        logger.exception("it broke")
    logger.debug("not for people")
    first, second = capsys.readouterr().out.splitlines()
    assert re.match(r"\d\d:\d\d:\d\d ", first)
    assert first[9:] == "?[31mno answer (*** ***) at https://***@host/x?sig=***"
    assert "it broke" in second
    assert "OSError: refused: ***" in second
    assert clear_of_secrets(first + second)


@pytest.mark.usefixtures("own_log")
def test_a_command_prints_what_its_store_logs(
    planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clear = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    monkeypatch.setattr(retry, "LOGGED_AFTER", 0.0)
    monkeypatch.setattr(retry, "PAUSE", 0.001)
    refusals = iter([f"SlowDown, {SECRET}"] * 3)
    with proxy(os.environ["AWS_ENDPOINT_URL"]) as between, mock.patch.dict(os.environ, clear, clear=True):
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
        between.behavior.refuse, between.behavior.status = lambda *_: next(refusals, None), 503
        with opened_run(parse(["--output", f"{planted}/run"], "full.py", "")) as (run, _):
            run.store.write("x", b"")
    first, *lines = capsys.readouterr().out.splitlines()
    assert f"run: {planted}/run" in first
    assert re.search(rf"waiting for the store, \d+ s at most: {planted}/run/run.lock: cannot write", lines[0])
    assert "the store answers again" in lines[1]
    assert clear_of_secrets("\n".join(lines))


# --- nothing is unpickled


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (self._path,)


@pytest.fixture
def gone_off(tmp_path: Path) -> Path:
    path = tmp_path / "gone off"
    pickle.loads(pickle.dumps(Bomb(path)))
    assert path.exists()  # it works
    path.unlink()
    return path


def tainted(bomb: Bomb, columns: dict[str, Any], name: str) -> bytes:
    """A Parquet file whose column `name` Ray Data would unpickle."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    table = pa.table({**columns, name: ArrowPythonObjectArray.from_objects([bomb])})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_that_ray_would_unpickle_is_refused(tmp_path: Path, gone_off: Path, nested: bool) -> None:
    store = LocalStore(str(tmp_path / "run"))
    place = {"tile_id": ["a"], "slide_id": ["a"], "width": [1], "height": [1], "mask_fraction": [0.5]}
    shard = "tiles/split=train/0123abcd-00000.parquet"
    content = tainted(Bomb(gone_off), place, "image")
    if nested:
        table = pq.read_table(io.BytesIO(content))
        inner = pa.StructArray.from_arrays([table["image"].combine_chunks()], ["inner"])
        sink = io.BytesIO()
        pq.write_table(table.drop_columns(["image"]).append_column("image", inner), sink)
        content = sink.getvalue()
    for path in (shard, "manifest/0/000000.parquet", "rejects/ingest-0123abcd.parquet"):
        store.write(path, content)
    assert pq.read_table(io.BytesIO(content)).num_rows == 1
    readers: list[Callable[[], object]] = [
        lambda: read_index(store, "train"),
        lambda: list(read_rows(store, [(shard, 0, 0)], ["image"])),
        lambda: read_manifest(store, "manifest/0/000000.parquet"),
        lambda: read_rejects(store),
        lambda: open_table(store.open(shard), shard),
    ]
    for read in readers:
        with pytest.raises(ApacsError, match="which no run writes"):
            read()
    assert not gone_off.exists()
    if not nested:
        pq.read_table(io.BytesIO(content)).to_pylist()
        assert gone_off.exists()  # so much for reading it without a look


def test_no_other_file_is_unpickled_either(tmp_path: Path, gone_off: Path) -> None:
    store = LocalStore(str(tmp_path / "run"))
    raw, saved = pickle.dumps(Bomb(gone_off)), io.BytesIO()
    torch.save({"weight": Bomb(gone_off)}, saved)
    array = io.BytesIO()
    np.save(array, np.array([Bomb(gone_off)], object), allow_pickle=True)
    for content in (raw, saved.getvalue(), array.getvalue()):
        for path in (RUN_JSON, LOCK, f"tiles/{MARKER}", "s/attempt-1/epoch_00000/state.json"):
            store.write(path, content)
        for name in FILES:
            store.write(f"s/attempt-1/epoch_00000/{name}", content)
        assert complete_checkpoints(store, "s") == []
        readers: list[Callable[[], object]] = [
            lambda c=content: pretrained.read_checkpoint(c, "fcn8.pth"),
            lambda c=content: load_model(c, ModelSpec("member", "fcn8", width=0.02)),
            lambda c=content: ModelSpec.from_json(c),
            lambda c=content: decode_image(c, 1000),
            lambda c=content: decode_pixels(c),
            lambda c=content: read_annotations(c, "a.geojson"),
            lambda c=content: Marker.decode(c),
            lambda: Lease.acquire(store),
        ]
        for read in readers:
            with pytest.raises((ApacsError, BadInput, OSError, ValueError)):
                read()
        (tmp_path / "a.yaml").write_bytes(content)
        with pytest.raises(UsageError):
            read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text(f"a: !!python/object/apply:os.mknod ['{gone_off}']\n")
    with pytest.raises(UsageError, match="could not determine a constructor"):
        read_yaml(tmp_path / "a.yaml")
    assert not gone_off.exists()


def test_stored_pictures_are_of_the_formats_that_are_written() -> None:
    for image_format in ("BMP", "GIF", "EPS", "TIFF"):  # Pillow reads EPS by starting Ghostscript
        sink = io.BytesIO()
        Image.new("RGB", (8, 8)).save(sink, image_format)
        with pytest.raises(OSError, match="cannot identify"):
            decode_pixels(sink.getvalue())


# --- no name leads out


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder beside the run with a file that must stay as it is."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "kept").write_text("mine")
    return folder


@pytest.mark.parametrize(
    "path", ["../outside/kept", "a/../../outside/kept", "ABSOLUTE", "link/kept", "a/link/kept", "a//b"]
)
def test_nothing_is_written_or_deleted_outside_a_store(tmp_path: Path, outside: Path, path: str) -> None:
    root = tmp_path / "run"
    (root / "a").mkdir(parents=True)
    for link in (root / "link", root / "a/link"):
        link.symlink_to(outside, target_is_directory=True)
    store = LocalStore(str(root))
    path = str(outside / "kept") if path == "ABSOLUTE" else path
    source = tmp_path / "source"
    source.write_text("theirs")
    uses: list[Callable[[], object]] = [
        lambda: store.write(path, b"theirs"),
        lambda: store.upload(path, source),
        lambda: store.create(f"{path}2", b"theirs"),
        lambda: store.replace(path, b"theirs", str(store.version(path))),
        lambda: store.delete(path),
        lambda: store.delete_folder(path),
    ]
    for use in uses:
        with pytest.raises(ApacsError, match="leads out of"):
            use()
    assert {file.name: file.read_text() for file in outside.iterdir()} == {"kept": "mine"}


def test_links_in_a_run_are_removed_and_what_they_lead_to_stays(tmp_path: Path, outside: Path) -> None:
    root = tmp_path / "run"
    (root / "folder").mkdir(parents=True)
    (root / "folder/inner").symlink_to(outside, target_is_directory=True)
    (root / "file").symlink_to(outside / "kept")
    (root / "top").symlink_to(outside, target_is_directory=True)
    (root / ".run.lock.guard").symlink_to(outside / "kept")
    store = LocalStore(str(root))
    store.delete_folder("folder")
    store.delete_folder("top")
    store.write("file", b"theirs")
    version = store.create("run.lock", b"lock")
    with pytest.raises(ApacsError, match="a link"):
        store.replace("run.lock", b"other", version)
    assert not (root / "folder").exists()
    assert (outside / "kept").read_text() == "mine"


def test_a_listing_ends_and_holds_files_only(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
        for number in range(8):  # each would be followed from within the others, without end
            (tmp_path / name / f"up{number}").symlink_to(tmp_path, target_is_directory=True)
            (tmp_path / name / f"across{number}").symlink_to(tmp_path / ("b" if name == "a" else "a"))
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "nowhere").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    assert len(list(LocalStore(str(tmp_path)).list())) == 2 + 2 * 8


def test_a_checkpoint_is_its_own_files_only(tmp_path: Path, outside: Path) -> None:
    store = LocalStore(str(tmp_path / "run"))
    for name in ("../../../../outside/new", str(outside / "new")):
        evil = {"size": 6, "sha256": ""}
        epoch = vars(EpochRecord(0, 1.0, 0.5, 1.0, 0.5, 0.1, 1.0))
        state = {"epoch": 0, "part": None, "history": [epoch], "optimizer": {}, "files": {name: evil}}
        path = "s/attempt-1/epoch_00000"
        store.write(f"{path}/state.json", json.dumps(state).encode())
        assert complete_checkpoints(store, "s") == []
        state["files"] |= dict.fromkeys(FILES, evil)
        for file in FILES:
            store.write(f"{path}/{file}", b"theirs")
        store.write(f"{path}/state.json", json.dumps(state).encode())
        assert complete_checkpoints(store, "s") == []
    state["files"] = dict.fromkeys(FILES, evil)
    store.write(f"{path}/state.json", json.dumps(state).encode())
    (checkpoint,) = complete_checkpoints(store, "s")
    (tmp_path / "here").mkdir()
    checkpoint.state["files"][name] = evil
    fetch(store, checkpoint, tmp_path / "here")
    (tmp_path / "here/state.json").write_text(json.dumps(checkpoint.state))
    keep_checkpoint(store, "s", 2, tmp_path / "here")
    assert {file.name for file in (tmp_path / "here").iterdir()} == {*FILES, "state.json"}
    assert [file.name for file in outside.iterdir()] == ["kept"]
    for content in (b"[" * 10**6, b"[]", b"3", b'{"files": {"model.safetensors": 3, "optimizer.safetensors": 3}}'):
        store.write("s/attempt-x/epoch_00000/state.json", content)
        store.write(f"{path}/state.json", content)
        assert not [checkpoint for checkpoint in complete_checkpoints(store, "s") if "attempt-2" not in checkpoint.path]


def test_the_cache_makes_room_among_its_own_only(tmp_path: Path, outside: Path) -> None:
    folder = tmp_path / "cache"
    mine = [folder / "my slides", folder / "0123456789abcdef", folder / ("0" * 24 + "-mine")]
    staged = folder / ("a" * 24)
    for place in (*mine, staged):
        place.mkdir(parents=True)
        (place / "x").write_bytes(b"x" * 100)
    (folder / ("b" * 24)).symlink_to(outside, target_is_directory=True)
    (folder / ("c" * 24)).mkdir()
    (folder / ("c" * 24 + ".part-1")).symlink_to(outside, target_is_directory=True)
    (folder / ("d" * 24)).mkdir()
    (folder / ("d" * 24) / "deep").symlink_to(outside, target_is_directory=True)
    SlideCache(folder, 0)._make_room(1, "none")
    assert not staged.exists()
    assert all((place / "x").exists() for place in mine)
    assert (outside / "kept").read_text() == "mine"


def test_links_in_the_cache_are_not_followed(tmp_path: Path, outside: Path, s3: str) -> None:
    store = open_store(f"{s3}/slides")
    store.write("a.svs", b"x")
    entries = list(store.list())
    folder = tmp_path / "cache"
    with SlideCache(folder, 1 << 20).staged(store, entries) as place:
        pass
    lock = folder / f"{place.name}.lock"
    lock.unlink()
    lock.symlink_to(outside / "new")
    with pytest.raises(ApacsError, match="a link"), SlideCache(folder, 1 << 20).staged(store, entries):
        pass
    lock.unlink()
    place.rename(folder / "elsewhere")
    place.symlink_to(outside, target_is_directory=True)
    with pytest.raises(ApacsError, match="a link"), SlideCache(folder, 1 << 20).staged(store, entries):
        pass
    assert [file.name for file in outside.iterdir()] == ["kept"]


def test_folders_with_names_that_others_can_guess_must_be_our_own(tmp_path: Path, outside: Path) -> None:
    made = own_folder(tmp_path / "made")
    assert made.stat().st_mode & 0o777 == 0o700
    own_folder(made)
    made.chmod(0o777)
    (tmp_path / "link").symlink_to(outside, target_is_directory=True)
    for place in (made, tmp_path / "link"):
        with pytest.raises(ApacsError, match="others may write there"):
            own_folder(place)


def test_names_that_are_no_paths_are_rejected_and_the_rest_goes_on() -> None:
    bad = ["Train_Input/../../x.png", "Train_Input//x.png", "Train_Input/x\0.png", "Train_Input/x\udcff.png"]
    good = [f"{part}/{name.replace('/', '')}.png" for part in ("Train_Input", "Train_GroundTruth") for name in NAMES]
    data = find_pairs([Entry(path, 1, "v") for path in [*bad, *good]], root="/data")
    assert [reject.code for reject in data.rejects] == ["bad_name"] * 3
    assert [entry.path for entry in data.ignored] == bad[:1]
    assert len(data.pairs) == len(NAMES)
    pa.table({"uri": [reject.uri for reject in data.rejects]})  # can be stored
    slides = ["train/../x.svs", "train//y.svs", "train/z\0.svs", "train/\udcff.svs", "/etc/a.svs", "train/ok.svs"]
    companions = ["test/m.mrxs", "test/m/../../../etc/passwd", "train/ok.geojson"]
    listed = find_slides([Entry(path, 1, "v") for path in [*slides, *companions]], root="/data")
    assert [slide.path for slide in listed.slides] == ["train/ok.svs"]
    assert {reject.code for reject in listed.rejects} == {"bad_name"}
    for name in [*bad, *good, "..", "/etc/passwd"]:
        assert not set("/\0\n\x1b<>") & set(tile_id(name, 0, 0))
    assert {default_output(data) for data in ("s3://bucket/..", "s3://bucket/.", "/")} == {"runs/data"}
    assert default_output("..") == f"runs/{Path.cwd().parent.name}"


def test_hostile_names_go_through_ingest(tmp_path: Path) -> None:
    """Names as long as they may be, with newlines, escapes and markup: as data, in reports and on the terminal."""
    names = [*NAMES, "ä" * 125]
    cells = np.zeros((TILE, TILE), bool)
    cells[4:20, 4:20] = True
    for part in ("Train", "Test"):
        for kind, pixels in (("Input", picture(TILE, TILE)), ("GroundTruth", cells)):
            folder = tmp_path / "data" / f"{part}_{kind}"
            folder.mkdir(parents=True)
            for name in names:
                Image.fromarray(pixels).save(folder / f"{name.replace('/', '')}.png")
    os.link(folder / f"{names[0]}.png", os.fsencode(folder) + b"/\xff.png")
    data, output = LocalStore(str(tmp_path / "data")), LocalStore(str(tmp_path / "run"))
    folder_data = find_pairs(data.list(), root=data.uri)
    assert [reject.code for reject in folder_data.rejects] == ["bad_name"]
    sources = [probe_pair(data, pair, 10**6) for pair in folder_data.pairs]
    settings = TilesSettings(size=TILE)
    manifest = plan_tiles(
        [source for source in sources if isinstance(source, Source)], settings, DataSettings(), seed=0
    )
    task = ShardTask(data, output, settings, DataSettings(), "0123abcd")
    receipts = [write_shard(task, shard) for shard in manifest.shards]
    assert sum(receipt.rows_out for receipt in receipts) == 2 * len(names)
    index = read_index(output, "test")
    assert sorted(index.slide_ids) == sorted(f"test/{name.replace('/', '')}" for name in names)
    assert read_receipt(output, receipts[0].path) is not None


def test_names_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        say(f"ingest: {name}")
        console.print(cell(name))
    text = capsys.readouterr().out
    assert text.count("\n") == 2 * len(NAMES)
    assert not set("\x1b\x07\r") & set(text)
    assert text.count("[bold]a[/bold]") == 2


# --- nothing small becomes large


def test_annotations_that_would_explode() -> None:
    points = (np.random.default_rng(0).random((3000, 2)) * 1000).tolist()
    on_a_line = [[x, 0.0] for x, _ in points]
    square = [[0, 0], [9, 0], [9, 9], [0, 0]]
    annotations = read_annotations(
        collection(*(polygon([*ring, ring[0]]) for ring in (square, points, on_a_line))), "a"
    )
    assert [defect.reason for defect in annotations.defects] == ["it crosses itself more than 1000 times"] * 2
    assert len(annotations.areas) == 1
    many = [polygon(square), *[{"type": "Point", "coordinates": [0, 0]}] * 3000]
    defects = read_annotations(json.dumps(many).encode(), "a").defects
    assert (len(defects), defects[-1].reason) == (1001, "and 2000 more after this one have no area either")
    parts = shapes.MAX_PARTS // 2 + 1
    for content in (b"[" + b"[]," * parts + b"0]", b"[" * 10**6, b'{"a":' * 10**5):
        with pytest.raises(BadInput, match="bad_annotation"):
            read_annotations(content, "a.geojson")
    for xml in (b"<a>" + b"<a x='1'/>" * parts + b"</a>", b'<?xml version="1.0" encoding="none"?><a/>', b"<a>" * 10**5):
        with pytest.raises(BadInput, match="bad_annotation"):
            read_annotations(xml, "a.xml")
    external = b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>'
    with pytest.raises(BadInput, match="bad_annotation"):
        read_annotations(external, "a.xml")


def zipped(**members: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return sink.getvalue()


def test_packed_annotations_that_would_explode(monkeypatch: pytest.MonkeyPatch) -> None:
    blank = b" " * (1 << 22)
    monkeypatch.setattr(unpack, "LARGEST_FILE", 1 << 21)
    for content in (gzip.compress(blank), gzip.compress(gzip.compress(blank)), zipped(**{"a.json": blank}), blank):
        with pytest.raises(BadInput, match="limit"):
            read_annotations(content, "a.json.gz")
    monkeypatch.setattr(unpack, "MAX_MEMBERS", 10)
    with pytest.raises(BadInput, match="more than 10 files"):
        read_annotations(zipped(**{f"{n}.txt": b"" for n in range(11)}), "a.zip")


def test_masks_as_run_lengths_that_would_explode(monkeypatch: pytest.MonkeyPatch) -> None:
    def coco(counts: Any, size: Any = (1 << 20, 1 << 20)) -> bytes:
        annotation = {"image_id": 1, "segmentation": {"counts": counts, "size": size}}
        return json.dumps({"images": [{"id": 1}], "annotations": [annotation]}).encode()

    assert (
        read_annotations(coco([0, 1 << 40]), "a.json").areas[0].area == 1 << 40
    )  # as large as it may be, and nothing is filled
    for counts in ([0, (1 << 40) + 1], [1, -1], [0, 10**400], "o" * 100, "\x7f", [0, 1.5], "P", {}):
        with pytest.raises(BadInput, match="run lengths"):
            read_annotations(coco(counts), "a.json")
    for size in ((0, 5), (1 << 40, 1), (3,), ("5", "5"), None):
        with pytest.raises(BadInput, match="run lengths"):
            read_annotations(coco([0, 1], size), "a.json")
    monkeypatch.setattr("apacs_ray.slides.annotations.coco.MAX_RUNS", 100)
    with pytest.raises(BadInput, match="more than 100 runs"):
        read_annotations(coco([1] * 201), "a.json")


def test_a_comb_of_an_annotation_is_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    teeth = [[x / 3, y] for x in range(300) for y in ((-1.0, 90.5) if x % 2 else (90.5, -1.0))]
    ring = np.array([*teeth, [100.0, -9.0], [-1.0, -9.0], teeth[0]])
    whole, in_parts = np.zeros((2, 64, 64), bool)
    fill(whole, [ring], 5.2, 3.1, 1.0)
    monkeypatch.setattr(polygons, "CROSSINGS_AT_ONCE", 100)
    fill(in_parts, [ring], 5.2, 3.1, 1.0)
    assert 0 < whole.sum() < whole.size
    assert np.array_equal(whole, in_parts)


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_pictures_that_would_explode(tmp_path: Path) -> None:
    header = (b"IHDR", struct.pack(">IIBBBBB", 100, 100, 1, 0, 0, 0, 0))
    zeros = zlib.compress(b"\0" * (1 << 27), 9)
    for chunk in ((b"zTXt", b"a\0\0" + zeros), (b"iTXt", b"a\0\1\0\0\0" + zeros)):
        with pytest.raises(BadInput, match="unreadable"):
            decode_image(png(header, chunk, (b"IEND", b"")), 10**6)
    Image.new("1", (300, 200)).save(tmp_path / "mask.png")
    with pytest.raises(BadInput, match="too_large"):
        ImageMask(tmp_path / "mask.png", INFO, None, 10_000)
    large = Entry("Train_Input/a.png", 9 << 30, "v")
    pair = find_pairs([large, Entry("Train_GroundTruth/a.png", 1, "v")]).pairs[0]
    refused = probe_pair(LocalStore(str(tmp_path)), pair, 400_000_000)
    assert not isinstance(refused, Source)
    assert refused.code == "too_large"


@pytest.mark.parametrize(
    ("tag", "value", "words"),
    [
        ("TileWidth", 1 << 20, "too_large: tiles of"),
        ("ImageWidth", 3_000_000, "too_large|unreadable"),
        ("ImageLength", 2**32 - 1, "too_large|unreadable"),
        ("ImageWidth", 0, "unsupported_slide|unreadable"),
    ],
)
def test_slides_that_claim_to_be_enormous(tmp_path: Path, tag: str, value: int, words: str) -> None:
    path = write_tiff(tmp_path / "s.tif", picture(256, 256), compression="deflate")
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags[tag].overwrite(value, dtype="I", erase=False)
    with pytest.raises(BadInput, match=words):
        open_slide(path)


def test_a_tile_larger_than_its_place_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (2048, 2048)).save(sink, "JPEG")
    path = tmp_path / "s"
    path.write_bytes(sink.getvalue())
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *_, **__: pytest.fail("it was decoded"))
    with path.open("rb") as file:
        for size, words in ((len(sink.getvalue()), "it measures 2048 x 2048"), (1 << 45, "the file ends")):
            tiles = TiffTiles(
                page=0, subifd=None, width=256, height=256, tile_width=256, tile_height=256, samples=3, planar=False,
                strips=False, compression="JPEG", photometric="YCBCR", predictor=1, tables=b"", alpha="", palette=None,
                offsets=np.array([0]), sizes=np.array([size]),
            )  # fmt: skip
            with pytest.raises(ValueError, match=words):
                tiles.read(file.fileno(), 0, 0)


def test_tables_and_settings_that_would_explode(tmp_path: Path) -> None:
    field = "x" * 200_000
    for read, text in ((read_splits, f"slide_id,split\n{field},train\n"), (read_mpps, f"slide_id,mpp\n{field},1\n")):
        with pytest.raises(UsageError, match="line"):
            read(text)
    with pytest.raises(UsageError, match="must be positive"):
        read_mpps("slide_id,mpp\na,inf\n")
    laughs = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)), "tiles: {size: *a39}"]
    for text, words in (
        ("\n".join(laughs), "an alias"),
        ("[" * 2_000, "not valid YAML"),
        (" " * (1 << 21), "at most"),
    ):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(UsageError, match=words):
            parse(["--config", str(tmp_path / "a.yaml")], "full.py", "")


def test_models_that_would_explode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = ModelSpec("member", "fcn8", width=0.02)
    tensor = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    for content in (struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", len(tensor)) + tensor, b"", b"\xff" * 100):
        with pytest.raises(ApacsError, match="no safetensors file"):
            load_model(content, spec)
    for text in (b"[" * 10**5, b'{"kind": "member", "name": "fcn8", "width": 1e308}', b"[]", b'{"width": NaN}'):
        with pytest.raises(ApacsError, match="not a model description"):
            ModelSpec.from_json(text)
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr("archive/data/0", b"\0" * (1 << 22))
    monkeypatch.setattr(pretrained, "LARGEST", 1 << 21)
    with pytest.raises(ApacsError, match="at most"):
        pretrained.read_checkpoint(sink.getvalue(), "fcn8.pth")
    store = LocalStore(str(tmp_path))
    store.write("a.csv", b"x" * 11)
    with pytest.raises(ApacsError, match="11 bytes"):
        store.read_small("a.csv", 10)


# --- the report


PAGE_NAMES = [
    "javascript:alert(1)",
    "</style><script>alert(1)</script>",
    "' onmouseover='alert(1)",
    '" style="background:url(//evil)',
    "-->]]></svg><script>",
    "{{7*7}}{% raw %}",
    "a\u202egnp.exe",
]


def test_no_name_becomes_part_of_the_page() -> None:
    """As a title, a slide, a reject, and what a trial drew, which the charts show too."""
    made = context()
    row = next(iter(made.metrics["fusion"]["per_slide"].values()))
    rows = "".join(f'{n},0.5,2,1.0,,"{name.replace(chr(34), chr(34) * 2)}"\n' for n, name in enumerate(PAGE_NAMES))
    metrics = {**made.metrics, "fusion": {**made.metrics["fusion"], "per_slide": dict.fromkeys(PAGE_NAMES, row)}}
    rejects = [{"uri": n, "slide_id": n, "x": None, "y": None, "code": n, "reason": n} for n in PAGE_NAMES]
    trials = f"trial_id,val_dice,epochs,seconds,error,kind\n{rows}"
    title = " ".join(PAGE_NAMES)
    page = Page(build_report(context(title=title, output=title, trials=trials, metrics=metrics, rejects=rejects)))
    assert page.count("script") == page.count("iframe") == 0
    assert page.count("style") == 1
    for tag, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on")], tag
        for key in ("src", "href", "xlink:href", "action"):
            value = attributes.get(key) or "#"
            assert value.startswith(("data:image/jpeg;base64,", "#")), value
        assert "evil" not in (attributes.get("style") or "")
    for name in PAGE_NAMES:
        assert page.text.count(name) >= 7, name  # title twice, heading, output, slide, reject thrice; the chart's too
