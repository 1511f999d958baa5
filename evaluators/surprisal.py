"""Surprisal: does the explanation make the firing windows less surprising to a language model? (PROTOCOLS §6)

Source: Paulo et al. 2024, "Automatically Interpreting Millions of Features in Large Language Models", section 'surprisal'.

1. A local language model gives the log-probability of each window after a prompt with the explanation, and after the same
   prompt with a neutral description. The prompt is plain text: base models follow no conversation.
2. Info(x) = log p(x | explanation) − log p(x | neutral), in nats, summed over the window's tokens.
3. The score is the AUROC of Info between firing and non-firing windows; the mean of Info in either class stands beside it.

The neutral description is the constant floor's, so that floor scores exactly one half and says nothing more. Windows are
taken as they are: they are scored, not read as instructions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from exegete.evaluators.baselines import CONSTANT
from exegete.evaluators.contract import Evaluation, Judge, evaluator
from exegete.evaluators.ranking import ranked, scored_windows
from exegete.evaluators.requirements import required
from exegete.tools.explainers import Explanation
from exegete.tools.llm import PromptScorer
from exegete.tools.prompting import line, prompt_digest, render
from exegete.tools.windows import Kind, LatentEvidence, Split

Floats = NDArray[np.float64]

_NEUTRAL_KEPT = 64


@evaluator("surprisal")
class Surprisal:
    """AUROC of how much more probable the explanation makes a window than a neutral description does."""

    name = "surprisal"
    headline = "auroc"

    def __init__(
        self,
        scorer: PromptScorer | None = None,
        split: Split = "test",
        negatives: Sequence[Kind] = ("random",),
        items_per_class: int | None = None,
        neutral: str = CONSTANT.text,
    ) -> None:
        """Score windows of `split` with the local model `scorer`, against the description `neutral`.

        Raises:
            UserError: there is no scorer.
        """
        meaning = "a local language model that gives log-probabilities of a prompt, for example 'hf:PATH'"
        self.scorer = required(self.name, "scorer", scorer, meaning)
        self.split = split
        self.negatives = tuple(negatives)
        self.items_per_class = items_per_class
        self.neutral = neutral
        # Floors ask about the same windows again; what the neutral prompt gives them does not depend on the explanation.
        self._neutral: OrderedDict[tuple[str, ...], Floats] = OrderedDict()

    async def evaluate(
        self, explanation: Explanation, evidence: LatentEvidence, judge: Judge | None, seed: int
    ) -> Evaluation:
        """Return the AUROC of `explanation`; the scorer is asked, not the judge, and nothing is random.

        A window whose log-probability is not finite is a failure.
        """
        windows = scored_windows(evidence, self.split, self.negatives, self.items_per_class).all
        texts = tuple(window.text for window in windows)
        values = np.zeros(0)
        if windows:
            values = await self._logprobs(explanation.text, texts) - await self._neutrals(texts)
        parameters = {
            "split": self.split,
            "negatives": self.negatives,
            "scorer": self.scorer.name,
            "prompt_digest": prompt_digest(self.name),
            "neutral": self.neutral,
            "info_firing": _mean(values, [window.fires for window in windows]),
            "info_silent": _mean(values, [not window.fires for window in windows]),
        }
        return ranked(self.name, windows, values, parameters)

    async def _neutrals(self, texts: tuple[str, ...]) -> Floats:
        if texts not in self._neutral:
            self._neutral[texts] = await self._logprobs(self.neutral, texts)
        found = self._neutral[texts]
        self._neutral.move_to_end(texts)
        while len(self._neutral) > _NEUTRAL_KEPT:
            self._neutral.popitem(last=False)
        return found

    async def _logprobs(self, description: str, texts: Sequence[str]) -> Floats:
        messages = render(self.name, description=line(description)).messages
        prompt = "\n\n".join(message.text for message in messages)
        found: Floats = np.asarray(await self.scorer.logprobs(prompt, texts), dtype=np.float64)
        if found.shape != (len(texts),):
            raise ValueError(f"{self.scorer.name} gives {found.shape} log-probabilities for {len(texts)} texts")
        return found


def _mean(values: Floats, chosen: Sequence[bool]) -> float | None:
    finite = values[np.array(chosen, dtype=np.bool_) & np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None
