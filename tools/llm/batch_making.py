"""A batch is made once, whatever happens on the way.

1. The file is uploaded, where the provider wants that. Nothing is paid for it.
2. Nonce and calls are written down, the batch is made, its id is written down.
3. Where making it got no clear answer, the provider's list is searched for the nonce, and searched again after a while,
   before it is tried again. A batch of which nobody can say whether it exists stays written down; the next process searches.
"""

from __future__ import annotations

import asyncio
import itertools

from exegete.tools.llm.batch_calls import OpenBatch, Parts
from exegete.tools.llm.batch_gathering import RequestFile
from exegete.tools.llm.faults import Transient


class Maker:
    """Makes batches of files."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._making: set[asyncio.Task[None]] = set()

    async def make(self, batch: OpenBatch, file: RequestFile) -> None:
        """Make a batch, so that it has its id.

        Raises:
            Transient: it could not be made; where `batch.unsure`, it may exist all the same.
            UserError: no batch can be.
        """
        wire = self._parts.wire
        prepared = await self._parts.persist(lambda: wire.prepare(file.path))
        batch.written = True
        # Being cancelled here would leave it unclear whether there is a batch.
        making = asyncio.get_running_loop().create_task(self._make(batch, prepared))
        self._making.add(making)
        making.add_done_callback(self._making.discard)
        await asyncio.shield(making)

    async def close(self) -> None:
        """Let batches that are being made get their ids."""
        await asyncio.gather(*self._making, return_exceptions=True)

    async def find(self, batch: OpenBatch) -> None:
        """Look for a batch that may have been made; it gets its id where there is one. Raises Transient, UserError."""
        settled = False
        for turn in itertools.count():
            seen = await self._parts.wire.find(batch.nonce, batch.requests)
            if seen.batch is not None:
                await self._name(batch, seen.batch)
                return
            if not seen.undecided and settled:
                batch.unsure = False
                return
            # It may not have come into the list yet.
            settled = settled or not seen.undecided
            await self._parts.nap(self._parts.wait_s(turn) if seen.undecided else self._parts.batches.settle_s)

    async def _make(self, batch: OpenBatch, prepared: str) -> None:
        parts = self._parts
        await parts.journal.submitting(batch.nonce, parts.wire.name, batch.worst_usd)

        async def attempt() -> None:
            if batch.unsure:
                await self.find(batch)
            if batch.batch is None:
                await self._create(batch, prepared)

        await parts.persist(attempt)

    async def _create(self, batch: OpenBatch, prepared: str) -> None:
        try:
            made = await self._parts.wire.create(prepared, batch.nonce)
        except Transient as fault:
            batch.unsure = fault.sent
            raise
        await self._name(batch, made)

    async def _name(self, batch: OpenBatch, name: str) -> None:
        batch.batch, batch.unsure = name, False
        self._parts.wire.know(name, batch.nonce)
        await self._parts.journal.submitted(batch.nonce, name)
