"""Figures for claims that are judged together: what one of them would reach by chance, and what all of them would.

1. `paired_p`: Student's one-sided paired test over prompts that the effect goes further than the controls' does on average.
2. `rank_p`: (1 + controls at least as strong) / (1 + controls), exact where the claimed latents are as good as drawn with
   the random sets (Davison & Hinkley 1997, section 4.2: the Monte Carlo test).
3. `holm`: adjusted p-values of a family of claims (Holm 1979): at most one family in twenty has a false claim below 0.05.
4. `widened`: Student's interval at the confidence that holds for all of a family together (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

Floats = NDArray[np.float64]

LEVEL = 0.05
"""Chance of any false claim in a report."""


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Return adjusted p-values, in order; None stays None and counts as one that cannot pass.

    For example 0.01, 0.04 and 0.03 become 0.03, 0.06 and 0.06.
    """
    order = sorted((i for i, p in enumerate(values) if p is not None), key=lambda i: values[i] or 0.0)
    found: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * (values[i] or 0.0)))
        found[i] = largest
    return found


def random_sets_needed(claims: int, least: int) -> int:
    """Return how many random sets let the first of so many claims pass Holm's test by rank: 20 for each."""
    return max(least, math.ceil(claims / LEVEL))


def rank_p(own: float, controls: Floats) -> float:
    """Return the rank p-value of an effect that should be above those of the controls, shape (control,).

    For example 1.0 among 0.2, 1.0 and 3.0 has p = (1 + 2) / (1 + 3) = 0.75.
    """
    return float((1 + (controls >= own).sum()) / (1 + len(controls)))


def paired_p(differences: Floats) -> float:
    """Return the one-sided p-value that differences, shape (prompt,), are above 0 on average; 1 for fewer than two.

    For example 1, 2 and 3 have t = 2 / (1 / √3) = 3.46 with 2 degrees of freedom and p = 0.037.
    """
    n = len(differences)
    if n < 2:
        return 1.0
    mean, sd = float(differences.mean()), float(differences.std(ddof=1))
    if sd == 0:
        return 0.0 if mean > 0 else 1.0
    return float(stdtr(n - 1, -mean / (sd / math.sqrt(n))))


def widened(values: Floats, claims: int) -> tuple[float, float, float]:
    """Return mean, low and high of values, shape (prompt,) with two or more, such that all of so many intervals hold together.

    For example 1, 2 and 3, one claim of one: 2 and 2 ∓ 4.303 / √3.
    """
    n, mean = len(values), float(values.mean())
    half = float(stdtrit(n - 1, 1 - LEVEL / (2 * claims))) * float(values.std(ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half
