"""What the event log says of the process that wrote a store last: how it stands, how it ended, what the run needs to go on.

1. The session is what stands in the log from the newest `begun` on. While its process writes, the newest vital signs in it
   are those of now; how old they are is said.
2. Otherwise its last event says how it ended; where there is none of those, it was killed.
3. What is read comes from a file that anybody may have written: whatever does not have the form it should is taken as not there.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from exegete.agent.events import ENDS, Event, read_events, vitals_of
from exegete.agent.run_facts import RunFacts
from exegete.agent.vitals import Snapshot

State = Literal[
    "empty", "running", "finished", "calls_missing", "stopped", "budget", "halted", "failed", "killed", "interrupted"
]


@dataclass(frozen=True, slots=True)
class Need:
    """How the newest run of a store stands, and what it needs."""

    state: State
    """`stopped`: on request; `interrupted`: it is not known by what."""
    told: str
    """In words."""
    command: str | None = None
    """What goes on with it; None where there is nothing to do."""

    def line(self) -> str:
        """Return it as one line for a terminal."""
        return f"state: {self.told}" + (f"; go on: {self.command}" if self.command else "")


@dataclass(frozen=True, slots=True)
class Session:
    """What the log says of the process that wrote a store last."""

    pid: int | None
    end: Event | None
    """None while it goes on, and where it was killed."""
    vitals: Snapshot | None
    """The newest."""
    vitals_at: datetime | None

    def age_s(self, now: datetime | None = None) -> float | None:
        """Return how old the vital signs are, in seconds."""
        return (
            None if self.vitals_at is None else max(0.0, ((now or datetime.now(UTC)) - self.vitals_at).total_seconds())
        )


def last_session(folder: Path) -> Session | None:
    """Return the newest session in the log of the store in `folder`; None where there is none."""
    began: Event | None = None
    newest: dict[str, Event] = {}
    for event in read_events(folder):
        if event.event == "begun":
            began, newest = event, {}
        else:
            newest["end" if event.event in ENDS else event.event] = event
    if began is None and not newest:
        return None
    pid = began.fields.get("pid") if began else None
    beat = newest.get("progress")
    vitals = vitals_of(beat) if beat else None
    return Session(
        pid if isinstance(pid, int) else None, newest.get("end"), vitals, beat.time if beat and vitals else None
    )


def need_of(store: Path, pid: int | None, newest: RunFacts | None, session: Session | None) -> Need:
    """Return what the run that was begun last needs; `pid`: the process that is writing the store."""
    resume = f"exegete resume --store {shlex.quote(str(store))}"
    if pid is not None:
        return Need("running", f"process {pid} is at work")
    end = session.end if session else None
    if end is not None and end.event in ("halted", "failed"):
        return _broken_off(end, session, resume)
    if newest is None:
        return Need("empty", "no run yet", f"exegete label --store {shlex.quote(str(store))}")
    if newest.status == "finished":
        if newest.missing:
            return Need("calls_missing", f"finished, but {newest.missing:,} latents miss calls that failed", resume)
        return Need("finished", "finished")
    if session is None:
        return Need("interrupted", "interrupted", resume)
    if end is None:
        return Need("killed", "its process ended without a word: it was killed, or the machine went down", resume)
    if end.event == "interrupted":
        late = _text(end.fields, "reason") == "deadline"
        return Need("stopped", "stopped at its limit in time" if late else "stopped on request", resume)
    return Need("interrupted", "interrupted", resume)


_MENDED: Mapping[str, str] = {
    "key": "a server does not take its key: set the right one",
    "permission": "a key has no permission for its model: get it, or name another model",
    "quota": "a provider asks for payment or quota: see to it",
    "model": "a server does not know the model or the address: look at both",
    "disk": "there was no room left to write: free some space",
}


def _broken_off(end: Event, session: Session | None, resume: str) -> Need:
    reason, error = _text(end.fields, "reason"), _text(end.fields, "error")
    if reason == "budget":
        return _beyond_budget(session, _text(end.fields, "told"), resume)
    if reason in _MENDED:
        return Need("halted", f"halted: {_MENDED[reason]}", resume)
    if end.event == "halted":
        return Need("halted", "halted: what it printed last says by what; mend that", resume)
    return Need("failed", f"failed with {error or 'an error'}: what it printed last says where", resume)


def _beyond_budget(session: Session | None, told: str, resume: str) -> Need:
    budget = session.vitals.budget if session and session.vitals else None
    if budget is not None and budget.max_tokens is not None and "--budget-tokens" in told:
        more = f"{resume} --budget-tokens {2 * budget.max_tokens:.0f}"
        return Need("budget", f"stopped at its budget of {budget.max_tokens:,.0f} tokens", more)
    if budget is not None and budget.max_usd is not None:
        told = f"stopped at its budget of {budget.max_usd:,.2f} USD, of which {budget.spent_usd:,.2f} USD are spent"
        return Need("budget", told, f"{resume} --budget {2 * budget.max_usd:g}")
    return Need("budget", "stopped at its budget", f"{resume} --budget USD")


def _text(fields: Mapping[str, object], name: str) -> str:
    found = fields.get(name)
    return found if isinstance(found, str) else ""
