"""Metrics of yes/no verdicts and their 95 % intervals (PROTOCOLS §3, §13).

Verdicts that share a prompt are correlated, so the prompt is the unit:

1. A rate's interval is Wilson's (1927) on an effective sample size: n divided by the design effect (Kish 1965), the variance
   over prompts by the variance over items, never below one.
2. Balanced accuracy is the mean of two rates, TPR and TNR; its interval combines theirs by MOVER (Zou & Donner 2008), which
   keeps a width at 0 and 1, where a bootstrap has none. Its design effect is that of the combined rate, since a prompt holds
   both classes and errs on both together.
   Where errors are rare and come a prompt at a time, one latent cannot show it: coverage is then nearer 90 % than 95 %.
3. F1, AUPRC and AUROC take a percentile bootstrap over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054
BOOTSTRAP_SAMPLES = 1000

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


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
    return max(0.0, centre - half), min(1.0, centre + half)


def design_effect(residuals: Floats, prompts: Ints) -> float:
    """Return by how much clustering in `prompts` inflates the variance of the sum of `residuals`; at least 1.

    Both have shape (items,). Each variance carries its small-sample factor, and the one over prompts the square of Student's
    quantile over the normal one, since few prompts estimate it badly.
    """
    _, cluster = np.unique(prompts, return_inverse=True)
    sums, n = np.bincount(cluster, residuals), len(residuals)
    k = len(sums)
    independent = float((residuals**2).sum()) * n / max(1, n - 1)
    if k < 2 or k == n or independent == 0:
        return 1.0
    clustered = float((sums**2).sum()) * k / (k - 1)
    return max(1.0, clustered / independent * (_student_95(k - 1) / Z_95) ** 2)


def _student_95(degrees: int) -> float:
    """Student's two-sided 95 % quantile by Hill's expansion (1970): within 0.2 % from 4 degrees of freedom on."""
    z, v = Z_95, max(degrees, 4)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / v + second / v**2 + third / v**3


def rate_interval(outcomes: Bools, prompts: Ints) -> Interval:
    """Return the rate of True in `outcomes`, shape (items,), with Wilson's interval on the effective sample size."""
    if len(outcomes) == 0:
        return UNDEFINED
    rate = float(outcomes.mean())
    return Interval(rate, *_wilson(outcomes, design_effect(outcomes.astype(np.float64) - rate, prompts)))


def balanced_accuracy(truth: Bools, said: Bools, prompts: Ints) -> Interval:
    """Return (TPR + TNR) / 2 with its MOVER interval; undefined where one of the classes is empty. Shapes (items,)."""
    if truth.all() or not truth.any():
        return UNDEFINED
    right = said == truth
    tpr, tnr = float(right[truth].mean()), float(right[~truth].mean())
    # A prompt holds both classes, so its effect is measured on what each item adds to the balanced accuracy.
    residuals = np.where(truth, (right - tpr) / truth.sum(), (right - tnr) / (~truth).sum())
    effect = design_effect(residuals, prompts)
    (tpr_low, tpr_high), (tnr_low, tnr_high) = _wilson(right[truth], effect), _wilson(right[~truth], effect)
    value = (tpr + tnr) / 2
    below, above = math.hypot(tpr - tpr_low, tnr - tnr_low) / 2, math.hypot(tpr_high - tpr, tnr_high - tnr) / 2
    return Interval(value, max(0.0, value - below), min(1.0, value + above))


def _wilson(outcomes: Bools, effect: float) -> tuple[float, float]:
    effective = len(outcomes) / effect
    return wilson(float(outcomes.mean()) * effective, effective)


def f1(truth: Bools, said: Bools, prompts: Ints, rng: np.random.Generator) -> Interval:
    """Return F1 at the base rate of the items, with a bootstrap interval over prompts; undefined without positives."""
    if not truth.any():
        return UNDEFINED
    _, cluster = np.unique(prompts, return_inverse=True)
    counts = np.stack([np.bincount(cluster, weight) for weight in (truth & said, truth != said)], axis=1)
    draws = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=BOOTSTRAP_SAMPLES) @ counts
    denominators = 2 * draws[:, 0] + draws[:, 1]
    samples = np.divide(2 * draws[:, 0], denominators, out=np.zeros(len(draws)), where=denominators > 0)
    total = counts.sum(axis=0)
    value = float(2 * total[0] / (2 * total[0] + total[1]))
    low, high = np.quantile(samples, [0.025, 0.975])
    return Interval(value, min(value, float(low)), max(value, float(high)))


def auroc(truth: Bools, probabilities: Floats) -> float | None:
    """Return the area under the ROC curve, ties counted half; None where one of the classes is empty. Shapes (items,)."""
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return None
    _, inverse, counts = np.unique(probabilities, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auprc(truth: Bools, probabilities: Floats) -> float | None:
    """Return average precision, ties taken as one threshold; None without positives. Shapes (items,)."""
    if not truth.any():
        return None
    values, inverse = np.unique(-probabilities, return_inverse=True)
    hits = np.cumsum(np.bincount(inverse, truth, minlength=len(values)))
    shown = np.cumsum(np.bincount(inverse, minlength=len(values)))
    gains = np.diff(hits, prepend=0.0)
    return float((gains * hits / shown).sum() / truth.sum())


def bootstrap(
    metric: Callable[[Bools, Floats], float | None],
    truth: Bools,
    probabilities: Floats,
    prompts: Ints,
    rng: np.random.Generator,
) -> Interval:
    """Return `metric(truth, probabilities)` with a percentile bootstrap interval over prompts; shapes (items,)."""
    value = metric(truth, probabilities)
    if value is None:
        return UNDEFINED
    _, cluster = np.unique(prompts, return_inverse=True)
    members = np.split(np.argsort(cluster, kind="stable"), np.cumsum(np.bincount(cluster))[:-1])
    samples = []
    for _ in range(BOOTSTRAP_SAMPLES):
        rows = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        sample = metric(truth[rows], probabilities[rows])
        if sample is not None:
            samples.append(sample)
    low, high = np.quantile(samples, [0.025, 0.975])
    return Interval(value, min(value, float(low)), max(value, float(high)))


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
