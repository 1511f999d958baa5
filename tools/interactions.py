"""Which pairs of latents do together what neither does alone, found from random masks and confirmed by exact ablation.

1. From masks x (1 where a latent is ablated) and a metric y a factorisation machine (Rendle 2010) is fitted:

       y = w0 + Σ w_i x_i + Σ_{i<j} ⟨v_i, v_j⟩ x_i x_j        v_i of `rank` numbers

   with x and y standardised, so that effects and interactions are all but uncorrelated, by L-BFGS from several starts on the
   mean squared error plus `ridge` times the squared parameters. Rank times latents parameters stand for all pairs, so that
   fewer masks than pairs can do.
2. Its share of explained variance on masks that it was not fitted to stands beside that of the linear model alone.
3. In the units of the metric ⟨v_i, v_j⟩ is what the second ablation adds once the first is made: the same number as
   effect(a and b) − effect(a) − effect(b), on average over the other latents. The strongest pairs are returned, beside the
   strongest that the same machine finds where there are none: in the linear model's predictions with its residuals in
   random order.
4. `exact_interactions` ablates the leaders alone and in pairs, and random pairs beside them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from exegete.tools.ablation_sets import ZERO, Ablation, Floats, require_set
from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.intervals import Figure, mean
from exegete.tools.interventions import Tokens
from exegete.tools.judged_behaviours import Measure, measured
from exegete.tools.live_model import LiveModel
from exegete.tools.seeds import generator

_STARTS = 3
"""Random starts of the fit; the loss has local minima."""
_DRAWS = 1_000
"""Of the bootstrap over held-out masks."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class PairWeight:
    """What two latents do together beyond the sum of what they do alone, as the machine has it."""

    pair: Pair
    """Latents, the smaller number first."""
    weight: float
    """In units of the metric."""
    above_floor: bool
    """Whether its size exceeds `Interactions.floor`."""


@dataclass(frozen=True)
class Interactions:
    """A fitted factorisation machine, what it explains, and its strongest pairs."""

    pairs: tuple[PairWeight, ...]
    """The largest size first."""
    floor: float
    """95th percentile of the largest size of any pair where there is no interaction."""
    r2: float
    """Share of the variance over held-out masks that the machine explains; below 0 where it predicts worse than the mean."""
    linear_r2: float
    """The same for effects of single latents alone."""
    gain: Figure
    """`r2 − linear_r2`, with a bootstrap interval over held-out masks; `n` is their number."""
    fitted_masks: int
    rank: int
    ridge: float


def interactions(
    latents: Sequence[int],
    masks: ArrayLike,
    values: ArrayLike,
    *,
    rank: int = 4,
    ridge: float = 0.01,
    held_out: float = 0.25,
    top: int = 10,
    shuffles: int = 20,
    seed: int = 0,
) -> Interactions:
    """Find pairs of latents that interact, from random-mask trials (`exegete.tools.random_masks`).

    Args:
        latents: the columns of `masks`.
        masks: shape (mask, latent): true where it is ablated.
        values: the metric, shape (mask,) or (mask, prompt); of several prompts the mean is taken.
        rank: numbers that stand for each latent.
        ridge: strength of the penalty, for standardised masks and values.
        held_out: share of the masks that nothing is fitted to.
        top: pairs to return, at most.
        shuffles: fits without interaction, for the floor.
        seed: of the split, the starts and the shuffles.

    Raises:
        UserError: shapes do not fit, a value is not finite, values or a latent's mask never vary, there are too few masks
            or latents, or a parameter is out of range.
    """
    x, y = _checked(latents, masks, values)
    if rank < 1 or not 0 < ridge < np.inf or not 0 < held_out < 1 or top < 1 or shuffles < 1:
        raise UserError(
            f"rank is {rank}, ridge {ridge}, held_out {held_out}, top {top}, shuffles {shuffles}; "
            "give ridge > 0, 0 < held_out < 1, and the others at least 1"
        )
    test, train = _split(y, held_out, seed)
    scale = _Scale(x[train], y[train])
    machine = _best(scale.x(x[train]), scale.y(y[train]), rank, ridge, seed)
    linear = _linear(scale.x(x[train]), scale.y(y[train]), ridge)
    predictions = [one.predict(scale.x(x[test])) for one in (machine, linear)]
    weights = scale.pairs(machine)
    floor = _floor(scale, x[train], y[train], linear, rank, ridge, shuffles, seed)
    strongest = sorted(itertools.combinations(range(len(latents)), 2), key=lambda pair: -abs(weights[pair]))[:top]
    return Interactions(
        pairs=tuple(
            PairWeight(_pair(latents, pair), float(weights[pair]), bool(abs(weights[pair]) > floor))
            for pair in strongest
        ),
        floor=floor,
        r2=_r2(scale.y(y[test]), predictions[0]),
        linear_r2=_r2(scale.y(y[test]), predictions[1]),
        gain=_gain(scale.y(y[test]), predictions[0], predictions[1], seed),
        fitted_masks=len(train),
        rank=rank,
        ridge=ridge,
    )


@dataclass(frozen=True)
class ExactInteraction:
    """What ablating two latents does beyond the sum of ablating each, on every prompt."""

    pair: Pair
    first: Figure
    """Change of the metric with the pair's first latent ablated; figures are means over prompts with Student's interval."""
    second: Figure
    both: Figure
    interaction: Figure
    """`both − first − second`, taken on each prompt."""


@dataclass(frozen=True)
class ExactInteractions:
    """The pairs that were asked for, and random pairs."""

    pairs: tuple[ExactInteraction, ...]
    """In the order asked for."""
    controls: tuple[ExactInteraction, ...]
    floor: float | None
    """95th percentile of the size of the random pairs' mean interactions; None without any."""


def exact_interactions(
    model: LiveModel,
    dictionary: Dictionary,
    pairs: Sequence[Pair],
    latents: Sequence[int],
    prompts: Sequence[Tokens],
    measure: Measure,
    *,
    ablation: Ablation = ZERO,
    controls: int = 20,
    seed: int = 0,
) -> ExactInteractions:
    """Ablate pairs of latents, and each alone.

    Args:
        model: the live model, with `dictionary` attached.
        dictionary: of the latents.
        pairs: for example those of `Interactions.pairs`.
        latents: among which the random pairs are drawn, for example those that were masked.
        prompts: all of them for each pair; repeated ones once.
        measure: what is taken of each trial.
        ablation: how latents are taken out, and where.
        controls: random pairs, at most as many as there are others than `pairs`.
        seed: of the random pairs.

    Raises:
        UserError: there are no pairs or prompts, a pair is one latent twice, a latent is not in the dictionary, the metric
            is not finite, or as `LiveModel.run`.
    """
    different = list(dict.fromkeys(map(tuple, prompts)))
    if not pairs or not different or controls < 0:
        raise UserError(f"{len(pairs)} pairs, {len(prompts)} prompts, {controls} controls: give at least 1, 1 and 0")
    asked = [_sorted(*require_set(model, dictionary, pair, "latents of a pair")) for pair in pairs]
    among = sorted(require_set(model, dictionary, latents, "latents"))
    others = [pair for pair in itertools.combinations(among, 2) if pair not in set(asked)]
    drawn = generator(seed, "random pairs", *among).permutation(len(others))[:controls]
    random = [others[i] for i in drawn]
    sets: list[tuple[int, ...]] = [()]
    sets += sorted({(latent,) for pair in [*asked, *random] for latent in pair})
    sets += dict.fromkeys([*asked, *random])
    trials = ablation.trials(dictionary, sets, different)
    found = dict(zip(sets, measured(model, measure, trials).reshape(len(sets), -1), strict=True))
    effects = {one: values - found[()] for one, values in found.items()}
    exact, floors = ([_exact(pair, effects) for pair in some] for some in (asked, random))
    sizes = [abs(one.interaction.value) for one in floors]
    return ExactInteractions(tuple(exact), tuple(floors), float(np.quantile(sizes, 0.95)) if sizes else None)


def _exact(pair: Pair, effects: dict[tuple[int, ...], Floats]) -> ExactInteraction:
    first, second, both = effects[pair[:1]], effects[pair[1:]], effects[pair]
    return ExactInteraction(pair, mean(first), mean(second), mean(both), mean(both - first - second))


def _sorted(*latents: int) -> Pair:
    if len(latents) != 2:
        raise UserError(f"a pair has two latents, not {len(latents)}")
    return min(latents), max(latents)


def _pair(latents: Sequence[int], columns: Pair) -> Pair:
    return _sorted(*(int(latents[column]) for column in columns))


def _checked(latents: Sequence[int], masks: ArrayLike, values: ArrayLike) -> tuple[Floats, Floats]:
    x, y = np.asarray(masks, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] != len(latents) or y.shape[:1] != x.shape[:1] or y.ndim > 2 or y.size == 0:
        raise UserError(
            f"masks have shape {x.shape}, values {y.shape}, for {len(latents)} latents; "
            "they must be (mask, latent) and (mask,) or (mask, prompt)"
        )
    if len(set(latents)) < len(latents) or len(latents) < 2:
        raise UserError(
            f"{len(latents)} latents, {len(set(latents))} of them different; pairs need at least 2, each once"
        )
    if not np.isin(x, (0, 1)).all():
        raise UserError("masks must be true or false (1 or 0) throughout")
    if not np.isfinite(y).all():
        raise UserError(f"a value is {y[~np.isfinite(y)][0]}; the metric must be a finite number for every mask")
    return x, y if y.ndim == 1 else y.mean(1)


def _split(y: Floats, held_out: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which masks are held out, and which are fitted to."""
    order = generator(seed, "held-out masks").permutation(len(y))
    count = round(held_out * len(y))
    if count < 10 or len(y) - count < 20:
        raise UserError(f"{len(y)} masks are too few to fit and test on; give at least 40, and held_out near 0.25")
    if np.ptp(y[order[:count]]) == 0:
        raise UserError(f"the metric is the same for all {count} held-out masks; give more masks or another metric")
    return order[:count], order[count:]


class _Scale:
    """Standardises masks and values by those that are fitted to."""

    def __init__(self, x: Floats, y: Floats) -> None:
        self._x_mean, self._x_deviation = x.mean(0), x.std(0)
        self._y_mean, self._y_deviation = y.mean(), y.std()
        if not (self._x_deviation > 0).all():
            raise UserError("a latent is ablated in all masks or in none; give more masks, or a keep_share nearer 0.5")
        if not self._y_deviation > 0:
            raise UserError("the metric is the same for all masks, so there is nothing to explain; mask other latents")

    def x(self, x: Floats) -> Floats:
        return np.asarray((x - self._x_mean) / self._x_deviation, dtype=np.float64)

    def y(self, y: Floats) -> Floats:
        return np.asarray((y - self._y_mean) / self._y_deviation, dtype=np.float64)

    def pairs(self, machine: _Machine) -> Floats:
        """Return the interactions in units of the metric, shape (latent, latent)."""
        scaled = machine.v / self._x_deviation[:, None]
        return np.asarray(scaled @ scaled.T * self._y_deviation, dtype=np.float64)


@dataclass(frozen=True)
class _Machine:
    bias: float
    w: Floats
    """Shape (latent,)."""
    v: Floats
    """Shape (latent, rank)."""

    def predict(self, x: Floats) -> Floats:
        """Return predictions, by Rendle's identity in time linear in the latents."""
        pairs = ((x @ self.v) ** 2 - x**2 @ self.v**2).sum(1) / 2
        found: Floats = self.bias + x @ self.w + pairs
        return found


def _linear(x: Floats, y: Floats, ridge: float) -> _Machine:
    """Return the machine of rank 0: ridge regression, in closed form. Its columns and `y` have mean 0."""
    gram = x.T @ x / len(x) + ridge * np.eye(x.shape[1])
    w = np.asarray(np.linalg.solve(gram, x.T @ y / len(x)), dtype=np.float64)
    return _Machine(float(y.mean()), w, np.zeros((x.shape[1], 1)))


def _best(x: Floats, y: Floats, rank: int, ridge: float, seed: int) -> _Machine:
    """Return the fit of least loss among several starts."""
    from scipy.optimize import minimize

    latents = x.shape[1]
    start = np.concatenate([[0.0], _linear(x, y, ridge).w])
    fits: list[Any] = []
    for i in range(_STARTS):
        factors = 0.3 * generator(seed, "factorisation machine", i).standard_normal(latents * rank) / np.sqrt(rank)
        given = np.concatenate([start, factors])
        fits.append(minimize(_loss, given, (x, y, ridge), "L-BFGS-B", jac=True, options={"maxiter": 500}))
    best = min(fits, key=lambda fit: float(fit.fun)).x
    return _Machine(float(best[0]), best[1 : 1 + latents], best[1 + latents :].reshape(latents, rank))


def _loss(parameters: Floats, x: Floats, y: Floats, ridge: float) -> tuple[float, Floats]:
    """Return the penalised mean squared error and its gradient."""
    latents = x.shape[1]
    w, v = parameters[1 : 1 + latents], parameters[1 + latents :].reshape(latents, -1)
    error = _Machine(float(parameters[0]), w, v).predict(x) - y
    slope = 2 * error / len(x)
    sums = x @ v
    to_v = x.T @ (slope[:, None] * sums) - v * (slope @ x**2)[:, None]
    loss = float(error @ error) / len(x) + ridge * float(w @ w + (v**2).sum())
    gradient = np.concatenate([[slope.sum()], x.T @ slope + 2 * ridge * w, (to_v + 2 * ridge * v).ravel()])
    return loss, gradient


def _floor(
    scale: _Scale, x: Floats, y: Floats, linear: _Machine, rank: int, ridge: float, shuffles: int, seed: int
) -> float:
    """Return the 95th percentile of the strongest pair that is found where only noise is left beside single effects."""
    standard, fitted = scale.x(x), linear.predict(scale.x(x))
    residuals = scale.y(y) - fitted
    largest = []
    for i in range(shuffles):
        order = generator(seed, "shuffled residuals", i).permutation(len(y))
        weights = scale.pairs(_best(standard, fitted + residuals[order], rank, ridge, seed))
        largest.append(float(np.abs(weights[np.triu_indices(len(weights), 1)]).max()))
    return float(np.quantile(largest, 0.95))


def _r2(y: Floats, predicted: Floats) -> float:
    return 1 - float(((y - predicted) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def _gain(y: Floats, machine: Floats, linear: Floats, seed: int) -> Figure:
    draws = generator(seed, "bootstrap over masks").integers(len(y), size=(_DRAWS, len(y)))
    found = [_r2(y[rows], machine[rows]) - _r2(y[rows], linear[rows]) for rows in draws if np.ptp(y[rows]) > 0]
    low, high = np.quantile(found, [0.025, 0.975])
    return Figure(_r2(y, machine) - _r2(y, linear), float(low), float(high), len(y))
