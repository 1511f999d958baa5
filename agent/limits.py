"""Until when a run goes on: hours from its start, or a time of day.

1. The time of day is turned into seconds from now once, by the local clock, when the run starts; from then on only the
   monotonic clock counts. A wall clock that is set or jumps neither ends a run nor prolongs it.
2. After the deadline no latent enters any more and no slice of a pass begins; what is in flight is finished and written. The
   run ends as one that was interrupted, and the same command goes on with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from exegete.agent.config import LabelConfig

Clock = Callable[[], float]


@dataclass(frozen=True)
class Deadline:
    """When a run stops taking new latents."""

    at_s: float
    """On `clock`."""
    limit: str
    """The setting that says so, for example `label.hours = 14`."""
    clock: Clock = time.monotonic

    def reached(self) -> bool:
        """Return whether it is time."""
        return self.clock() >= self.at_s

    def left_s(self) -> float:
        """Return the seconds until then, 0 once it is over."""
        return max(0.0, self.at_s - self.clock())

    def message(self) -> str:
        """Return what a run says that has ended because of it."""
        return f"stopped by {self.limit}: what was in flight is finished and written"


def deadline_of(
    label: LabelConfig, clock: Clock = time.monotonic, now: Callable[[], datetime] = datetime.now
) -> Deadline | None:
    """Return the deadline of a run that starts now: the earlier one of `hours` and `until`; None where neither is set."""
    found = []
    if label.hours is not None:
        found.append(Deadline(clock() + 3600 * label.hours, f"label.hours = {label.hours:g}", clock))
    if label.until is not None:
        found.append(Deadline(clock() + seconds_until(label.until, now()), f"label.until = {label.until}", clock))
    return min(found, key=lambda one: one.at_s, default=None)


def seconds_until(time_of_day: str, now: datetime) -> float:
    """Return the seconds from `now`, local time without a zone, until the next `HH:MM`; more than 0, at most 25 hours."""
    hour, minute = map(int, time_of_day.split(":"))
    then = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    if then <= now:
        then += timedelta(days=1)
    # As moments, so that a night in which the clocks change has its own length.
    return then.timestamp() - now.timestamp()


def stops(stop: Callable[[], bool], deadline: Deadline | None) -> Callable[[], bool]:
    """Return what says when to stop: `stop` itself, or the deadline."""
    return stop if deadline is None else lambda: stop() or deadline.reached()
