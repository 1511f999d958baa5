"""The results of a batch become replies.

1. Results go to disk as they come, then a few at a time into the journal, and only then to the callers. A file that came
   broken or short is fetched again; what was read from it before is not read twice.
2. A reply has its status: answered, refused, truncated, filtered, empty; declined by the provider. An answer that cannot be
   read may have been paid for: it is an error, and an intent without a reply stays behind (`…/lost-…`).
3. What was not done (expired, cancelled, failed inside, or asked in a way that the server does not know) is asked again in
   a later batch, while `BatchLimits.submissions` allows and somebody waits for it; then it is an error. Providers do not
   charge for it.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
import uuid
from collections.abc import Iterable
from dataclasses import replace
from typing import BinaryIO

from exegete.tools.errors import UserError
from exegete.tools.llm.batch_calls import OpenBatch, Parts, Waiting
from exegete.tools.llm.batch_gathering import Gatherer
from exegete.tools.llm.batch_wire import Result, State, read_result
from exegete.tools.llm.contract import Reply, Usage
from exegete.tools.llm.faults import Declined, Lacking, Transient, Unexplained
from exegete.tools.llm.journaled import tokens_taken
from exegete.tools.llm.structured import validated

_AT_ONCE = 200
"""Results that are written down together, before others get their turn."""
_TAKEN = ("ok", "unparsed", "refused", "truncated", "filtered", "empty")
"""Statuses of what a model has answered; the others took no tokens, or are settled already."""


class Reader:
    """Reads the results of batches."""

    def __init__(self, parts: Parts, gatherer: Gatherer) -> None:
        self._parts = parts
        self._gatherer = gatherer

    async def read(self, batch: OpenBatch, state: State) -> None:
        """Write the replies of a batch that has ended down and give them to the callers.

        Raises:
            Transient: the results came broken or short; what came of them is settled.
        """
        with tempfile.TemporaryFile(dir=self._parts.batches.scratch) as file:
            await self._parts.wire.fetch(batch.batch or "", file)
            file.seek(0)
            rows = 0
            for lines in _lines(file):
                rows += len(lines)
                await self._take(batch, [read_result(self._parts.wire, line) for line in lines])
        if rows < state.rows:
            raise Transient(f"broken results: {rows} of {state.rows}", sent=True)

    async def conclude(self, batch: OpenBatch) -> None:
        """Say what becomes of the calls that a batch left without a reply.

        Raises:
            UserError: one of the results says that no request will succeed.
        """
        if batch.unexplained and not self._parts.wire.abilities.has_answered:
            why = next(iter(batch.unexplained.values()))
            batch.refusal = batch.refusal or UserError(
                f"{self._parts.wire.name}: the server rejects the request: {why}"
            )
        names = {call: name for name, call in batch.calls.items()}
        if batch.refusal is None:
            await self._answer(batch, {names[c]: Reply("rejected", detail=why) for c, why in batch.unexplained.items()})
        await self.land(batch)
        if batch.refusal is not None:
            raise batch.refusal

    async def land(self, batch: OpenBatch, *, counted: bool = True, last: bool = False, wait_s: float = 0.0) -> None:
        """Nothing more will come of a batch: ask again what it left out, or say that it failed.

        Args:
            batch: it; its calls are settled as not paid for, where the provider has not done them, and at their worst
                case where it may have.
            counted: whether it counts as one of the batches into which a call may be put.
            last: whether its calls are not asked again in any case.
            wait_s: before they are asked again.
        """
        if batch.written:
            undone = [call for call in batch.calls.values() if call in batch.missing]
            await self._parts.journal.landed(batch.nonce, undone)
        again: list[Waiting] = []
        failed: dict[str, Reply] = {}
        for name, call in batch.calls.items():
            self._let_go(batch, call)
            self._parts.desk.expected.discard(call)
            waiting = self._parts.desk.waiting.get(call)
            if waiting is None:
                continue
            if not counted and waiting.submissions:
                waiting.submissions -= 1
            if last or waiting.submissions >= self._parts.batches.submissions:
                detail = batch.missing.get(call, "the batch holds no result")
                failed[name] = Reply("error", detail=detail, attempts=max(1, waiting.submissions))
            elif waiting.looked_up:
                again.append(waiting)
        if self._parts.budget is not None and batch.sent_usd:
            # Of an earlier process only the sum is known: where any of its calls may have been billed, all of it counts.
            billed = any(_may_be_billed(batch, call) for call in batch.calls.values())
            self._parts.budget.settle(batch.sent_usd, batch.sent_usd if billed else 0.0)
        await self._answer(batch, failed)
        batch.calls.clear()
        await asyncio.sleep(wait_s)
        for waiting in again:
            self._gatherer.put(waiting)

    async def _take(self, batch: OpenBatch, results: Iterable[Result]) -> None:
        replies: dict[str, Reply] = {}
        for result in results:
            call = batch.calls.get(result.custom_id)
            if call is None:
                continue
            reply = result.reply
            if reply is not None:
                self._parts.wire.abilities.has_answered = True
                reply = self._paid(batch, call, reply)
            elif result.fault is not None:
                reply = await self._of_fault(batch, call, result.fault)
            if reply is not None:
                replies[result.custom_id] = self._timed(call, reply)
        await self._answer(batch, replies)

    async def _answer(self, batch: OpenBatch, replies: dict[str, Reply]) -> None:
        """Write replies down, and only then use them."""
        await asyncio.gather(
            *(self._parts.journal.answered(batch.calls[name], reply) for name, reply in replies.items())
        )
        for name, reply in replies.items():
            call = batch.calls.pop(name)
            batch.missing.pop(call, None)
            tokens = tokens_taken(reply.usage, batch.worst_tokens.get(call, 0) if reply.status in _TAKEN else 0)
            self._parts.settle(batch, call, reply.usd, tokens)
            self._parts.desk.expected.discard(call)
            self._parts.desk.resolve(call, reply)

    async def _of_fault(self, batch: OpenBatch, call: str, fault: Exception) -> Reply | None:
        """Return the reply that a fault is, None where the call has none yet."""
        if isinstance(fault, Declined):
            return Reply(fault.status, detail=str(fault))
        if isinstance(fault, Transient) and fault.sent:
            await self._lost(batch, call)
            return Reply("error", detail=str(fault))
        if isinstance(fault, Lacking):
            if batch.taught is None:
                batch.taught = self._parts.wire.abilities.lower(fault, *batch.asked)
            if not batch.taught:
                return Reply("rejected", detail=str(fault))
        if isinstance(fault, UserError):
            batch.refusal = batch.refusal or fault
        if isinstance(fault, Unexplained):
            batch.unexplained[call] = str(fault)
        batch.missing[call] = str(fault)
        return None

    async def _lost(self, batch: OpenBatch, call: str) -> None:
        worst_usd = batch.worst_usd.get(call, 0.0)
        await self._parts.journal.intend(f"{call}/lost-{uuid.uuid4().hex[:12]}", self._parts.wire.name, worst_usd)
        self._parts.settle_worst(batch, call)

    def _let_go(self, batch: OpenBatch, call: str) -> None:
        if _may_be_billed(batch, call):
            self._parts.settle_worst(batch, call)
        else:
            self._parts.settle(batch, call, 0.0)

    def _paid(self, batch: OpenBatch, call: str, reply: Reply) -> Reply:
        """Return an answer with its price, held against the schema where that is known."""
        waiting, price = self._parts.desk.waiting.get(call), self._parts.price
        if price is not None:
            # A server that counts nothing may still charge.
            unknown = reply.usage == Usage()
            usd = batch.worst_usd.get(call, 0.0) if unknown else price.usd(reply.usage, batch=True)
            reply = replace(reply, usd=usd)
        return reply if waiting is None else validated(reply, waiting.request.schema)

    def _timed(self, call: str, reply: Reply) -> Reply:
        waiting = self._parts.desk.waiting.get(call)
        if waiting is None:
            return reply
        return replace(reply, seconds=time.perf_counter() - waiting.begun, attempts=max(1, waiting.submissions))


def _may_be_billed(batch: OpenBatch, call: str) -> bool:
    """Return whether a call without a reply may cost something, as the journal takes it when the batch lands."""
    return batch.written and batch.batch is not None and call not in batch.missing


def _lines(file: BinaryIO) -> Iterable[list[bytes]]:
    lines = (line for line in file if line.strip())
    while some := list(itertools.islice(lines, _AT_ONCE)):
        yield some
