"""What an audit works with, opened from what the user named."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from exegete.agent.audit_tasks import Instruments
from exegete.agent.models import require_budget
from exegete.evaluators import judge_names, make_judge
from exegete.tools.embedders import Embedder
from exegete.tools.errors import UserError, nearest
from exegete.tools.llm import Budget, MemoryJournal, load_prices, open_client, open_scorer, parse_spec
from exegete.tools.llm.opening import price_for

PREDICATE = "predicate"


@asynccontextmanager
async def opened(
    judge: str,
    embedder: str | None = None,
    scorer: str | None = None,
    *,
    max_usd: float | None = None,
    no_budget: bool = False,
    prices: Path | None = None,
    device: str | None = None,
) -> AsyncIterator[Instruments]:
    """Open the instruments, and close what holds connections.

    Args:
        judge: a registered judge that needs no options, or a model.
        embedder: sentence-transformers model.
        scorer: `hf:PATH`.
        max_usd: budget.
        no_budget: let a paid model be asked without one.
        prices: price table that is laid over the shipped one.
        device: torch device of local models.

    Raises:
        UserError: one of them is unknown or cannot be loaded, or a paid model has no budget. Nothing was asked.
    """
    named = open_scorer(scorer, device=device or "cpu") if scorer else None
    vectors = _embedder(embedder, device) if embedder else None
    if ":" not in judge:
        known = make_judge(_registered(judge))
        # A predicate judge never errs, so what it says elsewhere is what is expected of it.
        yield Instruments(known, None, named, vectors, reference=known if judge == PREDICATE else None)
        return
    spec = parse_spec(judge)
    budget, table = None if max_usd is None else Budget(max_usd), load_prices(prices)
    price = price_for(spec, budget, table)
    require_budget(spec, price, budget, no_budget, "--max-usd")
    client = open_client(judge, journal=MemoryJournal(), budget=budget, prices=table, device=device or "cpu")
    try:
        yield Instruments(make_judge("model", client=client), client, named, vectors, priced=price is not None)
    finally:
        await client.close()


def _registered(judge: str) -> str:
    known = [name for name in judge_names() if name != "model"]
    if judge not in known:
        raise UserError(
            f"no judge is named {judge!r}; there are: {', '.join(known)}, or a model, PROVIDER:MODEL.{nearest(judge, known)}"
        )
    return judge


def _embedder(name: str, device: str | None) -> Embedder:
    from exegete.tools.embedders import SentenceEmbedder

    return SentenceEmbedder(name, device=device or "cpu")
