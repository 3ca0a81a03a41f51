"""Where a refined fusion starts: the combination of its members that needs no training and is best on validation.

Candidates are all weights of the members' logits in tenths (among them every single member), their plain mean, and one
that is fitted: weights, a temperature and a bias. Pooled Dice on the validation tiles decides, at a logit of 0. Of
equals the simpler is taken: fewer members, then more even weights, then what was fitted.

What is fitted to slides may be of no use to others: a bias makes up for the stain of the slide that it was fitted to.
So it is a candidate only if, fitted to some of the slides, it beats all others on those left out; never with one slide.
A member that has learned nothing would be such a bias, too: whose own Dice is less than half of the best one's has no
weight.

What is fitted rests on `Levels`, counts of pixels by what the members say of them, which add up over tiles: nothing
gathers pixels. Tasks import this, so it does not import torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

from apacs_ray.config.training_settings import MemberName
from apacs_ray.models.registry import MEMBERS
from apacs_ray.models.spec import CLAMP, FusionStart
from apacs_ray.training.batch import SMOOTH

Floats = npt.NDArray[np.float64]
Single = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

SHARE = 10  # weights are tried in tenths
ABLE = 0.5  # of the best member's Dice, that a member needs to have a weight
FOLDS = 5  # groups of slides, at most, that are left out in turn
TEMPERATURES = (0.25, 4.0)
MEAN = "mean"
WEIGHTED = "weighted"
FITTED = "fitted"

# logits of the 256 values that a stored heatmap has, as the network computes them
_probability = np.clip(np.arange(256, dtype=np.float32) / np.float32(255), np.float32(CLAMP), np.float32(1 - CLAMP))
LOGITS: Single = np.log(_probability / (1 - _probability))
LEVELS = 32  # of a member's logit, evenly wide; 0 is an edge between two of them
_width = 2 * (float(LOGITS[-1]) + 0.01) / LEVELS
LEVEL = np.floor(LOGITS / _width).astype(np.int64) + LEVELS // 2  # of each stored value
_counts = np.bincount(LEVEL, minlength=LEVELS)
LEVEL_LOGIT: Floats = np.bincount(LEVEL, weights=LOGITS, minlength=LEVELS) / np.maximum(_counts, 1)


@dataclass(frozen=True)
class Levels:
    """How many pixels lie at each combination of the members' levels.

    Attributes:
        place: (K,) int64, ascending: the members' levels, each a digit of base `LEVELS`, the first member's first.
        background: (K,) int64, pixels there that are background.
        cell: (K,) int64, pixels there that are cell.
    """

    place: npt.NDArray[np.int64]
    background: npt.NDArray[np.int64]
    cell: npt.NDArray[np.int64]

    @classmethod
    def of(cls, heatmaps: Bytes, mask: Bytes) -> Levels:
        """Count the pixels of a tile: heatmaps (H, W, M) uint8 as stored, mask (H, W) uint8 in {0, 1}."""
        place = np.zeros(mask.shape, np.int64)
        for member in range(heatmaps.shape[2]):
            place = place * LEVELS + LEVEL[heatmaps[:, :, member]]
        found, counts = np.unique(2 * place + mask, return_counts=True)
        return cls.added([cls(found >> 1, np.where(found & 1, 0, counts), np.where(found & 1, counts, 0))])

    @classmethod
    def added(cls, parts: Sequence[Levels]) -> Levels:
        """Return the counts of all parts together."""
        if not parts:
            nothing = np.zeros(0, np.int64)
            return cls(nothing, nothing, nothing)
        place, inverse = np.unique(np.concatenate([part.place for part in parts]), return_inverse=True)
        sums = np.zeros((2, len(place)), np.int64)
        np.add.at(sums[0], inverse, np.concatenate([part.background for part in parts]))
        np.add.at(sums[1], inverse, np.concatenate([part.cell for part in parts]))
        return cls(place, sums[0], sums[1])

    def logits(self, members: Sequence[MemberName]) -> Floats:
        """Return the logits (K, len(members)) of some of all `MEMBERS`."""
        powers = [len(MEMBERS) - 1 - MEMBERS.index(name) for name in members]
        digits = [self.place // LEVELS**power % LEVELS for power in powers]
        return np.stack([LEVEL_LOGIT[digit] for digit in digits], axis=1)


@dataclass(frozen=True)
class Overlap:
    """Pixels of validation tiles that are cell by a candidate and in truth; those of more tiles may be added."""

    both: int = 0
    predicted: int = 0
    true: int = 0

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(self.both + other.both, self.predicted + other.predicted, self.true + other.true)

    @property
    def dice(self) -> float | None:
        """Pooled Dice; None where nothing is true and nothing predicted."""
        total = self.predicted + self.true
        return 2 * self.both / total if total else None


def weighted_starts(members: Sequence[MemberName]) -> list[FusionStart]:
    """Return the candidates that have weights only: all in steps of 1 / `SHARE`, and the mean; none of them twice."""
    mean = (1 / len(members),) * len(members)
    starts = []
    for weights in dict.fromkeys([*_simplex(len(members)), mean]):
        used = [name for name, weight in zip(members, weights, strict=True) if weight]
        name = MEAN if weights == mean else used[0] if len(used) == 1 else WEIGHTED
        starts.append(FusionStart(name, dict(zip(members, weights, strict=True))))
    return starts


def fitted_start(folds: Sequence[Levels], members: Sequence[MemberName]) -> FusionStart | None:
    """Fit weights, a temperature and a bias, where that holds on slides that they were not fitted to.

    Args:
        folds: Counts by the levels of all `MEMBERS`, of groups of slides.
        members: Those to combine.

    Returns:
        The candidate fitted to all; None where fits to all groups but one are, on those left out, no better than the
        best of `weighted_starts`, or where there is nothing to fit.
    """
    crossed = Overlap()
    for number, left_out in enumerate(folds):
        start = _fit(Levels.added([*folds[:number], *folds[number + 1 :]]), members)
        if start is None:
            return None
        crossed += _found(start, left_out)
    whole = Levels.added(folds)
    rivals = [_found(start, whole).dice or 0.0 for start in weighted_starts(members)]
    return _fit(whole, members) if (crossed.dice or 0.0) > max(rivals) else None


def _fit(levels: Levels, members: Sequence[MemberName]) -> FusionStart | None:
    if not levels.cell.any() or not levels.background.any():
        return None
    weights, temperature, bias = _of_best_dice(levels.logits(members), levels)
    return FusionStart(FITTED, dict(zip(members, weights, strict=True)), temperature, bias)


def _found(start: FusionStart, levels: Levels) -> Overlap:
    """Count what a candidate finds, as exactly as levels allow."""
    members = [name for name in MEMBERS if name in start.weights]
    logits = levels.logits(members) @ np.array([start.weights[name] for name in members])
    found = np.round(logits, 9) / start.temperature + start.bias >= -1e-9
    both = int(levels.cell[found].sum())
    return Overlap(both, both + int(levels.background[found].sum()), int(levels.cell.sum()))


def _of_best_dice(logits: Floats, levels: Levels) -> tuple[tuple[float, ...], float, float]:
    """Try weights in steps of 1 / `SHARE`, with every threshold; then fit the temperature to the likelihood."""
    true = float(levels.cell.sum())
    best: tuple[float, tuple[float, ...], float] = (-1.0, (), 0.0)
    for weights in _simplex(logits.shape[1]):
        combined = np.round(logits @ np.array(weights), 9)
        order = np.argsort(-combined, kind="stable")
        ranked = combined[order]
        overlap = np.cumsum(levels.cell[order])
        predicted = overlap + np.cumsum(levels.background[order])
        dice = 2 * overlap / (predicted + true)
        dice[:-1][ranked[:-1] == ranked[1:]] = -1.0  # equal values are on one side of a threshold
        at = int(dice.argmax())
        if dice[at] > best[0]:
            below = ranked[at + 1] if at + 1 < len(ranked) else ranked[at] - 1.0
            threshold = 0.0 if below < 0 <= ranked[at] else (ranked[at] + below) / 2
            best = (float(dice[at]), weights, float(threshold))
    _, weights, threshold = best
    shifted = logits @ np.array(weights) - threshold

    def entropy(log_temperature: float) -> float:
        combined = shifted / math.exp(log_temperature)
        return float((levels.cell * np.logaddexp(0, -combined) + levels.background * np.logaddexp(0, combined)).sum())

    low, high = map(math.log, TEMPERATURES)
    temperature = math.exp(float(minimize_scalar(entropy, bounds=(low, high), method="bounded").x))
    return weights, temperature, -threshold / temperature


def _simplex(members: int) -> Iterator[tuple[float, ...]]:
    """Yield all weights in steps of 1 / `SHARE` whose sum is 1."""
    for shares in itertools.product(range(SHARE + 1), repeat=members - 1):
        if sum(shares) <= SHARE:
            yield (*(share / SHARE for share in shares), (SHARE - sum(shares)) / SHARE)


def overlaps(starts: Sequence[FusionStart], heatmaps: Bytes, mask: Bytes) -> npt.NDArray[np.int64]:
    """Count what candidates find in one tile, as training counts it for the network that starts there.

    Args:
        starts: The candidates.
        heatmaps: (H, W, M) uint8 of all `MEMBERS`, as stored.
        mask: (H, W) uint8 in {0, 1}.

    Returns:
        (len(starts), 3) pixels that are cell by the candidate and in truth, by the candidate, in truth; cell is found
        where the logit is at least 0.
    """
    # most pixels are like others: all candidates are counted on what differs, which is a fraction of the tile
    place = np.zeros(mask.shape, np.int32)
    for member in range(len(MEMBERS)):
        place = place << 8 | heatmaps[:, :, member]
    kinds, counts = np.unique(place << 1 | mask, return_counts=True)
    shifts = range(1 + 8 * (len(MEMBERS) - 1), 0, -8)
    said = np.stack([(kinds >> shift & 255).astype(np.uint8) for shift in shifts], axis=1)[None]
    cells = np.where(kinds & 1, counts, 0)
    found = (combined_logits(start, said)[0] >= 0 for start in starts)
    rows = [(cells[one].sum(), counts[one].sum(), cells.sum()) for one in found]
    return np.array(rows, np.int64).reshape(-1, 3)


def loss_terms(start: FusionStart, heatmaps: Bytes, mask: Bytes) -> tuple[float, float]:
    """Return the terms of the loss on one tile, as `loss.tile_losses` has them: cross-entropy, and 1 - soft Dice."""
    logits = combined_logits(start, heatmaps)
    tail = np.exp(-np.abs(logits))
    entropy = np.maximum(logits, 0) - logits * mask + np.log1p(tail)
    probability = np.where(logits >= 0, 1 / (1 + tail), tail / (1 + tail))
    both = float((probability * mask).sum(dtype=np.float64))
    total = float(probability.sum(dtype=np.float64)) + float(mask.sum())
    return float(entropy.mean(dtype=np.float64)), 1 - (2 * both + SMOOTH) / (total + SMOOTH)


def combined_logits(start: FusionStart, heatmaps: Bytes) -> Single:
    """Return the logits (H, W) float32 of a candidate for heatmaps (H, W, M) uint8 of all `MEMBERS`."""
    total = np.zeros(heatmaps.shape[:2], np.float32)
    for name, weight in start.weights.items():
        if weight:
            total += (LOGITS * np.float32(weight))[heatmaps[:, :, MEMBERS.index(name)]]
    combined: Single = total / np.float32(start.temperature) + np.float32(start.bias)
    return combined


def best_start(candidates: Sequence[FusionStart], overlaps: Sequence[Overlap]) -> FusionStart:
    """Return the best candidate on validation, with its Dice there.

    Args:
        candidates: Of the same members, `weighted_starts` among them.
        overlaps: What each found.

    Returns:
        That of the highest pooled Dice among those of able members; of equals the simplest. Where no tile holds a cell
        the mean: nothing tells them apart.
    """
    told = any(row.true for row in overlaps)
    pairs = list(zip(candidates, overlaps, strict=True))
    able = able_members(pairs)

    def rank(pair: tuple[FusionStart, Overlap]) -> tuple[float, ...]:
        start, row = pair
        return (row.dice or 0.0) if told else float(start.name == MEAN), *_simplicity(start)

    start, row = max((pair for pair in pairs if not told or able.issuperset(used_members(pair[0]))), key=rank)
    return replace(start, val_dice=row.dice)


def able_members(pairs: Sequence[tuple[FusionStart, Overlap]]) -> set[str]:
    """Return the members whose own Dice is at least `ABLE` of the best one's, by candidates and what they found."""
    alone = {used_members(start)[0]: row.dice or 0.0 for start, row in pairs if len(used_members(start)) == 1}
    return {name for name, dice in alone.items() if dice >= ABLE * max(alone.values())}


def used_members(start: FusionStart) -> tuple[str, ...]:
    """Return the members that have a weight."""
    return tuple(name for name, weight in start.weights.items() if weight)


def _simplicity(start: FusionStart) -> tuple[float, ...]:
    """Rank what was fitted last; before it fewer members, then more even weights, then more of the finest member."""
    weights = [start.weights.get(name, 0.0) for name in MEMBERS]
    even = -round(sum(weight**2 for weight in weights), 9)
    return float(start.name != FITTED), float(-np.count_nonzero(weights)), even, *reversed(weights)


def rule(start: FusionStart) -> tuple[object, ...]:
    """Return what tells starts apart that decide differently, whatever members they leave out."""
    used = tuple((name, weight) for name, weight in start.weights.items() if weight)
    return used, start.temperature, start.bias


def member_sets() -> list[tuple[MemberName, ...]]:
    """Return every set of members that a fusion may read."""
    return [chosen for count in range(2, len(MEMBERS) + 1) for chosen in itertools.combinations(MEMBERS, count)]
