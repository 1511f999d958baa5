"""One live model for many callers: what agents and evaluators submit at the same time runs in shared batches.

1. A call is some trials with a `read` function, or some trials to continue. It is checked before it gets in.
2. At most `most_waiting` trials are in at a time. The others wait at the door, and with them their thread or task.
   Callers get in, and out again into a batch, by turns, a trial each, so that ten thousand trials of one caller do not
   keep another's single one waiting for longer than a few batches.
3. One thread takes a round from the queue: trials of one kind of work (the same logits and hook points to read, or prompts
   to continue; interventions, and how long and at which temperature each is continued, may differ), sorts them by length
   (those that are edited from their last token on by themselves: see `exegete.tools.late_edits`) and pads them into batches of at
   most `batch_tokens`. It waits `waiting_s` for more while calls come in.
4. Each call's `read` sees a copy of its own rows, as if it had run alone. What goes wrong in it is that call's alone.
   A batch that fails runs again split by calls, until the call that is to blame is alone and gets the error.
5. Trials of a cancelled task or a closed caller leave the queue at once; in a running batch their results are dropped.

Results do not depend on what else was in the batch (beyond rounding): see `exegete.tools.live_model`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch

from exegete.tools.errors import UserError
from exegete.tools.generation import Continuation
from exegete.tools.interventions import VectorEdit
from exegete.tools.late_edits import acts_late
from exegete.tools.live_model import Keep, LiveModel, Reading, Trial
from exegete.tools.scheduled_calls import Call, Caller, Generate, Item, Job, Queue, Read, Reader, calls_of

T = TypeVar("T")

CPU_BATCH_TOKENS = 4_096
"""The largest batches that take no longer for each token: beyond, what a layer writes leaves the caches."""
_ROUND_BATCHES = 4
"""Sorted by length together. More would pad less, and keep a newcomer waiting for longer."""
_CHECKED_AT_ONCE = 64
"""Trials; of more, the check gets a thread, and the other tasks go on."""
_LONGEST_WAIT = 10
"""Times `waiting_s`, for a round to fill up while calls keep coming in."""


@dataclass(frozen=True)
class Statistics:
    """What has run so far."""

    batches: int = 0
    trials: int = 0
    tokens: int = 0
    """Of the prompts (and room for the continuations), without padding."""
    padded_tokens: int = 0
    largest_batch_tokens: int = 0
    """Padded."""
    most_waiting: int = 0
    """Trials that were in the queue at one time, at most."""

    @property
    def trials_per_batch(self) -> float:
        """Mean number of trials in a batch; 0 before the first."""
        return self.trials / max(1, self.batches)

    @property
    def padded_share(self) -> float:
        """Share of the positions that were padding; 0 before the first batch."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0


class Scheduler:
    """Runs the trials of many threads and tasks on one live model, in shared batches. A context manager."""

    def __init__(
        self,
        model: LiveModel,
        *,
        batch_tokens: int | None = None,
        waiting_s: float = 0.002,
        most_waiting: int = 4_096,
    ) -> None:
        """Start the thread that runs the batches.

        Args:
            model: what they run on. It can be used directly at the same time; batches then take turns.
            batch_tokens: padded tokens in one forward pass, at most (a longer prompt runs alone). None: the model's, and
                on a CPU at most `CPU_BATCH_TOKENS`.
            waiting_s: how long to wait for more calls before a batch that is not full.
            most_waiting: trials in the queue at a time; calls beyond wait outside.

        Raises:
            UserError: a number is out of range.
        """
        on_cpu = torch.device(model.subject.device).type == "cpu"
        most = min(model.batch_tokens, CPU_BATCH_TOKENS) if on_cpu else model.batch_tokens
        self.batch_tokens = most if batch_tokens is None else batch_tokens
        if self.batch_tokens < 1 or most_waiting < 1 or not 0 <= waiting_s < float("inf"):
            raise UserError(
                f"a scheduler with batch_tokens {self.batch_tokens}, most_waiting {most_waiting}, waiting_s {waiting_s}: "
                "give at least 1 token, 1 trial and 0 seconds"
            )
        self._model = model
        self._queue = Queue(most_waiting)
        self._changed = threading.Condition()
        self._waiting_s = waiting_s
        self._closed = False
        self._running: list[Call] = []
        self._statistics = Statistics()
        # Found by a forward pass of its own, which must not meet one of another thread.
        _ = model.subject.hook_points
        self._worker = threading.Thread(target=self._work, name="exegete scheduler", daemon=True)
        self._worker.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def statistics(self) -> Statistics:
        """What has run so far."""
        with self._changed:
            return replace(self._statistics, most_waiting=self._queue.most_inside)

    def caller(self) -> Caller:
        """Return a caller, to pass with each of its calls: all of them together then have one turn."""
        return Caller(self._close_caller)

    async def run(
        self,
        trials: Sequence[Trial],
        read: Callable[[Reading], Sequence[T]],
        *,
        keep: Keep = "last",
        points: Sequence[str] = (),
        caller: Caller | None = None,
    ) -> list[T]:
        """Run every trial once and return what `read` returns for each; the arguments are those of `LiveModel.run`.

        `read` is called on the scheduler's thread, several times where the trials run in several batches, each with
        some of the trials. `caller`: whose turn it is; by default each call has its own.

        Raises:
            UserError: as `LiveModel.run`; or the scheduler, or the caller, is closed.
        """
        call = self._call(trials, Read(keep, tuple(points)), caller, read)
        await self._checked(call)
        return await asyncio.wrap_future(self._submit(call))

    def run_blocking(
        self,
        trials: Sequence[Trial],
        read: Callable[[Reading], Sequence[T]],
        *,
        keep: Keep = "last",
        points: Sequence[str] = (),
        caller: Caller | None = None,
    ) -> list[T]:
        """As `run`, for threads."""
        return self._result(self._call(trials, Read(keep, tuple(points)), caller, read))

    async def generate(
        self,
        trials: Sequence[Trial],
        tokens: int,
        *,
        temperature: float = 1.0,
        seed: int = 0,
        cache: bool = True,
        caller: Caller | None = None,
    ) -> list[Continuation]:
        """Continue every trial, as `exegete.tools.generation.generate` does. All calls share batches.

        Raises:
            UserError: as there; or the scheduler, or the caller, is closed.
        """
        call = self._call(trials, Generate(tokens, temperature, seed, cache), caller)
        await self._checked(call)
        return await asyncio.wrap_future(self._submit(call))

    def generate_blocking(
        self,
        trials: Sequence[Trial],
        tokens: int,
        *,
        temperature: float = 1.0,
        seed: int = 0,
        cache: bool = True,
        caller: Caller | None = None,
    ) -> list[Continuation]:
        """As `generate`, for threads."""
        return self._result(self._call(trials, Generate(tokens, temperature, seed, cache), caller))

    def close(self) -> None:
        """Finish the batch that runs, fail every call that is not complete with a UserError, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._worker:
            self._worker.join()

    def _call(self, trials: Sequence[Trial], job: Job, caller: Caller | None, read: Reader | None = None) -> Call:
        if threading.current_thread() is self._worker:
            raise RuntimeError("a read function cannot wait for a call of its own scheduler: return first, then call")
        return Call(caller or self.caller(), job, tuple(trials), read)

    async def _checked(self, call: Call) -> None:
        if len(call.trials) <= _CHECKED_AT_ONCE and not any(
            isinstance(edit, VectorEdit) for trial in call.trials for edit in trial.intervention.edits
        ):
            call.job.check(self._model, call.trials)
        else:
            # Takes long, or tries the hook point out, for which the model must be free.
            await asyncio.to_thread(call.job.check, self._model, call.trials)

    def _result(self, call: Call) -> list[Any]:
        call.job.check(self._model, call.trials)
        future = self._submit(call)
        try:
            return future.result()
        finally:
            # The thread may have been interrupted.
            future.cancel()

    def _submit(self, call: Call) -> Future[list[Any]]:
        with self._changed:
            if self._closed:
                raise _closed("scheduler")
            if call.caller.closed:
                raise _closed("caller")
            self._queue.add(call)
            self._changed.notify_all()
        call.future.add_done_callback(lambda _: self._drop(call))
        return call.future

    def _drop(self, call: Call) -> None:
        with self._changed:
            self._queue.drop(call)

    def _close_caller(self, caller: Caller) -> None:
        with self._changed:
            caller.closed = True
            calls = [call for call in self._queue.calls() + self._running if call.caller is caller]
        for call in calls:
            call.fail(_closed("caller"))

    def _work(self) -> None:
        reason: BaseException = _closed("scheduler")
        try:
            while not self._closed:
                for items in self._next_round():
                    if not self._closed:
                        self._attempt(items)
        except BaseException as error:
            reason = error
        with self._changed:
            self._closed = True
            calls = self._queue.calls() + self._running
        for call in calls:
            call.fail(reason)

    def _next_round(self) -> list[list[Item]]:
        """Wait for trials and return a round of them, in batches; none once the scheduler is closed."""
        with self._changed:
            self._running = []
            while not self._closed and not self._queue.inside:
                self._changed.wait()
            self._wait_for_more()
            items = self._queue.take(self._model, _ROUND_BATCHES * self.batch_tokens)
            self._running = calls_of(items)
        return list(self._batches(items))

    def _wait_for_more(self) -> None:
        end = time.monotonic() + _LONGEST_WAIT * self._waiting_s
        while not self._closed and time.monotonic() < end:
            before = self._queue.added
            full = self._queue.tokens_inside >= _ROUND_BATCHES * self.batch_tokens
            if full or not (self._changed.wait(self._waiting_s) and self._queue.added > before):
                return

    def _batches(self, items: list[Item]) -> Iterator[list[Item]]:
        """Yield batches of a round: equal prompts together, and those that are edited late apart, if there are several batches."""
        limit = min(self.batch_tokens, self._model.batch_tokens)
        several = sum(item.length(self._model) for item in items) > limit
        late = {item: several and _is_late(self._model, item) for item in items}
        batch: list[Item] = []
        for item in sorted(items, key=lambda item: (late[item], item.length(self._model), item.trial.tokens)):
            full = (len(batch) + 1) * item.length(self._model) > limit
            if batch and (full or late[item] != late[batch[-1]]):
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def _attempt(self, items: list[Item]) -> None:
        """Run a batch; if that fails, its halves, down to the call that is to blame."""
        items = [item for item in items if item.wanted]
        calls = calls_of(items)
        try:
            if items:
                items[0].call.job.perform(self._model, items, self._count)
        except Exception as error:
            if len(calls) == 1:
                calls[0].fail(error)
                return
            first = set(calls[: len(calls) // 2])
            self._attempt([item for item in items if item.call in first])
            self._attempt([item for item in items if item.call not in first])

    def _count(self, lengths: Sequence[int]) -> None:
        padded = len(lengths) * max(lengths)
        with self._changed:
            so_far = self._statistics
            self._statistics = Statistics(
                batches=so_far.batches + 1,
                trials=so_far.trials + len(lengths),
                tokens=so_far.tokens + sum(lengths),
                padded_tokens=so_far.padded_tokens + padded,
                largest_batch_tokens=max(so_far.largest_batch_tokens, padded),
            )


def _is_late(model: LiveModel, item: Item) -> bool:
    job = item.call.job
    return isinstance(job, Read) and job.keep == "last" and not job.points and acts_late(model, item.trial)


def _closed(what: str) -> UserError:
    return UserError(f"this {what} is closed; open another one and call again")
