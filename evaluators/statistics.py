"""Metrics of yes/no verdicts and their 95 % intervals (PROTOCOLS §3, §13).

Verdicts that share a prompt are correlated, so the prompt is the unit:

1. A rate's interval is Wilson's (1927) on an effective sample size: n divided by the design effect, which `clustering`
   estimates from the latent and from what is expected of the judge.
2. Balanced accuracy is the mean of two rates, TPR and TNR; its interval combines theirs by MOVER (Zou & Donner 2008), which
   keeps a width at 0 and 1, where a bootstrap has none. Its design effect is that of the combined rate, since a prompt holds
   both classes and errs on both together.
3. F1, AUROC and AUPRC: the variance is the sum of squared influences (closed form for F1, leave-one-out for the two areas:
   Tukey's jackknife), times the design effect. Wilson's interval on the sample size of a rate of that variance,
   `value (1 − value) / variance`, is kept, with at most as many trials as there are items.
   A percentile bootstrap over prompts covers 84 to 97 % there (`benchmarks.intervals`), and has no width at a perfect judge.
   Boyd, Eng & Page 2013 compare intervals of AUPRC and find the binomial and the logit form the sound ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from exegete.evaluators.clustering import CAUTIOUS, Clustering, balanced_influences, design_effect
from exegete.evaluators.clustering import Bools as Bools
from exegete.evaluators.clustering import Floats as Floats
from exegete.evaluators.clustering import Ints as Ints

Z_95 = 1.959963984540054
MANY_LATENTS = 20_000
"""Beyond so many latents the mean's interval is the normal one, which a bootstrap equals there to a hundredth of its width."""
Area = Literal["auroc", "auprc"]


class Interval(NamedTuple):
    """A figure and its 95 % interval; all None where the figure is undefined."""

    value: float | None
    low: float | None
    high: float | None


UNDEFINED = Interval(None, None, None)


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Return the Wilson 95 % interval of a rate of `successes` among `n` > 0 trials (either may be fractional)."""
    rate, z2 = successes / n, Z_95**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    # At a rate of 0 or 1 the limit is the rate itself, which rounding may miss.
    return max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half))


def rate_interval(
    outcomes: Bools, prompts: Ints, expected: float = CAUTIOUS.balanced, errors: float = CAUTIOUS.errors
) -> Interval:
    """Return the rate of True in `outcomes`, shape (items,), with Wilson's interval on the effective sample size.

    `expected` is the intraclass correlation expected in `prompts`; it weighs as much as `errors` errors (see `clustering`).
    """
    if len(outcomes) == 0:
        return UNDEFINED
    rate = float(outcomes.mean())
    return Interval(
        rate, *_wilson(outcomes, design_effect(outcomes.astype(np.float64) - rate, prompts, expected, errors))
    )


def balanced_accuracy(truth: Bools, said: Bools, prompts: Ints, clustering: Clustering = CAUTIOUS) -> Interval:
    """Return (TPR + TNR) / 2 with its MOVER interval; undefined where one of the classes is empty. Shapes (items,)."""
    if truth.all() or not truth.any():
        return UNDEFINED
    right = said == truth
    tpr, tnr = float(right[truth].mean()), float(right[~truth].mean())
    # A prompt holds both classes, so its effect is measured on what each item adds to the balanced accuracy.
    effect = design_effect(balanced_influences(truth, right), prompts, clustering.balanced, clustering.errors)
    (tpr_low, tpr_high), (tnr_low, tnr_high) = _wilson(right[truth], effect), _wilson(right[~truth], effect)
    value = (tpr + tnr) / 2
    below, above = math.hypot(tpr - tpr_low, tnr - tnr_low) / 2, math.hypot(tpr_high - tpr, tnr_high - tnr) / 2
    return Interval(value, max(0.0, value - below), min(1.0, value + above))


def f1(truth: Bools, said: Bools, prompts: Ints, clustering: Clustering = CAUTIOUS) -> Interval:
    """Return F1 at the base rate of the items, with its interval; undefined without positives. Shapes (items,)."""
    if not truth.any():
        return UNDEFINED
    hits, misses = truth & said, truth != said
    total = 2 * int(hits.sum()) + int(misses.sum())
    value = 2 * int(hits.sum()) / total
    return _interval(value, (2 * hits - value * (2.0 * hits + misses)) / total, truth, prompts, clustering)


def area(name: Area, truth: Bools, probabilities: Floats, prompts: Ints, clustering: Clustering = CAUTIOUS) -> Interval:
    """Return AUROC or AUPRC with its interval; undefined where a class is empty. Shapes (items,)."""
    if truth.all() or not truth.any():
        return UNDEFINED
    value, without = _LEAVE_ONE_OUT[name](truth, probabilities)
    # Leaving out the only item of a class leaves no area; it alone then decides it, and its influence is all there is.
    influences = value - np.where(np.isnan(without), 1.0 - value, without)
    return _interval(value, influences, truth, prompts, clustering)


def auroc(truth: Bools, probabilities: Floats) -> float | None:
    """Return the area under the ROC curve, ties counted half; None where one of the classes is empty. Shapes (items,)."""
    return None if truth.all() or not truth.any() else auroc_left_out(truth, probabilities)[0]


def auprc(truth: Bools, probabilities: Floats) -> float | None:
    """Return average precision, ties taken as one threshold; None without positives. Shapes (items,)."""
    return auprc_left_out(truth, probabilities)[0] if truth.any() else None


def auroc_left_out(truth: Bools, probabilities: Floats) -> tuple[float, Floats]:
    """Return AUROC, and what it is without each item, shape (items,): NaN where a class is empty then."""
    at, positives, negatives = _by_threshold(truth, probabilities)
    firing, silent = positives.sum(), negatives.sum()
    above = np.cumsum(positives) - positives / 2
    below = silent - np.cumsum(negatives) + negatives / 2
    won = (positives * below).sum()
    left = won - np.where(truth, below[at], above[at])
    return float(won / (firing * silent)), _ratio(left, np.where(truth, (firing - 1) * silent, firing * (silent - 1)))


def auprc_left_out(truth: Bools, probabilities: Floats) -> tuple[float, Floats]:
    """Return average precision, and what it is without each item, shape (items,): NaN without positives."""
    at, positives, negatives = _by_threshold(truth, probabilities)
    firing, hits = positives.sum(), np.cumsum(positives)
    shown = hits + np.cumsum(negatives)
    gains = positives * hits / shown
    # An item counts in every threshold from its own on. Where positives is 0 there is no gain to change.
    if_silent_left = positives * _ratio(hits, shown - 1, 0.0)
    if_firing_left = positives * _ratio(hits - 1, shown - 1, 0.0)
    own_left = (positives - 1) * _ratio(hits - 1, shown - 1, 0.0)
    before = np.cumsum(gains) - gains
    without_silent = (before + _from(if_silent_left)) / firing
    without_firing = _ratio(before + own_left + _from(if_firing_left) - if_firing_left, np.full(len(hits), firing - 1))
    return float(gains.sum() / firing), np.where(truth, without_firing[at], without_silent[at])


_LEAVE_ONE_OUT: dict[Area, Callable[[Bools, Floats], tuple[float, Floats]]] = {
    "auroc": auroc_left_out,
    "auprc": auprc_left_out,
}


def _by_threshold(truth: Bools, probabilities: Floats) -> tuple[Ints, Floats, Floats]:
    """Return each item's threshold, falling, and how many positives and negatives each has: shape (thresholds,)."""
    _, at = np.unique(-probabilities, return_inverse=True)
    return at, np.bincount(at, truth).astype(np.float64), np.bincount(at, ~truth).astype(np.float64)


def _from(values: Floats) -> Floats:
    """Return the sum of `values` (n,) from each place to the end."""
    sums: Floats = np.cumsum(values[::-1])[::-1]
    return sums


def _ratio(above: Floats, below: Floats, otherwise: float = math.nan) -> Floats:
    ratio: Floats = np.full(np.shape(above), otherwise)
    np.divide(above, below, out=ratio, where=below > 0)
    return ratio


def _interval(value: float, influences: Floats, truth: Bools, prompts: Ints, clustering: Clustering) -> Interval:
    """Return Wilson's interval on the sample size of a rate with the variance that `influences` (items,) give."""
    # The classes' sizes are chosen, not drawn: only what varies within a class is uncertain.
    centred = np.where(truth, influences - influences[truth].mean(), influences)
    if not truth.all():
        centred = np.where(truth, centred, influences - influences[~truth].mean())
    effect = design_effect(centred, prompts, clustering.balanced, clustering.errors)
    variance, n = float((centred**2).sum()) * effect, len(truth) / effect
    if variance > 0:
        n = min(n, max(value * (1 - value) / variance, 1.0))
    low, high = wilson(value * n, n)
    return Interval(value, low, high)


def _wilson(outcomes: Bools, effect: float) -> tuple[float, float]:
    effective = len(outcomes) / effect
    return wilson(float(outcomes.mean()) * effective, effective)


def paired_interval(first: Floats, second: Floats, rng: np.random.Generator, samples: int = 10_000) -> Interval:
    """Return the mean of `first − second` over latents, shape (latents,), with a bootstrap interval over latents."""
    return mean_interval(first - second, rng, samples)


def difference_interval(first: Floats, second: Floats, rng: np.random.Generator, samples: int = 10_000) -> Interval:
    """Return the difference of the means of two sets of latents, shapes (latents,) and (others,), drawn apart from each other.

    The interval is a percentile bootstrap over both; undefined where one is empty. The means of a set of more than
    `MANY_LATENTS` are drawn from the normal distribution that its resampled means have.
    """
    if not len(first) or not len(second):
        return UNDEFINED
    differences = _resampled_means(first, rng, samples) - _resampled_means(second, rng, samples)
    low, high = np.quantile(differences, [0.025, 0.975])
    return Interval(float(first.mean() - second.mean()), float(low), float(high))


def mean_interval(values: Floats, rng: np.random.Generator, samples: int = 10_000) -> Interval:
    """Return the mean over latents, shape (latents,), with its interval; undefined where empty.

    A percentile bootstrap (Efron 1979) up to `MANY_LATENTS`. Beyond, where 10,000 resamples of all latents would take hours,
    mean ± 1.96 s / √n with s the standard deviation over n: what the bootstrap converges to, by the central limit theorem.
    """
    if not len(values):
        return UNDEFINED
    if len(values) > MANY_LATENTS:
        mean, half = float(values.mean()), Z_95 * _error_of_mean(values)
        return Interval(mean, mean - half, mean + half)
    low, high = np.quantile(_resampled_means(values, rng, samples), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def _resampled_means(values: Floats, rng: np.random.Generator, samples: int) -> Floats:
    """Return the means of `samples` bootstrap samples of `values`, which is not empty; shape (samples,)."""
    n = len(values)
    if n > MANY_LATENTS:
        return rng.normal(values.mean(), _error_of_mean(values), samples)
    block = max(1, 2_000_000 // n)
    means = [
        values[rng.integers(n, size=(min(block, samples - at), n))].mean(axis=1) for at in range(0, samples, block)
    ]
    return np.concatenate(means)


def _error_of_mean(values: Floats) -> float:
    return float(values.std()) / math.sqrt(len(values))
