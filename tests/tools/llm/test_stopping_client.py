"""A run that is asked to stop while its server is away: calls are given up after a while, and stand as missing."""

from __future__ import annotations

import asyncio

from exegete.agent.interrupts import lasting
from exegete.tools.llm import Limits, MemoryJournal, Message, Reply, Request
from exegete.tools.llm.faults import Transient
from exegete.tools.llm.journaled import JournaledClient


class Away:
    """A server that refuses every connection."""

    name = "openai:away"

    def __init__(self) -> None:
        self.sent = 0

    async def send(self, request: Request) -> Reply:
        self.sent += 1
        raise Transient("connection refused", sent=False)

    async def close(self) -> None:
        pass


def test_a_failing_call_is_not_sent_again_once_the_run_is_stopping() -> None:
    wire, journal = Away(), MemoryJournal()
    limits = Limits(attempts=50, patience_s=3_600.0)
    client = JournaledClient(
        wire, journal=journal, budget=None, price=None, limits=limits, stopping=lambda: wire.sent >= 2
    )
    reply = asyncio.run(client.complete(Request((Message("user", "?"),))))
    assert (reply.status, wire.sent) == ("error", 2)


def test_a_drain_has_its_time_first() -> None:
    asked, now = False, 100.0
    lasts = lasting(lambda: asked, 60.0, lambda: now)
    assert not lasts()
    asked = True
    assert not lasts()
    now = 159.0
    assert not lasts()
    now = 160.0
    assert lasts()
