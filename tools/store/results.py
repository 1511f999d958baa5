"""What a run reads back of its own results, to plan its floors, type its latents and sum itself up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from exegete.tools.explainers import Explanation
from exegete.tools.store.records import StepRecord

if TYPE_CHECKING:
    import duckdb


class Headline(NamedTuple):
    """One latent's figure on one evaluator, its own or a floor's."""

    latent: int
    evaluator: str
    baseline: str | None
    value: float
    low: float | None


class RunResults:
    """The results of one run on one dictionary, as the writer sees them."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, run: str, dictionary: str) -> None:
        """Read through `connection`; `run` and `dictionary` as the store knows them."""
        self._connection = connection
        self._key = [run, dictionary]

    def explained(self) -> dict[int, str]:
        """Return latent → id of its scored explanation, ascending by latent."""
        query = (
            "SELECT DISTINCT latent, explanation_id FROM data.scores"
            " WHERE run = ? AND dictionary = ? AND baseline IS NULL ORDER BY ALL"
        )
        return dict(self._connection.execute(query, self._key).fetchall())

    def explanations(self, ids: Sequence[str]) -> dict[int, Explanation]:
        """Return latent → explanation for the explanations of these ids."""
        query = (
            "SELECT latent, text, predicate, explainer, model, prompt_digest, parameters, parent FROM data.explanations"
            " WHERE dictionary = ? AND explanation_id IN (SELECT unnest(?::VARCHAR[]))"
        )
        found = self._connection.execute(query, [self._key[1], list(ids)]).fetchall()
        return {
            latent: Explanation(text, predicate, explainer, model, prompt, json.loads(parameters), parent)
            for latent, text, predicate, explainer, model, prompt, parameters, parent in found
        }

    def headlines(self, metrics: Mapping[str, str]) -> list[Headline]:
        """Return for each evaluator of `metrics` (evaluator → metric) every figure that has a value, own and floors, in a fixed order."""
        query = (
            "SELECT latent, evaluator, baseline, value, low FROM data.scores"
            " JOIN (SELECT unnest(?::VARCHAR[]) AS evaluator, unnest(?::VARCHAR[]) AS metric) USING (evaluator, metric)"
            " WHERE run = ? AND dictionary = ? AND value IS NOT NULL ORDER BY latent, evaluator, baseline NULLS FIRST"
        )
        chosen = [list(metrics), list(metrics.values()), *self._key]
        return [Headline(*row) for row in self._connection.execute(query, chosen).fetchall()]

    def control_steps(self) -> list[tuple[int, StepRecord]]:
        """Return the steps of the cascade's control subset, each behind its latent, by latent and step."""
        query = (
            "SELECT latent, step, rung, explanation_id, refine, refine_low, refine_high, refine_n, calls, tokens, usd, decision,"
            " test, test_n, control FROM data.climbs WHERE run = ? AND dictionary = ? AND control ORDER BY latent, step"
        )
        found = self._connection.execute(query, self._key).fetchall()
        return [(latent, StepRecord(*step)) for latent, *step in found]

    def stopped(self) -> dict[str, dict[str, int]]:
        """Return rung → why latents stopped there → how many, of all latents that climbed a cascade."""
        query = (
            "SELECT rung, decision, count(*) FROM (SELECT rung, decision FROM data.climbs WHERE run = ? AND dictionary = ?"
            " AND NOT control QUALIFY row_number() OVER (PARTITION BY latent ORDER BY step DESC) = 1) GROUP BY ALL ORDER BY ALL"
        )
        found: dict[str, dict[str, int]] = {}
        for rung, decision, count in self._connection.execute(query, self._key).fetchall():
            found.setdefault(rung, {})[decision] = count
        return found

    def incomplete(self) -> int:
        """Return about how many latents calls to a language model failed for good."""
        query = (
            "SELECT count(DISTINCT latent) FROM (SELECT run, dictionary, latent, missing_calls FROM data.results UNION ALL"
            " SELECT run, dictionary, latent, missing_calls FROM data.floors)"
            " WHERE run = ? AND dictionary = ? AND missing_calls > 0"
        )
        found = self._connection.execute(query, self._key).fetchone()
        return int(found[0]) if found else 0

    def counts(self, column: str) -> dict[str, int]:
        """Return how many latents have each value of `status` (outcomes) or `typed` (types)."""
        table = {"status": "results", "typed": "typing"}[column]
        query = f"SELECT {column}, count(*) FROM data.{table} WHERE run = ? AND dictionary = ? GROUP BY 1 ORDER BY 1"
        return dict(self._connection.execute(query, self._key).fetchall())
