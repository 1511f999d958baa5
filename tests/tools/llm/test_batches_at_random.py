"""Processes that are killed anywhere, on a server that fails anywhere: after the last one no call was paid twice, none lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest
from language_model_server import Running

from exegete.tools.llm import Budget, Limits, MemoryJournal, Reply, Request, retrying

from .batching import answered, batch_client, none_twice_none_lost, questions

SEEDS = range(5)


class Mortal(MemoryJournal):
    """A journal whose process ends at its `left`-th step, before or after writing; writing takes a moment."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.chance = chance
        self.left = 0
        self.dead = asyncio.Event()

    async def _step(self) -> None:
        await asyncio.sleep(self.chance.random() * 0.01)
        self.left -= 1
        if self.left == 0:
            self.dead.set()
        if self.dead.is_set():
            await asyncio.Event().wait()

    async def submitting(self, nonce: str, model: str, calls: Mapping[str, float]) -> None:
        await self._step()
        await super().submitting(nonce, model, calls)
        await self._step()

    async def submitted(self, nonce: str, batch: str) -> None:
        await self._step()
        await super().submitted(nonce, batch)
        await self._step()

    async def answered(self, call: str, reply: Reply) -> None:
        await self._step()
        await super().answered(call, reply)

    async def landed(self, nonce: str, undone: Collection[str] = ()) -> None:
        await self._step()
        await super().landed(nonce, undone)
        await self._step()


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_anywhere(server: Running, provider: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "_MOST_WAIT_S", 0.02)
    monkeypatch.setattr(retrying, "_MOST_PUSHBACK_WAIT_S", 0.02)
    chance = random.Random(seed)
    journal, asked = Mortal(chance), questions(20)
    for _ in range(3):
        server.behave(
            faults=[_fault(chance) for _ in range(2)],
            batch_s=chance.choice([0.0, 0.1]),
            batch_expires_after=chance.choice([None, 4]),
        )
        journal.left, journal.dead = chance.randint(1, 20), asyncio.Event()
        asyncio.run(_until_death(server, provider, journal, asked[: chance.choice([10, 20])]))
    server.behave()
    journal.left, journal.dead = -1, asyncio.Event()
    budget = Budget(1.0)
    replies = answered(batch_client(server, provider, journal, budget=budget, settle_s=0.05), asked)
    assert {reply.status for reply in replies} == {"ok"}
    none_twice_none_lost(server, 20)
    # What is still open holds replies only, and was just not declared landed before the client closed.
    assert all(call in journal.replies for one in journal.open.values() for call in one.calls)


def _fault(chance: random.Random) -> dict[str, object]:
    route = chance.choice(["files", "batches", "polls", "downloads", "batch_lines"])
    kind = chance.choice(["429", "500"] if route == "batch_lines" else ["429", "500", "html", "cut", "cut_body"])
    return {"kind": kind, "route": route, "first": chance.randint(1, 2)}


async def _until_death(server: Running, provider: str, journal: Mortal, asked: Sequence[Request]) -> None:
    quick: dict[str, Any] = {"settle_s": 0.05, "submissions": 9, "max_requests": journal.chance.choice([3, 7, 50])}
    client = batch_client(server, provider, journal, limits=Limits(total_s=5.0, attempts=9), **quick)
    replies: asyncio.Future[Any] = asyncio.gather(*map(client.complete, asked), return_exceptions=True)
    dead: asyncio.Future[Any] = asyncio.ensure_future(journal.dead.wait())
    await asyncio.wait([replies, dead], return_when=asyncio.FIRST_COMPLETED, timeout=20)
    assert replies.done() or dead.done(), "it hangs"
