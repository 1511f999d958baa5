"""What a run reads back of its own results, to plan its floors, type its latents and sum itself up."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from exegete.tools.explainers import Explanation
from exegete.tools.store.records import StepRecord

if TYPE_CHECKING:
    import duckdb


class Figures(NamedTuple):
    """The figures of latents on one evaluator, ascending by latent, each shape (latents,)."""

    latents: NDArray[np.int64]
    values: NDArray[np.float64]
    lows: NDArray[np.float64]
    """Lower ends of the intervals; NaN where there is none."""


class RunResults:
    """The results of one run on one dictionary, as the writer sees them."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, run: str, dictionary: str) -> None:
        """Read through `connection`; `run` and `dictionary` as the store knows them."""
        self._connection = connection
        self._key = [run, dictionary]

    def explained_latents(self) -> NDArray[np.int64]:
        """Return the latents with a scored explanation, ascending."""
        query = "SELECT DISTINCT latent FROM data.scores WHERE run = ? AND dictionary = ? AND baseline IS NULL ORDER BY latent"
        found = self._connection.execute(query, self._key).fetchnumpy()["latent"]
        return np.asarray(found, dtype=np.int64)

    def chosen(self, latents: Iterable[int]) -> dict[int, str]:
        """Return latent → id of its scored explanation, of those of `latents` that have one, ascending by latent."""
        query = (
            "SELECT latent, max(explanation_id) FROM data.scores WHERE run = ? AND dictionary = ? AND baseline IS NULL"
            " AND latent IN (SELECT unnest(?::INTEGER[])) GROUP BY latent ORDER BY latent"
        )
        wanted = sorted(int(latent) for latent in latents)
        return dict(self._connection.execute(query, [*self._key, wanted]).fetchall())

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

    def figures(self, evaluator: str, metric: str) -> Figures:
        """Return the latents' own figures that have a value."""
        return self._figures(evaluator, metric, "baseline IS NULL", [])

    def floor_figures(self, evaluator: str, metric: str) -> dict[str, Figures]:
        """Return floor → its figures that have a value, of every floor that was scored."""
        query = "SELECT DISTINCT baseline FROM data.scores WHERE run = ? AND dictionary = ? AND baseline IS NOT NULL ORDER BY 1"
        floors = [baseline for (baseline,) in self._connection.execute(query, self._key).fetchall()]
        found = {floor: self._figures(evaluator, metric, "baseline = ?", [floor]) for floor in floors}
        return {floor: figures for floor, figures in found.items() if len(figures.latents)}

    def _figures(self, evaluator: str, metric: str, where: str, more: list[str]) -> Figures:
        query = (
            "SELECT latent::BIGINT AS latent, value, coalesce(low, 'NaN'::DOUBLE) AS low FROM data.scores WHERE run = ?"
            f" AND dictionary = ? AND evaluator = ? AND metric = ? AND {where} AND value IS NOT NULL ORDER BY ALL"
        )
        found = self._connection.execute(query, [*self._key, evaluator, metric, *more]).fetchnumpy()
        return Figures(*(np.ma.getdata(found[name]) for name in ("latent", "value", "low")))

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
