"""The run engine: thousands of latents in flight, results written in batches, nothing acknowledged ever lost.

1. Evidence is read in ranges of latents, one range ahead; a latent enters the graph as soon as there is room (`concurrency`).
   Nothing here grows with the number of latents.
2. Finished records gather; every `batch` of them, or every five seconds, go to the store in one transaction.
3. When asked to stop, no latent enters any more; those in flight finish and are written (drain).
A latent whose graph raises is recorded as `failed` with its error: one bad latent does not end a night's run. Twenty in a
row do: then it is not the latent. Where no language model can be asked any more (`Halted`: the budget is used up, the key is
refused, the disk is full), nothing enters, what can still finish is written, and the run ends.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
from langgraph.errors import NodeCancelledError
from numpy.typing import NDArray

from exegete.agent.graph import Workbench
from exegete.agent.models import Halted
from exegete.agent.spending import tallied
from exegete.tools.evidence import Evidence
from exegete.tools.store import LatentRecord
from exegete.tools.windows import LatentEvidence

READ_LATENTS = 128
WRITE_EVERY_S = 5.0
FAILURES_IN_A_ROW = 20

log = logging.getLogger(__name__)

Write = Callable[[Sequence[LatentRecord]], None]
Stop = Callable[[], bool]
Work = Callable[[LatentEvidence], Awaitable[LatentRecord]]


def evidence_in_ranges(evidence: Evidence, latents: Sequence[int] | NDArray[np.int64]) -> Iterator[LatentEvidence]:
    """Yield the evidence of `latents` in their order, read a range at a time."""
    for at in range(0, len(latents), READ_LATENTS):
        chunk = [int(latent) for latent in latents[at : at + READ_LATENTS]]
        found = {own.latent: own for own in evidence.read(chunk, "score")}
        yield from (found[latent] for latent in chunk)


async def label_latents(
    source: Iterable[LatentEvidence], graph: Any, bench: Workbench, concurrency: int, batch: Batch, stop: Stop
) -> bool:
    """Send every latent of `source` through `graph` and its record to `batch`; return whether all of them were taken.

    `stop` is asked before each latent enters.

    Raises:
        Halted: no language model can be asked any more; what could be finished has been written.
    """

    async def label(own: LatentEvidence) -> LatentRecord:
        bench.in_flight[own.latent] = own
        try:
            return await _label(own, graph, bench)
        finally:
            bench.in_flight.pop(own.latent)

    return await work_through(source, label, concurrency, batch, stop)


async def work_through(
    source: Iterable[LatentEvidence], work: Work, concurrency: int, batch: Batch, stop: Stop
) -> bool:
    """Have `work` make a record of every latent of `source`, so many at a time; as `label_latents`."""
    landed: asyncio.Queue[asyncio.Task[LatentRecord]] = asyncio.Queue()
    halted: Halted | None = None
    in_flight, complete = 0, True
    tasks: set[asyncio.Task[LatentRecord]] = set()
    async with aclosing(_ahead(source)) as coming:
        async for own in coming:
            if stop() or halted:
                complete = False
                break
            task = asyncio.create_task(_tallied(own, work))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            task.add_done_callback(landed.put_nowait)
            in_flight += 1
            # Whoever has landed meanwhile is taken as well, so that `batch` is offered many at a time.
            while in_flight >= concurrency or not landed.empty():
                in_flight -= 1
                halted = _take(await landed.get(), batch) or halted
            await batch.write_if_due()
    for _ in range(in_flight):
        halted = _take(await landed.get(), batch) or halted
        await batch.write_if_due()
    await asyncio.to_thread(batch.flush)
    if halted:
        raise halted
    return complete


async def _ahead(source: Iterable[LatentEvidence]) -> AsyncGenerator[LatentEvidence, None]:
    """Yield latents; the next range is read in a thread while the present one is labeled."""
    iterator = iter(source)

    def following() -> list[LatentEvidence]:
        return list(itertools.islice(iterator, READ_LATENTS))

    coming = asyncio.create_task(asyncio.to_thread(following))
    try:
        while found := await coming:
            coming = asyncio.create_task(asyncio.to_thread(following))
            for own in found:
                yield own
    finally:
        # A thread cannot be stopped, and must not go on reading behind whoever comes next.
        await asyncio.gather(coming, return_exceptions=True)


def _take(task: asyncio.Task[LatentRecord], batch: Batch) -> Halted | None:
    """Hand a finished record to `batch`, or return what halted it. What is no halt is a bug, and raised."""
    error = task.exception()
    if error is None:
        batch.add(task.result())
    elif not isinstance(error, Halted):
        raise error
    return error


async def _tallied(own: LatentEvidence, work: Work) -> LatentRecord:
    with tallied() as tally:
        record = await work(own)
    return replace(record, missing_calls=tally.missing)


async def _label(own: LatentEvidence, graph: Any, bench: Workbench) -> LatentRecord:
    if own.status != "live":
        return LatentRecord(bench.dictionary, own.latent, own.status)
    try:
        result = await graph.ainvoke({"latent": own.latent})
        record: LatentRecord = result["record"]
        return record
    except Halted:
        raise
    except NodeCancelledError as error:  # A call was given up, since the run ends: nothing is said of the latent.
        raise asyncio.CancelledError from error
    except Exception as error:
        return failed(bench.dictionary, own.latent, error)


def failed(dictionary: str, latent: int, error: Exception) -> LatentRecord:
    """Return the record of a latent that raised, and log where."""
    log.error("latent %d failed", latent, exc_info=error)
    return LatentRecord(dictionary, latent, "failed", detail=f"{type(error).__name__}: {error}")


class Batch:
    """Gathers records and writes them, in a thread, when there are enough or the last writing is long ago."""

    def __init__(self, write: Write, size: int) -> None:
        """Hand batches of at least `size` records to `write`."""
        self._write = write
        self._size = size
        self._records: list[LatentRecord] = []
        self._written_at = time.monotonic()
        self._failures = 0

    def add(self, record: LatentRecord) -> None:
        """Take a record in; raises RuntimeError where too many in a row failed."""
        self._failures = self._failures + 1 if record.status == "failed" else 0
        self._records.append(record)
        if self._failures >= FAILURES_IN_A_ROW:
            raise RuntimeError(f"{self._failures} latents in a row failed, the last one with {record.detail}")

    async def write_if_due(self) -> None:
        """Write what has gathered where it is time; the event loop goes on meanwhile."""
        if len(self._records) >= self._size or time.monotonic() - self._written_at > WRITE_EVERY_S:
            await asyncio.to_thread(self.flush)

    def flush(self) -> None:
        """Write what has gathered."""
        if self._records:
            self._write(self._records)
        self._records = []
        self._written_at = time.monotonic()
