"""`exegete doctor --live MODEL`: whether a model can be used for a labeling run, found out by a handful of calls.

1. Key and price are looked up before anything is sent. A check goes ahead only while its worst case fits into what is left
   of the budget; one that does not is skipped, and says so.
2. A short question: is the server there, does it take the key, which model answers.
3. A question that does not mention the schema of its answer: does the server hold the model to it. A question at
   temperature 0, which many models do not take.
4. The judge's own prompt on three passages, of which one tells the judge what to answer: verdicts and log-probabilities.
5. A long beginning sent twice with different ends: does the provider's usage count cached tokens.
6. For `hf:` models, log-probabilities of given text. For `…-batch:` models, the live endpoint of the same model.

Whatever was found is said with what it means for a labeling run.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from exegete.agent.doctor_checks import LOOKS, NO_ANSWER, Check, Examination, TooDear, reach
from exegete.tools.errors import UserError
from exegete.tools.llm import (
    Budget,
    BudgetUsedUp,
    Limits,
    MemoryJournal,
    Prices,
    PromptScorer,
    Spec,
    Usage,
    load_prices,
    open_client,
    open_scorer,
    parse_spec,
)
from exegete.tools.llm.faults import scrub
from exegete.tools.llm.journaled import JournaledClient
from exegete.tools.llm.prices import FREE
from exegete.tools.rendering import visible

MAX_USD = 0.05
LIMITS = Limits(concurrency=1, total_s=60.0, patience_s=30.0, attempts=3)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found of one model."""

    model: str
    """As it was asked; for a batch model, its live endpoint."""
    checks: tuple[Check, ...]

    @property
    def usable(self) -> bool:
        """Whether a labeling run can use the model: it answers, and can explain and judge, or at least score text."""
        found = {check.name: check.outcome for check in self.checks}
        reached = found.get("reachable") in ("ok", "lacking")
        return reached and (found.get("structured output") != "failed" or found.get("given text") == "ok")

    def lines(self) -> list[str]:
        """Return one line a check, safe for a terminal."""
        return [self.model, *map(_line, self.checks)]


def examine(
    spec: str,
    *,
    max_usd: float | None = MAX_USD,
    prices: Prices | None = None,
    limits: Limits = LIMITS,
    device: str = "cpu",
) -> Diagnosis:
    """Ask the model that `spec` names a handful of questions and return what it can do.

    Args:
        spec: as `open_client` takes it; `openai-batch:` and `anthropic-batch:` are checked by their live endpoint.
        max_usd: what the calls may cost; None asks without a limit, and a model whose price is unknown as well.
        prices: price tables; the shipped one where left out.
        limits: timeouts and patience.
        device: torch device of an `hf:` model.

    Raises:
        UserError: unknown provider, missing key (its variable is named), unknown price, no model in `hf:PATH`.
    """
    asked = parse_spec(spec)
    live = replace(asked, provider=asked.provider.removesuffix("-batch"))
    prices = prices or load_prices()
    budget = None if max_usd is None or live.provider == "hf" else Budget(max_usd)
    journal = MemoryJournal()
    scorer: PromptScorer | None = None
    if live.provider == "hf":
        client, scorer = _local(live, journal, limits, device)
    else:
        opened = open_client(live.name, journal=journal, budget=budget, prices=prices, limits=limits)
        assert isinstance(opened, JournaledClient)  # Only `…-batch:` has another.
        client = opened
    checks = asyncio.run(_examined(Examination(client, journal, budget, scorer)))
    if asked != live:
        checks.append(_batch(asked, prices))
    key = None if live.provider == "hf" else live.key()
    return Diagnosis(live.name, tuple(replace(one, found=scrub(one.found, key)) for one in checks))


def _local(spec: Spec, journal: MemoryJournal, limits: Limits, device: str) -> tuple[JournaledClient, PromptScorer]:
    from exegete.tools.llm.local_client import LocalModel

    model = open_scorer(spec.name, device=device)
    assert isinstance(model, LocalModel)  # `open_scorer` opens nothing else; one copy in memory does for both.
    return JournaledClient(model, journal=journal, budget=None, price=FREE, limits=limits), model


async def _examined(own: Examination) -> list[Check]:
    try:
        found = await _looked(own, "reachable", reach)
        if found[-1].outcome in ("ok", "lacking"):
            for name, look in LOOKS:
                found += await _looked(own, name, look)
            found.append(_refusals(own))
        return [*found, *_spent(own)]
    finally:
        await own.client.close()


async def _looked(own: Examination, name: str, look: Callable[[Examination], Awaitable[list[Check]]]) -> list[Check]:
    # Without a first answer nothing is known of the model: that is a failure and no gap.
    try:
        return await look(own)
    except (TooDear, BudgetUsedUp) as error:
        return [Check(name, "failed" if name == "reachable" else "skipped", str(error))]
    except UserError as error:
        return [Check(name, "failed", str(error))]


def _refusals(own: Examination) -> Check:
    declined = [reply for reply in own.replies if reply.status in ("refused", "filtered")]
    if not declined:
        return Check("refusals", "ok", f"none of {len(own.replies)} calls was refused or filtered")
    reasons = "; ".join(sorted({f"{reply.status}: {reply.detail}" for reply in declined}))
    means = "such windows become failure rows with that status, and no score is made of them"
    return Check("refusals", "lacking", f"{len(declined)} of {len(own.replies)} calls: {reasons}", means)


def _spent(own: Examination) -> list[Check]:
    replies = own.replies
    usage = sum((reply.usage for reply in replies), Usage())
    counted = (
        f"{sum(reply.attempts for reply in replies)} calls, {usage.input_tokens:,} input tokens ({usage.cached_input_tokens:,} "
        f"cached, {usage.cache_write_tokens:,} written to the cache), {usage.output_tokens:,} output tokens"
    )
    took = sorted(reply.seconds for reply in replies if reply.status not in NO_ANSWER)
    checks = [_cost(own, counted, usage)]
    if took:
        said = f"{statistics.median(took):.2f} s a call (from {took[0]:.2f} to {took[-1]:.2f}, one at a time, n = {len(took)})"
        checks.append(Check("latency", "ok", said))
    return checks


def _cost(own: Examination, counted: str, usage: Usage) -> Check:
    price, budget = own.client.price, own.budget
    if not own.replies:
        return Check("cost", "ok", "no call was answered, and nothing is owed for that")
    if price is None:
        return Check("cost", "lacking", f"{counted}; no price is known", "no budget can be kept with this model")
    spent = sum(reply.usd for reply in own.replies) if budget is None else budget.spent_usd
    limit = "" if budget is None else f" of {budget.max_usd:g} allowed"
    if all(reply.status in NO_ANSWER for reply in own.replies):
        attempts = sum(reply.attempts for reply in own.replies)
        return Check(
            "cost", "ok", f"none of {attempts} calls was answered; at most {spent:.5f} USD{limit} are owed for them"
        )
    table = (
        "free on this machine"
        if price == FREE
        else f"at {price.input:g} in and {price.output:g} out per million tokens"
    )
    said = f"{counted}: {spent:.5f} USD{limit}, {table}"
    if usage == Usage():
        return Check("cost", "lacking", said, "the server counts no tokens: its calls are booked at their worst case")
    return Check("cost", "ok", said)


def _batch(asked: Spec, prices: Prices) -> Check:
    price = prices.find(asked)
    paid = "" if price is None else f"; by the price table its calls cost {price.batch:.0%}"
    said = f"not looked at: a batch of one may take a day, so the same key and model were asked live{paid}"
    return Check("batches", "skipped", said)


def _line(check: Check) -> str:
    return visible(f"{check.outcome:<8} {check.name}: {check.found}" + (f" → {check.means}" if check.means else ""))
