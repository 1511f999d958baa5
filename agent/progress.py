"""Progress: a live display on a terminal, one output that changes in a notebook, plain lines elsewhere.

1. `stage` reports work as it is done, `say` one line that is worth keeping. Results and logs go to other places.
2. A display that was given the run's vital signs (`watch`) shows them with every stage: calls, failures, spending, scores.
3. What is drawn follows the clock, not the work: a terminal is redrawn four times a second, a log gets a line every ten
   seconds a stage and the running scores once a minute, and `beat`, which comes every half minute, shows that a run which waits
   for answers still lives.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Protocol, runtime_checkable

from exegete.agent.vital_lines import facts, score_lines, stage_text, work_lines
from exegete.agent.vitals import Vitals
from exegete.tools.rendering import visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

LINE_EVERY_S = 10.0
SCORES_EVERY_S = 60.0
BEATS_LATE = 6
"""So many times the usual wait without a line, and a beat writes one."""
DRAWN_PER_S = 4.0
NOTEBOOK_EVERY_S = 1.0
NOTEBOOK_LINES = 200

Advance = Callable[[int], None]
Clock = Callable[[], float]


class Progress(Protocol):
    """Where a run says how far it is."""

    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Any:
        """Return a context manager whose value is called with the number of units just finished."""
        ...

    def say(self, line: str) -> None:
        """Show one line that is worth keeping."""
        ...


@runtime_checkable
class Display(Progress, Protocol):
    """A progress that can show vital signs."""

    def watch(self, vitals: Vitals) -> None:
        """From now on show calls, spending and scores of `vitals` as well."""
        ...

    def beat(self) -> None:
        """Some time has passed, with or without work done."""
        ...


class Lines:
    """Plain lines, at most one every ten seconds a stage: for logs, pipes and tests."""

    def __init__(
        self, stream: IO[str] | None = None, every_s: float = LINE_EVERY_S, clock: Clock = time.monotonic
    ) -> None:
        """Write to `stream`, standard error where it is None."""
        self._stream = stream
        self._every_s = every_s
        self._clock = clock
        self._stages = Vitals(clock)
        self._vitals: Vitals | None = None
        self._told_at = clock()
        self._scores_at = -SCORES_EVERY_S

    def watch(self, vitals: Vitals) -> None:
        """From now on end lines with calls and spending, and once a minute follow them with the scores so far."""
        self._vitals = vitals

    def say(self, line: str) -> None:
        """Write one line."""
        stream = self._stream or sys.stderr
        stream.write(visible(line) + "\n")
        stream.flush()

    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """Report `total` units of work, of which `done` were finished earlier."""
        with _stage(self._stages, name, total, unit, done, self.say):
            self._told_at = self._clock()
            yield self._advance

    def beat(self) -> None:
        """Write a line where there has been none for long, although a stage is open."""
        self._tell(BEATS_LATE * self._every_s)

    def _advance(self, count: int) -> None:
        self._stages.advanced(count)
        self._tell(self._every_s)

    def _tell(self, after_s: float) -> None:
        now = self._clock()
        stage = self._stages.snapshot().stage
        if stage is not None and now - self._told_at >= after_s:
            self._told_at = now
            seen = None if self._vitals is None else self._vitals.glance()
            self.say("; ".join([stage_text(stage), *([] if seen is None else work_lines(seen))]))
            if seen is not None and seen.scores and now - self._scores_at >= SCORES_EVERY_S:
                self._scores_at = now
                for line in score_lines(seen.scores):
                    self.say(f"  {line}")


class Quiet(Lines):
    """Says what is worth keeping, and nothing of how far a stage is."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """Show nothing."""
        yield lambda count: None

    def beat(self) -> None:
        """Show nothing."""


class Bars:
    """A live display on a terminal: the bar of the stage that goes on, and below it the vital signs."""

    def __init__(self, console: Console | None = None, clock: Clock = time.monotonic) -> None:
        """Draw on `console`, standard error where it is None."""
        from rich.console import Console

        self._console = console or Console(stderr=True)
        self._stages = Vitals(clock)
        self._vitals: Vitals | None = None
        self._live = 0

    def watch(self, vitals: Vitals) -> None:
        """From now on draw calls, spending and scores below the bar."""
        self._vitals = vitals

    def say(self, line: str) -> None:
        """Write one line above the display."""
        self._console.print(visible(line), highlight=False, markup=False)

    def beat(self) -> None:
        """Do nothing: the display draws itself."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """Draw while the stage lasts, and leave one line behind."""
        with self._drawn(), _stage(self._stages, name, total, unit, done, self.say):
            yield self._stages.advanced

    @contextmanager
    def _drawn(self) -> Iterator[None]:
        from rich.live import Live

        if self._live:  # A stage within a stage takes its place on the display.
            yield
            return
        live = Live(get_renderable=self.drawing, console=self._console, refresh_per_second=DRAWN_PER_S, transient=True)
        self._live += 1
        try:
            with live:
                yield
        finally:
            self._live -= 1

    def drawing(self) -> RenderableType:
        """Return what the display shows at this moment."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        stage = self._stages.glance().stage
        if stage is None:
            return Text()
        told = visible(stage_text(stage)).removeprefix(f"{visible(stage.name)}: ")
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            Text(visible(stage.name)),
            ProgressBar(total=max(1, stage.total), completed=stage.done, width=30),
            Text(told, overflow="ellipsis"),
        )
        return Group(grid, *(Text(f"  {visible(line)}", overflow="ellipsis") for line in _facts(self._vitals)))


class Notebook:
    """One output of a notebook's cell that changes in place, at most once a second."""

    def __init__(self, display: Callable[..., Any], clock: Clock = time.monotonic) -> None:
        """Show with `display`, as `IPython.display.display`."""
        self._display = display
        self._shown: Any = None
        self._clock = clock
        self._shown_at = -NOTEBOOK_EVERY_S
        self._kept: list[str] = []
        self._stages = Vitals(clock)
        self._vitals: Vitals | None = None

    def watch(self, vitals: Vitals) -> None:
        """From now on show calls, spending and scores as well."""
        self._vitals = vitals

    def say(self, line: str) -> None:
        """Add one line to the output."""
        self._kept = [*self._kept, visible(line)][-NOTEBOOK_LINES:]
        self._show()

    def beat(self) -> None:
        """Show how it stands now."""
        self._show()

    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """Show the stage below what has been said."""
        with _stage(self._stages, name, total, unit, done, self.say):
            yield self._advance

    def _advance(self, count: int) -> None:
        self._stages.advanced(count)
        if self._clock() - self._shown_at >= NOTEBOOK_EVERY_S:
            self._show()

    def _show(self) -> None:
        self._shown_at = self._clock()
        stage = self._stages.snapshot().stage
        going_on = [] if stage is None else [stage_text(stage), *_facts(self._vitals)]
        told = {"text/plain": "\n".join([*self._kept, *map(visible, going_on)])}
        if self._shown is None:
            self._shown = self._display(told, raw=True, display_id=True)
        else:
            self._shown.update(told, raw=True)


def default_progress(quiet: bool = False) -> Display:
    """Return a live display where standard error is a terminal or the run is in a notebook, lines elsewhere.

    `quiet`: whatever there is, show only what is worth keeping.
    """
    if quiet:
        return Quiet()
    display = _notebook_display()
    if display is not None:
        return Notebook(display)
    can_draw = sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
    return Bars() if can_draw else Lines()


@contextmanager
def _stage(stages: Vitals, name: str, total: int, unit: str, done: int, say: Callable[[str], None]) -> Iterator[None]:
    """Count a stage in `stages`; say how it ended, unless it was broken off."""
    stages.stage_begun(name, total, unit, done)
    try:
        yield
    except BaseException:
        stages.stage_ended()
        raise
    ended = stages.stage_ended()
    if ended is not None:
        say(f"{name}: {ended.done:,} of {total:,} {unit}, {ended.elapsed_s:.1f} s")


def _facts(vitals: Vitals | None) -> list[str]:
    return [] if vitals is None else facts(vitals.glance())


def _notebook_display() -> Callable[..., Any] | None:
    """Return IPython's `display` where this is the kernel of a notebook, which has loaded IPython; None elsewhere."""
    loaded = sys.modules.get("IPython")
    shell = loaded.get_ipython() if loaded is not None and hasattr(loaded, "get_ipython") else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    from importlib import import_module

    display: Callable[..., Any] = import_module("IPython.display").display
    return display
