"""Counting forward passes: how many prompts somebody's work runs through the model, and what it may use.

A pass is one prompt run through the model once; a token that is sampled counts as one. Whoever works within `counting` is counted,
in whatever thread or task the context is carried to. What would exceed what may be used is refused before it runs, so the number
that is used never lies above.

Work that has a time limit is refused passes once that is over. A thread cannot be killed: it ends where it asks for passes, holding
nothing, so nobody is left to compete for the model. What is under way then is finished first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from exegete.tools.errors import ToolError


class PassesUsedUp(ToolError):
    """What was asked for takes more forward passes than are left for it."""


class TookTooLong(ToolError):
    """What was asked for has taken longer than a tool may."""


class Count:
    """Forward passes of one piece of work. Safe to use from several threads."""

    def __init__(self, most: int | None = None, seconds: float | None = None) -> None:
        """Allow `most` passes, and none after so many seconds from now; None is no limit."""
        self.most = most
        self.seconds = seconds
        self._begun = time.monotonic()
        self.used = 0
        self.refused = False
        """Whether something was refused."""
        self._lock = threading.Lock()

    def take(self, passes: int) -> None:
        """Count passes that are about to run. Raises PassesUsedUp where they are more than are left, TookTooLong after its time."""
        if self.seconds is not None and time.monotonic() - self._begun >= self.seconds:
            raise TookTooLong(
                f"this took longer than {self.seconds:,.0f} s and was ended: ask for less at a time (fewer latents, candidates, "
                "prompts or controls)"
            )
        with self._lock:
            if self.most is not None and self.used + passes > self.most:
                self.refused = True
                raise PassesUsedUp(
                    f"{passes:,} forward passes are needed at once, {self.most - self.used:,} are left for this: ask for less, "
                    "or end the investigation with what there is"
                )
            self.used += passes

    def give_back(self, passes: int) -> None:
        """Take back passes that did not run."""
        with self._lock:
            self.used -= passes


_current: ContextVar[Count | None] = ContextVar("passes", default=None)


@contextmanager
def counting(most: int | None = None, seconds: float | None = None) -> Iterator[Count]:
    """Count the passes of what runs within, and allow `most` of them, for so many seconds."""
    count = Count(most, seconds)
    token = _current.set(count)
    try:
        yield count
    finally:
        _current.reset(token)


def current() -> Count | None:
    """Return what counts the passes of whoever asks; None where nothing does."""
    return _current.get()
