"""Checks of codecs and slide readers: a small picture is encoded and decoded by each of them."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from apacs_ray.doctor.finding import Finding

Rgb = npt.NDArray[np.uint8]
SIDE = 256  # px
MPP = 0.5
LOSS = 6.0  # gray values of mean difference that JPEG may cost a smooth picture
ADVICE = "reinstall what reads it: pip install --force-reinstall '{}'"


def picture() -> Rgb:
    """Make a smooth picture, (SIDE, SIDE, 3) uint8, different in each channel and direction."""
    ramp = np.linspace(20, 235, SIDE).round().astype(np.uint8)
    return np.stack(
        [np.tile(ramp, (SIDE, 1)), np.tile(ramp[:, None], (1, SIDE)), np.full((SIDE, SIDE), 128)], axis=2
    ).astype(np.uint8)


def compare(name: str, back: Rgb, loss: float, package: str) -> Finding:
    """Check that the decoded picture `back` differs by at most `loss` gray values on average."""
    rgb = picture()
    if back.shape != rgb.shape:
        return Finding(name, "failed", f"the picture came back as {back.shape}", ADVICE.format(package))
    difference = float(np.abs(back.astype(int) - rgb).mean())
    if difference > loss:
        message = f"the picture came back {difference:.1f} gray values off"
        return Finding(name, "failed", message, ADVICE.format(package))
    return Finding(name, "ok", "encodes and decodes")


def check_pillow() -> Iterator[Finding]:
    """Check JPEG, PNG and WebP, as tiles are stored."""
    from PIL import Image, features

    from apacs_ray.data.images import encode_image

    formats: tuple[tuple[Literal["jpeg", "png", "webp"], str], ...] = (
        ("jpeg", "jpg"),
        ("png", "zlib"),
        ("webp", "webp"),
    )
    for image_format, feature in formats:
        name = f"Pillow {image_format.upper()}"
        if not features.check(feature):
            yield Finding(name, "failed", "this Pillow was built without it", ADVICE.format("pillow"))
            continue
        content = encode_image(picture(), image_format, 95, "4:4:4")
        yield compare(
            name, np.asarray(Image.open(io.BytesIO(content))), LOSS if image_format == "jpeg" else 0, "pillow"
        )


def check_simplejpeg() -> Iterator[Finding]:
    """Check libjpeg-turbo, which decodes the JPEG tiles of slides."""
    import simplejpeg

    content = simplejpeg.encode_jpeg(picture(), quality=95, colorsubsampling="444")
    yield compare("simplejpeg", simplejpeg.decode_jpeg(content, strict=True), LOSS, "simplejpeg")


def check_vips() -> Iterator[Finding]:
    """Check libvips: JPEG in memory, and a TIFF pyramid through the engine that reads slides."""
    import pyvips

    from apacs_ray.slides.open import open_slide
    from apacs_ray.synthetic.write import write_as_tiff

    content = pyvips.Image.new_from_array(picture()).copy(interpretation="srgb").jpegsave_buffer(Q=95)
    yield compare("libvips JPEG", pyvips.Image.new_from_buffer(content, "").numpy(), LOSS, "pyvips[binary]")
    with tempfile.TemporaryDirectory(prefix="apacs_ray-doctor-") as folder:
        path = Path(folder) / "slide.tif"
        write_as_tiff(path, picture(), MPP)
        slide = open_slide(path, "vips")
        try:
            yield compare("libvips TIFF pyramid", slide.read(0, 0, 0, SIDE, SIDE), LOSS, "pyvips[binary]")
        finally:
            slide.close()


def check_openslide() -> Iterator[Finding]:
    """Check OpenSlide: a MIRAX slide."""
    from apacs_ray.slides.open import open_slide
    from apacs_ray.synthetic.write import write_as_mrxs

    with tempfile.TemporaryDirectory(prefix="apacs_ray-doctor-") as folder:
        path = Path(folder) / "slide.mrxs"
        write_as_mrxs(path, picture(), MPP)
        slide = open_slide(path, "openslide")
        try:
            yield compare("OpenSlide MIRAX", slide.read(0, 0, 0, SIDE, SIDE), LOSS, "openslide-bin")
        finally:
            slide.close()
