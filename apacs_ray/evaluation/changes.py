"""Where the fusion changed the best member's answer, for better and for worse: counts of pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from apacs_ray.evaluation.predictions import Mask

# by what the annotation says: the member was wrong there and the fusion is right, or the other way round
CHANGES = ("better_cell", "better_background", "worse_cell", "worse_background")
CHANGES_SCHEMA = pa.schema([(f"fusion_{name}", pa.int64()) for name in CHANGES])


def changes_row(fusion: Mask, member: Mask, truth: Mask) -> dict[str, int]:
    """Return a row of `CHANGES_SCHEMA` for masks (H, W) bool of a tile."""
    changed = fusion != member
    better, worse = changed & (fusion == truth), changed & (member == truth)
    parts = (better & truth, better & ~truth, worse & truth, worse & ~truth)
    return {f"fusion_{name}": int(np.count_nonzero(part)) for name, part in zip(CHANGES, parts, strict=True)}


def changes(table: pa.Table, member: str) -> dict[str, Any]:
    """Pool the counts of all tiles.

    Args:
        table: With the columns of `CHANGES_SCHEMA`.
        member: Whose answer was changed.

    Returns:
        `member`, its counts by name, and the numbers of `tiles_better` and `tiles_worse`: those where more pixels
        changed for better than for worse, and the other way round.
    """
    gain = gains(table)
    return {
        "member": member,
        **{name: int(table[f"fusion_{name}"].to_numpy().sum()) for name in CHANGES},
        "tiles_better": int((gain > 0).sum()),
        "tiles_worse": int((gain < 0).sum()),
    }


def gains(table: pa.Table) -> npt.NDArray[np.int64]:
    """Return of each tile the pixels that changed for better, less those for worse."""
    counts = [table[f"fusion_{name}"].to_numpy().astype(np.int64) for name in CHANGES]
    return np.asarray(counts[0] + counts[1] - counts[2] - counts[3])
