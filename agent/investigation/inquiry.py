"""What happens at each node of an investigation's graph; the ledger holds everything, so every node may run twice.

    frame        the investigator says how the behaviour is measured, where the question does not
    approve      a person confirms or corrects that, where one watches
    think        the investigator decides: hypotheses, calls, claims
    predict      what each experiment of the decision predicts is written down, of all of them before any runs
    experiment   calls run in threads, each result written down before it is used; one that was made before is not run again
    update       figures are held against their predictions, by code
    listen       a person may say something, or end the search
    verify       claims are checked on the held-out prompts
    report       the record and the report are written

What exceeds the budget is refused, and the investigation goes on to verify and report with what it has. A quarter of the forward
passes is kept for verifying.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

from langgraph.types import interrupt

from exegete.agent.investigation.calls import Planned, planned, refused_for_passes
from exegete.agent.investigation.contract import (
    Case,
    Claim,
    Decision,
    Investigator,
    Left,
    Metric,
    Outcome,
    Question,
    Result,
    Verdict,
    View,
)
from exegete.agent.investigation.ledger import Finished, Ledger, Stopped
from exegete.agent.investigation.passes import PassesUsedUp, counting
from exegete.agent.investigation.record import InvestigationRecord, Spent, write_record
from exegete.agent.investigation.running import Running
from exegete.agent.investigation.telling import decided_lines, result_line, verdict_line
from exegete.tools.errors import UserError
from exegete.tools.llm.budget import BudgetUsedUp

if TYPE_CHECKING:
    from exegete.agent.investigation.bench import Bench
    from exegete.agent.investigation.toolbelt import Toolbelt

Verify = Callable[["Bench", Sequence[Case], Sequence[Claim], Collection[str]], Awaitable[list[Verdict]]]
Report = Callable[[InvestigationRecord, Path], Path]

RESERVED = 0.25
"""Of the forward passes, for verifying alone."""
IDLE = 4
"""Decisions in a row that bring nothing new, after which the search ends."""
REFUSALS = 5
"""Decisions with calls for which no passes were left, after which the search ends."""
THREADS = 8
"""Calls of a decision that run at a time."""


class State(TypedDict, total=False):
    """What travels through the graph."""

    step: int
    """Decisions so far."""
    done: bool
    """Whether the search is over."""


class Interrupted(Exception):
    """It was asked to stop; it goes on from where it is."""


@dataclass(frozen=True)
class Answer:
    """What a person says between two steps."""

    note: str = ""
    stop: bool = False
    """End the search; what is claimed so far is verified."""


class Person(Protocol):
    """Who watches an investigation and may correct it."""

    def metric(self, question: Question, proposed: Metric) -> Metric:
        """Return how the behaviour is to be measured: what is proposed, or something better."""
        ...

    def between(self, step: int, results: Sequence[Result]) -> Answer:
        """Return what there is to say before the next decision."""
        ...


@dataclass
class Inquiry:
    """One investigation at work. `close` it."""

    ledger: Ledger
    investigator: Investigator
    question: Question
    """With the search prompts alone."""
    held_out: tuple[Case, ...]
    open_bench: Callable[[Metric], Bench]
    open_toolbelt: Callable[[Bench], Toolbelt]
    verifier: Verify
    reporter: Report
    account: Callable[[], Spent] = Spent
    """Calls to language models, their tokens and cost so far."""
    labels: Callable[[InvestigationRecord], InvestigationRecord] = lambda record: record
    """Adds to a record what a store says of the latents in it."""
    say: Callable[[str], None] = lambda line: None
    advance: Callable[[int], None] = lambda decisions: None
    stopping: Callable[[], bool] = lambda: False
    interactive: bool = False
    _bench: Bench | None = None
    _tools: Toolbelt | None = None
    _closed: bool = False
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(THREADS, "exegete experiment"))

    def close(self) -> None:
        """Start no more calls, and write down nothing of those that still run."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def frame(self, state: State) -> State:
        """Settle what the metric is proposed to be."""
        if self.ledger.proposed is None:
            self._check_stopping()
            self.ledger.propose(self.question.metric or await self.investigator.frame(self.question))
        return {"step": 0, "done": False}

    async def approve(self, state: State) -> State:
        """Let a person confirm the metric; then measure the behaviour once on the prompts as they are."""
        metric = self.ledger.metric
        if metric is None:
            proposed = self.ledger.proposed
            assert proposed is not None
            told = interrupt("metric") if self.interactive else None
            metric = self.ledger.settle(Metric(**told) if told else proposed)
        self.say(f"metric: {metric.kind}, in {metric.unit}")
        await self._opened()
        return {}

    async def think(self, state: State) -> State:
        """Let the investigator decide, unless that is written down, or something is used up."""
        step, known = state["step"] + 1, tuple(self.ledger.hypotheses)
        decision = self.ledger.decision(step)
        if decision is None:
            self._check_stopping()
            decision = await self._decided(step)
            self.advance(decision is not None)
        if decision is None:
            return {"done": True}
        for line in decided_lines(decision, known):
            self.say(line)
        return {"step": step, "done": decision.done}

    async def predict(self, state: State) -> State:
        """Write down what every experiment of the decision predicts."""
        known = {hypothesis.id for hypothesis in self.ledger.hypotheses}
        for one in await self._plan(state["step"]):
            if one.prediction is None or one.repeats or self.ledger.finished(one.call.id):
                continue
            if one.prediction.hypothesis not in known:
                self.ledger.finish(Result(one.call, "error", Outcome(_unknown(one.prediction.hypothesis, known))))
            else:
                self.ledger.predict(one.call, one.prediction)
        return {}

    async def experiment(self, state: State) -> State:
        """Run the calls of the decision that have not ended, at the same time, and write down what became of each."""
        self._check_stopping()
        step = state["step"]
        tools, plan = await self._opened(), await self._plan(step)
        most = self._search_passes()
        await Running(self.ledger, tools, self._threads, step, most, lambda: self._closed).run(plan)
        return {}

    async def update(self, state: State) -> State:
        """Hold figures against predictions."""
        for result in self.ledger.score(state["step"]):
            self.say(result_line(result))
        return {}

    async def listen(self, state: State) -> State:
        """Let a person say something."""
        step = state["step"] + 1
        if not self.interactive or state["done"] or self.ledger.decision(step) is not None:
            return {}
        answer = Answer(**interrupt("between"))
        if answer.note:
            self.ledger.note(step, answer.note)
        if answer.stop:
            self.ledger.stop("the person who watched ended the search", budget=False)
        return {"done": answer.stop}

    async def verify(self, state: State) -> State:
        """Check the claims of the last decision."""
        if self.ledger.verdicts is None:
            await self._opened()
            short = len(self._refusals())
            if short and self.ledger.stopped is None:
                self.ledger.stop(
                    f"{short} calls were refused, since they took more forward passes than were left", budget=True
                )
            last = self.ledger.decision(self.ledger.steps)
            claims = last.claims if last else ()
            standing = [claim for claim in claims if not claim.withdrawn]
            verdicts, passes = await asyncio.to_thread(self._verified, standing) if standing else ([], 0)
            self.ledger.use("verifying", passes)
            self.ledger.judge(_with_withdrawn(claims, verdicts))
        for verdict in self.ledger.verdicts or ():
            self.say(verdict_line(verdict))
        return {}

    async def report(self, state: State) -> State:
        """Write the record and the report."""
        self.ledger.end(self.account())
        await asyncio.to_thread(self.write)
        return {}

    def write(self) -> Path:
        """Write the record and the report from the ledger as it is; return the path of the report.

        Raises:
            UserError: they cannot be written.
        """
        record = self.labels(self.ledger.record())
        try:
            write_record(record, self.ledger.folder)
            return self.reporter(record, self.ledger.folder)
        except OSError as error:
            raise UserError(
                f"cannot write the report into {str(self.ledger.folder)!r} ({error}); free some space and go on: "
                f"exegete ask --resume {self.ledger.folder.name}"
            ) from error

    def recall(self, experiment: str) -> Outcome | None:
        """Return what the experiment with an id found, None where there is none that has ended."""
        found = (
            one.result.outcome for one in self.ledger.calls() if one.result.experiment == experiment and not one.repeats
        )
        return next(found, None)

    def _check_stopping(self) -> None:
        if self.stopping():
            raise Interrupted

    async def _opened(self) -> Toolbelt:
        """Return the tools; before the first call of a process, measure what all of them begin with."""
        if self._tools is None:
            metric = self.ledger.metric
            assert metric is not None
            self._bench = self.open_bench(metric)
            self.ledger.use("opening", await asyncio.to_thread(_measured_once, self._bench, self._search_passes()))
            self._tools = self.open_toolbelt(self._bench)
        return self._tools

    async def _decided(self, step: int) -> Decision | None:
        """Return what the investigator decides; None where the search is over before it has ended it."""
        over = self._over(step)
        if over is None:
            try:
                decision = await self.investigator.decide(self._view(step))
            except UserError as error:
                if not isinstance(error.__cause__ or error, BudgetUsedUp):
                    raise
                over = Stopped(str(error), budget=True)
            else:
                if not decision.again:
                    # What nobody will see any more is not run.
                    return self.ledger.decide(step, replace(decision, calls=()) if decision.done else decision)
                # Whoever asked to stop while a server failed wants no verifying.
                self._check_stopping()
                over = Stopped(decision.again, budget=False, again=True)
        self.ledger.stop(over.why, over.budget, over.again)
        self.say(f"the search ends: {over.why}")
        return None

    def _over(self, step: int) -> Stopped | None:
        """Return why there is no decision to come, None where there is one."""
        steps = self.ledger.begun().budget.steps
        if step > steps:
            return Stopped(f"its {steps} steps are used", budget=True)
        calls = self.ledger.calls()
        if len({one.step for one in self._refusals()}) >= REFUSALS:
            return Stopped(f"its {self._search_passes():,} forward passes for the search are used", budget=True)
        news = max((one.step for one in calls if not one.repeats), default=0)
        if step - 1 - news >= IDLE:
            return Stopped(f"{IDLE} decisions in a row brought nothing new", budget=False)
        return None

    def _refusals(self) -> list[Finished]:
        """Return the calls for which no passes were left, since there was last more of a budget."""
        after = self.ledger.reopened
        return [one for one in self.ledger.calls() if one.step > after and refused_for_passes(one.result)]

    def _view(self, step: int) -> View:
        calls, metric = self.ledger.calls(), self.ledger.metric
        before = self.ledger.decision(step - 1)
        assert metric is not None
        return View(
            question=replace(self.question, metric=metric),
            metric=metric,
            hypotheses=self.ledger.hypotheses,
            results=tuple(one.result for one in calls),
            new=sum(one.step == step - 1 for one in calls),
            said=tuple(before.said) if before else (),
            steps_left=self.ledger.begun().budget.steps - step + 1,
            notes=self.ledger.notes(step),
            left=self._left(step),
        )

    def _left(self, step: int) -> Left:
        """Return what may still be used when the decision of a step is made."""
        budget, most = self.ledger.begun().budget, self._search_passes()
        spent = self.ledger.spent_before(step, self.account)
        return Left(
            None if most is None else max(0, most - self.ledger.passes(before_step=step)),
            None if budget.tokens is None else max(0, budget.tokens - spent.tokens),
            None if budget.usd is None else max(0.0, budget.usd - spent.usd),
        )

    async def _plan(self, step: int) -> list[Planned]:
        decision, tools = self.ledger.decision(step), await self._opened()
        assert decision is not None
        return planned(decision.calls, [one for one in self.ledger.calls() if one.step < step], tools.checked)

    def _search_passes(self) -> int | None:
        """Return the passes that the search may use, None where there is no limit."""
        most = self.ledger.begun().budget.passes
        return None if most is None else int((1 - RESERVED) * most)

    def _verified(self, claims: Sequence[Claim]) -> tuple[list[Verdict], int]:
        """Check claims on a thread of its own; return also the passes that it took."""
        assert self._bench is not None
        most, known = self.ledger.begun().budget.passes, []
        for one in self.ledger.calls():
            if one.result.experiment and one.result.status == "ok":
                known.append(one.result.experiment)
        with counting(None if most is None else most - self.ledger.passes()) as count:
            try:
                found = asyncio.run(_awaitable(self.verifier(self._bench, self.held_out, claims, known)))
            except PassesUsedUp as error:
                found = [_unverified(claim, error) for claim in claims]
        return found, count.used


def _measured_once(bench: Bench, most: int | None) -> int:
    """Take what every tool begins with, so that none has to; return the passes that it took."""
    with counting(most) as count:
        try:
            _ = bench.prompts, bench.measurable.clean, bench.rates
        except PassesUsedUp as error:
            raise UserError(
                f"the budget of forward passes is too small to measure the behaviour even once ({error}); give more with --passes"
            ) from error
    return count.used


async def _awaitable(work: Awaitable[list[Verdict]]) -> list[Verdict]:
    return await work


def _with_withdrawn(claims: Sequence[Claim], checked: Sequence[Verdict]) -> list[Verdict]:
    """Return a verdict for each claim, in their order: those that were taken back are neither checked nor left out."""
    rest = iter(checked)
    return [
        Verdict(claim, "withdrawn", f"it was taken back before any check, since: {claim.withdrawn}")
        if claim.withdrawn
        else next(rest)
        for claim in claims
    ]


def _unverified(claim: Claim, error: PassesUsedUp) -> Verdict:
    if claim.kind == "correlational":
        return Verdict(claim, "correlational", "nothing causal is claimed")
    return Verdict(claim, "unverified", f"no forward passes were left to check it ({error})")


def _unknown(hypothesis: str, known: Collection[str]) -> str:
    there = ", ".join(sorted(known)) or "none so far"
    return f"there is no hypothesis {hypothesis!r}; there are: {there}. State it first, then predict"
