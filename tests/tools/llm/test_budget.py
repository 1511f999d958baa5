"""Budgets in USD and tokens against a provider that keeps an account of its own: what it bills never exceeds the budget."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from exegete.tools.errors import UserError
from exegete.tools.llm import Budget, BudgetUsedUp, Limits, MemoryJournal, Message, Price, Reply, Request, Usage
from exegete.tools.llm.faults import Declined, Transient
from exegete.tools.llm.journaled import JournaledClient
from exegete.tools.llm.prices import most_input_tokens
from exegete.tools.store.journal import StoreJournal

PRICE = Price(input=10.0, output=50.0)
MOST_USD = 1.0
RUNS = 200
CLOSE_USD = 1e-9
"""Sums of the same costs in another order differ by less."""


class Provider:
    """Bills each request that arrives with random usage up to its worst case, and loses some replies on the way."""

    name = "random:model"

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.billed_usd = 0.0
        self.billed_tokens = 0
        self.answered: set[str] = set()
        self.asked_again = 0

    async def send(self, request: Request) -> Reply:
        chance = self.chance
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        if chance.random() < 0.05:
            raise Transient("HTTP 500")
        if chance.random() < 0.02:
            raise Declined("rejected", "HTTP 400")
        worst = most_input_tokens(request)
        # Often next to nothing, at times all of it: a budget that counted on the mean would be exceeded.
        share = chance.choice((0.05, 0.05, 1.0)) * chance.random() if chance.random() < 0.9 else 1.0
        usage = Usage(round(share * worst), output_tokens=round(share * request.max_tokens))
        self.billed_usd += PRICE.usd(usage)
        self.billed_tokens += usage.input_tokens + usage.output_tokens
        text = request.messages[-1].text
        self.asked_again += text in self.answered
        for _ in range(chance.randrange(6)):
            await asyncio.sleep(0)
        if chance.random() < 0.05:
            raise Transient("connection lost", sent=True)
        self.answered.add(text)
        return Reply("ok", "yes", usage=usage)

    async def close(self) -> None: ...


@contextmanager
def journal_of(path: Path) -> Iterator[StoreJournal]:
    journal = StoreJournal(path)
    try:
        yield journal
    finally:
        journal.close()


def questions(chance: random.Random, count: int) -> list[Request]:
    return [
        Request(
            (Message("user", f"{number} " + "x" * chance.randrange(4_000)),), max_tokens=chance.choice((16, 256, 2_000))
        )
        for number in range(count)
    ]


async def asked(client: JournaledClient, requests: list[Request], kill_after: int | None = None) -> list[Any]:
    """Ask all at once; where it is to be killed, drop everything as it stands after so many turns of the loop."""
    calls = [asyncio.create_task(client.complete(request)) for request in requests]
    if kill_after is None:
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        await client.close()
        return list(outcomes)
    for _ in range(kill_after):
        await asyncio.sleep(0)
    everything = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in everything:
        task.cancel()
    return list(await asyncio.gather(*everything, return_exceptions=True))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exegete.tools.llm.retrying._MOST_WAIT_S", 1e-4)


def spend(
    path: Path,
    provider: Provider,
    requests: list[Request],
    concurrency: int,
    most: dict[str, Any],
    kill: int | None = None,
) -> tuple[list[Any], Budget]:
    """Ask everything within a budget that knows what was spent before; return what came of it."""
    with journal_of(path) as journal:
        taken, unknown, largest = journal.spent_tokens("run")
        budget = Budget(**most, spent_usd=journal.spent_usd("run"), spent_tokens=taken + unknown * largest)
        client = JournaledClient(
            provider, journal=journal.of_run("run"), budget=budget, price=PRICE, limits=Limits(concurrency=concurrency)
        )
        return asyncio.run(asked(client, requests, kill)), budget


@pytest.mark.parametrize("part", range(4))
def test_what_the_provider_bills_never_exceeds_the_budget(part: int, tmp_path: Path) -> None:
    largest, killed, used_up = 0.0, 0, 0
    for number in range(part, RUNS, 4):
        chance = random.Random(number)
        provider, path = Provider(chance), tmp_path / f"{number}.sqlite"
        requests = questions(chance, 24)
        concurrency = chance.choice((1, 2, 8, 64))
        if chance.random() < 0.5:
            killed += 1
            spend(path, provider, requests, concurrency, {"max_usd": MOST_USD}, kill=chance.randrange(1, 200))
            assert provider.billed_usd <= MOST_USD + CLOSE_USD
        outcomes, _ = spend(path, provider, requests, concurrency, {"max_usd": MOST_USD})
        largest = max(largest, provider.billed_usd)
        refused = [one for one in outcomes if isinstance(one, BudgetUsedUp)]
        assert all(isinstance(one, Reply) for one in outcomes if one not in refused)
        assert provider.billed_usd <= MOST_USD + CLOSE_USD
        if refused:
            used_up += 1
            again, budget = spend(path, provider, requests, concurrency, {"max_usd": 2 * MOST_USD})
            assert sum(isinstance(one, Reply) for one in again) > len(outcomes) - len(refused)
            assert provider.billed_usd <= budget.spent_usd + CLOSE_USD and budget.spent_usd <= 2 * MOST_USD + CLOSE_USD
        assert provider.asked_again == 0
    # The budget is what ends most of them, and it is nearly used: neither a tiny bill nor a lavish limit passes for it.
    assert killed >= RUNS // 12 and used_up >= RUNS // 12 and largest > 0.9 * MOST_USD


def test_tokens_that_the_provider_counts_never_exceed_the_budget(tmp_path: Path) -> None:
    used_up = 0
    for number in range(20):
        chance = random.Random(number)
        provider = Provider(chance)
        most = {"max_usd": None, "max_tokens": 40_000}
        outcomes, budget = spend(
            tmp_path / f"{number}.sqlite", provider, questions(chance, 30), chance.choice((1, 64)), most
        )
        used_up += any(isinstance(one, BudgetUsedUp) for one in outcomes)
        assert provider.billed_tokens <= budget.spent_tokens <= 40_000 and budget.reserved_tokens == 0
    assert used_up >= 10


def told(budget: Budget, worst_usd: float, worst_tokens: int) -> str:
    with pytest.raises(BudgetUsedUp) as raised:
        asyncio.run(budget.reserve(worst_usd, worst_tokens))
    return str(raised.value)


def test_a_refusal_names_the_limit_and_the_way_on() -> None:
    both: Callable[[], Budget] = lambda: Budget(1.0, 0.25, max_tokens=1_000, spent_tokens=900)  # noqa: E731
    assert told(both(), 0.76, 0) == (
        "budget of 1 USD: 0.2500 USD are spent and the next call could exceed it; calls in flight were finished, "
        "resume with a larger --budget"
    )
    assert told(both(), 0.1, 101) == (
        "budget of 1,000 tokens: 900 tokens are spent and the next call could exceed it; calls in flight were finished, "
        "resume with a larger --budget-tokens"
    )
    asyncio.run(both().reserve(0.75, 100))


def test_tokens_wait_for_reservations_too() -> None:
    async def spend_tokens() -> None:
        budget = Budget(None, max_tokens=1_000)
        await budget.reserve(5.0, 800)
        second = asyncio.create_task(budget.reserve(5.0, 500))
        await asyncio.sleep(0)
        assert not second.done() and not budget.fits(0.0, 201) and budget.fits(0.0, 200)
        budget.settle(5.0, 1.0, 800, 100)
        await second
        budget.settle(5.0, 1.0, 500, 500)
        assert (budget.spent_tokens, budget.reserved_tokens, budget.spent_usd) == (600, 0, 2.0)
        with pytest.raises(BudgetUsedUp, match="tokens"):
            await budget.reserve(0.0, 401)

    asyncio.run(spend_tokens())


@pytest.mark.parametrize("most", [-1, float("nan"), float("inf")])
def test_bad_budgets_of_tokens(most: float) -> None:
    with pytest.raises(UserError, match=r"budget of .* tokens"):
        Budget(1.0, max_tokens=most)


def test_a_call_whose_reply_is_lost_or_not_counted_takes_its_worst_case() -> None:
    request = Request((Message("user", "x" * 100),), max_tokens=50)
    # 100 bytes, 16 for the message, 1,024 for what providers add, 50 of output.
    worst = 100 + 16 + 1_024 + 50

    class Odd(Provider):
        def __init__(self) -> None:
            super().__init__(random.Random(0))
            self.said: list[Any] = [Transient("cut", sent=True), Transient("HTTP 500"), Reply("ok", "yes")]

        async def send(self, request: Request) -> Reply:
            said = self.said.pop(0)
            if isinstance(said, Exception):
                raise said
            return said  # type: ignore[no-any-return]

    budget = Budget(None, max_tokens=10_000)
    client = JournaledClient(Odd(), journal=MemoryJournal(), budget=budget, price=None, limits=Limits())
    reply = asyncio.run(client.complete(request))
    assert reply.attempts == 3 and (budget.spent_tokens, budget.reserved_tokens) == (2 * worst, 0)
