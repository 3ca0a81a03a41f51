"""Training that starts from ImageNet's or released weights."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support.golden import image, reference, released, weight
from torch import Tensor, nn

from apacs_ray.config.settings import Settings
from apacs_ray.config.training_settings import FusionSettings, MembersSettings
from apacs_ray.errors import ApacsError
from apacs_ray.models.pretrained import (
    DEVIATION,
    MEAN,
    download_imagenet,
    load_imagenet,
    load_released,
    pretrained_version,
    published_fusion,
    published_fusion_version,
    read_checkpoint,
    require_pretrained,
)
from apacs_ray.models.registry import NETWORKS, build_member
from apacs_ray.models.spec import ModelSpec, fusion_spec
from apacs_ray.models.weights import build, load_model, weights_bytes


def _normalized(image: Tensor) -> Tensor:
    return (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


@pytest.fixture(scope="module")
def vgg() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.vgg16(weights=None, init_weights=False).eval()


def test_alexnet_features_are_torchvisions_inside_the_frame() -> None:
    """With 2 px cut off, our stride-4 grid (padding 100) meets theirs (padding 2): our index is theirs + 24."""
    torch.manual_seed(0)
    theirs = torchvision.models.alexnet(weights=None).eval()
    ours = build_member("fcn32").eval()
    load_imagenet(ours, "fcn32", theirs.state_dict())
    image = torch.rand(1, 3, 322, 322)
    with torch.inference_mode():
        conv1 = theirs.features[:2](_normalized(image))[..., 2:70, 2:70]  # clear of their padding
        mine = ours.trunk(image[..., 2:, 2:])[0][..., 26:94, 26:94]
        assert torch.allclose(mine, conv1, atol=1e-4)


@pytest.mark.parametrize("name", ["fcn16", "fcn8"])
def test_vgg_features_are_torchvisions_inside_the_frame(vgg: nn.Module, name: Any) -> None:
    """With 3 px cut off, 100 px of padding begin 96 px before theirs: 12 px of pool3."""
    ours = build_member(name).eval()
    load_imagenet(ours, name, vgg.state_dict())
    image = torch.rand(1, 3, 291, 291)
    with torch.inference_mode():
        pool3 = vgg.features[:17](_normalized(image))
        mine = ours.trunk(image[..., 3:, 3:])[0]
    inside = slice(4, 30)  # clear of both frames by the reach of a pool3 feature
    shifted = slice(4 + 12, 30 + 12)
    assert torch.allclose(mine[..., shifted, shifted], pool3[..., inside, inside], atol=1e-4)
    assert float(pool3[..., inside, inside].std()) > 1e-3


def test_the_classifier_becomes_convolutions(vgg: nn.Module) -> None:
    ours = build_member("fcn8")
    load_imagenet(ours, "fcn8", vgg.state_dict())
    features = torch.rand(1, 512, 7, 7)
    with torch.inference_mode():
        dense = vgg.classifier[0](features.flatten(1))
        assert torch.allclose(ours.trunk.fc6(features)[..., 0, 0], dense, atol=1e-4)


def test_narrow_networks_cannot_take_them(vgg: nn.Module) -> None:
    with pytest.raises(ApacsError, match=r"members\.width 1\.0"):
        load_imagenet(build_member("fcn8", width=0.25), "fcn8", vgg.state_dict())
    with pytest.raises(ApacsError, match=r"lack features\.0\.weight"):
        load_imagenet(build_member("fcn8", width=0.25), "fcn8", {})


@pytest.mark.parametrize(
    "error", [OSError("no route to host"), RuntimeError('invalid hash value (expected "9df8cd0f", got "e3b0c442")')]
)
def test_a_download_that_fails_or_is_damaged_says_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.models.AlexNet_Weights, "get_state_dict", fail)
    with pytest.raises(ApacsError, match=r"alexnet.*\.pth: cannot be downl.*members\.checkpoint FOLDER") as caught:
        download_imagenet("fcn32")
    assert str(error) in str(caught.value)


def _released(name: str, prefix: str) -> dict[str, Tensor]:
    shapes = build_member(name).state_dict()  # type: ignore[arg-type]
    return {
        f"{prefix}{theirs}.{part}": weight(f"{name}.{theirs}.{part}", tuple(shapes[f"{ours}.{part}"].shape))
        for ours, theirs in NETWORKS[name].released.items()
        for part in ("weight", "bias")
        if f"{ours}.{part}" in shapes
    }


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_released_checkpoint_is_read_as_tensors_only(prefix: str) -> None:
    sink = io.BytesIO()
    torch.save(_released("fcn32", prefix), sink)
    state = read_checkpoint(sink.getvalue(), "fcn32.pth")
    network = build_member("fcn32")
    load_released(network, "fcn32", state)
    assert torch.equal(network.score.weight, weight("fcn32.score_fr.weight", (1, 4096, 1, 1)))
    with pytest.raises(ApacsError, match="shape"):
        load_released(build_member("fcn32", width=0.25), "fcn32", state)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("nested", [False, True])
def test_a_checkpoint_is_read_out_of_what_training_scripts_wrap_it_in(prefix: str, nested: bool) -> None:
    tensors = {f"{prefix}score.weight": torch.ones(2), f"{prefix}module_of_mine": torch.zeros(1)}
    sink = io.BytesIO()
    torch.save({"state_dict": tensors, "epoch": 3} if nested else tensors, sink)
    assert set(read_checkpoint(sink.getvalue(), "x.pth")) == {"score.weight", "module_of_mine"}


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_cast(kind: torch.dtype) -> None:
    spec = ModelSpec("member", "fcn8", width=0.02)
    network = build(spec)
    network.to(kind)
    assert {parameter.dtype for parameter in load_model(weights_bytes(network), spec).parameters()} == {torch.float32}


def test_a_checkpoint_that_is_not_there_is_named_before_training(tmp_path: Path) -> None:
    members = MembersSettings(init="published", checkpoint=str(tmp_path))
    with pytest.raises(ApacsError, match=r"members\.checkpoint: .*fcn16\.pth: no such file"):
        pretrained_version(members, "fcn16")


class _Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("harm",))


@pytest.mark.parametrize("content", [{"a": _Harm()}, [1, 2], {"a": 3}])
def test_what_is_no_state_dict_of_tensors_is_refused(content: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sink = io.BytesIO()
    torch.save(content, sink)
    with pytest.raises(ApacsError, match=r"x\.pth"):
        read_checkpoint(sink.getvalue(), "x.pth")
    assert "harm" not in capsys.readouterr().out
    for damaged in (b"not a zip", b"", *(sink.getvalue()[: sink.tell() * part // 8] for part in range(8))):
        with pytest.raises(ApacsError, match=r"^x\.pth: (no checkpoint|an empty file)"):
            read_checkpoint(damaged, "x.pth")


@given(place=st.integers(0, 2000), bits=st.integers(1, 255))
@settings(deadline=None)
def test_a_damaged_checkpoint_is_refused_in_a_line_or_holds_tensors(place: int, bits: int) -> None:
    sink = io.BytesIO()
    torch.save({"score.weight": torch.arange(4.0)}, sink)
    content = bytearray(sink.getvalue())
    content[place % len(content)] ^= bits
    told = ""
    try:
        state = read_checkpoint(bytes(content), "x.pth")
    except ApacsError as error:
        told = str(error)
    if told:
        assert told.startswith("x.pth: ")
        assert "\n" not in told
    else:
        assert all(isinstance(value, torch.Tensor) for value in state.values())


def _fusion_file(folder: Path, prefix: str, kind: torch.dtype, *, nested: bool) -> FusionSettings:
    """The released fusion's file as others keep it: with its members, in another precision, inside something."""
    tensors = {prefix + name: value.to(kind) for name, value in released("fusion").items()}
    tensors[f"{prefix}model_fcn32.conv1.weight"] = torch.zeros(1)
    torch.save({"state_dict": tensors, "epoch": 3} if nested else tensors, folder / "f.pth")
    return FusionSettings(head="published", init="published", checkpoint=str(folder / "f.pth"))


@pytest.mark.parametrize(
    ("prefix", "kind", "nested"),
    [("", torch.float32, False), ("module.", torch.float16, True), ("_orig_mod.module.", torch.float64, False)],
)
def test_a_fusion_starts_as_the_released_one(tmp_path: Path, prefix: str, kind: torch.dtype, nested: bool) -> None:
    settings = _fusion_file(tmp_path, prefix, kind, nested=nested)
    spec = fusion_spec(settings, settings.width)
    weights = published_fusion(settings, spec)
    assert weights is not None
    network = load_model(weights, spec)
    inputs = torch.cat([torch.rand(1, 3, 176, 176, generator=torch.Generator().manual_seed(0)), image(176, 176)], dim=1)
    with torch.inference_mode():
        difference = (network(inputs) - reference("fusion", inputs)).abs().max()
    assert float(difference) < (1e-4 if kind != torch.float16 else 0.1)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_a_released_fusion_that_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    settings = _fusion_file(tmp_path, "", torch.float16, nested=False)
    require_pretrained(Settings(fusion=settings))
    version = published_fusion_version(settings)
    two = settings.model_copy(update={"members": ("fcn32", "fcn16")})
    with pytest.raises(ApacsError, match=r"f\.pth: .*shape \(64, 6, 11, 11\).* fusion\.members\?$"):
        require_pretrained(Settings(fusion=two))
    torch.save(_released("fcn32", ""), tmp_path / "f.pth")
    assert published_fusion_version(settings) != version  # which the fingerprints hold
    with pytest.raises(ApacsError, match=r"f\.pth: .*lacks convolution\.0\.weight"):
        require_pretrained(Settings(fusion=settings))
    (tmp_path / "f.pth").unlink()
    with pytest.raises(ApacsError, match=r"f\.pth: no such file"):
        require_pretrained(Settings(fusion=settings))
    (tmp_path / "f.pth").mkdir()
    with pytest.raises(ApacsError, match=r"f\.pth: cannot be read"):
        require_pretrained(Settings(fusion=settings))


@pytest.mark.parametrize(
    "other", [{"width": 0.5}, {"head": "refined"}, {"trunk": "fcn32"}, {"heatmap_init": "mean"}, {"checkpoint": None}]
)
def test_a_released_fusion_is_of_one_shape(other: dict[str, Any]) -> None:
    given = {"head": "published", "init": "published", "checkpoint": "f.pth"}
    FusionSettings.model_validate(given)
    with pytest.raises(ValidationError, match=rf"init published needs {next(iter(other))}"):
        FusionSettings.model_validate(given | other)
