"""The networks: equal to the published ones, H x W for every size, aligned, and safe to train in bfloat16."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden import image, published, reference
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from apacs_ray.config.training_settings import FusionSettings, MemberName
from apacs_ray.errors import ApacsError
from apacs_ray.models.ensemble import Ensemble
from apacs_ray.models.fcn import FCN8, FCN16, SMALLEST, AlexTrunk, sufficient
from apacs_ray.models.fusion import RefinedFusion, build_fusion, load_fcn32_trunk
from apacs_ray.models.layers import Upsample, WindowProduct
from apacs_ray.models.registry import COST_SIDE, MEMBERS, NETWORKS, build_member
from apacs_ray.models.spec import ModelSpec
from apacs_ray.models.weights import build, from_released, load_model, weights_bytes

GOLDEN = json.loads((Path(__file__).parent / "support/golden_logits.json").read_text())
WHOLE = Path(__file__).resolve().parents[2] / "shared/reference/published-outputs-176.npz"
TINY = 0.02  # width at which every layer has 8 channels or a few more


@pytest.fixture(scope="module")
def golden_outputs() -> dict[str, np.ndarray]:
    """Logits of the whole published ensemble at width 1."""
    networks = {name: published(name, "module." if name == "fcn16" else "") for name in (*MEMBERS, "fusion")}
    ensemble = Ensemble({name: networks[name][1] for name in MEMBERS}, {"fusion": networks["fusion"]})
    with torch.inference_mode():
        return {name: logits[0, 0].numpy() for name, logits in ensemble(image(176, 176)).items()}


@pytest.mark.parametrize("name", [*MEMBERS, "fusion"])
def test_logits_equal_the_released_networks(golden_outputs: dict[str, np.ndarray], name: str) -> None:
    for y, x, value in GOLDEN[name]:
        assert golden_outputs[name][y, x] == pytest.approx(value, abs=1e-4)
    if WHOLE.exists():
        whole = np.load(WHOLE)[f"{name}_176x176"].reshape(176, 176)
        assert np.abs(golden_outputs[name] - whole).max() <= 1e-4


def test_the_reference_gives_the_golden_outputs(golden_outputs: dict[str, np.ndarray]) -> None:
    picture = image(176, 176)
    with torch.inference_mode():
        logits = {name: reference(name, picture) for name in MEMBERS}
        inputs = torch.cat([*(torch.sigmoid(logits[name]) for name in MEMBERS), picture], dim=1)
        logits["fusion"] = reference("fusion", inputs)
    for name, values in GOLDEN.items():
        assert all(logits[name][0, 0, y, x].item() == pytest.approx(value, abs=1e-4) for y, x, value in values)


@pytest.mark.parametrize(("height", "width"), [(44, 147), (176, 211), (240, 81)])
def test_logits_equal_the_published_description_at_other_sizes(height: int, width: int) -> None:
    """At sizes that the released networks give back whole; `reference` is held to the golden outputs as well."""
    picture = image(height, width)
    with torch.inference_mode():
        heatmaps = []
        for name in MEMBERS:
            logits = reference(name, picture)
            heatmaps.append(torch.sigmoid(logits))
            assert logits.shape == (1, 1, height, width)
            assert (published(name)[1](picture) - logits).abs().max() <= 1e-4
        inputs = torch.cat([*heatmaps, picture], dim=1)
        assert (published("fusion")[1](inputs) - reference("fusion", inputs)).abs().max() <= 1e-4


@pytest.mark.parametrize(("name", "side", "padded"), [("fcn32", 53, 75), ("fcn16", 54, 58), ("fcn8", 55, 58)])
def test_other_sizes_equal_the_padded_and_cropped_description(name: str, side: int, padded: int) -> None:
    picture = image(side, side)
    with torch.inference_mode():
        whole = reference(name, F.pad(picture, (0, padded - side, 0, padded - side)))
        assert reference(name, picture).shape[2] < side
        assert (published(name)[1](picture) - whole[:, :, :side, :side]).abs().max() <= 1e-4


@pytest.fixture(scope="module")
def tiny() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    networks = {name: build_member(name, width=TINY).eval() for name in MEMBERS}
    networks["published"] = build_fusion("published", MEMBERS, width=TINY).eval()
    networks["refined"] = build_fusion("refined", ("fcn16", "fcn8"), width=TINY).eval()
    return networks


@settings(max_examples=12, deadline=None)
@given(height=st.integers(5, 170), width=st.integers(5, 170))
def test_every_size_comes_back(tiny: dict[str, torch.nn.Module], height: int, width: int) -> None:
    channels = {"published": 6, "refined": 5}
    for name, network in tiny.items():
        with torch.inference_mode():
            assert network(torch.zeros(1, channels.get(name, 3), height, width)).shape == (
                1,
                1,
                height,
                width,
            )


@pytest.mark.parametrize("produced", [AlexTrunk.produced, FCN16.produced, FCN8.produced])
def test_padding_is_added_only_where_the_published_geometry_falls_short(produced) -> None:
    for size in range(32, 2100):
        side = sufficient(size, produced)
        assert produced(side) >= size
        assert side == size or produced(side - 1) < size
    assert sufficient(6, produced) == SMALLEST


@pytest.mark.parametrize(
    ("name", "scores"), [("fcn32", []), ("fcn16", ["score_pool4"]), ("fcn8", ["score_pool4", "score_pool3"])]
)
def test_each_stage_is_what_the_network_says_without_the_finer_scores(name: str, scores: list[str]) -> None:
    torch.manual_seed(0)
    network = build_member(name, width=0.02, dropout=0.0).eval()
    x = torch.rand(2, 3, 70, 90)
    with torch.no_grad():
        stages, alone = network(x, stages=True), [network(x)]
        for score in reversed(scores):
            for parameter in network.get_submodule(score).parameters():
                parameter.zero_()
            alone.insert(0, network(x))
    assert stages.shape == (2, len(scores) + 1, 70, 90)
    for stage, said in enumerate(alone):
        assert torch.allclose(stages[:, stage : stage + 1], said, atol=1e-5)
    assert torch.equal(stages[:, -1:], alone[-1])
    assert all(not torch.allclose(one, other, atol=1e-3) for one, other in itertools.pairwise(alone))


def test_sizes_at_which_the_released_fcn32_falls_short() -> None:
    """As measured on the released networks, at sizes that are multiples of 8."""
    sizes = range(256, 2304, 8)
    assert AlexTrunk.produced(512) == 500
    assert all(AlexTrunk.produced(size) < size for size in (1000, 1024))
    assert AlexTrunk.produced(176) >= 176
    for network in (FCN16, FCN8):
        assert {size % 32 for size in sizes if network.produced(size) < size} == {24}


@pytest.mark.parametrize("members", [MEMBERS, ("fcn32", "fcn8")])
def test_the_refined_fusion_starts_as_the_mean_of_the_members(members) -> None:
    network = build_fusion("refined", members, width=TINY).eval()
    inputs = torch.rand(2, len(members) + 3, 75, 90)
    with torch.inference_mode():
        mean = torch.logit(inputs[:, : len(members)], eps=1 / 510).mean(dim=1, keepdim=True)
        torch.testing.assert_close(network(inputs), mean)


def test_the_refined_fusion_learns_at_every_scale() -> None:
    network = build_fusion("refined", MEMBERS, width=TINY, dropout=0.0)
    network(torch.rand(1, 6, 64, 64)).sum().backward()
    assert all(score.weight.grad.abs().sum() > 0 for score in (*network.scores, network.fine_score))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("kernel", "stride"), [(63, 32), (31, 16), (15, 8), (7, 4), (32, 16), (16, 8), (4, 2)])
def test_upsampling_is_the_transposed_convolution(channels: int, kernel: int, stride: int) -> None:
    layer = Upsample(channels, kernel, stride)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, channels, 3, 5, requires_grad=True)
    ways = layer(x), torch.nn.functional.conv_transpose2d(x, layer.weight, stride=stride)
    results = [(y, *torch.autograd.grad((y * y).sum(), (x, layer.weight))) for y in ways]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("values", [1, 200, 1 << 28])
def test_a_product_of_windows_is_the_convolution(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bands of a row, of some, and in one."""
    monkeypatch.setattr(WindowProduct, "MOST", values)
    x, weight, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in
                       ((2, 3, 8, 6), (4, 3, 3, 3), (4,)))  # fmt: skip
    ways = WindowProduct.apply(x, weight, bias), torch.nn.functional.conv2d(x, weight, bias)
    results = [(y, *torch.autograd.grad((y * y).sum(), (x, weight, bias))) for y in ways]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scale", range(4))
def test_the_refined_skips_lie_where_the_input_is(scale: int) -> None:
    """A feature placed at index i must come out centered on the input pixel in the middle of its receptive field."""
    stride, offset = RefinedFusion.SKIPS[scale]
    start = (-95, -91, -83, 13)[scale]
    features = torch.zeros(1, 1, 40, 40)
    index = 30 if stride < 32 else 3  # deep enough in the map to lie inside the input
    features[0, 0, index, index] = 1
    output = Upsample(1, 2 * stride - 1, stride)(features)[0, 0, offset:, offset:]
    peak = divmod(int(output.argmax()), output.shape[1])
    assert peak == (stride * index + start,) * 2


@pytest.mark.parametrize(("depth", "stride", "start"), [(0, 4, -95), (1, 8, -91), (2, 16, -83), (3, 32, 13)])
def test_features_see_the_pixels_they_are_drawn_over(depth: int, stride: int, start: int) -> None:
    """The gradient of feature i is centered on stride * i + start, as the refined head assumes."""
    trunk = AlexTrunk(3, TINY, 0.0).eval()
    for parameter in trunk.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    ramp = torch.arange(1.0, 641).reshape(1, 1, -1, 1).expand(1, 3, 640, 640)
    centers = []
    for field in (ramp, ramp.flip(2)):  # max pooling follows the ramp: half a window down once, half a window up once
        inputs = field.clone().requires_grad_()
        feature = trunk(inputs)[depth]
        index = feature.shape[2] // 2
        feature[0, 0, index, index].backward()
        rows = inputs.grad.abs().sum(dim=(0, 1, 3)).double()
        centers.append(float((rows * torch.arange(640)).sum() / rows.sum()))
    assert sum(centers) / 2 == pytest.approx(stride * index + start, abs=0.1)


@pytest.mark.parametrize("init", ["random", "zero", "mean"])
def test_heatmap_channels_start_as_asked(init) -> None:
    filters = build_fusion("published", MEMBERS, width=TINY, heatmap_init=init).trunk.conv1.weight
    expected = {"zero": torch.zeros_like(filters[:, 0]), "mean": filters[:, 3:].mean(dim=1)}
    for channel in range(3):
        if init == "random":
            assert filters[:, channel].std() > 0
        else:
            torch.testing.assert_close(filters[:, channel], expected[init])


def test_the_fusion_may_start_on_the_trunk_of_fcn32() -> None:
    torch.manual_seed(1)
    member = build_member("fcn32", width=TINY)
    network = build_fusion("published", ("fcn16", "fcn8"), width=TINY, heatmap_init="zero").eval()
    load_fcn32_trunk(network, member.state_dict(), "zero")
    inputs = torch.rand(1, 5, 60, 70)
    with torch.inference_mode():
        ours, theirs = network.trunk(inputs), member.eval().trunk(inputs[:, 2:])
    for mine, other in zip(ours, theirs, strict=True):  # without a say of the heatmaps it sees what FCN-32 sees
        torch.testing.assert_close(mine, other)
    load_fcn32_trunk(network, member.state_dict(), "mean")
    filters = network.trunk.conv1.weight
    for channel in range(2):
        torch.testing.assert_close(filters[:, channel], member.trunk.conv1.weight.mean(dim=1))
    with pytest.raises(ApacsError, match=r"members\.width"):
        load_fcn32_trunk(network, build_member("fcn32", width=0.5).state_dict(), "zero")


def test_models_travel_as_safetensors_and_json() -> None:
    spec = ModelSpec("fusion", "fusion", width=TINY, members=("fcn32", "fcn8"), metrics={"val_dice": 0.5})
    model = build(spec).eval()
    again = ModelSpec.from_json(spec.to_json())
    assert again == spec
    inputs = torch.rand(1, 5, 40, 50)
    with torch.inference_mode():
        assert torch.equal(load_model(weights_bytes(model), again)(inputs), model(inputs))
    with pytest.raises(ApacsError, match="shape"):
        load_model(weights_bytes(model), ModelSpec("fusion", "fusion", width=0.5, members=("fcn32", "fcn8")))
    with pytest.raises(ApacsError, match="lack"):
        load_model(weights_bytes(model), ModelSpec("member", "fcn8", width=TINY))
    with pytest.raises(ApacsError, match="lacks"):
        from_released("fcn8", {})


def test_bfloat16_training_on_the_cpu_is_sound() -> None:
    """Score layers and upsampling stay in float32: in bfloat16 their backward pass corrupts memory on CPUs."""
    torch.manual_seed(0)
    network = build_member("fcn8", width=0.05, dropout=0.0).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, fused=True)
    rows, columns = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    mask = (((rows - 40) ** 2 + (columns - 55) ** 2) < 20**2).float()[None, None]
    inputs = (0.8 - 0.5 * mask).expand(1, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(inputs)
        assert logits.dtype == torch.float32
        loss = F.binary_cross_entropy_with_logits(logits, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


class TestRegistry:
    def test_costs_are_the_counted_operations(self) -> None:
        for name, entry in NETWORKS.items():
            spec = ModelSpec(entry.kind, name, head="published" if name == "fusion_published" else "refined")
            channels = 3 if entry.kind == "member" else 3 + len(MEMBERS)
            with FakeTensorMode(), FlopCounterMode(display=False) as counter:
                build(spec)(torch.empty(1, channels, COST_SIDE, COST_SIDE))
            assert round(counter.get_total_flops() / 1e9, 1) == entry.gflops, name

    def test_the_settings_name_its_members(self) -> None:
        assert get_args(MemberName) == MEMBERS
        assert FusionSettings().members == MEMBERS

    def test_it_needs_no_torch(self) -> None:
        code = "import sys, apacs_ray.models.registry; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_a_network_that_is_none_is_named(self) -> None:
        with pytest.raises(ApacsError, match="fcn4: no such member; there is fcn32, fcn16, fcn8"):
            build_member("fcn4")
        with pytest.raises(ApacsError, match="fusion: no such member"):
            build_member("fusion")
