"""How large the differences between two sets of texts are, latent by latent.

1. Cohen's d (1988): difference of means, in standard deviations within the sides, pooled over both.
2. Its 95 % interval by the delta method: each unit's influence on d – through its side's mean and through the pooled
   variance – is squared and summed over units, or over pairs. It asks for many units, not for normal ones.
3. AUROC: the Mann–Whitney statistic over all pairs of texts, ties half.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.stats import rankdata

F64 = NDArray[np.float64]

_ENTRIES = 2**22
"""Of dense activations that are held at once."""
_NORMAL = 1.959964
"""Of a 95 % interval."""
_CONSTANT = 1e-24
"""Variance, as a share of the mean square, that the means' own rounding makes."""


def effect_sizes(units: csr_matrix, first: NDArray[np.bool_], *, pairs: bool = False) -> dict[str, F64]:
    """Return means, firing rates, effects with intervals, and AUROCs, each of shape (latent,).

    Args:
        units: pooled activations, shape (unit, latent).
        first: which units are on the first side, shape (unit,); both sides have some.
        pairs: whether unit i of the first side belongs to unit i of the second.
    """
    size = max(1, _ENTRIES // units.shape[0])
    columns = units.astype(np.float64).tocsc()
    starts = range(0, max(1, units.shape[1]), size)
    parts = [_described(columns[:, start : start + size].toarray(), first, pairs) for start in starts]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _described(x: F64, first: NDArray[np.bool_], pairs: bool) -> dict[str, F64]:
    sides = x[first], x[~first]
    means = sides[0].mean(0), sides[1].mean(0)
    effect, error = _effect(sides, means, pairs)
    return {
        "mean_first": means[0],
        "mean_second": means[1],
        "rate_first": (sides[0] != 0).mean(0),
        "rate_second": (sides[1] != 0).mean(0),
        "effect": effect,
        "low": effect - _NORMAL * error,
        "high": effect + _NORMAL * error,
        "auroc": _auroc(x, first),
    }


def _effect(sides: tuple[F64, F64], means: tuple[F64, F64], pairs: bool) -> tuple[F64, F64]:
    """Return d and its standard error, shape (latent,); where both sides are constant d is infinite, or 0."""
    n = len(sides[0]) + len(sides[1])
    centred = sides[0] - means[0], sides[1] - means[1]
    squares = centred[0] ** 2, centred[1] ** 2
    variance = (squares[0].sum(0) + squares[1].sum(0)) / max(1, n - 2)
    mean_square = ((sides[0] ** 2).sum(0) + (sides[1] ** 2).sum(0)) / n
    constant = variance <= _CONSTANT * mean_square
    difference = means[0] - means[1]
    safe = np.where(constant, 1.0, variance)
    effect = difference / np.sqrt(safe)
    influences = [
        sign * part / (len(part) * np.sqrt(safe)) - effect * (square - square.mean(0)) / (2 * n * safe)
        for sign, part, square in zip((1, -1), centred, squares, strict=True)
    ]
    whole = [influences[0] + influences[1]] if pairs else influences
    error = np.sqrt(np.sum([(part**2).sum(0) for part in whole], axis=0))
    equal = difference**2 <= _CONSTANT * mean_square
    infinite = np.where(equal, 0.0, np.copysign(np.inf, difference))
    return np.where(constant, infinite, effect), np.where(constant, 0.0, error)


def _auroc(x: F64, first: NDArray[np.bool_]) -> F64:
    n_first, n_second = int(first.sum()), int((~first).sum())
    ranks = rankdata(x, axis=0)[first].sum(0) if x.shape[1] else np.zeros(0)
    auroc: F64 = (ranks - n_first * (n_first + 1) / 2) / (n_first * n_second)
    return auroc
