"""The three kinds of error, under one base.

`UserError` is for people: one line that quotes their input and names the way out; the command line prints it without a
traceback and exits with status 2. `ToolError` goes back to a language model that called a tool. Everything else is a bug
and crashes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ExegeteError(Exception):
    """Base of every error that Exegete raises on purpose."""


class UserError(ExegeteError):
    """The user can mend it. The message quotes what was given, says what was expected and names the way out."""


class ToolError(ExegeteError):
    """The language model that called the tool can mend it; the message goes back to it."""


class SealedSplitError(ExegeteError):
    """An explainer or an agent asked for windows of a split that is sealed to it (PROTOCOLS §1)."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the known word nearest to `word`, or an empty string where none is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
