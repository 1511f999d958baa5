"""The labeling graph: what happens to one latent, from its evidence to its record.

    explain ──(nothing to say)──────────────┐
       │                                    ▼
       └──→ score (one branch an evaluator) ──→ record

Each node sees of the evidence only what its purpose may see: `explain` the explain split (an explainer that chooses among
candidates the refine split as well), `score` all. The state holds the latent's number and plain values; evidence and
instruments stay outside, in the `Workbench`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.types import Send

from exegete.evaluators import Evaluation, Evaluator, Judge
from exegete.tools.evidence import Purpose, restrict
from exegete.tools.explainers import Explainer, Explanation, NotExplained
from exegete.tools.seeds import derive_seed
from exegete.tools.store import LatentRecord, VerdictRecord
from exegete.tools.windows import LatentEvidence

RECURSION_LIMIT = 50


@dataclass
class Workbench:
    """The instruments of a run and the evidence of the latents now in flight."""

    dictionary: str
    explainer: Explainer
    judge: Judge
    evaluators: Sequence[Evaluator]
    seed: int
    in_flight: dict[int, LatentEvidence] = field(default_factory=dict)

    def evidence(self, latent: int, purpose: Purpose) -> LatentEvidence:
        """Return what `purpose` may see of a latent in flight."""
        return restrict(self.in_flight[latent], purpose)

    def latent_seed(self, latent: int) -> int:
        """Return the seed of everything random about one latent; it depends on no order."""
        return derive_seed(self.seed, self.dictionary, latent)


class LabelState(TypedDict, total=False):
    """What travels through the graph."""

    latent: int
    explanation: Explanation | None
    why_not: str
    """Why there is no explanation."""
    evaluator: str
    evaluations: Annotated[list[tuple[str, Evaluation]], operator.add]
    record: LatentRecord


def label_graph(bench: Workbench) -> Any:
    """Return the compiled graph that labels one latent of `bench.in_flight`; its result's `record` is ready to write."""
    by_name = {evaluator.name: evaluator for evaluator in bench.evaluators}

    async def explain(state: LabelState) -> LabelState:
        latent = state["latent"]
        evidence = bench.evidence(latent, getattr(bench.explainer, "purpose", "explain"))
        try:
            explanation = await bench.explainer.explain(evidence, bench.latent_seed(latent))
        except NotExplained as failure:
            return {"explanation": None, "why_not": str(failure)}
        return {"explanation": explanation, "why_not": "the evidence shows nothing that can be said"}

    def route(state: LabelState) -> list[Send] | str:
        if state["explanation"] is None or not by_name:
            return "record"
        known = {"latent": state["latent"], "explanation": state["explanation"]}
        return [Send("score", {**known, "evaluator": name}) for name in by_name]

    async def score(state: LabelState) -> LabelState:
        latent, name, explanation = state["latent"], state["evaluator"], state["explanation"]
        assert explanation is not None
        evidence = bench.evidence(latent, "score")
        evaluation = await by_name[name].evaluate(explanation, evidence, bench.judge, bench.latent_seed(latent))
        return {"evaluations": [(name, evaluation)]}

    def record(state: LabelState) -> LabelState:
        return {"record": _record(bench, state)}

    graph = StateGraph(LabelState)
    graph.add_node("explain", explain)
    graph.add_node("score", score)
    graph.add_node("record", record)
    graph.add_edge(START, "explain")
    graph.add_conditional_edges("explain", route, ["score", "record"])
    graph.add_edge("score", "record")
    graph.add_edge("record", END)
    return graph.compile().with_config(recursion_limit=RECURSION_LIMIT)


def _record(bench: Workbench, state: LabelState) -> LatentRecord:
    explanation, latent = state["explanation"], state["latent"]
    if explanation is None:
        detail = f"{bench.explainer.name}: {state['why_not']}"
        return LatentRecord(bench.dictionary, latent, "no_explanation", detail=detail)
    identity = explanation.id(bench.dictionary, latent)
    evaluations = sorted(state.get("evaluations", []), key=lambda pair: pair[0])
    return LatentRecord(
        bench.dictionary,
        latent,
        "labeled",
        explanations=[(explanation, identity)],
        scores=[(identity, score) for _, evaluation in evaluations for score in evaluation.scores],
        verdicts=[
            VerdictRecord(identity, name, item) for name, evaluation in evaluations for item in evaluation.verdicts
        ],
    )
