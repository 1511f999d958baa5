"""The calls of one decision, run at the same time within what forward passes are left.

1. Calls run in threads. Each result is on the disk before anybody uses it, and a call that has one is not run again.
2. They share the passes that are left for the search evenly. Those for which a share is too little run again once the others have
   ended, one after the other, with all that is left then. So what is refused does not depend on which of them is faster, nor on
   where the process was killed.
3. A call that was made before is given the former result.
4. A call that takes longer than `TOOL_S` gets no more forward passes, and comes back as an error. SQL has a shorter limit of its own;
   what waits for a judge has the limits of whoever asks it, since a reply that nobody reads is paid for all the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exegete.agent.investigation.calls import Planned, again, refused, refused_for_passes
from exegete.agent.investigation.contract import Call, Result
from exegete.agent.investigation.ledger import Ledger
from exegete.agent.investigation.passes import counting

if TYPE_CHECKING:
    from exegete.agent.investigation.toolbelt import Toolbelt


TOOL_S = 1_800.0
"""Seconds after which a call gets no more forward passes. Far above what calls take: a slower machine should find the same."""


@dataclass(frozen=True)
class Attempt:
    """A call that ran, and what it used."""

    result: Result
    passes: int
    seconds: float


class Running:
    """Runs the calls of one decision."""

    def __init__(
        self,
        ledger: Ledger,
        tools: Toolbelt,
        threads: Executor,
        step: int,
        most: int | None,
        closed: Callable[[], bool] = lambda: False,
    ) -> None:
        """Allow the whole search `most` passes; None is no limit. Once `closed()`, nothing more is written down."""
        self._closed = closed
        self._ledger = ledger
        self._tools = tools
        self._threads = threads
        self._step = step
        self._most = most

    async def run(self, plan: Sequence[Planned]) -> None:
        """Bring every call of the decision to its end. What is no `ExegeteError` is raised once all of them have ended."""
        running = [one.call for one in plan if not one.repeats]
        share = self._left() // max(1, len(running)) if self._most is not None else None
        loop = asyncio.get_running_loop()
        begun = [
            loop.run_in_executor(self._threads, self._attempt, call, share)
            for call in running
            if self._ledger.finished(call.id) is None
        ]
        ended = await asyncio.gather(*begun, return_exceptions=True)
        short = [attempt for attempt in map(_raised, ended) if attempt is not None]
        while short:
            await loop.run_in_executor(self._threads, self._alone, short)
            short = short[1:]
        for one in plan:
            former = self._ledger.finished(one.repeats) if one.repeats else None
            if former is not None:
                self._ledger.finish(again(one.call, former), repeats=one.repeats)

    def _left(self) -> int:
        """Return the passes that were left when the decision was made."""
        return max(0, (self._most or 0) - self._ledger.passes(before_step=self._step))

    def _attempt(self, call: Call, share: int | None) -> Attempt | None:
        """Run a call and write down what became of it, on a thread; return it where that would take more than its share."""
        attempt = self._run(call, share)
        if refused_for_passes(attempt.result):
            return attempt
        self._ledger.finish(attempt.result, attempt.passes, attempt.seconds)
        return None

    def _alone(self, short: Sequence[Attempt]) -> None:
        """Run the first of those again, with what is left of everything."""
        used = self._ledger.passes(before_step=self._step + 1) + sum(one.passes for one in short)
        former = short[0]
        found = self._run(former.result.call, (self._most or 0) - used)
        self._ledger.finish(found.result, former.passes + found.passes, former.seconds + found.seconds)

    def _run(self, call: Call, most: int | None) -> Attempt:
        begun = time.perf_counter()
        with counting(most, TOOL_S) as count:
            result = self._tools.run(call)
        if self._closed():
            # The model was taken away from it: that says nothing about the call.
            raise asyncio.CancelledError
        if count.refused and result.status != "ok":
            result = refused(result)
        return Attempt(result, count.used, time.perf_counter() - begun)


def _raised(ended: Attempt | BaseException | None) -> Attempt | None:
    if isinstance(ended, BaseException):
        raise ended
    return ended
