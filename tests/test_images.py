"""Decoding of good and bad files, and encoding of tiles."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from apacs_ray.data.image_header import probe_image
from apacs_ray.data.images import decode_image, encode_image, encode_mask
from apacs_ray.data.masks import decode_mask
from apacs_ray.errors import BadInput

LIMIT = 1_000_000
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # about the damage made here
RGB = np.random.default_rng(1).integers(0, 256, (24, 40, 3), np.uint8)
GRAY = RGB[:, :, 0]
CELL = GRAY > 128
FORMATS = ["JPEG", "PNG", "TIFF", "BMP"]


def written(pixels, image_format="PNG", **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    sink = io.BytesIO()
    image.save(sink, image_format, **options)
    return sink.getvalue()


def code(call, *arguments):
    with pytest.raises(BadInput) as caught:
        call(*arguments)
    assert caught.value.reason
    return caught.value.code


def probe(data, limit=LIMIT):
    return probe_image(io.BytesIO(data), limit)


# good images


@pytest.mark.parametrize("image_format", FORMATS)
def test_rgb(image_format):
    data = written(RGB, image_format, **({"quality": 95, "subsampling": 0} if image_format == "JPEG" else {}))
    assert probe(data) == (40, 24)
    decoded = decode_image(data, LIMIT)
    assert decoded.shape == (24, 40, 3)
    assert decoded.dtype == np.uint8
    assert decoded.flags.writeable
    assert np.abs(decoded.astype(int) - RGB).mean() < (4 if image_format == "JPEG" else 1e-9)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiff(compression):
    assert (decode_image(written(RGB, "TIFF", compression=compression), LIMIT) == RGB).all()


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_its_upper_byte(image_format):
    deep = np.random.default_rng(2).integers(0, 65536, (24, 40), np.uint16)
    decoded = decode_image(written(deep, image_format), LIMIT)
    assert (decoded == (deep >> 8)[:, :, None]).all()


def test_16_bit_color_keeps_its_upper_byte():
    deep = np.random.default_rng(2).integers(0, 65536, (5, 7, 3), np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert (decode_image(data, LIMIT) == deep >> 8).all()


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_16_bit_gray_of_a_camera_is_read_by_what_the_file_says_or_refused(bits):
    """A camera's picture is almost black when its bits are taken for all sixteen."""
    bright = (GRAY.astype(np.uint16) << (bits - 8)) | 3
    for image_format in ("PNG", "TIFF"):
        with pytest.raises(BadInput, match=r"too_dark: .*save it with 8 bits") as raised:
            decode_image(written(bright, image_format), LIMIT)
        assert raised.value.code == "too_dark"
        assert probe(written(bright, image_format)) == (40, 24)
    for top in ((1 << bits) - 1, int(bright.max())):  # what a channel can hold, or what this one holds
        tagged = written(bright, "TIFF", tiffinfo={281: top})
        assert (decode_image(tagged, LIMIT) == GRAY[:, :, None]).all()
    lies = written(bright, "TIFF", tiffinfo={281: 300})
    assert code(decode_image, lies, LIMIT) == "too_dark"
    plain = written(bright)
    sbit = struct.pack(">I4sBI", 1, b"sBIT", bits, zlib.crc32(b"sBIT" + bytes([bits])))
    assert (decode_image(plain[:33] + sbit + plain[33:], LIMIT) == GRAY[:, :, None]).all()
    assert (decode_image(written(GRAY.astype(np.uint16)), LIMIT) == GRAY[:, :, None]).all()  # bytes in 16 bits


def test_12_bit_samples_are_read_and_12_bit_colors_refused():
    rgb = io.BytesIO()
    tifffile.imwrite(rgb, RGB.astype(np.uint16) << 4, photometric="rgb", metadata=None)
    assert code(decode_image, rgb.getvalue(), LIMIT) == "too_dark"
    packed = io.BytesIO()
    tifffile.imwrite(packed, GRAY.astype(np.uint16) << 4, photometric="minisblack", bitspersample=12, metadata=None)
    assert (decode_image(packed.getvalue(), LIMIT) == GRAY[:, :, None]).all()
    full = io.BytesIO()
    tifffile.imwrite(full, RGB.astype(np.uint16) << 8, photometric="rgb", metadata=None)
    assert (decode_image(full.getvalue(), LIMIT) == RGB).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_0_is_white_where_the_file_says_so(dtype):
    deep = GRAY.astype(dtype) * (257 if dtype == np.uint16 else 1)
    sink = io.BytesIO()
    tifffile.imwrite(sink, deep, photometric="miniswhite", metadata=None)
    assert (decode_image(sink.getvalue(), LIMIT) == 255 - GRAY[:, :, None]).all()


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt"])
def test_a_png_with_long_texts_is_read(kind, place):
    text = b"slice " * 400_000
    body = {
        b"tEXt": b"Info\0" + text,
        b"zTXt": b"Info\0\0" + zlib.compress(text),
        b"iTXt": b"Info\0\1\0\0\0" + zlib.compress(text),
    }[kind]
    chunk = struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body))
    plain = written(RGB)
    at = 33 if place == "before" else len(plain) - 12
    data = plain[:at] + chunk * 40 + plain[at:]  # together more than Pillow takes
    assert probe(data) == (40, 24)
    assert (decode_image(data, LIMIT) == RGB).all()
    mask = written(CELL)
    at = 33 if place == "before" else len(mask) - 12
    assert (decode_mask(mask[:at] + chunk * 2 + mask[at:], LIMIT, None) == CELL).all()
    for missing in (5, 20, len(chunk) * 20):
        if place == "before":
            assert code(decode_image, data[: len(data) - len(plain) + 33 - missing], LIMIT) in (
                "truncated",
                "unreadable",
            )


def test_gray_palette_and_cmyk():
    assert (decode_image(written(GRAY), LIMIT) == GRAY[:, :, None]).all()
    assert (decode_image(written(CELL), LIMIT) == 255 * CELL[:, :, None]).all()
    palette = Image.fromarray(RGB).quantize(16)
    assert (decode_image(written(palette), LIMIT) == np.asarray(palette.convert("RGB"))).all()
    ink = Image.fromarray(RGB).convert("CMYK")
    assert (decode_image(written(ink, "TIFF"), LIMIT) == np.asarray(ink.convert("RGB"))).all()


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_transparency_is_laid_on_white(image_format):
    alpha = np.zeros((24, 40, 1), np.uint8)
    alpha[:, 20:] = 255
    for colors in (RGB, RGB[:, :, :1]):
        decoded = decode_image(written(np.concatenate([colors, alpha], axis=2), image_format), LIMIT)
        assert (decoded[:, :20] == 255).all()
        assert (decoded[:, 20:] == colors[:, 20:]).all()


def test_a_transparent_palette_color_is_white():
    palette = Image.fromarray(CELL.astype(np.uint8), "P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    decoded = decode_image(written(palette, transparency=0), LIMIT)
    assert (decoded == np.where(CELL[:, :, None], (200, 100, 50), 255)).all()


# color profiles


def swapped_profile():
    """A real RGB profile whose red and green primaries are swapped: (r, g, b) becomes (g, r, b) in sRGB."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * profile[131], 12)}
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    profile[red + 4 : red + 12], profile[green + 4 : green + 12] = (
        profile[green + 4 : green + 12],
        profile[red + 4 : red + 12],
    )
    return bytes(profile).replace(b"s\0R\0G\0B", b"s\0w\0a\0p").replace(b"sRGB b", b"swap b")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF"])
def test_a_profile_is_converted_to_srgb(image_format):
    flat = np.full((16, 16, 3), (200, 80, 40), np.uint8)
    decoded = decode_image(written(flat, image_format, icc_profile=swapped_profile()), LIMIT)
    assert np.abs(decoded.astype(int) - (80, 200, 40)).max() <= 4


def test_a_profile_of_more_than_a_megabyte_is_converted_to_srgb():
    profile = swapped_profile()
    large = profile + np.random.default_rng(0).bytes(3 << 20)  # what lies behind the table of its parts is not read
    large = struct.pack(">I", len(large)) + large[4:]
    body = b"swapped\0\0" + zlib.compress(large)
    chunk = struct.pack(">I4s", len(body), b"iCCP") + body + struct.pack(">I", zlib.crc32(b"iCCP" + body))
    plain = written(np.full((16, 16, 3), (200, 80, 40), np.uint8))
    decoded = decode_image(plain[:33] + chunk + plain[33:], LIMIT)
    assert np.abs(decoded.astype(int) - (80, 200, 40)).max() <= 4


def test_a_profile_with_transparency():
    flat = np.full((8, 8, 4), (200, 80, 40, 255), np.uint8)
    flat[0, :, 3] = 0
    decoded = decode_image(written(flat, icc_profile=swapped_profile()), LIMIT)
    assert (decoded[0] == 255).all()
    assert np.abs(decoded[1:].astype(int) - (80, 200, 40)).max() <= 2


def test_srgb_itself_and_useless_profiles_leave_the_pixels():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile", srgb[:200], swapped_profile()[:300]):
        assert (decode_image(written(RGB, icc_profile=profile), LIMIT) == RGB).all()
    meant_for_rgb = decode_image(written(GRAY, icc_profile=swapped_profile()), LIMIT)
    assert (meant_for_rgb == GRAY[:, :, None]).all()


# orientation


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF"])
def test_orientation_is_applied_to_images_and_masks(image_format, turn):
    exif = Image.Exif()
    exif[274] = turn
    options = {"quality": 95, "subsampling": 0} if image_format == "JPEG" else {}
    smooth = np.asarray(Image.fromarray(RGB[:6, :10]).resize((40, 24)))
    data = written(smooth, image_format, exif=exif, **options)
    upright = TURNS[turn](smooth)
    assert probe(data) == upright.shape[1::-1]
    decoded = decode_image(data, LIMIT)
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).mean() < (4 if image_format == "JPEG" else 1e-9)
    if image_format != "JPEG":
        mask = written(CELL, image_format, exif=exif)
        assert probe(mask) == upright.shape[1::-1]
        assert (decode_mask(mask, LIMIT, None) == TURNS[turn](CELL)).all()


def test_damaged_exif_leaves_the_pixels():
    for exif in (
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0junk",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0",
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = written(RGB, exif=exif)
            assert probe(data) == (40, 24)
            assert (decode_image(data, LIMIT) == RGB).all()


# masks


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "BMP"])
@pytest.mark.parametrize("high", [1, 255, "1-bit", "rgb", "rgb1", "palette", "rgba", "16-bit", "16-bit 1"])
def test_masks(image_format, high):
    byte = CELL.astype(np.uint8)
    palette = Image.fromarray(byte, "P")
    palette.putpalette([90, 0, 90, 0, 220, 0])
    pixels = {
        1: byte,
        255: byte * 255,
        "1-bit": CELL,
        "rgb": np.repeat(byte[:, :, None] * 255, 3, axis=2),
        "rgb1": np.repeat(byte[:, :, None], 3, axis=2),
        "palette": palette,
        "rgba": np.concatenate([np.repeat(byte[:, :, None] * 255, 3, axis=2), np.full((24, 40, 1), 255, np.uint8)], 2),
        "16-bit": byte.astype(np.uint16) * 65535,
        "16-bit 1": byte.astype(np.uint16),
    }[high]
    if image_format == "BMP" and str(high).startswith("16-bit"):
        pytest.skip("BMP has no 16-bit gray")
    data = written(pixels, image_format)
    assert probe(data) == (40, 24)
    for threshold in (None, 200):  # a threshold is for gray masks: it must not empty one with 0 and 1
        mask = decode_mask(data, LIMIT, threshold)
        assert mask.dtype == bool
        assert (mask == CELL).all()


@pytest.mark.parametrize("value", [0, 1, 255])
def test_masks_of_one_value(value):
    assert (decode_mask(written(np.full((9, 9), value, np.uint8)), LIMIT, None) == (value > 0)).all()


def test_the_lighter_palette_color_is_cell_in_either_order():
    for colors, lighter in (
        ([255, 255, 255, 0, 0, 0], 0),
        ([0, 0, 0, 128, 0, 0], 1),
        ([0, 0, 255, 0, 255, 0], 1),
    ):
        palette = Image.fromarray(CELL.astype(np.uint8), "P")
        palette.putpalette(colors)
        assert (decode_mask(written(palette), LIMIT, None) == (lighter == CELL)).all()
    empty = Image.fromarray(np.zeros((9, 9), np.uint8), "P")
    empty.putpalette([0, 0, 0, 128, 0, 0])
    assert not decode_mask(written(empty), LIMIT, None).any()


def test_gray_masks_need_a_threshold():
    gray = np.array([[0, 1, 255], [127, 128, 129]], np.uint8)
    for pixels in (
        gray,
        np.repeat(gray[:, :, None], 3, axis=2),
        np.array([[0, 1, 255]], np.uint8),
        np.full((3, 3), 7, np.uint8),
    ):
        assert code(decode_mask, written(pixels), LIMIT, None) == "grey_mask"
    assert (decode_mask(written(gray), LIMIT, 128) == (gray >= 128)).all()
    assert (decode_mask(written(gray.astype(np.uint16) * 257), LIMIT, 128) == (gray >= 128)).all()
    with pytest.raises(BadInput, match=r"6 gray values from 0 to 255.*data\.mask_threshold"):
        decode_mask(written(gray), LIMIT, None)


def test_colored_masks_are_gray_masks_by_luminance():
    colored = np.zeros((6, 6, 3), np.uint8)
    colored[:2], colored[2:4] = (250, 250, 0), (0, 0, 250)
    assert code(decode_mask, written(colored), LIMIT, None) == "grey_mask"
    assert (decode_mask(written(colored), LIMIT, 100)[:, 0] == [1, 1, 0, 0, 0, 0]).all()


def test_a_jpeg_mask_is_gray():
    disc = np.hypot(*np.mgrid[-20:20, -20:20]) < 12
    data = written((disc * 255).astype(np.uint8), "JPEG")
    assert code(decode_mask, data, LIMIT, None) == "grey_mask"
    assert (decode_mask(data, LIMIT, 128) == disc).mean() > 0.98


def test_a_transparent_mask_is_refused():
    clear = np.zeros((4, 4, 4), np.uint8)
    assert code(decode_mask, written(clear), LIMIT, None) == "unsupported_mode"


# bad files


def test_no_image():
    for call in (probe, lambda data: decode_image(data, LIMIT), lambda data: decode_mask(data, LIMIT, None)):
        assert code(call, b"") == "empty_file"
        for data in (
            b"II",
            b"just a text named .jpg",
            bytes(100),
            b"BM",
            b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff",
            b"GIF89a" + bytes(50),
        ):
            assert code(call, data) in ("unreadable", "truncated")


SAVED = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("BMP", {}),
]


@pytest.mark.parametrize(("image_format", "options"), SAVED)
def test_a_cut_file_is_never_an_image_with_missing_rows(image_format, options):
    noise = np.random.default_rng(3).integers(0, 256, (120, 90, 3), np.uint8)
    data = written(noise, image_format, **options)
    whole = decode_image(data, LIMIT)
    for share in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98):
        assert code(decode_image, data[: int(len(data) * share)], LIMIT) in ("truncated", "unreadable")
    for missing in range(1, 30):
        try:
            decoded = decode_image(data[:-missing], LIMIT)
        except BadInput:
            continue
        assert (decoded == whole).all()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "BMP"])
def test_a_file_cut_in_its_pixels_is_called_truncated(image_format):
    data = written(np.random.default_rng(3).integers(0, 256, (120, 90, 3), np.uint8), image_format)
    assert code(decode_image, data[: len(data) // 2], LIMIT) == "truncated"


SMALL = [written(RGB, name, **options) for name, options in SAVED]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SMALL),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=6),
    st.booleans(),
)
def test_damage_is_bad_input_or_pixels_of_the_probed_size(data, flips, in_header):
    damaged = bytearray(data)
    for place, flip in flips:
        damaged[int(place * min(len(data), 700 if in_header else len(data)))] ^= flip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            width, height = probe(bytes(damaged))
            decoded = decode_image(bytes(damaged), LIMIT)
            decode_mask(bytes(damaged), LIMIT, 128)
        except BadInput:
            return
    assert decoded.shape == (height, width, 3)


def test_a_bomb_is_refused_by_its_header_without_a_warning():
    data = written(Image.new("1", (30_000, 30_000)))
    assert len(data) < 200_000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in (
            probe,
            lambda data: decode_image(data, LIMIT),
            lambda data: decode_mask(data, LIMIT, None),
        ):
            assert code(call, data) == "too_large"
        assert probe(data, 900_000_000) == (30_000, 30_000)  # beyond Pillow's own limit
        assert code(probe, data, 899_999_999) == "too_large"


def test_a_small_image_in_enormous_tiles_is_a_bomb_too():
    data = written(RGB, "TIFF", compression="raw")
    entries = struct.unpack_from("<H", data, struct.unpack_from("<I", data, 4)[0])[0]
    start = struct.unpack_from("<I", data, 4)[0]
    ifd = bytearray(data)
    ends = []
    for number in range(entries):  # strips become tiles of 30000 x 30000 px
        at = start + 2 + 12 * number
        tag = struct.unpack_from("<H", ifd, at)[0]
        if tag == 278:  # RowsPerStrip
            struct.pack_into("<HHII", ifd, at, 322, 4, 1, 30_000)
            ends.append(tag)
        elif tag == 284:  # PlanarConfiguration
            struct.pack_into("<HHII", ifd, at, 323, 4, 1, 30_000)
            ends.append(tag)
        elif tag == 273:
            struct.pack_into("<H", ifd, at, 324)
    assert len(ends) == 2
    assert code(probe, bytes(ifd)) == "too_large"


def test_several_frames():
    other = Image.fromarray(255 - RGB)
    assert code(probe, written(RGB, "TIFF", save_all=True, append_images=[other])) == "multiple_frames"
    assert code(probe, written(RGB, "PNG", save_all=True, append_images=[other])) == "multiple_frames"


def test_unsupported_modes():
    assert code(probe, written(np.zeros((5, 5), np.float32), "TIFF")) == "unsupported_mode"
    assert code(probe, written(np.zeros((5, 5), np.int32), "TIFF")) == "unsupported_mode"
    assert code(probe, written(Image.fromarray(RGB).convert("LAB"), "TIFF")) == "unsupported_mode"
    doubles = bytearray(written(np.zeros((5, 5), np.float32), "TIFF"))
    start = struct.unpack_from("<I", doubles, 4)[0]
    for at in range(start + 2, start + 2 + 12 * doubles[start], 12):
        if struct.unpack_from("<H", doubles, at)[0] == 339:
            struct.pack_into("<H", doubles, at + 8, 6)  # SampleFormat: complex
    assert code(probe, bytes(doubles)) == "unsupported_mode"


# the stream under probe_image


class Remote(io.BytesIO):
    """As an object store's reader: an error beyond the end, and it may fail."""

    fails = False
    fetched = 0

    def read(self, size=-1):
        if self.fails:
            raise OSError("truncated: connection reset")
        if self.tell() > len(self.getbuffer()):
            raise OSError("read past the end")
        content = super().read(size)
        self.fetched += len(content)
        return content


@pytest.mark.parametrize(("image_format", "options"), SAVED)
def test_probe_reads_little_and_lets_trouble_of_the_store_pass(image_format, options):
    big = np.random.default_rng(5).integers(0, 256, (700, 900, 3), np.uint8)
    data = written(big, image_format, **options)
    remote = Remote(data)
    assert probe_image(remote, LIMIT) == (900, 700)
    assert remote.fetched <= 3 * 65536 < len(data)
    remote.fails = True
    with pytest.raises(OSError, match="connection reset"):
        probe_image(remote, LIMIT)


def test_a_header_that_points_past_the_end_is_the_files_fault():
    data = written(RGB, "TIFF", compression="tiff_lzw")
    beyond = data[:4] + struct.pack("<I", len(data) + 1000) + data[8:]
    assert code(lambda content: probe_image(Remote(content), LIMIT), beyond) in ("unreadable", "truncated")


# encoding


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_lossless_tiles(image_format):
    view = RGB[3:20, 5:31]
    data = encode_image(view, image_format, 95, "4:4:4")
    assert (np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) == view).all()
    assert data == encode_image(view.copy(), image_format, 95, "4:4:4")


def test_jpeg_tiles():
    fine = encode_image(RGB, "jpeg", 95, "4:4:4")
    assert fine == encode_image(RGB, "jpeg", 95, "4:4:4")
    assert np.abs(decode_image(fine, LIMIT).astype(int) - RGB).mean() < 4
    assert len(encode_image(RGB, "jpeg", 50, "4:4:4")) < len(fine)
    layers = {
        name: Image.open(io.BytesIO(encode_image(RGB, "jpeg", 90, name))).layer[0][1:3]
        for name in ("4:4:4", "4:2:2", "4:2:0")
    }
    assert layers == {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2)}


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 9))
def test_masks_come_back(width, height, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    data = encode_mask(mask)
    assert Image.open(io.BytesIO(data)).mode == "1"
    assert (decode_mask(data, LIMIT, None) == mask).all()
    assert data == encode_mask(mask.copy())


def test_real_cells(real_cells):
    images = sorted(real_cells.glob("*_Input/*.jpg"))
    assert len(images) == 100
    for path in images[::7]:
        mask_path = path.parent.with_name(path.parent.name.replace("Input", "GroundTruth")) / f"{path.stem}.png"
        data = path.read_bytes()
        assert probe(data) == (300, 300)
        assert decode_image(data, LIMIT).shape == (300, 300, 3)
        assert 0.05 < decode_mask(mask_path.read_bytes(), LIMIT, None).mean() < 0.5


def test_damage_within_a_jpeg_stream_is_no_picture() -> None:
    sink = io.BytesIO()
    rng = np.random.default_rng(3)
    smooth = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((320, 240))
    smooth.save(sink, "JPEG", quality=90)
    sound = sink.getvalue()
    assert decode_image(sound, 1 << 20).shape == (240, 320, 3)
    assert decode_image(sound[:-2] + b"\x11\x22" + sound[-2:], 1 << 20).shape == (240, 320, 3)  # as some cameras write
    refused = 0
    for _ in range(40):
        spoiled = bytearray(sound)
        at = int(rng.integers(700, len(sound) - 60))
        spoiled[at : at + 40] = bytes(40) if at % 2 else rng.bytes(40)
        try:
            decode_image(bytes(spoiled), 1 << 20)
        except BadInput as defect:
            refused += defect.code in ("unreadable", "truncated")
    assert refused >= 10  # Pillow alone refuses 3; of the others nothing says that they are wrong
