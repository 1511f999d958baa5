"""Batches behind the same call as live models: half the price, answers within a day, and nothing lost by a restart.

1. A call that the journal knows is returned as it is. Equal calls share one place.
2. The others gather into files (`batch_gathering`), each of which becomes a batch (`batch_making`) as soon as it is full or
   no call comes any more. Nonce and calls are written down before a batch is made, its id after.
3. Results are written down before anybody uses them (`batch_reading`). An answer that does not fit its schema is asked to
   be repaired, once, in a later batch.
4. On first use, batches that an earlier process left are taken up: by their id, or by their nonce in the provider's list.
   Their replies are written down whether or not anybody waits for them; calls in them are not sent again.
5. `close` leaves batches at the provider; so does a process that is killed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from exegete.tools.errors import UserError
from exegete.tools.llm.batch_calls import OpenBatch, Parts, Waiting
from exegete.tools.llm.batch_carrying import Carrier
from exegete.tools.llm.batch_gathering import Gatherer, RequestFile
from exegete.tools.llm.batch_limits import BatchLimits
from exegete.tools.llm.batch_wire import BatchWire
from exegete.tools.llm.budget import Budget
from exegete.tools.llm.contract import BatchJournal, Reply, Request, Submission
from exegete.tools.llm.journaled import UNANSWERED, again_validated, check_request, together
from exegete.tools.llm.pacing import Limits
from exegete.tools.llm.prices import Price
from exegete.tools.llm.structured import repair_request
from exegete.tools.llm.wire import Abilities

_AT_ONCE = 256
"""Calls that are looked up together."""


class BatchClient:
    """Completes conversations through batches. `open_client` makes them."""

    def __init__(
        self,
        wire: BatchWire,
        *,
        journal: BatchJournal,
        budget: Budget | None,
        price: Price | None,
        limits: Limits,
        batches: BatchLimits,
    ) -> None:
        self.name = wire.name
        self.price = price
        """None where no price is known: every `Reply.usd` is 0 then, and no budget can be kept."""
        self._parts = Parts(wire, journal, budget, price, limits, batches)
        self._gatherer = Gatherer(self._parts, self._let_go)
        self._carrier = Carrier(self._parts, self._gatherer)
        self._inbox: deque[Waiting] = deque()
        self._arrived = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def abilities(self) -> Abilities:
        """What the server has turned out to have so far."""
        return self._parts.wire.abilities

    async def complete(self, request: Request) -> Reply:
        """Return the reply; failures have a status.

        Raises:
            UserError: nothing can come of asking (key, model, quota, budget). From then on every new call raises it. Or the
                request offers tools.
            ValueError: as `JournaledClient.complete`.
        """
        check_request(request)
        if request.tools:
            live = self.name.replace("-batch:", ":", 1)
            raise UserError(f"{self.name}: batches take no tools, since each answer may be a day away; name it {live}")
        first = await self._once(request)
        if first.status != "unparsed":
            return first
        return together(first, await self._once(repair_request(request, first)))

    async def close(self) -> None:
        """Leave batches at the provider, where the next process finds them, and give connections back."""
        self._parts.closing.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._carrier.close()
        self._gatherer.drop()
        self._parts.desk.cancel()
        await self._parts.wire.close()

    async def _once(self, request: Request) -> Reply:
        try:
            call = request.id(self.name)
        except UnicodeEncodeError:
            return Reply("rejected", detail="the text holds half a surrogate pair, which cannot be sent")
        waiting = self._parts.desk.waiting.get(call)
        if waiting is not None:
            return replace(await asyncio.shield(waiting.future), cached=True)
        if self._parts.closing.is_set():
            raise RuntimeError("the client is closed")
        waiting = self._parts.desk.waiting[call] = Waiting(call, request)
        self._inbox.append(waiting)
        self._arrived.set()
        if not self._tasks:
            self._start(self._look_up())
            self._start(self._gatherer.run())
        return await asyncio.shield(waiting.future)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        # A journal that fails, or a mistake of ours: nobody may wait for ever.
        self._gatherer.stop = error if isinstance(error, UserError) else UserError(f"{self.name}: {error!r}")
        for call in list(self._parts.desk.waiting):
            self._parts.desk.refuse(call, error)

    def _let_go(self, batch: OpenBatch, file: RequestFile) -> None:
        self._start(self._carrier.carry(batch, file))

    async def _look_up(self) -> None:
        for submission in await self._parts.journal.submissions(self.name):
            await self._take_up(submission)
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._inbox:
                some = [self._inbox.popleft() for _ in range(min(_AT_ONCE, len(self._inbox)))]
                for waiting, known in zip(some, await self._known([one.call for one in some]), strict=True):
                    self._place(waiting, known)

    async def _known(self, calls: list[str]) -> list[Reply | None]:
        found = await asyncio.gather(*map(self._parts.journal.known, calls))
        return [None if reply is None or reply.status in UNANSWERED else reply for reply in found]

    def _place(self, waiting: Waiting, known: Reply | None) -> None:
        desk = self._parts.desk
        waiting.looked_up = True
        if waiting.future.done():
            return
        if known is not None:
            desk.resolve(waiting.call, again_validated(replace(known, cached=True), waiting.request.schema))
        elif waiting.call in desk.lost:
            desk.resolve(waiting.call, Reply("error", detail=desk.lost[waiting.call]))
        elif waiting.call not in desk.expected:
            self._gatherer.put(waiting)

    async def _take_up(self, submission: Submission) -> None:
        """Go on with a batch of an earlier process."""
        calls: list[str] = []
        for at in range(0, len(submission.calls), _AT_ONCE):
            some = list(submission.calls[at : at + _AT_ONCE])
            calls += [call for call, reply in zip(some, await self._known(some), strict=True) if reply is None]
        if not calls:
            await self._parts.journal.landed(submission.nonce)
            return
        self._parts.desk.expected.update(calls)
        batch = OpenBatch(
            submission.nonce,
            len(submission.calls),
            {},
            self._parts.asked,
            sent_usd=submission.worst_usd,
            batch=submission.batch,
            written=True,
        )
        self._start(self._carrier.take_up(batch.fill(calls)))
