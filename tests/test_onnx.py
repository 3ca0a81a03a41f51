"""The ensemble as one ONNX graph gives the logits that torch gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from apacs_ray.models.ensemble import Ensemble
from apacs_ray.models.fusion import RefinedFusion, build_fusion
from apacs_ray.models.onnx import export_onnx
from apacs_ray.models.registry import build_member
from apacs_ray.models.spec import MEMBERS, FusionStart, Head, ModelSpec

WIDTH = 0.05


@pytest.mark.parametrize(("head", "members"), [("refined", MEMBERS), ("published", ("fcn32", "fcn8"))])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_graph_gives_torchs_logits(tmp_path: Path, head: Head, members: tuple) -> None:  # type: ignore[type-arg]
    torch.manual_seed(1)
    start = FusionStart("fitted", dict(zip(members, (0.2, 0.7, 0.1), strict=False)), 1.4, -0.8)
    fusion = build_fusion(head, members, width=WIDTH, start=start)
    if isinstance(fusion, RefinedFusion):
        for score in (*fusion.scores, fusion.fine_score):  # as after training
            torch.nn.init.normal_(score.weight, std=0.05)
    views = 4 if head == "refined" else 1
    spec = ModelSpec("fusion", "fusion", WIDTH, head=head, members=members, views=views)
    ensemble = Ensemble({name: build_member(name, width=WIDTH) for name in MEMBERS}, {"fusion": (spec, fusion)})
    export_onnx(ensemble, tmp_path / "e.onnx", height=120, width=88)
    session = onnxruntime.InferenceSession(tmp_path / "e.onnx")
    for count in (1, 3):
        image = torch.rand(count, 3, 120, 88)
        with torch.inference_mode():
            expected = ensemble(image)["fusion"].numpy()
        (found,) = session.run(None, {"image": image.numpy()})
        assert found.shape == (count, 1, 120, 88)
        assert np.abs(found - expected).max() < 1e-4
