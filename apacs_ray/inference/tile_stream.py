"""Tiles through the networks: decoded ahead and finished behind, in threads beside the arithmetic.

The networks run in the caller's thread, and see the tiles in their order. What waits is bounded, so memory is flat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from apacs_ray.data.ahead import ahead
from apacs_ray.data.shard_rows import Row
from apacs_ray.training.dataset import decode_pixels

if TYPE_CHECKING:
    from apacs_ray.inference.predictor import Predictor

R = TypeVar("R")
Logits = Mapping[str, npt.NDArray[np.float32]]  # network -> (H, W) float32


@dataclass(frozen=True)
class TileStream:
    """How tiles pass the networks.

    Attributes:
        threads: That decode, and as many that finish.
        batch: Tiles of one size, at most, that pass the networks together; 1 where equal bits are wanted.
        views: Of each tile, over which logits are averaged, as `Predictor.batch` takes it.
    """

    threads: int = 1
    batch: int = 1
    views: int = 1

    def run(
        self,
        rows: Iterable[Row],
        predictor_of: Callable[[Row], Predictor],
        finish: Callable[[Row, npt.NDArray[np.uint8], Logits], R],
    ) -> Iterator[R]:
        """Run networks on tiles.

        Args:
            rows: Of tiles: `image` as it is stored, and whatever `finish` wants.
            predictor_of: The networks that see a tile, told by its row; called in the caller's thread.
            finish: From a row, its pixels (H, W, 3) uint8 and what the networks say, to the result; called in threads.

        Yields:
            A result for each row, in order. What fails is raised in its turn.
        """

        def decode(row: Row) -> tuple[Row, npt.NDArray[np.uint8]]:
            return row, decode_pixels(row["image"])

        def predicted() -> Iterator[tuple[Row, npt.NDArray[np.uint8], Logits]]:
            decoded = ahead(decode, rows, self.threads, self.threads + self.batch - 1)
            told = ((predictor_of(row), row, rgb) for row, rgb in decoded)
            for (predictor, _), same in groupby(told, lambda tile: (tile[0], tile[2].shape)):
                while tiles := list(islice(same, self.batch)):
                    said = predictor.logits_of([rgb for *_, rgb in tiles], self.views)
                    for (_, row, rgb), logits in zip(tiles, said, strict=True):
                        yield row, rgb, logits

        yield from ahead(lambda tile: finish(*tile), predicted(), self.threads, self.threads)
