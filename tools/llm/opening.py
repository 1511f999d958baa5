"""From a model's name to a client that is ready to be asked."""

from __future__ import annotations

import math
from collections.abc import Callable

from exegete.tools.errors import UserError
from exegete.tools.llm.batch_limits import BatchLimits
from exegete.tools.llm.batch_wire import BatchWire
from exegete.tools.llm.batches import BatchClient
from exegete.tools.llm.budget import Budget
from exegete.tools.llm.contract import BatchJournal, Client, Journal, Message, PromptScorer, Request
from exegete.tools.llm.journaled import JournaledClient
from exegete.tools.llm.pacing import Allowance, Limits
from exegete.tools.llm.prices import Price, Prices, load_prices
from exegete.tools.llm.specs import Spec, parse_spec
from exegete.tools.llm.wire import Wire


def open_client(
    spec: str,
    *,
    journal: Journal,
    budget: Budget | None = None,
    prices: Prices | None = None,
    limits: Limits | None = None,
    batches: BatchLimits | None = None,
    device: str = "cpu",
    allowance: Allowance | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> JournaledClient | BatchClient:
    """Return a client for the model that `spec` names. Nothing is sent yet.

    Args:
        spec: `openai:MODEL`, `anthropic:MODEL`, `openai-batch:MODEL`, `anthropic-batch:MODEL`, each also with `@URL`, or
            `hf:PATH`.
        journal: keeps intents and replies; a reply that it knows is not paid for again.
        budget: stops new calls before it is exceeded; may be shared between clients. None spends without a limit, and lets
            models pass whose price is unknown (`JournaledClient.price` is None, every `Reply.usd` 0).
        prices: price tables; the shipped one where left out.
        limits: concurrency, rates and timeouts.
        batches: how batches are gathered and watched.
        device: torch device of an `hf:` model.
        allowance: the server's limits, shared with other clients of it; batches have none.
        stopping: once it is true, a call that fails is not sent again; batches go on.

    Raises:
        UserError: the provider is unknown, the key is missing (its variable is named), the budget needs a price that
            neither table has, the model of `hf:` cannot be loaded, or the journal cannot remember batches.
    """
    parsed, limits = parse_spec(spec), limits or Limits()
    price = price_for(parsed, budget, prices)
    if parsed.provider.endswith("-batch"):
        if not isinstance(journal, BatchJournal):
            raise UserError(f"{parsed.name}: this journal cannot remember batches; leave `-batch` out")
        batches = batches or BatchLimits()
        wire = _batch_wire(parsed, limits, batches)
        return BatchClient(wire, journal=journal, budget=budget, price=price, limits=limits, batches=batches)
    live = _wire(parsed, limits, device)
    return JournaledClient(
        live, journal=journal, budget=budget, price=price, limits=limits, allowance=allowance, stopping=stopping
    )


def price_for(spec: Spec, budget: Budget | None, prices: Prices | None) -> Price | None:
    """Return the price of a model. Raises UserError where there is a budget in USD and no price is known."""
    prices = prices or load_prices()
    return prices.find(spec) if budget is None or budget.max_usd == math.inf else prices.require(spec)


def open_scorer(spec: str, *, device: str = "cpu") -> PromptScorer:
    """Return the local model that `spec` names (`hf:PATH`), for log-probabilities of text after prompts.

    Raises:
        UserError: it is not `hf:`, since providers give no log-probabilities of prompts, or it cannot be loaded.
    """
    parsed = parse_spec(spec)
    if parsed.provider != "hf":
        raise UserError(f"{parsed.name}: gives no log-probabilities of given text; expected a local model, hf:PATH")
    from exegete.tools.llm.local_client import LocalModel

    return LocalModel(parsed.model, device=device)


async def gives_logprobs(client: Client) -> bool:
    """Return whether a model gives log-probabilities, found out by one short question.

    Raises:
        UserError: the model cannot be asked at all.
    """
    question = Request((Message("user", "Reply with the single digit 1."),), max_tokens=16, logprobs=True)
    reply = await client.complete(question)
    if reply.status in ("rejected", "error", "unknown"):
        raise UserError(f"{client.name}: no answer to a first question: {reply.detail}")
    return reply.logprobs is not None


def _wire(spec: Spec, limits: Limits, device: str) -> Wire:
    # The SDKs take a second to import: only the one that is needed is.
    if spec.provider == "openai":
        from exegete.tools.llm.openai_client import OpenAIWire

        return OpenAIWire(spec, limits)
    if spec.provider == "anthropic":
        from exegete.tools.llm.anthropic_client import AnthropicWire

        return AnthropicWire(spec, limits)
    from exegete.tools.llm.local_client import LocalModel

    return LocalModel(spec.model, device=device)


def _batch_wire(spec: Spec, limits: Limits, batches: BatchLimits) -> BatchWire:
    if spec.provider == "openai-batch":
        from exegete.tools.llm.batch_openai import OpenAIBatchWire

        return OpenAIBatchWire(spec, limits, batches.transfer_s)
    from exegete.tools.llm.batch_anthropic import AnthropicBatchWire

    return AnthropicBatchWire(spec, limits, batches.transfer_s)
