"""The investigator that a language model is, over a client that follows a script, and what a graph does with it in few lines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from exegete.agent.investigation import notes
from exegete.agent.investigation.contract import (
    Budget,
    Call,
    Case,
    Decision,
    Headline,
    Hypothesis,
    Metric,
    Outcome,
    Question,
    Result,
    View,
)
from exegete.agent.investigation.model import ModelInvestigator
from exegete.agent.investigation.toolbelt import make_tool
from exegete.tools.llm import Reply, Request, ToolCall
from exegete.tools.llm.tool_calls import check_tools

CASES = tuple(Case(f"select age in descending order number {n}", " DESC", " ASC", f"ascending {n}") for n in range(15))
QUESTION = Question("Why DESC?", CASES, Metric("log_odds"), suggested="the word descending", budget=Budget(steps=12))
ABLATE = {
    "name": "ablate",
    "description": "Set latents to zero.",
    "parameters": {
        "type": "object",
        "properties": {
            "hypothesis": {"type": "string"},
            "because": {"type": "string"},
            "low": {"type": "number"},
            "high": {"type": "number"},
            "latents": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["hypothesis", "because", "latents"],
        "additionalProperties": False,
    },
}
LENS = {"name": "lens", "description": "What it promotes.", "parameters": {"type": "object", "properties": {}}}
NOTES = [
    {"name": one.name, "description": one.description, "parameters": one.parameters}
    for one in (make_tool("note", note) for note in (notes.hypothesis, notes.update, notes.claim, notes.finish))
]
TOOLS = [LENS, ABLATE, *NOTES]
CAUSAL = {"statement": "Latent 7 does it.", "kind": "causal", "latents": [7], "experiments": ["E1"], "hypothesis": "H1"}
TEST = {"hypothesis": "H1", "because": "it fires there", "high": -1.0, "latents": [7]}


def called(*calls: tuple[str, Any], text: str = "") -> Reply:
    """A reply that calls these tools; arguments that are a text stand as they are. Ids repeat, as some servers' do."""
    made = (
        ToolCall(f"call_{n}", name, given if isinstance(given, str) else json.dumps(given))
        for n, (name, given) in enumerate(calls)
    )
    return Reply("ok", text, calls=tuple(made))


FINISH = called(("finish", {"answer": "Latent 7."}))


class Scripted:
    """Gives these replies in their order, the last one for ever, and keeps what it was asked."""

    name = "scripted:model"

    def __init__(self, *replies: Reply) -> None:
        self.replies = replies
        self.asked: list[Request] = []

    async def complete(self, request: Request) -> Reply:
        check_tools(request)
        self.asked.append(request)
        return self.replies[min(len(self.asked), len(self.replies)) - 1]

    async def close(self) -> None:
        pass


def outcome(call: Call, experiment: str) -> Result:
    if call.tool not in ("ablate", "lens"):
        return Result(call, "error", Outcome(f"there is no tool {call.tool!r}"))
    if call.tool == "lens":
        return Result(call, "ok", Outcome("<token> DESC</token>"))
    return Result(
        call, "ok", Outcome("It fell by 2.1.", Headline("mean change", -2.1, -2.4, -1.8, 9)), experiment, True
    )


@dataclass
class Investigation:
    """What a graph does with an investigator, in few lines; every view is made anew, as after a restart."""

    investigator: ModelInvestigator
    question: Question = QUESTION
    decisions: list[Decision] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    hypotheses: dict[str, Hypothesis] = field(default_factory=dict)
    notes: Mapping[int, str] = field(default_factory=dict)
    run: Callable[[Call, str], Result] = outcome
    new: int = 0

    @property
    def view(self) -> View:
        step = len(self.decisions)
        kept = json.loads(json.dumps(list(self.decisions[-1].said) if self.decisions else []))
        return View(
            self.question, self.question.metric or Metric("log_odds"), tuple(self.hypotheses.values()), tuple(self.results),
            self.new, tuple(kept), self.question.budget.steps - step, (self.notes[step],) if step in self.notes else (),
        )  # fmt: skip

    def step(self) -> Decision:
        decision = asyncio.run(self.investigator.decide(self.view))
        self.decisions.append(decision)
        self.hypotheses |= {one.id: one for one in decision.hypotheses}
        before = len(self.results)
        for call in decision.calls:
            experiments = sum(bool(one.experiment) for one in self.results)
            self.results.append(self.run(call, f"E{experiments + 1}"))
        self.new = len(self.results) - before
        return decision

    def end(self) -> Decision:
        for _ in range(self.question.budget.steps):
            if self.step().done:
                break
        return self.decisions[-1]


def begun(*replies: Reply, **options: Any) -> tuple[Investigation, Scripted]:
    client = Scripted(*replies)
    investigator = ModelInvestigator(client, TOOLS, **options.pop("model", {}))
    return Investigation(investigator, **options), client


def results_of(request: Request) -> list[tuple[str, bool]]:
    return [(result.text, result.failed) for result in request.messages[-1].results]
