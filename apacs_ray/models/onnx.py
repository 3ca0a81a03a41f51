"""The whole ensemble as one ONNX graph: RGB in, the fusion's logits out."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from apacs_ray.errors import ApacsError
from apacs_ray.models.ensemble import Ensemble

LARGEST = 1 << 30  # bytes of weights in the file itself; beyond, beside it (a protobuf holds 2 GiB)


class _Fused(nn.Module):
    """The members, and one fusion of what they say."""

    def __init__(self, ensemble: Ensemble, fusion: str) -> None:
        super().__init__()
        self.ensemble = ensemble
        self._fusion = fusion

    def forward(self, image: Tensor) -> Tensor:
        logits: dict[str, Tensor] = self.ensemble(image)
        return logits[self._fusion]


def export_onnx(ensemble: Ensemble, path: Path, *, height: int, width: int, fusion: str = "fusion") -> None:
    """Write `path`: input `image` (N, 3, height, width) float32 in 0..1, output `logits` (N, 1, height, width) float32.

    N is free; height and width are fixed, since padding and cropping depend on them. A pixel is cell where the logit
    is at least 0.

    Raises:
        ApacsError: The packages of the extra `onnx` are missing.
    """
    try:
        import onnxscript  # noqa: F401 - torch wants it, and says so in many lines
    except ImportError as error:
        raise ApacsError("exporting needs more packages: pip install '.[onnx]'") from error
    graph = _Fused(ensemble, fusion).eval().cpu()
    sample = torch.zeros(2, 3, height, width)
    program = torch.onnx.export(
        graph,
        (sample,),
        dynamo=True,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    if program is None:
        raise ApacsError("torch exported nothing")
    size = sum(value.numel() * value.element_size() for value in graph.state_dict().values())
    program.save(str(path), external_data=size > LARGEST)
