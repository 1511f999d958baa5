"""Counting forward passes: how many prompts somebody's work runs through the model, and what it may use.

A pass is one prompt run through the model once; a token that is sampled counts as one. Whoever works within `counting` is counted,
in whatever thread or task the context is carried to. What would exceed what may be used is refused before it runs, so the number
that is used never lies above.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from exegete.tools.errors import ToolError


class PassesUsedUp(ToolError):
    """What was asked for takes more forward passes than are left for it."""


class Count:
    """Forward passes of one piece of work. Safe to use from several threads."""

    def __init__(self, most: int | None = None) -> None:
        """Allow `most` passes; None is no limit."""
        self.most = most
        self.used = 0
        self.refused = False
        """Whether something was refused."""
        self._lock = threading.Lock()

    def take(self, passes: int) -> None:
        """Count passes that are about to run. Raises PassesUsedUp where they are more than are left."""
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
def counting(most: int | None = None) -> Iterator[Count]:
    """Count the passes of what runs within, and allow `most` of them."""
    count = Count(most)
    token = _current.set(count)
    try:
        yield count
    finally:
        _current.reset(token)


def current() -> Count | None:
    """Return what counts the passes of whoever asks; None where nothing does."""
    return _current.get()
