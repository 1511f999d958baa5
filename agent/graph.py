"""The labeling graph: what happens to one latent, from its evidence to its record.

    explain ──→ weigh ──→ decide ──→ score (one branch an evaluator) ──→ record
       ▲                    │ │                                            ▲
       └── climbs, refines ─┘ └──────────── nothing to say ────────────────┘

Without a cascade `explain` is the run's explainer, and `weigh` and `decide` are not there (`climbing` tells what they do). Each
node sees of the evidence only what its purpose may see: `explain` the explain split, whatever chooses or revises the refine
split as well, `score` all. The state holds the latent's number and plain values; evidence and instruments stay outside, in the
`Workbench`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypedDict

import numpy as np
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send
from numpy.typing import NDArray

from exegete.agent.climbing import Cascade, Tried, chosen, step_records, weighed, written
from exegete.evaluators import Evaluation, Evaluator, Judge
from exegete.tools.evidence import Purpose, restrict
from exegete.tools.explainers import Explainer, Explanation, NotExplained
from exegete.tools.seeds import derive_seed
from exegete.tools.store import LatentRecord, VerdictRecord
from exegete.tools.windows import LatentEvidence

RECURSION_LIMIT = 200


@dataclass
class Workbench:
    """The instruments of a run and the evidence of the latents now in flight."""

    dictionary: str
    explainer: Explainer
    judge: Judge
    evaluators: Sequence[Evaluator]
    seed: int
    in_flight: dict[int, LatentEvidence] = field(default_factory=dict)
    cascade: Cascade | None = None
    """None where `explainer` alone explains."""
    thorough: Sequence[Evaluator] = ()
    """The evaluators with full counts, for the latents in `first`; the profile `full` has no others."""
    first: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """The latents that come first, ascending."""

    def evidence(self, latent: int, purpose: Purpose) -> LatentEvidence:
        """Return what `purpose` may see of a latent in flight."""
        return restrict(self.in_flight[latent], purpose)

    def latent_seed(self, latent: int) -> int:
        """Return the seed of everything random about one latent; it depends on no order."""
        return derive_seed(self.seed, self.dictionary, latent)

    def evaluators_of(self, latent: int) -> Sequence[Evaluator]:
        """Return the evaluators that score a latent."""
        at = np.searchsorted(self.first, latent)
        comes_first = at < len(self.first) and self.first[at] == latent
        return self.thorough if comes_first and self.thorough else self.evaluators


class LabelState(TypedDict, total=False):
    """What travels through the graph."""

    latent: int
    rung: str
    """The explainer whose turn it is."""
    tried: list[Tried]
    """In the order in which they were written."""
    explanation: Explanation | None
    why_not: str
    """Why there is no explanation."""
    evaluator: str
    evaluations: Annotated[list[tuple[str, Evaluation]], operator.add]
    record: LatentRecord


def label_graph(bench: Workbench) -> Any:
    """Return the compiled graph that labels one latent of `bench.in_flight`; its result's `record` is ready to write."""
    graph = StateGraph(LabelState)

    async def score(state: LabelState) -> LabelState:
        latent, name, explanation = state["latent"], state["evaluator"], state["explanation"]
        assert explanation is not None
        evidence = bench.evidence(latent, "score")
        by_name = {evaluator.name: evaluator for evaluator in bench.evaluators_of(latent)}
        evaluation = await by_name[name].evaluate(explanation, evidence, bench.judge, bench.latent_seed(latent))
        return {"evaluations": [(name, evaluation)]}

    def record(state: LabelState) -> LabelState:
        return {"record": _record(bench, state)}

    graph.add_node("score", score)
    graph.add_node("record", record)
    graph.add_edge("score", "record")
    graph.add_edge("record", END)
    if bench.cascade is None:
        _add_explainer(graph, bench)
    else:
        add_climb(graph, bench, bench.cascade, lambda state: _to_score(bench, state), ["score", "record"])
    return graph.compile().with_config(recursion_limit=RECURSION_LIMIT)


def add_climb(
    graph: Any, bench: Workbench, cascade: Cascade, then: Callable[[LabelState], Any], ends: list[str]
) -> None:
    """Add the nodes of a climb to `graph`, from its start; `then` leads on from the last step to one of `ends`."""

    async def explain(state: LabelState) -> LabelState:
        rung = state.get("rung", cascade.rungs[0])
        return {"tried": await written(bench, cascade, state["latent"], rung, state.get("tried", []))}

    async def weigh(state: LabelState) -> LabelState:
        *before, last = state["tried"]
        return {"tried": [*before, await weighed(bench, cascade, state["latent"], last)]}

    def decide(state: LabelState) -> LabelState:
        *before, last = state["tried"]
        decision, rung = cascade.decide(state["tried"])
        tried, stands = [*before, replace(last, decision=decision)], chosen(state["tried"])
        return {
            "tried": tried,
            "rung": rung,
            "explanation": stands.explanation if stands else None,
            "why_not": "; ".join(f"{one.rung}: {one.why_not}" for one in tried),
        }

    def lead(state: LabelState) -> Any:
        return "explain" if state["tried"][-1].decision == "climbs" else then(state)

    for node in (explain, weigh, decide):
        graph.add_node(node.__name__, node)
    graph.add_edge(START, "explain")
    graph.add_edge("explain", "weigh")
    graph.add_edge("weigh", "decide")
    graph.add_conditional_edges("decide", lead, ["explain", *ends])


def _add_explainer(graph: Any, bench: Workbench) -> None:
    async def explain(state: LabelState) -> LabelState:
        latent = state["latent"]
        evidence = bench.evidence(latent, getattr(bench.explainer, "purpose", "explain"))
        try:
            explanation = await bench.explainer.explain(evidence, bench.latent_seed(latent))
        except NotExplained as failure:
            return {"explanation": None, "why_not": f"{bench.explainer.name}: {failure}"}
        return {
            "explanation": explanation,
            "why_not": f"{bench.explainer.name}: the evidence shows nothing that can be said",
        }

    graph.add_node("explain", explain)
    graph.add_edge(START, "explain")
    graph.add_conditional_edges("explain", lambda state: _to_score(bench, state), ["score", "record"])


def _to_score(bench: Workbench, state: LabelState) -> list[Send] | str:
    if state["explanation"] is None or not bench.evaluators:
        return "record"
    known = {"latent": state["latent"], "explanation": state["explanation"]}
    return [Send("score", {**known, "evaluator": evaluator.name}) for evaluator in bench.evaluators]


def _record(bench: Workbench, state: LabelState) -> LatentRecord:
    explanation, latent = state["explanation"], state["latent"]
    tried = state.get("tried", [])
    steps = step_records(bench, latent, tried)
    if explanation is None:
        return LatentRecord(bench.dictionary, latent, "no_explanation", detail=state["why_not"], steps=steps)
    identity = explanation.id(bench.dictionary, latent)
    others = [one.explanation for one in tried if one.explanation is not None]
    evaluations = sorted(state.get("evaluations", []), key=lambda pair: pair[0])
    return LatentRecord(
        bench.dictionary,
        latent,
        "labeled",
        explanations=[(one, one.id(bench.dictionary, latent)) for one in (others or [explanation])],
        scores=[(identity, score) for _, evaluation in evaluations for score in evaluation.scores],
        verdicts=[
            VerdictRecord(identity, name, item) for name, evaluation in evaluations for item in evaluation.verdicts
        ],
        chosen=identity,
        steps=steps,
    )
