"""Detection: on which of these windows does the latent fire, by its explanation alone? (PROTOCOLS §3)

Source: Paulo et al. 2024, "Automatically Interpreting Millions of Features in Large Language Models", section 'detection'.
Their implementation draws train and test windows from one pool; here the test split is sealed off by document.
"""

from __future__ import annotations

from collections.abc import Sequence

from exegete.evaluators import judging
from exegete.evaluators.clustering import Clustering
from exegete.evaluators.contract import Evaluation, Judge, evaluator
from exegete.evaluators.judging import ITEMS_PER_PROMPT, Question
from exegete.evaluators.stopping import Stopping
from exegete.tools.explainers import Explanation
from exegete.tools.windows import Kind, LatentEvidence, Split, Window


@evaluator("detection")
class Detection:
    """Balanced accuracy, F1, AUROC and AUPRC of saying which unmarked windows fire."""

    name = "detection"
    headline = "balanced_accuracy"

    def __init__(
        self,
        split: Split = "test",
        negatives: Sequence[Kind] = ("random",),
        items_per_prompt: int = ITEMS_PER_PROMPT,
        items_per_class: int | None = None,
        clustering: Clustering | None = None,
        stopping: Stopping | None = None,
    ) -> None:
        """Score on `split`, against non-firing windows of the kinds `negatives`; at most `items_per_class` of each truth.

        `clustering` and `stopping` are those of `judging.evaluate`.
        """
        self.split = split
        self.negatives = tuple(negatives)
        self.items_per_prompt = items_per_prompt
        self.items_per_class = items_per_class
        self.clustering = clustering
        self.stopping = stopping

    async def evaluate(self, explanation: Explanation, evidence: LatentEvidence, judge: Judge, seed: int) -> Evaluation:
        """Return the scores of `explanation` on the unmarked windows of the split."""
        windows = [w for w in evidence.select(self.split) if w.marks is None]
        firing = evenly(sampled(windows), self.items_per_class)
        silent = [w for w in windows if not w.fires and w.kind in self.negatives][: self.items_per_class]
        questions = [Question(w, truth=w.fires) for w in [*firing, *silent]]
        parameters = {"split": self.split, "negatives": self.negatives, "items_per_prompt": self.items_per_prompt}
        return await judging.evaluate(
            "detection", explanation, questions, judge, seed, parameters,
            clustering=self.clustering, stopping=self.stopping,
        )  # fmt: skip


def sampled(windows: Sequence[Window]) -> list[Window]:
    """Return the firing windows of the uniform sample; all firing ones where the evidence has no strata (imports)."""
    firing = [w for w in windows if w.fires]
    uniform = [w for w in firing if w.stratum is not None]
    return uniform or firing


def evenly(windows: Sequence[Window], count: int | None) -> list[Window]:
    """Return at most `count` windows, taken in turn from each stratum so that every stratum stays represented."""
    if count is None or len(windows) <= count:
        return list(windows)
    within: dict[int | None, int] = {}
    keyed = []
    for position, window in enumerate(windows):
        turn = within[window.stratum] = within.get(window.stratum, -1) + 1
        keyed.append((turn, position))
    return [windows[position] for _, position in sorted(keyed)[:count]]
