"""What readers see of calls to language models: Parquet parts exported from the journal, and a table of those in flight.

`data.call_parts.settled` numbers the last call of each part. Where the next one begins is stored in the transaction that
registers the part, so a crash can neither lose calls nor double them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from exegete.tools.errors import UserError
from exegete.tools.store import call_rows
from exegete.tools.store.parts import write_part

if TYPE_CHECKING:
    from exegete.tools.store.journal import StoreJournal

_CALLS_IN_A_PART = 25_000

Transaction = Callable[[], AbstractContextManager[duckdb.DuckDBPyConnection]]


class ExportedCalls:
    """The exported calls of the store in `folder`, through the writer's connection and under the writer's lock."""

    def __init__(
        self,
        folder: Path,
        connection: duckdb.DuckDBPyConnection,
        lock: AbstractContextManager[object],
        transaction: Transaction,
    ) -> None:
        self._folder = folder / "calls"
        self._connection = connection
        self._lock = lock
        self._transaction = transaction

    def last(self) -> int:
        """Return the number of the last call in the journal that readers can see."""
        with self._lock:
            found = self._connection.execute("SELECT coalesce(max(settled), 0) FROM data.call_parts").fetchall()
        return int(found[0][0])

    def aggregates(self, columns: str, run: str) -> tuple[Any, ...] | None:
        """Return aggregates over the calls of a run that readers can see; None where they can see none of any run.

        Raises:
            UserError: a part of calls is damaged.
        """
        with self._lock:
            parts = self._connection.execute("SELECT part FROM data.call_parts").fetchall()
            if not parts:
                return None
            query = f"SELECT {columns} FROM read_parquet(?) WHERE run = ?"
            try:
                paths = [str(self._folder / part) for (part,) in parts]
                return self._connection.execute(query, [paths, run]).fetchone()
            except (duckdb.IOException, duckdb.InvalidInputException) as error:
                store, first = str(self._folder.parent), str(error).splitlines()[0]
                raise UserError(f"a part of calls in the store {store!r} is damaged ({first}); restore it") from error

    def export(self, journal: StoreJournal) -> None:
        """Bring the calls that the journal has settled since into parts; those in flight replace the ones of last time.

        The journal is read and the part written without the lock: meanwhile the writer goes on.
        """
        exported, full = self.last(), True
        while full:
            settled, in_flight = journal.account(exported, _CALLS_IN_A_PART)
            full = len(settled) == _CALLS_IN_A_PART
            exported = settled[-1][0] if settled else exported
            part = write_part(self._folder, call_rows.calls(settled)) if settled else None
            with self._transaction() as connection:
                if part is not None:
                    connection.execute("INSERT INTO data.call_parts VALUES (?, ?, ?)", [part, len(settled), exported])
                connection.execute("DELETE FROM data.open_calls")
                if in_flight:
                    connection.register("open_rows", call_rows.calls(in_flight))
                    connection.execute("INSERT INTO data.open_calls BY NAME SELECT * FROM open_rows")
                    connection.unregister("open_rows")
