"""How much verdicts of one prompt err together, and what that costs an interval (PROTOCOLS §13).

Every figure here is, to first order, a sum over items of what each adds to its error (its *influence*, centred within its
class). Items of one prompt may add in the same direction; the variance of the sum is then larger by the design effect
`1 + icc · (m − 1)` (Kish 1965; m is the mean size of an item's prompt, icc the intraclass correlation of influences).

1. A latent's own correlation is the sum of products of influences over pairs that share a prompt, over its value were they
   all equal (the moment estimator, with the bias of centring taken out).
2. A latent with few errors says nothing about it: a judge that loses whole prompts now and then mostly shows none lost. So
   its own estimate weighs as much as its effective number of errors, (Σu²)² / Σu⁴, against an expectation that weighs
   `Clustering.errors`, and both are averaged (a moment form of empirical Bayes).
3. The expectation is fixed before the latent is seen, so an interval remains a function of the latent's own rows, a frozen
   pilot and the configuration. Either it is `CAUTIOUS`, the default: whole prompts may fail together, but two errors' worth
   of evidence outweighs that. Or it is `pooled` over a frozen pilot of latents, which gives the best coverage. Or it is
   `INDEPENDENT`, for judges that read each item alone.
4. The effect is taken a quarter above its estimate (`MARGIN`): sums of few whole prompts are more skewed than Wilson's
   interval on the effective sample size allows for. `python -m benchmarks.intervals` measures the coverage of all three.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MARGIN = 1.25
PILOT_ERRORS = 30.0


@dataclass(frozen=True, slots=True)
class Clustering:
    """What is expected of verdicts that share a prompt, before a latent's own are seen."""

    balanced: float
    """Intraclass correlation of errors, of either class: for balanced accuracy, F1, AUROC and AUPRC."""
    positives: float
    """The same among firing items alone: for TPR."""
    negatives: float
    """The same among non-firing items alone: for TNR."""
    errors: float
    """How many errors of a latent's own weigh as much as this expectation; infinite where the latent's own count nothing."""
    latents: int = 0
    """Pilot latents that it was pooled over."""

    def described(self) -> dict[str, Any]:
        """Return it as parameters of a score."""
        return {
            "icc_expected": round(self.balanced, 6),
            "icc_errors": self.errors if math.isfinite(self.errors) else None,
            "icc_latents": self.latents,
        }


CAUTIOUS = Clustering(0.7, 0.7, 0.7, errors=2.0)
"""Before anything is known of a judge: it may lose whole prompts."""
INDEPENDENT = Clustering(0.0, 0.0, 0.0, errors=math.inf)
"""For judges that read each item alone, such as one that runs a predicate."""


class Table(NamedTuple):
    """The verdicts of one latent, shapes (items,): what is true, what the judge said, and in which prompt."""

    truth: Bools
    said: Bools
    prompts: Ints


class Pairs(NamedTuple):
    """What one latent shows of clustering; sums over latents are what a pilot shows."""

    excess: float
    """Sum of products of influences over ordered pairs that share a prompt."""
    possible: float
    """What it were with an intraclass correlation of one."""
    errors: float
    """Effective number of errors behind it."""


NOTHING = Pairs(0.0, 0.0, 0.0)


def design_effect(influences: Floats, prompts: Ints, expected: float, errors: float) -> float:
    """Return by how much clustering in `prompts` inflates the variance of the sum of `influences`; at least 1.

    `influences` (items,) sum to zero within each class; `expected` is an intraclass correlation that weighs `errors` errors.
    """
    mates = _mates(prompts)
    icc = _blend(pairs(influences, prompts), expected, errors)
    return 1 + MARGIN * _bounded(icc) * mates


def pooled(pilot: Iterable[Table]) -> Clustering:
    """Return the clustering of a judge's verdicts over the latents of a frozen `pilot`, 50 or more where they can be had.

    A pilot with few errors is drawn towards `CAUTIOUS`, like a latent with few. Latents with one class only count for it.
    """
    tables = list(pilot)
    both = _sum(_of_both(table) for table in tables)
    return Clustering(
        balanced=_bounded(_blend(both, CAUTIOUS.balanced, CAUTIOUS.errors)),
        positives=_bounded(_blend(_sum(_of_class(t, True) for t in tables), CAUTIOUS.positives, CAUTIOUS.errors)),
        negatives=_bounded(_blend(_sum(_of_class(t, False) for t in tables), CAUTIOUS.negatives, CAUTIOUS.errors)),
        errors=min(PILOT_ERRORS, CAUTIOUS.errors + both.errors),
        latents=len(tables),
    )


def pairs(influences: Floats, prompts: Ints) -> Pairs:
    """Return what `influences` (items,) show of clustering in `prompts` (items,); all zero where there is no error."""
    n, square = len(influences), float((influences**2).sum())
    if n < 2 or square == 0:
        return NOTHING
    _, cluster = np.unique(prompts, return_inverse=True)
    possible = square * _mates(prompts)
    excess = float((np.bincount(cluster, influences) ** 2).sum()) - square + possible / (n - 1)
    return Pairs(excess, possible, square**2 / float((influences**4).sum()))


def balanced_influences(truth: Bools, right: Bools) -> Floats:
    """Return what each item, shape (items,), adds to the balanced accuracy; both classes are present."""
    influences = np.empty(len(truth), dtype=np.float64)
    for of_class in (truth, ~truth):
        outcomes = right[of_class]
        influences[of_class] = (outcomes - outcomes.mean()) / (2 * len(outcomes))
    return influences


def _mates(prompts: Ints) -> float:
    """Return how many other items share an item's prompt, on average over items."""
    _, sizes = np.unique(prompts, return_counts=True)
    return float((sizes * (sizes - 1)).sum() / max(1, sizes.sum()))


def _bounded(icc: float) -> float:
    return max(0.0, min(1.0, icc))


def _sum(shown: Iterable[Pairs]) -> Pairs:
    excess, possible, errors = np.array([NOTHING, *shown], dtype=np.float64).sum(axis=0).tolist()
    return Pairs(excess, possible, errors)


def _blend(own: Pairs, expected: float, errors: float) -> float:
    if math.isinf(errors) or own.possible == 0:
        return expected
    return (own.excess / own.possible * own.errors + expected * errors) / (own.errors + errors)


def _of_both(table: Table) -> Pairs:
    if table.truth.all() or not table.truth.any():
        return NOTHING
    # Scaled by n, so that latents weigh by their errors and not by how few items they have.
    return pairs(balanced_influences(table.truth, table.said == table.truth) * len(table.truth), table.prompts)


def _of_class(table: Table, truth: bool) -> Pairs:
    of_class = table.truth == truth
    right = (table.said[of_class] == truth).astype(np.float64)
    return pairs(right - right.mean(), table.prompts[of_class]) if len(right) else NOTHING
