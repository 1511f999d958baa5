"""How good an explanation is on the refine split: what a choice among candidates, a climb and a revision go by.

The mean balanced accuracy of detection and fuzzing (PROTOCOLS §3, §4) on the refine split, with few windows of each
truth. It is not a reported score: those rest on the test split. A candidate with a failed evaluator has no score, since
its mean would rest on other evaluators than its rivals' does.

The interval of the mean:
1. Each of the two figures has its own interval, which honours prompts that err together (`statistics`, `clustering`).
2. Both judge the same explanation, mostly on the same windows, so they err together. How much is seen on the windows that
   both judged: the correlation of what each window adds to the error of either figure. A latent with few errors says
   little about it, so its own estimate weighs as much as its effective number of errors, against `EXPECTED` that weighs
   `ERRORS` (as `clustering` does for prompts). Figures that lean against each other are taken as independent.
3. MOVER for dependent figures (Zou 2007; Zou & Donner 2008): the distances from each figure to its own limit are combined
   as correlated deviations are. With a correlation of one, the limits of the mean are the means of the limits.
4. With ten windows of a class Wilson's limits, from which all this comes, cover 90 to 94 % in such a sum. The distances are
   therefore stretched as Student's quantile is over the normal one, with one degree of freedom less than the smallest class
   has windows (×1.15 for ten, ×1.01 for a hundred). Coverage is then 92 to 98 % (`tests/evaluators/test_refine_score.py`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from exegete.evaluators.clustering import Clustering, balanced_influences
from exegete.evaluators.contract import Evaluation, Judge, JudgedItem, Score
from exegete.evaluators.detection import Detection
from exegete.evaluators.fuzzing import Fuzzing
from exegete.evaluators.statistics import UNDEFINED, Z_95, Interval
from exegete.tools.explainers import Explanation
from exegete.tools.seeds import derive_seed
from exegete.tools.windows import LatentEvidence

ITEMS_PER_CLASS = 10
EXPECTED = 0.5
"""Correlation of detection and fuzzing before a latent's own verdicts are seen."""
ERRORS = 2.0
"""How many errors of a latent's own weigh as much as that."""


@dataclass(frozen=True, slots=True)
class Refined:
    """What the refine split says of one explanation: the mean balanced accuracy with its 95 % interval, and the verdicts."""

    value: float | None
    """None where an evaluator failed or there are no windows to judge."""
    low: float | None
    high: float | None
    n: int
    """Judged items behind it, over both evaluators."""
    verdicts: Mapping[str, tuple[JudgedItem, ...]] = field(default_factory=dict)
    """By the evaluator's name."""


class RefineScore:
    """Scores candidates by a judge on the refine split; `exegete.tools.explainers.best_of` takes one."""

    def __init__(self, judge: Judge, items_per_class: int = ITEMS_PER_CLASS) -> None:
        """Ask `judge` about at most so many firing and so many other windows for each evaluator."""
        self._judge = judge
        self.evaluators: tuple[Detection | Fuzzing, ...] = (
            Detection(split="refine", items_per_class=items_per_class),
            Fuzzing(split="refine", items_per_class=items_per_class),
        )

    @property
    def clustering(self) -> dict[str, Clustering]:
        """What a frozen pilot has shown of the judge, by the evaluator's name; empty where nothing is known yet."""
        return {one.name: one.clustering for one in self.evaluators if one.clustering is not None}

    @clustering.setter
    def clustering(self, known: Mapping[str, Clustering]) -> None:
        for one in self.evaluators:
            one.clustering = known.get(one.name)

    async def __call__(self, explanation: Explanation, evidence: LatentEvidence, seed: int) -> float | None:
        """Return the mean balanced accuracy, or None where an evaluator has none or no evaluator has windows.

        The same windows are judged for every candidate of a latent.

        Raises:
            SealedSplitError: `evidence` hides the refine split.
        """
        return (await self.judged(explanation, evidence, seed)).value

    async def judged(self, explanation: Explanation, evidence: LatentEvidence, seed: int) -> Refined:
        """Return the mean balanced accuracy with its interval, and every verdict behind it; as calling does otherwise."""
        own_seed = derive_seed(seed, "refine score")
        found = await asyncio.gather(
            *(one.evaluate(explanation, evidence, self._judge, own_seed) for one in self.evaluators)
        )
        verdicts = {one.name: evaluation.verdicts for one, evaluation in zip(self.evaluators, found, strict=True)}
        mean = _mean([evaluation for evaluation in found if evaluation.verdicts])
        return Refined(*mean, n=sum(_balanced_accuracy(evaluation).n for evaluation in found), verdicts=verdicts)


def dependent_mean(first: Interval, second: Interval, correlation: float, stretch: float = 1.0) -> Interval:
    """Return the mean of two figures in [0, 1] whose errors have this `correlation`, with its MOVER interval.

    `stretch` widens it on either side. Undefined where one of the two is.
    """
    if any(limit is None for limit in (*first, *second)):
        return UNDEFINED
    (value, low, high), (other, other_low, other_high) = np.array([first, second], dtype=np.float64).tolist()
    mean = (value + other) / 2
    below = stretch * _together(value - low, other - other_low, correlation) / 2
    above = stretch * _together(high - value, other_high - other, correlation) / 2
    return Interval(mean, max(0.0, mean - below), min(1.0, mean + above))


def correlation(first: Sequence[JudgedItem], second: Sequence[JudgedItem]) -> float:
    """Return how far two evaluators of one explanation err on the same windows, from 0 to 1 (step 2 of the module)."""
    own, other = _influences(first), _influences(second)
    squares = [np.array(list(found.values()), dtype=np.float64) ** 2 for found in (own, other)]
    totals = [float(found.sum()) for found in squares]
    if min(totals) == 0 or not own.keys() & other.keys():
        return EXPECTED
    errors = min(total**2 / float((found**2).sum()) for total, found in zip(totals, squares, strict=True))
    shared = sum(own[window] * other[window] for window in own.keys() & other.keys())
    blended = (shared / math.sqrt(totals[0] * totals[1]) * errors + EXPECTED * ERRORS) / (errors + ERRORS)
    return max(0.0, min(1.0, blended))


def stretch(items: int) -> float:
    """Return how much farther Student's 97.5 % quantile lies out than the normal one, for the mean of so many items."""
    from scipy.special import stdtrit  # Not before it is needed: a command line imports what imports this.

    return float(stdtrit(max(1, items - 1), 0.975)) / Z_95


def noise(before: Refined, after: Refined) -> float:
    """Return the standard error of `after.value − before.value`, on the items that both judged; 0 where none differs.

    The score is a mean over items of two classes in each evaluator, and one explanation is right where the other is wrong
    on a few of them: the difference varies with these alone (McNemar 1947). So an improvement by one item is within the
    noise, one by two items at no loss is beyond it.
    """
    variance, evaluators = 0.0, 0
    for name, judged in after.verdicts.items():
        earlier = {_key(item): _right(item) for item in before.verdicts.get(name, ())}
        shared = [(item.truth, _right(item) - earlier[_key(item)]) for item in judged if _key(item) in earlier]
        evaluators += bool(shared)
        for of_class in (True, False):
            changes = [change for truth, change in shared if truth == of_class]
            variance += sum(change * change for change in changes) / (2 * max(1, len(changes))) ** 2
    return math.sqrt(variance) / max(1, evaluators)


def _mean(found: Sequence[Evaluation]) -> Interval:
    figures = [Interval(own.value, own.low, own.high) for own in map(_balanced_accuracy, found)]
    if not figures:
        return UNDEFINED
    # A single figure is the mean of itself and itself.
    dependence = correlation(found[0].verdicts, found[1].verdicts) if len(figures) == 2 else 1.0
    return dependent_mean(figures[0], figures[-1], dependence, stretch(min(map(_smallest_class, found))))


def _balanced_accuracy(evaluation: Evaluation) -> Score:
    return next(score for score in evaluation.scores if score.metric == "balanced_accuracy")


def _smallest_class(evaluation: Evaluation) -> int:
    truth = [item.truth for item in evaluation.verdicts if item.verdict.applies is not None]
    return min(sum(truth), len(truth) - sum(truth))


def _together(first: float, second: float, correlation: float) -> float:
    return math.sqrt(first**2 + second**2 + 2 * correlation * first * second)


def _influences(judged: Sequence[JudgedItem]) -> dict[int, float]:
    """Return window → what it adds to the error of the balanced accuracy; empty where a class is."""
    given = [item for item in judged if item.verdict.applies is not None]
    truth = np.array([item.truth for item in given], dtype=np.bool_)
    if truth.all() or not truth.any():
        return {}
    right = np.array([item.verdict.applies == item.truth for item in given], dtype=np.bool_)
    influences = balanced_influences(truth, right).tolist()
    added: dict[int, float] = {}
    for item, influence in zip(given, influences, strict=True):
        added[item.window.id] = added.get(item.window.id, 0.0) + influence
    return added


def _key(item: JudgedItem) -> tuple[int, tuple[int, ...] | None]:
    return item.window.id, item.marks


def _right(item: JudgedItem) -> int:
    """A verdict that failed is wrong: an explanation that cannot be judged has not improved."""
    return int(item.verdict.applies == item.truth)
