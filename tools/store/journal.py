"""The store's durable journal of calls to language models: what `exegete.tools.llm` writes down before it goes on.

1. Whoever awaits an entry puts it in a list and sleeps; one thread writes whatever has gathered in one transaction, waits
   for the disk, and wakes all of them in one hop to their event loop. An entry is acknowledged when it is on the disk.
2. After a pause it writes at once; under load a transaction begins no sooner than `LINGER_S` after the one before.
3. Questions for replies go the same way, before the writing and without the pause; so nothing is kept in memory but what
   is under way, and the event loop never waits for the disk.
4. Where the disk is full, everybody whose entry was in that transaction is told so, and nothing of it is kept.

The tables are described in `journal_file`. A reply is packed as JSON, compressed where it is large; `parsed` is left out,
since a client holds the text against the schema again.
"""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from exegete.tools.errors import UserError
from exegete.tools.llm.contract import Reply, Submission, TokenLogprob, ToolCall, Usage
from exegete.tools.store.journal_file import Answer, Entry, Intent, JournalFile, Landed, Submitted, Submitting

LINGER_S = 0.01

_LARGE_BYTES = 512
_SHOWN_CHARS = 200
_QUOTATION = re.compile(r"(?<!\w)'|[\"`‘“«{\[]")

Result = TypeVar("Result")


class StoreJournal:
    """The journal of one store; `of_run` gives what a client takes. Safe to use from several threads and event loops.

    Made by `Writer.journal`. Every method and every awaitable raises UserError where the disk is full or the file damaged,
    and RuntimeError once it is closed.
    """

    def __init__(self, path: Path, settled: int = 0) -> None:
        """Open or make the journal at `path`, whose calls up to number `settled` readers have seen.

        What a killed process left without a reply is settled as "unknown", except for calls of open batches.
        """
        self.transactions = 0
        """Written so far by this object."""
        self._file = JournalFile(path, settled)
        self._gathering = threading.Condition()
        self._questions: list[_Waiting] = []
        self._entries: list[_Waiting] = []
        self._jobs: list[tuple[Callable[[JournalFile], Any], futures.Future[Any]]] = []
        self._idle = True
        self._closing = False
        self._due = 0.0
        self._thread = threading.Thread(target=self._serve, name="journal of calls", daemon=True)
        self._thread.start()

    def of_run(self, run: str) -> RunJournal:
        """Return the journal as a run's clients use it: its calls are noted under `run`; replies are found whoever asked."""
        return RunJournal(self, run)

    def spent_usd(self, run: str, after: int = 0) -> float:
        """Return what the calls of a run settled after number `after` have cost, with the worst case of those that are unknown.

        Calls of batches that have not landed are not in it: whoever takes such a batch up reserves their worst case again.
        """
        return self._do(lambda file: file.spent_usd(run, after))

    def spent_tokens(self, run: str, after: int = 0) -> tuple[int, int, int]:
        """Return the tokens of those calls, how many of them are unknown (and have none), and the most that one has taken."""
        return self._do(lambda file: file.spent_tokens(run, after))

    def account(self, after: int, limit: int) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        """Return rows settled after a number, `limit` at most, and the rows in flight (see `JournalFile.account`)."""
        return self._do(lambda file: file.account(after, limit))

    def close(self) -> None:
        """Write down what has gathered, and close the file."""
        with self._gathering:
            self._closing = True
            self._gathering.notify()
        self._thread.join()

    async def ask(self, call: str) -> bytes | None:
        """Return the packed reply of a call, None where there is none."""
        found: bytes | None = await self._wait(self._questions, call)
        return found

    async def write(self, entry: Entry) -> None:
        """Return once the entry is on the disk."""
        await self._wait(self._entries, entry)

    async def open_batches(self, model: str) -> list[tuple[str, list[str], str | None, float]]:
        """Return the model's batches that have not landed (see `JournalFile.batches`)."""
        return await asyncio.wrap_future(self._put(lambda file: file.batches(model)))

    async def _wait(self, gathered: list[_Waiting], item: Any) -> Any:
        loop = asyncio.get_running_loop()
        waiting = _Waiting(item, loop, loop.create_future())
        with self._gathering:
            self._check_open()
            gathered.append(waiting)
            # While it lingers, entries gather; it looks for them by itself.
            if self._idle or gathered is self._questions:
                self._gathering.notify()
        return await waiting.future

    def _do(self, job: Callable[[JournalFile], Result]) -> Result:
        return self._put(job).result()

    def _put(self, job: Callable[[JournalFile], Result]) -> futures.Future[Result]:
        future: futures.Future[Result] = futures.Future()
        with self._gathering:
            self._check_open()
            self._jobs.append((job, future))
            self._gathering.notify()
        return future

    def _check_open(self) -> None:
        if self._closing:
            raise RuntimeError("the journal of calls is closed")

    def _serve(self) -> None:
        while True:
            questions, jobs, entries = self._gathered()
            if not questions and not jobs and not entries:
                break
            self._tell(questions, self._looked_up)
            for job, future in jobs:
                self._run(job, future)
            if entries:
                self._due = time.monotonic() + LINGER_S
                self._tell(entries, self._written)
        self._file.close()

    def _gathered(self) -> tuple[list[_Waiting], list[Any], list[_Waiting]]:
        """Sleep until there is something to do and return it; nothing where the journal is being closed."""
        with self._gathering:
            while not self._closing and not self._questions and not self._jobs:
                pause = self._due - time.monotonic()
                if self._entries and pause <= 0:
                    break
                self._idle = not self._entries
                self._gathering.wait(pause if self._entries else None)
            self._idle = False
            questions, jobs, entries = self._questions[:], self._jobs, []
            self._questions.clear()
            self._jobs = []
            if self._closing or time.monotonic() >= self._due:
                entries = self._entries[:]
                self._entries.clear()
            return questions, jobs, entries

    def _looked_up(self, waiting: Sequence[_Waiting]) -> list[Any]:
        found = self._file.contents([one.item for one in waiting])
        return [found.get(one.item) for one in waiting]

    def _written(self, waiting: Sequence[_Waiting]) -> list[Any]:
        outcomes = self._file.write([one.item for one in waiting])
        self.transactions += 1
        return outcomes

    def _tell(self, waiting: Sequence[_Waiting], done: Callable[[Sequence[_Waiting]], list[Any]]) -> None:
        """Do what all of `waiting` wait for, and wake them: one hop for each event loop."""
        if not waiting:
            return
        outcomes: list[Any]
        try:
            outcomes = done(waiting)
        except Exception as error:
            outcomes = [self._told(error)] * len(waiting)
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
        for one, outcome in zip(waiting, outcomes, strict=True):
            by_loop.setdefault(one.loop, []).append((one.future, outcome))
        for loop, settled in by_loop.items():
            try:
                loop.call_soon_threadsafe(_wake, settled)
            except RuntimeError:  # The loop has ended: nobody waits any more, and what was written stays.
                continue

    def _run(self, job: Callable[[JournalFile], Any], future: futures.Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(job(self._file))
        except Exception as error:
            future.set_exception(self._told(error))

    def _told(self, error: Exception) -> Exception:
        return self._file.told(error) if isinstance(error, sqlite3.Error) else error


class RunJournal:
    """A store's journal as one run uses it: a `BatchJournal`. Made by `StoreJournal.of_run`."""

    def __init__(self, journal: StoreJournal, run: str) -> None:
        self._journal = journal
        self._run = run

    async def known(self, call: str) -> Reply | None:
        """Return the reply that was written down, whichever run asked, without `parsed`; None where there is none."""
        content = await self._journal.ask(call)
        return None if content is None else unpacked(content)

    async def intend(self, call: str, model: str, worst_usd: float) -> None:
        """Write down that the call is about to be sent."""
        await self._journal.write(Intent(call, self._run, model, worst_usd))

    async def answered(self, call: str, reply: Reply) -> None:
        """Write the reply down. The first one that is no error stays the call's reply; what later ones cost is kept too."""
        await self._journal.write(Answer(call, self._run, _account(reply), packed(reply)))

    async def submitting(self, nonce: str, model: str, calls: Mapping[str, float]) -> None:
        """Write down a batch that is about to be sent, and its calls as intended."""
        await self._journal.write(Submitting(nonce, self._run, model, dict(calls)))

    async def submitted(self, nonce: str, batch: str) -> None:
        """Write down the provider's id of a batch.

        Raises:
            ValueError: no batch with this nonce is open.
        """
        await self._journal.write(Submitted(nonce, batch))

    async def landed(self, nonce: str, undone: Collection[str] = ()) -> None:
        """Write down that nothing more will come of the batch.

        Calls of it without a reply may have been billed, so they become "unknown", except for those that the provider says
        it has not done (`undone`: expired or cancelled, and not billed) and those of a batch that never got a provider's id:
        they leave nothing.
        """
        await self._journal.write(Landed(nonce, frozenset(undone)))

    async def submissions(self, model: str) -> list[Submission]:
        """Return the batches of a model that have not landed, whichever run sent them, the oldest first."""
        return [
            Submission(nonce, model, tuple(calls), batch, worst_usd)
            for nonce, calls, batch, worst_usd in await self._journal.open_batches(model)
        ]


def packed(reply: Reply) -> bytes:
    """Return a reply as bytes, without `parsed` and `cached`."""
    usage = reply.usage
    fields = {
        **{name: getattr(reply, name) for name in _PLAIN},
        "usage": [usage.input_tokens, usage.cached_input_tokens, usage.cache_write_tokens, usage.output_tokens],
        "logprobs": reply.logprobs and [[one.token, one.logprob, one.top] for one in reply.logprobs],
    }
    if reply.calls:
        fields["calls"] = [[call.id, call.name, call.arguments_json] for call in reply.calls]
    content = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return zlib.compress(content, 1) if len(content) > _LARGE_BYTES else content


def unpacked(content: bytes) -> Reply:
    """Return the reply that `packed` made bytes of."""
    plain = content if content.startswith(b"{") else zlib.decompress(content)
    fields = json.loads(plain.decode("utf-8", "surrogatepass"))
    logprobs = fields["logprobs"]
    return Reply(
        **{name: fields[name] for name in _PLAIN},
        usage=Usage(*fields["usage"]),
        logprobs=None
        if logprobs is None
        else tuple(TokenLogprob(token, logprob, tuple((t, p) for t, p in top)) for token, logprob, top in logprobs),
        calls=tuple(ToolCall(*call) for call in fields.get("calls", ())),
    )


_PLAIN = ("status", "text", "model", "usd", "seconds", "attempts", "detail")


@dataclass(frozen=True, slots=True)
class _Waiting:
    """Somebody who awaits something."""

    item: Any
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


def _wake(settled: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, outcome in settled:
        if future.done():
            continue
        if isinstance(outcome, UserError):
            future.set_exception(type(outcome)(str(outcome)))  # Each its own: a traceback grows with every task.
        elif isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _account(reply: Reply) -> dict[str, Any]:
    usage = reply.usage
    return {
        "answered_by": _clean(reply.model),
        "status": reply.status,
        "input_tokens": usage.input_tokens,
        "cached_tokens": usage.cached_input_tokens,
        "cache_write_tokens": usage.cache_write_tokens,
        "output_tokens": usage.output_tokens,
        "usd": None if reply.status == "unknown" else reply.usd,
        "seconds": reply.seconds,
        "attempts": reply.attempts,
        "detail": _shown(reply),
    }


def _shown(reply: Reply) -> str | None:
    """Return why a call failed, up to the first quotation: servers quote requests, and readers are to see no corpus text."""
    if reply.status not in ("rejected", "error"):
        return None
    said = _QUOTATION.split(reply.detail, maxsplit=1)[0][:_SHOWN_CHARS].strip()
    return _clean(said)


def _clean(text: str) -> str | None:
    return text.encode("utf-8", "replace").decode() or None
