"""Tissue on small pictures of slides: cells count; pen, bubbles, coverslip edges and dust do not."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from apacs_ray.data.synthetic import render, slide_specs
from apacs_ray.data.tiles import Box
from apacs_ray.slides.tissue import Tissue, tissue_mask

GLASS = (240, 240, 236)


@pytest.fixture
def glass() -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 1.2, (400, 600, 3))
    return Image.fromarray(np.clip(np.array(GLASS) + noise, 0, 255).astype(np.uint8))


def drawn(picture: Image.Image) -> np.ndarray:
    return tissue_mask(np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6))))


def test_bare_glass_is_no_tissue(glass: Image.Image) -> None:
    assert drawn(glass).mean() < 0.002


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cells_of_a_smear_are_found(seed: int) -> None:
    """At the scale that is looked at: 8 um per px."""
    for spec in slide_specs(seed, 1600, 1600, mpp=1.0)[:2]:
        rgb, cells = render(spec)
        small = np.asarray(Image.fromarray(rgb).reduce(8))
        truth = np.asarray(Image.fromarray(cells.astype(np.uint8) * 255).reduce(8)) / 255
        found = tissue_mask(small)
        assert found[truth > 0.7].mean() > 0.85
        assert found[truth == 0].mean() < 0.35  # mucus and neutrophils


def test_pen_bubbles_edges_and_dust_are_not_tissue(glass: Image.Image) -> None:
    draw = ImageDraw.Draw(glass)
    draw.line([(30, 40), (200, 60), (330, 30)], fill=(20, 60, 180), width=14)  # blue pen
    draw.line([(400, 20), (560, 60)], fill=(15, 15, 18), width=14)  # black pen
    draw.ellipse([60, 130, 220, 290], outline=(150, 150, 150), width=2)  # bubble
    draw.line([(0, 330), (599, 322)], fill=(140, 140, 140), width=2)  # coverslip edge
    for x in range(300, 580, 35):
        draw.point((x, 380), fill=(60, 60, 60))  # dust
    found = drawn(glass)
    assert found.mean() < 0.01
    draw.ellipse([350, 150, 364, 164], fill=(190, 140, 170))  # a cell
    draw.ellipse([420, 180, 450, 205], fill=(150, 190, 200))  # a clump
    found = drawn(glass)
    assert found[150:165, 350:365].mean() > 0.6
    assert found[182:203, 422:448].mean() > 0.8


def test_the_black_of_no_scan_is_no_tissue() -> None:
    picture = np.zeros((200, 200, 3), np.uint8)
    picture[50:150, 50:150] = GLASS
    assert not tissue_mask(picture)[:45].any()


def test_the_share_of_a_tile() -> None:
    mask = np.zeros((10, 10), bool)
    mask[2:4, 2:6] = True
    tissue = Tissue(mask, np.zeros((10, 10, 3), np.uint8), 32.0)
    assert tissue.fraction(Box(64, 64, 0, 0), 128, 64) == 1.0
    assert tissue.fraction(Box(0, 0, 0, 0), 320, 320) == pytest.approx(0.08)
    assert tissue.fraction(Box(1000, 1000, 0, 0), 32, 32) == 0.0
