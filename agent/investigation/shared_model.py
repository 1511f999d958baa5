"""One live model for many investigations: usable wherever a `LiveModel` is, its trials run in batches with those of others.

1. `run` and `generate` go through one `Scheduler`, which each investigation calls as one caller, so that they take turns.
2. What must hold the model to itself (attribution and other gradients, KL over continuations) runs on the model directly, batch by
   batch, under the subject's lock; the scheduler's batches wait meanwhile, and go on between two batches.
3. Every prompt that runs is counted for whoever is being counted (`passes`), before it runs. Activations that an edit takes from
   other prompts are read once and kept, whoever needed them first, so they are not counted.
4. A result does not depend on what else was in its batch, beyond rounding (see `exegete.tools.live_model`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from exegete.agent.investigation.passes import current
from exegete.agent.live import Live
from exegete.tools.editing import Editor
from exegete.tools.errors import UserError
from exegete.tools.generation import Continuation
from exegete.tools.live_model import Keep, LiveModel, Reading, Trial
from exegete.tools.scheduling import Scheduler, Statistics
from exegete.tools.trials import Batch

T = TypeVar("T")


class Sharing:
    """One scheduler over one live model. A context manager; give `live()` to each investigation."""

    def __init__(
        self,
        live: Live,
        *,
        scheduler: Scheduler | None = None,
        batch_tokens: int | None = None,
        waiting_s: float = 0.002,
    ) -> None:
        """Share a live model.

        Args:
            live: the model with its dictionary.
            scheduler: over `live.model`, where there is one already, as for a labeling run that goes on at the same time; it is
                not closed with this.
            batch_tokens: see `Scheduler`.
            waiting_s: see `Scheduler`.
        """
        self._live = live
        self._own = scheduler is None
        self.scheduler = scheduler or Scheduler(live.model, batch_tokens=batch_tokens, waiting_s=waiting_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def statistics(self) -> Statistics:
        """What has run so far."""
        return self.scheduler.statistics

    def live(self) -> Live:
        """Return the live model as one more caller of the scheduler has it."""
        return replace(self._live, model=SharedModel(self._live.model, self.scheduler))

    def close(self) -> None:
        """End the scheduler; what still waits for it fails with a UserError."""
        if self._own:
            self.scheduler.close()


class SharedModel(LiveModel):
    """A live model as one of the callers of a scheduler has it. Safe to use from several threads."""

    def __init__(self, model: LiveModel, scheduler: Scheduler) -> None:
        """Run what `model` runs through `scheduler`, which has been opened over it."""
        super().__init__(model.subject, batch_tokens=model.batch_tokens)
        # The same objects: checked once, and activations that were read for one investigation are there for all.
        self.dictionaries = model.dictionaries
        self.source_vectors = model.source_vectors
        self._sources = model._sources
        self._effective = model._effective
        self._scheduler = scheduler
        self._caller = scheduler.caller()
        self._inside = _Inside()

    def close(self) -> None:
        """Fail what this caller still waits for with a UserError; others go on."""
        self._caller.close()

    def run(
        self,
        trials: Sequence[Trial],
        read: Callable[[Reading], Sequence[T]],
        *,
        keep: Keep = "last",
        points: Sequence[str] = (),
    ) -> list[T]:
        """Run every trial once, as `LiveModel.run`; `read` is called on another thread, with the trials of each batch.

        Raises:
            UserError: as there, or the scheduler is closed.
            PassesUsedUp: there are more trials than passes are left.
        """
        if self._inside.depth:
            # A thread that holds the model, or the scheduler's own, would wait for itself.
            return super().run(trials, read, keep=keep, points=points)
        _take(len(trials))
        return self._scheduler.run_blocking(trials, self._as_here(read), keep=keep, points=points, caller=self._caller)

    def continued(
        self, trials: Sequence[Trial], tokens: int, *, temperature: float, seed: int, cache: bool
    ) -> list[Continuation]:
        """Continue every trial, as `exegete.tools.generation.generate` does.

        Raises:
            UserError: as there, or the scheduler is closed.
            PassesUsedUp: if each wrote as much as it may, that would be more passes than are left.
        """
        most = len(trials) * tokens
        _take(most)
        found = self._scheduler.generate_blocking(
            trials, tokens, temperature=temperature, seed=seed, cache=cache, caller=self._caller
        )
        _take(sum(len(one.tokens) + one.ended for one in found) - most)
        return found

    @contextmanager
    def editing(self, batch: Batch) -> Iterator[Editor]:
        """Hold the model to itself, with the interventions of `batch` in place."""
        if self._caller.closed:
            raise UserError("this caller is closed; open another one and call again")
        with self._inside, super().editing(batch) as editor:
            yield editor

    def logits(self, tokens: Tensor, mask: Tensor, *, last: bool, cache: Any = None) -> Tensor:
        """Run the model on padded tokens, as `LiveModel.logits`."""
        if self._inside.depth == 1:
            _take(len(tokens))
        return super().logits(tokens, mask, last=last, cache=cache)

    def _as_here(self, read: Callable[[Reading], Sequence[T]]) -> Callable[[Reading], Sequence[T]]:
        """Return `read` with gradients on or off as in this thread, and with what it runs itself run at once."""
        gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

        def there(reading: Reading) -> Sequence[T]:
            with self._inside, torch.inference_mode(inference), torch.set_grad_enabled(gradients):
                return read(reading)

        return there


class _Inside(threading.local):
    """How deep a thread is in work that holds the model, or that the scheduler waits for."""

    depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1


def _take(passes: int) -> None:
    count = current()
    if count is None or passes == 0:
        return
    if passes > 0:
        count.take(passes)
    else:
        count.give_back(-passes)
