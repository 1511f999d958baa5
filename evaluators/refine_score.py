"""How good an explanation is on the refine split: what a choice among candidates goes by.

The mean balanced accuracy of detection and fuzzing (PROTOCOLS §3, §4) on the refine split, with few windows of each
truth. It is not a reported score: those rest on the test split. A candidate with a failed evaluator has no score, since
its mean would rest on other evaluators than its rivals' does.
"""

from __future__ import annotations

import asyncio

from exegete.evaluators.contract import Evaluation, Judge
from exegete.evaluators.detection import Detection
from exegete.evaluators.fuzzing import Fuzzing
from exegete.tools.explainers import Explanation
from exegete.tools.seeds import derive_seed
from exegete.tools.windows import LatentEvidence

ITEMS_PER_CLASS = 10


class RefineScore:
    """Scores candidates by a judge on the refine split; `exegete.tools.explainers.best_of` takes one."""

    def __init__(self, judge: Judge, items_per_class: int = ITEMS_PER_CLASS) -> None:
        """Ask `judge` about at most so many firing and so many other windows for each evaluator."""
        self._judge = judge
        self._evaluators = (
            Detection(split="refine", items_per_class=items_per_class),
            Fuzzing(split="refine", items_per_class=items_per_class),
        )

    async def __call__(self, explanation: Explanation, evidence: LatentEvidence, seed: int) -> float | None:
        """Return the mean balanced accuracy, or None where an evaluator has none or no evaluator has windows.

        The same windows are judged for every candidate of a latent.

        Raises:
            SealedSplitError: `evidence` hides the refine split.
        """
        own_seed = derive_seed(seed, "refine score")
        found = await asyncio.gather(
            *(one.evaluate(explanation, evidence, self._judge, own_seed) for one in self._evaluators)
        )
        values = [_balanced_accuracy(evaluation) for evaluation in found if evaluation.verdicts]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None


def _balanced_accuracy(evaluation: Evaluation) -> float | None:
    return next(score.value for score in evaluation.scores if score.metric == "balanced_accuracy")
