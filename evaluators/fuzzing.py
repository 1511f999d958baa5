"""Fuzzing: is every marked token an instance of the explanation? (PROTOCOLS §4)

Source: Paulo et al. 2024, section 'fuzzing'. Their negatives mark a fixed index, a positional shortcut that a judge can learn;
here negatives are marked at positions drawn from the positives' own distribution of marked positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from exegete.evaluators import judging
from exegete.evaluators.clustering import Clustering
from exegete.evaluators.contract import Evaluation, Judge, evaluator
from exegete.evaluators.detection import evenly, sampled
from exegete.evaluators.judging import ITEMS_PER_PROMPT, Question
from exegete.evaluators.stopping import Stopping
from exegete.tools.explainers import Explanation
from exegete.tools.seeds import generator
from exegete.tools.windows import Kind, LatentEvidence, Split, Window

Negatives = Literal["silent", "misplaced"]


@evaluator("fuzzing")
class Fuzzing:
    """Balanced accuracy, F1, AUROC and AUPRC of telling true marks from false ones."""

    name = "fuzzing"
    headline = "balanced_accuracy"

    def __init__(
        self,
        split: Split = "test",
        negatives: Negatives = "silent",
        kinds: Sequence[Kind] = ("random",),
        items_per_prompt: int = ITEMS_PER_PROMPT,
        items_per_class: int | None = None,
        clustering: Clustering | None = None,
        stopping: Stopping | None = None,
    ) -> None:
        """Score on `split`; `clustering` and `stopping` are those of `judging.evaluate`.

        `negatives`: "silent" marks non-firing windows (of `kinds`), "misplaced" marks non-firing tokens of firing windows.
        """
        self.split = split
        self.negatives = negatives
        self.kinds = tuple(kinds)
        self.items_per_prompt = items_per_prompt
        self.items_per_class = items_per_class
        self.clustering = clustering
        self.stopping = stopping

    async def evaluate(self, explanation: Explanation, evidence: LatentEvidence, judge: Judge, seed: int) -> Evaluation:
        """Return the scores of `explanation` on marked windows of the split: imported ones as they stand, else ours."""
        windows = evidence.select(self.split)
        marked = [w for w in windows if w.marks is not None]
        if marked:
            questions = [Question(w, truth=bool(w.marks_correct), marks=w.marks) for w in marked]
        else:
            questions = self._questions(windows, generator(seed, "fuzzing", "marks"))
        parameters = {
            "split": self.split,
            "negatives": "imported" if marked else self.negatives,
            "items_per_prompt": self.items_per_prompt,
        }
        return await judging.evaluate(
            "fuzzing", explanation, questions, judge, seed, parameters,
            clustering=self.clustering, stopping=self.stopping,
        )  # fmt: skip

    def _questions(self, windows: Sequence[Window], rng: np.random.Generator) -> list[Question]:
        firing = [w for w in sampled(windows) if w.firing_positions()]
        positives = [Question(w, truth=True, marks=w.firing_positions()) for w in evenly(firing, self.items_per_class)]
        silent = [w for w in windows if not w.fires and w.kind in self.kinds]
        bases = silent if self.negatives == "silent" else [q.window for q in positives]
        drawn = _false_marks(positives, bases[: self.items_per_class], rng)
        return [*positives, *(Question(w, truth=False, marks=marks) for w, marks in drawn if marks)]


def _false_marks(
    positives: Sequence[Question], bases: Sequence[Window], rng: np.random.Generator
) -> list[tuple[Window, tuple[int, ...]]]:
    """Mark tokens on which the latent does not fire: as many as positives have on average, where positives have theirs."""
    pool = np.array([position for q in positives for position in q.marks or ()], dtype=np.int64)
    if not len(pool):
        return []
    mean = len(pool) / len(positives)
    return [(w, _draw(w, pool, int(mean) + int(rng.random() < mean % 1), rng)) for w in bases]


def _draw(window: Window, pool: np.ndarray, count: int, rng: np.random.Generator) -> tuple[int, ...]:
    silent = np.ones(len(window.tokens), dtype=np.bool_)
    if window.activations is not None:
        silent &= window.activations <= 0
    weights = np.bincount(pool[pool < len(silent)], minlength=len(silent)) * silent
    if not weights.any():
        weights = silent.astype(np.int64)
    count = min(count, int((weights > 0).sum()))
    if not count:
        return ()
    chosen = rng.choice(len(weights), size=count, replace=False, p=weights / weights.sum())
    return tuple(sorted(int(i) for i in chosen))
