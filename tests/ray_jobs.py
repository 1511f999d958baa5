"""Work for Ray's workers in tests: in a module that they can import."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from exegete.tools.errors import UserError


def doubling(marks: str) -> Callable[[int], int]:
    """Double numbers. Number 3 kills its worker the first time; 7 always; 9 is a UserError, 11 a bug."""

    def double(number: int) -> int:
        if number == 3 and not (Path(marks) / "killed").exists():
            (Path(marks) / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 9:
            raise UserError("nine is no number")
        if number == 11:
            raise ZeroDivisionError("eleven by zero")
        (Path(marks) / f"done-{number}").touch()
        return 2 * number

    return double
