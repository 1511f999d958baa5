"""The end of a run on the command line: its report is written, and the command that the user gave is run.

1. However the run ends (finished, asked to stop, halted, failed), as long as Python sees it, `report.md` is written into the
   store, unless the run never began.
2. `--on-finish COMMAND` is then run by the shell, with what there is to know in its environment: EXEGETE_STORE,
   EXEGETE_STATUS (`finished`, `calls_missing`, `interrupted`, `halted`, `failed`), EXEGETE_EXIT (the exit status to come) and
   EXEGETE_SUMMARY (a JSON file with the figures, as `exegete status --format json`; empty where none could be written).
3. It has a minute, after which it is killed with everything that it started. That it failed or hung is said; the exit status of
   the run stays what it was.

The command comes from the command line alone. It is no key of the configuration, so neither a configuration file nor a store
that somebody else made can bring one along.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from exegete.tools.errors import UserError
from exegete.tools.rendering import visible

Status = Literal["finished", "calls_missing", "interrupted", "halted", "failed"]
Say = Callable[[str], None]

TIMEOUT_S = 60.0
SUMMARY = "summary.json"
REPORT = "report.md"
_BY_EXIT: dict[int, Status] = {0: "finished", 3: "calls_missing", 130: "interrupted"}


@contextmanager
def finishing(command: str | None, store: Path, say: Say, timeout_s: float = TIMEOUT_S) -> Iterator[None]:
    """Write the report of the run within this context when it ends, then run `command`; what goes wrong there is said."""
    ended: tuple[Status, int] = "finished", 0
    try:
        yield
    except BaseException as error:
        ended = how_it_ended(error)
        raise
    finally:
        _write_report(store, say)
        if command is not None:
            run_command(command, store, *ended, say, timeout_s)


def how_it_ended(error: BaseException) -> tuple[Status, int]:
    """Return what an exception that leaves a run means, and the exit status that the command line makes of it."""
    exit_code = getattr(error, "exit_code", None)  # Of typer's Exit.
    if isinstance(exit_code, int):
        return _BY_EXIT.get(exit_code, "failed"), exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, UserError):
        return "halted", 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "halted", 2
    return "failed", 141 if isinstance(error, BrokenPipeError) else 1


def run_command(
    command: str, store: Path, status: Status, exit_code: int, say: Say, timeout_s: float = TIMEOUT_S
) -> None:
    """Run the user's command by the shell, its output on standard error; say where it fails or takes too long."""
    told = {
        "EXEGETE_STORE": str(store.resolve()),
        "EXEGETE_STATUS": status,
        "EXEGETE_EXIT": str(exit_code),
        "EXEGETE_SUMMARY": _summary(store, status, exit_code, say),
    }
    try:
        child = subprocess.Popen(
            command, shell=True, env=os.environ | told, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True
        )
    except OSError as error:
        return say(f"--on-finish {visible(command)!r} could not be started: {error.strerror or error}")
    try:
        returned = child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return say(f"--on-finish {visible(command)!r} took longer than {timeout_s:g} s and was killed")
    finally:
        _kill(child)
    if returned:
        say(f"--on-finish {visible(command)!r} ended with status {returned}")


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill the command and what it started, if it is still there: its session is its own."""
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _summary(store: Path, status: Status, exit_code: int, say: Say) -> str:
    """Write the figures as JSON into the store; return the file's path, empty where that cannot be."""
    from exegete.agent.inspection import store_status

    try:
        found = {"status": status, "exit": exit_code, **asdict(store_status(store))}
        return str(_written(store.resolve() / SUMMARY, json.dumps(found, indent=2) + "\n"))
    except Exception as error:  # As with the report.
        say(f"no summary of the run could be written: {visible(str(error))}")
        return ""


def _write_report(store: Path, say: Say) -> None:
    from exegete.agent.final_report import final_report
    from exegete.agent.needs import last_session

    try:
        session = last_session(store)
        if session is None or session.pid != os.getpid():
            return  # The run never began, or another process is the one that writes.
        _written(store / REPORT, final_report(store))
    except Exception as error:  # Whatever it is, it must not stand in the place of how the run ended.
        say(f"no report of the run could be written: {visible(str(error))}")


def _written(path: Path, text: str) -> Path:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return path
