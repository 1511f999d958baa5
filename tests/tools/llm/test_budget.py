"""Budgets in USD and tokens against a provider that keeps an account of its own: what it bills never exceeds the budget."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from exegete.tools.errors import UserError
from exegete.tools.llm import (
    BatchLimits,
    Budget,
    BudgetUsedUp,
    Limits,
    MemoryJournal,
    Message,
    Price,
    Reply,
    Request,
    Usage,
)
from exegete.tools.llm.batch_wire import Frame, Result, Sighting, State, outcome
from exegete.tools.llm.batches import BatchClient
from exegete.tools.llm.faults import Declined, Transient
from exegete.tools.llm.journaled import JournaledClient
from exegete.tools.llm.prices import most_input_tokens
from exegete.tools.llm.wire import Abilities
from exegete.tools.store.journal import StoreJournal

from .batching import QUICK

PRICE = Price(input=20.0, output=100.0)
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
    assert killed >= RUNS // 12 and used_up >= RUNS // 16 and largest > 0.8 * MOST_USD, (killed, used_up, largest)


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


class BatchProvider:
    """Bills each request of a batch with random usage when the batch is made; leaves some out, and loses some results."""

    name = "random-batch:model"
    max_requests = 8
    max_bytes = 1_000_000
    frame = Frame(b"", b"\n", b"\n")

    def __init__(self, chance: random.Random) -> None:
        self.abilities = Abilities(("json_schema",))
        self.chance = chance
        self.billed_usd = 0.0
        self.results: list[bytes] = []
        self.nonces: dict[str, str] = {}
        self._worst: dict[str, Usage] = {}

    def line(self, custom_id: str, request: Request) -> bytes:
        self._worst[custom_id] = Usage(most_input_tokens(request), output_tokens=request.max_tokens)
        return custom_id.encode()

    async def prepare(self, file: Path) -> str:
        return file.read_text()

    async def create(self, prepared: str, nonce: str) -> str:
        lines = []
        for name in prepared.split():
            drawn = self.chance.random()
            share = 1.0 if drawn > 0.9 else drawn
            usage = Usage(
                round(share * self._worst[name].input_tokens),
                output_tokens=round(share * self._worst[name].output_tokens),
            )
            said = self.chance.choice(("yes",) * 12 + ("late", "broken", "left out"))
            if said != "late":
                self.billed_usd += PRICE.usd(usage, batch=True)
            row = {"custom_id": name, "said": said, "in": usage.input_tokens, "out": usage.output_tokens}
            if said != "left out":
                lines.append(json.dumps(row).encode() + b"\n")
        self.results.append(b"".join(lines))
        batch = str(len(self.results) - 1)
        self.nonces[nonce] = batch
        for _ in range(self.chance.randrange(4)):
            await asyncio.sleep(0)
        return batch

    async def find(self, nonce: str, requests: int) -> Sighting:
        return Sighting(self.nonces.get(nonce))

    def know(self, batch: str, nonce: str) -> None: ...

    async def state(self, batch: str) -> State:
        return State(True, 0)

    async def fetch(self, batch: str, file: BinaryIO) -> None:
        file.write(self.results[int(batch)])

    def result(self, row: dict[str, Any]) -> Result:
        def read() -> Reply:
            if row["said"] == "late":
                raise Transient("not done: expired")
            if row["said"] == "broken":
                raise Transient("broken reply", sent=True)
            return Reply("ok", "yes", usage=Usage(row["in"], output_tokens=row["out"]))

        return outcome(row["custom_id"], read)

    async def close(self) -> None: ...


async def asked_in_batches(client: BatchClient, requests: list[Request], kill_after: int | None) -> list[Any]:
    calls = [asyncio.create_task(client.complete(request)) for request in requests]
    if kill_after is None:
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        await client.close()
        return list(outcomes)
    await asyncio.sleep(kill_after / 1_000)
    everything = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in everything:
        task.cancel()
    return list(await asyncio.gather(*everything, return_exceptions=True))


def spend_in_batches(
    folder: Path, provider: BatchProvider, requests: list[Request], max_usd: float, kill: int | None = None
) -> tuple[list[Any], Budget]:
    with journal_of(folder / "journal.sqlite") as journal:
        budget = Budget(max_usd, journal.spent_usd("run"))
        client = BatchClient(
            provider,
            journal=journal.of_run("run"),
            budget=budget,
            price=PRICE,
            limits=Limits(attempts=2),
            batches=BatchLimits(**QUICK, scratch=folder),
        )
        return asyncio.run(asked_in_batches(client, requests, kill)), budget


def test_what_is_billed_for_batches_never_exceeds_the_budget(tmp_path: Path) -> None:
    used_up, largest = 0, 0.0
    for number in range(16):
        chance = random.Random(number)
        provider, folder = BatchProvider(chance), tmp_path / str(number)
        folder.mkdir()
        requests = questions(chance, 60)
        if number % 2:
            spend_in_batches(folder, provider, requests, MOST_USD, kill=chance.randrange(1, 150))
            assert provider.billed_usd <= MOST_USD + CLOSE_USD
        outcomes, budget = spend_in_batches(folder, provider, requests, MOST_USD)
        largest = max(largest, provider.billed_usd)
        assert provider.billed_usd <= MOST_USD + CLOSE_USD
        assert provider.billed_usd <= budget.spent_usd + budget.reserved_usd + CLOSE_USD
        if any(isinstance(one, BudgetUsedUp) for one in outcomes):
            used_up += 1
            answers = sum(isinstance(one, Reply) and one.status == "ok" for one in outcomes)
            again, _ = spend_in_batches(folder, provider, requests, 2 * MOST_USD)
            assert sum(isinstance(one, Reply) and one.status == "ok" for one in again) > answers
            assert provider.billed_usd <= 2 * MOST_USD + CLOSE_USD
    assert used_up >= 8 and largest > 0.8 * MOST_USD
