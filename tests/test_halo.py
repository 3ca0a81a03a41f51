"""What an output pixel of each network depends on, found by gradient, and the halo of exact tiling that follows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apacs_ray.inference.cores import ALIGN
from apacs_ray.inference.halo import exact_halo
from apacs_ray.models.fusion import build_fusion
from apacs_ray.models.registry import MEMBERS, NETWORKS, build_member
from apacs_ray.models.spec import Head, ModelSpec

WIDTH = 0.01
FIRST = 256  # px, the output pixels looked at: all of a period from here on
LENGTH = 544  # px: room for 256 on either side of them


@pytest.fixture
def average_pooling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pooling passes a gradient to all of its inputs; convolutions add up what is there and nothing else."""

    def average(x: Tensor, size: int, stride: int, *_: object, ceil_mode: bool = False, **__: object) -> Tensor:
        return F.avg_pool2d(x, size, stride, ceil_mode=ceil_mode)

    monkeypatch.setattr(F, "max_pool2d", average)
    with torch.backends.mkldnn.flags(enabled=False):  # its fast algorithms leave rounding errors outside
        yield


def build(name: str) -> nn.Module:
    """The network with constant positive weights, so that no part of a gradient cancels another."""
    if name in MEMBERS:
        network = build_member(name, width=WIDTH)
    else:
        network = build_fusion("refined" if name == "fusion" else "published", MEMBERS, width=WIDTH)
    with torch.no_grad():
        for weights in network.parameters():
            weights.fill_(1.0 if weights.ndim == 1 else 1.0 / weights[0].numel())
    return network.eval()


def reaches(name: str, axis: int, offsets: Sequence[int]) -> list[int]:
    """The px to the furthest input along an axis (2 down, 3 across), of output pixels from `FIRST` on."""
    channels = 3 if name in MEMBERS else len(MEMBERS) + 3
    shape = [1, channels, ALIGN, ALIGN]
    shape[axis] = LENGTH
    image = torch.full(shape, 0.5, requires_grad=True)
    along = build(name)(image).movedim(axis, -1)[0, 0, ALIGN // 2]
    found = []
    for place in (FIRST + offset for offset in offsets):
        (gradient,) = torch.autograd.grad(along[place], image, retain_graph=True)
        seen = gradient.movedim(axis, -1).flatten(0, -2).ne(0).any(dim=0).nonzero()
        found.append(max(place - int(seen.min()), int(seen.max()) - place))
    return found


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("name", NETWORKS)
def test_reach_is_what_gradients_say(average_pooling: None, name: str) -> None:
    down = reaches(name, 2, range(ALIGN))
    assert max(down) == NETWORKS[name].reach
    ends = (0, down.index(max(down)), ALIGN - 1)
    assert reaches(name, 3, ends) == [down[offset] for offset in ends]


@pytest.mark.parametrize(
    ("members", "head", "halo"),
    [
        *(((name,), None, 256) for name in MEMBERS),
        (MEMBERS, None, 256),
        (MEMBERS, "refined", 480),
        (MEMBERS, "published", 512),
    ],
)
def test_halo_covers_the_reach_of_all(members: tuple[str, ...], head: Head | None, halo: int) -> None:
    fusion = None if head is None else ModelSpec("fusion", "fusion", width=WIDTH, head=head)
    assert exact_halo(members, fusion) == halo
