"""A batch from its file to its replies, in this process or in the one after it.

1. It is made (`batch_making`), or found again where an earlier process ended before it knew.
2. It is looked at, ever more rarely, until it has ended. A provider that says nothing for long is told to the callers as
   failures; the batch stays written down, and the next process takes it up.
3. Its results are read (`batch_reading`).
"""

from __future__ import annotations

import asyncio
import itertools
import time

from exegete.tools.errors import UserError
from exegete.tools.llm.batch_calls import OpenBatch, Parts
from exegete.tools.llm.batch_gathering import Gatherer, RequestFile
from exegete.tools.llm.batch_making import Maker
from exegete.tools.llm.batch_reading import Reader
from exegete.tools.llm.batch_wire import Gone, State
from exegete.tools.llm.contract import Reply
from exegete.tools.llm.faults import Declined, Transient, Unexplained


class Carrier:
    """Carries batches of one client."""

    def __init__(self, parts: Parts, gatherer: Gatherer) -> None:
        self._parts = parts
        self._gatherer = gatherer
        self._maker = Maker(parts)
        self._reader = Reader(parts, gatherer)
        self._carried: set[str] = set()
        """Nonces of the batches at the provider."""

    async def carry(self, batch: OpenBatch, file: RequestFile) -> None:
        """Make a batch of a file and bring its replies back."""
        try:
            self._gatherer.check()
            await self._maker.make(batch, file)
        except (UserError, Declined, Unexplained) as error:
            await self._stop(batch, error)
            return
        except Transient as fault:
            await (self._look_for(batch, fault) if batch.unsure else self._unmade(batch, fault))
        except asyncio.CancelledError:
            if not batch.written:
                for call in batch.calls.values():
                    self._parts.settle(batch, call, 0.0)
            raise
        finally:
            file.remove()
        await self._follow(batch)

    async def take_up(self, batch: OpenBatch) -> None:
        """Bring the replies of a batch back that an earlier process sent, or may have."""
        if self._parts.budget is not None:
            self._parts.budget.reserve_sent(batch.sent_usd)
        if batch.batch is None:
            await self._look_for(batch)
        else:
            self._parts.wire.know(batch.batch, batch.nonce)
        await self._follow(batch)

    async def close(self) -> None:
        """Let batches that are being made get their ids."""
        await self._maker.close()

    async def _look_for(self, batch: OpenBatch, why: Transient | None = None) -> None:
        """Find a batch that may have been made. Where it was not, its calls fail if making it had failed (`why`)."""
        try:
            await self._parts.persist(lambda: self._maker.find(batch))
        except UserError as error:
            await self._stop(batch, error)
        except (Transient, Declined, Unexplained) as fault:
            self._give_up(batch, f"it is not known whether a batch was made: {fault}")
        else:
            if batch.batch is None and why is None:
                await self._reader.land(batch, counted=False)
            elif batch.batch is None:
                await self._unmade(batch, why)

    async def _unmade(self, batch: OpenBatch, why: Transient | None) -> None:
        batch.missing = dict.fromkeys(batch.calls.values(), f"no batch could be made: {why}")
        await self._reader.land(batch, last=True)

    async def _follow(self, batch: OpenBatch) -> None:
        if batch.batch is None or not batch.calls:
            return
        self._carried.add(batch.nonce)
        try:
            await self._finish(batch, await self._ended(batch))
        except Gone:
            await self._gone(batch)
        except (Transient, Declined, Unexplained) as fault:
            self._give_up(batch, f"batch {batch.batch} gives no results: {fault}")
        except UserError as error:
            await self._stop(batch, error)
        finally:
            self._carried.discard(batch.nonce)

    async def _ended(self, batch: OpenBatch) -> State:
        heard = time.monotonic()
        for turn in itertools.count():
            try:
                state = await self._parts.persist(lambda: self._parts.wire.state(batch.batch or ""))
            except Transient:
                if time.monotonic() - heard > self._parts.batches.outage_s:
                    raise
            else:
                heard = time.monotonic()
                if state.ended:
                    return state
            await self._parts.nap(self._parts.wait_s(turn))
        raise AssertionError("it never ends without a state")

    async def _finish(self, batch: OpenBatch, state: State) -> None:
        why = state.rejected
        if why is None:
            await self._parts.persist(lambda: self._reader.read(batch, state))
            await self._reader.conclude(batch)
        elif isinstance(why, Transient) and why.pushback:
            await self._no_room(batch, why)
        else:
            batch.missing = dict.fromkeys(batch.calls.values(), str(why))
            batch.refusal = why if isinstance(why, UserError) else None
            await self._reader.conclude(batch)

    async def _no_room(self, batch: OpenBatch, why: Transient) -> None:
        """The provider's queue is full: come again later, with less where the queue holds nothing else of ours."""
        batch.missing = dict.fromkeys(batch.calls.values(), str(why))
        self._carried.discard(batch.nonce)
        if not self._carried and batch.requests == 1:
            batch.refusal = UserError(f"{self._parts.wire.name}: the provider has no room for one request: {why}")
            await self._reader.conclude(batch)
        if not self._carried:
            self._gatherer.max_requests = max(1, batch.requests // 2)
        await self._reader.land(batch, counted=False, wait_s=self._parts.batches.full_s)

    async def _gone(self, batch: OpenBatch) -> None:
        if self._parts.batches.forsake:
            await self._reader.land(batch, counted=False)
            return
        error = UserError(
            f"{self._parts.wire.name}: the provider does not have batch {batch.batch} or its results any more; use the key of "
            "the account that submitted it, or, if it was deleted there, let it be asked again (models.forsake_batches=true)"
        )
        await self._stop(batch, error)

    def _give_up(self, batch: OpenBatch, detail: str) -> None:
        """Tell callers that no reply comes in this process. The batch stays written down for the next one."""
        detail = f"{detail}; it is taken up when the run is resumed"
        for call in batch.calls.values():
            self._parts.desk.lost[call] = detail
            self._parts.settle_worst(batch, call)
            self._parts.desk.expected.discard(call)
            self._parts.desk.resolve(call, Reply("error", detail=detail))
        batch.calls.clear()

    async def _stop(self, batch: OpenBatch, error: Exception) -> None:
        """Refuse the calls of a batch, and every call that is not sent yet."""
        if not isinstance(error, UserError):
            error = UserError(f"{self._parts.wire.name}: the provider does not take the batch: {error}")
        self._gatherer.stop = error
        sent = batch.unsure or batch.batch is not None
        for call in batch.calls.values():
            if sent:
                self._parts.settle_worst(batch, call)
            else:
                self._parts.settle(batch, call, 0.0)
            self._parts.desk.refuse(call, type(error)(str(error)))
        batch.calls.clear()
        if batch.written and not sent:
            await self._parts.journal.landed(batch.nonce)
