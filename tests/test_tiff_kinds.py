"""Sound TIFF of every kind is read as a viewer shows it or refused by name; damaged TIFF is refused, or no decoder
could tell. Each file has a path of its own: libvips once answered from its memory of an earlier file."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
from support.tiff_kinds import SIDE, TILE, Kind, all_kinds, picture, write

from apacs_ray.errors import BadInput
from apacs_ray.slides.open import open_slide
from apacs_ray.slides.reader import Engine

pytest.importorskip("imagecodecs", reason="tifffile writes and reads most compressions with imagecodecs only")

LEVELS = 2  # by which decoders of a lossy stream may differ


def is_unsupported(kind: Kind) -> bool:
    """What is refused, with a sentence: neither engine decodes it, or not without a doubt."""
    return (
        kind.bits != 8
        or kind.layout == "cmyk"
        or (kind.compression == "zstd" and "+" in kind.layout)
        or kind.compression in ("lzma", "jpeg2000")  # of plain TIFF: OpenSlide reads Aperio's JPEG 2000
        or (not kind.tiled and (kind.compression == "zstd" or (kind.compression == "lzw" and kind.layout == "planes")))
    )


def read_whole(path: Path, engine: Engine = "auto") -> np.ndarray:
    slide = open_slide(path, engine)
    try:
        return slide.read(0, 0, 0, SIDE, SIDE).astype(int)
    finally:
        slide.close()


def read_or_refusal(path: Path) -> np.ndarray | BadInput:
    try:
        return read_whole(path)
    except BadInput as defect:
        return defect


def test_every_kind_of_tiff_is_read_right_or_refused(tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    wrong = []
    for number, kind in enumerate(all_kinds()):
        path = tmp_path / f"{number}.tif"
        expected_rgb = write(path, kind, picture())
        if expected_rgb is None:
            outcomes["not written"] += 1
            continue
        answer = read_or_refusal(path)
        if isinstance(answer, BadInput):
            assert is_unsupported(kind), f"{kind}: {answer}"
            assert answer.code == "unsupported_slide", f"{kind}: {answer}"
            outcomes["refused"] += 1
            continue
        assert not is_unsupported(kind), f"{kind} is read now: take it off the list"
        difference = int(np.abs(answer - expected_rgb.astype(int)).max())
        limit = LEVELS if kind.lossy else 1 if "+" in kind.layout else 0  # an alpha rounds once more
        if difference > limit:
            wrong.append(f"{kind}: {difference} levels")
        outcomes["read"] += 1
    assert not wrong, "\n".join(wrong)
    print(dict(outcomes))
    assert outcomes["read"] > 60, outcomes
    assert outcomes["refused"] > 20, outcomes


def test_openslide_agrees_where_it_reads_the_same_file(tmp_path: Path) -> None:
    compared = 0
    for number, kind in enumerate(kind for kind in all_kinds() if kind.tiled and "+" not in kind.layout):
        path = tmp_path / f"{number}.tif"
        if write(path, kind, picture(3)) is None or is_unsupported(kind):
            continue
        try:
            theirs = read_whole(path, "openslide")
        except BadInput:
            continue  # WebP, and what else it does not know
        difference = int(np.abs(read_whole(path) - theirs).max())
        assert difference <= (LEVELS if kind.lossy else 0), f"{kind}: {difference} levels"
        compared += 1
    assert compared > 25


def damaged(content: bytes, offset: int, size: int, how: str, rng: np.random.Generator) -> bytes:
    """The file with the tile at `offset` spoiled."""
    spoiled = bytearray(content)
    if how == "zeros":
        at = offset + int(size * rng.uniform(0.1, 0.7))
        spoiled[at : at + size // 5] = bytes(size // 5)
    elif how == "flip":
        spoiled[offset + int(rng.integers(size))] ^= 1 << int(rng.integers(8))
    elif how == "noise":
        at = offset + int(rng.integers(max(1, size - 24)))
        spoiled[at : at + 24] = rng.bytes(24)
    else:
        del spoiled[offset + size // 2 :]
    return bytes(spoiled)


def test_damage_is_refused_unless_no_decoder_can_tell(tmp_path: Path) -> None:
    """Raw samples, and streams without a checksum: where ours is wrong without a word, tifffile's decoder is, too."""
    rng = np.random.default_rng(7)
    outcomes: Counter[tuple[str, str]] = Counter()
    for number, kind in enumerate(all_kinds()):
        sound = tmp_path / f"{number}.tif"
        if write(sound, kind, picture(number)) is None or is_unsupported(kind):
            continue
        expected = read_whole(sound)
        with tifffile.TiffFile(sound) as tiff:
            page = tiff.pages.first
            place = len(page.dataoffsets) - 1  # the last: a cut file lacks this one only
            offset, size = page.dataoffsets[place], page.databytecounts[place]
        for how in ("zeros", "flip", "noise", "cut"):
            path = tmp_path / f"{number}-{how}.tif"
            content = sound.read_bytes()
            if offset + size < len(content) - 8 and how == "cut":
                continue  # something else follows the pixels
            path.write_bytes(damaged(content, offset, size, how, rng))
            answer = read_or_refusal(path)
            if isinstance(answer, BadInput):
                assert answer.reason
                outcomes[kind.compression, "refused"] += 1
            else:
                same = np.array_equal(answer, expected)
                outcomes[kind.compression, "same pixels" if same else "no decoder can tell"] += 1
                assert same or not judged_damaged(path), f"{kind}, {how}: wrong pixels, and tifffile would have known"
            os.unlink(path)
    print({" ".join(key): count for key, count in sorted(outcomes.items())})
    for compression in ("deflate",):
        assert outcomes[compression, "no decoder can tell"] == 0, outcomes
    assert outcomes["jpeg", "refused"] > outcomes["jpeg", "no decoder can tell"], outcomes


def judged_damaged(path: Path) -> bool:
    """Whether tifffile, with imagecodecs, finds the damage."""
    try:
        with tifffile.TiffFile(path) as tiff:
            tiff.pages.first.asarray()
    except Exception:  # whatever a codec raises  # noqa: BLE001
        return True
    return False


@pytest.mark.parametrize("compression", ["none", "lzw", "deflate", "packbits", "webp", "jpeg", "zstd"])
def test_tiles_that_the_file_leaves_out_are_background(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "sparse.tif"
    rgb = picture()
    assert write(path, Kind(compression, "rgb"), rgb) is not None
    whole = read_whole(path)
    fresh = tmp_path / "sparse again.tif"
    fresh.write_bytes(path.read_bytes())
    with tifffile.TiffFile(fresh, mode="r+b") as tiff:
        tags = tiff.pages.first.tags
        counts, offsets = list(tags["TileByteCounts"].value), list(tags["TileOffsets"].value)
        counts[5] = offsets[5] = 0
        tags["TileByteCounts"].overwrite(counts)
        tags["TileOffsets"].overwrite(offsets)
    answer = read_whole(fresh)
    hole = np.s_[TILE : 2 * TILE, TILE : 2 * TILE]
    assert (answer[hole] == 255).all()
    answer[hole] = whole[hole]
    assert np.array_equal(answer, whole)
