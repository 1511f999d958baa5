"""Ctrl-C and SIGTERM during a run: the first asks to drain, the second stops at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from exegete.agent.progress import Progress


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
