"""200 damaged slides and masks: nothing crashes, no tile is lost or invented, and what is read is right or rejected."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.slide_files import picture, write_slide, write_tiff

from apacs_ray.config.settings import DataSettings, TilesSettings
from apacs_ray.data.shards import shard_path
from apacs_ray.slides.cache import SlideCache
from apacs_ray.slides.find import find_slides
from apacs_ray.slides.manifest import SlideTask, inspect_slide
from apacs_ray.slides.slide_tiles import SlideShard, write_slide_shard
from apacs_ray.storage import open_store
from apacs_ray.training.dataset import decode_pixels

SIDE = 256
VARIANTS = 200
Kept = dict[tuple[int, int], tuple[np.ndarray, np.ndarray | None]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sound slides, by kind, each in a folder of its own; lossless ones, so that a wrong pixel is a wrong pixel."""
    rgb = picture(SIDE, SIDE)
    cells = rgb[..., 0] < 150
    folders: dict[str, Path] = {}
    for kind in ("deflate", "lzw", "jpeg", "mrxs", "ome"):
        folder = tmp_path_factory.mktemp(kind)
        if kind == "mrxs":
            write_slide(folder / "s.mrxs", rgb, levels=2, codec="PNG")
        else:
            compression = "deflate" if kind == "ome" else kind
            write_tiff(folder / "s.tif", rgb, kind="ome" if kind == "ome" else "classic", compression=compression)
        if kind in ("jpeg", "mrxs"):
            ring = [[20, 20], [90, 20], [90, 90], [20, 90], [20, 20]]
            feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}}
            (folder / "s.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
        else:
            Image.fromarray(cells).save(folder / "s_mask.png")
        folders[kind] = folder
    return folders


def damage(path: Path, how: str, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    size = len(content)
    if how == "cut":
        del content[int(size * rng.uniform(0.02, 0.98)) :]
    elif how == "flip":
        for at in rng.integers(0, size, 3):
            content[at] ^= 1 << int(rng.integers(8))
    elif how == "zero":
        content.clear()
    elif how == "noise":
        at = int(rng.integers(0, size))
        content[at : at + 64] = rng.bytes(len(content[at : at + 64]))
    elif how == "header":  # lies in what describes the file: the first or the last bytes
        at = (
            int(rng.integers(0, min(size, 200)))
            if rng.random() < 0.5
            else size - 1 - int(rng.integers(0, min(size, 200)))
        )
        content[at] = int(rng.integers(256))
    elif how == "other":
        content = bytearray(b"\x89PNG\r\n\x1a\n" + rng.bytes(500))
    path.write_bytes(content)


def tiles(folder: Path, output: Path) -> tuple[Kept, str]:
    """What an ingest makes of the slide in a folder: pixels and mask by place, and the code of its first reject."""
    store = open_store(str(folder))
    settings = TilesSettings(size=100, image_format="png", min_tissue=0.0)
    task = SlideTask(
        store, None, open_store(str(output)), settings, DataSettings(), SlideCache(output / "cache", 1), "0" * 16
    )
    slide_data = find_slides(store.list(), root=store.uri)
    assert len(slide_data.slides) == 1
    summary = inspect_slide(task, 0, slide_data.slides[0])
    if summary.reject is not None:
        assert summary.reject.code
        assert summary.reject.reason
        return {}, summary.reject.code
    refused = ""
    if summary.annotation_reject is not None:
        refused = summary.annotation_reject.code
        assert summary.annotation_reject.uri.endswith(slide_data.slides[0].annotation[0].path)
    receipt = write_slide_shard(task, summary, SlideShard("train", 0, 0, tuple(range(summary.tiles))))
    assert receipt.rows_in == summary.tiles == receipt.rows_out + len(receipt.rejects)
    assert all(reject["code"] and reject["reason"] for reject in receipt.rejects)
    import pyarrow.parquet as pq

    rows = pq.read_table(output / shard_path("tiles", "train", "0" * 16, 0), partitioning=None).to_pylist()
    pixels_of = {
        (row["x"], row["y"]): (
            decode_pixels(row["image"]),
            None if row["mask"] is None else decode_pixels(row["mask"]),
        )
        for row in rows
    }
    return pixels_of, receipt.rejects[0]["code"] if receipt.rejects else refused


def test_damage_is_read_rightly_or_rejected(whole: dict[str, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(2024)
    sound = {kind: tiles(folder, tmp_path / f"sound-{kind}")[0] for kind, folder in whole.items()}
    outcomes: Counter[str] = Counter()
    for number in range(VARIANTS):
        kind = list(whole)[number % len(whole)]
        how = ("cut", "flip", "zero", "noise", "header", "other")[number // len(whole) % 6]
        folder = tmp_path / f"damaged{number}"  # never an earlier one's path: decoders remember by path
        shutil.copytree(whole[kind], folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        hit = files[int(rng.integers(len(files)))]
        damage(hit, how, rng)
        pixels_of, code = tiles(folder, tmp_path / "out")
        same_size = pixels_of.keys() == sound[kind].keys()
        for place, (pixels, mask) in pixels_of.items():
            if not same_size and place not in sound[kind]:
                continue
            expected, truth = sound[kind][place]
            if kind == "jpeg" or hit.suffix == ".ini" or how == "header":
                continue  # a lossy stream, or numbers that lie within reason: nothing can tell
            if kind == "lzw" and hit.suffix == ".tif" and how == "flip":
                continue  # LZW has no checksum
            assert np.array_equal(pixels, expected), (number, kind, how, hit.name)
            if hit.suffix != ".geojson":  # a digit of a coordinate may change
                assert (mask is None) == (truth is None) or (mask is None and code)  # its annotation was refused
                assert mask is None or np.array_equal(mask, truth), (number, kind, how, hit.name)
        outcomes["rejected: " + code if code else "read"] += 1
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert sum(outcomes.values()) == VARIANTS
    assert outcomes["read"] < VARIANTS / 2, outcomes
    assert len(outcomes) > 4, outcomes
