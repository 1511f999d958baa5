"""The control subset of a cascade: what each rung gains and costs, and whether routing pays, seen on latents that take all of it.

1. `cascade.control` live latents are drawn by the seed. Each climbs every rung, whatever its scores say; every explanation is
   weighed by the run's judge on the refine split, and scored on the test split.
2. Beside it best-of-N at equal cost: the top writer is asked again and again, and each answer weighed, until that has cost as much as
   the whole climb of this latent (in USD, or in tokens where nothing costs). The best on the refine split is scored on the test split.
   Where the rung `test-and-refine` is there, best-of-N stands beside it alone as well: the explainer below it draws, with the
   agent's language model, so often that the tokens come nearest to those that the agent's explanation took, weighing included.
3. From the refine split of all of them come how the judge's errors cluster there, the line that screening goes by, and the gain
   and price of each rung. They are stored with the run and never change; routing the other latents, and these as well, rests on
   them, and on nothing of the test split.
4. From the test split comes the measurement of the routing rule (`routing_value.measured`), cross-fitted; it decides nothing.

The replies are in the journal: a restart asks nothing again, and a control about which calls were missing is made anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from langgraph.graph import END, StateGraph

from exegete.agent.climbing import Cascade, Tried, step_records
from exegete.agent.engine import Batch, Stop, Write, evidence_in_ranges, failed, work_through
from exegete.agent.graph import RECURSION_LIMIT, LabelState, Workbench, add_climb
from exegete.agent.models import Halted
from exegete.agent.ordering import Latents
from exegete.agent.pilot import described, restored
from exegete.agent.routing import Gains, best, fit_gains
from exegete.agent.routing_value import BEST_OF, BEST_OF_BESIDE
from exegete.agent.rungs import TEST_AND_REFINE, top_writer
from exegete.agent.screening import Screening, fit_screening, left_out
from exegete.agent.spending import NOTHING, Spent, spent_so_far
from exegete.evaluators import Evaluation
from exegete.evaluators.clustering import INDEPENDENT, Clustering
from exegete.evaluators.refine_score import Refined
from exegete.evaluators.scoring import expected_clustering, pilot_clustering
from exegete.tools.evidence import Evidence
from exegete.tools.explainers import Explanation, NotExplained
from exegete.tools.llm.journaled import UNANSWERED
from exegete.tools.seeds import generator
from exegete.tools.store import LatentRecord, StepRecord
from exegete.tools.windows import LatentEvidence

MOST_DRAWS = 32
"""Of best-of-N, whatever a climb costs."""
MOST_DRAWS_BESIDE = 256
"""Of best-of-N beside the agent, whatever that takes: enough for any tokens that it is likely to be given."""


@dataclass(frozen=True, slots=True)
class Climbed:
    """One latent of the control subset."""

    tried: tuple[Tried, ...]
    screened: Refined | None
    """What its predicate reaches on the screened rung."""


@dataclass(frozen=True)
class Control:
    """What the control subset has shown."""

    gains: Gains
    screening: Screening | None
    clustering: Mapping[str, Clustering]
    """Of the judge's errors on the refine split, by evaluator; empty where it reads each item alone."""
    records: Sequence[LatentRecord] = field(default_factory=tuple)

    def described(self) -> dict[str, Any]:
        """Return what is frozen, as it is stored with the run."""
        return {
            "gains": self.gains.described(),
            "screening": self.screening.described() if self.screening else None,
            "clustering": described(dict(self.clustering)),
        }

    @classmethod
    def restored(cls, stored: dict[str, Any]) -> Control:
        """Return what was frozen."""
        screening = stored["screening"]
        return cls(
            Gains.restored(stored["gains"]),
            Screening.restored(screening) if screening else None,
            restored(stored["clustering"]),
        )


def subset_of(evidence: Evidence, latents: Latents, count: int, seed: int) -> list[int]:
    """Return the control subset, ascending: drawn from the live ones of `latents`."""
    live = np.intersect1d(latents, evidence.live)
    drawn = generator(seed, "cascade control", evidence.dictionary).permutation(len(live))[:count]
    return [int(latent) for latent in np.sort(live[drawn])]


async def run_control(
    evidence: Evidence, latents: Sequence[int], bench: Workbench, concurrency: int, stop: Stop, seen: Write
) -> tuple[Control, bool] | None:
    """Have `latents` climb every rung; return what that shows, and whether every call was answered. None where `stop` said so.

    `seen` is given the records in batches, as they are finished.

    Raises:
        UserError: too few of them have scores for a fit.
        Halted: no language model can be asked any more.
    """
    assert bench.cascade is not None
    cascade = replace(bench.cascade, always=True)
    cascade.score.clustering = {}
    own = replace(bench, cascade=cascade, in_flight={})
    found = await _climb_all(evidence, latents, own, cascade, concurrency, stop, seen)
    if found is not None and expected_clustering(bench.judge) != INDEPENDENT:
        # Once more, now that the judge's errors on the refine split are known; the replies are in the journal.
        cascade.score.clustering = _clustering(cascade, found[0])
        found = await _climb_all(evidence, latents, own, cascade, concurrency, stop, lambda records: None)
    if found is None:
        return None
    climbs, records = found
    return _frozen(cascade, climbs, records), not any(record.missing_calls for record in records)


async def _climb_all(
    evidence: Evidence,
    latents: Sequence[int],
    bench: Workbench,
    cascade: Cascade,
    concurrency: int,
    stop: Stop,
    seen: Write,
) -> tuple[dict[int, Climbed], list[LatentRecord]] | None:
    graph = _climb_graph(bench, cascade)
    climbs: dict[int, Climbed] = {}
    records: list[LatentRecord] = []

    async def climb(own: LatentEvidence) -> LatentRecord:
        bench.in_flight[own.latent] = own
        try:
            climbs[own.latent], record = await _climb(own, graph, bench, cascade)
            return record
        except Halted:
            raise
        except Exception as error:
            return failed(bench.dictionary, own.latent, error)
        finally:
            bench.in_flight.pop(own.latent)

    def take(finished: Sequence[LatentRecord]) -> None:
        records.extend(finished)
        seen(finished)

    if not await work_through(evidence_in_ranges(evidence, latents), climb, concurrency, Batch(take, 1), stop):
        return None
    records.sort(key=lambda record: record.latent)
    return climbs, records


def _clustering(cascade: Cascade, climbs: dict[int, Climbed]) -> dict[str, Clustering]:
    """Return how the judge's errors cluster in prompts of the refine split, on the top writer's explanations."""
    rung = writer_of(cascade)
    shown = [
        next((dict(one.refined.verdicts) for one in climbs[latent].tried if one.rung == rung and one.refined), {})
        for latent in sorted(climbs)
    ]
    return {name: pilot_clustering(own.get(name, ()) for own in shown) for name in ("detection", "fuzzing")}


def writer_of(cascade: Cascade) -> str:
    """Return the highest rung that writes by itself."""
    return top_writer(cascade.rungs)


def _climb_graph(bench: Workbench, cascade: Cascade) -> Any:
    graph = StateGraph(LabelState)
    add_climb(graph, bench, cascade, lambda state: END, [END])
    return graph.compile().with_config(recursion_limit=RECURSION_LIMIT)


async def _climb(own: LatentEvidence, graph: Any, bench: Workbench, cascade: Cascade) -> tuple[Climbed, LatentRecord]:
    state = await graph.ainvoke({"latent": own.latent})
    tried: list[Tried] = state["tried"]
    # What the judge takes on the screened rung, other latents do not spend.
    cost = sum((one.spent for one in tried if one.rung not in cascade.screened), NOTHING)
    drawn = [*await _best_of(own, bench, cascade, cost), *await _best_of_beside(own, bench, cascade, tried)]
    steps = step_records(bench, own.latent, [*tried, *drawn])
    tests = await asyncio.gather(*(_tested(own, bench, one.explanation) for one in [*tried, *drawn]))
    steps = [replace(step, control=True, test=value, test_n=n) for step, (value, n) in zip(steps, tests, strict=True)]
    explained = [one.explanation for one in [*tried, *drawn] if one.explanation is not None]
    record = LatentRecord(
        bench.dictionary,
        own.latent,
        "labeled" if explained else "no_explanation",
        explanations=[(one, one.id(bench.dictionary, own.latent)) for one in explained],
        steps=steps,
        detail=None if explained else state["why_not"],
    )
    return Climbed(tuple(tried), await _screened(own, bench, cascade, tried)), record


async def _screened(own: LatentEvidence, bench: Workbench, cascade: Cascade, tried: Sequence[Tried]) -> Refined | None:
    for one in tried:
        if cascade.screen is not None and one.rung in cascade.screened and one.explanation is not None:
            evidence = bench.evidence(own.latent, "refine")
            return await cascade.screen.judged(one.explanation, evidence, bench.latent_seed(own.latent))
    return None


async def _best_of(own: LatentEvidence, bench: Workbench, cascade: Cascade, cost: Spent) -> list[Tried]:
    """Return the best of as many draws of the top writer as cost what the climb cost; empty where it draws but once."""
    writer: Any = cascade.writers[writer_of(cascade)]
    if not hasattr(writer, "candidate"):
        return []
    drawn = await _drawn(own, bench, cascade, writer, lambda spent, _: _as_dear(spent, cost))
    return [] if drawn.explanation is None else [drawn]


async def _best_of_beside(
    own: LatentEvidence, bench: Workbench, cascade: Cascade, tried: Sequence[Tried]
) -> list[Tried]:
    """Return the best of as many draws as come nearest to the tokens of the agent, one at least; empty where it took none."""
    tokens = sum(one.spent.tokens for one in tried if one.rung == TEST_AND_REFINE)
    if cascade.rival is None or not tokens:
        return []
    drawn = await _drawn(
        own, bench, cascade, cascade.rival, lambda spent, draws: _nearest(spent, draws, tokens), MOST_DRAWS_BESIDE
    )
    return [replace(drawn, rung=BEST_OF_BESIDE)]


async def _drawn(
    own: LatentEvidence,
    bench: Workbench,
    cascade: Cascade,
    writer: Any,
    enough: Callable[[Spent, int], bool],
    most: int = MOST_DRAWS,
) -> Tried:
    """Return the best of the draws of `writer`, one after the other until `enough` has been spent on so many of them."""
    seed, before = bench.latent_seed(own.latent), spent_so_far()
    found: list[tuple[Explanation, Refined]] = []
    why_not = "no draw says anything that can be scored"
    for number in range(most):
        try:
            evidence = bench.evidence(own.latent, getattr(writer, "purpose", "explain"))
            explanation = await writer.candidate(evidence, seed, number)
        except NotExplained as failure:
            explanation, why_not = None, str(failure)
            if failure.status in UNANSWERED:  # The whole of it is made anew, once there are answers.
                break
        if explanation is not None:
            refined = await cascade.score.judged(explanation, bench.evidence(own.latent, "refine"), seed)
            found.append((explanation, refined))
        if enough(spent_so_far() - before, number + 1):
            break
    place = best([refined for _, refined in found])
    spent = spent_so_far() - before
    if place is None:
        return Tried(BEST_OF, None, why_not, spent=spent)
    explanation, refined = found[place]
    return Tried(BEST_OF, explanation, refined=refined, spent=spent)


def _nearest(spent: Spent, draws: int, tokens: int) -> bool:
    """Return whether one more draw, which takes what the others took, would be farther from `tokens` than these are."""
    return spent.tokens + spent.tokens / draws / 2 >= tokens


def _as_dear(spent: Spent, cost: Spent) -> bool:
    return spent.pico_usd >= cost.pico_usd if cost.pico_usd else spent.tokens >= cost.tokens


async def _tested(own: LatentEvidence, bench: Workbench, explanation: Explanation | None) -> tuple[float | None, int]:
    """Return the mean balanced accuracy of detection and fuzzing on the test split, and the judged items behind it."""
    if explanation is None:
        return None, 0
    evidence, seed = bench.evidence(own.latent, "score"), bench.latent_seed(own.latent)
    scorers = [one for one in bench.evaluators if one.name in ("detection", "fuzzing")]
    found = await asyncio.gather(*(one.evaluate(explanation, evidence, bench.judge, seed) for one in scorers))
    scores = [_balanced(evaluation) for evaluation in found]
    values = [score.value for score in scores if score.value is not None]
    if not scores or len(values) < len(scores):
        return None, sum(score.n for score in scores)
    return sum(values) / len(values), sum(score.n for score in scores)


def _balanced(evaluation: Evaluation) -> Any:
    return next(score for score in evaluation.scores if score.metric == "balanced_accuracy")


def _frozen(cascade: Cascade, climbs: dict[int, Climbed], records: Sequence[LatentRecord]) -> Control:
    """Fit screening and gains; the screened rung's steps get the score by which any other latent would be routed."""
    screening = None
    if cascade.screened:
        latents = sorted(latent for latent, one in climbs.items() if one.screened is not None)
        screened = [one.screened for latent in latents if (one := climbs[latent]).screened is not None]
        judged = [_judged(cascade, climbs[latent].tried) for latent in latents]
        pairs = [
            (a.value, b.value)
            for a, b in zip(screened, judged, strict=True)
            if a.value is not None and b.value is not None
        ]
        screening = fit_screening([a for a, _ in pairs], [b for _, b in pairs])
        reckoned = dict(zip(latents, left_out(screened, judged), strict=True))
        records = [_reckoned(cascade, record, reckoned.get(record.latent)) for record in records]
    gains = fit_gains([record.steps for record in records], cascade.rungs)
    return Control(gains, screening, dict(cascade.score.clustering), tuple(records))


def _judged(cascade: Cascade, tried: Sequence[Tried]) -> Refined:
    return next(
        one.refined or Refined(None, None, None, 0)
        for one in tried
        if one.rung in cascade.screened and one.explanation is not None
    )


def _reckoned(cascade: Cascade, record: LatentRecord, refined: Refined | None) -> LatentRecord:
    def changed(step: StepRecord) -> StepRecord:
        if step.rung not in cascade.screened or refined is None:
            return step
        return replace(
            step,
            refine=refined.value,
            refine_low=refined.low,
            refine_high=refined.high,
            refine_n=refined.n,
            calls=0,
            tokens=0,
            usd=0.0,
        )

    return replace(record, steps=[changed(step) for step in record.steps])
