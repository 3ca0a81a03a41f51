"""Stored heatmaps against live members, and the folds of out-of-fold heatmaps."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apacs_ray.data.shards import TileIndex
from apacs_ray.distributed.heatmaps import encode_heatmaps
from apacs_ray.models.ensemble import Ensemble
from apacs_ray.models.fusion import build_fusion, fuse
from apacs_ray.models.registry import MEMBERS, build_member
from apacs_ray.models.spec import ModelSpec
from apacs_ray.stages.heatmaps import assign_folds
from apacs_ray.synthetic.slide import render_region, slide_specs
from apacs_ray.training.dataset import decode_pixels


def test_stored_heatmaps_say_what_live_members_say() -> None:
    """uint8 moves a probability by half a step, and what the fusion makes of it by little."""
    torch.manual_seed(3)
    width = 0.05
    fusion = build_fusion("refined", MEMBERS, width=width, dropout=0.0).eval()
    for score in (*fusion.scores, fusion.fine_score):  # as after training: every scale says something
        torch.nn.init.normal_(score.weight, std=0.05)
    members = {name: build_member(name, width=width) for name in MEMBERS}
    ensemble = Ensemble(members, {"fusion": (ModelSpec("fusion", "fusion", width), fusion)})
    rgb, _ = render_region(slide_specs(1, 300, 300, train=1, test=1)[0], 20, 20, 200, 180)
    image = torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        logits = ensemble(image)
        live = {name: torch.sigmoid(logits[name])[0, 0].numpy() for name in MEMBERS}
        stored = decode_pixels(encode_heatmaps(live))
        for channel, name in enumerate(MEMBERS):
            assert np.abs(stored[:, :, channel] / 255 - live[name]).max() <= 0.5 / 255 + 1e-6
        heatmaps = torch.from_numpy(stored.copy()).permute(2, 0, 1)[None].float() / 255
        cached = torch.sigmoid(fuse(fusion, heatmaps, image))
    fused = torch.sigmoid(logits["fusion"])
    assert float(fused.std()) > 0.05
    assert float((cached - fused).abs().max()) < 0.06  # near 0 and 1, where half a step moves a logit most
    assert float((cached - fused).abs().mean()) < 0.003
    assert float(((cached >= 0.5) != (fused >= 0.5)).float().mean()) < 0.005


@settings(max_examples=60, deadline=None)
@given(slides=st.lists(st.integers(0, 6), min_size=4, max_size=60), folds=st.integers(2, 4), seed=st.integers(0, 99))
def test_folds_share_no_slide_and_are_even(slides: list[int], folds: int, seed: int) -> None:
    names = [f"slide-{number}" for number in slides]
    nowhere = np.zeros(len(slides), np.int32)
    tiles = tuple(f"t{number}" for number in range(len(slides)))
    index = TileIndex(("a",), nowhere, nowhere, nowhere, tiles, tuple(names), 1, np.ones(len(tiles), np.float32))
    fold_of = assign_folds(index, folds, seed)
    assert set(fold_of.values()) == set(range(1, folds + 1))
    if len(set(names)) >= folds:
        for name in set(names):
            assert len({fold_of[tile] for tile, slide in zip(index.tile_ids, names, strict=True) if slide == name}) == 1
    else:
        sizes = Counter(fold_of.values()).values()
        assert max(sizes) - min(sizes) <= 1
