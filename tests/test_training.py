"""The training core: samples, loss, step, epochs, checkpoints, and the same numbers however it is spread."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from apacs_ray.config.training_settings import MembersSettings, TrainingSettings
from apacs_ray.data.images import encode_mask
from apacs_ray.errors import ApacsError, StoreTroubleError, TrainingError, gpu_too_small
from apacs_ray.inference.predictor import Predictor
from apacs_ray.models.ensemble import Ensemble
from apacs_ray.models.registry import MEMBERS, build_member
from apacs_ray.models.spec import FusionStart
from apacs_ray.training.augment import DYES, Augmentation, augment, jitter_stain, vary_dyes
from apacs_ray.training.batch import Batch, Sample, batches
from apacs_ray.training.dataset import decode_tile_mask
from apacs_ray.training.history import (
    EpochRecord,
    best_record,
    epochs_since_best,
    history_csv,
    read_history,
    score,
    start_record,
    unit_metrics,
)
from apacs_ray.training.interruption import Interruption
from apacs_ray.training.loop import Trainer, earliest_place, train_epochs
from apacs_ray.training.loss import BOUNDARY, near_edge, pixel_weights, tile_losses
from apacs_ray.training.optim import ema_decay, learning_rate_factor, make_optimizer
from apacs_ray.training.ranks import Ranks
from apacs_ray.training.sampler import SampleRef, schedule
from apacs_ray.training.state import Snapshot, TrainState, load_state, save_state, snapshot
from apacs_ray.training.step import forward, valid_pixels
from apacs_ray.training.writer import CheckpointWriter

CPU = torch.device("cpu")
GROUPS, N_TRAIN, N_VAL = [5, 4], 9, 3
SEED = 1
CONFIG = TrainingSettings(
    epochs=4, batch_size=4, learning_rate=1e-2, dice_weight=0.5, jitter=0, precision="float32", patience=0
)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def changed(config: TrainingSettings, **changes: Any) -> TrainingSettings:
    return TrainingSettings.model_validate({**config.model_dump(), **changes})


class Tiny(nn.Module):
    """A small segmentation network that scores in float32, as ours do: bfloat16 is not safe there on CPUs."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Dropout2d(dropout),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
        )
        self.score = nn.Conv2d(8, 1, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.trunk(inputs)
        with torch.autocast(inputs.device.type, enabled=False):
            scores: Tensor = self.score(features.float())
        return scores


def tiny(dropout: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    return Tiny(dropout)


def tile(number: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A tile whose cells are its red pixels."""
    rng = np.random.default_rng(number)
    mask = np.kron(rng.integers(0, 2, (4, 5), dtype=np.uint8), np.ones((4, 4), np.uint8))
    image = rng.integers(0, 120, (16, 20, 3), dtype=np.uint8)
    image[..., 0] += 100 * mask
    return image, mask


def stream(
    config: TrainingSettings, first: int = 0, rank: int = 0, world: int = 1, crop: int = 12, first_step: int = 0
) -> Iterator[Sample]:
    refs = schedule(
        GROUPS,
        N_VAL,
        epochs=range(first, config.epochs),
        first_step=first_step,
        batch_size=config.batch_size,
        rank=rank,
        world=world,
        seed=SEED,
    )
    for ref in refs:
        number = ref.row + (N_TRAIN if ref.phase == "val" else 0)
        inputs, mask = tile(number)
        if ref.phase == "train":
            inputs, mask = augment(inputs, mask, ref.seed, Augmentation(crop, True, True))
        yield Sample(ref, f"t{number}", inputs, mask)


def steps(config: TrainingSettings) -> int:
    return -(-N_TRAIN // config.batch_size)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def nothing(record: EpochRecord, state: TrainState) -> None:
    """An epoch end that keeps nothing."""


def timeless(trainer: Trainer) -> list[EpochRecord]:
    """The history without the seconds, which differ."""
    return [replace(record, seconds=0) for record in trainer.history]


def after(count: int) -> Callable[[], Interruption | None]:
    """A preemption that is known after the `count`-th step."""
    asked = iter(range(1, count + 1))
    return lambda: Interruption.LEAVE if next(asked) == count else None


class Breaks(nn.Module):
    """Gives NaN for a tile whose first pixel is fully red, which no `tile` is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny(0.0)

    def forward(self, inputs: Tensor) -> Tensor:
        marked = inputs[:, 0, 0, 0] > 0.99
        return torch.where(marked[:, None, None, None], math.nan, 1.0) * self.net(inputs)


def sample(ref: SampleRef, height: int = 8, width: int = 8) -> Sample:
    return Sample(
        ref, f"t{ref.row}", np.full((height, width, 3), ref.row, np.uint8), np.ones((height, width), np.uint8)
    )


class TestSamples:
    def test_augmentation_moves_image_and_mask_together(self) -> None:
        mask = np.random.default_rng(0).integers(0, 2, (30, 40), dtype=np.uint8)
        inputs = np.stack([mask * 200, mask * 100, mask, mask], axis=2)
        for seed in range(40):
            moved, moved_mask = augment(inputs, mask, seed, Augmentation(25, True, True))
            assert moved.shape == (25, 25, 4)
            assert moved.dtype == moved_mask.dtype == np.uint8
            assert (moved[..., 0] == moved_mask * 200).all()
            assert (moved[..., 3] == moved_mask).all()

    def test_all_eight_orientations_come_and_the_seed_fixes_them(self) -> None:
        mask = np.arange(16, dtype=np.uint8).reshape(4, 4)
        inputs = np.repeat(mask[..., None], 3, axis=2)
        seen = {augment(inputs, mask, seed, Augmentation(0, True, True))[1].tobytes() for seed in range(80)}
        assert len(seen) == 8
        same = [augment(inputs, mask, 5, Augmentation(2, True, True))[1] for _ in range(2)]
        assert (same[0] == same[1]).all()
        plain, _ = augment(inputs, mask, 5, Augmentation(0, False, False))
        assert (plain == inputs).all()

    @given(st.integers(1, 150), st.integers(1, 150), st.sampled_from([(), (1,), (3,), (6,)]), st.integers(0, 99))
    def test_a_transform_is_the_window_flipped_and_turned(
        self, height: int, width: int, channels: tuple[int, ...], seed: int
    ) -> None:
        picture = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
        transform = Augmentation(100, True, True).draw(seed, (height, width))
        window = picture[transform.top : transform.top + 100, transform.left : transform.left + 100]
        window = window[::-1] if transform.flip_rows else window
        window = window[:, ::-1] if transform.flip_columns else window
        assert np.array_equal(transform.apply(picture), np.rot90(window, transform.quarters))

    def test_a_window_of_a_stored_mask(self) -> None:
        mask = np.random.default_rng(0).integers(0, 2, (30, 41)).astype(bool)
        assert np.array_equal(decode_tile_mask(encode_mask(mask)), mask)
        assert np.array_equal(decode_tile_mask(encode_mask(mask), (3, 5, 20, 30)), mask[5:30, 3:20])
        assert decode_tile_mask(encode_mask(mask)).dtype == np.uint8

    def test_a_tile_smaller_than_the_crop_stays_whole(self) -> None:
        inputs, mask = tile(0)
        cropped, cropped_mask = augment(inputs, mask, 1, Augmentation(18, False, False))
        assert cropped.shape == (16, 18, 3)
        assert cropped_mask.shape == (16, 18)

    def test_crops_reach_every_corner(self) -> None:
        mask = np.arange(9, dtype=np.uint8).reshape(3, 3)
        inputs = np.repeat(mask[..., None], 3, axis=2)
        corners = {int(augment(inputs, mask, seed, Augmentation(2, False, False))[1][0, 0]) for seed in range(60)}
        assert corners == {0, 1, 3, 4}

    def test_batches_end_with_their_step_and_pad(self) -> None:
        refs = [SampleRef(0, "train", step, row, 1.0, row) for step, row in [(0, 0), (0, 1), (0, 2), (1, 3)]]
        samples = [sample(refs[0], 8, 6), sample(refs[1], 5, 9), sample(refs[2]), sample(refs[3])]
        first, second, third = batches(iter(samples), 2)
        assert [batch.ends_step for batch in (first, second, third)] == [False, True, True]
        assert [batch.tile_ids for batch in (first, second, third)] == [("t0", "t1"), ("t2",), ("t3",)]
        assert first.inputs.shape == (2, 8, 9, 3)
        assert first.sizes == ((8, 6), (5, 9))
        assert valid_pixels(first.sizes, torch.from_numpy(first.mask).float()).sum(dim=(1, 2, 3)).tolist() == [48, 45]
        assert (first.inputs[1, :5, :9] == 1).all()
        assert first.inputs[1, 5:].sum() == first.mask[1, :, 5:].sum() == 0

    def test_validation_is_never_padded(self) -> None:
        shapes = [(8, 8), (8, 8), (8, 6), (8, 6), (8, 8)]
        refs = [SampleRef(0, "val", row, row, 1.0, 0) for row in range(5)]
        found = list(batches(iter([sample(ref, *shape) for ref, shape in zip(refs, shapes, strict=True)]), 4))
        assert [len(batch.tile_ids) for batch in found] == [2, 2, 1]
        assert all(set(batch.sizes) == {batch.mask.shape[2:]} for batch in found)

    def test_decoding_tasks_do_not_load_torch(self) -> None:
        code = "import sys, apacs_ray.training.batch; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

    def test_networks_loop_and_inference_do_not_load_ray(self) -> None:
        names = ("training.loop", "training.dataset", "models.weights", "inference.predictor")
        modules = ", ".join(f"apacs_ray.{name}" for name in names)
        code = f"import sys, {modules}, apacs_ray.estimate.networks; sys.exit('ray' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

    def test_a_network_is_loaded_without_torchs_compiler(self) -> None:
        modules = "apacs_ray.models.weights import build, load_model, weights_bytes"
        given = 'spec = ModelSpec("fusion", "fusion", members=("fcn32", "fcn8"), width=0.02, heatmap_init="mean")'
        load = "load_model(weights_bytes(build(spec)), spec); sys.exit('torch._dynamo' in sys.modules)"
        code = f"import sys; from {modules}; from apacs_ray.models.spec import ModelSpec; {given}; {load}"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


class TestJitter:
    def test_only_rgb_changes_mildly_and_by_seed(self) -> None:
        inputs = torch.rand(2, 5, 16, 16, generator=torch.Generator().manual_seed(0))
        sizes = [(16, 16)] * 2
        jittered = jitter_stain(inputs, sizes, [7, 7], 0.2)
        assert torch.equal(jittered[:, :2], inputs[:, :2])
        assert 0 <= jittered.min() <= jittered.max() <= 1
        change = (jittered[:, 2:] - inputs[:, 2:]).abs().mean()
        assert 0.001 < change < 0.2
        assert not torch.equal(jittered, jitter_stain(inputs, sizes, [8, 8], 0.2))
        assert jitter_stain(inputs, sizes, [7, 7], 0.0) is inputs

    def test_it_does_not_depend_on_the_other_tiles_of_a_batch(self) -> None:
        small = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        padded = torch.zeros(1, 3, 20, 20)
        padded[..., :8, :8] = small
        alone = jitter_stain(small, [(8, 8)], [3], 0.3)
        together = jitter_stain(padded, [(8, 8)], [3], 0.3)
        assert torch.equal(together[..., :8, :8], alone)
        assert together[..., 8:, :].abs().sum() == 0


class TestDyes:
    def test_only_the_rgb_inside_a_tile_changes_and_by_its_seed(self) -> None:
        inputs = torch.rand(2, 5, 16, 16, generator=torch.Generator().manual_seed(0))
        sizes = [(16, 16), (8, 12)]
        varied = vary_dyes(inputs, sizes, [7, 7], 0.3)
        assert torch.equal(varied[:, :2], inputs[:, :2])
        assert torch.equal(varied[1, :, 8:], inputs[1, :, 8:])
        assert torch.equal(varied[1, :, :, 12:], inputs[1, :, :, 12:])
        assert 0 <= varied.min() <= varied.max() <= 1
        assert 0.001 < (varied[:, 2:] - inputs[:, 2:]).abs().mean() < 0.3
        assert not torch.equal(varied, vary_dyes(inputs, sizes, [7, 8], 0.3))
        assert vary_dyes(inputs, sizes, [7, 7], 0.0) is inputs

    @pytest.mark.parametrize("dye", range(3))
    def test_a_dye_gets_more_or_less_and_stays_what_it_is(self, dye: int) -> None:
        """In absorbance a pure dye lies on a line; what leaves it is the shift, which all pixels have."""
        amounts = torch.linspace(0.2, 1.5, 12)
        absorbance = torch.tensor(DYES[dye])[:, None, None] * amounts[None, None]
        varied = -torch.log(vary_dyes(torch.exp(-absorbance)[None], [(1, 12)], [5], 0.2))[0]
        steps_before, steps_after = absorbance.diff(dim=2), varied.diff(dim=2)
        share = (steps_after / steps_before).flatten()
        assert torch.allclose(share, share[0].expand(share.shape), atol=1e-3)
        assert 0.8 <= share[0] <= 1.2
        assert share[0] != pytest.approx(1, abs=1e-3)


class TestWeights:
    @given(seed=st.integers(0, 10_000), distance=st.integers(1, 5))
    @settings(max_examples=40, deadline=None)
    def test_an_edge_is_where_a_valid_pixel_of_the_other_label_is_near(self, seed: int, distance: int) -> None:
        rng = np.random.default_rng(seed)
        height, width = rng.integers(1, 14, 2)
        mask, valid = rng.integers(0, 2, (2, height, width))
        near = near_edge(*(torch.tensor(a, dtype=torch.float32)[None, None] for a in (mask, valid)), distance)
        for row, column in itertools.product(range(height), range(width)):
            rows = slice(max(0, row - distance), row + distance + 1)
            around = rows, slice(max(0, column - distance), column + distance + 1)
            other = (mask[around] != mask[row, column]) & (valid[around] == 1)
            assert near[0, 0, row, column] == float(valid[row, column] and other.any())

    def test_what_is_ignored_teaches_nothing_and_what_is_near_an_edge_more(self) -> None:
        mask = torch.zeros(1, 1, 24, 24)
        mask[..., 12:] = 1
        valid = torch.ones_like(mask)
        valid[..., 20:, :] = 0
        assert pixel_weights(mask, valid, 0, 0.0) is valid
        weights = pixel_weights(mask, valid, 2, 3.0)
        assert weights[0, 0, 0].tolist() == [1.0] * 8 + [4.0] * 2 + [0.0] * 4 + [4.0] * 2 + [1.0] * 8
        assert BOUNDARY == 4
        assert weights[..., 20:, :].sum() == 0
        logits = torch.randn(1, 1, 24, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.autograd.backward(tile_losses(logits, mask, weights, 0.5).sum())
        assert logits.grad is not None
        assert (logits.grad[weights == 0] == 0).all()
        assert (logits.grad[weights > 0] != 0).all()

    def test_they_count_in_training_and_never_in_validation(self) -> None:
        plain, banded = CONFIG, changed(CONFIG, ignore_band=1, boundary_weight=2.0)
        records = [
            Trainer(tiny(), config, seed=SEED, device=CPU).run(stream(config), steps(config), nothing)
            for config in (changed(plain, learning_rate=1e-12), changed(banded, learning_rate=1e-12))
        ]
        assert records[0][0].train_loss != pytest.approx(records[1][0].train_loss, abs=1e-4)
        assert records[0][0].val_loss == pytest.approx(records[1][0].val_loss, abs=1e-6)

    def test_deep_supervision_adds_the_losses_of_the_earlier_stages_in_training_only(self) -> None:
        how = MembersSettings(jitter=0.0, dice_weight=0.5, batch_size=2, precision="float32")
        deep = how.model_copy(update={"deep_supervision": 0.5})
        torch.manual_seed(SEED)
        network = build_member("fcn8", width=0.02, dropout=0.0)
        rng = np.random.default_rng(SEED)
        inputs = rng.integers(0, 256, (2, 48, 48, 3)).astype(np.uint8)
        mask = rng.integers(0, 2, (2, 1, 48, 48)).astype(np.uint8)
        weight = np.ones(2, np.float32)
        batch = Batch(0, "train", 0, True, inputs, mask, weight, ((48, 48),) * 2, (1, 2), ("a", "b"))
        plain, added = (forward(network, batch, settings, CPU) for settings in (how, deep))
        assert torch.equal(plain.logits, added.logits)
        stages = network(torch.from_numpy(inputs).permute(0, 3, 1, 2).float() / 255, stages=True)
        truth = torch.from_numpy(mask).float()
        extra = sum(tile_losses(stages[:, k : k + 1], truth, torch.ones_like(truth), 0.5) for k in (0, 1))
        assert torch.allclose(added.losses, plain.losses + 0.5 * extra, rtol=1e-5)
        judged = replace(batch, phase="val")
        assert torch.equal(forward(network, judged, deep, CPU).losses, forward(network, judged, how, CPU).losses)


class TestUnits:
    def test_what_validation_finds_by_unit_adds_up_to_its_dice(self) -> None:
        config = changed(CONFIG, epochs=2, batch_size=2)
        plain, counting = (
            Trainer(tiny(), config, seed=SEED, device=CPU, units=units)
            for units in (None, {f"t{N_TRAIN + number}": number % 2 for number in range(N_VAL)})
        )
        histories = [trainer.run(stream(config), steps(config), nothing) for trainer in (plain, counting)]
        assert plain.val_units == []
        assert len(counting.val_units) == 2
        assert timeless(plain) == timeless(counting)
        both, predicted, true = map(sum, zip(*counting.val_units, strict=True))
        assert 2 * both / (predicted + true) == pytest.approx(histories[1][-1].val_dice, abs=1e-12)
        assert json.loads(unit_metrics(counting.val_units)["val_units"]) == counting.val_units
        assert unit_metrics([]) == {}


class TestAverage:
    def test_it_is_the_moving_average_of_the_weights_of_every_step(self) -> None:
        config = changed(CONFIG, ema=0.7, epochs=2)
        trainer = Trainer(tiny(), config, seed=SEED, device=CPU)
        expected, count = flat(trainer.model), itertools.count()

        def watch() -> Interruption | None:
            nonlocal expected
            decay = min(0.7, (1 + (step := next(count))) / (10 + step))
            expected = decay * expected + (1 - decay) * flat(trainer.model)
            return None

        train_epochs([trainer], stream(config), steps(config), lambda who, record: None, watch)
        assert trainer.average is not None
        assert torch.allclose(flat(trainer.average), expected, atol=1e-6)
        assert not torch.allclose(flat(trainer.average), flat(trainer.model), atol=1e-4)

    def test_training_is_the_same_and_what_is_validated_and_kept_is_the_average(self, tmp_path: Path) -> None:
        plain, averaged = (Trainer(tiny(), changed(CONFIG, ema=ema), seed=SEED, device=CPU) for ema in (0.0, 0.9))
        for trainer in (plain, averaged):
            trainer.run(stream(CONFIG), steps(CONFIG), nothing)
        assert torch.equal(flat(plain.model), flat(averaged.model))
        assert [record.train_loss for record in plain.history] == [record.train_loss for record in averaged.history]
        assert plain.history[-1].val_loss != averaged.history[-1].val_loss
        assert averaged.average is not None
        save_state(tmp_path, snapshot(averaged.state()))
        kept = load_file(tmp_path / "model.safetensors")
        assert all(torch.equal(kept[name], value) for name, value in averaged.average.state_dict().items())

    def test_a_checkpoint_of_other_averages_is_refused(self, tmp_path: Path) -> None:
        trainer = Trainer(tiny(), CONFIG, seed=SEED, device=CPU)
        trainer.run(stream(CONFIG), steps(CONFIG), nothing)
        save_state(tmp_path, snapshot(trainer.state()))
        with pytest.raises(ApacsError, match="another setting of ema"):
            Trainer(tiny(), changed(CONFIG, ema=0.5), seed=SEED, device=CPU).resume(tmp_path)

    @pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
    def test_it_leaves_the_start_soon(self, decay: float) -> None:
        decays = [ema_decay(decay, step) for step in range(20_000)]
        assert decays[0] <= 0.1
        assert decays == sorted(decays)
        assert decays[-1] == decay


class TestLoss:
    def test_it_is_what_the_formula_says(self) -> None:
        logits = torch.tensor([2.0, -1.0, 0.5, 3.0]).reshape(1, 1, 2, 2)
        mask = torch.tensor([1.0, 0.0, 1.0, 0.0]).reshape(1, 1, 2, 2)
        valid = torch.tensor([1.0, 1.0, 1.0, 0.0]).reshape(1, 1, 2, 2)
        p = [1 / (1 + math.exp(-value)) for value in (2.0, -1.0, 0.5)]
        entropy = -(math.log(p[0]) + math.log(1 - p[1]) + math.log(p[2])) / 3
        dice = (2 * (p[0] + p[2]) + 1) / (sum(p) + 2 + 1)
        assert tile_losses(logits, mask, valid, 0.0).item() == pytest.approx(entropy)
        assert tile_losses(logits, mask, valid, 0.7).item() == pytest.approx(entropy + 0.7 * (1 - dice))

    def test_padding_has_no_part(self) -> None:
        logits = torch.randn(1, 1, 6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        mask, valid = torch.ones(1, 1, 6, 6), torch.zeros(1, 1, 6, 6)
        valid[..., :4, :4] = 1
        padded = tile_losses(logits, mask, valid, 0.5)
        inside = [tensor[..., :4, :4] for tensor in (logits, mask, valid)]
        assert torch.allclose(padded, tile_losses(*inside, 0.5))
        torch.autograd.backward(padded.sum())
        assert logits.grad is not None
        assert logits.grad[..., 4:, :].abs().sum() == 0

    def test_a_tile_without_cells_is_defined(self) -> None:
        empty = torch.zeros(1, 1, 4, 4)
        assert torch.isfinite(tile_losses(empty - 30, empty, empty + 1, 1.0)).all()


class TestRate:
    def test_warm_up_then_cosine(self) -> None:
        config = changed(CONFIG, epochs=10, warmup_epochs=2, schedule="cosine")
        rates = [learning_rate_factor(config, epoch, step, 4) for epoch in range(10) for step in range(4)]
        assert rates[:8] == pytest.approx([(number + 1) / 8 for number in range(8)])
        assert rates[8] == 1.0
        assert rates[24] == pytest.approx(0.5)
        assert all(later < earlier for earlier, later in pairwise(rates[8:]))
        assert 0 < rates[-1] < 0.01

    @pytest.mark.parametrize("warmup", [0.0, 0.001, 0.4, 2.9, 3.0])
    @pytest.mark.parametrize("schedule_", ["constant", "cosine"])
    def test_it_stays_between_0_and_1(self, warmup: float, schedule_: Any) -> None:
        config = changed(CONFIG, epochs=3, warmup_epochs=warmup, schedule=schedule_)
        assert all(0 < learning_rate_factor(config, epoch, step, 5) <= 1 for epoch in range(3) for step in range(5))


class TestTraining:
    def test_it_learns_in_bfloat16_too(self) -> None:
        for precision in ("float32", "bfloat16"):
            config = changed(CONFIG, epochs=12, precision=precision, learning_rate=3e-2, jitter=0.05)
            trainer = Trainer(tiny(0.0), config, seed=SEED, device=CPU)
            history = trainer.run(stream(config), steps(config), nothing)
            assert history[-1].val_dice > 0.9
            assert history[-1].train_loss < history[0].train_loss / 2
            assert history[-1].train_dice > 0.8
            assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())

    def test_accumulation_changes_nothing(self) -> None:
        runs = []
        for accumulate in (1, 2, 4):
            config = changed(CONFIG, accumulate=accumulate, optimizer="sgd")
            trainer = Trainer(tiny(0.0), config, seed=SEED, device=CPU)
            history = trainer.run(stream(config), steps(config), nothing)
            runs.append((flat(trainer.model), history[-1].train_loss, history[-1].val_dice))
        for weights, loss, dice in runs[1:]:
            assert torch.allclose(weights, runs[0][0], atol=1e-6)
            assert (loss, dice) == pytest.approx(runs[0][1:], abs=1e-6)

    def test_one_step_is_a_step_along_the_mean_gradient_of_the_batch(self) -> None:
        config = changed(CONFIG, epochs=1, batch_size=9, accumulate=3, optimizer="sgd", dice_weight=0.3)
        trainer = Trainer(tiny(0.0), config, seed=SEED, device=CPU)
        trainer.run(stream(config), 1, nothing)
        model = tiny(0.0)
        train = [item for item in stream(config) if item.ref.phase == "train"]
        whole = next(batches(iter(train), 9))
        inputs, mask = (torch.from_numpy(part).float() for part in (whole.inputs, whole.mask))
        valid = valid_pixels(whole.sizes, mask)
        torch.autograd.backward(tile_losses(model(inputs.permute(0, 3, 1, 2) / 255), mask, valid, 0.3).mean())
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= config.learning_rate * parameter.grad
        assert torch.allclose(flat(trainer.model), flat(model), atol=1e-7)

    def test_validation_is_pooled_over_all_pixels_of_all_tiles(self) -> None:
        config = changed(CONFIG, epochs=1)
        trainer = Trainer(tiny(), config, seed=SEED, device=CPU)
        (record,) = trainer.run(stream(config), steps(config), nothing)
        overlap = predicted = true = 0
        losses = []
        trainer.model.eval()
        for item in (item for item in stream(config) if item.ref.phase == "val"):
            inputs = torch.from_numpy(item.inputs.transpose(2, 0, 1)[None] / np.float32(255))
            mask = torch.from_numpy(item.mask)[None, None].float()
            with torch.no_grad():
                logits = trainer.model(inputs)
            losses.append(tile_losses(logits, mask, torch.ones_like(mask), 0.5).item())
            cell = logits[0, 0].numpy() >= 0
            overlap += int((cell & (item.mask > 0)).sum())
            predicted, true = predicted + int(cell.sum()), true + int(item.mask.sum())
        assert record.val_dice == pytest.approx(2 * overlap / (predicted + true))
        assert record.val_loss == pytest.approx(sum(losses) / 3, rel=1e-5)

    def test_repeats_of_weight_0_count_nowhere(self) -> None:
        config = changed(CONFIG, epochs=1, optimizer="sgd")

        def with_repeats() -> Iterator[Sample]:
            for item in stream(config):
                yield item
                if item.ref.phase == "train":
                    yield replace(item, ref=replace(item.ref, weight=0.0))

        plain, repeated = (Trainer(tiny(0.0), config, seed=SEED, device=CPU) for _ in range(2))
        plain.run(stream(config), steps(config), nothing)
        repeated.run(with_repeats(), steps(config), nothing)
        assert torch.allclose(flat(plain.model), flat(repeated.model), atol=1e-6)
        assert repeated.history[0].train_loss == pytest.approx(plain.history[0].train_loss, rel=1e-5)
        assert repeated.history[0].train_dice == pytest.approx(plain.history[0].train_dice, rel=1e-5)

    def test_a_loss_that_is_not_finite_stops_before_the_checkpoint_and_names_tiles(self) -> None:
        config = changed(CONFIG, epochs=2, batch_size=1)

        def marked() -> Iterator[Sample]:
            for item in stream(config):
                if item.tile_id == "t5" and item.ref.epoch == 1:
                    item.inputs[0, 0, 0] = 255
                yield item

        (turn,) = [i.ref.step for i in marked() if (i.tile_id, i.ref.epoch, i.ref.phase) == ("t5", 1, "train")]
        ends: list[int] = []
        trainer = Trainer(Breaks(), config, seed=SEED, device=CPU)
        with pytest.raises(ApacsError, match=rf"epoch 1, train step {turn}: .*\(tiles t5\)"):
            trainer.run(marked(), steps(config), lambda record, _: ends.append(record.epoch))
        assert ends == [0]

    def test_weights_that_the_last_step_broke_never_reach_a_checkpoint(self) -> None:
        config = changed(CONFIG, batch_size=N_TRAIN, learning_rate=1e38)  # one step an epoch, with a finite loss
        ends: list[int] = []
        with pytest.raises(ApacsError, match="epoch 0, val step 0: the loss is not finite"):
            Trainer(tiny(), config, seed=SEED, device=CPU).run(
                stream(config), 1, lambda record, _: ends.append(record.epoch)
            )
        assert ends == []

    def test_a_stream_that_lacks_steps_is_an_error(self) -> None:
        lost = [item for item in stream(CONFIG) if (item.ref.epoch, item.ref.step) != (1, 2)]
        with pytest.raises(ApacsError, match="epoch 1: 2 of 3 steps arrived"):
            Trainer(tiny(), CONFIG, seed=SEED, device=CPU).run(iter(lost), steps(CONFIG), nothing)
        with pytest.raises(ApacsError, match="epoch 1: 0 of 3"):
            Trainer(tiny(), CONFIG, seed=SEED, device=CPU).run(
                (item for item in stream(CONFIG) if item.ref.epoch == 0), steps(CONFIG), nothing
            )

    def test_patience_counts_from_the_earliest_best_epoch(self) -> None:
        def history(*dice: float) -> tuple[EpochRecord, ...]:
            return tuple(EpochRecord(epoch, 0, 0, 0, value, 0, 0) for epoch, value in enumerate(dice))

        assert epochs_since_best(()) == 0
        assert epochs_since_best(history(0.1, 0.5, 0.5, 0.4)) == 2
        assert epochs_since_best(history(math.nan, math.nan)) == 1
        assert epochs_since_best(history(math.nan, 0.0)) == 1
        trainer = Trainer(tiny(), changed(CONFIG, epochs=9, patience=2), seed=SEED, device=CPU)
        trainer.history = history(0.1, 0.5, 0.5)
        assert not trainer.finished()
        trainer.history = history(0.1, 0.5, 0.5, 0.4)
        assert trainer.finished()

    @pytest.mark.parametrize(("dice", "epochs"), [(1.0, 2), (0.0, 3), (None, 3)])
    def test_patience_counts_from_a_start_that_no_epoch_betters(self, dice: float | None, epochs: int) -> None:
        config = changed(CONFIG, epochs=9, patience=2, learning_rate=1e-12)  # nothing is learned
        start = start_record(FusionStart("mean", {"fcn16": 0.5, "fcn8": 0.5}, val_dice=dice, val_entropy=9.0), 0.5)
        trainer = Trainer(tiny(), config, seed=SEED, device=CPU, start=start)
        assert len(trainer.run(stream(config), steps(config), nothing)) == epochs
        assert start_record(None, 0.5) is None

    def test_where_dice_says_nothing_the_loss_decides(self) -> None:
        def history(*epochs: tuple[float, float]) -> tuple[EpochRecord, ...]:
            return tuple(EpochRecord(n, 0, 0, loss, dice, 0, 0) for n, (dice, loss) in enumerate(epochs))

        def best(*epochs: tuple[float, float]) -> int:
            return max(history(*epochs), key=score).epoch

        assert best((0.0, 0.9), (math.nan, 0.2), (0.0, 0.4)) == 1  # no cell in val: false positives are not better
        assert epochs_since_best(history((0.0, 0.9), (0.0, 0.7), (0.0, 0.6))) == 0  # it learns, and goes on
        assert best((0.5, 0.9), (0.4, 0.1), (math.nan, 0.0)) == 0
        assert best((0.5, 0.3), (0.5, 0.2), (0.5, 0.2)) == 1

    def test_the_lowest_loss_may_decide_instead(self) -> None:
        figures = [(0.9, 0.4), (0.5, 0.2), (0.6, 0.2)]
        history = tuple(EpochRecord(n, 0, 0, loss, dice, 0, 0) for n, (dice, loss) in enumerate(figures))
        kept = [best_record(history, "dice"), best_record(history, "loss")]
        assert [record.epoch for record in kept if record] == [0, 2]
        assert (epochs_since_best(history, "loss"), epochs_since_best(history, "dice")) == (0, 2)
        for select, finished in (("dice", True), ("loss", False)):
            how = changed(CONFIG, epochs=9, patience=2, select=select)
            trainer = Trainer(tiny(), how, seed=SEED, device=CPU)
            trainer.history = history
            assert trainer.finished() == finished

    def test_early_stopping_ends_the_run(self) -> None:
        config = changed(CONFIG, epochs=9, patience=2, learning_rate=1e-12)  # nothing is learned
        history = Trainer(tiny(), config, seed=SEED, device=CPU).run(stream(config), steps(config), nothing)
        assert len(history) == 3


class TestTogether:
    def test_each_network_gets_what_it_gets_alone(self) -> None:
        config = changed(CONFIG, jitter=0.1)
        alone = [Trainer(tiny(dropout), config, seed=SEED, device=CPU) for dropout in (0.0, 0.5)]
        for trainer in alone:
            trainer.run(stream(config), steps(config), nothing)
        both = [Trainer(tiny(dropout), config, seed=SEED, device=CPU) for dropout in (0.0, 0.5)]
        ends: list[tuple[int, int]] = []
        train_epochs(
            both, stream(config), steps(config), lambda who, record: ends.append((both.index(who), record.epoch))
        )
        assert ends == [(number, epoch) for epoch in range(config.epochs) for number in range(2)]
        for mine, other in zip(both, alone, strict=True):
            assert torch.equal(flat(mine.model), flat(other.model))
            assert [record.val_dice for record in mine.history] == [record.val_dice for record in other.history]

    def test_a_network_that_is_ahead_waits_for_the_others(self, tmp_path: Path) -> None:
        """As after a kill between the checkpoints of two networks."""
        straight = Trainer(tiny(), CONFIG, seed=SEED, device=CPU)
        straight.run(stream(CONFIG), steps(CONFIG), nothing)
        ahead = Trainer(tiny(), CONFIG, seed=SEED, device=CPU)

        def keep(record: EpochRecord, state: TrainState) -> None:
            if record.epoch == 1:
                save_state(tmp_path, snapshot(state))

        Trainer(tiny(), CONFIG, seed=SEED, device=CPU).run(stream(CONFIG), steps(CONFIG), keep)
        ahead.resume(tmp_path)
        behind = Trainer(tiny(), CONFIG, seed=SEED, device=CPU)
        train_epochs([ahead, behind], stream(CONFIG), steps(CONFIG), lambda who, record: None)
        for trainer in (ahead, behind):
            assert torch.equal(flat(trainer.model), flat(straight.model))
            assert [record.epoch for record in trainer.history] == list(range(CONFIG.epochs))

    def test_one_may_stop_early(self) -> None:
        slow = Trainer(tiny(), changed(CONFIG, patience=1, learning_rate=1e-12), seed=SEED, device=CPU)
        whole = Trainer(tiny(), CONFIG, seed=SEED, device=CPU)
        train_epochs([slow, whole], stream(CONFIG), steps(CONFIG), lambda who, record: None)
        assert len(slow.history) == 2
        assert len(whole.history) == CONFIG.epochs

    def test_one_that_stopped_early_holds_nobody_back_when_training_starts_again(self) -> None:
        slow = Trainer(tiny(), changed(CONFIG, patience=1, learning_rate=1e-12), seed=SEED, device=CPU)
        whole = Trainer(tiny(), CONFIG, seed=SEED, device=CPU)
        seen: list[int] = []

        def die(trainer: Trainer, record: EpochRecord) -> None:
            seen.append(record.epoch)
            if trainer is whole and record.epoch == 2:
                raise KilledError

        with pytest.raises(KilledError):
            train_epochs([slow, whole], stream(CONFIG), steps(CONFIG), die)
        assert earliest_place([slow, whole]) == (3, 0)
        train_epochs([slow, whole], stream(CONFIG, 3), steps(CONFIG), die)
        assert seen == [0, 0, 1, 1, 2, 3]
        assert earliest_place([slow, whole]) == (CONFIG.epochs, 0)

    @pytest.mark.parametrize("lost", ["train", "val"])
    def test_a_tile_that_is_lost_or_comes_twice_ends_training(self, lost: str) -> None:
        """One of several in its batch, so that every step is still there."""

        def leaky() -> Iterator[Sample]:
            samples = list(stream(changed(CONFIG, epochs=1)))
            at = next(number for number, sample in enumerate(samples) if sample.ref.phase == lost)
            yield from samples[:at] + samples[at + 1 :]

        tiles = (N_TRAIN, N_VAL)
        Trainer(tiny(), CONFIG, seed=SEED, device=CPU).run(stream(CONFIG), steps(CONFIG), nothing, tiles)
        came = f"{N_TRAIN - (lost == 'train')} training and {N_VAL - (lost == 'val')} validation tiles came"
        with pytest.raises(TrainingError, match=came):
            Trainer(tiny(), CONFIG, seed=SEED, device=CPU).run(leaky(), steps(CONFIG), nothing, tiles)


class KilledError(Exception):
    """Stands for the end of a process."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The state after two of the epochs of `RESUMED`, of a run that was killed then."""

    def keep(record: EpochRecord, state: TrainState) -> None:
        if record.epoch == 1:
            save_state(tmp_path, snapshot(state))
            raise KilledError

    with pytest.raises(KilledError):
        Trainer(tiny(), RESUMED, seed=SEED, device=CPU).run(stream(RESUMED), steps(RESUMED), keep)
    return tmp_path


RESUMED = changed(CONFIG, accumulate=2, jitter=0.2, warmup_epochs=1, weight_decay=0.01)


class TestResume:
    @pytest.mark.parametrize("ema", [0.0, 0.9])
    @pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
    def test_it_equals_an_undisturbed_run_bit_for_bit(self, tmp_path: Path, optimizer: Any, ema: float) -> None:
        config = changed(RESUMED, optimizer=optimizer, ema=ema, stain=ema / 9)

        def keep(record: EpochRecord, state: TrainState) -> None:
            if record.epoch == 1:
                save_state(tmp_path, snapshot(state))

        straight = Trainer(tiny(), config, seed=SEED, device=CPU)
        straight.run(stream(config), steps(config), keep)
        torch.manual_seed(99)  # whatever the new process drew before
        again = Trainer(tiny(), config, seed=SEED, device=CPU)
        again.resume(tmp_path)
        assert again.next_epoch == 2
        again.run(stream(config, first=2), steps(config), nothing)
        assert torch.equal(flat(straight.model), flat(again.model))
        assert timeless(straight) == timeless(again)
        assert not torch.equal(flat(straight.model), flat(tiny()))

    @pytest.mark.parametrize("count", [2, 3, 7, 9])
    def test_left_in_the_middle_of_an_epoch_it_comes_to_the_same(self, tmp_path: Path, count: int) -> None:
        straight = Trainer(tiny(), RESUMED, seed=SEED, device=CPU)
        straight.run(stream(RESUMED), steps(RESUMED), nothing)
        left = Trainer(tiny(), RESUMED, seed=SEED, device=CPU)
        assert not train_epochs([left], stream(RESUMED), steps(RESUMED), lambda who, record: None, after(count))
        save_state(tmp_path, snapshot(left.state()))
        again = Trainer(tiny(), RESUMED, seed=SEED, device=CPU)
        again.resume(tmp_path)
        assert again.place == ((count - 1) // steps(RESUMED), 1 + (count - 1) % steps(RESUMED))
        first, first_step = again.place
        assert train_epochs(
            [again], stream(RESUMED, first, first_step=first_step), steps(RESUMED), lambda who, record: None
        )
        assert torch.equal(flat(straight.model), flat(again.model))
        assert timeless(straight) == timeless(again)
        assert again.place == (RESUMED.epochs, 0)

    @given(every=st.integers(1, 5), death=st.integers(1, 11))
    @settings(max_examples=12, deadline=None)
    def test_killed_anywhere_it_loses_no_more_than_was_done_since_a_checkpoint(self, every: int, death: int) -> None:
        """A checkpoint after each `every` steps of an epoch and at its end; killed after the `death`-th step."""
        straight = Trainer(tiny(), RESUMED, seed=SEED, device=CPU)
        straight.run(stream(RESUMED), steps(RESUMED), nothing)
        kept: list[Snapshot] = []
        done = itertools.count(1)

        def interruption() -> Interruption | None:
            now = next(done)
            if now == death:
                raise KilledError
            return Interruption.KEEP if now % every == 0 else None

        def keep(who: Trainer, record: EpochRecord | None = None) -> None:
            kept.append(snapshot(who.state()))

        killed = Trainer(tiny(), RESUMED, seed=SEED, device=CPU)
        with pytest.raises(KilledError):
            train_epochs([killed], stream(RESUMED), steps(RESUMED), keep, interruption, keep)
        again = Trainer(tiny(), RESUMED, seed=SEED, device=CPU)
        if kept:
            with tempfile.TemporaryDirectory() as folder:
                save_state(Path(folder), kept[-1])
                again.resume(Path(folder))
        epoch, step = again.place
        assert 0 < death - (epoch * steps(RESUMED) + step) <= every
        train_epochs([again], stream(RESUMED, epoch, first_step=step), steps(RESUMED), lambda who, record: None)
        assert torch.equal(flat(straight.model), flat(again.model))
        assert timeless(straight) == timeless(again)

    def test_left_in_the_middle_it_waits_for_one_that_was_not(self, tmp_path: Path) -> None:
        straight = Trainer(tiny(), RESUMED, seed=SEED, device=CPU)
        straight.run(stream(RESUMED), steps(RESUMED), nothing)
        left = Trainer(tiny(), RESUMED, seed=SEED, device=CPU)
        train_epochs([left], stream(RESUMED), steps(RESUMED), lambda who, record: None, after(steps(RESUMED) + 2))
        save_state(tmp_path, snapshot(left.state()))
        ahead, behind = Trainer(tiny(), RESUMED, seed=SEED, device=CPU), Trainer(tiny(), RESUMED, seed=SEED, device=CPU)
        ahead.resume(tmp_path)
        short = Trainer(tiny(), changed(RESUMED, epochs=1), seed=SEED, device=CPU)  # ends before `ahead` has to begin
        for others in ([behind], [short]):
            train_epochs([ahead, *others], stream(RESUMED), steps(RESUMED), lambda who, record: None)
            assert torch.equal(flat(ahead.model), flat(straight.model))
            assert timeless(ahead) == timeless(straight)
            ahead = Trainer(tiny(), RESUMED, seed=SEED, device=CPU)
            ahead.resume(tmp_path)

    def test_broken_weights_are_not_left_behind(self) -> None:
        items = list(stream(CONFIG))
        items[0].inputs[0, 0, 0] = 255
        trainer = Trainer(Breaks(), CONFIG, seed=SEED, device=CPU)
        with pytest.raises(ApacsError, match="the loss is not finite"):
            train_epochs([trainer], iter(items), steps(CONFIG), lambda who, record: None, after(1))

    def test_moments_have_the_layout_of_their_weights(self, checkpoint: Path) -> None:
        trainer = Trainer(tiny(), RESUMED, seed=SEED, device=CPU)
        trainer.resume(checkpoint)
        for parameter in trainer.model.parameters():
            assert trainer.optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()

    @pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
    @pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "empty"])
    def test_damage_is_found_and_changes_nothing(self, checkpoint: Path, name: str, damage: str) -> None:
        path = checkpoint / name
        content = bytearray(path.read_bytes())
        if damage == "missing":
            path.unlink()
        else:
            content[-1] ^= 1
            path.write_bytes({"cut": content[:-9], "flipped": content, "empty": b""}[damage])
        model = tiny()
        before = flat(model)
        with pytest.raises(ApacsError, match=name):
            load_state(checkpoint, model, make_optimizer(model, RESUMED))
        assert torch.equal(flat(model), before)

    def test_a_checkpoint_of_another_network_is_refused(self, checkpoint: Path) -> None:
        other = nn.Conv2d(3, 1, 1)
        with pytest.raises(ApacsError, match="another network"):
            load_state(checkpoint, other, make_optimizer(other, RESUMED))

    def test_nothing_is_pickled(self, checkpoint: Path) -> None:
        assert sorted(path.name for path in checkpoint.iterdir()) == [
            "model.safetensors",
            "optimizer.safetensors",
            "state.json",
        ]
        assert json.loads((checkpoint / "state.json").read_text())["epoch"] == 1


class TestWriter:
    def test_a_state_is_that_of_its_moment(self) -> None:
        trainer = Trainer(tiny(), CONFIG, seed=SEED, device=CPU)
        kept: dict[int, Snapshot] = {}
        states: dict[int, Tensor] = {}
        go_on = threading.Event()

        def on_epoch(who: Trainer, record: EpochRecord) -> None:
            states[record.epoch] = flat(who.model)

            def keep(state: Snapshot) -> None:
                go_on.wait(60)  # until training is at its end
                kept[record.epoch] = state

            writer.write(f"a network of epoch {record.epoch}", who.state(), keep)

        with CheckpointWriter() as writer:
            train_epochs([trainer], stream(CONFIG), steps(CONFIG), on_epoch)
            assert not kept
            go_on.set()
        assert list(kept) == list(states) == list(range(CONFIG.epochs))
        for epoch, state in kept.items():
            assert torch.equal(torch.cat([value.flatten() for value in state.weights.values()]), states[epoch])
            assert [record["epoch"] for record in state.tree["history"]] == list(range(epoch + 1))

    def test_a_network_has_one_state_at_a_time_on_its_way(self) -> None:
        trainer = Trainer(tiny(), CONFIG, seed=SEED, device=CPU)
        trainer.run(stream(CONFIG), steps(CONFIG), nothing)
        written: list[int] = []
        with CheckpointWriter() as writer:
            for number in range(4):
                assert len(written) >= number - 1
                writer.write("fcn8", trainer.state(), lambda _, number=number: written.append(number))  # type: ignore[misc]
        assert written == [0, 1, 2, 3]

    def test_what_fails_is_told_by_the_next_write_or_at_the_end(self) -> None:
        trainer = Trainer(tiny(), CONFIG, seed=SEED, device=CPU)
        trainer.run(stream(CONFIG), steps(CONFIG), nothing)

        def fail(_: Snapshot) -> None:
            raise StoreTroubleError("the store is away")

        def keep(_: Snapshot) -> None:
            kept.append("kept")

        kept: list[str] = []

        def write(then: Callable[[CheckpointWriter], None]) -> None:
            with CheckpointWriter() as writer:
                writer.write("fcn8", trainer.state(), fail)
                then(writer)

        def more(writer: CheckpointWriter) -> None:
            writer.write("fcn8", trainer.state(), keep)

        def die(writer: CheckpointWriter) -> None:
            raise KilledError

        for then, told in ((lambda _: None, StoreTroubleError), (more, StoreTroubleError), (die, KilledError)):
            with pytest.raises(told):
                write(then)
        assert not kept


def test_a_gpu_that_is_too_small_is_told_with_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    told = gpu_too_small(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd more"), "members")
    assert "members.accumulate" in told
    assert "Tried to allocate 2 GiB" in told
    assert "And more" not in told

    def full(ensemble: Ensemble, image: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    members = {name: build_member(name, width=0.01) for name in MEMBERS}
    predictor = Predictor(Ensemble(members, {}), threads=1, precision="float32")
    monkeypatch.setattr(Ensemble, "forward", full)
    with pytest.raises(ApacsError, match=r"tile of 40 x 32 px: set evaluate\.precision"):
        predictor.logits(np.zeros((32, 40, 3), np.uint8))


def test_history_survives_its_file() -> None:
    records = (
        EpochRecord(0, 0.5, 0.25, 0.75, math.nan, 1e-4, 3.5),
        EpochRecord(1, 0.4, 0.5, 0.7, 0.125, 5e-5, 3.25),
    )
    text = history_csv(records)
    assert text.splitlines()[0] == "epoch,train_loss,train_dice,val_loss,val_dice,learning_rate,seconds"
    first, second = read_history(text)
    assert second == records[1]
    assert math.isnan(first.val_dice)
    assert replace(first, val_dice=0.0) == replace(records[0], val_dice=0.0)


# ------------------------------------------------------------- several workers

SPREAD = [
    changed(CONFIG, epochs=7, optimizer="sgd", batch_size=4, accumulate=1, dice_weight=0.0),  # 21 steps
    changed(CONFIG, epochs=2, optimizer="sgd", batch_size=5, accumulate=2),  # ranks with unequal parts
    changed(CONFIG, epochs=7, optimizer="adam", batch_size=4, accumulate=1, learning_rate=1e-3),
    changed(CONFIG, epochs=2, optimizer="adamw", batch_size=4, accumulate=2, learning_rate=1e-3),
]
WORLDS = (2, 4)


def _worker(rank: int, world: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=world,
        init_method=f"file://{folder}/meet",
        timeout=datetime.timedelta(seconds=300),
    )

    results = []
    for config in SPREAD:
        travels: list[int] = []

        def count(travels, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
            travels.append(1)
            return allreduce_hook(None, bucket)

        layout = torch.contiguous_format if config.optimizer == "sgd" else torch.channels_last
        model = nn.parallel.DistributedDataParallel(tiny(0.0).to(memory_format=layout))
        model.register_comm_hook(travels, count)
        trainer = Trainer(model, config, seed=SEED, device=CPU, ranks=Ranks(rank, world))
        history = trainer.run(stream(config, rank=rank, world=world), steps(config), nothing)
        results.append((flat(model), [replace(record, seconds=0) for record in history], len(travels)))
    message = ""
    items = list(stream(CONFIG, rank=rank, world=world))
    if rank == 1:  # in the first step, so that the other rank meets broken weights only later
        items[0].inputs[0, 0, 0] = 255
    try:
        model = nn.parallel.DistributedDataParallel(Breaks().to(memory_format=torch.channels_last))
        trainer = Trainer(model, CONFIG, seed=SEED, device=CPU, ranks=Ranks(rank, world))
        trainer.run(iter(items), steps(CONFIG), nothing)
    except ApacsError as error:
        message = str(error)
    torch.save((results, message, _left_and_resumed(rank, world, folder)), f"{folder}/result-{rank}")
    dist.barrier()
    os._exit(0)  # an end with gloo's threads still there now and then aborts ("terminate called ...")


def _left_and_resumed(rank: int, world: int, folder: str) -> Any:
    """Weights and history of a training that was left in its second epoch, with ranks of unequal parts."""
    import torch.distributed as dist

    config = SPREAD[1]

    def fresh() -> Trainer:
        model = nn.parallel.DistributedDataParallel(tiny(0.0).to(memory_format=torch.contiguous_format))
        return Trainer(model, config, seed=SEED, device=CPU, ranks=Ranks(rank, world))

    def keep(who: Trainer, record: EpochRecord) -> None:
        """Only where it was left is of interest."""

    trainer = fresh()
    train_epochs([trainer], stream(config, rank=rank, world=world), steps(config), keep, after(steps(config) + 1))
    if rank == 0:
        save_state(Path(folder, "left"), snapshot(trainer.state()))
    dist.barrier()
    again = fresh()
    again.resume(Path(folder, "left"))
    rest = stream(config, 1, rank=rank, world=world, first_step=1)
    train_epochs([again], rest, steps(config), keep)
    return flat(again.model), timeless(again)


@pytest.fixture(scope="module", params=WORLDS)
def workers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What two or four DDP workers got for each of `SPREAD`, and how they ended on a tile that only rank 1 has."""
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(_worker, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(request.param)]


class TestSeveralWorkers:
    @pytest.mark.parametrize("number", range(len(SPREAD)))
    def test_they_get_what_one_gets(self, workers: list[Any], number: int) -> None:
        config = SPREAD[number]
        alone = Trainer(tiny(0.0), config, seed=SEED, device=CPU)
        history = alone.run(stream(config), steps(config), nothing)
        for results, _, _ in workers:
            weights, theirs, travels = results[number]
            if config.optimizer == "sgd":  # Adam divides by tiny moments, which magnifies rounding
                assert torch.allclose(weights, flat(alone.model), atol=1e-5, rtol=0)
            assert travels == config.epochs * steps(config)  # gradients travel once a step, with accumulation too
            for mine, other in zip(history, theirs, strict=True):
                loosely = 1e-5 if config.optimizer == "sgd" else 1e-3
                assert other.train_loss == pytest.approx(mine.train_loss, abs=loosely)
                assert other.val_loss == pytest.approx(mine.val_loss, abs=loosely)
                assert other.val_dice == pytest.approx(mine.val_dice, abs=5e-3)
        histories = [results[number][1] for results, _, _ in workers]
        assert all(history == histories[0] for history in histories)  # so all stop at the same epoch

    def test_all_name_the_tile_that_one_of_them_broke_on(self, workers: list[Any]) -> None:
        messages = [message for _, message, _ in workers]
        assert set(messages) == {messages[0]}
        assert messages[0].startswith("epoch 0, train step 0: the loss is not finite (tiles t")

    def test_left_in_the_middle_of_an_epoch_they_come_to_the_same(self, workers: list[Any]) -> None:
        for results, _, (weights, history) in workers:
            undisturbed, theirs, _ = results[1]
            assert torch.equal(weights, undisturbed)
            for mine, other in zip(history, theirs, strict=True):
                assert mine.val_dice == other.val_dice
                assert mine.train_loss == pytest.approx(other.train_loss, rel=1e-12)
