"""A progress that outlives its output: a night must not end because a terminal, a pipe or the disk behind a log has gone.

Whatever a display cannot write is lost; the first loss is logged, and the run goes on. `exegete status` and the event log still
tell how it stands. Everything else that is raised, by the work or by the display, is raised here as well.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from exegete.agent.progress import Advance, Display, Progress

if TYPE_CHECKING:
    from exegete.agent.vitals import Vitals

log = logging.getLogger(__name__)
_GONE = (OSError, ValueError)
"""Raised by an output that has gone; the latter by one that was closed."""


class SurvivingDisplay:
    """Shows on another display for as long as that can be written to."""

    def __init__(self, display: Progress) -> None:
        """Show on `display`."""
        self._display = display
        self._lost = False

    def say(self, line: str) -> None:
        """Show one line that is worth keeping."""
        self._try(lambda: self._display.say(line))

    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """Show a stage."""
        shown = self._display.stage(name, total, unit, done=done)
        advances: list[Advance] = []
        self._try(lambda: advances.append(shown.__enter__()))
        try:
            yield lambda count: self._try(lambda: [advance(count) for advance in advances])
        except BaseException:
            broken_off_by = sys.exc_info()
            if advances:
                self._try(lambda: shown.__exit__(*broken_off_by))
            raise
        if advances:
            self._try(lambda: shown.__exit__(None, None, None))

    def watch(self, vitals: Vitals) -> None:
        """From now on show vital signs as well, where the display can."""
        if isinstance(self._display, Display):
            self._display.watch(vitals)

    def beat(self) -> None:
        """Some time has passed."""
        if isinstance(self._display, Display):
            self._try(self._display.beat)

    def _try(self, show: Callable[[], object]) -> None:
        try:
            show()
        except _GONE as error:
            if not self._lost:
                log.warning("the progress of the run cannot be shown any more (%s); the run goes on", error)
            self._lost = True
