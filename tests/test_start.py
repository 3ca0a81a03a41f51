"""Where a fusion starts: the best of its members on validation, whatever they say, and what becomes of it."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from apacs_ray.config.training_settings import FusionSettings, Select
from apacs_ray.data.shards import Receipt, write_table
from apacs_ray.data.tile_rows import encode_mask
from apacs_ray.distributed import tasks
from apacs_ray.distributed.heatmaps import HEATMAP_SCHEMA
from apacs_ray.distributed.starts import ValidationTiles, fit_starts, group_slides
from apacs_ray.distributed.tune import TrialResult
from apacs_ray.models.ensemble import Ensemble
from apacs_ray.models.fusion import RefinedFusion, build_fusion
from apacs_ray.models.registry import MEMBERS, build_member
from apacs_ray.models.spec import FusionStart, ModelSpec, fusion_spec, start_key
from apacs_ray.models.views import over_views
from apacs_ray.models.weights import build, load_model, weights_bytes
from apacs_ray.stages.train_networks import Network, keep_best, state_folder
from apacs_ray.stages.tune_fusion import best_trial
from apacs_ray.storage import LocalStore
from apacs_ray.testing.alone import _map_blocks
from apacs_ray.training.batch import Sample, batches
from apacs_ray.training.checkpoints import keep_checkpoint
from apacs_ray.training.dataset import Heatmaps, encode_heatmaps
from apacs_ray.training.history import EpochRecord, read_history
from apacs_ray.training.loop import Trainer
from apacs_ray.training.sampler import SampleRef
from apacs_ray.training.start import (
    FITTED,
    LOGITS,
    MEAN,
    WEIGHTED,
    Levels,
    Overlap,
    best_start,
    combined_logits,
    fitted_start,
    loss_terms,
    member_sets,
    overlaps,
    weighted_starts,
)
from apacs_ray.training.state import save_state, snapshot

SIDE = 24
TINY = 0.02
Tile = tuple[np.ndarray, np.ndarray]  # heatmaps (H, W, 3) uint8, mask (H, W) uint8


def tile(seed: int, skill: tuple[float, float, float] = (1.0, 2.0, 4.0), bias: float | tuple[float, ...] = 0.0) -> Tile:
    """Return members that know the mask by `skill` (logits that it moves them) and are wrong at random."""
    rng = np.random.default_rng(seed)
    mask = (rng.random((SIDE, SIDE)) < 0.3).astype(np.uint8)
    logits = (2.0 * mask[:, :, None] - 1) * np.array(skill) + rng.normal(0, 2, (SIDE, SIDE, 3)) + np.array(bias)
    return np.rint(255 / (1 + np.exp(-logits))).astype(np.uint8), mask


def fitted(tiles: list[Tile], members: tuple[str, ...] = MEMBERS) -> FusionStart:
    """Return the best start as `fit_starts` finds it, each tile of a slide of its own."""
    candidates = weighted_starts(members)
    if (combined := fitted_start([Levels.of(*one) for one in tiles], members)) is not None:
        candidates.append(combined)
    return best_start(candidates, [pooled(start, tiles) for start in candidates])


def pooled(start: FusionStart, tiles: list[Tile]) -> Overlap:
    """Return what a start finds, pixel by pixel."""
    total = Overlap()
    for heatmaps, mask in tiles:
        found, cell = combined_logits(start, heatmaps) >= 0, mask.astype(bool)
        total += Overlap(int((found & cell).sum()), int(found.sum()), int(cell.sum()))
    return total


def named(*weights: float) -> dict[str, float]:
    return dict(zip(MEMBERS, weights, strict=True))


def plain_starts(members: tuple[str, ...]) -> list[FusionStart]:
    """Return each member alone, and their mean."""
    alone = [FusionStart(name, {other: float(other == name) for other in members}) for name in members]
    return [*alone, FusionStart(MEAN, {name: 1 / len(members) for name in members})]


class TestFit:
    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 2**20),
        skill=st.tuples(*[st.floats(-3, 5)] * 3),
        bias=st.floats(-4, 4),
        members=st.sampled_from(member_sets()),
    )
    def test_it_is_never_below_a_member_or_the_mean_where_it_was_fitted(self, seed, skill, bias, members) -> None:
        tiles = [tile(seed + number, skill, bias) for number in range(3)]
        start = fitted(tiles, members)
        *alone, mean = plain_starts(members)
        rivals = [pooled(plain, tiles).dice or 0.0 for plain in alone]
        if min(rivals) >= 0.5 * max(rivals):
            rivals.append(pooled(mean, tiles).dice or 0.0)
        assert (start.val_dice or 0.0) >= max(rivals)
        assert start.val_dice == pooled(start, tiles).dice
        assert sum(start.weights.values()) == pytest.approx(1)
        assert min(start.weights.values()) >= 0
        assert start.temperature > 0
        assert set(start.weights) == set(members)

    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 2**20),
        skill=st.tuples(*[st.floats(-3, 5)] * 3),
        members=st.sampled_from(member_sets()),
        tenths=st.tuples(*[st.integers(0, 10)] * 3).filter(any),
    )
    def test_it_is_never_below_any_weights_in_tenths(self, seed, skill, members, tenths) -> None:
        tiles = [tile(seed + number, skill) for number in range(2)]
        left = 10
        weights = {}
        for name, share in zip(members[:-1], tenths, strict=False):
            weights[name] = min(share, left) / 10
            left -= min(share, left)
        alone = {plain.name: pooled(plain, tiles).dice or 0.0 for plain in plain_starts(members)[:-1]}
        able = {name for name, dice in alone.items() if dice >= 0.5 * max(alone.values())}
        rival = FusionStart("any", {**weights, members[-1]: left / 10})
        assume({name for name, weight in rival.weights.items() if weight} <= able)
        assert (fitted(tiles, members).val_dice or 0.0) >= (pooled(rival, tiles).dice or 0.0)

    def test_a_member_that_has_learned_nothing_has_no_weight(self) -> None:
        """It would act as a bias, which makes up for the stain of the slides of validation."""
        tiles = [tile(number, (0.0, 2.0, 2.5), bias=(-5.0, 1.5, 1.5)) for number in range(3)]
        alone = [pooled(plain, tiles).dice or 0.0 for plain in plain_starts(MEMBERS)[:-1]]
        assert alone[0] < 0.5 * max(alone)
        best = max(weighted_starts(MEMBERS), key=lambda start: pooled(start, tiles).dice or 0.0)
        assert best.weights["fcn32"] > 0  # it would be taken for the bias
        assert fitted(tiles).weights["fcn32"] == 0

    def test_members_whose_errors_differ_are_weighted(self) -> None:
        """The mean of all suffers from one that knows nothing; no member is as good as two."""
        tiles = [tile(number, (0.0, 2.0, 3.0)) for number in range(3)]
        start = fitted(tiles)
        assert start.name == WEIGHTED
        assert start.weights["fcn32"] <= 0.1
        assert 0 < start.weights["fcn16"] < start.weights["fcn8"]
        assert start.val_dice == pooled(start, tiles).dice
        best = max(pooled(plain, tiles).dice or 0.0 for plain in plain_starts(MEMBERS))
        assert start.val_dice is not None
        assert start.val_dice > best + 0.01

    def test_the_candidates_are_all_weights_once(self) -> None:
        for members in member_sets():
            candidates = weighted_starts(members)
            kinds = {tuple(start.weights.values()) for start in candidates}
            assert len(candidates) == len(kinds) == {2: 11, 3: 67}[len(members)]
            assert [start for start in plain_starts(members) if start not in candidates] == []
            assert {start.name for start in candidates} == {*members, MEAN, WEIGHTED}

    @settings(max_examples=100, deadline=None)
    @given(
        members=st.sampled_from(member_sets()),
        found=st.lists(st.integers(4, 5), min_size=67, max_size=67),
    )
    def test_of_equals_the_simplest_is_taken_whatever_the_others_are(self, members, found) -> None:
        """No other of the same Dice has fewer members, nor with as many is nearer to even weights."""
        candidates = [*weighted_starts(members), FusionStart(FITTED, dict.fromkeys(members, 1 / len(members)), 1.5)]
        rows = [Overlap(both, 6, 6) for both in (found * 2)[: len(candidates)]]
        chosen = best_start(candidates, rows)
        assert chosen.val_dice == max(row.dice for row in rows)

        def cost(start: FusionStart) -> tuple[bool, int, float]:
            used = [weight for weight in start.weights.values() if weight]
            return start.name == FITTED, len(used), round(max(used) - min(used), 6)

        equals = [start for start, row in zip(candidates, rows, strict=True) if row.dice == chosen.val_dice]
        assert cost(chosen)[:2] == min(cost(start)[:2] for start in equals)
        even = [start for start in equals if cost(start) == (cost(chosen)[0], cost(chosen)[1], 0.0)]
        assert not even or cost(chosen)[2] == 0.0

    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 2**20), skill=st.tuples(*[st.floats(-3, 5)] * 3), coarse=st.sampled_from([1, 64, 255]))
    def test_what_candidates_find_is_counted_as_pixel_by_pixel(self, seed, skill, coarse) -> None:
        heatmaps, mask = tile(seed, skill)
        heatmaps = heatmaps // coarse * coarse
        starts = [*weighted_starts(MEMBERS), TestNetwork.START, *weighted_starts(("fcn32", "fcn8"))]
        expected = [astuple(pooled(start, [(heatmaps, mask)])) for start in starts]
        assert overlaps(starts, heatmaps, mask).tolist() == list(map(list, expected))

    def test_it_finds_the_bias_and_the_better_members(self) -> None:
        tiles = [tile(number, (0.0, 3.0, 3.0), bias=2.0) for number in range(6)]
        start = fitted(tiles)
        assert start.name == FITTED
        assert start.weights["fcn32"] <= 0.1
        assert min(start.weights["fcn16"], start.weights["fcn8"]) >= 0.3
        assert start.bias * start.temperature == pytest.approx(-2, abs=0.6)
        best = max(pooled(plain, tiles).dice or 0.0 for plain in plain_starts(MEMBERS))
        assert start.val_dice is not None
        assert start.val_dice > best + 0.02

    def test_what_is_fitted_to_one_slide_is_no_candidate(self) -> None:
        """Its bias is that of the slide."""
        assert fitted([tile(0, bias=2.0)]).name != FITTED
        apart = [tile(number, bias=bias) for number, bias in enumerate((3.0, -3.0, 3.0, -3.0))]
        assert fitted(apart).name != FITTED  # a bias that serves some slides fails on the others
        assert fitted([tile(number, bias=3.0) for number in range(4)]).name == FITTED

    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_members_that_change_places_change_their_weights(self, order: tuple[int, ...]) -> None:
        tiles = [tile(number, (1.0, 2.0, 3.0)) for number in range(4)]
        moved = [(heatmaps[:, :, order], mask) for heatmaps, mask in tiles]
        plain, other = fitted(tiles), fitted(moved)
        assert other.val_dice == plain.val_dice
        for place, name in enumerate(MEMBERS):
            assert other.weights[name] == pytest.approx(plain.weights[MEMBERS[order[place]]], abs=1e-6)

    def test_of_equals_the_simpler_is_taken(self) -> None:
        _, mask = tile(0)
        exact = np.where(mask[:, :, None] == 1, 230, 20).astype(np.uint8).repeat(3, axis=2)
        assert fitted([(exact, mask)]).name == "fcn8"  # all are right: no mean, and nothing that was fitted
        candidates = [*weighted_starts(MEMBERS), FusionStart(FITTED, named(0.0, 0.1, 0.9), 1.2)]
        order = [named(0, 0, 1), named(0, 1, 0), named(1, 0, 0), named(0, 0.5, 0.5), named(0.5, 0, 0.5)]
        for place, weights in enumerate(order):
            same = [Overlap(3 if start.weights in order[:place] else 4, 5, 6) for start in candidates]
            assert best_start(candidates, same).weights == weights
        rows = [Overlap(4 if all(start.weights.values()) else 3, 5, 6) for start in candidates]
        assert best_start(candidates, rows).name == MEAN
        rows = [Overlap(4 if start.name == FITTED else 3, 5, 6) for start in candidates]
        assert best_start(candidates, rows).name == FITTED

    @pytest.mark.parametrize("cell", [0, 1])
    def test_tiles_without_cells_or_full_of_them(self, cell: int) -> None:
        heatmaps, _ = tile(1)
        start = fitted([(heatmaps, np.full((SIDE, SIDE), cell, np.uint8))])
        assert start.name != FITTED
        if not cell:  # nothing tells members apart: as before there was a choice
            assert start.name == MEAN
        assert fitted([(heatmaps * 0, np.zeros((SIDE, SIDE), np.uint8))]).val_dice is None

    @pytest.mark.parametrize("value", [0, 127, 128, 255])
    def test_constant_heatmaps_give_finite_starts(self, value: int) -> None:
        _, mask = tile(2)
        start = fitted([(np.full((SIDE, SIDE, 3), value, np.uint8), mask)])
        assert all(map(math.isfinite, (*start.weights.values(), start.temperature, start.bias)))
        assert start.val_dice is not None
        assert start.val_dice >= (pooled(FusionStart(MEAN, dict.fromkeys(MEMBERS, 1 / 3)), [tile(2)]).dice is None)

    def test_counts_add_up_however_tiles_are_spread(self) -> None:
        tiles = [tile(number) for number in range(4)]
        parts = [Levels.of(*one) for one in tiles]
        whole = Levels.added(parts)
        halves = Levels.added([Levels.added(parts[:1]), Levels.added(parts[1:])])
        for field in ("place", "background", "cell"):
            assert np.array_equal(getattr(whole, field), getattr(halves, field))
        assert whole.cell.sum() == sum(int(mask.sum()) for _, mask in tiles)
        assert (whole.cell + whole.background).sum() == 4 * SIDE * SIDE


class TestNetwork:
    START = FusionStart("fitted", {"fcn32": 0.0, "fcn16": 0.25, "fcn8": 0.75}, 1.3, -0.2, 0.9, 0.1, 0.2)

    def spec(self, start: FusionStart | None = START) -> ModelSpec:
        return ModelSpec("fusion", "fusion", width=TINY, dropout=0.0, start=start)

    def test_the_network_says_what_its_start_was_judged_by(self) -> None:
        heatmaps, _ = tile(3)
        network = build(self.spec()).eval()
        inputs = torch.from_numpy(np.concatenate([heatmaps, heatmaps], axis=2)).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            logits = network(inputs)[0, 0].numpy()
        np.testing.assert_allclose(logits, combined_logits(self.START, heatmaps), atol=2e-5)
        np.testing.assert_allclose(
            torch.logit(torch.arange(256) / 255, eps=1 / 510).numpy(), LOGITS, rtol=1e-5, atol=1e-6
        )

    def test_validation_of_the_untrained_network_gives_the_figures_of_its_start(self) -> None:
        tiles = [tile(number, bias=1.0) for number in range(3)]
        start = fitted(tiles)
        terms = np.mean([loss_terms(start, *one) for one in tiles], axis=0)
        start = replace(start, val_entropy=float(terms[0]), val_soft_dice=float(terms[1]))
        how = FusionSettings(epochs=1, dice_weight=0.5, jitter=0.0, width=TINY, dropout=0.0)
        trainer = Trainer(build(fusion_spec(how, TINY, starts={start_key(MEMBERS): start})), how, seed=0, device=CPU)
        trainer.begin_epoch()
        samples = [
            Sample(SampleRef(0, "val", 0, number, 1.0, 0), "t", np.concatenate([heatmaps, heatmaps], axis=2), mask)
            for number, (heatmaps, mask) in enumerate(tiles)
        ]
        for batch in batches(iter(samples), 1):
            trainer.take(batch, 1)
        record = trainer.end_epoch()
        assert record.val_dice == start.val_dice
        assert record.val_loss == pytest.approx(start.val_loss(how.dice_weight), abs=1e-5)

    def test_it_travels_with_the_weights_and_in_model_json(self) -> None:
        spec = self.spec()
        again = ModelSpec.from_json(spec.to_json())
        assert again == spec
        assert json.loads(spec.to_json())["start"]["weights"] == {"fcn32": 0.0, "fcn16": 0.25, "fcn8": 0.75}
        loaded = load_model(weights_bytes(build(spec)), replace(again, start=None))  # the weights hold it themselves
        assert isinstance(loaded, RefinedFusion)
        torch.testing.assert_close(loaded.start.weights, torch.tensor([0.0, 0.25, 0.75]))
        assert float(loaded.start.temperature) == pytest.approx(1.3)
        assert float(loaded.start.bias) == pytest.approx(-0.2)

    def test_a_model_of_before_starts_as_the_mean(self) -> None:
        from safetensors.torch import load, save

        spec = self.spec(None)
        tree = json.loads(spec.to_json())
        del tree["start"]
        old = {key: value for key, value in load(weights_bytes(build(spec))).items() if not key.startswith("start.")}
        loaded = load_model(save(old), ModelSpec.from_json(json.dumps(tree).encode()))
        heatmaps = torch.rand(1, 6, 40, 40)
        with torch.inference_mode():
            mean = torch.logit(heatmaps[:, :3], eps=1 / 510).mean(dim=1, keepdim=True)
            torch.testing.assert_close(loaded(heatmaps), mean)

    def test_only_the_refined_head_has_one(self) -> None:
        starts = {start_key(MEMBERS): self.START}
        assert fusion_spec(FusionSettings(), TINY, starts=starts).start == self.START
        assert fusion_spec(FusionSettings(head="published"), TINY, starts=starts).start is None
        assert fusion_spec(FusionSettings(members=("fcn16", "fcn8")), TINY, starts=starts).start is None
        published = build_fusion("published", MEMBERS, width=TINY)
        assert not [key for key in published.state_dict() if key.startswith("start.")]

    def test_the_ensemble_follows_the_best_member(self) -> None:
        torch.manual_seed(0)
        alone = FusionStart("fcn8", {"fcn32": 0.0, "fcn16": 0.0, "fcn8": 1.0})
        members = {name: build_member(name, width=TINY) for name in MEMBERS}
        ensemble = Ensemble(members, {"fusion": (self.spec(alone), build(self.spec(alone)))})
        with torch.inference_mode():
            logits = ensemble(torch.rand(1, 3, 60, 60))
        torch.testing.assert_close(logits["fusion"], logits["fcn8"].clamp(-6.2324, 6.2324), atol=1e-3, rtol=1e-3)
        assert torch.equal(logits["fusion"] >= 0, logits["fcn8"] >= 0)


CPU = torch.device("cpu")


class TestViews:
    def members(self) -> dict[str, torch.nn.Module]:
        torch.manual_seed(4)
        return {name: build_member(name, width=TINY).eval() for name in MEMBERS}

    @pytest.mark.parametrize(("views", "turns"), [(4, 2), (8, 1)])
    def test_what_they_say_turns_with_the_picture(self, views, turns: int) -> None:
        members = self.members()

        def networks(images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {name: member(images) for name, member in members.items()}

        picture = torch.rand(1, 3, 64, 64)
        with torch.inference_mode():
            plain = over_views(networks, picture, views)
            turned = over_views(networks, torch.rot90(picture, turns, (2, 3)), views)
            flipped = over_views(networks, picture.flip(3), views)
            for name in MEMBERS:
                torch.testing.assert_close(torch.rot90(plain[name], turns, (2, 3)), turned[name], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(plain[name].flip(3), flipped[name], atol=1e-4, rtol=1e-4)
            assert over_views(networks, torch.rand(1, 3, 45, 70), views)["fcn8"].shape == (1, 1, 45, 70)
            torch.testing.assert_close(over_views(networks, picture, 1)["fcn8"], members["fcn8"](picture))

    def test_a_fusion_reads_them_and_members_answer_for_themselves(self) -> None:
        alone = FusionStart("fcn8", {"fcn32": 0.0, "fcn16": 0.0, "fcn8": 1.0}, temperature=100.0)
        members = self.members()
        picture = torch.rand(2, 3, 64, 64)
        said = {}
        for views in (1, 4):
            spec = ModelSpec("fusion", "fusion", width=TINY, start=alone, views=views)
            with torch.inference_mode():
                said[views] = Ensemble(members, {"fusion": (spec, build(spec))})(picture)
        for name in MEMBERS:
            assert torch.equal(said[1][name], said[4][name])
        mean = over_views(lambda images: {"fcn8": members["fcn8"](images)}, picture, 4)["fcn8"]
        assert not torch.allclose(mean, said[1]["fcn8"], atol=1e-2)
        torch.testing.assert_close(said[4]["fusion"], mean.clamp(-6.2324, 6.2324) / 100, atol=1e-4, rtol=1e-3)


def test_starts_are_fitted_over_shards_of_stored_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one list of tiles gives it; tiles that are not annotated have no part."""
    monkeypatch.setattr(tasks, "map_blocks", _map_blocks)
    store = LocalStore(str(tmp_path))
    stored = Heatmaps(MEMBERS, "f" * 16)
    tiles = [tile(number, bias=1.0) for number in range(5)]
    paths: list[str] = []
    annotated: list[str] = []
    for number, part in enumerate((tiles[:3], tiles[3:], [])):
        path = f"tiles/split=val/aaaaaaaa-{number:05d}.parquet"
        masks = [encode_mask(mask) for _, mask in part] + [None]
        maps = [
            encode_heatmaps({name: heatmaps[:, :, place] / np.float32(255) for place, name in enumerate(MEMBERS)})
            for heatmaps, _ in [*part, tile(9)]
        ]
        ids = [f"t{place}" for place in range(len(masks))]
        slides = [f"s{number}-{place}" for place in range(len(masks))]
        table = pa.table({"tile_id": ids, "slide_id": slides, "mask": pa.array(masks, pa.binary())})
        annotated += slides[:-1]
        write_table(store, table, Receipt(path, len(ids), len(ids)), 2)
        rows = pa.table({"tile_id": ids, "heatmaps": pa.array(maps, pa.binary())}, HEATMAP_SCHEMA)
        write_table(store, rows, Receipt(stored.path(path), len(ids), len(ids)), 2)
        paths.append(path)
    starts = fit_starts(ValidationTiles(store, stored, group_slides(annotated)), paths)
    assert set(starts) == {start_key(members) for members in member_sets()}
    for members in member_sets():
        expected = fitted(tiles, members)
        terms = np.mean([loss_terms(expected, *one) for one in tiles], axis=0)
        expected = replace(expected, val_entropy=float(terms[0]), val_soft_dice=float(terms[1]))
        assert starts[start_key(members)] == expected
    assert fit_starts(ValidationTiles(store, stored, {}), paths[2:])[start_key(MEMBERS)].name == MEAN


class TestKept:
    """What is kept of a training: the best of its epochs, or what it started from."""

    def kept(
        self, tmp_path: Path, val_dice: float, start: FusionStart, select: Select = "dice"
    ) -> tuple[LocalStore, ModelSpec]:
        store = LocalStore(str(tmp_path / "run"))
        how = FusionSettings(width=TINY, dropout=0.0, epochs=1, select=select)
        network = Network("fusion", fusion_spec(how, TINY, starts={start_key(MEMBERS): start}), "fusion", how)
        torch.manual_seed(0)
        trainer = Trainer(build(network.spec), how, seed=0, device=CPU)
        with torch.no_grad():
            trainer.model.fine_score.weight.fill_(1.0)
        trainer.history = (EpochRecord(0, 0.5, 0.5, 0.5, val_dice, 1e-4, 1.0),)
        save_state(tmp_path / "state", snapshot(trainer.state()))
        keep_checkpoint(store, state_folder(network, "f" * 16), 1, tmp_path / "state", select)
        keep_best(store, network, replace(network.spec, mpp=0.5), "f" * 16, 0)
        return store, ModelSpec.from_json(store.read("fusion/model.json"))

    def test_epochs_that_are_worse_leave_the_start(self, tmp_path: Path) -> None:
        start = replace(TestNetwork.START, val_dice=0.9)
        store, spec = self.kept(tmp_path, 0.89, start)
        assert spec.metrics == {"epoch": -1, "epochs": 1, "val_dice": 0.9}
        assert (spec.start, spec.mpp) == (start, 0.5)
        network = load_model(store.read("fusion/model.safetensors"), spec)
        heatmaps, _ = tile(3)
        inputs = torch.from_numpy(np.concatenate([heatmaps, heatmaps], axis=2)).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            np.testing.assert_allclose(network(inputs)[0, 0], combined_logits(start, heatmaps), atol=2e-5)
        before, first = read_history(store.read("fusion/history.csv").decode())
        assert (before.epoch, before.val_dice, first.epoch) == (-1, 0.9, 0)
        assert math.isnan(before.train_loss)
        again = self.kept(tmp_path / "again", 0.89, start)[0]
        assert again.read("fusion/model.safetensors") == store.read("fusion/model.safetensors")

    def test_of_equals_the_start_is_kept_and_a_better_epoch_is_taken(self, tmp_path: Path) -> None:
        start = replace(TestNetwork.START, val_dice=0.9)
        assert self.kept(tmp_path / "equal", 0.9, replace(start, val_entropy=0.1))[1].metrics["epoch"] == -1
        store, spec = self.kept(tmp_path / "better", 0.91, start)
        assert spec.metrics == {"epoch": 0, "epochs": 1, "val_dice": 0.91}
        network = load_model(store.read("fusion/model.safetensors"), spec)
        assert isinstance(network, RefinedFusion)
        assert float(network.fine_score.weight.detach().min()) == 1.0  # the trained weights

    def test_the_loss_decides_where_that_is_asked_for(self, tmp_path: Path) -> None:
        start = replace(TestNetwork.START, val_dice=0.9, val_entropy=0.6, val_soft_dice=0.2)
        assert self.kept(tmp_path / "high", 0.8, start, "loss")[1].metrics["epoch"] == 0
        assert self.kept(tmp_path / "low", 0.95, replace(start, val_entropy=0.2), "loss")[1].metrics["epoch"] == -1


class TestSweep:
    @settings(max_examples=100, deadline=None)
    @given(
        dice=st.tuples(*[st.sampled_from([0.0, 0.5, 0.7, 0.8])] * 4),
        drawn=st.lists(
            st.tuples(st.sampled_from([None, *member_sets()]), st.sampled_from([0.1, 0.6, 0.9])), min_size=1, max_size=6
        ),
    )
    def test_it_never_leaves_out_the_best_member_for_a_better_trial(self, dice, drawn) -> None:
        single = dict(zip((*MEMBERS, MEAN), dice, strict=True))
        starts = {
            start_key(members): FusionStart("any", {}, val_dice=max(single[name] for name in (*members, MEAN)))
            for members in member_sets()
        }
        trials = [
            TrialResult(str(at), {} if members is None else {"members": list(members)}, val, 1, 1.0, None)
            for at, (members, val) in enumerate(drawn)
        ]
        best = best_trial(trials, FusionSettings(), starts)
        chosen = best.setting.get("members", MEMBERS)
        top = max(MEMBERS, key=lambda name: single[name])
        alone_at_the_top = all(single[top] > value for name, value in single.items() if name != top)
        if alone_at_the_top and any(top in (members or MEMBERS) for members, _ in drawn):
            assert top in chosen
        same = [trial for trial in trials if trial.setting.get("members", MEMBERS) == chosen]
        assert best.val_dice == max(trial.val_dice or 0.0 for trial in same)
