"""Workers: other processes, here or on other machines, that do pieces of a run's work and leave the rest to this one.

1. `ray` is a local Ray cluster with as many workers as there is room for, `ray:2` one with two, `ray://HOST:PORT` a
   cluster that is there already.
2. A `Job` says how a worker makes itself ready: a function that can be imported there, and plain arguments – paths and
   configuration, never a model. What it returns is called with one task after another.
3. For the slices of an activation pass (`slicer`) what is done goes through the pass's folder, which must be on storage
   that all share: before its first slice each worker must find there what this process has just written.

Who does a task changes nothing of what comes out of it: a worker computes with as many threads as the pass was begun with.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.tools.errors import UserError
from exegete.tools.parts import is_complete

if TYPE_CHECKING:
    from exegete.tools.activations import PreparedPass, Slicer

Work = Callable[[Any], Any]
"""Does one task in a worker."""
DONE = -1
FORMS = "ray, ray:2 (so many local workers) or ray://HOST:PORT"
_SEEN_WITHIN_S = 90.0
"""Network file systems may take so long to show one machine what another has renamed."""


@dataclass(frozen=True)
class Workers:
    """Which workers are asked for."""

    spec: str
    """As it was written."""
    count: int | None = None
    """How many; None: as many as there is room for."""
    address: str | None = None
    """Of a cluster that is there already; None: one on this machine, for this run."""


def parse_workers(spec: str) -> Workers:
    """Return what `ray`, `ray:N` or `ray://HOST:PORT` asks for.

    Raises:
        UserError: it is none of these.
    """
    if spec == "ray":
        return Workers(spec)
    if found := re.fullmatch(r"ray:([1-9]\d{0,3})", spec):
        return Workers(spec, count=int(found[1]))
    if re.fullmatch(r"ray://[^\s/:]+:\d+", spec) or re.fullmatch(r"ray://\[[0-9a-fA-F:]+\]:\d+", spec):
        return Workers(spec, address=spec)
    raise UserError(f"workers {spec!r}: expected {FORMS}")


@dataclass(frozen=True)
class Job:
    """What workers are for."""

    build: Callable[..., Work]
    """Makes a worker ready, at its first task. A function of a module that can be imported there."""
    arguments: tuple[Any, ...]
    """Plain values."""
    what: str = "task"
    """What one task is called in messages."""
    gpu: bool = False
    """Whether each worker needs a GPU of its own."""
    threads: int = 1
    """A worker is given so many processors. (How many torch computes with is for `build` to set.)"""


def slicer(workers: Workers, job: Job, started: Callable[[int], None] = lambda workers: None) -> Slicer:
    """Return what does the slices of a pass on `workers`.

    `job.build(*job.arguments, token)` is to call `require_shared` with the pass's folder and `token`, and to return a
    function that does the slice of a given number. `started` is told how many workers are asked for.
    """

    def do(prepared: PreparedPass, advance: Callable[[int], None], stop: Callable[[], bool]) -> None:
        from exegete.tools.activations import Stopped
        from exegete.tools.ray_workers import WorkerPool

        missing = []
        for index, piece in enumerate(prepared.slices):
            if is_complete(piece.part):
                advance(piece.micro_batches)
            else:
                missing.append(index)
        if not missing:
            return
        with shared_token(prepared.folder) as token:
            ready = replace(job, arguments=(*job.arguments, token), threads=prepared.threads)
            with WorkerPool(workers, ready, most=len(missing)) as pool:
                started(pool.count)
                for at, _ in pool.results(missing, stop):
                    advance(prepared.slices[missing[at]].micro_batches)
                    missing[at] = DONE
        if any(index != DONE for index in missing):
            raise Stopped
        _wait_for([piece.part for piece in prepared.slices], workers)

    return do


@contextmanager
def shared_token(folder: Path) -> Iterator[str]:
    """Write a file into `folder` for `require_shared` to find, and give what it is to be told."""
    name, content = f".token-{secrets.token_hex(8)}", secrets.token_hex(16)
    path = folder / name
    try:
        path.write_text(content)
    except OSError as error:
        raise UserError(f"cannot write to {str(folder)!r} ({error}); mend that and run again") from error
    try:
        yield f"{name} {content}"
    finally:
        path.unlink(missing_ok=True)


def require_shared(folder: Path, token: str) -> None:
    """Raise UserError unless this process sees in `folder` what `shared_token` wrote, perhaps on another machine."""
    name, _, content = token.partition(" ")
    try:
        held = (folder / name).read_text()
    except OSError as error:
        held = str(error)
    if held != content:
        raise UserError(
            f"a worker on {socket.gethostname()} does not see the files of this process in {str(folder)!r}; the store must "
            "be a folder on storage that all machines share, under the same path: give one with --store"
        )


def _wait_for(parts: Sequence[Path], workers: Workers) -> None:
    """Wait until this machine sees what others have renamed."""
    until = time.monotonic() + _SEEN_WITHIN_S
    for part in parts:
        while not is_complete(part):
            if time.monotonic() > until:
                raise UserError(
                    f"workers {workers.spec!r} say that {str(part)!r} is done, but it is not there; is the store on storage "
                    "that all machines share?"
                )
            os.listdir(part.parent)  # Has a network file system look again.
            time.sleep(0.5)
