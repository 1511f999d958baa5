"""The event log of a store: `events.jsonl`, one JSON object a line, so that anybody can follow a run without opening its files.

1. The process that writes the store appends to it, a line in one write; nobody else does. Every line has `time` (UTC, ISO 8601),
   `run` (null where an event belongs to none) and `event`, and beside them the fields of that event:

       begun        pid, version                       a process has begun to write
       run_begun    dictionary, latents, explainer, judge, models, budget_usd
       stage_begun  stage, done, total, unit
       stage_ended  stage, done, total, unit, seconds, complete
       progress     vitals (`exegete.agent.vitals.Snapshot`)          every half minute
       calls_failed failed (status → calls since this was last told)  at most every half minute
       published    seconds                            a snapshot
       finished     missing (dictionary → latents about which calls failed)
       interrupted  reason                             asked to stop: by a signal, or by a limit in time
       halted       reason, told                       no call can succeed until something is mended (`reason_of`)
       failed       reason, error                      a bug, or a full disk; the class of the error
       dropped      count                              so many events before this one could not be written

   A process that was killed leaves none of the last four after its `begun`.
2. What a language model was asked or said, keys and corpus text never stand here: fields are fixed, texts are short, and of a
   provider's message only what kind it is.
3. It is bounded: a file of two megabytes becomes `events.1.jsonl`, in the place of the one before.
4. A line that a kill tore is ended by the next append, and readers leave it out. A disk that is full costs events, not the run:
   that is said once, and how many were lost stands in the log as soon as there is room.
It is not fsynced: a power cut may take the last seconds of it, which the store itself does not lose.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from exegete.agent.vital_lines import facts, stage_text
from exegete.agent.vitals import Snapshot
from exegete.tools.rendering import visible

EVENTS = "events.jsonl"
FORMER = "events.1.jsonl"
MAX_BYTES = 2 << 20
TEXT_CHARS = 300

FIELDS: Mapping[str, frozenset[str]] = {
    "begun": frozenset({"pid", "version"}),
    "run_begun": frozenset({"dictionary", "latents", "explainer", "judge", "models", "budget_usd"}),
    "stage_begun": frozenset({"stage", "done", "total", "unit"}),
    "stage_ended": frozenset({"stage", "done", "total", "unit", "seconds", "complete"}),
    "progress": frozenset({"vitals"}),
    "calls_failed": frozenset({"failed"}),
    "published": frozenset({"seconds"}),
    "finished": frozenset({"missing"}),
    "interrupted": frozenset({"reason"}),
    "halted": frozenset({"reason", "told"}),
    "failed": frozenset({"reason", "error"}),
    "dropped": frozenset({"count"}),
}
"""Event → its fields."""
ENDS = ("finished", "interrupted", "halted", "failed")
"""Events that a process ends with, unless it is killed."""


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the log."""

    time: datetime
    run: str | None
    event: str
    fields: Mapping[str, Any]
    """As they stand in the file: whoever wrote it, so look before you use one."""


class EventLog:
    """Appends to the log of one store; may be used from any thread."""

    def __init__(
        self,
        folder: Path,
        said: Callable[[str], None] = lambda line: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Write below `folder`; tell `said` where events begin to be lost."""
        self._path = folder / EVENTS
        self._former = folder / FORMER
        self._said = said
        self._now = now
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._file: int | None = None
        self._size = 0
        self._torn = False
        self._lost = 0

    def write(self, event: str, run: str | None = None, **fields: Any) -> None:
        """Append one event.

        Raises:
            ValueError: the event or one of its fields is none of the schema.
        """
        if event not in FIELDS or not fields.keys() <= FIELDS[event]:
            raise ValueError(f"event {event!r} with {sorted(fields)}: none of the schema in {__name__}")
        with self._lock:
            if self._lost and self._append("dropped", None, {"count": self._lost}):
                self._lost = 0
            if self._lost or not self._append(event, run, fields):
                self._lost += 1

    def close(self) -> None:
        """Give the file back."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
            self._file = None

    def _append(self, event: str, run: str | None, fields: Mapping[str, Any]) -> bool:
        """Write one line; return whether it stands there whole."""
        known = {"time": self._now().isoformat(timespec="milliseconds"), "run": run, "event": event}
        line = (json.dumps({**known, **{key: _short(value) for key, value in fields.items()}}) + "\n").encode()
        try:
            file = self._opened(len(line))
            line = b"\n" + line if self._torn else line
            written = os.write(file, line)
        except OSError as error:
            self._lose(error)
            return False
        self._size += written
        self._torn = written < len(line)
        if self._torn:
            self._lose(OSError("no room left"))
        return not self._torn

    def _opened(self, coming: int) -> int:
        """Return the file with room for so many bytes more, after the former one was put aside where need be."""
        if self._file is not None and self._size + coming > self._max_bytes and self._size:
            os.close(self._file)
            self._file = None
            os.replace(self._path, self._former)
        if self._file is None:
            # A link in a store that came from elsewhere must not have us write into another file.
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = os.open(self._path, flags, 0o644)
            self._size = os.fstat(self._file).st_size
            self._torn = self._size > 0 and os.pread(self._file, 1, self._size - 1) != b"\n"
        return self._file

    def _lose(self, error: OSError) -> None:
        if not self._lost:
            self._said(f"events cannot be written to {str(self._path)!r} ({error.strerror or error}); the run goes on")


def read_events(folder: Path) -> Iterator[Event]:
    """Yield the events of the store in `folder`, oldest first; lines that are none (torn, damaged) are left out."""
    file, former = _opened_or_none(folder / EVENTS), _opened_or_none(folder / FORMER)
    if file and former and os.path.samestat(os.fstat(file.fileno()), os.fstat(former.fileno())):
        former.close()  # It was put aside between the two.
        former = None
    yield from _events_of(former)
    yield from _events_of(file)


def parsed(line: str) -> Event | None:
    """Return the event that a line holds, None where it holds none."""
    try:
        fields = json.loads(line)
        time, event, run = datetime.fromisoformat(fields.pop("time")), fields.pop("event"), fields.pop("run", None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(event, str) or not (run is None or isinstance(run, str)) or time.tzinfo is None:
        return None
    return Event(time, run, event, fields)


def follow(folder: Path, wait: Callable[[], object]) -> Iterator[Event]:
    """Yield the log's events, and for ever those that are appended; `wait` is called before each further look."""
    yield from _events_of(_opened_or_none(folder / FORMER))
    path, file, torn = folder / EVENTS, None, b""
    while True:
        replaced = file is not None and _is_other(file, path)  # Asked first: what was written before is read below.
        file = file or _opened_or_none(path)
        for line in iter(file.readline, b"") if file else ():
            torn += line
            if line.endswith(b"\n"):
                event, torn = parsed(torn.decode(errors="replace")), b""
                yield from [event] if event else []
        if replaced and file is not None:
            file.close()
            file, torn = None, b""
        else:
            wait()


def line_of(event: Event) -> str:
    """Return an event as one line for a terminal."""
    vitals = vitals_of(event)
    if vitals is not None:
        stage = stage_text(vitals.stage) if vitals.stage else "between two stages"
        return visible(f"{event.time:%Y-%m-%d %H:%M:%S} {event.event} {'; '.join([stage, *facts(vitals)])}")
    told = ", ".join(f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in event.fields.items())
    return visible(f"{event.time:%Y-%m-%d %H:%M:%S} {event.event} {told}".rstrip())


def vitals_of(event: Event) -> Snapshot | None:
    """Return the vital signs that an event tells; None where it tells none, or what it tells has another form."""
    from pydantic import TypeAdapter, ValidationError

    if "vitals" not in event.fields:
        return None
    try:
        return TypeAdapter(Snapshot).validate_python(event.fields["vitals"])
    except ValidationError:
        return None


def _short(value: Any) -> Any:
    return visible(value[:TEXT_CHARS]) if isinstance(value, str) else value


def _events_of(file: BinaryIO | None) -> Iterator[Event]:
    if file is not None:
        with file:
            yield from filter(None, (parsed(line.decode(errors="replace")) for line in file))


def _opened_or_none(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None


def _is_other(file: BinaryIO, path: Path) -> bool:
    """Return whether `path` has become another file than the one that is open, or none."""
    try:
        return not os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return True
