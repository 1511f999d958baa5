"""Embedding: does the explanation lie nearer to the windows that fire than to others? (PROTOCOLS §7)

Source: Paulo et al. 2024, "Automatically Interpreting Millions of Features in Large Language Models", section 'embedding'.

1. The explanation is embedded as a query, with the embedding model's own instruction before it where it has one.
2. Each window is embedded as a passage: its bare text, without marks.
3. The score is the AUROC of the cosine between firing and non-firing windows.

No language model is asked, so a score costs milliseconds. What it cannot see is anything that a sentence embedding loses:
positions, punctuation, single tokens of a long window.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from exegete.evaluators.contract import Evaluation, Judge, evaluator
from exegete.evaluators.ranking import ranked, scored_windows
from exegete.tools.embedders import Embedder, SentenceEmbedder
from exegete.tools.errors import UserError
from exegete.tools.explainers import Explanation
from exegete.tools.windows import Kind, LatentEvidence, Split


@evaluator("embedding")
class Embedding:
    """AUROC of the cosine between the embedded explanation and the embedded windows."""

    name = "embedding"
    headline = "auroc"

    def __init__(
        self,
        embedder: Embedder | str | None = None,
        split: Split = "test",
        negatives: Sequence[Kind] = ("random",),
        items_per_class: int | None = None,
    ) -> None:
        """Score with `embedder`, or the sentence-transformers model of that name or folder, on the windows of `split`.

        Raises:
            UserError: there is no embedder, or its model cannot be loaded.
        """
        if embedder is None:
            raise UserError(
                "evaluator 'embedding' needs an embedding model: give embedder='NAME or FOLDER' of a sentence-transformers "
                "model, for example 'sentence-transformers/all-MiniLM-L6-v2'"
            )
        self.embedder = SentenceEmbedder(embedder) if isinstance(embedder, str) else embedder
        self.split = split
        self.negatives = tuple(negatives)
        self.items_per_class = items_per_class

    async def evaluate(
        self, explanation: Explanation, evidence: LatentEvidence, judge: Judge | None, seed: int
    ) -> Evaluation:
        """Return the AUROC of `explanation`; no judge is asked, and nothing is random."""
        windows = scored_windows(evidence, self.split, self.negatives, self.items_per_class).all
        parameters = {
            "split": self.split,
            "negatives": self.negatives,
            "embedder": self.embedder.name,
            "instruction": getattr(self.embedder, "instruction", None),
        }
        if not windows:
            return ranked(self.name, [], np.zeros(0), parameters)
        query = await asyncio.to_thread(self.embedder.query, explanation.text)
        passages = await asyncio.to_thread(self.embedder.passages, [window.text for window in windows])
        return ranked(self.name, windows, (passages @ query).astype(np.float64), parameters)
