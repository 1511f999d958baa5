"""What the calls about one latent came to: how many, how dear, and how many never got an answer.

Whoever works on a latent does so within `tallied`; every call that it makes there, in whatever task, is noted. A reply counts
with what it has cost when it was paid for, also where the journal gave it now, so that figures do not depend on crashes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exegete.tools.llm import Reply


@dataclass(frozen=True, slots=True)
class Spent:
    """Calls to language models and what they cost."""

    calls: int = 0
    tokens: int = 0
    """Input and output."""
    pico_usd: int = 0
    """Whole, since replies come in any order, and a sum of floats would differ in its last bits."""

    @property
    def usd(self) -> float:
        """The cost in US dollars."""
        return self.pico_usd / 1e12

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.calls + other.calls, self.tokens + other.tokens, self.pico_usd + other.pico_usd)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.calls - other.calls, self.tokens - other.tokens, self.pico_usd - other.pico_usd)


NOTHING = Spent()


@dataclass
class Tally:
    """What became of the calls about one latent."""

    missing: int = 0
    """Calls that failed for good at the provider, and may be asked again."""
    spent: Spent = NOTHING


_tally: ContextVar[Tally | None] = ContextVar("tally", default=None)


@contextmanager
def tallied() -> Iterator[Tally]:
    """Count the calls made in this context, and in the tasks that it starts."""
    tally = Tally()
    token = _tally.set(tally)
    try:
        yield tally
    finally:
        _tally.reset(token)


def note(reply: Reply) -> None:
    """Note the reply of a call for the latent that it is about."""
    tally = _tally.get()
    if tally is None:
        return
    tally.missing += reply.status in ("error", "unknown")
    usage = reply.usage + reply.known_usage
    tokens = usage.input_tokens + usage.output_tokens
    tally.spent += Spent(1, tokens, round((reply.usd + reply.known_usd) * 1e12))


def spent_so_far() -> Spent:
    """Return what the calls of this context have cost so far; nothing outside of `tallied`."""
    tally = _tally.get()
    return NOTHING if tally is None else tally.spent
