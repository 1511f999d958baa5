"""Batch clients through the real SDKs: the whole path, limits, statuses, money, and what goes wrong on the way."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from language_model_server import Running

from exegete.tools.errors import UserError
from exegete.tools.llm import (
    BatchLimits,
    Budget,
    BudgetUsedUp,
    Limits,
    MemoryJournal,
    Message,
    Reply,
    Request,
    open_client,
    retrying,
)

from .batching import answered, batch_client, batch_spec, lines, none_twice_none_lost, questions
from .conftest import question

VALID = json.dumps({"verdicts": [1, 0, 1]})


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "_MOST_WAIT_S", 0.02)
    monkeypatch.setattr(retrying, "_MOST_PUSHBACK_WAIT_S", 0.02)


def made(server: Running) -> int:
    """Return how many batches were asked for and not refused."""
    return sum(row["route"] == "batches" and row["status"] == 200 for row in server.log())


def test_whole_path(server: Running, provider: str) -> None:
    journal, budget = MemoryJournal(), Budget(1.0)
    asked = [*questions(20), *questions(2)]
    replies = answered(batch_client(server, provider, journal, budget=budget, max_requests=8), asked)
    assert [reply.status for reply in replies] == ["ok"] * 22
    assert [reply.cached for reply in replies] == [False] * 20 + [True] * 2, "equal requests share one place"
    none_twice_none_lost(server, 20)
    assert made(server) == 3, "8 + 8 + 4"
    ids = [row["custom_id"] for row in lines(server)]
    assert (
        all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", one) for one in ids) and len({one.split("-")[0] for one in ids}) == 3
    )
    assert journal.open == {} and len(journal.replies) == 20
    # Half of 1 USD per million input tokens and 10 USD per million output tokens.
    paid = sum((r.usage.input_tokens + 10 * r.usage.output_tokens) / 2e6 for r in replies[:20])
    assert budget.spent_usd == pytest.approx(paid) == sum(reply.usd for reply in replies[:20])
    assert budget.reserved_usd == 0 and replies[0].attempts == 1 and replies[0].seconds > 0


def test_what_the_journal_knows_is_not_sent(server: Running, provider: str) -> None:
    journal = MemoryJournal()
    answered(batch_client(server, provider, journal), questions(3))
    server.reset_log()
    replies = answered(batch_client(server, provider, journal), questions(3))
    assert [(reply.status, reply.cached) for reply in replies] == [("ok", True)] * 3
    assert server.counts()["requests"] == 0


def test_batches_are_split_by_bytes(server: Running, provider: str) -> None:
    journal = MemoryJournal()
    long = Request((Message("user", "x" * 3_000),))
    replies = answered(batch_client(server, provider, journal, max_bytes=2_000), [*questions(20), long])
    assert [reply.status for reply in replies] == ["ok"] * 20 + ["rejected"]
    assert "bytes" in replies[-1].detail and "2000" in replies[-1].detail
    none_twice_none_lost(server, 20)
    server.behave(batch_max_bytes=2_000)
    assert made(server) > 2
    # The server's own limit is that of the file: what we counted is what it counts.
    replies = answered(batch_client(server, provider, MemoryJournal(), max_bytes=2_000), questions(20, first=20))
    assert {reply.status for reply in replies} == {"ok"}


def test_answers_are_repaired_in_a_later_batch(server: Running, provider: str) -> None:
    server.behave(faults=[{"kind": "not_json", "route": "batch_lines", "first": 1}])
    journal = MemoryJournal()
    (reply,) = answered(batch_client(server, provider, journal), [question()])
    assert (reply.status, reply.attempts, made(server)) == ("ok", 2, 2)
    assert isinstance(reply.parsed, dict) and set(reply.parsed) == {"verdicts"}
    assert sorted(one.status for one in journal.replies.values()) == ["ok", "unparsed"]
    server.behave(faults=[{"kind": "not_json", "route": "batch_lines"}])
    (reply,) = answered(batch_client(server, provider, MemoryJournal()), [question("Again.")])
    assert (reply.status, reply.parsed) == ("unparsed", None)


@pytest.mark.parametrize(
    ("fault", "status"),
    [("refusal", "refused"), ("max_tokens", "truncated"), ("content_filter", "filtered"), ("empty", "empty")],
)
def test_statuses(server: Running, provider: str, fault: str, status: str) -> None:
    server.behave(faults=[{"kind": fault, "route": "batch_lines"}])
    (reply,) = answered(batch_client(server, provider, MemoryJournal()), [question()])
    # Anthropic tells a filter as a refusal.
    assert reply.status == ("refused" if (provider, fault) == ("anthropic", "content_filter") else status)
    assert made(server) == 1


def test_servers_without_schemas(server: Running, provider: str) -> None:
    server.behave(answer="scripted", structured="rejected", replies=[VALID] * 3)
    client = batch_client(server, provider, MemoryJournal())
    replies = answered(client, [question(f"{n}") for n in range(3)])
    assert [reply.parsed for reply in replies] == [json.loads(VALID)] * 3
    # OpenAI's protocol has a way between: JSON without a schema.
    assert client.abilities.way == ("words" if provider == "openai" else "tool")
    assert made(server) == (3 if provider == "openai" else 2)


def test_only_what_is_missing_is_submitted_again(server: Running, provider: str) -> None:
    server.behave(batch_expires_after=8, faults=[{"kind": "500", "route": "batch_lines", "every": 4, "first": 3}])
    journal, budget = MemoryJournal(), Budget(1.0)
    replies = answered(batch_client(server, provider, journal, budget=budget, submissions=9), questions(20))
    assert {reply.status for reply in replies} == {"ok"}
    none_twice_none_lost(server, 20)
    assert made(server) > 2 and len(lines(server)) == 23, "20 questions, three of which failed once"
    assert max(reply.attempts for reply in replies) > 1
    assert budget.spent_usd == pytest.approx(sum(reply.usd for reply in replies)) and budget.reserved_usd == 0


def test_what_is_never_done_becomes_an_error(server: Running, provider: str) -> None:
    server.behave(batch_expires_after=2)
    journal, budget = MemoryJournal(), Budget(1.0)
    replies = answered(batch_client(server, provider, journal, budget=budget, submissions=2), questions(6))
    assert sorted(reply.status for reply in replies) == ["error"] * 2 + ["ok"] * 4
    (first, _) = [reply for reply in replies if reply.status == "error"]
    assert "expired" in first.detail and first.attempts == 2 and first.usd == 0
    assert made(server) == 2 and journal.open == {} and budget.reserved_usd == 0
    server.behave()
    again = answered(batch_client(server, provider, journal), questions(6))
    assert {reply.status for reply in again} == {"ok"}
    none_twice_none_lost(server, 6)


@pytest.mark.parametrize("route", ["files", "batches", "polls", "downloads"])
def test_what_passes_is_tried_again_and_no_batch_is_made_twice(server: Running, provider: str, route: str) -> None:
    kinds = ["429", "500", "html", "cut", "cut_body", "hang"]
    server.behave(faults=[{"kind": kind, "route": route, "first": 1, "seconds": 0.1} for kind in kinds])
    journal = MemoryJournal()
    limits = Limits(attempts=8, total_s=5.0)
    replies = answered(batch_client(server, provider, journal, limits=limits), questions(4))
    assert {reply.status for reply in replies} == {"ok"}, replies[0].detail
    struck = set(server.counts()["by_fault"])
    # A batch that was made behind a cut connection is found, and not made again; Anthropic has no files.
    lasting = {"files": set() if provider == "anthropic" else set(kinds), "batches": set(kinds[:5])}
    assert struck == lasting.get(route, set(kinds))
    none_twice_none_lost(server, 4)
    assert len(lines(server)) == 4 and journal.open == {}


@pytest.mark.parametrize("kind", ["500", "html", "cut", "cut_body", "hang"])
def test_a_lost_batch_is_looked_for_before_it_is_made_again(server: Running, provider: str, kind: str) -> None:
    server.behave(faults=[{"kind": kind, "route": "batches", "first": 1, "seconds": 0.1}])
    journal = MemoryJournal()
    replies = answered(batch_client(server, provider, journal), questions(4))
    assert {reply.status for reply in replies} == {"ok"}
    route = "/v1/batches" if provider == "openai" else "/v1/messages/batches"
    calls = [row["route"] for row in server.log() if row["path"] == route]
    # Looked for at once; where it is not there, again after a while, and only then made.
    assert calls == (["batches", "polls"] if kind == "cut_body" else ["batches", "polls", "polls", "batches"])
    none_twice_none_lost(server, 4)


def test_a_provider_that_falls_silent_is_left_with_the_batch(server: Running, provider: str) -> None:
    server.behave(faults=[{"kind": "500", "route": "polls"}])
    journal, budget = MemoryJournal(), Budget(1.0)
    limits = Limits(attempts=1)

    async def ask() -> list[Reply]:
        client = batch_client(server, provider, journal, budget=budget, limits=limits, outage_s=0.1)
        replies = await asyncio.gather(*map(client.complete, questions(3)))
        again = await client.complete(questions(1)[0])
        await client.close()
        return [*replies, again]

    replies = asyncio.run(ask())
    assert [reply.status for reply in replies] == ["error"] * 4 and "resumed" in replies[0].detail
    assert len(journal.open) == 1 and budget.spent_usd > 0, "they may have been billed"
    server.behave()
    replies = answered(batch_client(server, provider, journal), questions(3))
    assert {reply.status for reply in replies} == {"ok"} and journal.open == {}
    none_twice_none_lost(server, 3)


def test_a_batch_that_cannot_be_made(server: Running, provider: str) -> None:
    server.behave(faults=[{"kind": "500", "route": "batches"}])
    journal, budget = MemoryJournal(), Budget(1.0)
    limits = Limits(attempts=2, total_s=5.0)
    replies = answered(batch_client(server, provider, journal, budget=budget, limits=limits), questions(2))
    assert [reply.status for reply in replies] == ["error"] * 2 and "HTTP 500" in replies[0].detail
    assert journal.open == {} and (budget.spent_usd, budget.reserved_usd) == (0, 0)


@pytest.mark.parametrize(("kind", "told"), [("401", "API_KEY"), ("quota", "quota")])
def test_what_the_user_must_mend(server: Running, provider: str, kind: str, told: str) -> None:
    server.behave(faults=[{"kind": kind, "route": "any"}])
    journal, budget = MemoryJournal(), Budget(1.0)
    with pytest.raises(UserError, match=told):
        answered(batch_client(server, provider, journal, budget=budget), questions(2))
    assert journal.open == {} and budget.reserved_usd == 0 and journal.replies == {}


def test_a_model_that_does_not_exist(running: Running, provider: str) -> None:
    running.reset()
    journal = MemoryJournal()
    with pytest.raises(UserError, match="does not exist"):
        answered(batch_client(running, provider, journal), questions(2))
    assert journal.open == {}, "nothing comes of it: a resumed run need not look at it"


def test_a_queue_without_room(server: Running) -> None:
    server.behave(batch_fails="Enqueued token limit reached for model in organization org-1.")
    client = batch_client(server, "openai", MemoryJournal(), full_s=0.3)

    async def ask() -> list[Reply]:
        asking = [asyncio.ensure_future(client.complete(one)) for one in questions(5)]
        while not made(server):
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.15)
        server.behave(batch_max_requests=2)
        try:
            return list(await asyncio.gather(*asking))
        finally:
            await client.close()

    assert {reply.status for reply in asyncio.run(ask())} == {"ok"}
    none_twice_none_lost(server, 5)
    assert made(server) == 4, "all five, then two, two and one"


def test_a_batch_that_is_rejected_as_a_whole(server: Running) -> None:
    server.behave(batch_fails="The batch is not to our taste.")
    journal = MemoryJournal()
    with pytest.raises(UserError, match="not to our taste"):
        answered(batch_client(server, "openai", journal), questions(2))
    assert journal.open == {}


def test_a_budget_splits_and_ends(server: Running, provider: str) -> None:
    asked = questions(6, max_tokens=1)
    probe = MemoryJournal()
    answered(batch_client(server, provider, probe), questions(1, first=99, max_tokens=1))
    ((_, worst),) = probe.intents.values()
    server.reset_log()
    # Room for two and a half: two go, and when they turn out to cost less, the others, two by two.
    budget = Budget(2.5 * worst)
    replies = answered(batch_client(server, provider, MemoryJournal(), budget=budget), asked)
    assert {reply.status for reply in replies} == {"truncated"}
    assert made(server) == 3 and budget.spent_usd <= budget.max_usd
    with pytest.raises(BudgetUsedUp):
        answered(batch_client(server, provider, MemoryJournal(), budget=Budget(0.5 * worst)), asked)


def test_gathering_ends_though_calls_keep_coming(server: Running, provider: str) -> None:
    async def ask() -> Reply:
        client = batch_client(server, provider, MemoryJournal(), linger_s=0.3, gather_s=0.4)
        first = asyncio.ensure_future(client.complete(questions(1)[0]))
        others = []
        for one in questions(1_000, first=1):
            others.append(asyncio.ensure_future(client.complete(one)))
            await asyncio.sleep(0.02)
            if first.done():
                break
        await client.close()
        await asyncio.gather(*others, return_exceptions=True)
        return first.result()

    assert asyncio.run(ask()).status == "ok"


def test_callers_that_go_away_leave_their_call(server: Running, provider: str) -> None:
    async def ask() -> Reply:
        client = batch_client(server, provider, MemoryJournal())
        (one,) = questions(1)
        gone = asyncio.ensure_future(client.complete(one))
        await asyncio.sleep(0)
        stays = asyncio.ensure_future(client.complete(one))
        await asyncio.sleep(0.01)
        gone.cancel()
        try:
            return await stays
        finally:
            await client.close()

    assert asyncio.run(ask()).status == "ok"
    none_twice_none_lost(server, 1)


class _Plain:
    async def known(self, call: str) -> Reply | None:
        return None

    async def intend(self, call: str, model: str, worst_usd: float) -> None: ...

    async def answered(self, call: str, reply: Reply) -> None: ...


def test_bad_openings(server: Running, provider: str) -> None:
    with pytest.raises(UserError, match="cannot remember batches"):
        open_client(batch_spec(server, provider), journal=_Plain())
    for wrong in ({"poll_s": 0.0}, {"max_requests": 0}, {"submissions": -1}, {"linger_s": float("nan")}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            BatchLimits(**wrong)
    client = batch_client(server, provider, MemoryJournal())
    with pytest.raises(ValueError, match="expected system messages first"):
        answered(client, [Request((Message("assistant", "x"),))])
    half: Any = Request((Message("user", "\ud83d"),))
    assert answered(batch_client(server, provider, MemoryJournal()), [half])[0].status == "rejected"
