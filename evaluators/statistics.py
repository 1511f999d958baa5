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
   A percentile bootstrap over prompts covers 76 to 95 % there, and has no width where a judge is perfect.
   Boyd, Eng & Page 2013 compare intervals of AUPRC and find the binomial and the logit form the sound ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from exegete.evaluators.clustering import CAUTIOUS, Clustering, balanced_influences, design_effect
from exegete.evaluators.clustering import Bools as Bools
from exegete.evaluators.clustering import Floats as Floats
from exegete.evaluators.clustering import Ints as Ints

Z_95 = 1.959963984540054
LEFT_OUT_AT_ONCE = 256


class Interval(NamedTuple):
    """A figure and its 95 % interval; all None where the figure is undefined."""

    value: float | None
    low: float | None
    high: float | None


UNDEFINED = Interval(None, None, None)

Area = Callable[[Bools, Floats, Floats], Floats]
"""(truth, probabilities) of shape (items,) and weights of shape (…, items) → values of shape (…)."""


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


def area(
    metric: Area, truth: Bools, probabilities: Floats, prompts: Ints, clustering: Clustering = CAUTIOUS
) -> Interval:
    """Return `weighted_auroc` or `weighted_auprc` with its interval; undefined where a class is empty. Shapes (items,)."""
    if truth.all() or not truth.any():
        return UNDEFINED
    n = len(truth)
    value = float(metric(truth, probabilities, np.ones(n)))
    without = np.concatenate(
        [
            metric(truth, probabilities, 1.0 - np.eye(n)[at : at + LEFT_OUT_AT_ONCE])
            for at in range(0, n, LEFT_OUT_AT_ONCE)
        ]
    )
    # Leaving out the only item of a class leaves no area; it alone then decides it, and its influence is all there is.
    influences = value - np.where(np.isnan(without), 1.0 - value, without)
    return _interval(value, influences, truth, prompts, clustering)


def auroc(truth: Bools, probabilities: Floats) -> float | None:
    """Return the area under the ROC curve, ties counted half; None where one of the classes is empty. Shapes (items,)."""
    return None if truth.all() or not truth.any() else float(weighted_auroc(truth, probabilities, np.ones(len(truth))))


def auprc(truth: Bools, probabilities: Floats) -> float | None:
    """Return average precision, ties taken as one threshold; None without positives. Shapes (items,)."""
    return float(weighted_auprc(truth, probabilities, np.ones(len(truth)))) if truth.any() else None


def weighted_auroc(truth: Bools, probabilities: Floats, weights: Floats) -> Floats:
    """Return AUROC for each row of `weights` (…, items), shape (…); NaN where the weights leave a class empty."""
    positives, negatives = _by_threshold(truth, probabilities, weights)
    below = negatives.sum(axis=-1, keepdims=True) - np.cumsum(negatives, axis=-1)
    return _ratio((positives * (below + negatives / 2)).sum(axis=-1), positives.sum(axis=-1) * negatives.sum(axis=-1))


def weighted_auprc(truth: Bools, probabilities: Floats, weights: Floats) -> Floats:
    """Return average precision for each row of `weights` (…, items), shape (…); NaN where they leave no positives."""
    positives, negatives = _by_threshold(truth, probabilities, weights)
    hits = np.cumsum(positives, axis=-1)
    precision = _ratio(hits, hits + np.cumsum(negatives, axis=-1))
    return _ratio((positives * np.nan_to_num(precision)).sum(axis=-1), positives.sum(axis=-1))


def _by_threshold(truth: Bools, probabilities: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Return the weight of positives and of negatives at each distinct probability, falling: shapes (…, thresholds)."""
    order = np.argsort(-probabilities, kind="stable")
    falling = probabilities[order]
    starts = np.flatnonzero(np.concatenate([[True], falling[1:] != falling[:-1]]))
    ordered = weights[..., order]
    positives: Floats = np.add.reduceat(ordered * truth[order], starts, axis=-1)
    negatives: Floats = np.add.reduceat(ordered * ~truth[order], starts, axis=-1)
    return positives, negatives


def _ratio(above: Floats, below: Floats) -> Floats:
    ratio: Floats = np.full(np.shape(above), np.nan)
    np.divide(above, below, out=ratio, where=np.asarray(below) > 0)
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


def mean_interval(values: Floats, rng: np.random.Generator, samples: int = 10_000) -> Interval:
    """Return the mean over latents, shape (latents,), with a percentile bootstrap interval; undefined where empty."""
    n = len(values)
    if n == 0:
        return UNDEFINED
    block = max(1, 2_000_000 // n)
    means = [
        values[rng.integers(n, size=(min(block, samples - at), n))].mean(axis=1) for at in range(0, samples, block)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))
