"""What waits in a scheduler (`exegete.tools.scheduling`): calls, what is to be done with their trials, and whose turn it is.

Nothing here but `Call` knows of threads: the scheduler guards the queue with its own lock.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self

import torch

from exegete.tools.generation import Sampling, check_generation, continue_each
from exegete.tools.live_model import Batch, Keep, LiveModel, Reading, Trial

Reader = Callable[[Reading], Sequence[Any]]
Count = Callable[[Sequence[int]], None]
"""Told the tokens of each prompt of every batch that ran."""


class Job(Protocol):
    """What is done with trials. Those of equal jobs share batches."""

    def check(self, model: LiveModel, trials: Sequence[Trial]) -> None:
        """Raise UserError where a trial cannot run."""
        ...

    def length(self, model: LiveModel, trial: Trial) -> int:
        """Return the positions that a trial takes in a batch."""
        ...

    def perform(self, model: LiveModel, items: Sequence[Item], count: Count) -> None:
        """Run one batch, and settle or fail the calls of its items. What it raises is of the batch as a whole."""
        ...


class Caller:
    """Someone who makes several calls, which together have one turn. Closing it fails those that are not complete."""

    def __init__(self, close: Callable[[Caller], None]) -> None:
        self._close = close
        self.closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Fail its calls with a UserError, and let it make no more."""
        self._close(self)


@dataclass(eq=False)
class Call:
    """Trials that one caller submitted together. `future` gets the results, or the error."""

    caller: Caller
    job: Job
    trials: Sequence[Trial]
    read: Reader | None = None
    let_in: int = 0
    """How many of the trials are, or were, in the queue."""
    results: dict[int, Any] = field(default_factory=dict)
    future: Future[list[Any]] = field(default_factory=Future)
    _ending: threading.Lock = field(default_factory=threading.Lock)

    def settle(self, items: Iterable[Item], found: Iterable[Any]) -> None:
        """Take the results of some trials; the last ones complete the call."""
        self.results.update((item.number, one) for item, one in zip(items, found, strict=True))
        if len(self.results) == len(self.trials):
            self._end(lambda: self.future.set_result([self.results[index] for index in range(len(self.trials))]))

    def fail(self, error: BaseException) -> None:
        """End the call with an error, unless it has ended."""
        self._end(lambda: self.future.set_exception(error))

    def _end(self, end: Callable[[], None]) -> None:
        with self._ending:
            if not self.future.done() and self.future.set_running_or_notify_cancel():
                end()


class Item(NamedTuple):
    """One trial of a call."""

    call: Call
    number: int
    """Of the trial, in its call."""

    @property
    def trial(self) -> Trial:
        """The trial."""
        return self.call.trials[self.number]

    @property
    def wanted(self) -> bool:
        """Whether its result is still to come, and awaited."""
        return not self.call.future.done() and self.number not in self.call.results

    def length(self, model: LiveModel) -> int:
        """Return the positions that it takes in a batch."""
        return self.call.job.length(model, self.trial)


def calls_of(items: Iterable[Item]) -> list[Call]:
    """Return the calls of items, each once, in order."""
    return list(dict.fromkeys(item.call for item in items))


class Queue:
    """Trials that wait, at most `most` of them, and the calls that wait for room; callers take turns at both."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._door: OrderedDict[Caller, deque[Call]] = OrderedDict()
        """Caller → its calls with trials that are not let in yet."""
        self._line: OrderedDict[Caller, deque[Item]] = OrderedDict()
        """Caller → its trials. The first caller is next."""
        self.inside = 0
        """Trials in the line."""
        self.tokens_inside = 0
        """Of their prompts."""
        self.most_inside = 0
        self.added = 0
        """Calls, so far."""

    def add(self, call: Call) -> None:
        """Let a call's trials in as far as there is room."""
        self.added += 1
        self._door.setdefault(call.caller, deque()).append(call)
        self._let_in()

    def calls(self) -> list[Call]:
        """Return every call with trials in the line or at the door."""
        inside = calls_of(item for items in self._line.values() for item in items)
        return list(dict.fromkeys(inside + [call for calls in self._door.values() for call in calls]))

    def drop(self, call: Call) -> None:
        """Take what is left of a call out."""
        items = self._line.get(call.caller, deque())
        self._keep(self._line, call.caller, deque(item for item in items if item.call is not call))
        for item in items:
            self._entered(item, -1 if item.call is call else 0)
        waiting = self._door.get(call.caller, deque())
        self._keep(self._door, call.caller, deque(other for other in waiting if other is not call))
        self._let_in()

    def take(self, model: LiveModel, tokens: int) -> list[Item]:
        """Take trials out of the line by turns until they have `tokens`: those whose job is the first one's."""
        taken: list[Item] = []
        others: list[tuple[Caller, deque[Item]]] = []
        while self._line and tokens > 0:
            caller, items = self._line.popitem(last=False)
            if taken and items[0].call.job != taken[0].call.job:
                others.append((caller, items))
                continue
            taken.append(items.popleft())
            tokens -= taken[-1].length(model)
            if items:
                self._line[caller] = items
        # Those who were passed over stay first, in their order.
        for caller, items in reversed(others):
            self._line[caller] = items
            self._line.move_to_end(caller, last=False)
        for item in taken:
            self._entered(item, -1)
        self._let_in()
        return taken

    def _let_in(self) -> None:
        while self._door and self.inside < self._most:
            caller, calls = self._door.popitem(last=False)
            call = calls[0]
            item = Item(call, call.let_in)
            self._line.setdefault(caller, deque()).append(item)
            self._entered(item, 1)
            call.let_in += 1
            if call.let_in == len(call.trials):
                calls.popleft()
            if calls:
                self._door[caller] = calls
        self.most_inside = max(self.most_inside, self.inside)

    def _entered(self, item: Item, by: int) -> None:
        self.inside += by
        self.tokens_inside += by * len(item.trial.tokens)

    @staticmethod
    def _keep(places: OrderedDict[Caller, deque[Any]], caller: Caller, left: deque[Any]) -> None:
        if left:
            places[caller] = left
        else:
            places.pop(caller, None)


@dataclass(frozen=True)
class Read:
    """Run the model once and read logits and vectors off."""

    keep: Keep
    points: tuple[str, ...]

    def check(self, model: LiveModel, trials: Sequence[Trial]) -> None:
        """Raise UserError where a trial cannot run."""
        model.check(trials)
        for point in self.points:
            model.subject.width(point)

    def length(self, model: LiveModel, trial: Trial) -> int:
        """Return the tokens of the prompt."""
        return len(trial.tokens)

    def perform(self, model: LiveModel, items: Sequence[Item], count: Count) -> None:
        """Run one batch, and give each call its own rows to read."""
        # The model may sort and split: each trial is found again by a copy of its own.
        owners = {id(copied): (item, copied) for item in items for copied in [copy.copy(item.trial)]}
        again: list[Call] = []

        def share(reading: Reading) -> list[None]:
            count(reading.batch.lengths)
            found = [owners[id(trial)][0] for trial in reading.batch.trials]
            again.extend(call for call in calls_of(found) if not _shared(call, found, reading))
            return [None] * len(found)

        model.run([copied for _, copied in owners.values()], share, keep=self.keep, points=self.points)
        for call in dict.fromkeys(again):
            self._alone(model, call, [item for item in items if item.call is call and item.wanted])

    def _alone(self, model: LiveModel, call: Call, items: Sequence[Item]) -> None:
        """Run the rows of a call whose `read` ran out of memory, in halves as they fit."""
        assert call.read is not None
        try:
            call.settle(items, model.run([item.trial for item in items], call.read, keep=self.keep, points=self.points))
        except Exception as error:
            call.fail(error)


def _shared(call: Call, found: Sequence[Item], reading: Reading) -> bool:
    """Let a call read its own rows, and return False if that ran out of memory."""
    if call.future.done():
        return True
    assert call.read is not None
    rows = [row for row, item in enumerate(found) if item.call is call]
    own = [found[row] for row in rows]
    try:
        call.settle(own, call.read(reading if len(own) == len(found) else _rows(reading, rows)))
    except torch.OutOfMemoryError:
        return False
    except Exception as error:
        call.fail(error)
    return True


def _rows(reading: Reading, rows: Sequence[int]) -> Reading:
    """Return a copy of some rows, padded to the longest of them."""
    trials = [reading.batch.trials[row] for row in rows]
    kept = slice(-max(len(trial.tokens) for trial in trials), None)
    with torch.inference_mode():
        at = torch.tensor(rows, device=reading.batch.tokens.device)
        batch = Batch(trials, reading.batch.tokens[:, kept][at], reading.batch.mask[:, kept][at])
        logits = reading.logits
        if logits.dim() > 1:
            logits = (logits if logits.dim() == 2 else logits[:, kept])[at]
        vectors = {point: vectors[:, kept][at] for point, vectors in reading.vectors.items()}
    return Reading(batch, logits, vectors)


@dataclass(frozen=True)
class Generate:
    """Continue the prompts. Calls of any lengths, temperatures and seeds share batches."""

    tokens: int = field(compare=False)
    temperature: float = field(compare=False)
    seed: int = field(compare=False)
    cache: bool

    def check(self, model: LiveModel, trials: Sequence[Trial]) -> None:
        """Raise UserError where a trial cannot run."""
        check_generation(model, trials, self.tokens, self.temperature)

    def length(self, model: LiveModel, trial: Trial) -> int:
        """Return the tokens of the prompt and of what may be written."""
        return min(model.subject.max_context, len(trial.tokens) + self.tokens)

    def perform(self, model: LiveModel, items: Sequence[Item], count: Count) -> None:
        """Run one batch."""
        trials, sampling = [item.trial for item in items], [_sampling(item.call.job) for item in items]
        found = continue_each(model, trials, sampling, cache=self.cache)
        count([item.length(model) for item in items])
        for call in calls_of(items):
            own = [row for row, item in enumerate(items) if item.call is call]
            call.settle([items[row] for row in own], [found[row] for row in own])


def _sampling(job: Job) -> Sampling:
    assert isinstance(job, Generate)
    return Sampling(job.tokens, job.temperature, job.seed)
