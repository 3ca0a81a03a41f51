"""Masks stored in every way: both layouts give the same cells or the same refusal, and damage is never 'no cell'."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import pyvips
import tifffile
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from apacs_ray.config.settings import DataSettings, TilesSettings
from apacs_ray.data.folders import find_pairs
from apacs_ray.data.grid import Box
from apacs_ray.data.image_tiles import ShardTask, Source, plan_tiles, probe_pair, write_shard
from apacs_ray.data.masks import decode_mask, probe_mask
from apacs_ray.data.rejects import Reject
from apacs_ray.errors import BadInput
from apacs_ray.slides.mask_sources import FovMasks, ImageMask, open_masks
from apacs_ray.slides.reader import Level, SlideInfo
from apacs_ray.storage import open_store

LIMIT = 1_000_000
WIDTH, HEIGHT = 330, 210
CELLS = np.zeros((HEIGHT, WIDTH), bool)
CELLS[40:120, 56:248] = True
CELLS[130:200, 10:40] = True
CELLS[::7, 300::5] = True
LABELS = np.zeros((HEIGHT, WIDTH), np.int64)  # five objects and their cells
for _number, _left in enumerate(range(0, 300, 60)):
    LABELS[20:190, _left + 8 : _left + 40] = _number + 1
TILES = [Box(x, y, 128, 96) for y in range(0, HEIGHT, 96) for x in range(0, WIDTH, 128)]
GRAY = "grey_mask"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::RuntimeWarning")


def info_of(width: int, height: int) -> SlideInfo:
    return SlideInfo("vips", (Level(width, height, 1.0),), 0.25, Box(0, 0, width, height))


def of_a_pair(content: bytes, threshold: int | None) -> npt.NDArray[np.bool_] | str:
    """What the folder layout makes of a mask: its cells, or the code of its refusal."""
    try:
        mask = decode_mask(content, LIMIT, threshold)
        assert probe_mask(content, LIMIT) == mask.shape[::-1]
        return mask
    except BadInput as defect:
        return defect.code


def of_a_slide(path: Path, threshold: int | None, *, size: tuple[int, int] | None = None) -> Any:
    """What a slide makes of it, tile by tile; the second who opens it has the rule of the first."""
    width, height = size or (WIDTH, HEIGHT)
    try:
        first = ImageMask(path, info_of(width, height), threshold)
        mask = ImageMask(path, info_of(width, height), threshold, rules=first.rules)
        whole = np.zeros((height + 96, width + 128), bool)
        for box in (Box(x, y, 128, 96) for y in range(0, height, 96) for x in range(0, width, 128)):
            whole[box.y : box.y + 96, box.x : box.x + 128] = mask.tile(box.x, box.y, 128, 96, 1.0)
        return whole[:height, :width]
    except BadInput as defect:
        return defect.code if path.name in defect.reason else f"{path.name} is not named"


def both(path: Path, content: bytes, threshold: int | None, size: tuple[int, int] | None = None) -> Any:
    """The answer of both layouts, which is one."""
    path.write_bytes(content)
    pair, slide = of_a_pair(content, threshold), of_a_slide(path, threshold, size=size)
    assert type(pair) is type(slide), (pair, slide)
    assert np.array_equal(pair, slide), (pair, slide)  # of codes as well
    return pair


@dataclass(frozen=True)
class Case:
    """A mask that is written in many ways; `at` are the thresholds and what each gives."""

    values: npt.NDArray[Any]
    at: dict[int | None, npt.NDArray[np.bool_] | str]
    palette: list[tuple[int, int, int]] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def vivid(count: int) -> list[tuple[int, int, int]]:
    """Black, and colors whose luminances grow from dark to light."""
    return [(0, 0, 0), *[(40 * number + 10, 30 * number, 5 * number) for number in range(1, count)]]


def cases() -> dict[str, Case]:
    soft = np.clip(np.rint(np.linspace(0, 255, WIDTH))[None].repeat(HEIGHT, 0), 0, 255).astype(np.int64)
    same: dict[int | None, npt.NDArray[np.bool_] | str] = {None: CELLS, 1: CELLS, 200: CELLS}
    cases = {name: Case(CELLS.astype(dtype) * top, same) for name, dtype, top in BINARY}
    for dtype in (np.uint8, np.uint16, np.int16, np.int32, np.uint32, np.float32, np.int8):
        name = np.dtype(dtype).name
        cases[f"labels {name}"] = Case(LABELS.astype(dtype), {None: GRAY, 1: LABELS > 0, 3: LABELS >= 3})
        cases[f"class {name}"] = Case((CELLS * 5).astype(dtype), {None: GRAY, 1: CELLS, 6: ~CELLS & CELLS})
        cases[f"nothing {name}"] = Case(np.zeros((HEIGHT, WIDTH), dtype), {None: ~CELLS & CELLS, 1: ~CELLS & CELLS})
    for dtype in (np.uint16, np.int32, np.uint32, np.float32):
        name = np.dtype(dtype).name
        far = LABELS * 61  # 61 to 305: objects on both sides of a byte's end
        two = GRAY if dtype == np.uint16 else far >= 200
        cases[f"many {name}"] = Case(far.astype(dtype), {None: GRAY, 1: far > 0, 200: two})
    cases["soft uint8"] = Case(soft.astype(np.uint8), {None: GRAY, 128: soft >= 128, 1: soft >= 1})
    cases["soft uint16"] = Case((soft * 257).astype(np.uint16), {None: GRAY, 128: soft >= 128})
    odd = (soft * 250).astype(np.uint16)
    cases["odd uint16"] = Case(odd, {None: GRAY, 1: odd >= 1, 128: GRAY})
    cases["fractions"] = Case(np.linspace(0, 1, WIDTH, dtype=np.float32)[None].repeat(HEIGHT, 0), REFUSED)
    cases["negative"] = Case(CELLS.astype(np.int32) - 1, REFUSED)
    cases["no numbers"] = Case(np.where(CELLS, np.nan, 0).astype(np.float32), REFUSED)
    cases["doubles"] = Case(CELLS.astype(np.float64), REFUSED)
    index = CELLS.astype(np.uint8)
    cases["palette of two"] = Case(index, same, palette=[(90, 0, 90), (0, 220, 0)])
    cases["palette, light first"] = Case(index, {None: ~CELLS, 9: ~CELLS}, palette=[(255, 255, 255), (0, 0, 0)])
    labels = LABELS.astype(np.uint8)
    cases["palette of labels"] = Case(labels, {None: GRAY, 1: LABELS > 0, 3: GRAY}, palette=vivid(6))
    grays = [(40 * number,) * 3 for number in range(6)]
    cases["palette of grays"] = Case(labels, {None: GRAY, 1: LABELS > 0, 80: LABELS >= 2}, palette=grays)
    white = [(255, 255, 255), *vivid(6)[1:]]  # Glasbey's table begins with white
    cases["palette on white"] = Case(labels, {None: GRAY, 1: GRAY}, palette=white)
    cases["one label on white"] = Case(5 * index, {None: GRAY, 1: GRAY}, palette=white)
    return cases


BINARY = [
    ("1", np.uint8, 1),
    ("255", np.uint8, 255),
    ("16 bits 1", np.uint16, 1),
    ("16 bits 255", np.uint16, 255),
    ("16 bits 65535", np.uint16, 65535),
    ("32 bits 1", np.int32, 1),
    ("32 bits 255", np.uint32, 255),
    ("float 1", np.float32, 1),
    ("bool", np.bool_, True),
]
REFUSED: dict[int | None, npt.NDArray[np.bool_] | str] = {None: "unsupported_mode", 1: "unsupported_mode"}
TIFFS: dict[str, dict[str, Any]] = {
    "raw strips": {},
    "raw tiles": {"tile": (64, 64)},
    "LZW tiles": {"tile": (64, 64), "compression": "lzw"},
    "LZW strips": {"rowsperstrip": 50, "compression": "lzw"},
    "Deflate tiles, predictor": {"tile": (64, 64), "compression": "zlib", "predictor": True},
    "Deflate strips": {"rowsperstrip": 50, "compression": "zlib"},
    "PackBits": {"tile": (64, 64), "compression": "packbits"},
    "ZSTD": {"tile": (64, 64), "compression": "zstd"},
    "LZMA": {"rowsperstrip": 50, "compression": "lzma"},
    "big endian": {"byteorder": ">"},
    "BigTIFF": {"bigtiff": True, "tile": (64, 64)},
}


def tiffs(case: Case) -> Iterator[tuple[str, bytes]]:
    """A case in every TIFF."""
    for name, options in TIFFS.items():
        options = {"photometric": "minisblack", "metadata": None} | options
        if case.values.dtype == np.bool_ and not options.keys() <= {"photometric", "metadata", "byteorder"}:
            continue
        if case.palette is not None:
            table = np.zeros((3, 256), np.uint16)
            table[:, : len(case.palette)] = np.array(case.palette, np.uint16).T * 257
            options |= {"photometric": "palette", "colormap": table}
            options.pop("predictor", None)
        sink = io.BytesIO()
        tifffile.imwrite(sink, case.values, **options)
        yield name, sink.getvalue()
    if case.palette is None and case.values.dtype in (np.uint8, np.uint16):
        for planar, tiled, alpha in itertools.product((False, True), (False, True), (False, True)):
            planes = [case.values] * 3 + [np.full_like(case.values, np.iinfo(case.values.dtype).max)] * alpha
            options = {"extrasamples": ["unassalpha"]} if alpha else {}
            options |= {"tile": (64, 64)} if tiled else {}
            sink = io.BytesIO()
            tifffile.imwrite(
                sink,
                np.stack(planes, 0 if planar else 2),
                photometric="rgb",
                planarconfig="separate" if planar else "contig",
                metadata=None,
                **options,
            )
            yield f"three channels{' planar' * planar}{' tiled' * tiled}{' alpha' * alpha}", sink.getvalue()


def pictures(case: Case) -> Iterator[tuple[str, bytes]]:
    """A case as PNG and BMP, where these can hold it."""
    values = case.values
    if values.dtype not in (np.bool_, np.uint8, np.uint16):
        return
    images = {"": Image.fromarray(values)}
    if case.palette is not None:
        images = {"": Image.fromarray(values, "P")}
        images[""].putpalette([channel for color in case.palette for channel in color])
    elif values.dtype == np.uint8:
        images["three channels"] = Image.fromarray(values[..., None].repeat(3, 2))
        images["opaque"] = images[""].convert("LA")
    for (name, image), kind in itertools.product(images.items(), ("PNG", "BMP")):
        if kind == "BMP" and (image.mode not in ("1", "L", "P", "RGB")):
            continue
        sink = io.BytesIO()
        image.save(sink, kind)
        yield f"{kind} {name}", sink.getvalue()


UNREAD = {  # sound, but with a sentence instead of cells: these decoders have no stricter sibling
    ("ZSTD", bits) for bits in ("int8", "int16", "int32", "uint32", "float32")
} | {("LZMA", bits) for bits in ("int8", "int16", "int32", "uint32", "float32")}


@pytest.mark.parametrize("name", cases())
def test_both_layouts_read_a_mask_alike_and_rightly(name: str, tmp_path: Path) -> None:
    case = cases()[name]
    written = 0
    for number, (way, content) in enumerate([*tiffs(case), *pictures(case)]):
        for threshold, expected in case.at.items():
            got = both(tmp_path / f"{number}-{threshold}.x", content, threshold)
            written += 1
            deep_planes = "planar" in way and case.values.dtype != np.uint8
            if (way, case.values.dtype.name) in UNREAD or deep_planes:
                assert isinstance(got, str), (way, threshold)
            else:
                assert type(got) is type(expected), (way, threshold, got)
                assert np.array_equal(got, expected), (way, threshold, got)
    assert written >= 8


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("tiled", [False, True])
def test_where_0_is_white_cells_are_what_viewers_show_white(tmp_path: Path, dtype: Any, tiled: bool) -> None:
    top = np.iinfo(dtype).max
    sink = io.BytesIO()
    options: dict[str, Any] = {"tile": (64, 64)} if tiled else {}
    tifffile.imwrite(sink, np.where(CELLS, 0, top).astype(dtype), photometric="miniswhite", metadata=None, **options)
    assert np.array_equal(both(tmp_path / "m.tif", sink.getvalue(), None), CELLS)
    bits = io.BytesIO()
    tifffile.imwrite(bits, ~CELLS, photometric="miniswhite", metadata=None)
    assert np.array_equal(both(tmp_path / "b.tif", bits.getvalue(), None), CELLS)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["tiles", "strips", "sparse tiles", "ZSTD", "PNG", "PNG palette"])
def test_orientation_is_applied_in_both_layouts(tmp_path: Path, turn: int, kind: str) -> None:
    exif = Image.Exif()
    exif[274] = turn
    sink = io.BytesIO()
    if kind == "PNG":
        Image.fromarray(CELLS).save(sink, "PNG", exif=exif)
    elif kind == "PNG palette":
        text = PngInfo()
        text.add_text("Info", "slice " * 400_000, zip=True)
        image = Image.fromarray(CELLS.astype(np.uint8), "P")
        image.putpalette([90, 0, 90, 0, 220, 0])
        image.save(sink, "PNG", exif=exif, pnginfo=text)
    else:
        options: dict[str, Any] = {} if kind == "strips" else {"tile": (64, 64)}
        options |= {"compression": "zstd"} if kind == "ZSTD" else {}
        tags = [(274, 3, 1, turn, True)]
        tifffile.imwrite(
            sink, CELLS.astype(np.uint8) * 255, photometric="minisblack", metadata=None, extratags=tags, **options
        )
    content = sparse(sink.getvalue(), 3) if kind == "sparse tiles" else sink.getvalue()
    cells = CELLS.copy()
    if kind == "sparse tiles":
        cells[:64, 192:256] = False
    upright = {
        1: cells,
        2: cells[:, ::-1],
        3: cells[::-1, ::-1],
        4: cells[::-1],
        5: cells.T,
        6: np.rot90(cells, -1),
        7: cells[::-1, ::-1].T,
        8: np.rot90(cells),
    }[turn]
    height, width = upright.shape
    assert np.array_equal(both(tmp_path / "m.x", content, None, (width, height)), upright)


def sparse(content: bytes, number: int) -> bytes:
    """A TIFF whose tile `number` is left out, as writers of sparse files do."""
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        tags = [tiff.pages.first.tags[name] for name in ("TileOffsets", "TileByteCounts")]
        order = tiff.byteorder
    changed = bytearray(content)
    for tag in tags:
        code, size = {3: ("H", 2), 4: ("I", 4), 16: ("Q", 8)}[int(tag.dtype)]
        struct.pack_into(order + code, changed, tag.valueoffset + size * number, 0)
    return bytes(changed)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits"])
def test_tiles_that_a_file_leaves_out_are_background(tmp_path: Path, compression: str | None) -> None:
    sink = io.BytesIO()
    values = CELLS.astype(np.uint8) * 255
    tifffile.imwrite(sink, values, photometric="minisblack", tile=(64, 64), compression=compression, metadata=None)
    expected = CELLS.copy()
    expected[64:128, 64:128] = False
    content = sparse(sink.getvalue(), 7)
    assert np.array_equal(both(tmp_path / "m.tif", content, None), expected)


# colors, pages, transparency, loss


def saved(pixels: Any, kind: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(sink, kind, **options)
    return sink.getvalue()


def test_colors_are_luminances_with_a_threshold_and_refused_without(tmp_path: Path) -> None:
    rgb = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    rgb[CELLS] = (250, 250, 0)
    rgb[~CELLS] = (0, 0, 120)
    for kind in ("PNG", "TIFF", "BMP"):
        assert both(tmp_path / f"a.{kind}", saved(rgb, kind), None) == GRAY
        assert np.array_equal(both(tmp_path / f"b.{kind}", saved(rgb, kind), 100), CELLS)


def test_transparent_parts_are_neither_cell_nor_background(tmp_path: Path) -> None:
    byte = CELLS.astype(np.uint8) * 255
    for number, alpha in enumerate((byte, np.zeros_like(byte), np.full_like(byte, 254))):
        for kind in ("PNG", "TIFF"):
            for planes in ([byte, alpha], [byte, byte, byte, alpha]):
                content = saved(np.stack(planes, 2), kind)
                path = tmp_path / f"{number}{len(planes)}.{kind}"
                assert both(path, content, 128) == "unsupported_mode"
    clear = saved(Image.fromarray(CELLS.astype(np.uint8), "P"), transparency=0)
    assert both(tmp_path / "p.png", clear, None) == "unsupported_mode"


def test_several_images_are_refused_and_a_pyramid_is_one(tmp_path: Path) -> None:
    byte = CELLS.astype(np.uint8) * 255
    pages = io.BytesIO()
    tifffile.imwrite(pages, np.stack([byte, 255 - byte]), photometric="minisblack")
    stack = io.BytesIO()
    tifffile.imwrite(stack, np.stack([byte, byte, byte]), imagej=True)
    thumbnail_first = io.BytesIO()
    with tifffile.TiffWriter(thumbnail_first) as tiff:
        tiff.write(byte[::4, ::4], photometric="minisblack", metadata=None)
        tiff.write(byte, photometric="minisblack", metadata=None)
    for number, content in enumerate((pages, stack, thumbnail_first)):
        size = (WIDTH, HEIGHT) if number < 2 else (-(-WIDTH // 4), -(-HEIGHT // 4))
        assert both(tmp_path / f"{number}.tif", content.getvalue(), None, size) == "multiple_frames"
    assert both(tmp_path / "a.png", saved(byte, save_all=True, append_images=[Image.fromarray(255 - byte)]), None) == (
        "multiple_frames"
    )
    for subifd in (False, True):
        pyramid = pyvips.Image.new_from_array(byte).tiffsave_buffer(
            tile=True, tile_width=64, tile_height=64, pyramid=True, compression="deflate", subifd=subifd
        )
        assert np.array_equal(both(tmp_path / f"p{subifd}.tif", pyramid, None), CELLS)


def test_jpeg_leaves_a_mask_of_sharp_cells_what_it_is_and_blurs_others(tmp_path: Path) -> None:
    blocks = np.zeros((HEIGHT, WIDTH), bool)
    blocks[40:120, 56:248] = True  # on the grid of 8 px; JPEG leaves such nearly alone
    flat = blocks.astype(np.uint8) * 255
    for number, content in enumerate(
        (
            saved(flat, "JPEG", quality=90),
            saved(flat[..., None].repeat(3, 2), "JPEG", quality=90),
            pyvips.Image.new_from_array(flat).tiffsave_buffer(tile=True, compression="jpeg", Q=90),
        )
    ):
        assert np.array_equal(both(tmp_path / f"{number}", content, None), blocks)
    disc = np.hypot(*np.mgrid[-105:105, -165:165]) < 77.3
    soft = disc.astype(np.uint8) * 255
    for number, content in enumerate(
        (
            saved(soft, "JPEG", quality=60),
            pyvips.Image.new_from_array(soft).tiffsave_buffer(tile=True, compression="jpeg", Q=60),
        )
    ):
        assert both(tmp_path / f"s{number}", content, None) == GRAY
        assert (both(tmp_path / f"t{number}", content, 128) == disc).mean() > 0.999
    few = saved(LABELS.astype(np.uint8), "JPEG", quality=100)
    assert both(tmp_path / "few", few, None) == GRAY


@pytest.mark.parametrize("compression", ["jpegxl", "lerc", "ccittfax4 tiles"])
def test_what_no_decoder_here_reads_strictly_is_refused(tmp_path: Path, compression: str) -> None:
    byte = CELLS.astype(np.uint8) * 255
    if compression.startswith("ccitt"):
        content = pyvips.Image.new_from_array(byte).tiffsave_buffer(tile=True, compression="ccittfax4", bitdepth=1)
    else:
        sink = io.BytesIO()
        tifffile.imwrite(sink, byte, photometric="minisblack", compression=compression, metadata=None)
        content = sink.getvalue()
    assert both(tmp_path / "m.tif", content, None) == "unsupported_mode"


def test_one_bit_in_ccitt_strips(tmp_path: Path) -> None:
    image = pyvips.Image.new_from_array(CELLS.astype(np.uint8) * 255)
    content = image.tiffsave_buffer(compression="ccittfax4", bitdepth=1)
    assert np.array_equal(both(tmp_path / "m.tif", content, None), CELLS)


# the verdict is about a whole mask


def test_labels_in_one_corner_refuse_the_whole_mask(tmp_path: Path) -> None:
    values = CELLS.astype(np.uint8)
    values[-1, -1] = 2
    sink = io.BytesIO()
    tifffile.imwrite(sink, values, photometric="minisblack", tile=(64, 64), metadata=None)
    (tmp_path / "m.tif").write_bytes(sink.getvalue())
    with pytest.raises(BadInput, match=r"grey_mask: m\.tif: the mask has 3 gray values from 0 to 2.*mask_threshold"):
        ImageMask(tmp_path / "m.tif", info_of(WIDTH, HEIGHT), None)


def test_a_bad_fov_refuses_its_slides_masks_and_is_named(tmp_path: Path) -> None:
    Image.fromarray(CELLS).save(tmp_path / "s_0_0.png")
    Image.fromarray(LABELS.astype(np.uint8)).save(tmp_path / "s_400_0.png")
    files = [(tmp_path / "s_0_0.png", 0, 0), (tmp_path / "s_400_0.png", 400, 0)]
    with pytest.raises(BadInput, match=r"grey_mask: s_400_0\.png"):
        FovMasks(files, None, LIMIT)
    masks = FovMasks(files, 1, LIMIT)
    again = open_masks("fovs", files, info_of(800, 400), threshold=1, max_pixels=LIMIT, rules=masks.rules)
    for source in (masks, again):
        assert np.array_equal(source.tile(400, 0, WIDTH, HEIGHT, 1.0), LABELS > 0)
        assert np.array_equal(source.tile(0, 0, WIDTH, HEIGHT, 1.0), CELLS)
    content = (tmp_path / "s_0_0.png").read_bytes()
    (tmp_path / "s_0_0.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadInput, match=r"s_0_0\.png"):
        FovMasks(files, 1, LIMIT)


def test_a_doubtful_image_is_a_mask_when_it_looks_like_one(tmp_path: Path) -> None:
    info = info_of(WIDTH, HEIGHT)
    picture = np.random.default_rng(0).integers(150, 250, (HEIGHT, WIDTH, 3), np.uint8)
    no_masks = {
        "preview": picture[::2, ::2][: HEIGHT // 2, : WIDTH // 2],
        "in color": picture,
        "in gray": picture[..., 0],
        "of another size": np.zeros((77, 120), np.uint8),
        "labels": LABELS.astype(np.uint8),
        "transparent": np.zeros((HEIGHT, WIDTH, 4), np.uint8),
    }
    for name, pixels in no_masks.items():
        path = tmp_path / f"{name}.png"
        Image.fromarray(pixels).save(path)
        for threshold in (None, 128, 1):
            if name == "labels" and threshold:
                mask = ImageMask(path, info, threshold, doubtful=True)
                assert np.array_equal(mask.tile(0, 0, WIDTH, HEIGHT, 1.0), threshold <= LABELS)
                continue
            with pytest.raises(BadInput, match=rf"no_mask: {name}\.png: .*_mask") as raised:
                open_masks("image", [(path, 0, 0)], info, threshold=threshold, doubtful=True)
            assert raised.value.code == "no_mask"
    Image.fromarray(CELLS).save(tmp_path / "s.png")
    assert np.array_equal(ImageMask(tmp_path / "s.png", info, None, doubtful=True).tile(0, 0, WIDTH, HEIGHT, 1), CELLS)
    (tmp_path / "s.png").write_bytes((tmp_path / "s.png").read_bytes()[:-60])
    with pytest.raises(BadInput) as raised:
        ImageMask(tmp_path / "s.png", info, None, doubtful=True)
    assert raised.value.code in ("truncated", "unreadable")  # a broken mask is no picture


# damage

STREAMS: dict[str, dict[str, Any]] = {
    "LZW": {"compression": "lzw", "tile": (64, 64)},
    "LZW strips": {"compression": "lzw", "rowsperstrip": 40},
    "Deflate": {"compression": "zlib", "tile": (64, 64)},
    "Deflate strips": {"compression": "zlib", "rowsperstrip": 40},
    "PackBits": {"compression": "packbits", "tile": (64, 64)},
    "ZSTD": {"compression": "zstd", "tile": (64, 64)},
    "LZMA": {"compression": "lzma", "tile": (64, 64)},
    "JPEG": {"compression": "jpeg", "tile": (64, 64)},
    "JPEG strips": {"compression": "jpeg", "rowsperstrip": 40},
}
CHECKED = {"Deflate", "Deflate strips", "LZMA"}  # whose checksums make every change an error


def spoiled(content: bytes, how: str, rng: np.random.Generator) -> bytes:
    """A TIFF with one of its streams damaged."""
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        page = tiff.pages.first
        lies = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    offset, size = lies[int(rng.integers(len(lies)))]
    changed = bytearray(content)
    if how == "cut":
        return bytes(changed[: int(len(changed) * rng.uniform(0.2, 0.98))])
    if how == "zeros":
        changed[offset : offset + size] = bytes(size)
    elif how == "half":
        changed[offset + size // 2 : offset + size] = bytes(size - size // 2)
    elif how == "flip":
        changed[offset + int(rng.integers(size))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


@pytest.mark.parametrize("way", STREAMS)
def test_damage_never_means_no_cell(way: str, tmp_path: Path) -> None:
    """Each variant lies at a path of its own. Single bits of streams without a checksum nothing can tell."""
    rng = np.random.default_rng(5)
    noisy = CELLS ^ (rng.random(CELLS.shape) < 0.03)
    sink = io.BytesIO()
    values = noisy.astype(np.uint8) * 255
    tifffile.imwrite(sink, values, photometric="minisblack", metadata=None, **STREAMS[way])
    threshold = 128 if "JPEG" in way else None
    sound = both(tmp_path / "sound.tif", sink.getvalue(), threshold)
    assert (sound == noisy).mean() > 0.99
    outcomes: Counter[tuple[str, str]] = Counter()
    for number, how in itertools.product(range(12), ("cut", "zeros", "half", "flip")):
        content = spoiled(sink.getvalue(), how, rng)
        if content == sink.getvalue():
            continue
        got = both(tmp_path / f"{how}{number}.tif", content, threshold)
        if isinstance(got, str):
            assert got in ("unreadable", "truncated") or how == "flip", (how, got)
            outcomes[how, "refused"] += 1
        else:
            outcomes[how, "same" if np.array_equal(got, sound) else "wrong"] += 1
    wrong = {how for how, outcome in outcomes if outcome == "wrong"}
    assert wrong <= (set() if way in CHECKED else {"flip"}), outcomes
    assert outcomes["zeros", "refused"] == 12


@pytest.mark.parametrize("kind", ["PNG", "BMP", "JPEG"])
def test_a_cut_picture_is_never_a_mask_with_missing_rows(kind: str, tmp_path: Path) -> None:
    content = saved(CELLS.astype(np.uint8) * 255, kind)
    sound = both(tmp_path / "sound", content, 128)
    for number, share in enumerate(np.linspace(0.01, 0.99, 15)):
        got = both(tmp_path / f"{number}", content[: int(len(content) * share)], 128)
        if isinstance(got, str):
            assert got in ("unreadable", "truncated", "empty_file")
        else:  # what follows the pixels is missing
            assert np.array_equal(got, sound), share
            assert share > 0.9
    assert (sound == CELLS).mean() > 0.99


def test_a_mask_of_many_pixels_is_read_in_parts(tmp_path: Path) -> None:
    """A tiled TIFF may be larger than what is decoded whole; other files may not."""
    content = pyvips.Image.black(3000, 2000).tiffsave_buffer(tile=True, compression="deflate")
    (tmp_path / "m.tif").write_bytes(content)
    mask = ImageMask(tmp_path / "m.tif", info_of(3000, 2000), None, LIMIT)
    assert not mask.tile(2900, 1900, 200, 200, 1.0).any()
    assert of_a_pair(content, None) == "too_large"
    (tmp_path / "m.png").write_bytes(saved(np.zeros((2000, 3000), bool)))
    with pytest.raises(BadInput, match=r"too_large: m\.png"):
        ImageMask(tmp_path / "m.png", info_of(3000, 2000), None, LIMIT)


def test_a_color_beyond_the_palette_is_no_background(tmp_path: Path) -> None:
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 3, 0, 0, 0)),
        (b"PLTE", bytes([0, 0, 0, 255, 255, 255])),
        (b"IDAT", zlib.compress(bytes([0, 0, 1, 5, 1] * 4))),
        (b"IEND", b""),
    ]
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(parts)
    assert both(tmp_path / "m.png", content, None, (4, 4)) == "unreadable"


# who is refused


def test_a_reject_names_the_mask_when_it_is_the_mask_that_is_defective(tmp_path: Path) -> None:
    masks = {
        "gray": saved(LABELS.astype(np.uint8)),
        "cut": saved(CELLS.astype(np.uint8) * 255, "BMP")[:-100],
        "size": saved(CELLS[:-1]),
        "frames": saved(CELLS, save_all=True, append_images=[Image.fromarray(~CELLS)]),
        "float": saved(np.full((HEIGHT, WIDTH), 0.5, np.float32), "TIFF"),
        "empty": b"",
        "image": saved(CELLS),  # here it is the image
    }
    for role in ("input", "groundtruth"):
        (tmp_path / "data/train" / role).mkdir(parents=True)
    for name, content in masks.items():
        (tmp_path / f"data/train/groundtruth/{name}.png").write_bytes(content)
        picture = saved(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
        (tmp_path / f"data/train/input/{name}.png").write_bytes(
            picture[: len(picture) // (2 if name == "image" else 1)]
        )
    store, output = open_store(str(tmp_path / "data")), open_store(str(tmp_path / "run"))
    pairs = list(find_pairs(store.list()).pairs)
    probed = [probe_pair(store, pair, LIMIT) for pair in pairs]
    rejects = [asdict(reject) for reject in probed if isinstance(reject, Reject)]
    tiles = TilesSettings(min_tissue=0.0)
    plan = plan_tiles([source for source in probed if isinstance(source, Source)], tiles, DataSettings(), seed=0)
    task = ShardTask(store, output, tiles, DataSettings(), "0" * 16)
    for shard in plan.shards:
        rejects += write_shard(task, shard).rejects
    named = {reject["slide_id"]: reject["uri"].split("/train/")[1] for reject in rejects}
    expected = {name: f"groundtruth/{name}.png" for name in masks if name not in ("empty", "image")}
    assert {name: uri for name, uri in named.items() if name != "empty"} == expected | {"image": "input/image.png"}
    (size,) = [reject["reason"] for reject in rejects if reject["slide_id"] == "size"]
    assert "groundtruth/size.png" in size
    assert "input/size.png" in size
