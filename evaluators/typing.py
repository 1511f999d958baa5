"""Typing and abstention: which latents are explained, and which are honestly not (PROTOCOLS §12).

1. The bar of an evaluator is the 95th percentile of the per-latent scores of shuffled explanations in the same run.
2. A latent's p-value is one-sided for "its score is above the bar", from its own interval (normal approximation on the
   interval's lower half); Benjamini–Hochberg holds the false discovery rate over all latents at 5 %.
3. A latent is significant on an evaluator when it is discovered there *and* its own lower bound exceeds the bar.

Only input-side evaluators exist so far, so the types are `input`, `unexplained`, and the statuses `rare`, `dense`, `dead`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from exegete.evaluators.statistics import Z_95, Bools, Floats

FALSE_DISCOVERY_RATE = 0.05
BAR_QUANTILE = 0.95


class Scored(NamedTuple):
    """A latent's balanced accuracy and the lower end of its interval."""

    latent: int
    value: float
    low: float


def input_types(scores: Mapping[str, Sequence[Scored]], floors: Mapping[str, Sequence[float]]) -> dict[int, str]:
    """Return latent → "input" or "unexplained", from balanced accuracies of input-side evaluators.

    `scores`: evaluator → its latents' scores. `floors`: evaluator → scores of shuffled explanations. An evaluator without
    floors decides nothing: a headline without its floor does not count.
    """
    types: dict[int, str] = {}
    for evaluator, rows in scores.items():
        found = significant(rows, floors.get(evaluator, ()))
        for row, is_significant in zip(rows, found, strict=True):
            if is_significant or row.latent not in types:
                types[row.latent] = "input" if is_significant else "unexplained"
    return types


def significant(rows: Sequence[Scored], floor: Sequence[float]) -> Bools:
    """Return for each row whether it is significant against `floor`, shape (rows,)."""
    if not rows or not floor:
        return np.zeros(len(rows), dtype=np.bool_)
    bar = float(np.quantile(np.asarray(floor, dtype=np.float64), BAR_QUANTILE))
    p_values = np.array([_p_value(row, bar) for row in rows], dtype=np.float64)
    above: Bools = np.array([row.low > bar for row in rows], dtype=np.bool_)
    return benjamini_hochberg(p_values, FALSE_DISCOVERY_RATE) & above


def benjamini_hochberg(p_values: Floats, rate: float) -> Bools:
    """Return which p-values, shape (tests,), are discoveries at the false discovery rate `rate` (1995)."""
    order = np.argsort(p_values)
    passing = np.flatnonzero(p_values[order] <= rate * np.arange(1, len(p_values) + 1) / len(p_values))
    found: Bools = np.zeros(len(p_values), dtype=np.bool_)
    if len(passing):
        found[order[: passing[-1] + 1]] = True
    return found


def _p_value(row: Scored, bar: float) -> float:
    error = max((row.value - row.low) / Z_95, 1e-12)
    return 0.5 * math.erfc((row.value - bar) / error / math.sqrt(2))
