"""What a score would be on very many windows, where that can be known: what its interval must cover.

1. Each explanation is scored on a population: more windows of the same latent, of documents that the audit does not show.
   A judge that errs is replaced by a reference that judges alike and never errs.
2. A judge that flips each verdict by itself with probability ε turns an expected rate r (TPR, TNR and their mean) into
   r + ε (1 − 2r). AUROC is taken as it is, of evaluators without a judge.
3. The population is finite: with 150 windows of either class its own error widens a sample's spread on 30 by a tenth, and
   coverage reads a few points low for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from exegete.evaluators.contract import Evaluator, Judge
from exegete.tools.seeds import derive_seed

if TYPE_CHECKING:
    from exegete.evaluators.audit import Case

RATES = ("balanced_accuracy", "tpr", "tnr")
RANKINGS = ("auroc",)


class Population:
    """Expected scores of (latent, which explanation), as `evaluators.audit.audit` asks for them."""

    def __init__(
        self,
        evaluator: Evaluator,
        cases: Sequence[Case],
        reference: Judge,
        seed: int,
        error_rate: float = 0.0,
        metrics: Collection[str] = RATES,
    ) -> None:
        """Take expectations with `evaluator`, which must score all windows that it is given.

        Args:
            evaluator: made as the audited one, without a limit to its windows.
            cases: those with a population are known, of the others nothing.
            reference: judges as the audited judge, without its errors.
            seed: of the audit.
            error_rate: share of verdicts that the audited judge flips, each by itself.
            metrics: whose expectations are given.
        """
        self._evaluator = evaluator
        self._cases = {case.latent: case for case in cases}
        self._reference = reference
        self._seed = seed
        self._error_rate = error_rate
        self._metrics = metrics

    async def __call__(self, latent: int, which: str) -> Mapping[str, float]:
        """Return the expectation of each metric."""
        case = self._cases.get(latent)
        if case is None or case.population is None:
            return {}
        own = derive_seed(self._seed, "population", latent)
        said = case.explanations[which]
        found = await self._evaluator.evaluate(said, case.population, self._reference, own)
        return {
            score.metric: score.value + self._error_rate * (1 - 2 * score.value)
            for score in found.scores
            if score.metric in self._metrics and score.value is not None
        }
