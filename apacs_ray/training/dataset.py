"""The data set of a training: from stored tiles to samples by reading, decoding and augmentation, without Ray.

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

from apacs_ray.config.training_settings import MemberName
from apacs_ray.data.ahead import ahead
from apacs_ray.data.shard_rows import read_rows
from apacs_ray.data.shards import Place, TileIndex
from apacs_ray.models.registry import MEMBERS
from apacs_ray.storage import Store
from apacs_ray.training.augment import Augmentation, Pixels, augment
from apacs_ray.training.batch import Sample
from apacs_ray.training.sampler import SampleRef

STORED = ("PNG", "WEBP")  # of the many formats of Pillow, some of which start other programs
JPEG = b"\xff\xd8"


@dataclass(frozen=True)
class Heatmaps:
    """Stored heatmaps to put before RGB: whose, and the fingerprint of the stage that wrote them."""

    members: tuple[MemberName, ...]
    fingerprint: str

    def path(self, tile_path: str) -> str:
        """Return the heatmap shard beside a tile shard: same split, same number, same rows."""
        folder, _, name = tile_path.rpartition("/")
        number = name.rpartition("-")[2]
        return f"heatmaps/{folder.partition('/')[2]}/{self.fingerprint[:8]}-{number}"


@dataclass(frozen=True)
class TileDataset:
    """Stored tiles as training samples, with heatmaps where given; small, as it travels with every task."""

    store: Store
    heatmaps: Heatmaps | None
    augmentation: Augmentation

    def load(self, wanted: Sequence[tuple[SampleRef, Place]]) -> list[Sample]:
        """Return samples in the order of `wanted`; each row group is read once, others while one is decoded."""
        stored = self._read([place for _, place in wanted])
        return [self._sample(ref, place, tile) for (ref, place), tile in zip(wanted, stored, strict=True)]

    def sample(self, ref: SampleRef, place: Place, inputs: Pixels, mask: Pixels) -> Sample:
        """Return one sample from decoded pixels, augmented in training."""
        if ref.phase == "train":
            inputs, mask = augment(inputs, mask, ref.seed, self.augmentation)
        return Sample(ref, place.tile_id, inputs, mask)

    def decode(self, place: Place) -> tuple[Pixels, Pixels]:
        """Return inputs (H, W, C) uint8 and mask (H, W) uint8 in {0, 1} of a tile."""
        (tile,) = self._read([place])
        return self._inputs(tile), decode_tile_mask(tile["mask"])

    def _sample(self, ref: SampleRef, place: Place, tile: Mapping[str, bytes]) -> Sample:
        """Make one sample from encoded pixels.

        When it is made the tile's own pixels are gone, so that the allocator gives their memory to the next tile: new
        pages, which the kernel clears first, would cost half as much as decoding.

        Returns:
            The sample, augmented in training.
        """
        inputs = self._inputs(tile)
        if ref.phase != "train":
            return Sample(ref, place.tile_id, inputs, decode_tile_mask(tile["mask"]))
        transform = self.augmentation.draw(ref.seed, inputs.shape[:2])
        mask = transform.flip_and_turn(decode_tile_mask(tile["mask"], transform.box))
        return Sample(ref, place.tile_id, transform.apply(inputs), mask)

    def _read(self, places: Sequence[Place]) -> Iterator[dict[str, bytes]]:
        """The encoded pictures of each tile: image, mask and, where they are wanted, heatmaps."""
        beside = None if self.heatmaps is None else (self.heatmaps.path, ["heatmaps"])
        return read_rows(self.store, [(at.path, at.group, at.row) for at in places], ["image", "mask"], beside)

    def _inputs(self, tile: Mapping[str, bytes]) -> Pixels:
        rgb = decode_pixels(tile["image"])
        if self.heatmaps is None:
            return rgb
        channels = [MEMBERS.index(member) for member in self.heatmaps.members]
        return np.concatenate([decode_pixels(tile["heatmaps"])[:, :, channels], rgb], axis=2)


def decode_tile_mask(content: bytes, window: tuple[int, int, int, int] | None = None) -> Pixels:
    """Return a mask that ingest encoded, or its window (left, top, right, bottom), as (H, W) uint8 in {0, 1}."""
    picture = Image.open(io.BytesIO(content), formats=STORED).crop(window)
    # as Pillow holds it, a byte a pixel: as an array it would go through bits and back
    values: Pixels = np.frombuffer(picture.tobytes("raw", "L"), np.uint8) & np.uint8(1)
    return values.reshape(picture.height, picture.width)


Indices = Mapping[str, TileIndex]


def in_memory(dataset: TileDataset, indices: Indices, refs: Iterable[SampleRef]) -> Iterator[Sample]:
    """Yield samples in this process; each tile is decoded once and kept, for data that fits in memory."""
    decoded: dict[Place, tuple[Pixels, Pixels]] = {}
    for ref in refs:
        place = indices[ref.phase].place(ref.row)
        if place not in decoded:
            decoded[place] = dataset.decode(place)
        yield dataset.sample(ref, place, *decoded[place])


def one_by_one(dataset: TileDataset, indices: Indices, refs: Iterable[SampleRef], threads: int = 0) -> Iterator[Sample]:
    """Yield samples in this process and keep nothing, for data of any size.

    Args:
        dataset: What is read.
        indices: Where its tiles are, by phase.
        refs: Which samples, in order.
        threads: That read ahead, two samples each; 0: each is read when it is asked for. Decoding leaves Python's lock
            alone.

    Yields:
        A sample for each of `refs`.
    """

    def load(ref: SampleRef) -> Sample:
        return dataset.load([(ref, indices[ref.phase].place(ref.row))])[0]

    if not threads:
        yield from map(load, refs)
        return
    yield from ahead(load, refs, threads, 2 * threads)


def decode_pixels(content: bytes) -> Pixels:
    """Return a picture that ingest or the heatmap stage encoded: (H, W, 3) uint8 RGB, or (H, W) of a 1-bit mask.

    simplejpeg and Pillow both decode by libjpeg-turbo, to the same pixels; simplejpeg takes two thirds of the time.

    Returns:
        An array that may be read-only.
    """
    if content.startswith(JPEG):
        return np.asarray(simplejpeg.decode_jpeg(content))
    return np.asarray(Image.open(io.BytesIO(content), formats=STORED))


def encode_heatmaps(probabilities: Mapping[str, npt.NDArray[np.float32]]) -> bytes:
    """Return probabilities (H, W) in 0..1 of the members as one PNG of uint8: a channel each, in registry order."""
    picture = np.empty((*probabilities[MEMBERS[0]].shape, len(MEMBERS)), np.uint8)
    for channel, name in enumerate(MEMBERS):
        picture[:, :, channel] = np.rint(probabilities[name] * 255)
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "PNG", compress_level=1)
    return sink.getvalue()
