"""Calls become request files.

1. Calls are taken in order of arrival. Each is paid for in advance (`Budget`): one that does not fit beside the
   reservations of others lets go what is gathered so far and waits, one that does not fit at all is refused.
2. Its request is written to the file at once, so that bodies are never held in memory.
3. A file is let go when it is full (requests or bytes), when no call has come for a while, or when its first has waited
   long enough.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from exegete.tools.errors import UserError
from exegete.tools.llm.batch_calls import OpenBatch, Parts, Waiting
from exegete.tools.llm.batch_wire import Frame, custom_id, new_nonce
from exegete.tools.llm.contract import Reply
from exegete.tools.llm.prices import most_tokens

_AT_ONCE = 100
"""Calls written before others get their turn."""

Worst = tuple[float, int]
"""What a call can take at most: USD and tokens."""


class RequestFile:
    """A file of requests that is being written."""

    def __init__(self, frame: Frame, folder: Path | None, asked: tuple[str, int]) -> None:
        self.asked = asked
        self.nonce = new_nonce()
        self.begun = time.monotonic()
        self.calls: dict[str, float] = {}
        """Call → worst case in USD."""
        self.tokens: dict[str, int] = {}
        """Call → worst case in tokens."""
        self._frame = frame
        self._file = tempfile.NamedTemporaryFile(  # noqa: SIM115  # it lives until the batch is made
            mode="wb", prefix=f"exegete-{self.nonce}-", suffix=".jsonl", dir=folder, delete=False
        )
        self.path = Path(self._file.name)
        self._file.write(frame.head)
        self._bytes = len(frame.head) + len(frame.tail)

    def size_with(self, line: bytes) -> int:
        """Return how many bytes the file would have with one more request."""
        return self._bytes + len(line) + (len(self._frame.between) if self.calls else 0)

    def add(self, call: str, worst: Worst, line: bytes) -> None:
        """Write one more request."""
        self._bytes = self.size_with(line)
        self._file.write(self._frame.between + line if self.calls else line)
        self.calls[call], self.tokens[call] = worst

    def finish(self) -> None:
        """Write the end. Raises UserError where the disk is full."""
        self._file.write(self._frame.tail)
        self._file.close()

    def remove(self) -> None:
        """Remove the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)


class Gatherer:
    """Puts calls into request files and lets these go."""

    def __init__(self, parts: Parts, let_go: Callable[[OpenBatch, RequestFile], None]) -> None:
        self._parts = parts
        self._let_go = let_go
        self._queue: deque[Waiting] = deque()
        self._arrived = asyncio.Event()
        self._file: RequestFile | None = None
        self.stop: UserError | None = None
        """What no call can get past any more."""
        wire, batches = parts.wire, parts.batches
        self.max_requests = min(wire.max_requests, batches.max_requests or wire.max_requests)
        self.max_bytes = min(wire.max_bytes, batches.max_bytes or wire.max_bytes)

    def check(self) -> None:
        """Raise UserError where no call can be sent any more."""
        if self.stop is not None:
            raise type(self.stop)(str(self.stop))

    def put(self, waiting: Waiting) -> None:
        """Take a call that has to be sent."""
        self._queue.append(waiting)
        self._arrived.set()

    async def run(self) -> None:
        """Gather for ever."""
        for turn in itertools.count(1):
            if not self._queue:
                await self._pause()
                continue
            waiting = self._queue.popleft()
            try:
                await self._add(waiting)
            except UserError as error:
                self._parts.desk.refuse(waiting.call, error)
            if turn % _AT_ONCE == 0:
                await asyncio.sleep(0)

    def drop(self) -> None:
        """Forget what is gathered and not sent; nothing was paid for it."""
        file, self._file = self._file, None
        if file is not None:
            file.remove()
            for worst in zip(file.calls.values(), file.tokens.values(), strict=True):
                self._settle(worst)
            file.calls.clear()
            file.tokens.clear()

    async def _pause(self) -> None:
        self._arrived.clear()
        if self._file is None:
            await self._arrived.wait()
            return
        rest_s = self._file.begun + self._parts.batches.gather_s - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, min(self._parts.batches.linger_s, rest_s))):
                await self._arrived.wait()
        except TimeoutError:
            self._flush()

    async def _add(self, waiting: Waiting) -> None:
        if waiting.future.done():
            return
        self.check()
        price = self._parts.price
        worst_usd = 0.0 if price is None else price.worst_usd(waiting.request, batch=True)
        worst = (worst_usd, most_tokens(waiting.request))
        await self._reserve(worst)
        try:
            self._write(waiting, worst)
        except OSError as error:
            self._settle(worst)
            raise self._spoiled(self._file, error) from None

    async def _reserve(self, worst: Worst) -> None:
        budget = self._parts.budget
        if budget is None:
            return
        if not budget.fits(*worst):
            # What it waits for may be what is gathered.
            self._flush()
        await budget.reserve(*worst)

    def _write(self, waiting: Waiting, worst: Worst) -> None:
        file, line = self._room(waiting)
        if file.size_with(line) > self.max_bytes:
            self._settle(worst)
            detail = f"a request of {len(line)} bytes, but a batch holds {self.max_bytes}"
            self._parts.desk.resolve(waiting.call, Reply("rejected", detail=detail))
            return
        file.add(waiting.call, worst, line)
        waiting.submissions += 1
        if len(file.calls) >= self.max_requests or time.monotonic() - file.begun > self._parts.batches.gather_s:
            self._flush()

    def _room(self, waiting: Waiting) -> tuple[RequestFile, bytes]:
        """Return a file that has room for a call, where any has, and the call's line in it."""
        wire = self._parts.wire
        file = self._file = self._file or RequestFile(wire.frame, self._parts.batches.scratch, self._parts.asked)
        line = wire.line(custom_id(file.nonce, waiting.call), waiting.request)
        if not file.calls or file.size_with(line) <= self.max_bytes:
            return file, line
        self._flush()
        return self._room(waiting)

    def _flush(self) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        if not file.calls:
            file.remove()
            return
        try:
            file.finish()
        except OSError as error:
            self._spoiled(file, error)
            return
        batch = OpenBatch(file.nonce, len(file.calls), {}, file.asked, worst_usd=file.calls, worst_tokens=file.tokens)
        self._let_go(batch.fill(list(file.calls)), file)

    def _spoiled(self, file: RequestFile | None, error: OSError) -> UserError:
        """Refuse what is in a file that cannot be written."""
        refusal = UserError(f"{self._parts.wire.name}: the file of a batch cannot be written: {error}")
        if file is not None:
            calls = list(file.calls)
            self._file = file
            self.drop()
            for call in calls:
                self._parts.desk.refuse(call, refusal)
        return refusal

    def _settle(self, worst: Worst) -> None:
        if self._parts.budget is not None:
            self._parts.budget.settle(worst[0], 0.0, worst[1])
