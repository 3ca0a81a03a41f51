"""How much of a slide the networks must see around what is kept of it: exact for each way of combining them."""

from __future__ import annotations

from collections.abc import Sequence

from apacs_ray.inference.cores import ALIGN
from apacs_ray.models.registry import NETWORKS
from apacs_ray.models.spec import ModelSpec


def exact_halo(members: Sequence[str], fusion: ModelSpec | None = None) -> int:
    """Return the px around a core on which its logits may depend, rounded up to a multiple of `ALIGN`.

    Args:
        members: That are run.
        fusion: On top of them; its own reach begins where that of its members ends.

    Returns:
        256 for any of the paper's members, 480 for the refined fusion, 512 for the published one.
    """
    reach = max(NETWORKS[name].reach for name in members)
    if fusion is not None:
        reach += NETWORKS["fusion" if fusion.head == "refined" else "fusion_published"].reach
    return -(-reach // ALIGN) * ALIGN
