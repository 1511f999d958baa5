"""Reading a store: always the published snapshot, never the file that a run writes.

The snapshot is attached to a database in memory: DuckDB keeps one instance per path within a process, and opening the path
itself would go on giving the former snapshot for as long as any connection to it is open.

DuckDB opens a file twice: it reads the header, closes it, and opens it again by its path. A publishing in between would give
the header of one snapshot and the rows of the next, so where the file was replaced meanwhile it is attached anew.
"""

from __future__ import annotations

from pathlib import Path

import duckdb

from exegete.tools.errors import UserError
from exegete.tools.store.folder import Store
from exegete.tools.store.publishing import SNAPSHOT, identity, statements_for
from exegete.tools.store.schema import check_version, schema_version

_ATTEMPTS = 20
"""A publishing takes longer than an opening, so that even one more is rarely needed."""


def connect(store: str | Path) -> duckdb.DuckDBPyConnection:
    """Return a read-only connection to the published results of the store in folder `store`.

    Keep it open as long as you like: it never blocks a run, and goes on showing the snapshot that it opened. Connect again
    to see newer results. A store that was moved is found again where it is now.

    Raises:
        UserError: there is no store, nothing was published yet, or the store is from a newer version.
    """
    folder = Path(store).resolve()
    snapshot = folder / SNAPSHOT
    Store.open(Path(store))
    if not snapshot.exists():
        raise UserError(f"nothing was published yet in the store {str(store)!r}; run `exegete label --store {store}`")
    connection = duckdb.connect(":memory:")
    try:
        _attach_whole(connection, snapshot)
        _heal(connection, folder)
    except duckdb.Error as error:
        connection.close()
        first = str(error).splitlines()[0]
        raise UserError(
            f"the snapshot of the store {str(store)!r} cannot be read ({first}); publish it again"
        ) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _attach_whole(connection: duckdb.DuckDBPyConnection, snapshot: Path) -> None:
    """Attach the snapshot as `labels` and use it, the one file from its header to its last row."""
    for attempt in range(1, _ATTEMPTS + 1):
        before = identity(snapshot)
        try:
            _attach(connection, snapshot)
        except duckdb.Error:
            if identity(snapshot) == before or attempt == _ATTEMPTS:
                raise
            continue
        if identity(snapshot) == before:
            break
        connection.execute("DETACH labels")
    else:
        raise duckdb.IOException(f"it was replaced {_ATTEMPTS} times while it was being opened")
    connection.execute("USE labels")


def _attach(connection: duckdb.DuckDBPyConnection, snapshot: Path) -> None:
    quoted = str(snapshot).replace("'", "''")
    connection.execute(f"ATTACH '{quoted}' AS labels (READ_ONLY)")


def _heal(connection: duckdb.DuckDBPyConnection, folder: Path) -> None:
    """Where the store was moved, or published by an older version, let temporary views stand before the snapshot's own."""
    # fetchone() would leave the result open, and DuckDB 2 then refuses the user's own first `connection.sql(…)`.
    [(published_in, version)] = connection.execute("SELECT store, schema_version FROM data.snapshot").fetchall()
    check_version(version, f"the store {str(folder)!r}")
    if published_in == str(folder) and version == schema_version():
        return
    for statement in statements_for(connection, folder):
        if not statement.startswith(("CREATE VIEW", "CREATE MACRO")):
            continue
        try:
            connection.execute(statement.replace("CREATE", "CREATE TEMP", 1))
        except (duckdb.CatalogException, duckdb.BinderException):
            # An older version had not yet the tables or columns of this view: its own view stands, if it had one.
            if version == schema_version():
                raise
