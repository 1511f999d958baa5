"""What embedding and surprisal share: a number for each window, and how well it ranks firing windows above others.

The AUROC's interval is Newcombe's (2006, Statistics in Medicine 25:559–573, "method 5"): the limits solve
|θ − AUROC| = z·sqrt(V(θ)) with Hanley & McNeil's variance V, both sample sizes in it replaced by their mean. Unlike a
bootstrap it keeps a width where the ranking is perfect. Windows are the units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from exegete.evaluators.contract import Evaluation, Score
from exegete.evaluators.detection import evenly, sampled
from exegete.evaluators.statistics import UNDEFINED, Z_95, Interval, auroc
from exegete.tools.windows import Kind, LatentEvidence, Split, Window

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class Windows(NamedTuple):
    """The windows of one split that are scored."""

    firing: list[Window]
    silent: list[Window]

    @property
    def all(self) -> list[Window]:
        """Firing ones first."""
        return [*self.firing, *self.silent]


def scored_windows(
    evidence: LatentEvidence, split: Split, negatives: Sequence[Kind], items_per_class: int | None
) -> Windows:
    """Return the uniform sample of firing windows, and non-firing ones of the kinds `negatives`.

    Raises:
        SealedSplitError: the split is sealed to this reader.
    """
    windows = [w for w in evidence.select(split) if w.marks is None]
    silent = [w for w in windows if not w.fires and w.kind in negatives][:items_per_class]
    return Windows(evenly(sampled(windows), items_per_class), silent)


def ranked(evaluator: str, windows: Sequence[Window], values: Floats, parameters: Mapping[str, Any]) -> Evaluation:
    """Return the AUROC of `values`, shape (windows,), for telling firing windows; those not finite are failures."""
    given = np.isfinite(values)
    truth = np.array([window.fires for window in windows], dtype=np.bool_)[given]
    interval = auroc_interval(truth, values[given])
    status = "ok" if interval.value is not None else _status(len(windows), len(truth))
    positives = int(truth.sum())
    described = {**parameters, "positives": positives, "base_rate": positives / len(truth) if len(truth) else None}
    failures = len(windows) - len(truth)
    score = Score(evaluator, "auroc", *interval, len(truth), failures, status=status, parameters=described)
    return Evaluation((score,), ())


def auroc_interval(truth: Bools, values: Floats) -> Interval:
    """Return the AUROC of `values` with its interval; undefined where a class is empty. Shapes (items,)."""
    area = auroc(truth, values)
    if area is None:
        return UNDEFINED
    positives, negatives = int(truth.sum()), int((~truth).sum())

    def reach(theta: float) -> float:
        more = (positives + negatives) / 2 - 1
        spread = 1 + more * (1 - theta) / (2 - theta) + more * theta / (1 + theta)
        return Z_95 * math.sqrt(theta * (1 - theta) * spread / (positives * negatives))

    low = _border(lambda theta: area - theta > reach(theta), 0.0, area)
    high = _border(lambda theta: theta - area > reach(theta), 1.0, area)
    return Interval(area, low, high)


def _border(outside: Callable[[float], bool], far: float, near: float) -> float:
    """Return where `outside` turns from true (at `far`) to false (at `near`), by bisection."""
    for _ in range(60):
        middle = (far + near) / 2
        far, near = (middle, near) if outside(middle) else (far, middle)
    return far


def _status(windows: int, given: int) -> str:
    if not windows:
        return "no_items"
    return "one_class" if given else "error"
