"""From stored tiles to training samples: read, decode, augment. No Ray: its tasks and single processes call this.

With heatmaps, the stored member probabilities come first and RGB after them, as the fusion network expects.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from apacs_ray.config.settings import MemberName
from apacs_ray.data.shards import Place, TileIndex, read_rows
from apacs_ray.storage import Store
from apacs_ray.training.batch import Move, Sample, augment
from apacs_ray.training.sampler import SampleRef

STORED = ("PNG", "WEBP")  # of the many formats of Pillow, some of which start other programs
JPEG = b"\xff\xd8"
HEATMAP_ORDER: tuple[MemberName, ...] = ("fcn32", "fcn16", "fcn8")  # channels of a stored heatmap picture
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Heatmaps:
    """Stored heatmaps to put before RGB: whose, and the mark of the stage that wrote them."""

    members: tuple[MemberName, ...]
    fingerprint: str

    def path(self, tile_path: str) -> str:
        """The heatmap shard beside a tile shard: same split, same number, same rows."""
        folder, _, name = tile_path.rpartition("/")
        number = name.rpartition("-")[2]
        return f"heatmaps/{folder.partition('/')[2]}/{self.fingerprint[:8]}-{number}"


@dataclass(frozen=True)
class Crop:
    """What augmentation does to a training tile; validation tiles stay whole."""

    crop: int
    flips: bool
    turns: bool


@dataclass(frozen=True)
class Feed:
    """How samples are made from tiles; small enough to travel with every task."""

    store: Store
    heatmaps: Heatmaps | None
    augmentation: Crop

    def load(self, wanted: Sequence[tuple[SampleRef, Place]]) -> list[Sample]:
        """Samples in the order wanted; each Parquet row group is read once."""
        stored = self._read([place for _, place in wanted])
        return [self._sample(ref, place, tile) for (ref, place), tile in zip(wanted, stored, strict=True)]

    def sample(self, ref: SampleRef, place: Place, inputs: Pixels, mask: Pixels) -> Sample:
        """One sample from decoded pixels, augmented in training."""
        if ref.phase == "train":
            inputs, mask = augment(inputs, mask, ref.seed, **vars(self.augmentation))
        return Sample(ref, place.tile_id, inputs, mask)

    def decode(self, place: Place) -> tuple[Pixels, Pixels]:
        """Inputs (H, W, C) uint8 and mask (H, W) uint8 in {0, 1} of a tile."""
        (tile,) = self._read([place])
        return self._inputs(tile), decode_mask(tile["mask"])

    def _sample(self, ref: SampleRef, place: Place, tile: Mapping[str, bytes]) -> Sample:
        """One sample from encoded pixels.

        When it is made the tile's own pixels are gone, so that the allocator gives their memory to the next tile: new
        pages, which the kernel clears first, would cost half as much as decoding.
        """
        inputs = self._inputs(tile)
        if ref.phase != "train":
            return Sample(ref, place.tile_id, inputs, decode_mask(tile["mask"]))
        move = Move.draw(ref.seed, inputs.shape[:2], **vars(self.augmentation))
        return Sample(ref, place.tile_id, move.of(inputs), move.turned(decode_mask(tile["mask"], move.box)))

    def _read(self, places: Sequence[Place]) -> list[dict[str, bytes]]:
        """The encoded pictures of each tile: image, mask and, where they are wanted, heatmaps."""
        tiles = read_rows(self.store, [(at.path, at.group, at.row) for at in places], ["image", "mask"])
        if self.heatmaps is None:
            return tiles
        beside = [(self.heatmaps.path(at.path), at.group, at.row) for at in places]
        stored = read_rows(self.store, beside, ["heatmaps"])
        return [tile | heatmaps for tile, heatmaps in zip(tiles, stored, strict=True)]

    def _inputs(self, tile: Mapping[str, bytes]) -> Pixels:
        rgb = decode_pixels(tile["image"])
        if self.heatmaps is None:
            return rgb
        channels = [HEATMAP_ORDER.index(member) for member in self.heatmaps.members]
        return np.concatenate([decode_pixels(tile["heatmaps"])[:, :, channels], rgb], axis=2)


def decode_mask(content: bytes, window: tuple[int, int, int, int] | None = None) -> Pixels:
    """A mask that ingest encoded, or its window (left, top, right, bottom): (H, W) uint8 in {0, 1}."""
    picture = Image.open(io.BytesIO(content), formats=STORED).crop(window)
    # as Pillow holds it, a byte a pixel: as an array it would go through bits and back
    values: Pixels = np.frombuffer(picture.tobytes("raw", "L"), np.uint8) & np.uint8(1)
    return values.reshape(picture.height, picture.width)


Indices = Mapping[str, TileIndex]


def in_memory(feed: Feed, indices: Indices, refs: Iterable[SampleRef]) -> Iterator[Sample]:
    """Samples one by one in this process, each tile decoded once and kept: for data that fits in memory."""
    kept: dict[Place, tuple[Pixels, Pixels]] = {}
    for ref in refs:
        place = indices[ref.phase].place(ref.row)
        if place not in kept:
            kept[place] = feed.decode(place)
        yield feed.sample(ref, place, *kept[place])


def one_by_one(feed: Feed, indices: Indices, refs: Iterable[SampleRef]) -> Iterator[Sample]:
    """Samples in this process, nothing kept: for data of any size."""
    for ref in refs:
        yield feed.load([(ref, indices[ref.phase].place(ref.row))])[0]


def decode_pixels(content: bytes) -> Pixels:
    """A picture that ingest or the heatmap stage encoded, as it is: (H, W, 3) RGB or (H, W) of a 1-bit mask.

    simplejpeg and Pillow both decode by libjpeg-turbo, to the same pixels; simplejpeg takes two thirds of the time.
    """
    if content.startswith(JPEG):
        return np.asarray(simplejpeg.decode_jpeg(content))
    return np.asarray(Image.open(io.BytesIO(content), formats=STORED))


def encode_heatmaps(probabilities: Mapping[str, npt.NDArray[np.float32]]) -> bytes:
    """Probabilities (H, W) in 0..1 of the three members as one RGB PNG of uint8."""
    picture = np.stack([np.rint(probabilities[name] * 255).astype(np.uint8) for name in HEATMAP_ORDER], axis=2)
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "PNG", compress_level=1)
    return sink.getvalue()
