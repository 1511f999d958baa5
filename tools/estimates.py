"""A mean with its 95 % interval: Student's, over units that are taken as independent (prompts, texts, controls)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from exegete.tools.errors import UserError


class Estimate(NamedTuple):
    """A mean over n units, its 95 % interval and the standard deviation of the units.

    `low`, `high` and `sd` are None where one unit alone says nothing about them.
    """

    value: float
    low: float | None
    high: float | None
    sd: float | None
    n: int


def estimate(values: Sequence[float] | NDArray[np.float64], *, least: float = -math.inf) -> Estimate:
    """Return the mean of `values` with Student's 95 % interval.

    Args:
        values: one for each unit, finite.
        least: no mean can be less; the interval is cut there.

    Raises:
        UserError: there is no value, or one is not finite.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise UserError(f"cannot take a mean over values of shape {numbers.shape}; give at least one, in a row")
    if not np.isfinite(numbers).all():
        wrong = numbers[~np.isfinite(numbers)][0]
        raise UserError(
            f"a mean is asked over {len(numbers)} values of which one is {wrong}; lower the strength of the "
            'intervention, or load the subject with dtype = "float32"'
        )
    n, mean = len(numbers), float(numbers.mean())
    if n == 1:
        return Estimate(mean, None, None, None, 1)
    sd = float(numbers.std(ddof=1))
    half = float(stdtrit(n - 1, 0.975)) * sd / math.sqrt(n)
    return Estimate(mean, max(least, mean - half), mean + half, sd, n)


def estimate_from_moments(total: float, squares: float, n: int) -> Estimate:
    """Return the estimate of n values from their sum and the sum of their squares.

    Raises:
        UserError: one is not finite.
    """
    mean = estimate([total / n]).value
    if n == 1:
        return Estimate(mean, None, None, None, 1)
    sd = math.sqrt(max(0.0, squares - n * mean * mean) / (n - 1))
    half = float(stdtrit(n - 1, 0.975)) * sd / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, sd, n)
