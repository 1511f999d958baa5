"""The run engine: thousands of latents in flight, results written in batches, nothing acknowledged ever lost.

1. Evidence is read in ranges of latents; a latent enters the graph as soon as there is room (`concurrency`).
2. Finished records gather; every `batch` of them, or every five seconds, go to the store in one transaction.
3. When asked to stop, no latent enters any more; those in flight finish and are written (drain).
A latent whose graph raises is recorded as `failed` with its error: one bad latent does not end a night's run. Twenty in a
row do: then it is not the latent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from exegete.agent.graph import Workbench
from exegete.tools.evidence import Evidence
from exegete.tools.store import LatentRecord
from exegete.tools.windows import LatentEvidence

READ_LATENTS = 128
WRITE_EVERY_S = 5.0
FAILURES_IN_A_ROW = 20

log = logging.getLogger(__name__)

Write = Callable[[Sequence[LatentRecord]], None]
Stop = Callable[[], bool]


def evidence_in_ranges(evidence: Evidence, latents: Sequence[int]) -> Iterator[LatentEvidence]:
    """Yield the evidence of `latents` in their order, read a range at a time."""
    for at in range(0, len(latents), READ_LATENTS):
        chunk = latents[at : at + READ_LATENTS]
        found = {own.latent: own for own in evidence.read(chunk, "score")}
        yield from (found[latent] for latent in chunk)


async def label_latents(
    source: Iterable[LatentEvidence], graph: Any, bench: Workbench, concurrency: int, batch: Batch, stop: Stop
) -> bool:
    """Send every latent of `source` through `graph` and its record to `batch`; return whether all of them were taken.

    `stop` is asked before each latent enters.
    """
    pending: set[asyncio.Task[LatentRecord]] = set()
    complete = True
    for own in source:
        if stop():
            complete = False
            break
        bench.in_flight[own.latent] = own
        pending.add(asyncio.create_task(_label(own, graph, bench)))
        if len(pending) >= concurrency:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            batch.add(task.result() for task in done)
    for task in asyncio.as_completed(pending):
        batch.add([await task])
    batch.flush()
    return complete


async def _label(own: LatentEvidence, graph: Any, bench: Workbench) -> LatentRecord:
    if own.status != "live":
        bench.in_flight.pop(own.latent)
        return LatentRecord(bench.dictionary, own.latent, own.status)
    try:
        result = await graph.ainvoke({"latent": own.latent})
        record: LatentRecord = result["record"]
        return record
    except Exception as error:
        log.exception("latent %d failed", own.latent)
        detail = f"{type(error).__name__}: {error}"
        return LatentRecord(bench.dictionary, own.latent, "failed", detail=detail)
    finally:
        bench.in_flight.pop(own.latent, None)


class Batch:
    """Gathers records and writes them when there are enough or the last writing is long ago."""

    def __init__(self, write: Write, size: int) -> None:
        """Hand batches of at least `size` records to `write`."""
        self._write = write
        self._size = size
        self._records: list[LatentRecord] = []
        self._written_at = time.monotonic()
        self._failures = 0

    def add(self, records: Iterable[LatentRecord]) -> None:
        """Take records in; raises RuntimeError where too many in a row failed."""
        for record in records:
            self._failures = self._failures + 1 if record.status == "failed" else 0
            self._records.append(record)
            if self._failures >= FAILURES_IN_A_ROW:
                raise RuntimeError(f"{self._failures} latents in a row failed, the last one with {record.detail}")
        if len(self._records) >= self._size or time.monotonic() - self._written_at > WRITE_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write what has gathered."""
        if self._records:
            self._write(self._records)
        self._records = []
        self._written_at = time.monotonic()
