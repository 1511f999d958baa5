"""Test-and-refine: the investigating agent as an explainer, one latent at a time. The top rung of the cascade.

1. The agent is shown firing windows of the explain split, as other explainers are, and gets tools that run its own texts on the
   live model (`latent_tools`). It states hypotheses, says of each text what it expects, looks, revises, and ends with `finish`.
   The evidence that its tools have is sealed to every other split.
2. It is the agent of `exegete ask` under another brief: the same conversation (`model`, `conversation`), notes
   (`note_taking`) and checks of calls (`toolbelt`).
3. A latent may take so many tokens, input and output together, and so many replies (`MeteredClient`). What the next request can
   come to is bounded before it is sent: what the provider counted so far, a token for each byte that is new, and the longest
   reply. A last reply is announced, and results for which nothing is left are withheld.
4. Nothing but replies is kept, and those are in the run's journal. The tools are functions of the evidence, the seed and the
   model, so a run that is taken up sends the same requests, asks none again, and ends in the same explanation. (Where others
   of the process run the same model, figures are the same beyond rounding; strengths are whole numbers, which hides nearly all of it.)

An agent that never finishes has explained nothing: what stands is the explanation of the rung below.

Source: Shaham et al. 2024, "A Multimodal Automated Interpretability Agent" (hypothesis, experiment, revision). Published
comparisons with drawing several explanations are mixed, so runs measure it (`exegete.agent.cascade_control`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from exegete.agent.investigation.contract import Budget, Decision, Hypothesis, Metric, Outcome, Question, Result, View
from exegete.agent.investigation.conversation import Turn
from exegete.agent.investigation.latent_tools import LatentBench, RatedLive, strengths, tested, tools_of_latents
from exegete.agent.investigation.model import ModelInvestigator, silent
from exegete.agent.investigation.note_taking import read_arguments
from exegete.agent.investigation.toolbelt import Toolbelt
from exegete.tools.errors import ExegeteError, UserError
from exegete.tools.evidence import restrict
from exegete.tools.explainers import Explanation, NotExplained
from exegete.tools.explainers.asking import Shown, checked_predicate, firing_windows
from exegete.tools.llm import Client, Message, Reply, Request
from exegete.tools.llm.prices import most_input_tokens
from exegete.tools.prompting import Line, line, prompt_digest, render, window_line
from exegete.tools.seeds import derive_seed, digest
from exegete.tools.windows import LatentEvidence

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from exegete.tools.dictionaries import Dictionary
    from exegete.tools.live_model import LiveModel

NAME = "test-and-refine"
RESULT_CHARACTERS = 3_000
"""Of one result, at most."""
MARGIN = 1_000
"""Tokens of a request beside its results: what the agent is told, names and ids of calls."""
_WITHHELD = Outcome("[not shown: too few tokens are left for it]")
_NOTHING_MEASURED = Metric("judged", criterion="the unit fires")
"""A latent's texts are looked at one by one; no metric is taken of prompts."""


class OutOfTokens(ExegeteError):
    """The next request could take more than a latent may."""


class AgentExplainer:
    """Explains a latent by writing texts, running them on the live model, and revising what it thought."""

    name = NAME
    calls_tools = True

    def __init__(
        self,
        client: Client,
        model: LiveModel,
        dictionary: Dictionary,
        rates: NDArray[np.float64],
        windows: int = 12,
        tokens: int = 60_000,
        steps: int = 12,
        temperature: float | None = None,
        max_tokens: int = 4_096,
    ) -> None:
        """Ask `client`, with tools that run `model`.

        Args:
            client: a live language model that can call tools.
            model: the live subject, with the dictionary attached.
            dictionary: of the latents.
            rates: share of tokens on which each latent fires, shape (latent,).
            windows: firing windows to show at the beginning, at most.
            tokens: of all requests and replies about one latent, at most.
            steps: replies, at most.
            temperature: None leaves the provider's default.
            max_tokens: of each reply, reasoning included.

        Raises:
            UserError: there is no window to show, or too few steps or tokens for a test and an answer.
        """
        if windows < 1 or steps < 2:
            raise UserError(f"{NAME}: windows = {windows} and steps = {steps}; give 1 window and 2 steps at least")
        if tokens < 3 * max_tokens:
            raise UserError(
                f"{NAME}: tokens = {tokens} hold no conversation of replies of up to {max_tokens}: give {3 * max_tokens} at least, "
                "or a smaller max_tokens"
            )
        self._client, self._windows, self._tokens, self._steps = client, windows, tokens, steps
        self._options: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
        self._live = RatedLive(model, dictionary, None, known=rates)

    async def explain(self, evidence: LatentEvidence, seed: int) -> Explanation | None:
        """Return the explanation that the agent ends with, or None where it sees no pattern or nothing fires.

        Raises:
            NotExplained: it ended without one: by a reply that failed, by silence, or by its tokens or steps.
            SealedSplitError: `evidence` hides the explain split.
            UserError: the client cannot be asked at all.
        """
        own = restrict(evidence, "explain")
        seed = derive_seed(seed, NAME)
        bench = LatentBench(self._live, (), _NOTHING_MEASURED, seed, evidence=own)
        if not (shown := _shown(bench, self._windows)):
            return None
        meter = MeteredClient(self._client, self._tokens)
        brief = LatentBrief(shown, float(bench.rates[own.latent]), self._tokens)
        belt = Toolbelt(bench, tools_of_latents(), most=RESULT_CHARACTERS)
        agent = ModelInvestigator(meter, belt.schemas("plain"), brief=brief, **self._options)
        try:
            decision, view = await self._conversed(agent, belt, meter)
        except OutOfTokens as ended:
            raise NotExplained("budget", str(ended)) from None
        return self._explanation(decision, view, brief)

    async def _conversed(self, agent: ModelInvestigator, belt: Toolbelt, meter: MeteredClient) -> tuple[Decision, View]:
        """Return the last decision, and what it was made on."""
        question = Question("What does the unit respond to?", (), budget=Budget(steps=self._steps))
        view = View(question, _NOTHING_MEASURED, (), (), 0, (), self._steps)
        while True:
            decision = await agent.decide(view)
            if decision.done or view.steps_left == 1:
                return decision, view
            calls = decision.calls
            results = await asyncio.to_thread(lambda: tuple(belt.run(call) for call in calls))  # noqa: B023
            shown = results if meter.fits(results, 1) else tuple(replace(one, outcome=_WITHHELD) for one in results)
            view = replace(
                view,
                hypotheses=_merged(view.hypotheses, decision.hypotheses),
                results=(*view.results, *shown),
                new=len(shown),
                said=tuple(decision.said),
                steps_left=view.steps_left - 1 if meter.fits(results, 2) else 1,
            )

    def _explanation(self, decision: Decision, view: View, brief: LatentBrief) -> Explanation | None:
        answer = _finished(decision)
        if answer is None:
            raise NotExplained("unfinished", decision.answer or f"no `finish` in {len(decision.said)} replies")
        if answer.get("nothing"):
            return None
        predicate, dropped = checked_predicate(answer.get("predicate"))
        texts, expected, held = tested([result.outcome.facts for result in view.results])
        noted = {
            **self._options,
            **{"windows": self._windows, "tokens": self._tokens, "steps": self._steps},
            **{"replies": len(decision.said), "texts": texts, "expected": expected, "held": held},
            **({"predicate_dropped": dropped} if dropped else {}),
        }
        return Explanation(" ".join(answer["answer"].split()), predicate, NAME, self._client.name, brief.digest, noted)


class MeteredClient:
    """A client that counts the tokens of one conversation, and ends it before they are more than it may take.

    Tokens are those that the provider counts; where it counts none, the number of replies alone is a bound.
    """

    def __init__(self, client: Client, most: int) -> None:
        """Ask `client`; let the conversation take `most` tokens, input and output together."""
        self.name = client.name
        self.spent = 0
        self._client, self._most = client, most
        self._sent: Request | None = None
        self._held = 0
        """Tokens of the conversation so far, the last reply included."""

    async def complete(self, request: Request) -> Reply:
        """Return the reply.

        Raises:
            OutOfTokens: this request could take more than is left.
            UserError: nothing can come of asking.
        """
        bound = self._held + most_input_tokens(self._new(request)) + request.max_tokens
        if self.spent + bound > self._most:
            raise OutOfTokens(f"{self.spent:,} of {self._most:,} tokens are spent, the next reply could take {bound:,}")
        reply = await self._client.complete(request)
        usage = reply.usage + reply.known_usage
        if taken := usage.input_tokens + usage.output_tokens:
            self.spent += taken
            self._sent, self._held = request, taken
        return reply

    def fits(self, results: Sequence[Result], replies: int) -> bool:
        """Return whether so many more replies fit, the first of them to these results, later ones to as much again."""
        if self._sent is None:
            return True
        new = MARGIN + sum(len(one.outcome.text.encode()) for one in results)
        most = self._sent.max_tokens
        # Each request holds the one before it, its reply, and what is new.
        needed = sum(self._held + place * (new + most) for place in range(1, replies + 1))
        return self.spent + needed <= self._most

    async def close(self) -> None:
        """Leave the client open: others ask it too."""

    def _new(self, request: Request) -> Request:
        if self._sent is None:
            return request
        # After what was sent comes the reply to it, which has been counted.
        return Request(request.messages[len(self._sent.messages) + 1 :])


@dataclass(frozen=True)
class LatentBrief:
    """The agent is to explain a latent."""

    shown: Sequence[Shown]
    rate: float
    """Share of tokens on which it fires."""
    tokens: int
    """That the conversation may take."""
    notes: Sequence[str] = ("finish",)

    @property
    def digest(self) -> str:
        """Of both prompts."""
        return digest(prompt_digest("test_and_refine"), prompt_digest("test_and_refine_results"))

    def beginning(self, view: View) -> tuple[Message, ...]:
        """Return the system prompt and the windows."""
        return render(
            "test_and_refine",
            rate=line(f"{self.rate:.2%}"),
            windows=list(self.shown),
            steps=view.question.budget.steps,
            tokens=self.tokens,
        ).messages

    def told(self, view: View, turns: Sequence[Turn]) -> str:
        """Return how many expectations held, and how much is left."""
        if not turns:
            return ""
        new = {call.run for call in turns[-1].calls if call.run}
        _, expected, held = tested([one.outcome.facts for one in view.results if one.call.id in new])
        rendered = render(
            "test_and_refine_results",
            **{"expected": expected, "held": held, "silent": silent(turns), "cut": int(turns[-1].cut)},
            steps=view.steps_left,
        )
        return rendered.messages[-1].text


def _shown(bench: LatentBench, count: int) -> list[Shown]:
    """Return firing windows as the prompt shows them, with strengths as the tools show them."""
    found = []
    for window in firing_windows(bench.evidence, count, bench.seed):
        text = window_line(window.tokens, window.firing_positions())
        values = window.activations
        # Its tokens have been escaped one by one.
        found.append(Shown(text, None if values is None else Line(strengths(bench, window.tokens, values))))
    return found


def _finished(decision: Decision) -> Mapping[str, Any] | None:
    """Return the arguments of the call that ended the work, None where none did."""
    if not decision.done or not decision.said:
        return None
    last = Turn.of(decision.said[-1])
    ends = [call for call in last.calls if call.name == "finish" and not call.failed]
    return read_arguments(ends[-1].arguments)[0] if ends else None


def _merged(known: Sequence[Hypothesis], stated: Sequence[Hypothesis]) -> tuple[Hypothesis, ...]:
    return tuple(({one.id: one for one in known} | {one.id: one for one in stated}).values())
