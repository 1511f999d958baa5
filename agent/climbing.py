"""The cascade in the labeling graph: how one latent climbs from cheap explanations to dear ones.

    ┌──────────── climbs, or another round ────────────┐
    ▼                                                  │
  explain ──→ weigh (on the refine split) ──→ decide ──┴──→ score, record

1. `explain` has the present rung write: an explainer by the explain split alone; `refine` revises the explanation that stands
   by its mistakes on the refine split, never the test split; `test-and-refine` is an agent that begins anew, by the explain
   split and by texts of its own that it runs on the live model.
2. `weigh` scores it on the refine split. The screened rung (`lexical`) runs its predicate there, which costs nothing, and
   what a judge would have said is reckoned by the frozen fit of the control subset (`screening`).
3. `decide` is a pure function of what was tried, the frozen pilot and the configuration (`routing`).
4. The run stands by the explanation that is best on the refine split, the earlier of equals; only that one is scored on the
   test split. Every step is recorded with its cost, and revisions name their parent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from exegete.agent.routing import CHANCE, Gains, Rule, after_round, best, climbs
from exegete.agent.rungs import REFINE
from exegete.agent.screening import Screening
from exegete.agent.spending import NOTHING, Spent, spent_so_far
from exegete.evaluators.refine_score import Refined, RefineScore
from exegete.tools.explainers import Explainer, Explanation, NotExplained
from exegete.tools.explainers.refining import Refiner, find_mistakes
from exegete.tools.store import StepRecord

if TYPE_CHECKING:
    from exegete.agent.graph import Workbench


@dataclass(frozen=True, slots=True)
class Tried:
    """One explanation on the way up, or that there was none."""

    rung: str
    explanation: Explanation | None
    why_not: str = ""
    refined: Refined | None = None
    screened: bool = False
    """Whether `refined` is what the predicate said, and no judge."""
    spent: Spent = NOTHING
    decision: str = ""


@dataclass
class Cascade:
    """The rungs of a run, and what its control subset has shown."""

    rule: Rule
    writers: Mapping[str, Explainer | Refiner]
    """By rung."""
    score: RefineScore
    """By the run's judge."""
    screen: RefineScore | None
    """By running predicates; None where nothing is screened."""
    screened: frozenset[str]
    rounds: int
    patience: int
    gains: Gains | None = None
    screening: Screening | None = None
    always: bool = False
    """Climb whatever the scores say, and have every explanation judged: the control subset."""
    rival: Any = None
    """Who draws best-of-N beside `test-and-refine`, by the same language model; None where that rung is not there."""

    @property
    def rungs(self) -> tuple[str, ...]:
        """Names, the cheapest first."""
        return self.rule.rungs

    def decide(self, tried: Sequence[Tried]) -> tuple[str, str]:
        """Return what follows, and the rung whose turn it is then: "climbs", to the next rung or to another round of `refine`,
        or why nothing does."""
        rung = tried[-1].rung
        place, last = self.rungs.index(rung), len(self.rungs) - 1
        if rung == REFINE:
            ended = after_round(_rounds(tried), self.rule.target, self.rounds, self.patience)
            if ended == "climbs" or place == last:
                return ended, rung
        if self.always:
            decision: str = "climbs" if place < last else "top"
        else:
            decision = climbs(place, _standing(tried), self.gains, self.rule)
        return decision, self.rungs[place + (decision == "climbs")]


def chosen(tried: Sequence[Tried]) -> Tried | None:
    """Return the step that the run stands by: the best on the refine split, else the last that has an explanation."""
    place = best([one.refined if one.explanation else None for one in tried])
    if place is not None:
        return tried[place]
    return next((one for one in reversed(tried) if one.explanation is not None), None)


async def written(bench: Workbench, cascade: Cascade, latent: int, rung: str, tried: Sequence[Tried]) -> list[Tried]:
    """Return `tried` with what the rung writes about a latent in flight; its refine-split score comes later."""
    found = list(tried)
    if rung == REFINE:
        found = await _judged_parent(bench, cascade, latent, found)
    before = spent_so_far()
    explanation, why_not = None, "the evidence shows nothing that can be said"
    try:
        if rung == REFINE:
            explanation, why_not = await _revised(bench, cascade, latent, found), "nothing to revise"
        else:
            writer: Any = cascade.writers[rung]
            evidence = bench.evidence(latent, getattr(writer, "purpose", "explain"))
            explanation = await writer.explain(evidence, bench.latent_seed(latent))
    except NotExplained as failure:
        why_not = str(failure)
    return [*found, Tried(rung, explanation, "" if explanation else why_not, spent=spent_so_far() - before)]


async def weighed(bench: Workbench, cascade: Cascade, latent: int, step: Tried) -> Tried:
    """Return the step with its score on the refine split."""
    if step.explanation is None:
        return step
    before, seed = spent_so_far(), bench.latent_seed(latent)
    evidence = bench.evidence(latent, "refine")
    screened = cascade.screen is not None and step.rung in cascade.screened and not cascade.always
    if screened:
        assert (
            cascade.screen is not None and cascade.screening is not None
        )  # The control subset comes before any other.
        refined = cascade.screening.reckoned(await cascade.screen.judged(step.explanation, evidence, seed))
    else:
        refined = await cascade.score.judged(step.explanation, evidence, seed)
    return replace(step, refined=refined, screened=screened, spent=step.spent + spent_so_far() - before)


def step_records(bench: Workbench, latent: int, tried: Sequence[Tried]) -> list[StepRecord]:
    """Return the rows of a climb."""
    return [_record(bench, latent, number, one) for number, one in enumerate(tried)]


def _record(bench: Workbench, latent: int, number: int, one: Tried) -> StepRecord:
    refined = one.refined or Refined(None, None, None, 0)
    return StepRecord(
        step=number,
        rung=one.rung,
        explanation_id=one.explanation.id(bench.dictionary, latent) if one.explanation else None,
        refine=refined.value,
        refine_low=refined.low,
        refine_high=refined.high,
        refine_n=refined.n,
        calls=one.spent.calls,
        tokens=one.spent.tokens,
        usd=one.spent.usd,
        decision="control" if bench.cascade is not None and bench.cascade.always else one.decision,
    )


async def _judged_parent(bench: Workbench, cascade: Cascade, latent: int, tried: list[Tried]) -> list[Tried]:
    """Return `tried` with the explanation that is to be revised weighed by the judge, where it was only screened."""
    parent = chosen(tried)
    if parent is None or not parent.screened:
        return tried
    assert parent.explanation is not None
    before = spent_so_far()
    refined = await cascade.score.judged(
        parent.explanation, bench.evidence(latent, "refine"), bench.latent_seed(latent)
    )
    judged = replace(parent, refined=refined, screened=False, spent=parent.spent + spent_so_far() - before)
    return [judged if one is parent else one for one in tried]


async def _revised(bench: Workbench, cascade: Cascade, latent: int, tried: Sequence[Tried]) -> Explanation | None:
    parent = chosen(tried)
    if parent is None or parent.explanation is None or parent.refined is None:
        return None
    refiner = cascade.writers[REFINE]
    assert isinstance(refiner, Refiner)
    seed, round = bench.latent_seed(latent), 1 + sum(one.rung == REFINE for one in tried)
    mistakes = find_mistakes(parent.refined.verdicts, seed, round, refiner.counterexamples)
    identity = parent.explanation.id(bench.dictionary, latent)
    return await refiner.revise(bench.evidence(latent, "refine"), parent.explanation, identity, mistakes, seed, round)


def _standing(tried: Sequence[Tried]) -> Any:
    """Return the score of the explanation that stands; of none, what a constant answer scores."""
    stands = chosen(tried)
    if stands is None:
        return CHANCE
    return stands.refined or Refined(None, None, None, 0)


def _rounds(tried: Sequence[Tried]) -> list[Refined | None]:
    """Return the score of what was to be revised, then of each revision."""
    below = [one for one in tried if one.rung != REFINE]
    parent = chosen(below)
    return [parent.refined if parent else None, *(one.refined for one in tried[len(below) :])]
