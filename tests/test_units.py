"""Whatever one input raises is its reject; what is no input's fault passes."""

from __future__ import annotations

import errno
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.slide_files import picture, write_tiff

from apacs_ray.config.settings import DataSettings, TilesSettings
from apacs_ray.data import image_tiles as ingest
from apacs_ray.data.folders import find_pairs
from apacs_ray.data.image_tiles import ShardTask, Source, plan_tiles, probe_pair, write_shard
from apacs_ray.data.rejects import Reject
from apacs_ray.data.shards import Receipt, shard_path
from apacs_ray.data.units import one_unit
from apacs_ray.errors import ApacsError, BadInput, RefusedError, StoreTroubleError
from apacs_ray.slides import manifest as plan
from apacs_ray.slides.cache import SlideCache
from apacs_ray.slides.find import find_slides
from apacs_ray.slides.manifest import SlideSummary, SlideTask, inspect_slide
from apacs_ray.slides.open import open_slide
from apacs_ray.slides.slide_tiles import SlideShard, write_slide_shard
from apacs_ray.storage import open_store

MARK = "0" * 16


class OddError(Exception):
    """Of a kind that nobody foresaw."""


ANYTHING = st.sampled_from(
    [
        BadInput("unreadable_region", "damaged"),
        OddError("odd"),
        KeyError("x"),
        MemoryError(),
        RecursionError("deep"),
        AssertionError(),
        ZeroDivisionError("0"),
        StopIteration(),
        zlib.error("bad"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        OSError(errno.EIO, "Input/output error"),
        PermissionError(errno.EACCES, "Permission denied"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        IsADirectoryError(errno.EISDIR, "Is a directory"),
    ]
)
NOT_OURS = [
    StoreTroubleError("s3://b/k: cannot read"),
    ApacsError("disk full"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EMFILE, "Too many open files"),
    KeyboardInterrupt(),
]


class Failing:
    """A slide whose reads from number `after` on raise."""

    def __init__(self, slide: Any, error: BaseException, after: int) -> None:
        self._slide, self._error, self._left = slide, error, after
        self.info = slide.info

    def read_image(self, *place: int) -> Any:
        self._left -= 1
        if self._left < 0:
            raise self._error
        return self._slide.read_image(*place)

    def read(self, *place: int) -> Any:
        self._left -= 1
        if self._left < 0:
            raise self._error
        return self._slide.read(*place)

    def close(self) -> None:
        self._slide.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tiff(folder / "s.tif", picture(256, 256), compression="deflate")
    ring = [[20, 20], [90, 20], [90, 90], [20, 90], [20, 20]]
    feature = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}}
    (folder / "s.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    return folder


def task_in(data: Path, output: Path) -> SlideTask:
    tiles = TilesSettings(size=64, image_format="png", min_tissue=0.0)
    stores = open_store(str(data)), None, open_store(str(output))
    return SlideTask(*stores, tiles, DataSettings(), SlideCache(output / "cache", 1), MARK)


@contextmanager
def opens(error: BaseException, after: int) -> Iterator[None]:
    """Slides that open, or (`after` 0) do not, and fail when they have been read so often."""

    def failing(path: Path, *options: Any) -> Any:
        if after == 0:
            raise error
        return Failing(open_slide(path, *options), error, after - 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "open_slide", failing)
        yield


def inspected(data: Path, output: Path) -> tuple[SlideTask, SlideSummary]:
    task = task_in(data, output)
    (slide,) = find_slides(task.data.list(), root=task.data.uri).slides
    return task, inspect_slide(task, 0, slide)


def shard(task: SlideTask, summary: SlideSummary) -> tuple[Receipt, list[dict[str, Any]]]:
    receipt = write_slide_shard(task, summary, SlideShard("train", 0, 0, tuple(range(summary.tiles))))
    path = Path(task.output.full_path(shard_path("tiles", "train", MARK, 0)))
    return receipt, pq.read_table(path, partitioning=None).to_pylist()


LOOSE = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@LOOSE
@given(error=ANYTHING, after=st.integers(0, 1))
def test_a_slide_that_raises_anything_is_a_reject(
    error: Exception, after: int, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with opens(error, after):
        _, summary = inspected(data, tmp_path_factory.mktemp("out"))
    assert summary.reject is not None
    assert summary.reject.uri.endswith("s.tif")
    assert summary.reject.code
    assert summary.reject.reason
    assert SlideSummary.from_json(summary.to_json()) == summary


@LOOSE
@given(error=ANYTHING, after=st.integers(0, 18))
def test_tiles_that_raise_anything_are_rejects_and_the_others_stay(
    error: Exception, after: int, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    output = tmp_path_factory.mktemp("out")
    task, summary = inspected(data, output)
    assert summary.tiles == 16
    with opens(error, after):
        receipt, rows = shard(task, summary)
    assert receipt.rows_in == 16 == receipt.rows_out + len(receipt.rejects)
    assert receipt.rows_out == len(rows) == min(max(after - 1, 0), 16)
    assert all(reject["code"] and reject["reason"] for reject in receipt.rejects)
    assert {(reject["x"], reject["y"]) for reject in receipt.rejects}.isdisjoint({(r["x"], r["y"]) for r in rows})


@LOOSE
@given(error=ANYTHING)
def test_an_annotation_that_raises_anything_is_a_reject_and_its_slide_stays(
    error: Exception, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def failing(*args: Any, **options: Any) -> Any:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "open_masks", failing)
        task, summary = inspected(data, tmp_path_factory.mktemp("out"))
    assert summary.reject is None
    assert summary.annotation_reject is not None
    assert summary.annotation_reject.uri.endswith("s.geojson")
    assert not summary.annotated
    receipt, rows = shard(task, summary)
    assert receipt.rows_out == 16
    assert all(row["mask"] is None for row in rows)


@pytest.mark.parametrize("error", NOT_OURS, ids=repr)
def test_what_is_no_inputs_fault_passes(error: BaseException, data: Path, tmp_path: Path) -> None:
    task, summary = inspected(data, tmp_path / "sound")
    with opens(error, 0), pytest.raises(type(error)):
        inspected(data, tmp_path / "out")
    with opens(error, 3), pytest.raises(type(error)):
        shard(task, summary)


def test_an_object_that_is_refused_at_first_is_a_reject_and_later_the_stores_trouble() -> None:
    refusal = RefusedError("s3://b/k: cannot read (403)")
    with pytest.raises(BadInput, match="no_permission: s3://b/k"), one_unit("k"):
        raise refusal
    with pytest.raises(RefusedError), one_unit("k", again=True):
        raise refusal


def test_a_defect_of_our_own_leaves_its_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BadInput, match=r"internal: a\.svs: OddError: odd \(test_units\.py, line"), one_unit("a.svs"):
        raise OddError("odd")
    assert "Traceback" in caplog.text


def test_a_damaged_part_of_the_only_level_costs_its_tiles_and_not_the_slide(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "s.tif"
    tifffile.imwrite(path, picture(1024, 1024), photometric="rgb", tile=(128, 128), compression="deflate")
    with tifffile.TiffFile(path) as tiff:
        offset, size = tiff.pages.first.dataoffsets[27], tiff.pages.first.databytecounts[27]  # at 384, 384
    with path.open("r+b") as file:
        file.seek(offset + size // 2)
        file.write(bytes(size // 4))
    for least in (0.0, 0.02):
        task = task_in(tmp_path / "in", tmp_path / f"out {least}")
        task = replace(task, tiles=TilesSettings(size=128, image_format="png", min_tissue=least))
        (slide,) = find_slides(task.data.list(), root=task.data.uri).slides
        summary = inspect_slide(task, 0, slide)
        receipt, rows = shard(task, summary)
        assert [(reject["x"], reject["y"], reject["code"]) for reject in receipt.rejects] == [
            (384, 384, "unreadable_region")
        ]
        assert len(rows) == receipt.rows_out == summary.tiles - 1


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for stem in ("a", "b"):
        for role in ("input", "groundtruth"):
            (folder / "train" / role).mkdir(parents=True, exist_ok=True)
            pixels = picture(96, 96)
            image = Image.fromarray(pixels if role == "input" else pixels[..., 0] < 150)
            image.save(folder / "train" / role / f"{stem}.png")
    return folder


@LOOSE
@given(error=ANYTHING, where=st.sampled_from(["probe_image", "probe_mask", "decode_image", "decode_mask", "measure"]))
def test_a_pair_that_raises_anything_is_a_reject_and_the_other_stays(
    error: Exception, where: str, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store, output = open_store(str(pairs)), open_store(str(tmp_path_factory.mktemp("out")))
    first, second = find_pairs(store.list(), root=store.uri).pairs
    real, calls = getattr(ingest, where), []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(where)
        if len(calls) == 1:
            raise error
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, where, failing)
        probed = [probe_pair(store, pair, 1 << 20) for pair in (first, second)]
        sources = [source for source in probed if isinstance(source, Source)]
        rejects = [reject for reject in probed if isinstance(reject, Reject)]
        tiles = TilesSettings(size=96, image_format="png")
        manifest = plan_tiles(sources, tiles, DataSettings(val_fraction=0.001), seed=0)
        task = ShardTask(store, output, tiles, DataSettings(), MARK)
        receipts = [write_shard(task, plan) for plan in manifest.shards]
    rejects += [Reject(**row) for receipt in receipts for row in receipt.rejects]
    assert len(rejects) == 1
    assert sum(receipt.rows_out for receipt in receipts) == 1
    assert rejects[0].uri.rpartition("/")[2] == "a.png"
    assert rejects[0].code
    assert rejects[0].reason


def test_objects_in_an_archive_are_rejects_and_the_others_are_cut(s3: str, tmp_path: Path, data: Path) -> None:
    import boto3

    client, bucket = boto3.client("s3"), s3.removeprefix("s3://")
    client.put_object(Bucket=bucket, Key="train/s.tif", Body=(data / "s.tif").read_bytes())
    client.put_object(Bucket=bucket, Key="train/old.tif", Body=(data / "s.tif").read_bytes(), StorageClass="GLACIER")
    client.put_object(Bucket=bucket, Key="train/s.geojson", Body=b"[]", StorageClass="GLACIER")
    tiles = TilesSettings(size=64, image_format="png", min_tissue=0.0)
    stores = open_store(s3), None, open_store(str(tmp_path / "out"))
    task = SlideTask(*stores, tiles, DataSettings(), SlideCache(tmp_path / "cache", 1 << 30), MARK)
    slides = find_slides(task.data.list(), root=task.data.uri).slides
    summaries = {slide.slide_id: inspect_slide(task, number, slide) for number, slide in enumerate(slides)}
    archived, sound = summaries["old"].reject, summaries["s"]
    assert archived is not None
    assert archived.code == "no_permission"
    assert archived.uri == f"{s3}/train/old.tif"
    assert "storage class" in archived.reason
    assert sound.reject is None
    assert sound.tiles == 16
    assert sound.annotation_reject is not None
    assert sound.annotation_reject.code == "no_permission"
