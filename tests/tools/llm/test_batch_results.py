"""What comes back from a batch: broken and short files, what was not done, queues that are full, journals that fail."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from exegete.tools.errors import UserError
from exegete.tools.llm import Budget, MemoryJournal, Reply, retrying
from exegete.tools.llm.batch_wire import State, new_nonce
from exegete.tools.llm.faults import Transient
from exegete.tools.llm.wire import Abilities

from .batch_results import Counting, Fake, all_ok, client_of, first_of, rows
from .batching import answered, questions


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "_MOST_WAIT_S", 0.01)


def test_a_broken_file_is_fetched_again_and_nothing_of_it_read_twice() -> None:
    broken = [lambda names: all_ok(names[:2]) + b"<html>", lambda names: all_ok(names)[:-9], all_ok]
    wire, journal = Fake(*broken), Counting()
    replies = answered(client_of(wire, journal), questions(5))
    assert [reply.status for reply in replies] == ["ok"] * 5 and len(wire.made) == 1
    # In pieces of 200 rows: of the broken ones nothing was read.
    assert sorted(journal.told) == sorted(journal.replies) and len(journal.told) == 5


def test_a_file_that_stays_short_leaves_the_batch_open() -> None:
    wire, journal, budget = Fake(*[first_of(3)] * 9, rows=5), Counting(), Budget(1.0)
    replies = answered(client_of(wire, journal, budget), questions(5))
    assert sorted(reply.status for reply in replies) == ["error"] * 2 + ["ok"] * 3
    assert len(wire.made) == 1 and len(journal.open) == 1 and len(journal.told) == 3
    worst = next(iter(journal.intents.values()))[1]
    # What was answered, and the worst case of what may have been: 10 and 5 tokens a reply, at half the price.
    assert budget.spent_usd == pytest.approx(3 * 30e-6 + 2 * worst) and budget.reserved_usd == 0


def test_a_request_without_a_result_is_asked_again_and_counts_as_perhaps_paid() -> None:
    wire, journal = Fake(first_of(3), first_of(1)), Counting()
    replies = answered(client_of(wire, journal, submissions=2), questions(5))
    assert sorted(reply.status for reply in replies) == ["error"] + ["ok"] * 4
    assert [len(names) for names in wire.made] == [5, 2] and journal.undone == []
    assert [reply.detail for reply in replies if reply.status == "error"] == ["the batch holds no result"]


def test_what_was_not_done_is_told_to_the_journal_as_not_paid() -> None:
    wire, journal = Fake(rows("late", "yes")), Counting()
    replies = answered(client_of(wire, journal), questions(3))
    assert {reply.status for reply in replies} == {"ok"} and [len(names) for names in wire.made] == [3, 1]
    assert journal.undone == [questions(1)[0].id(wire.name)]


def test_an_answer_that_cannot_be_read_may_have_been_paid() -> None:
    wire, journal, budget = Fake(rows("broken", "yes")), Counting(), Budget(1.0)
    replies = answered(client_of(wire, journal, budget), questions(2))
    assert [reply.status for reply in replies] == ["error", "ok"] and len(wire.made) == 1
    (lost,) = [call for call in journal.intents if "/lost-" in call]
    worst = journal.intents[lost][1]
    assert worst > 0 and budget.spent_usd == pytest.approx(worst + 30e-6) and replies[0].usd == 0


def test_what_the_provider_declines_is_a_reply() -> None:
    wire, journal = Fake(rows("declined", "malformed", "yes")), Counting()
    replies = answered(client_of(wire, journal), questions(3))
    assert [reply.status for reply in replies] == ["filtered", "rejected", "ok"]
    assert [reply.usd for reply in replies] == [0, 0, pytest.approx(30e-6)] and len(journal.replies) == 3


@pytest.mark.parametrize(("said", "told"), [(("key", "yes"), "no such key"), (("malformed",), "rejects the request")])
def test_what_no_request_gets_past_stops_the_client(said: tuple[str, ...], told: str) -> None:
    wire, journal, budget = Fake(rows(*said)), Counting(), Budget(1.0)

    async def ask() -> list[Any]:
        client = client_of(wire, journal, budget)
        first = await asyncio.gather(*map(client.complete, questions(3)), return_exceptions=True)
        second = await asyncio.gather(*map(client.complete, questions(1, first=9)), return_exceptions=True)
        await client.close()
        return [*first, *second]

    outcomes = asyncio.run(ask())
    assert isinstance(outcomes[0], UserError) and told in str(outcomes[0])
    assert isinstance(outcomes[-1], UserError) and told in str(outcomes[-1])
    # What was answered beside it was paid for, and is a reply.
    assert [isinstance(one, Reply) for one in outcomes[1:3]] == [len(said) == 2] * 2
    assert journal.open == {} and len(wire.made) == 1 and budget.reserved_usd == 0


def test_batches_side_by_side_teach_once() -> None:
    wire = Fake(rows("lacking"), rows("lacking"))
    wire.abilities = Abilities(("json_schema", "json_object", "words"))
    replies = answered(client_of(wire, Counting(), max_requests=2), questions(4))
    assert {reply.status for reply in replies} == {"ok"} and wire.abilities.way == "json_object"
    assert [len(names) for names in wire.made] == [2, 2, 2, 2]


class Full(Fake):
    """A provider whose queue takes batches up to a size."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    async def state(self, batch: str) -> State:
        full = len(self.made[int(batch)]) > self.room
        return State(True, rejected=Transient("enqueued token limit", pushback=True) if full else None)


def test_a_queue_that_takes_less_is_given_less() -> None:
    wire, budget = Full(2), Budget(1.0)
    replies = answered(client_of(wire, Counting(), budget, max_requests=8, full_s=0.02), questions(16))
    assert {reply.status for reply in replies} == {"ok"} and {reply.attempts for reply in replies} == {1}
    sizes = [len(names) for names in wire.made]
    assert sizes[:2] == [8, 8] and sum(size for size in sizes if size <= 2) == 16 and max(sizes[-8:]) == 2
    assert budget.reserved_usd == 0 and budget.spent_usd == pytest.approx(16 * 30e-6)
    with pytest.raises(UserError, match="no room for one request"):
        answered(client_of(Full(0), Counting(), full_s=0.02), questions(2))


class Slow(MemoryJournal):
    """A journal that takes its time with every answer but the first few."""

    def __init__(self, quick: int) -> None:
        super().__init__()
        self.quick = quick

    async def known(self, call: str) -> Reply | None:
        self.quick -= 1
        await asyncio.sleep(0.3 if self.quick < 0 else 0)
        return await super().known(call)


def test_a_call_that_is_looked_up_while_its_batch_lands_is_sent_once() -> None:
    wire, journal = Fake(), Slow(quick=4)
    calls = {one.id(wire.name): 0.001 for one in questions(4)}
    asyncio.run(journal.submitting(new_nonce(), wire.name, calls))
    # The batch was never made, which is known after 0.1 s, before the journal has said that there are no replies.
    replies = answered(client_of(wire, journal, linger_s=0.5), questions(4))
    assert {reply.status for reply in replies} == {"ok"} and journal.open == {}
    assert [len(names) for names in wire.made] == [4] and len(set(wire.made[0])) == 4


def test_a_reply_is_used_once_it_is_written_down() -> None:
    class Holding(MemoryJournal):
        def __init__(self) -> None:
            super().__init__()
            self.held = asyncio.Event()
            self.release = asyncio.Event()

        async def answered(self, call: str, reply: Reply) -> None:
            self.held.set()
            await self.release.wait()
            await super().answered(call, reply)

    async def ask() -> tuple[bool, str]:
        journal = Holding()
        client = client_of(Fake(), journal)
        asking = asyncio.ensure_future(client.complete(questions(1)[0]))
        await journal.held.wait()
        await asyncio.sleep(0.05)
        early = asking.done()
        journal.release.set()
        reply = await asking
        await client.close()
        return early, reply.status

    assert asyncio.run(ask()) == (False, "ok")


def test_a_batch_that_is_being_made_gets_its_id_before_the_client_closes() -> None:
    class Making(Fake):
        async def create(self, prepared: str, nonce: str) -> str:
            name = await super().create(prepared, nonce)
            await asyncio.sleep(0.2)
            return name

    async def ask() -> MemoryJournal:
        wire, journal = Making(), MemoryJournal()
        client = client_of(wire, journal)
        asking = asyncio.ensure_future(client.complete(questions(1)[0]))
        while not wire.made:
            await asyncio.sleep(0.01)
        await client.close()
        assert (await asyncio.gather(asking, return_exceptions=True))[0].__class__ is asyncio.CancelledError
        return journal

    assert [one.batch for one in asyncio.run(ask()).open.values()] == ["0"]


@pytest.mark.parametrize("failing", ["submitting", "answered"])
def test_a_journal_that_fails_stops_everything(failing: str) -> None:
    wire, journal = Fake(), Counting(failing)
    with pytest.raises(UserError, match="disk is full"):
        answered(client_of(wire, journal), questions(3))
    assert len(wire.made) == (failing == "answered"), "nothing is sent that is not written down"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    budget = Budget(1.0)
    with pytest.raises(UserError, match="cannot be written"):
        answered(client_of(Fake(), Counting(), budget, scratch=tmp_path / "none"), questions(2))
    assert budget.reserved_usd == 0
