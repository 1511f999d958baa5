"""95 % intervals of what experiments on prompts measure: the prompt is the unit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """Of what it is taken over."""


def share(outcomes: NDArray[np.bool_]) -> Figure:
    """Return the share of True, shape (n,) with n > 0, with Wilson's interval (1927)."""
    from scipy.stats import binomtest

    n, count = len(outcomes), int(outcomes.sum())
    interval = binomtest(count, n).proportion_ci(0.95, "wilson")
    return Figure(count / n, float(interval.low), float(interval.high), n)


def mean(values: NDArray[np.float64]) -> Figure:
    """Return the mean of values, shape (n,) with n > 0, with Student's interval; infinitely wide for n = 1."""
    n, value = len(values), float(values.mean())
    error = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else np.inf
    return around(value, error, n - 1, n)


def around(value: float, error: float, degrees: int, n: int) -> Figure:
    """Return a figure with its standard error as Student's interval with so many degrees of freedom."""
    from scipy.stats import t

    half = float(t.ppf(0.975, degrees)) * error if degrees > 0 else np.inf
    return Figure(value, value - half, value + half, n)
