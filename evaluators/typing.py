"""Typing and abstention: which latents are explained, and which are honestly not (PROTOCOLS §12).

1. An evaluator speaks for one side: detection and fuzzing for what makes the latent fire, intervention for what the latent
   does to the output. Others decide nothing.
2. The bar of an evaluator is the 95th percentile of the per-latent scores of shuffled explanations in the same run, taken
   so that another such score exceeds it with a probability of at most 5 % (`bar`).
3. Further floors (`controls`) each have a bar of their own, and the highest counts: the explanations of a random-weight
   dictionary at the same hook point, say, scored by the same evaluators. Where tokens alone predict much of what stands at
   the hook point, random directions fire on predictable tokens and are truly explained; the shuffled bar asks whether an
   explanation holds, this one whether it holds better than an explanation of a random direction does
   (`benchmarks.random_dictionary`; cf. Heap et al. 2025, "Sparse autoencoders can interpret randomly initialized
   transformers"). Of latents like the control's at most 5 % may be typed as explained by all evaluators together, so with m
   that decide the bar is the percentile at 1 − 0.05 / m (Bonferroni), for which `least_controls` says how many it takes.
4. A latent's p-value is one-sided for "its score is above the bar", from its own interval (normal approximation on the
   interval's lower half); Benjamini–Hochberg holds the false discovery rate over all latents at 5 %.
5. A latent is significant on an evaluator when it is discovered there *and* its own lower bound exceeds the bar, and on a
   side when it is on one of the side's evaluators. `input`, `output` and `both` say on which sides, `unexplained` that on
   none. (`rare`, `dense` and `dead` are statuses of the evidence, not found here.)

Scores of a million latents come as arrays (`Scores`), and so do their types (`Typed`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from exegete.evaluators.statistics import Z_95, Bools, Floats, Ints

INPUT_EVALUATORS = ("detection", "fuzzing")
"""Say whether the explanation tells what the latent fires on; by balanced accuracy."""
OUTPUT_EVALUATORS = ("intervention",)
"""Say whether the explanation tells what the latent does to the output; by accuracy or, with a local scorer, information."""

FALSE_DISCOVERY_RATE = 0.05
BAR_QUANTILE = 0.95

_TYPES = np.array(["unexplained", "input", "output", "both"])
"""At 1 for the input + 2 for the output."""


class Scored(NamedTuple):
    """A latent's figure on an evaluator and the lower end of its interval; None (or NaN) where there is none."""

    latent: int
    value: float | None
    low: float | None


class Scores(NamedTuple):
    """The figures of many latents on an evaluator, each shape (rows,); NaN where there is none."""

    latents: Ints
    values: Floats
    lows: Floats


class Typed(NamedTuple):
    """The types of latents, ascending, each shape (latents,)."""

    latents: Ints
    types: NDArray[np.str_]

    def as_dict(self) -> dict[int, str]:
        """Return latent → type."""
        return dict(zip(self.latents.tolist(), self.types.tolist(), strict=True))


def types(
    scores: Mapping[str, Sequence[Scored]],
    floors: Mapping[str, Sequence[float]],
    *,
    controls: Sequence[Mapping[str, Sequence[float]]] = (),
    input_side: Sequence[str] = INPUT_EVALUATORS,
    output_side: Sequence[str] = OUTPUT_EVALUATORS,
) -> dict[int, str]:
    """Return latent → type, ascending by latent: `typed_latents` of rows, for few latents."""
    columns = {name: _columns(rows) for name, rows in scores.items()}
    return typed_latents(columns, floors, controls=controls, input_side=input_side, output_side=output_side).as_dict()


def typed_latents(
    scores: Mapping[str, Scores],
    floors: Mapping[str, Iterable[float]],
    *,
    controls: Sequence[Mapping[str, Sequence[float]]] = (),
    input_side: Sequence[str] = INPUT_EVALUATORS,
    output_side: Sequence[str] = OUTPUT_EVALUATORS,
) -> Typed:
    """Return the types of latents: "input", "output", "both" or "unexplained".

    A latent without a figure on any evaluator that counts is left out: it was not measured, which is not the same as not
    explained. A figure without an interval proves nothing.

    Args:
        scores: evaluator → the latents' scores, in the evaluator's headline metric.
        floors: evaluator → scores of shuffled explanations in the same metric. An evaluator without floors decides nothing:
            a headline without its floor does not count.
        controls: further floors that must be exceeded as well, each as `floors`, by bars that hold over all evaluators
            together; where one lacks an evaluator, that evaluator decides nothing (`{**floors, "intervention": [...]}` is
            a control for one evaluator alone).
        input_side: evaluators that speak for the input.
        output_side: evaluators that speak for the output.
    """
    measured = {name: _finite(scores[name]) for name in (*input_side, *output_side) if name in scores}
    measured = {name: rows for name, rows in measured.items() if len(rows.latents)}
    level = 1 - (1 - BAR_QUANTILE) / max(len(measured), 1)
    latents = np.unique(np.concatenate([np.zeros(0, np.int64), *(rows.latents for rows in measured.values())]))
    sides: NDArray[np.int64] = np.zeros((2, len(latents)), dtype=np.int64)
    for on, side in zip(sides, (input_side, output_side), strict=True):
        for name in side:
            if rows := measured.get(name):
                others = [control.get(name, ()) for control in controls]
                found = _significant(rows, floors.get(name, ()), others, level)
                on[np.searchsorted(latents, rows.latents[found])] = 1
    return Typed(latents, _TYPES[sides[0] + 2 * sides[1]])


def significant(
    rows: Sequence[Scored],
    floor: Sequence[float],
    *,
    controls: Sequence[Sequence[float]] = (),
    level: float = BAR_QUANTILE,
) -> Bools:
    """Return for each row whether it is significant, shape (rows,).

    The bar is the highest of the 95th percentile of `floor` and the percentiles of `controls` at `level`.
    """
    return _significant(_columns(rows), floor, controls, level)


def bar(floor: Iterable[float], level: float = BAR_QUANTILE) -> float:
    """Return the percentile of `floor` at `level` that holds for the next score as well; infinite where there is no score.

    Of n scores it is the ⌈level (n + 1)⌉-th smallest, which one more of their kind exceeds with a probability of at most
    1 − level (the split conformal quantile, Papadopoulos et al. 2002). Fewer than 19 cannot promise that for 0.95: then it is
    the largest of them. NaN and infinite scores are left out.
    """
    finite = sorted(value for value in floor if math.isfinite(value))
    if not finite:
        return math.inf
    place = math.ceil(level * (len(finite) + 1) - 1e-9)  # 0.95 is a little less or more than that in binary.
    return float(finite[min(place, len(finite)) - 1])


def deciding_evaluators(names: Iterable[str]) -> list[str]:
    """Return those of the evaluators `names` that speak for a side, in their order."""
    return [name for name in names if name in (*INPUT_EVALUATORS, *OUTPUT_EVALUATORS)]


def least_controls(evaluators: int) -> int:
    """Return how many scores a control needs for its bar, where so many evaluators decide: 19 for one, 39 for two, 59 for three."""
    return math.ceil(evaluators / (1 - BAR_QUANTILE) - 1e-9) - 1


def benjamini_hochberg(p_values: Floats, rate: float) -> Bools:
    """Return which p-values, shape (tests,), are discoveries at the false discovery rate `rate` (1995)."""
    order = np.argsort(p_values)
    passing = np.flatnonzero(p_values[order] <= rate * np.arange(1, len(p_values) + 1) / len(p_values))
    found: Bools = np.zeros(len(p_values), dtype=np.bool_)
    if len(passing):
        found[order[: passing[-1] + 1]] = True
    return found


def _significant(rows: Scores, floor: Iterable[float], controls: Sequence[Iterable[float]], level: float) -> Bools:
    """Return for each row whether it is significant, as `significant`."""
    if not len(rows.latents):
        return np.zeros(0, dtype=np.bool_)
    highest = max(bar(floor), *(bar(control, level) for control in controls), -math.inf)
    above: Bools = np.isfinite(rows.lows) & (rows.lows > highest)
    return benjamini_hochberg(_p_values(rows, highest), FALSE_DISCOVERY_RATE) & above


def _p_values(rows: Scores, height: float) -> Floats:
    from scipy.special import erfc

    below = rows.values - rows.lows
    known = np.isfinite(below)
    errors = np.where(known, np.maximum(below / Z_95, 1e-12), 1.0)
    p_values: Floats = np.where(known, 0.5 * erfc((rows.values - height) / errors / math.sqrt(2)), 1.0)
    return p_values


def _columns(rows: Sequence[Scored]) -> Scores:
    latents = np.array([row.latent for row in rows], dtype=np.int64)
    values, lows = (np.array([row[i] for row in rows], dtype=np.float64) for i in (1, 2))  # None becomes NaN.
    return Scores(latents, values, lows)


def _finite(scores: Scores) -> Scores:
    known = np.isfinite(scores.values)
    return Scores(scores.latents[known], scores.values[known], scores.lows[known])
