"""The log of everything that was asked: what proves that nothing was asked twice."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(slots=True)
class Entry:
    """One request: an HTTP exchange, or one line of a batch."""

    number: int
    at: float
    """Seconds since the log began."""
    route: str
    """completions, batch_lines, batches, files, polls, downloads, models."""
    path: str
    model: str = ""
    question: str = ""
    """Digest of the prompt and of everything else in the body."""
    custom_id: str = ""
    status: int = 0
    fault: str = ""
    tokens: int = 0
    """Tokens that it is billed with, input and output, whether or not the answer arrived."""
    answered: bool = False
    """Whether a sound answer went out whole."""
    again: bool = False
    """Whether the question had been answered before it was asked."""
    body: Any = None


@dataclass
class Log:
    """All requests since the last reset."""

    keep_bodies: bool = True
    entries: list[Entry] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    answered: set[str] = field(default_factory=set)
    """Questions that have had a sound answer."""
    in_flight: int = 0
    most_in_flight: int = 0

    def enter(self, route: str, path: str) -> Entry:
        """Note a request that has come in."""
        entry = Entry(len(self.entries) + 1, round(time.monotonic() - self.began, 6), route, path)
        self.entries.append(entry)
        return entry

    def begin(self) -> None:
        """Note that a live question is being answered."""
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

    def end(self) -> None:
        """Note that its reply went out, or its connection is gone."""
        self.in_flight -= 1

    def asked(self, entry: Entry, model: str, question: str, body: Any) -> None:
        """Note what a request asks."""
        entry.model, entry.question, entry.again = model, question, question in self.answered
        if self.keep_bodies and entry.route == "completions":
            entry.body = body

    def given(self, entry: Entry, whole: bool) -> None:
        """Note that the reply went out, whole or not; a faultless answer that did counts as answered."""
        entry.answered = whole and entry.status == 200 and entry.fault in ("", "drip")
        if entry.answered and entry.question:
            self.answered.add(entry.question)

    def counts(self) -> dict[str, Any]:
        """Return what happened in figures."""
        questions = [e for e in self.entries if e.question]
        asked = Counter(e.question for e in questions)
        return {
            "requests": len(self.entries),
            "by_route": dict(Counter(e.route for e in self.entries)),
            "by_status": {str(status): n for status, n in Counter(e.status for e in self.entries).items()},
            "by_fault": dict(Counter(e.fault for e in self.entries if e.fault)),
            "questions": len(asked),
            "answered": len(self.answered),
            "tokens": sum(e.tokens for e in questions),
            "asked_again": sum(e.again for e in questions),
            "most_asked": max(asked.values(), default=0),
            "most_in_flight": self.most_in_flight,
            "cpu_s": time.process_time(),
        }

    def rows(self, bodies: bool) -> list[dict[str, Any]]:
        """Return the entries as plain values."""
        names = [f.name for f in fields(Entry) if bodies or f.name != "body"]
        return [{name: getattr(entry, name) for name in names} for entry in self.entries]
