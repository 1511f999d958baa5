"""The language models of an investigation: the one that investigates, the one that judges, one journal and one budget for both.

The journal lies in the investigation's folder. What it answers is never asked again, and what was paid before counts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exegete.agent.config import ModelsConfig, load_config
from exegete.agent.investigation.contract import Budget
from exegete.agent.investigation.record import RECIPE, Spent
from exegete.agent.models import Models, budget_of, check_models
from exegete.tools.errors import UserError, nearest
from exegete.tools.store.journal import StoreJournal
from exegete.tools.store.journal_file import JOURNAL

if TYPE_CHECKING:
    from exegete.tools.llm import Client

_ACCOUNT_ROWS = 1_000_000


@dataclass(frozen=True)
class LanguageModels:
    """What is asked in an investigation. None where nobody is."""

    investigator: Client | None = None
    judge: Client | None = None
    journal: StoreJournal | None = None
    run: str = ""

    def spent(self) -> Spent:
        """Return the calls so far, their tokens and what they have cost, with the worst case of those that are unknown."""
        if self.journal is None:
            return Spent()
        calls, _ = self.journal.account(0, _ACCOUNT_ROWS)
        return Spent(calls=len(calls), tokens=_tokens(self.journal, self.run), usd=self.journal.spent_usd(self.run))


def checked_models(
    investigator: str, judge: str, budget: Budget, no_budget: bool, config: Path | None
) -> tuple[str, ModelsConfig]:
    """Return the judge's model, and how models are asked. Nothing is sent.

    Args:
        investigator: `recipe`, the name of one that was given, or a language model.
        judge: empty for the investigator's, where that is a language model.
        budget: what may be spent.
        no_budget: spend USD without a limit.
        config: TOML file whose `[models]` says the rest.

    Raises:
        UserError: a model is unknown or cannot be asked as it would have to be, a key is missing, or nobody has said what may be
            spent.
    """
    base = load_config(config, (), {}).models if config else ModelsConfig()
    own = investigator if ":" in investigator else ""
    judge = judge or own or base.judge or ""
    changed = {
        "explainer": own or None,
        "judge": judge or None,
        "scorer": None,
        "budget_usd": budget.usd if budget.usd is not None else base.budget_usd,
        "no_budget": no_budget or (base.no_budget and budget.usd is None),
        "budget_tokens": budget.tokens if budget.tokens is not None else base.budget_tokens,
    }
    settled = base.model_copy(update=changed)
    require_live(own, "an investigator")
    if own or judge:
        check_models(settled)
    return judge, settled


def require_known(investigator: str) -> None:
    """Raise UserError unless a name is the recipe's or looks like a language model's."""
    if investigator != RECIPE and ":" not in investigator:
        raise UserError(
            f"there is no investigator {investigator!r}; expected recipe, or a language model such as anthropic:MODEL, "
            f"openai:MODEL or openai:MODEL@URL.{nearest(investigator, [RECIPE])}"
        )


@asynccontextmanager
async def language_models(
    folder: Path,
    run: str,
    investigator: str,
    judge: str,
    config: ModelsConfig,
    stopping: Callable[[], bool] = lambda: False,
) -> AsyncIterator[LanguageModels]:
    """Open what an investigation asks, in the event loop that it runs in.

    Args:
        folder: of the investigation.
        run: its id, under which calls are noted.
        investigator: a language model; anything else is not opened.
        judge: a language model; empty for none.
        config: as `checked_models` returns it.
        stopping: once it is true, a call that fails is not sent again.

    Raises:
        UserError: a client cannot be made, or the journal is damaged or held by another process.
    """
    own = investigator if ":" in investigator else ""
    if not own and not judge:
        yield LanguageModels()
        return
    journal = StoreJournal(folder / JOURNAL)
    try:
        budget = budget_of(config)
        if budget is not None:
            budget.spent_usd, budget.spent_tokens = journal.spent_usd(run), _tokens(journal, run)
        async with Models(config, lambda: journal.of_run(run), budget, stopping=stopping) as models:
            clients: Sequence[Client | None] = [models.client(spec) if spec else None for spec in (own, judge)]
            yield LanguageModels(clients[0], clients[1], journal, run)
    finally:
        journal.close()


def require_live(spec: str, who: str) -> None:
    """Raise UserError where `who` would ask a model that takes no tools, or answers hours later."""
    from exegete.tools.llm import parse_spec

    if spec and parse_spec(spec).provider not in ("openai", "anthropic"):
        raise UserError(
            f"{spec}: {who} calls tools and is answered at once; expected anthropic:MODEL, openai:MODEL or openai:MODEL@URL"
        )


def _tokens(journal: StoreJournal, run: str) -> int:
    """Return the tokens taken; each call whose reply never came is taken for the largest."""
    taken, unknown, most = journal.spent_tokens(run)
    return taken + unknown * most
