"""`exegete` in processes that are forked from a warm one, and that kill themselves where they are told to.

1. `warm` starts this file as a process that imports the heavy libraries and opens the bundled subject with the dictionary of the
   tests, on one thread: that takes seconds, once.
2. For each order it forks. The child is a process of its own with everything that a command does in it; what it prints is kept
   in two files of the folder that it works in, and every call that a tool runs is a line of the file `ran` there.
3. An order may name a `Place`: before or after a method of the product, at which of its calls. There the child sends itself
   SIGKILL, so nothing of it is closed, flushed or told.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from importlib import import_module
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any, Literal

SUBJECT = ("--subject", "bundled", "--dictionary", "bundled:tests")
OWNERS = {
    "Inquiry": "exegete.agent.investigation.inquiry",
    "Ledger": "exegete.agent.investigation.ledger",
    "Toolbelt": "exegete.agent.investigation.toolbelt",
    "RunJournal": "exegete.tools.store.journal",
    "AsyncSqliteSaver": "langgraph.checkpoint.sqlite.aio",
    "": "exegete.agent.investigation.reporting",
}
"""Class → module; none for a function of the report's."""
FEWER_SETS = 40
"""Beside each claim: enough for two."""
_HEAVY = (
    *("openai", "anthropic", "exegete.agent.cli", "exegete.agent.investigation.graph"),
    *("exegete.agent.investigation.investigate", "exegete.agent.investigation.reporting"),
    *("exegete.agent.investigation.verifying", "exegete.agent.investigation.shared_model"),
)


@dataclass(frozen=True)
class Place:
    """Where a process kills itself."""

    owner: str
    method: str
    when: Literal["before", "after"] = "before"
    time: int = 1
    """At which call of it."""

    def __str__(self) -> str:
        return f"{self.when} {self.owner}.{self.method} {self.time}"


@dataclass(frozen=True)
class Ended:
    """What became of an order."""

    status: int
    """Exit status, or minus the signal."""
    stdout: str
    stderr: str


class Warm:
    """The process that forks."""

    def __init__(self, started: subprocess.Popen[str]) -> None:
        self._started = started

    def exegete(
        self,
        arguments: Sequence[str | Path],
        folder: Path,
        *,
        place: Place | None = None,
        environment: Mapping[str, str] = {},
    ) -> Ended:
        """Run `exegete ARGUMENTS` in a folder to its end, or to a place.

        Args:
            arguments: of the command line.
            folder: where it works.
            place: where it kills itself.
            environment: changed variables.
        """
        order = {
            "arguments": [str(one) for one in arguments],
            "folder": str(folder),
            "place": None if place is None else asdict(place),
            "environment": dict(environment),
        }
        assert self._started.stdin is not None and self._started.stdout is not None
        self._started.stdin.write(json.dumps(order) + "\n")
        self._started.stdin.flush()
        answer = self._started.stdout.readline()
        if not answer:
            raise RuntimeError(f"the warm process has ended: {self._started.wait()}")
        return Ended(json.loads(answer), (folder / "stdout").read_text(), (folder / "stderr").read_text())


@contextmanager
def warm() -> Iterator[Warm]:
    """Run the process that forks."""
    own = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **own},
    )
    try:
        yield Warm(started)
    finally:
        started.kill()
        started.communicate()


def ran(folder: Path) -> list[str]:
    """Return the ids of the calls that tools have run in a folder, in the order in which they began."""
    path = folder / "ran"
    return path.read_text().splitlines() if path.exists() else []


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    for name in _HEAVY:
        import_module(name)
    live = _warmed()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _run(json.loads(line), live)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _warmed() -> Any:
    """Return the live model, with the tools registered and what is slow the first time done."""
    from exegete.agent.investigation.toolbelt import every_tool
    from exegete.agent.live import Wanted, open_live
    from exegete.tools.controls import firing_rates

    every_tool()
    live = open_live(Wanted(subject=SUBJECT[1], dictionary=SUBJECT[3]))
    firing_rates(live.model, live.dictionary, [live.model.tokens("SELECT")])
    return live


def _run(order: Mapping[str, Any], live: Any) -> None:
    status = 1
    try:
        os.chdir(order["folder"])
        os.environ.update(order["environment"])
        _redirect()
        _prepare(order, live)
        from exegete.agent.cli import main

        sys.argv = ["exegete", *order["arguments"]]
        main()
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _redirect() -> None:
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, "stdout", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(name, flags, 0o644), number)


def _prepare(order: Mapping[str, Any], live: Any) -> None:
    from exegete.agent.investigation import investigate, toolbelt, verifying

    if "--store" not in order["arguments"]:
        # Nothing of it is changed by an investigation.
        investigate.open_live = lambda wanted: live  # type: ignore[attr-defined]
    verifying.RANDOM_SETS = FEWER_SETS
    _note_runs(toolbelt.Toolbelt)
    if order["place"] is not None:
        place = Place(**order["place"])
        _arm(place, import_module(OWNERS[place.owner]))


def _note_runs(kind: Any) -> None:
    run, alone = kind.run, threading.Lock()

    @wraps(run)
    def noting(tools: Any, call: Any) -> Any:
        # One at a time: what stands in a batch with a prompt changes its figures by rounding.
        with alone:
            with open("ran", "a") as file:
                file.write(f"{call.id}\n")
            return run(tools, call)

    kind.run = noting


def _arm(place: Place, module: Any) -> None:
    owner = getattr(module, place.owner) if place.owner else module
    original = getattr(owner, place.method)
    setattr(owner, place.method, _deadly(original, place))


def _deadly(original: Callable[..., Any], place: Place) -> Callable[..., Any]:
    calls: list[str] = []

    def reached(when: str) -> None:
        calls.append(when)
        if when == place.when and calls.count(when) == place.time:
            os.kill(os.getpid(), signal.SIGKILL)

    @wraps(original)
    def plain(*args: Any, **more: Any) -> Any:
        reached("before")
        found = original(*args, **more)
        reached("after")
        return found

    @wraps(original)
    async def awaiting(*args: Any, **more: Any) -> Any:
        reached("before")
        found = await original(*args, **more)
        reached("after")
        return found

    return awaiting if iscoroutinefunction(original) else plain


if __name__ == "__main__":
    _serve()
