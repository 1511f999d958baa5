"""The best-of explainer: several candidates, chosen on windows that none of them was written from.

1. Another explainer writes N candidates from the explain split; where there are more windows than it shows, each sees a
   different draw.
2. Each different candidate is scored on the refine split, by whatever `score` does (the judge's balanced accuracy).
3. The best one is returned; equals go to the earlier. The test split is never touched, so the choice does not flatter
   the reported score.

A candidate that failed is counted. Where every one failed, or none could be scored, there is no explanation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from math import isfinite

from exegete.tools.errors import UserError
from exegete.tools.evidence import restrict
from exegete.tools.explainers.asking import ModelExplainer
from exegete.tools.explainers.contract import Explanation, NotExplained, explainer
from exegete.tools.windows import LatentEvidence

RefineScore = Callable[[Explanation, LatentEvidence, int], Awaitable[float | None]]
"""How good an explanation is on the refine split of the evidence, given the latent's seed; None where it has no score."""


@explainer("best-of")
class BestOfExplainer:
    """Has another explainer write several candidates and chooses on the refine split."""

    name = "best-of"
    purpose = "refine"
    """What of the evidence it must be given (`exegete.tools.evidence.Purpose`)."""

    def __init__(self, explainer: ModelExplainer, score: RefineScore, candidates: int = 5) -> None:
        """Choose among so many `candidates` of `explainer` by `score`.

        Raises:
            UserError: fewer than two candidates.
        """
        if candidates < 2:
            raise UserError(f"best-of chooses among two candidates or more, not {candidates}")
        self._explainer, self._score, self._count = explainer, score, candidates

    async def explain(self, evidence: LatentEvidence, seed: int) -> Explanation | None:
        """Return the candidate that scores best on the refine split, or None where every model that answered saw no pattern.

        Raises:
            NotExplained: every candidate failed, or none could be scored.
            SealedSplitError: `evidence` hides the refine split.
        """
        evidence.select("refine")  # before anything is paid for
        written = await asyncio.gather(*(self._candidate(evidence, seed, n) for n in range(self._count)))
        failed = [one for one in written if isinstance(one, NotExplained)]
        found = [one for one in written if isinstance(one, Explanation)]
        if not found:
            if len(failed) == self._count:
                raise failed[0]
            return None
        first: dict[tuple[str, str | None], Explanation] = {}
        for one in found:
            first.setdefault((one.text, one.predicate), one)
        distinct = list(first.values())
        scores = await asyncio.gather(*(self._score(one, restrict(evidence, "refine"), seed) for one in distinct))
        ranked = [(score, -place) for place, score in enumerate(scores) if score is not None and isfinite(score)]
        if not ranked:
            raise NotExplained("error", f"none of {len(distinct)} candidates could be scored on the refine split")
        chosen = -max(ranked)[1]
        noted = {
            "of": self._explainer.name,
            "candidates": self._count,
            "failed": len(failed),
            "no_pattern": self._count - len(failed) - len(found),
            "refine_scores": list(scores),
            "chosen": chosen,
        }
        best = distinct[chosen]
        return replace(best, explainer=self.name, parameters={**best.parameters, **noted})

    async def _candidate(self, evidence: LatentEvidence, seed: int, number: int) -> Explanation | NotExplained | None:
        try:
            return await self._explainer.candidate(restrict(evidence, "explain"), seed, number)
        except NotExplained as failure:
            return failure
