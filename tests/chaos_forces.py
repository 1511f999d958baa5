"""What strikes a run in `chaos`: a clock that is set, a disk without room; and the process that suffers it."""

from __future__ import annotations

import ctypes
import datetime
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crashing import FORKS


@dataclass
class Clock:
    """The time of day as the run sees it; it can be set from here while the run goes on."""

    offset_s: Any = field(default_factory=lambda: FORKS.RawValue(ctypes.c_double, 0.0))
    asked: Any = field(default_factory=lambda: FORKS.RawValue(ctypes.c_long, 0))
    """How often a run has asked since it was set."""

    def set(self, offset_s: float) -> None:
        """Set it so many seconds beside the true time."""
        self.asked.value, self.offset_s.value = 0, offset_s


def label(arguments: list[str], log: Path, clock: Clock, limit_bytes: int | None) -> None:
    from crashing import _command

    _set_by(clock)
    if limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    _command(arguments, log)


def _set_by(clock: Clock) -> None:
    """Have this process take the time of day from `clock`; monotonic clocks go on as they are."""
    from exegete.agent import events, needs
    from exegete.tools.store import schema

    true_time, true_datetime = time.time, datetime.datetime

    def offset_s() -> float:
        clock.asked.value += 1
        return float(clock.offset_s.value)

    class Told(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return true_datetime.now(tz) + datetime.timedelta(seconds=offset_s())

    time.time = lambda: true_time() + offset_s()
    for module in (schema, events, needs):
        module.datetime = Told  # type: ignore[attr-defined]


def state(pid: int | None) -> str:
    """Return the state of a process as the kernel names it: T where it is stopped; nothing where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def waits(until: Callable[[], bool], most_s: float) -> bool:
    deadline = time.monotonic() + most_s
    while time.monotonic() < deadline:
        if until():
            return True
        time.sleep(0.02)
    return until()


def mounts(folder: Path, mib: int) -> bool:
    """Mount a small file system at `folder`; return whether that is allowed here."""
    if sys.platform != "linux":
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "exegete-chaos", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def ballast(room: Path, left_bytes: int) -> None:
    """Fill the file system of `room`, but for some bytes."""
    block = bytes(65_536)
    with (room / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(block)
        except OSError:
            pass
        file.truncate(max(0, file.tell() - left_bytes))


def size(store: Path) -> int:
    """Return a size that the journal's log soon goes beyond."""
    return 65_536 + (store / "journal.sqlite").stat().st_size // 64 if (store / "journal.sqlite").exists() else 65_536
