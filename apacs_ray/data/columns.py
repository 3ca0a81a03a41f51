"""Pixels in Arrow columns, read where they lie."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def bytes_in(column: pa.ChunkedArray) -> Iterator[npt.NDArray[np.uint8] | None]:
    """Yield the values of a column of bytes without a copy, which pyarrow makes of each of its scalars.

    Args:
        column: `binary` or `large_binary`.

    Yields:
        Of each row a (bytes,) uint8 array that cannot be written to, None for null.
    """
    for chunk in column.chunks:
        _, offsets, values = chunk.buffers()
        ends = np.frombuffer(offsets, np.int64 if pa.types.is_large_binary(chunk.type) else np.int32)[chunk.offset :]
        data = np.frombuffer(values or b"", np.uint8)
        for number, valid in enumerate(chunk.is_valid().to_pylist()):
            yield data[ends[number] : ends[number + 1]] if valid else None
