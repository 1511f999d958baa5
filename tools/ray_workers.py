"""A pool of Ray actors, each of which makes itself ready once and then does one task after another.

1. An actor that has started and runs the same version of Exegete gets the next task that waits. One that does not start – the
   cluster has no room – keeps nobody waiting as long as another works.
2. A `UserError` of a task ends everything: it is the user's to mend. Whatever else goes wrong – the actor's process was killed,
   its machine is gone, the device failed – costs the actor, which is replaced, and the task is given to another, at most
   `ATTEMPTS` times; then the last cause is quoted.
3. Asked to stop, the pool gives out nothing new and waits for what is being done.

Ray's own logs stay in its session folder, its dashboard and its usage statistics are off. Between this process and the actors
Ray itself pickles what is sent, so a cluster must be trusted as this machine is.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from types import TracebackType
from typing import Any, NamedTuple, Self

from exegete.tools.errors import ExegeteError, UserError
from exegete.tools.workers import Job, Work, Workers

ATTEMPTS = 3
"""How often a task is given out, and how many actors in a row may fail to start."""
STARTING_S = 300.0
"""An idle cluster that starts no worker for so long has no room for one."""
_LOOK_EVERY_S = 0.25
_OBJECT_STORE_BYTES = 100 * 2**20
"""Results go through files; 75 MB is the least that Ray takes."""
_LOG = logging.getLogger(__name__)


class _Answer(NamedTuple):
    """What an actor returns."""

    result: Any
    error: str | None = None
    """A UserError's text."""


class _Actor:
    """Runs in a worker's process."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._work: Work | None = None

    def ready(self) -> tuple[str, int]:
        """Return which version runs here, and the process id."""
        return version("exegete"), os.getpid()

    def do(self, task: Any) -> _Answer:
        """Do one task; before the first, make ready."""
        try:
            if self._work is None:
                self._work = self._job.build(*self._job.arguments)
            return _Answer(self._work(task))
        except ExegeteError as error:
            return _Answer(None, str(error))


class WorkerPool:
    """Actors for one job, on the cluster that `Workers` names. A context manager."""

    def __init__(self, workers: Workers, job: Job, *, most: int | None = None) -> None:
        """Ask for workers.

        Args:
            workers: which.
            job: what each of them makes ready.
            most: no more of them than this.

        Raises:
            UserError: Ray is not installed, or (on entering) there is no such cluster, or no room in it for a worker.
        """
        self._ray = _import_ray()
        self._workers, self._job, self._most = workers, job, most
        self._cluster = connected(workers, job)
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        """What `ready` will answer → actor."""
        self._busy: dict[Any, tuple[Any, int]] = {}
        """Answer → actor and number of the task."""
        self._not_started = 0
        self.pids: list[int] = []
        """Processes of the actors that have started, also of those that are gone."""

    def __enter__(self) -> Self:
        self._cluster.__enter__()
        try:
            room = _room(self._ray, self._workers, self._job)
        except BaseException as error:
            self._cluster.__exit__(type(error), error, error.__traceback__)
            raise
        self.count = max(1, min(room, self._most or room))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(Exception):  # A connection that is lost has nobody to tell.
            for actor in self._actors():
                self._ray.kill(actor)
        self._cluster.__exit__(kind, error, trace)

    def results(self, tasks: Sequence[Any], stop: Callable[[], bool] = lambda: False) -> Iterator[tuple[int, Any]]:
        """Yield (number of the task, its result) as they are done; once `stop` says so, only of those that were begun.

        Raises:
            UserError: a task raised it, failed `ATTEMPTS` times, or no worker starts.
        """
        left = deque(range(len(tasks)))
        tried: Counter[int] = Counter()
        since = time.monotonic()
        while left or self._busy:
            if stop():
                left.clear()
                if not self._busy:
                    return
            self._start(len(left))
            while left and self._idle:
                number = left.popleft()
                actor = self._idle.pop()
                self._busy[actor.do.remote(tasks[number])] = (actor, number)
            if self._busy:
                since = time.monotonic()
            elif time.monotonic() - since > STARTING_S:
                raise self._no_room()
            watched = [*self._busy, *self._starting]
            for answer in self._ray.wait(watched, num_returns=1, timeout=_LOOK_EVERY_S)[0]:
                if answer in self._starting:
                    self._take_in(answer)
                    continue
                actor, number = self._busy.pop(answer)
                found = self._answer(answer, actor, tasks[number], number, tried)
                if found is None:
                    left.appendleft(number)
                else:
                    yield number, found.result

    def _start(self, tasks: int) -> None:
        """Ask for as many actors as are missing and of use."""
        while len(self._actors()) < self.count and len(self._starting) + len(self._idle) < tasks:
            needs = {"num_gpus": 1, "num_cpus": 1} if self._job.gpu else {"num_cpus": self._job.threads}
            actor = self._ray.remote(_Actor).options(max_restarts=0, **needs).remote(self._job)
            self._starting[actor.ready.remote()] = actor

    def _actors(self) -> list[Any]:
        return [*self._idle, *self._starting.values(), *(actor for actor, _ in self._busy.values())]

    def _take_in(self, answer: Any) -> None:
        """Make an actor that has started available, or give it up."""
        actor = self._starting.pop(answer)
        try:
            there, pid = self._ray.get(answer)
        except self._ray.exceptions.RayError as error:
            self._not_started += 1
            if self._not_started >= ATTEMPTS:
                raise UserError(
                    f"workers {self._workers.spec!r} do not start ({_cause(error)}); is `exegete[ray]` installed on every "
                    "machine of the cluster?"
                ) from error
            return
        if there != version("exegete"):
            raise UserError(
                f"workers {self._workers.spec!r} run exegete {there}, this process {version('exegete')}; install one version"
            )
        self._not_started = 0
        self._idle.append(actor)
        self.pids.append(pid)

    def _answer(self, answer: Any, actor: Any, task: Any, number: int, tried: Counter[int]) -> _Answer | None:
        """Return what an actor answers, None where the task is to be given to another."""
        try:
            found: _Answer = self._ray.get(answer)
        except self._ray.exceptions.RayError as error:
            tried[number] += 1
            with suppress(Exception):  # Mostly it is dead already.
                self._ray.kill(actor)
            if tried[number] >= ATTEMPTS:
                raise UserError(
                    f"{self._job.what} {_short(task)} failed on {ATTEMPTS} workers of {self._workers.spec!r}, at last with: "
                    f"{_cause(error)}; mend that and run again, what is complete is kept"
                ) from error
            return None
        self._idle.append(actor)
        if found.error is not None:
            raise UserError(found.error)
        return found

    def _no_room(self) -> UserError:
        needs = "a GPU" if self._job.gpu else f"{self._job.threads} CPUs"
        free = {name: count for name, count in self._ray.available_resources().items() if name in ("CPU", "GPU")}
        return UserError(
            f"workers {self._workers.spec!r}: none started within {STARTING_S:.0f} s; each takes {needs}, and the cluster has "
            f"{free} free"
        )


@contextmanager
def connected(workers: Workers, job: Job) -> Iterator[None]:
    """Be connected to the cluster: one that this process is connected to already, else the one that `workers` asks for.

    Raises:
        UserError: Ray is not installed, or there is no such cluster.
    """
    ray = _import_ray()
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    with _own_signals():
        try:
            if workers.address is not None:
                with warnings.catch_warnings(action="ignore"):  # The error says it as well.
                    ray.init(workers.address, **quiet)
            else:
                cpus = None if workers.count is None else workers.count * job.threads
                options = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
                ray.init("local", num_cpus=cpus, **options, **quiet)
        except (ConnectionError, OSError, RuntimeError, ValueError, ImportError) as error:
            hint = "; one that asks for a token takes RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" if workers.address else ""
            raise UserError(f"workers {workers.spec!r}: no Ray cluster ({_cause(error)}){hint}") from error
    _keep_quiet()
    try:
        yield
    finally:
        ray.shutdown()


def _keep_quiet() -> None:
    """Have Ray's news of dead workers go to the log. It prints them on stdout, where results go, and has no setting for that."""
    from ray._private import worker

    def log(lines: dict[str, Any], ignore_prefix: bool) -> None:
        _LOG.debug("ray: %s", " ".join(map(str, lines.get("lines", ()))))

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = log


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep who gets SIGTERM and SIGINT: Ray takes them for itself."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    former = [signal.getsignal(kind) for kind in kinds]
    try:
        yield
    finally:
        with suppress(ValueError):  # Outside the main thread nobody can have taken them.
            for kind, owner in zip(kinds, former, strict=True):
                signal.signal(kind, owner)


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError(f"workers need Ray ({error}): pip install 'exegete[ray]'") from error
    return ray


def _room(ray: Any, workers: Workers, job: Job) -> int:
    """Return how many workers there may be."""
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    if job.gpu and gpus < (workers.count or 1):
        raise UserError(
            f"workers {workers.spec!r} on CUDA take a GPU each, and Ray sees {gpus}; ask for fewer, or set subject.device"
        )
    return workers.count or (gpus if job.gpu else int(resources.get("CPU", 1)) // job.threads)


def _cause(error: BaseException) -> str:
    """Return the line of an error that says most."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {_telling_line(str(cause))}"
    return f"{type(error).__name__}: {_telling_line(str(error))}"


def _telling_line(text: str) -> str:
    """Return how a worker's process ended, else the end of its traceback, else what comes first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    ended = [line for line in lines if "exit detail" in line]
    chosen = ended[0] if ended else lines[-1] if "ray::" in text else lines[0]
    return re.sub(r"\x1b\[\d*m", "", chosen)[:300]


def _short(task: Any) -> str:
    return repr(task)[:60]
