"""The file of a ledger: one SQLite database, written in transactions that wait for the disk (WAL, synchronous = FULL).

    facts        name → value, as JSON: how it began, metric, answer, verdicts, how it ended
    decisions    of the investigator, by step
    calls        every call of every decision, in their order
    hypotheses   with their newest status
    notes        what the person who watches said, with the step that is told it

The file is held while it is open, so that no second process works on the same investigation. `exegete.agent.investigation.ledger`
says what is written when.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from exegete.agent.investigation.record import plain
from exegete.tools.errors import UserError
from exegete.tools.store.parts import sync_folder

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

_VERSION = 1
_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, content TEXT NOT NULL);
CREATE TABLE decisions (step INTEGER PRIMARY KEY, content TEXT NOT NULL);
CREATE TABLE calls (
    number INTEGER PRIMARY KEY, call TEXT NOT NULL UNIQUE, step INTEGER NOT NULL, tool TEXT NOT NULL, content TEXT NOT NULL,
    experiment TEXT UNIQUE, prediction TEXT, predicted_at TEXT,
    status TEXT, outcome TEXT, repeats TEXT, predicted INTEGER, passes INTEGER NOT NULL DEFAULT 0,
    seconds REAL NOT NULL DEFAULT 0, finished_at TEXT
);
CREATE TABLE hypotheses (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, content TEXT NOT NULL);
CREATE TABLE notes (number INTEGER PRIMARY KEY, step INTEGER NOT NULL UNIQUE, text TEXT NOT NULL);
PRAGMA user_version = 1;
"""


class LedgerFile:
    """The open file. Safe to use from several threads.

    Every method raises UserError where the file is damaged, the disk is full, or another process has it open.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or make it and its folder."""
        self.path = path
        self._lock = threading.RLock()
        with self._telling():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1.0)
        try:
            with self._telling():
                self._prepare()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close it."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction: on the disk once it is left, or not there at all. Within one, it joins that."""
        with self._telling(), self._lock:
            if self._connection.in_transaction:
                yield
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                # A full disk may have rolled it back already.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return what a query finds."""
        with self._telling(), self._lock:
            return self._connection.execute(query, values).fetchall()

    def value(self, kind: type[T], query: str, *values: Any) -> T | None:
        """Return what a query finds in one place, read as a `kind`; None where there is nothing, or NULL."""
        found = self.rows(query, *values)
        return None if not found or found[0][0] is None else self.read(kind, found[0][0])

    def change(self, query: str, *values: Any) -> bool:
        """Write; return whether anything changed."""
        with self.writing():
            return self._connection.execute(query, values).rowcount > 0

    def fact(self, name: str, kind: type[T]) -> T | None:
        """Return a fact, None where it is not there."""
        return self.value(kind, "SELECT content FROM facts WHERE name = ?", name)

    def first(self, name: str, kind: type[T], value: T) -> T:
        """Write a fact down unless it is there; return what is stored."""
        self.change("INSERT OR IGNORE INTO facts VALUES (?, ?)", name, as_text(value))
        stored = self.fact(name, kind)
        assert stored is not None
        return stored

    def set(self, name: str, value: Any) -> None:
        """Write a fact down in place of what is there."""
        self.change("INSERT OR REPLACE INTO facts VALUES (?, ?)", name, as_text(value))

    def read(self, kind: type[T], text: str) -> T:
        """Return the value that JSON text stands for. Raises UserError where it does not fit."""
        from pydantic import ValidationError

        try:
            return cast(T, _adapter(cast(Any, kind)).validate_json(text))
        except ValidationError as error:
            raise UserError(
                f"the ledger {str(self.path)!r} is damaged ({error.errors()[0]['msg']}); {_WAY_OUT}"
            ) from error

    def _prepare(self) -> None:
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
            self._connection.execute(f"PRAGMA {pragma}").fetchall()
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version > _VERSION:
            raise UserError(
                f"{str(self.path)!r} has version {version}; this exegete knows {_VERSION}: pip install -U exegete"
            )
        if version == 0:
            self._connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
            sync_folder(self.path.parent)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise told(self.path, error) from error
        except OSError as error:
            raise UserError(
                f"cannot write the investigation {str(self.path.parent)!r} ({error}); free some space, or name another folder"
            ) from error


def as_text(value: Any) -> str:
    """Return a value as JSON text: plain ones, and the contract's, also several of them."""
    return json.dumps(plain(_without_classes(value)), ensure_ascii=False, allow_nan=False)


def told(path: Path, error: sqlite3.Error) -> Exception:
    """Return what the user is told of an error with a file of an investigation; the error itself where it is a bug."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return UserError(f"the ledger {str(path)!r} is damaged ({error}); {_WAY_OUT}")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return UserError(
            f"the investigation {path.parent.name!r} is being worked on already; wait until that ends, or stop it"
        )
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
        return UserError(
            f"cannot write the investigation {str(path.parent)!r} ({error}); free some space and go on: "
            f"exegete ask --resume {path.parent.name}"
        )
    return error


_WAY_OUT = "restore it, or move its folder away and ask the question again"


def _without_classes(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return [_without_classes(one) for one in value] if isinstance(value, tuple | list) else value


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
