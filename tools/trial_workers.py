"""Sets of trials on several copies of a live model, one in each of some workers.

1. The trials are cut into the batches that one live model would make of them: sorted by length, padded to `batch_tokens`.
2. Each batch is a task for a pool of workers (`ray_workers`), each of which has loaded its own copy, and runs it there as one batch.
   A lost worker's batches are done again by others.
3. What comes back is put into the order of the trials.

So results are those of a single `LiveModel` of the same kind of device, bit for bit, whoever computed them. This pays for sets
of many batches, as of latents × prompts × strengths; a search that waits for each batch before the next is as fast alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from exegete.tools.activations import computing_with, torch_threads
from exegete.tools.generation import Continuation, check_generation, generate
from exegete.tools.live_model import Keep, LiveModel, Reading, Trial
from exegete.tools.ray_workers import WorkerPool
from exegete.tools.workers import Job, Workers

T = TypeVar("T")


class TrialPool:
    """Runs trials on workers that each have a copy of one live model. A context manager."""

    def __init__(
        self,
        workers: Workers,
        model: LiveModel,
        build: Callable[..., LiveModel],
        arguments: tuple[Any, ...],
        *,
        most: int | None = None,
    ) -> None:
        """Ask for workers.

        Args:
            workers: which.
            model: checks trials, and says how they are batched. It runs none.
            build: makes such a model in a worker: a function of a module that can be imported there.
            arguments: of `build`: plain values, as paths.
            most: no more workers than this.

        Raises:
            UserError: as `WorkerPool`.
        """
        gpu, threads = model.subject.device.startswith("cuda"), torch_threads()
        given = (build, arguments, model.batch_tokens, threads)
        self._model = model
        self._pool = WorkerPool(workers, Job(trial_worker, given, "batch of trials", gpu, threads), most=most)

    def __enter__(self) -> Self:
        self._pool.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.__exit__(kind, error, trace)

    def run(
        self,
        trials: Sequence[Trial],
        read: Callable[[Reading], Sequence[T]],
        *,
        keep: Keep = "last",
        points: Sequence[str] = (),
    ) -> list[T]:
        """Return what `LiveModel.run` returns.

        `read` runs in the workers: it, and what it returns, is pickled, and must hold no model and no tensor of a device.

        Raises:
            UserError: as there; or a batch failed on several workers.
        """
        self._model.check(trials)
        return self._spread(trials, lambda trial: len(trial.tokens), _Read(read, keep, tuple(points)))

    def generate(
        self, trials: Sequence[Trial], tokens: int, *, temperature: float = 1.0, seed: int = 0, cache: bool = True
    ) -> list[Continuation]:
        """Return what `exegete.tools.generation.generate` returns.

        Raises:
            UserError: as there; or a batch failed on several workers.
        """
        check_generation(self._model, trials, tokens, temperature)
        room = self._model.subject.max_context
        work = _Write(tokens, temperature, seed, cache)
        return self._spread(trials, lambda trial: min(room, len(trial.tokens) + tokens), work)

    def _spread(self, trials: Sequence[Trial], length: Callable[[Trial], int], work: Any) -> list[Any]:
        order = sorted(range(len(trials)), key=lambda index: len(trials[index].tokens))
        batches = list(self._model.batches(order, lambda index: length(trials[index])))
        found: dict[int, Any] = {}
        for number, results in self._pool.results([(work, [trials[index] for index in batch]) for batch in batches]):
            found.update(zip(batches[number], results, strict=True))
        return [found[index] for index in range(len(trials))]


@dataclass(frozen=True)
class _Read:
    read: Callable[[Reading], Sequence[Any]]
    keep: Keep
    points: tuple[str, ...]

    def __call__(self, model: LiveModel, trials: Sequence[Trial]) -> list[Any]:
        return model.run(trials, self.read, keep=self.keep, points=self.points)


@dataclass(frozen=True)
class _Write:
    tokens: int
    temperature: float
    seed: int
    cache: bool

    def __call__(self, model: LiveModel, trials: Sequence[Trial]) -> list[Any]:
        return generate(model, trials, self.tokens, temperature=self.temperature, seed=self.seed, cache=self.cache)


def trial_worker(
    build: Callable[..., LiveModel], arguments: tuple[Any, ...], batch_tokens: int, threads: int
) -> Callable[[Any], list[Any]]:
    """Make a worker ready, and return what runs one batch."""
    model = build(*arguments)

    def work(task: Any) -> list[Any]:
        job, trials = task
        model.batch_tokens = batch_tokens  # Also where a batch before had to be halved.
        with computing_with(threads):
            found: list[Any] = job(model, trials)
        return found

    return work
