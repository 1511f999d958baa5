"""Batches of a process that ended: taken up again, none made twice, no reply lost."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from language_model_server import Running
from language_model_server.clients import anthropic_client

from exegete.tools.errors import UserError
from exegete.tools.llm import Budget, Limits, MemoryJournal, retrying
from exegete.tools.llm.batch_wire import custom_id, new_nonce

from .batching import Killed, answered, batch_client, batch_spec, killed, lines, none_twice_none_lost, questions
from .conftest import question


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "_MOST_WAIT_S", 0.02)


def finish(server: Running, provider: str, journal: MemoryJournal, **options: Any) -> None:
    """Ask one call that is known, so that the client begins its work, and wait until every batch has landed."""

    async def ask() -> None:
        client = batch_client(server, provider, journal, **options)
        asking = asyncio.ensure_future(client.complete(questions(1)[0]))
        until = time.monotonic() + 20
        while journal.open and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await asking
        await client.close()

    asyncio.run(ask())
    assert journal.open == {}


@pytest.mark.parametrize("at", ["submitted", "after", "answered"])
@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_killed_and_taken_up(server: Running, provider: str, at: str, seconds: float) -> None:
    """Between making a batch and storing its id; after storing it; while its replies are written down."""
    server.behave(batch_s=seconds)
    journal = Killed(at)
    killed(batch_client(server, provider, journal, max_requests=8), journal, questions(20))
    assert len(journal.open) >= 1 and len(journal.replies) <= 3
    assert any(one.batch for one in journal.open.values()) == (at != "submitted")
    budget = Budget(1.0)
    replies = answered(batch_client(server, provider, journal, budget=budget), questions(20))
    assert {reply.status for reply in replies} == {"ok"} and journal.open == {}
    none_twice_none_lost(server, 20)
    assert len(lines(server)) == 20
    taken_up = [reply for reply in replies if not reply.cached]
    assert budget.spent_usd == pytest.approx(sum(reply.usd for reply in taken_up)) and budget.reserved_usd == 0


def test_replies_that_nobody_awaits_are_written_down(server: Running, provider: str) -> None:
    journal = Killed("submitted")
    killed(batch_client(server, provider, journal), journal, questions(12))
    finish(server, provider, journal)
    assert len(journal.replies) == 12 and {reply.status for reply in journal.replies.values()} == {"ok"}
    none_twice_none_lost(server, 12)


def test_closed_and_taken_up(server: Running, provider: str) -> None:
    server.behave(batch_s=0.5)
    journal = MemoryJournal()

    async def begin() -> None:
        client = batch_client(server, provider, journal)
        asking = [asyncio.ensure_future(client.complete(one)) for one in questions(5)]
        while not any(one.batch for one in journal.open.values()):
            await asyncio.sleep(0.02)
        await client.close()
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        with pytest.raises(RuntimeError, match="closed"):
            await client.complete(questions(1, first=9)[0])

    asyncio.run(begin())
    assert journal.replies == {}
    assert {reply.status for reply in answered(batch_client(server, provider, journal), questions(5))} == {"ok"}
    none_twice_none_lost(server, 5)


def test_closed_while_gathering_leaves_nothing(server: Running, provider: str, tmp_path: Path) -> None:
    journal, budget = MemoryJournal(), Budget(1.0)

    async def begin() -> None:
        client = batch_client(server, provider, journal, budget=budget, linger_s=60.0, scratch=tmp_path)
        asking = asyncio.ensure_future(client.complete(questions(1)[0]))
        while budget.reserved_usd == 0:
            await asyncio.sleep(0.01)
        assert len(list(tmp_path.iterdir())) == 1
        await client.close()
        await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(begin())
    assert (budget.reserved_usd, budget.spent_usd, journal.open, journal.intents) == (0, 0, {}, {})
    assert list(tmp_path.iterdir()) == [] and server.counts()["requests"] == 0


def written_down(server: Running, provider: str, journal: MemoryJournal, count: int) -> str:
    """Write a batch down as a process does that is killed before it sends it; return its nonce."""
    nonce = new_nonce()
    name = batch_spec(server, provider)
    asyncio.run(journal.submitting(nonce, name, {one.id(name): 0.001 for one in questions(count)}))
    return nonce


def test_a_batch_that_was_never_made_is_made(server: Running, provider: str) -> None:
    journal = MemoryJournal()
    written_down(server, provider, journal, 4)
    replies = answered(batch_client(server, provider, journal), questions(4))
    assert {reply.status for reply in replies} == {"ok"} and journal.open == {}
    none_twice_none_lost(server, 4)


def test_a_budget_sets_aside_what_an_earlier_process_sent(server: Running, provider: str) -> None:
    server.behave(batch_s=0.3)
    journal = Killed("submitted")
    paying = batch_client(server, provider, journal, budget=Budget(1.0))
    killed(paying, journal, questions(4))
    ((worst, _),) = [(one.worst_usd, one) for one in journal.open.values()]
    assert worst > 0

    async def ask() -> tuple[float, Budget]:
        budget = Budget(1.0)
        client = batch_client(server, provider, journal, budget=budget)
        asking = asyncio.ensure_future(client.complete(questions(1)[0]))
        while budget.reserved_usd == 0:
            await asyncio.sleep(0.01)
        during = budget.reserved_usd
        await asking
        while journal.open:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0)
        await client.close()
        return during, budget

    during, budget = asyncio.run(ask())
    assert during == pytest.approx(worst)
    assert budget.reserved_usd == 0
    paid = sum(reply.usd for reply in journal.replies.values())
    assert paid > 0 and budget.spent_usd == pytest.approx(paid)


def test_a_stranger_in_progress_is_waited_for(server: Running) -> None:
    """Anthropic's batches show whose they are only when they have ended: none of ours is made before that is known."""
    server.behave("slow", batch_s=0.6)
    journal = MemoryJournal()

    async def strange(count: int) -> None:
        async with anthropic_client(server) as client:
            params: Any = {"model": "slow", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
            await client.messages.batches.create(
                requests=[{"custom_id": f"stranger-{n}", "params": params} for n in range(count)]
            )

    written_down(server, "anthropic", journal, 4)
    asyncio.run(strange(3))
    asyncio.run(strange(4))
    replies = answered(batch_client(server, "anthropic", journal), questions(4))
    assert {reply.status for reply in replies} == {"ok"}
    entries = server.log()
    ours = [row["at"] for row in entries if row["route"] == "batches"][-1]
    strangers = [row["at"] for row in entries if row["custom_id"].startswith("stranger-")]
    assert len(strangers) == 7 and ours > max(strangers)
    looked_at = [row for row in entries if row["route"] == "downloads" and row["at"] < ours]
    assert len(looked_at) == 1, "the one with another number of requests cannot be ours, and one look is enough"


def test_a_batch_that_the_provider_does_not_have(server: Running, provider: str) -> None:
    journal = Killed("after")
    killed(batch_client(server, provider, journal), journal, questions(3))
    server.reset()
    server.behave()
    with pytest.raises(UserError, match=r"does not have batch .* account"):
        answered(batch_client(server, provider, journal), questions(3))
    assert server.counts()["questions"] == 0 and len(journal.open) == 1
    replies = answered(batch_client(server, provider, journal, forsake=True), questions(3))
    assert {reply.status for reply in replies} == {"ok"} and journal.open == {}


def test_a_list_that_cannot_be_read_leaves_it_open(server: Running, provider: str) -> None:
    journal = Killed("submitted")
    killed(batch_client(server, provider, journal), journal, questions(3))
    server.behave(faults=[{"kind": "html", "route": "polls"}])
    replies = answered(batch_client(server, provider, journal, limits=Limits(attempts=2)), questions(3))
    assert [reply.status for reply in replies] == ["error"] * 3 and len(journal.open) == 1
    server.behave()
    assert {reply.status for reply in answered(batch_client(server, provider, journal), questions(3))} == {"ok"}
    none_twice_none_lost(server, 3)


def test_answers_that_fit_no_schema_are_repaired_after_a_restart(server: Running, provider: str) -> None:
    server.behave(faults=[{"kind": "not_json", "route": "batch_lines", "first": 1}])
    journal = Killed("submitted")
    killed(batch_client(server, provider, journal), journal, [question()])
    finish(server, provider, journal)
    (reply,) = answered(batch_client(server, provider, journal), [question()])
    assert reply.status == "ok" and isinstance(reply.parsed, dict), "read by a process that did not know the schema"
    assert server.counts()["asked_again"] == 0


def test_request_ids() -> None:
    nonce, call = new_nonce(), questions(1)[0].id("m")
    name = custom_id(nonce, call)
    assert len(name) == 61 and name.startswith(f"{nonce}-") and call.removeprefix("sha256:").startswith(name[21:])
    assert int(nonce[:8], 16) == pytest.approx(time.time(), abs=5) and new_nonce() != nonce


_PROGRAM = """
import asyncio, os, signal, sys
from pathlib import Path
from exegete.tools.llm import BatchLimits, Message, Request, load_prices, open_client
from exegete.tools.store import Store
from exegete.tools.store.journal import RunJournal

folder, spec, point = sys.argv[1:]
if point != "none":
    async def killed(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(RunJournal, point, killed)
with Store.create_or_open(Path(folder)).writer() as writer:
    async def ask():
        quick = BatchLimits(max_requests=30, linger_s=0.1, poll_s=0.05, settle_s=0.2)
        client = open_client(spec, journal=writer.journal.of_run("run"), batches=quick)
        requests = [Request((Message("user", f"question {n}"),)) for n in range(100)]
        replies = await asyncio.gather(*map(client.complete, requests))
        await client.close()
        return {reply.status for reply in replies}
    print(asyncio.run(ask()))
"""


def test_sigkill_with_the_journal_of_the_store(server: Running, tmp_path: Path) -> None:
    """With the provider whose list shows least; processes take long to start."""

    def program(point: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _PROGRAM, str(tmp_path / "store"), batch_spec(server, "anthropic"), point]
        return subprocess.run(command, capture_output=True, text=True, timeout=100)

    assert program("submitted").returncode == -signal.SIGKILL
    last = program("none")
    assert (last.returncode, last.stdout.strip()) == (0, "{'ok'}"), last.stderr
    none_twice_none_lost(server, 100)
    assert len(lines(server)) == 100
