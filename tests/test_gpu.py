"""What only a GPU shows: that its numbers are the CPU's, what precision means there, and equal bits where asked for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from apacs_ray.config.training_settings import TrainingSettings
from apacs_ray.inference.predictor import Predictor
from apacs_ray.models.ensemble import Ensemble
from apacs_ray.models.fusion import build_fusion
from apacs_ray.models.layers import Dense, Upsample
from apacs_ray.models.registry import MEMBERS, build_member
from apacs_ray.models.spec import ModelSpec
from apacs_ray.training.batch import Sample
from apacs_ray.training.device import describe_arithmetic, set_arithmetic
from apacs_ray.training.loop import Trainer
from apacs_ray.training.sampler import SampleRef
from apacs_ray.training.speed import PLAIN, Speed, compile_trunk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
WIDTH = 0.1
RNG = np.random.default_rng(3)
RGB = RNG.integers(0, 256, (200, 264, 3), np.uint8)


@pytest.fixture(autouse=True)
def _arithmetic() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    set_arithmetic("float32")


def ensemble() -> Ensemble:
    torch.manual_seed(0)
    members = {name: build_member(name, width=WIDTH) for name in MEMBERS}
    fusion = build_fusion("refined", MEMBERS, width=WIDTH)
    return Ensemble(members, {"fusion": (ModelSpec("fusion", "fusion", width=WIDTH), fusion)})


def on_cpu(networks: Ensemble) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        image = torch.from_numpy(RGB).permute(2, 0, 1)[None].float() / 255
        return {name: output[0, 0] for name, output in networks.eval()(image).items()}


@pytest.mark.parametrize(("precision", "allowed"), [("float32", 1e-4), ("tf32", 3e-2), ("bfloat16", 0.3)])
def test_logits_are_those_of_the_cpu(precision: str, allowed: float) -> None:
    expected = on_cpu(ensemble())
    found = Predictor(ensemble(), threads=1, precision=precision).logits(RGB)
    for name, logits in expected.items():
        differ = float((torch.from_numpy(found[name]) - logits).abs().max())
        assert differ <= allowed * max(1.0, float(logits.abs().max())), name
        assert precision == "float32" or differ > 1e-6, "the precision that was asked for is not what computed"


def test_float32_is_exact_however_large_the_picture_is() -> None:
    """Windows see what the whole sees: with TF32 they would differ by a thousand times as much."""
    predictor = Predictor(ensemble(), threads=1, precision="float32")
    rgb = RNG.integers(0, 256, (1600, 1600, 3), np.uint8)
    whole, window = predictor.logits(rgb), predictor.logits(rgb[256:1344, 256:1344])
    for name in MEMBERS:
        inner, outer = window[name][256:800, 256:800], whole[name][512:1056, 512:1056]
        assert np.abs(inner - outer).max() <= 1e-4 * max(1.0, float(np.abs(outer).max())), name


def test_tiles_that_pass_together_are_what_they_are_alone() -> None:
    predictor = Predictor(ensemble(), threads=1, precision="float32")
    tiles = [RGB, RGB[::-1], RGB[:, ::-1]]
    for tile, found in zip(tiles, predictor.logits_of(tiles), strict=True):
        for name, logits in predictor.logits(tile).items():
            assert np.abs(found[name] - logits).max() <= 1e-4 * max(1.0, float(np.abs(logits).max())), name


@pytest.mark.parametrize("kernel", [6, 7])
def test_a_dense_layer_is_the_convolution(kernel: int) -> None:
    torch.manual_seed(0)
    layer = Dense(64, 128, kernel).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 20, 23, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(2, 128, 21 - kernel, 24 - kernel, device="cuda")
    found = []
    for network in (layer, lambda y: F.conv2d(y, layer.weight, layer.bias)):
        layer.zero_grad()
        x.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            y = network(x)
        assert y.dtype == torch.bfloat16
        (y.float() * weight).sum().backward()
        assert x.grad is not None
        assert layer.weight.grad is not None
        assert layer.bias is not None
        assert layer.bias.grad is not None
        parts = (y, x.grad, layer.weight.grad, layer.bias.grad)
        found.append([part.detach().float().clone() for part in parts])
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-2


def test_upsampling_is_the_transposed_convolution() -> None:
    set_arithmetic("float32")
    layer = Upsample(1, 63, 32).cuda()
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 1, 9, 7, device="cuda")
    torch.testing.assert_close(layer(x), F.conv_transpose2d(x, layer.weight, stride=32), rtol=1e-5, atol=1e-5)


def trained(settings: TrainingSettings, speed: Speed = PLAIN) -> torch.Tensor:
    set_arithmetic(settings.precision, deterministic=speed == PLAIN)
    torch.manual_seed(0)
    network = build_member("fcn8", width=WIDTH, dropout=0.1).cuda().to(memory_format=torch.channels_last)
    if speed.compiled:
        compile_trunk(network)
    trainer = Trainer(network, settings, seed=0, device=torch.device("cuda"), speed=speed)
    refs = [SampleRef(0, "train", step, 2 * step + tile, 0.5, step) for step in range(4) for tile in range(2)]
    refs += [SampleRef(0, "val", 0, row, 1.0, 0) for row in range(2)]
    rng = np.random.default_rng(0)
    sides = (128, 128)
    samples = [
        Sample(ref, str(ref), rng.integers(0, 256, (*sides, 3), np.uint8), (rng.random(sides) < 0.3).astype(np.uint8))
        for ref in refs
    ]
    trainer.run(iter(samples), 4, lambda record, state: None)
    return torch.cat([parameter.detach().flatten().cpu() for parameter in network.parameters()])


def test_deterministic_training_gives_equal_bits() -> None:
    settings = TrainingSettings(epochs=1, batch_size=2, learning_rate=1e-3, precision="bfloat16", patience=0)
    assert torch.equal(trained(settings), trained(settings))
    other = trained(replace_precision(settings, "float32"))
    assert not torch.equal(trained(settings), other)


@pytest.mark.parametrize(("search", "compiled"), [(True, False), (True, True)])
def test_faster_steps_learn_the_same(search: bool, compiled: bool) -> None:
    settings = TrainingSettings(epochs=1, batch_size=2, learning_rate=1e-3, precision="float32", patience=0)
    plain, faster = trained(settings), trained(settings, Speed((2, 128, 128), search, compiled))
    assert float((faster - plain).norm() / plain.norm()) < 1e-2


def replace_precision(settings: TrainingSettings, precision: str) -> TrainingSettings:
    return TrainingSettings.model_validate({**settings.model_dump(), "precision": precision})


def test_auto_is_what_the_gpu_has() -> None:
    device = torch.device("cuda")
    native = torch.cuda.get_device_capability()[0] >= 8
    assert describe_arithmetic("auto", device) == ("bfloat16" if native else "float32")
    assert describe_arithmetic("tf32", device) == "tf32"
