"""What the tests of batch clients share: clients with short waits, journals that outlive them, a process that is killed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from language_model_server import Running

from exegete.tools.llm import (
    BatchLimits,
    Budget,
    Limits,
    MemoryJournal,
    Message,
    Reply,
    Request,
    load_prices,
    open_client,
)
from exegete.tools.llm.batches import BatchClient

from .conftest import PRICES

QUICK: dict[str, Any] = {
    "linger_s": 0.05, "poll_s": 0.02, "poll_max_s": 0.1, "settle_s": 0.1, "full_s": 0.1, "gather_s": 5.0, "transfer_s": 5.0,
}  # fmt: skip


def batch_spec(server: Running, provider: str, model: str = "model") -> str:
    return server.spec(f"{provider}-batch", model)


def batch_client(
    server: Running,
    provider: str,
    journal: MemoryJournal,
    *,
    budget: Budget | None = None,
    limits: Limits | None = None,
    model: str = "model",
    **batches: Any,
) -> BatchClient:
    client = open_client(
        batch_spec(server, provider, model),
        journal=journal,
        budget=budget,
        prices=load_prices(own=PRICES),
        limits=limits or Limits(total_s=5.0, patience_s=10.0),
        batches=BatchLimits(**(QUICK | batches)),
    )
    assert isinstance(client, BatchClient)
    return client


def questions(count: int, first: int = 0, **options: Any) -> list[Request]:
    return [Request((Message("user", f"question {n}"),), **options) for n in range(first, first + count)]


def answered(client: BatchClient, requests: Sequence[Request]) -> list[Reply]:
    """Ask and close."""

    async def ask() -> list[Reply]:
        try:
            return list(await asyncio.gather(*map(client.complete, requests)))
        finally:
            await client.close()

    return asyncio.run(ask())


class Killed(MemoryJournal):
    """A journal whose process ends at a given entry, which is not written: it stands still there for ever."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at
        self.reached = asyncio.Event()

    async def submitted(self, nonce: str, batch: str) -> None:
        await self._stop("submitted")
        await super().submitted(nonce, batch)
        await self._stop("after")

    async def answered(self, call: str, reply: Reply) -> None:
        if len(self.replies) >= 3:
            await self._stop("answered")
        await super().answered(call, reply)

    async def _stop(self, here: str) -> None:
        if here == self.at:
            self.reached.set()
            await asyncio.Event().wait()


def killed(client: BatchClient, journal: Killed, requests: Sequence[Request]) -> None:
    """Ask until the journal has reached its end; then everything is dropped as it stands, and nothing is closed."""

    async def ask() -> None:
        for request in requests:
            asyncio.get_running_loop().create_task(client.complete(request))
        await asyncio.wait_for(journal.reached.wait(), 20)

    asyncio.run(ask())
    journal.at = ""


def lines(server: Running) -> list[dict[str, Any]]:
    """Return the lines of batches that the server answered or let fail."""
    return [row for row in server.log() if row["route"] == "batch_lines"]


def none_twice_none_lost(server: Running, count: int) -> None:
    """By the server's own log: each question was asked, and none after it had been answered."""
    counts = server.counts()
    assert (counts["questions"], counts["answered"], counts["asked_again"]) == (count, count, 0)
