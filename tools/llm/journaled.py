"""A client over a wire: nothing is asked twice, nothing is sent that is not written down, nothing beyond the budget.

For each request:
1. A reply that the journal knows is returned as it is ("cached"), unless it is a failure of the provider, which is asked
   again. Equal requests in flight share one call.
2. It waits for its turn (`pacing`), reserves its worst case (`budget`), and writes its intent down.
3. It is sent, and sent again while that can help (`retrying`). An attempt that was lost on the way and may have been
   billed leaves an intent of its own (`…/lost-…`) without a reply: stored cost ≤ billed ≤ stored + worst case of those.
4. The reply is held against the schema and written down before anybody uses it.
5. One that does not fit is asked to be repaired, once; the repair is a call like any other, known by its content.

A caller that goes away does not stop a call that is in flight: it is paid for, so its reply is kept.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import replace

from exegete.tools.errors import UserError
from exegete.tools.llm.budget import Budget
from exegete.tools.llm.contract import Journal, Reply, Request, Usage
from exegete.tools.llm.faults import Declined, Transient
from exegete.tools.llm.pacing import Allowance, Limits, Pacer, Slot
from exegete.tools.llm.prices import Price, most_input_tokens, most_tokens
from exegete.tools.llm.retrying import persist
from exegete.tools.llm.structured import repair_request, schema_value, validated
from exegete.tools.llm.tool_calls import check_tools
from exegete.tools.llm.wire import Abilities, Wire

UNANSWERED = ("error", "unknown")
"""Statuses of calls that may be asked again."""
_TOKENS_PER_BYTE = 0.3
"""Of English text, roughly; for token limits only, corrected by the usage."""


class JournaledClient:
    """Completes conversations through a wire, a journal, a budget and a pacer. `open_client` makes them."""

    def __init__(
        self,
        wire: Wire,
        *,
        journal: Journal,
        budget: Budget | None,
        price: Price | None,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        allowance: Allowance | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.name = wire.name
        self.price = price
        """None where no price is known: every `Reply.usd` is 0 then, and no budget can be kept."""
        self.pacer = Pacer(limits, clock, allowance)
        self._wire = wire
        self._journal = journal
        self._budget = budget
        self._limits = limits
        self._flying: dict[str, asyncio.Task[Reply]] = {}
        self._sending: set[str] = set()
        self._stop: UserError | None = None
        self._closing = False
        self._stopping = stopping

    @property
    def abilities(self) -> Abilities | None:
        """What the server has turned out to have so far; None for a local model."""
        return getattr(self._wire, "abilities", None)

    async def complete(self, request: Request) -> Reply:
        """Return the reply; failures have a status.

        Raises:
            UserError: nothing can come of asking (key, model, quota, budget). From then on every new call raises it. Or the
                request offers tools, and this kind of model takes none.
            ValueError: the messages are no conversation (none, a system message late, not the user's at the end, or tool
                calls without results), or the schema is none.
        """
        check_request(request)
        if request.tools and not getattr(self._wire, "takes_tools", True):
            raise UserError(
                f"{self.name}: takes no tools; serve the model (vLLM, Ollama, llama.cpp) as openai:MODEL@URL"
            )
        first = await self._once(request)
        if first.status != "unparsed":
            return first
        second = await self._once(repair_request(request, first))
        return together(first, second)

    async def close(self) -> None:
        """Let calls in flight land without sending them again, drop those that wait, and give connections back."""
        self._closing = True
        flying = dict(self._flying)
        for call in flying.keys() - self._sending:
            flying[call].cancel()
        await asyncio.gather(*flying.values(), return_exceptions=True)
        await self._wire.close()

    async def _once(self, request: Request) -> Reply:
        try:
            call = request.id(self.name)
        except UnicodeEncodeError:
            return Reply("rejected", detail="the text holds half a surrogate pair, which cannot be sent")
        task = self._flying.get(call)
        if task is not None:
            return replace(await asyncio.shield(task), cached=True)
        if self._closing:
            raise RuntimeError("the client is closed")
        task = asyncio.get_running_loop().create_task(self._settle(call, request))
        self._flying[call] = task
        task.add_done_callback(lambda done: self._landed(call, done))
        return await asyncio.shield(task)

    def _landed(self, call: str, task: asyncio.Task[Reply]) -> None:
        self._flying.pop(call, None)
        self._sending.discard(call)
        if not task.cancelled():
            # Looked at, so that asyncio does not report it where the caller has gone.
            task.exception()

    async def _settle(self, call: str, request: Request) -> Reply:
        known = await self._journal.known(call)
        if known is not None and known.status not in UNANSWERED:
            return again_validated(replace(known, cached=True), request.schema)
        begun = time.perf_counter()
        sending = _Call(call, request, 0.0 if self.price is None else self.price.worst_usd(request))
        try:
            reply = await persist(
                lambda: self._attempt(sending), self._limits, lambda: self._closing or self._stopping()
            )
        except UserError as error:
            if sending.intended:
                await self._journal.answered(call, Reply("error", detail=str(error)))
            raise
        except (Transient, Declined) as fault:
            reply = Reply(fault.status if isinstance(fault, Declined) else "error", detail=str(fault))
        seconds = time.perf_counter() - begun
        reply = replace(reply, usd=sending.usd, seconds=seconds, attempts=max(1, sending.attempts))
        await self._journal.answered(call, reply)
        return reply

    async def _attempt(self, sending: _Call) -> Reply:
        slot = await self._turn(sending)
        cost, tokens = sending.worst_usd, sending.worst_tokens
        try:
            await self._intend(sending)
            sending.attempts += 1
            reply = validated(await self._wire.send(sending.request), sending.request.schema)
            cost = sending.usd = self._cost(reply, sending.worst_usd)
            tokens = tokens_taken(reply.usage, sending.worst_tokens)
        except Transient as fault:
            cost, tokens = (sending.worst_usd, sending.worst_tokens) if fault.sent else (0.0, 0)
            await self._lost(sending, fault, slot)
            self._sending.discard(sending.call)
            raise
        except (Declined, UserError) as fault:
            cost, tokens = 0.0, 0
            self.pacer.failed(slot)
            self._stop = fault if isinstance(fault, UserError) else self._stop
            raise
        except BaseException:
            self.pacer.failed(slot)
            raise
        finally:
            if self._budget is not None:
                self._budget.settle(sending.worst_usd, cost, sending.worst_tokens, tokens)
        self.pacer.answered(slot, reply.usage.input_tokens + reply.usage.output_tokens or slot.tokens)
        return reply

    async def _turn(self, sending: _Call) -> Slot:
        self._sending.discard(sending.call)
        self._check_stop()
        slot = await self.pacer.slot(sending.tokens)
        try:
            self._check_stop()
            if self._budget is not None:
                await self._budget.reserve(sending.worst_usd, sending.worst_tokens)
        except BaseException:
            self.pacer.failed(slot)
            raise
        self._sending.add(sending.call)
        return slot

    def _check_stop(self) -> None:
        if self._stop is not None:
            raise type(self._stop)(str(self._stop))
        if self._budget is not None:
            self._budget.check()

    async def _intend(self, sending: _Call) -> None:
        if not sending.intended:
            await self._journal.intend(sending.call, self.name, sending.worst_usd)
            sending.intended = True

    async def _lost(self, sending: _Call, fault: Transient, slot: Slot) -> None:
        if fault.pushback:
            self.pacer.pushed_back(slot, fault.retry_after_s)
        else:
            self.pacer.failed(slot)
        if fault.sent:
            lost = f"{sending.call}/lost-{uuid.uuid4().hex[:12]}"
            await self._journal.intend(lost, self.name, sending.worst_usd)

    def _cost(self, reply: Reply, worst_usd: float) -> float:
        if self.price is None:
            return 0.0
        # A server that counts nothing may still charge.
        return worst_usd if reply.usage == Usage() else self.price.usd(reply.usage)


class _Call:
    """One request on its way."""

    __slots__ = ("attempts", "call", "intended", "request", "tokens", "usd", "worst_tokens", "worst_usd")

    def __init__(self, call: str, request: Request, worst_usd: float) -> None:
        self.call = call
        self.request = request
        self.worst_usd = worst_usd
        self.worst_tokens = most_tokens(request)
        self.usd = 0.0
        """What it cost, once it is answered."""
        self.tokens = _TOKENS_PER_BYTE * most_input_tokens(request)
        self.attempts = 0
        self.intended = False


def tokens_taken(usage: Usage, worst_tokens: int) -> int:
    """Return the tokens that a call took; at most those of its worst case where the server counts nothing."""
    return worst_tokens if usage == Usage() else usage.input_tokens + usage.output_tokens


def check_request(request: Request) -> None:
    """Raise ValueError where the messages are no conversation, a limit is none, or schema or tools are none."""
    roles = [message.role for message in request.messages]
    if not roles or roles[-1] != "user" or "system" in roles[roles.index("user") :]:
        raise ValueError(f"messages by {roles}: expected system messages first and the user's last")
    if request.max_tokens < 1 or not 0 <= request.shared <= len(roles):
        raise ValueError(f"max_tokens={request.max_tokens}, shared={request.shared} of {len(roles)} messages")
    if request.schema is not None:
        schema_value(request.schema)
    if request.tools or any(message.calls or message.results for message in request.messages):
        check_tools(request)


def again_validated(reply: Reply, schema: str | None) -> Reply:
    """Return a reply from the journal, which may keep the text alone, with its JSON value."""
    if schema is None or reply.parsed is not None or reply.status not in ("ok", "unparsed"):
        return reply
    return validated(replace(reply, status="ok", detail=""), schema)


def together(first: Reply, second: Reply) -> Reply:
    """Return a reply that did not fit and its repair as one."""
    # What was paid this time: a part from the journal was paid before, unless all of it comes from there.
    paid = [reply for reply in (first, second) if not reply.cached] or [first, second]
    known = [reply for reply in (first, second) if all(reply is not one for one in paid)]
    # A repair that fails otherwise leaves the answer as unparsed as it was; why stands in the detail.
    status = second.status if second.status in ("ok", "unparsed", "error") else "unparsed"
    detail = second.detail if status in ("ok", "error") else f"{first.detail}; repair: {second.status}: {second.detail}"
    return replace(
        second,
        status=status,
        detail=detail,
        usage=sum((reply.usage for reply in paid), Usage()),
        usd=sum(reply.usd for reply in paid),
        known_usage=sum((reply.usage for reply in known), Usage()),
        known_usd=sum(reply.usd for reply in known),
        seconds=first.seconds + second.seconds,
        attempts=first.attempts + second.attempts,
        cached=first.cached and second.cached,
    )
