"""Progress: a bar with an ETA on a terminal, plain lines elsewhere. Results and logs go to other places."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, Protocol

from exegete.tools.rendering import visible

LINE_EVERY_S = 10.0

Advance = Callable[[int], None]


class Progress(Protocol):
    """Where a run says how far it is."""

    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Any:
        """Return a context manager whose value is called with the number of units just finished."""
        ...

    def say(self, line: str) -> None:
        """Show one line that is worth keeping."""
        ...


class Lines:
    """Plain lines, at most one every ten seconds a stage: for logs, pipes and tests."""

    def __init__(self, stream: IO[str] | None = None, every_s: float = LINE_EVERY_S) -> None:
        """Write to `stream`, standard error where it is None."""
        self._stream = stream
        self._every_s = every_s

    def say(self, line: str) -> None:
        """Write one line."""
        stream = self._stream or sys.stderr
        stream.write(visible(line) + "\n")
        stream.flush()

    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """Report `total` units of work, of which `done` were finished earlier."""
        began = last = time.monotonic()
        finished = done

        def advance(count: int) -> None:
            nonlocal finished, last
            finished += count
            now = time.monotonic()
            if now - last >= self._every_s:
                last = now
                self.say(
                    f"{name}: {finished:,} of {total:,} {unit}{_pace(finished - done, total - finished, now - began)}"
                )

        yield advance
        self.say(f"{name}: {finished:,} of {total:,} {unit}, {time.monotonic() - began:.1f} s")


def _pace(finished: int, left: int, elapsed_s: float) -> str:
    if not finished or elapsed_s <= 0:
        return ""
    rate = finished / elapsed_s
    return f", {rate:,.1f} a second, {max(left, 0) / rate:,.0f} s to go"


class Bars:
    """Rich progress bars on a terminal."""

    def __init__(self) -> None:
        """Draw on standard error."""
        from rich.console import Console

        self._console = Console(stderr=True)

    def say(self, line: str) -> None:
        """Write one line above the bars."""
        self._console.print(visible(line), highlight=False, markup=False)

    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """Draw one bar with rate and ETA while the stage lasts, and leave one line behind."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self._console) as bars:
            task = bars.add_task(name, total=total, completed=done)
            yield lambda count: bars.advance(task, count)


def default_progress() -> Progress:
    """Return bars where standard error is a terminal, lines elsewhere."""
    return Bars() if sys.stderr.isatty() else Lines()
