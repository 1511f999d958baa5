"""The language models of a run: which are asked, what they may cost, and which calls never got an answer.

1. `check_models` says what is wrong with specs, keys and prices before anything is loaded or paid for.
2. `Models` opens each model once, however many instruments ask it, so that all share its pace; models of one server share
   what that may be asked (calls in flight, requests and tokens per minute); the journal and the budget are the run's.
3. What can never be answered (`Halted`) ends the run: no key, no such model, the budget used up, a full disk. A call that
   failed for good is a reply with a status; `spending` counts those of one latent, which a resumed run asks again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from exegete.agent.config import ModelsConfig
from exegete.agent.metering import seen
from exegete.agent.spending import note
from exegete.agent.vitals import Vitals
from exegete.tools.errors import UserError

if TYPE_CHECKING:
    from exegete.tools.embedders import Embedder
    from exegete.tools.llm import (
        Allowance,
        BatchJournal,
        Budget,
        Client,
        Price,
        Prices,
        PromptScorer,
        Reply,
        Request,
        Spec,
    )


class Halted(UserError):
    """No call can succeed any more until the user has mended something; what is recorded stays."""


def check_models(config: ModelsConfig, others: Iterable[str] = ()) -> None:
    """Look whether every model that is named could be asked, `others` (a cascade's) too. Nothing is sent and nothing is loaded.

    Raises:
        UserError: a provider is unknown, a key is missing (its variable is named), the price of a model is unknown, it may
            cost money and no budget was given, a scorer is no local model, or a folder that is named is not there.
    """
    from exegete.tools.llm import parse_spec
    from exegete.tools.llm.opening import price_for

    budget, prices = budget_of(config), _prices(config)
    for text in filter(None, dict.fromkeys((config.explainer, config.judge, *others))):
        spec = parse_spec(text)
        if spec.provider == "hf":
            _check_folder(spec.name, spec.model)
        else:
            spec.key()
        require_budget(spec, price_for(spec, budget, prices), budget, config.no_budget)
    if config.scorer is not None:
        if (spec := parse_spec(config.scorer)).provider != "hf":
            raise UserError(
                f"models.scorer = {config.scorer!r}: gives no log-probabilities of given text; expected a local model, hf:PATH"
            )
        _check_folder(spec.name, spec.model)
    if config.embedder is not None:
        _check_folder(f"models.embedder = {config.embedder!r}", config.embedder)


def require_budget(
    spec: Spec, price: Price | None, budget: Budget | None, no_budget: bool, option: str = "--budget"
) -> None:
    """Raise UserError where calls may cost money (no price is known, or one above 0) and nobody has said how much."""
    free = price is not None and price.input == price.output == 0
    unlimited = budget is None or budget.max_usd == math.inf
    if unlimited and not no_budget and not free:
        raise UserError(f"{spec.name}: its calls may cost money; say how much, {option} USD, or give --no-budget")


def _check_folder(named: str, path: str) -> None:
    """Raise UserError where `path` can only be a folder and is none; whether the hub has a name is found out at loading."""
    looks_like_one = path.startswith(("/", ".", "~")) or path.count("/") > 1
    if looks_like_one and not Path(path).is_dir():
        raise UserError(f"{named}: there is no folder {path!r}; give the folder of a model, or its name on the hub")


def budget_of(config: ModelsConfig) -> Budget | None:
    """Return the budget that a configuration sets, with nothing spent; None where there is none."""
    from exegete.tools.llm import Budget

    max_usd = None if config.no_budget else config.budget_usd
    if max_usd is None and config.budget_tokens is None:
        return None
    return Budget(max_usd, max_tokens=config.budget_tokens)


class Models:
    """Clients, scorer and embedder of a run, each opened when it is first asked for."""

    def __init__(
        self,
        config: ModelsConfig,
        journal: Callable[[], BatchJournal],
        budget: Budget | None,
        vitals: Vitals | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Write calls to what `journal` opens, pay from `budget` (None: without a limit) and count calls in `vitals`.

        Once `stopping()` is true, calls that fail are not sent again.
        """
        self._stopping = stopping
        self._config = config
        self._vitals = vitals or Vitals()
        self._journal = journal
        self._budget = budget
        self._clients: dict[str, _Watched] = {}
        self._allowances: dict[tuple[str, str], Allowance] = {}
        self._scorer: PromptScorer | None = None
        self._embedders: dict[str, Embedder] = {}

    def client(self, spec: str) -> Client:
        """Return the client of a model. Raises UserError as `exegete.tools.llm.open_client`."""
        from exegete.tools.llm import open_client

        if spec not in self._clients:
            self._clients[spec] = _Watched(
                open_client(
                    spec,
                    journal=self._journal(),
                    budget=self._budget,
                    prices=_prices(self._config),
                    limits=self._config.limits(),
                    batches=self._config.batch_limits(),
                    device=self._config.device,
                    allowance=self._allowance(spec),
                    stopping=self._stopping,
                ),
                self._vitals,
            )
        return self._clients[spec]

    def _allowance(self, spec: str) -> Allowance | None:
        """Return what the server of a model may be asked by all of its models together; None for a local model."""
        from exegete.tools.llm import Allowance, parse_spec

        parsed = parse_spec(spec)
        if parsed.provider == "hf":
            return None
        server = (parsed.provider, parsed.base_url)
        if server not in self._allowances:
            self._allowances[server] = Allowance(self._config.limits())
        return self._allowances[server]

    def scorer(self) -> PromptScorer:
        """Return the local model that gives log-probabilities. Raises UserError where it cannot be loaded."""
        from exegete.tools.llm import open_scorer

        if self._scorer is None:
            self._scorer = open_scorer(self._config.scorer or "", device=self._config.device)
        return self._scorer

    def embedder(self, name: str | None = None) -> Embedder:
        """Return the embedding model `name`, or the run's. Raises UserError where it cannot be loaded."""
        from exegete.tools.embedders import SentenceEmbedder

        wanted = name or self._config.embedder or ""
        if wanted not in self._embedders:
            self._embedders[wanted] = SentenceEmbedder(wanted, device=self._config.device)
        return self._embedders[wanted]

    async def __aenter__(self) -> Models:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        """Let calls in flight land and give connections back; but not where the run was stopped at once."""
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            return
        for client in self._clients.values():
            await client.close()


class _Watched:
    """A client whose calls are counted, and those that are lost for the latent they are about."""

    def __init__(self, client: Client, vitals: Vitals) -> None:
        self.name = client.name
        self._client = client
        self._vitals = vitals

    async def complete(self, request: Request) -> Reply:
        reply: Reply | None = None
        self._vitals.call_out(self.name)
        try:
            reply = await self._client.complete(request)
        except UserError as error:
            raise Halted(str(error)) from error
        finally:
            self._vitals.call_in(self.name, reply)
        seen(reply)
        note(reply)
        return reply

    async def close(self) -> None:
        await self._client.close()


def _prices(config: ModelsConfig) -> Prices:
    from exegete.tools.llm import load_prices

    return load_prices(Path(config.prices) if config.prices else None)
