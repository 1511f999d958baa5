"""The tables of the journal of calls: one SQLite file, written by one thread in transactions that are fsynced.

    intents   calls that were or are about to be sent and have no reply yet; as few as there are in flight
    calls     the account, append-only: what became of each call, numbered in the order in which that was settled
    replies   what was answered, by the call's content address; the first answer for good is never replaced
    batches   batches of calls that have not landed, each with its calls in their order

1. An answer takes the oldest intent of its call away and writes the account and the reply, in one transaction.
2. An intent that nothing will answer is settled as "unknown" with its worst case: one that says itself that its attempt was
   lost (`…/lost-…`) at once, one without an open batch when the file is next opened, one of a batch that lands without it.
3. An answer for good has its call's own id in the account. What can happen to one call several times has the number of its
   row in its id (`…/failed-7`, `…/unknown-8`, `…/again-9`), so that no two rows share an id.
"""

from __future__ import annotations

import json
import sqlite3
import time
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exegete.tools.errors import UserError
from exegete.tools.store.parts import sync_folder

JOURNAL = "journal.sqlite"
"""Its name in the folder of a store."""
LOST = "/lost-"
"""In the id of an attempt that was lost on the way: nobody will answer it."""
_VERSION = 1
_ROWS = 400
"""Rows in one statement. Between two statements the thread waits for the interpreter, so there are to be few."""

_SCHEMA = """
CREATE TABLE intents (
    entry INTEGER PRIMARY KEY, call TEXT NOT NULL, run TEXT NOT NULL, model TEXT NOT NULL, worst_usd REAL NOT NULL,
    nonce TEXT, at REAL NOT NULL
);
CREATE INDEX intents_by_call ON intents (call);
CREATE INDEX intents_by_nonce ON intents (nonce) WHERE nonce IS NOT NULL;
CREATE TABLE calls (
    settled INTEGER PRIMARY KEY, call_id TEXT NOT NULL, run TEXT NOT NULL, model TEXT NOT NULL, answered_by TEXT,
    status TEXT NOT NULL, input_tokens INTEGER, cached_tokens INTEGER, cache_write_tokens INTEGER, output_tokens INTEGER,
    usd REAL, worst_usd REAL NOT NULL, seconds REAL, attempts INTEGER, detail TEXT, noted_at REAL NOT NULL
);
CREATE TABLE replies (call TEXT PRIMARY KEY, status TEXT NOT NULL, content BLOB NOT NULL);
CREATE TABLE batches (
    position INTEGER PRIMARY KEY, nonce TEXT NOT NULL UNIQUE, model TEXT NOT NULL, batch TEXT, calls BLOB NOT NULL
);
PRAGMA user_version = 1;
"""
CALL_COLUMNS = (
    *("call_id", "run", "model", "answered_by", "status", "input_tokens", "cached_tokens", "cache_write_tokens"),
    *("output_tokens", "usd", "worst_usd", "seconds", "attempts", "detail", "noted_at"),
)
"""Columns of a row of the account."""
SPENT_USD = "coalesce(sum(CASE status WHEN 'unknown' THEN worst_usd ELSE usd END), 0.0)"
"""What rows of the account have cost: what was answered, and what is unknown at most."""
SPENT_TOKENS = (
    "coalesce(sum(coalesce(input_tokens, 0) + coalesce(output_tokens, 0)), 0), "
    "coalesce(sum(CASE status WHEN 'unknown' THEN 1 ELSE 0 END), 0), "
    "coalesce(max(coalesce(input_tokens, 0) + coalesce(output_tokens, 0)), 0)"
)
"""Tokens that rows of the account have taken, how many of them are unknown, and the most that one has taken."""


@dataclass(frozen=True, slots=True)
class Intent:
    """A call is about to be sent."""

    call: str
    run: str
    model: str
    worst_usd: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply has come."""

    call: str
    run: str
    account: Mapping[str, Any]
    """Columns of the account that the reply fills."""
    content: bytes
    """The reply itself, packed."""


@dataclass(frozen=True, slots=True)
class Submitting:
    """A batch is about to be sent."""

    nonce: str
    run: str
    model: str
    calls: Mapping[str, float]
    """Id → worst-case USD."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """The provider has named a batch."""

    nonce: str
    batch: str


@dataclass(frozen=True, slots=True)
class Landed:
    """Nothing more will come of a batch."""

    nonce: str
    undone: frozenset[str] = frozenset()
    """Calls of it that the provider says it did not do."""


Entry = Intent | Answer | Submitting | Submitted | Landed


class JournalFile:
    """The open file. One thread at a time.

    Raises:
        UserError: it is damaged, open in another program or from a newer version, or the disk is full.
    """

    def __init__(self, path: Path, settled: int = 0) -> None:
        """Open or make the file; calls are numbered after `settled`, the last that readers have seen."""
        self.path = path
        self._left: dict[str, tuple[str, str, float]] = {}
        """Run, model and worst case of calls that a batch has left out, until they are sent again or said to have failed."""
        try:
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1.0)
        except sqlite3.Error as error:
            raise self.told(error) from error
        try:
            self._prepare()
            self._settled = max(settled, self._value("SELECT coalesce(max(settled), 0) FROM calls"))
            self._recover()
        except sqlite3.Error as error:
            self.close()
            raise self.told(error) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; what was not committed is undone."""
        self._connection.close()

    def write(self, entries: Sequence[Entry]) -> list[ValueError | None]:
        """Write entries in one durable transaction, all or none; return for each None, or why it says nothing.

        Raises:
            sqlite3.Error: nothing was written.
        """
        self._begin()
        try:
            outcomes = self._written(entries)
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        return outcomes

    def contents(self, calls: Sequence[str]) -> dict[str, bytes]:
        """Return the packed replies of those calls that have one."""
        return dict(self._each("SELECT call, content FROM replies WHERE call IN ({})", calls))

    def batches(self, model: str) -> list[tuple[str, list[str], str | None, float]]:
        """Return a model's batches that have not landed, in their order.

        Each with its nonce, its calls, the provider's id and the worst case of its calls without a reply, in USD.
        """
        query = (
            "SELECT nonce, calls, batch, (SELECT coalesce(sum(worst_usd), 0.0) FROM intents WHERE intents.nonce = batches.nonce)"
            " FROM batches WHERE model = ? ORDER BY position"
        )
        found = self._connection.execute(query, [model])
        return [(nonce, json.loads(zlib.decompress(calls)), batch, usd) for nonce, calls, batch, usd in found]

    def spent_usd(self, run: str, after: int = 0) -> float:
        """Return what a run's answered calls cost, and its unknown ones at most: of those settled after number `after`."""
        query = f"SELECT {SPENT_USD} FROM calls WHERE run = ? AND settled > ?"
        return float(self._value(query, run, after))

    def spent_tokens(self, run: str, after: int = 0) -> tuple[int, int, int]:
        """Return `SPENT_TOKENS` of the calls of a run settled after number `after`."""
        query = f"SELECT {SPENT_TOKENS} FROM calls WHERE run = ? AND settled > ?"
        taken, unknown, most = self._connection.execute(query, [run, after]).fetchone()
        return int(taken), int(unknown), int(most)

    def account(self, after: int, limit: int) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        """Return at most `limit` rows settled after number `after`, and all rows in flight, each behind its number."""
        settled = f"SELECT settled, {', '.join(CALL_COLUMNS)} FROM calls WHERE settled > ? ORDER BY settled LIMIT ?"
        in_flight = (
            "SELECT entry, call || '/in-flight-' || entry, run, model, NULL, 'in_flight', NULL, NULL, NULL, NULL, NULL,"
            " worst_usd, NULL, NULL, NULL, at FROM intents ORDER BY entry"
        )
        return (
            self._connection.execute(settled, [after, limit]).fetchall(),
            self._connection.execute(in_flight).fetchall(),
        )

    def told(self, error: sqlite3.Error) -> Exception:
        """Return what the user is told of an error; the error itself where it is not the user's to mend."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return UserError(
                f"the journal of calls {str(self.path)!r} is damaged ({error}); restore it, or move it away and resume: "
                "replies that only it holds are paid for again"
            )
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return UserError(f"the journal of calls {str(self.path)!r} is open in another program; close it there")
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            return UserError(
                f"cannot write to the store {str(self.path.parent)!r} ({error}); free some space and resume"
            )
        return error

    def _prepare(self) -> None:
        # Exclusive before anything else: the index of the log is then in memory, and no second file is mapped.
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL", "cache_size = -32768"):
            self._connection.execute(f"PRAGMA {pragma}").fetchall()
        version = self._value("PRAGMA user_version")
        if version > _VERSION:
            raise UserError(
                f"{str(self.path)!r} has version {version}; this exegete knows {_VERSION}: pip install -U exegete"
            )
        if version == 0:
            self._connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
            sync_folder(self.path.parent)

    def _recover(self) -> None:
        """Settle what a process left in flight that ended without a word."""
        self._begin()
        self._give_up("nonce IS NULL", (), "no reply was written down before the process ended")
        self._connection.execute("COMMIT")
        self._settled = self._next

    def _begin(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        self._next = self._settled

    def _written(self, entries: Sequence[Entry]) -> list[ValueError | None]:
        # Whoever waits for one entry has not sent the next, so those of one transaction may be taken kind by kind.
        of_kind: dict[type, list[Any]] = defaultdict(list)
        for entry in entries:
            of_kind[type(entry)].append(entry)
        for entry in of_kind[Submitting]:
            self._submit(entry)
        self._intend(of_kind[Intent])
        outcomes = {id(entry): self._name_batch(entry) for entry in of_kind[Submitted]}
        self._answer(of_kind[Answer])
        for entry in of_kind[Landed]:
            self._land(entry)
        self._settled = self._next
        return [outcomes.get(id(entry)) for entry in entries]

    def _submit(self, entry: Submitting) -> None:
        for call in entry.calls:
            self._left.pop(call, None)
        calls = zlib.compress(json.dumps(list(entry.calls)).encode(), 1)
        self._connection.execute(
            "INSERT INTO batches (nonce, model, calls) VALUES (?, ?, ?)", [entry.nonce, entry.model, calls]
        )
        at = time.time()
        self._insert(
            "INSERT INTO intents (call, run, model, worst_usd, nonce, at)",
            [(call, entry.run, entry.model, worst_usd, entry.nonce, at) for call, worst_usd in entry.calls.items()],
        )

    def _intend(self, intents: Iterable[Intent]) -> None:
        at = time.time()
        kept, lost = [], []
        for one in intents:
            if LOST in one.call:
                lost.append(
                    self._row(one.call, one.run, one.model, one.worst_usd, status="unknown", detail="lost on the way")
                )
            else:
                kept.append((one.call, one.run, one.model, one.worst_usd, None, at))
        self._insert("INSERT INTO intents (call, run, model, worst_usd, nonce, at)", kept)
        self._insert(f"INSERT INTO calls (settled, {', '.join(CALL_COLUMNS)})", lost)

    def _name_batch(self, entry: Submitted) -> ValueError | None:
        found = self._connection.execute("UPDATE batches SET batch = ? WHERE nonce = ?", [entry.batch, entry.nonce])
        return None if found.rowcount else ValueError(f"no batch {entry.nonce!r} was being submitted")

    def _answer(self, answers: Sequence[Answer]) -> None:
        calls = [answer.call for answer in answers]
        open_intents: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
        query = "SELECT call, entry, run, model, worst_usd FROM intents WHERE call IN ({}) ORDER BY entry DESC"
        for call, *intent in self._each(query, calls):
            open_intents[call].append(tuple(intent))
        final = {
            call for (call,) in self._each("SELECT call FROM replies WHERE call IN ({}) AND status <> 'error'", calls)
        }
        answered, rows = [], []
        for answer in answers:
            # An answer without an intent is kept nevertheless: it was paid for.
            unasked = (answer.run, answer.account["answered_by"] or "", answer.account["usd"] or 0.0)
            left = (None, *self._left.pop(answer.call, unasked))
            entry, run, model, worst_usd = open_intents[answer.call].pop() if open_intents[answer.call] else left
            answered.append(entry)
            rows.append(self._row(self._id(answer, final), run, model, worst_usd, **answer.account))
        self._insert(f"INSERT INTO calls (settled, {', '.join(CALL_COLUMNS)})", rows)
        list(self._each("DELETE FROM intents WHERE entry IN ({})", [entry for entry in answered if entry is not None]))
        self._insert(
            "INSERT INTO replies",
            [(a.call, a.account["status"], a.content) for a in answers if a.account["status"] != "unknown"],
            " ON CONFLICT (call) DO UPDATE SET status = excluded.status, content = excluded.content WHERE replies.status = 'error'",
        )

    def _id(self, answer: Answer, final: set[str]) -> str:
        status, number = answer.account["status"], self._next + 1
        if status in ("error", "unknown"):
            return f"{answer.call}/{'failed' if status == 'error' else status}-{number}"
        if answer.call in final:
            return f"{answer.call}/again-{number}"
        final.add(answer.call)
        return answer.call

    def _land(self, entry: Landed) -> None:
        found = self._connection.execute("SELECT batch FROM batches WHERE nonce = ?", [entry.nonce]).fetchone()
        if found is None:
            return
        query = "SELECT entry, call, run, model, worst_usd FROM intents WHERE nonce = ?"
        left = self._connection.execute(query, [entry.nonce]).fetchall()
        self._left |= {call: (run, model, worst_usd) for _, call, run, model, worst_usd in left}
        undone = [
            intent for intent, call, *_ in left if call in entry.undone or found[0] is None
        ]  # Without an id it never got there.
        list(self._each("DELETE FROM intents WHERE entry IN ({})", undone))
        self._give_up("nonce = ?", (entry.nonce,), f"nothing came of it in batch {found[0]}")
        self._connection.execute("DELETE FROM batches WHERE nonce = ?", [entry.nonce])

    def _give_up(self, where: str, parameters: tuple[str, ...], detail: str) -> None:
        """Settle intents as unknown."""
        found = self._connection.execute(
            f"INSERT INTO calls (settled, call_id, run, model, status, worst_usd, detail, noted_at)"
            f" SELECT ? + n, call || '/unknown-' || (? + n), run, model, 'unknown', worst_usd, ?, at FROM"
            f" (SELECT *, row_number() OVER (ORDER BY entry) AS n FROM intents WHERE {where})",
            [self._next, self._next, detail, *parameters],
        )
        self._next += found.rowcount
        self._connection.execute(f"DELETE FROM intents WHERE {where}", parameters)

    def _row(self, call_id: str, run: str, model: str, worst_usd: float, **account: Any) -> tuple[Any, ...]:
        self._next += 1
        known = account | {
            "call_id": call_id,
            "run": run,
            "model": model,
            "worst_usd": worst_usd,
            "noted_at": time.time(),
        }
        return (self._next, *(known.get(column) for column in CALL_COLUMNS))

    def _insert(self, into: str, rows: Sequence[tuple[Any, ...]], then: str = "") -> None:
        for start in range(0, len(rows), _ROWS):
            chunk = rows[start : start + _ROWS]
            each = f"({', '.join('?' * len(chunk[0]))})"
            self._connection.execute(
                f"{into} VALUES {', '.join([each] * len(chunk))}{then}", [value for row in chunk for value in row]
            )

    def _each(self, query: str, keys: Sequence[Any]) -> Iterable[tuple[Any, ...]]:
        for start in range(0, len(keys), _ROWS):
            chunk = keys[start : start + _ROWS]
            yield from self._connection.execute(query.format(", ".join("?" * len(chunk))), chunk).fetchall()

    def _value(self, query: str, *parameters: Any) -> Any:
        return self._connection.execute(query, parameters).fetchone()[0]
