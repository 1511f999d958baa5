"""What evaluators need beside a judge: a client, a scorer, a live model. Whoever makes one without is told what to give."""

from __future__ import annotations

from typing import TypeVar

from exegete.tools.errors import UserError

T = TypeVar("T")


def required(evaluator: str, what: str, given: T | None, meaning: str) -> T:
    """Return `given`.

    Raises:
        UserError: it is None; the message names the option `what` and its `meaning`.
    """
    if given is None:
        raise UserError(f"evaluator {evaluator!r} needs {meaning}: make it with {what}=…")
    return given
