"""The calls that somebody waits for, the batches that hold them, and what a batch client works with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from exegete.tools.llm.batch_limits import BatchLimits
from exegete.tools.llm.batch_wire import BatchWire, custom_id
from exegete.tools.llm.budget import Budget
from exegete.tools.llm.contract import BatchJournal, Reply, Request
from exegete.tools.llm.faults import Transient
from exegete.tools.llm.journaled import again_validated
from exegete.tools.llm.pacing import Limits
from exegete.tools.llm.prices import Price
from exegete.tools.llm.retrying import persist

Answer = TypeVar("Answer")


class Waiting:
    """One call and who waits for its reply."""

    __slots__ = ("begun", "call", "future", "looked_up", "request", "submissions")

    def __init__(self, call: str, request: Request) -> None:
        self.call = call
        self.request = request
        self.future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        # Looked at, so that asyncio does not report it where the caller has gone.
        self.future.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        self.begun = time.perf_counter()
        self.looked_up = False
        """Whether the journal has been asked; until then nobody but the look-up sends it anywhere."""
        self.submissions = 0
        """Batches that it was put into."""


class Desk:
    """Every call that waits for a reply, by its id."""

    def __init__(self) -> None:
        self.waiting: dict[str, Waiting] = {}
        self.expected: set[str] = set()
        """Calls in batches of an earlier process: their replies come without being asked for."""
        self.lost: dict[str, str] = {}
        """Calls in batches that are not given up but cannot be looked after in this process, and why."""

    def resolve(self, call: str, reply: Reply) -> None:
        """Give a call its reply, where somebody waits for it."""
        waiting = self.waiting.pop(call, None)
        if waiting is not None and not waiting.future.done():
            waiting.future.set_result(again_validated(reply, waiting.request.schema))

    def refuse(self, call: str, error: BaseException) -> None:
        """Raise `error` at whoever waits for a call."""
        waiting = self.waiting.pop(call, None)
        if waiting is not None and not waiting.future.done():
            waiting.future.set_exception(error)

    def cancel(self) -> None:
        """Cancel whatever waits."""
        for waiting in self.waiting.values():
            waiting.future.cancel()
        self.waiting.clear()


@dataclass(slots=True)
class OpenBatch:
    """A batch on its way to, at, or back from the provider."""

    nonce: str
    requests: int
    calls: dict[str, str]
    """Id in the batch → call, of those without a reply."""
    asked: tuple[str, int]
    """How schemas and log-probabilities were asked for (`Abilities`)."""
    worst_usd: dict[str, float] = field(default_factory=dict)
    """Set aside for each of its calls; empty for a batch of an earlier process."""
    worst_tokens: dict[str, int] = field(default_factory=dict)
    sent_usd: float = 0.0
    """Set aside for a batch of an earlier process as a whole."""
    batch: str | None = None
    """The provider's id."""
    written: bool = False
    """In the journal, or about to be."""
    unsure: bool = False
    """A try to make it got no clear answer."""
    taught: bool | None = None
    """Whether its results have shown how to ask the server from now on."""
    missing: dict[str, str] = field(default_factory=dict)
    """Calls that were not done, and why."""
    unexplained: dict[str, str] = field(default_factory=dict)
    """Calls that were rejected as malformed, and why."""
    refusal: Exception | None = None
    """What no request will get past, as one of its results says."""

    def fill(self, calls: list[str]) -> OpenBatch:
        """Return this batch with calls that have no reply yet."""
        self.calls = {custom_id(self.nonce, call): call for call in calls}
        return self


@dataclass(slots=True)
class Parts:
    """What a batch client works with."""

    wire: BatchWire
    journal: BatchJournal
    budget: Budget | None
    price: Price | None
    limits: Limits
    batches: BatchLimits
    desk: Desk = field(default_factory=Desk)
    closing: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def asked(self) -> tuple[str, int]:
        """How schemas and log-probabilities are asked for now."""
        return self.wire.abilities.way, self.wire.abilities.alternatives

    def settle(self, batch: OpenBatch, call: str, usd: float, tokens: int = 0) -> None:
        """Turn what was set aside for a call into what it cost."""
        if self.budget is None:
            return
        if call not in batch.worst_usd:
            self.budget.reserve_sent(0.0)
        self.budget.settle(batch.worst_usd.pop(call, 0.0), usd, batch.worst_tokens.pop(call, 0), tokens)

    def settle_worst(self, batch: OpenBatch, call: str) -> None:
        """Count a call that may have been billed at its worst case."""
        self.settle(batch, call, batch.worst_usd.get(call, 0.0), batch.worst_tokens.get(call, 0))

    async def persist(self, attempt: Callable[[], Awaitable[Answer]]) -> Answer:
        """Return what `attempt` returns, tried again while that can help. Raises as `persist`."""
        return await persist(attempt, self.limits, self.closing.is_set)

    async def nap(self, seconds: float) -> None:
        """Wait. Raises Transient where the client is closed meanwhile."""
        try:
            async with asyncio.timeout(seconds):
                await self.closing.wait()
        except TimeoutError:
            return
        raise Transient("the client is closed", sent=True)

    def wait_s(self, turn: int) -> float:
        """Return how long to wait before the next look at something that has not come yet, the `turn`-th."""
        return min(self.batches.poll_max_s, self.batches.poll_s * 1.5 ** min(turn, 100))
