"""How much a direction between two sets of texts depends on which texts they happen to be.

1. A direction is taken again from bootstrap samples and from both halves of the texts, drawn within each class; texts of one
   group are drawn together.
2. The figure is the mean cosine between two such directions. Bootstrap samples share texts, so that even directions of
   nothing come out alike, with a cosine near 0.5; halves share none, but have half the texts.
3. The floor of each is the same with shuffled labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from exegete.tools.cross_validation import Bools, Floats, Ints, TooFewError, draw_inner, shuffled
from exegete.tools.errors import UserError
from exegete.tools.probe_fitting import DenseView, Prepared, fit, logistic
from exegete.tools.seeds import derive_seed, generator

Method = Literal["means", "ridge"]
METHODS: tuple[Method, ...] = ("means", "ridge")

_FLOORS = 5
"""Shufflings of labels that a stability's floor is over."""
_TRIES = 100
"""Draws of halves before it is said that none has both classes twice."""


@dataclass(frozen=True)
class DirectionSettings:
    """How directions are taken and judged."""

    method: Method = "means"
    """Difference of means, or ridge-logistic."""
    folds: int = 5
    repeats: int = 3
    """Times that other folds are drawn."""
    shuffles: int = 10
    """Runs with shuffled labels."""
    resamples: int = 100
    """Bootstrap samples, and pairs of halves, that stability is over."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r} is not one of {', '.join(METHODS)}")
        if self.repeats < 1 or self.shuffles < 1:
            raise UserError("give at least 1 repeat and 1 shuffle: no figure comes without its floor")
        if self.resamples < 2 * _FLOORS:
            raise UserError(f"resamples is {self.resamples}; stability needs at least {2 * _FLOORS}")


@dataclass(frozen=True)
class Cosine:
    """How alike directions from resampled prompts are."""

    mean: float
    """Over pairs of directions."""
    low: float
    high: float
    """Between which 95 % of the pairs lie."""
    floor: float
    """Mean with shuffled labels."""
    resamples: int


@dataclass(frozen=True)
class Taker:
    """Takes directions from weighted texts. For ridge the penalty and the scale of columns are those of all texts."""

    columns: Floats
    """What directions are taken from, shape (text, column)."""
    prepared: Prepared | None
    """Turns weights of columns into those of vectors, for ridge; the columns of "means" are the vectors."""
    strength: float
    labels: Bools
    groups: Ints
    settings: DirectionSettings

    @staticmethod
    def of(vectors: Floats, labels: Bools, groups: Ints, settings: DirectionSettings) -> Taker:
        """Return the taker for the vectors of all texts, shape (text, width)."""
        every = np.arange(len(labels))
        if settings.method == "means":
            return Taker(vectors, None, 1.0, labels, groups, settings)
        inner = draw_inner(labels, groups, every, derive_seed(settings.seed, "directions", "strength"))
        probe = fit([DenseView(vectors)], labels, every, inner)
        return Taker(probe.prepared.rows(every), probe.prepared, probe.strength, labels, groups, settings)

    def vector(self, labels: Bools | None = None, counts: Floats | None = None) -> Floats:
        """Return the direction, shape (width,), of texts counted `counts` times."""
        truth = self.labels if labels is None else labels
        times = np.ones(len(truth)) if counts is None else counts
        if self.prepared is None:
            positive, negative = times * truth, times * ~truth
            found: Floats = positive @ self.columns / positive.sum() - negative @ self.columns / negative.sum()
            return found
        used = times > 0
        coefficients = logistic(self.columns[used], truth[used], self.strength, times[used])
        return self.prepared.weights(coefficients)

    def stability(self, point: str) -> tuple[Cosine, Cosine]:
        """Return the cosines between bootstrap directions and between directions of halves."""
        rng = generator(self.settings.seed, "directions", "resamples", point)
        every, count = np.arange(len(self.labels)), self.settings.resamples
        samples = _pairs(
            np.stack([self._direction(self.labels, one) for one in self._bootstraps(self.labels, count, rng)])
        )
        halves = self._halves(self.labels, count, rng)
        floors: list[Floats] = []
        floors_halves: list[Floats] = []
        for _ in range(_FLOORS):
            labels = shuffled(self.labels, self.groups, [every], rng)
            drawn = self._bootstraps(labels, count // _FLOORS, rng)
            floors.append(_pairs(np.stack([self._direction(labels, one) for one in drawn])))
            floors_halves.append(self._halves(labels, count // _FLOORS, rng))
        return (
            _cosine(samples, np.concatenate(floors), count),
            _cosine(halves, np.concatenate(floors_halves), count),
        )

    def _direction(self, labels: Bools, counts: Floats) -> Floats:
        found = self.vector(labels, counts)
        length = np.linalg.norm(found)
        return found / length if length > 0 else found

    def _halves(self, labels: Bools, count: int, rng: np.random.Generator) -> Floats:
        cosines = []
        for _ in range(count):
            half = _halved(labels, self.groups, rng)
            cosines.append(float(self._direction(labels, half) @ self._direction(labels, 1 - half)))
        return np.array(cosines)

    def _bootstraps(self, labels: Bools, count: int, rng: np.random.Generator) -> Iterator[Floats]:
        """Yield how often each text is drawn, whole groups at a time."""
        units, unit = np.unique(self.groups, return_inverse=True)
        for _ in range(count):
            times = np.zeros(len(units))
            for stratum in _strata(labels, unit):
                times += np.bincount(rng.choice(stratum, len(stratum)), minlength=len(units))
            yield times[unit]


def _halved(labels: Bools, groups: Ints, rng: np.random.Generator) -> Floats:
    """Return 1 for the texts of one half, 0 for the others, shape (text,); groups stay whole."""
    for _ in range(_TRIES):
        half = _half(labels, groups, rng)
        if all(0 < half[labels == label].sum() < (labels == label).sum() for label in (True, False)):
            return half
    raise TooFewError("the groups do not fall into two halves with both classes; give more groups")


def _half(labels: Bools, groups: Ints, rng: np.random.Generator) -> Floats:
    units, unit = np.unique(groups, return_inverse=True)
    chosen = np.zeros(len(units))
    for stratum in _strata(labels, unit):
        # Where the number is odd, chance says which half is larger.
        size = (len(stratum) + int(rng.integers(2))) // 2
        chosen[rng.permutation(stratum)[:size]] = 1
    found: Floats = chosen[unit]
    return found


def _strata(labels: Bools, unit: Ints) -> list[Ints]:
    """Return the groups with negative texts only, with positive ones only, and with both: each is resampled by itself."""
    share = np.bincount(unit, labels) / np.bincount(unit)
    kinds = [share == 0, share == 1, (share > 0) & (share < 1)]
    return [np.flatnonzero(kind) for kind in kinds if kind.any()]


def _pairs(directions: Floats) -> Floats:
    """Return the cosines of all pairs of rows of length 1."""
    found: Floats = (directions @ directions.T)[np.triu_indices(len(directions), 1)]
    return found


def _cosine(cosines: Floats, floors: Floats, count: int) -> Cosine:
    low, high = np.quantile(cosines, [0.025, 0.975])
    return Cosine(float(cosines.mean()), float(low), float(high), float(floors.mean()), count)
