"""Where the recipe predicts the figures of its experiments, from what it knows before each of them and nothing else.

A log-probability near 0 is saturated: taking out one latent hardly moves it, and several together far more than the sum. In
the log-odds of the answer, log p / (1 − p), effects add more nearly (`odds`). So effects are carried over there, prompt by prompt,
and back; other metrics stand as they are.

1. `leading`: the first of the ranking is worth a tenth of the log-odds between the prompts and the line.
2. `alone`: a leader's exact loss on the prompts that were attributed, with the interval that its spread over them leaves open for
   the mean over all prompts: Student's, on a logarithmic scale (delta method), since losses are far from normal.
3. `together`: no less than half the sum of what the leaders do alone, since the log-probability is concave in the log-odds;
   no more than twice the sum of their effects in log-odds comes to, nor than the variants do where those are known.
4. `emptied`: a set that flips most prompts brings the metric below its line, and no further than the variants do.
5. `paired`: what the known losses alone come to for the strongest pair, where log-odds add; at least half of that.
6. `steered`: at a small KL, the log-odds of one token move by a standard deviation of √(2 KL); between a third and three of them.

Loss is a fall of the metric, above 0; changes, which the experiments report, are their negatives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from exegete.agent.investigation.recipe_figures import SHARE, Figures

Floats = NDArray[np.float64]
Ends = tuple[float | None, float | None]
"""Where a figure is predicted to lie: low and high; None is unbounded."""

FACTOR = 2.0
"""By which effects that are put together may miss."""
WIDEST = 10.0
"""Factor by which a single loss is predicted at most, each way; a wider interval tests nothing."""
_SURE = 1.05
"""And at least: the same prompts do not come out to the last digit."""
_LEVEL = 0.975
_DEVIATIONS = 3.0
_NEVER_ZERO = -1e-12
"""A log-probability of 0 has no log-odds."""


def odds(found: Figures, values: ArrayLike) -> Floats:
    """Return the metric as log-odds; as it is, unless it is a log-probability."""
    known: Floats = np.asarray(values, dtype=np.float64)
    if found.view.metric.kind != "log_probability":
        return known
    known = np.minimum(known, _NEVER_ZERO)
    return np.asarray(known - np.log(-np.expm1(known)))


def metric(found: Figures, values: ArrayLike) -> Floats:
    """Return log-odds as the metric: the way back."""
    known: Floats = np.asarray(values, dtype=np.float64)
    return -np.logaddexp(0.0, -known) if found.view.metric.kind == "log_probability" else known


def leading(found: Figures) -> Ends:
    """Return the loss of the first latent of the ranking."""
    line = found.view.metric.shown
    mean = line + found.margin
    before = odds(found, mean)
    return mean - float(metric(found, before - SHARE * (before - odds(found, line)))), None


def alone(found: Figures, latent: int) -> Ends:
    """Return the change with one leader taken out, on all search prompts."""
    loss = found.loss(latent)
    value, sd, n = loss["value"], loss.get("sd"), int(loss.get("n") or 0)
    if sd is None or n < 2 or found.exact(latent) is None:
        low, high = sorted((-value * FACTOR, -value / FACTOR))
        return low, high
    rest = max(0, len(found.view.question.cases) - n)
    # The prompts that were attributed are some of all: what is open is the mean of the others.
    half = float(stdtrit(n - 1, _LEVEL)) * float(sd) * math.sqrt(rest / ((rest + n) * n))
    if value <= 0:
        half = max(half, (_SURE - 1) * abs(value))
        return -value - half, -value + half
    factor = min(WIDEST, max(_SURE, math.exp(min(10.0, half / value))))
    return -value * factor, -value / factor


def together(found: Figures, latents: Sequence[int], measured: Sequence[str]) -> Ends:
    """Return the change with all leaders taken out; `measured` are the calls that took out one each, the first ones."""
    known = {latent: pair for latent, id in zip(latents, measured, strict=False) if (pair := found.changed(id))}
    clean = next((before for before, _ in known.values()), _cleans(found))
    losses, fall = 0.0, np.zeros(len(clean))
    for latent in latents:
        if latent in known:
            before, after = known[latent]
            losses += max(0.0, float((before - after).mean()))
            fall += odds(found, before) - odds(found, after)
        else:
            losses += max(0.0, float(found.loss(latent)["value"]))
            fall += _fall(found, float(clean.mean()), latent)
    if losses <= 0:
        return None, 0.0
    most = float((clean - metric(found, odds(found, clean) - FACTOR * fall)).mean())
    variants, _ = emptied(found)
    if variants is not None:
        most = min(most, -variants)
    return -max(most, FACTOR * losses), -losses / FACTOR


def emptied(found: Figures) -> Ends:
    """Return the change with a set taken out, or exchanged, that flips most prompts."""
    difference = found.difference
    whole = float(difference["value"]) if difference is not None and found.matters else None
    return whole if whole is not None and whole < -found.margin else None, -found.margin


def paired(found: Figures, latents: Sequence[int]) -> Ends:
    """Return the strongest interaction of pairs of latents: change of both, less that of each alone."""
    clean = float(_cleans(found).mean())
    start = odds(found, clean)
    falls = [_fall(found, clean, latent) for latent in latents if found.exact(latent) is not None]

    def left(fall: float) -> float:
        return float(metric(found, start - fall))

    least = min((left(a + b) - left(a) - left(b) + left(0.0) for a, b in combinations(falls, 2)), default=0.0)
    return None, min(0.0, least / FACTOR)


def steered(found: Figures, kl: float, id: str) -> Ends:
    """Return the change with a latent turned down by a KL; `id` is a call that has the metric of every prompt."""
    known = found.changed(id)
    if known is None or found.view.metric.kind == "judged":
        return None, 0.0
    clean, deviation = known[0], math.sqrt(2 * kl)

    def change(fall: float) -> float:
        return float((metric(found, odds(found, clean) - fall) - clean).mean())

    return change(_DEVIATIONS * deviation), change(deviation / _DEVIATIONS)


def _fall(found: Figures, clean: float, latent: int) -> float:
    """Return what a latent's loss comes to in log-odds, at the mean of the metric."""
    return float(odds(found, clean) - odds(found, clean - float(found.loss(latent)["value"])))


def _cleans(found: Figures) -> Floats:
    """Return the metric on the prompts that were attributed, or its mean over all."""
    rows: Sequence[Any] = found.facts("attribute").get("prompts", ())
    return np.array([row["clean"] for row in rows] or [found.view.metric.shown + found.margin], dtype=np.float64)
