"""Ctrl-C and SIGTERM during a run: the first asks to drain, the second stops at once.

A drain waits for answers and, for a minute, for a server that fails; after that, calls that fail are given up as missing, so
that an outage does not hold up whoever asked to stop.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from exegete.agent.progress import Progress

DRAIN_S = 60.0


def lasting(
    stop: Callable[[], bool], after_s: float = DRAIN_S, clock: Callable[[], float] = time.monotonic
) -> Callable[[], bool]:
    """Return what says whether `stop` has been true for `after_s` seconds, as far as it was asked."""
    since: float | None = None

    def lasts() -> bool:
        nonlocal since
        if since is None and stop():
            since = clock()
        return since is not None and clock() - since >= after_s

    return lasts


@contextmanager
def stop_on_interrupt(progress: Progress) -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a request to drain; the second raises KeyboardInterrupt."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            progress.say(
                "stopping at once: calls in flight are given up; the same command goes on from what is written"
            )
            raise KeyboardInterrupt
        asked = True
        progress.say("stopping: finishing what is in flight (once more to stop at once)")

    try:
        former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # Signals reach the main thread only; a run in another thread is stopped by its owner.
        former = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
