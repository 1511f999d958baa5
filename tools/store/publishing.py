"""Publishing: the snapshot that readers open is replaced whole, while the writer goes on.

1. In one transaction, which sees what was committed when it began, the tables are copied into a database beside the snapshot.
   Result tables that are small enough are sorted by latent; larger ones stay in the order of arrival, which is nearly that of
   the latents, since sorting ten million rows takes longer than all the rest, and several gigabytes.
2. Large tables only grow, but for what `Former.removals` counts. So the next snapshot begins as a copy of the file of this one,
   to which the rows are added that came since; where the numbers of rows do not agree then, it is made from nothing.
3. What readers would otherwise aggregate on every query is worked out there once, as tables (`worked_out.sql`): in a snapshot
   that has grown, only for latents with new rows.
4. The views are made there, over the store's present place and the registered parts.
5. It is brought into one file (its checkpoint), closed, fsynced, and renamed over the former snapshot.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import duckdb

from exegete.tools.store.macros import macro_statements
from exegete.tools.store.parts import require_one_file, sync_file, sync_folder
from exegete.tools.store.schema import MEMORY, QUIET, schema_version, utc_now
from exegete.tools.store.views import BEST, WORKED_OUT, view_statements, worked_out_queries

SNAPSHOT = "labels.duckdb"
TEMPORARY = ".labels.publishing.duckdb"

_SORTED_ROWS = 500_000
_ORDER = {
    "results": "dictionary, latent, run",
    "floors": "dictionary, latent, run",
    "explanations": "dictionary, latent, explanation_id",
    "scores": "dictionary, latent, run, explanation_id, evaluator, metric, baseline",
    "typing": "dictionary, latent, run",
    "climbs": "dictionary, latent, run, control, step",
}
_LATENTS_AT_ONCE = 200_000
"""Whose best explanations are worked out at a time: those of a million need more memory than the store may take."""
_GROWING = ("results", "explanations", "scores", "climbs")


@dataclass(frozen=True, slots=True)
class Former:
    """A snapshot from which the next one may grow."""

    identity: tuple[int, int, int]
    """Of its file, which nobody may have replaced since."""
    removals: int
    """How often rows had been taken from the growing tables before it was made."""
    next_rows: Mapping[str, int]
    """Growing table → the first rowid that is not in it."""


def publish(
    connection: duckdb.DuckDBPyConnection, folder: Path, removals: int = 0, former: Former | None = None
) -> Former:
    """Publish the database behind `connection` (attached as `run`) as the snapshot of the store in `folder`.

    Args:
        connection: one of its own, in a transaction that has read something; it is ended.
        folder: of the store.
        removals: counts what was taken from the growing tables, as that transaction sees them.
        former: what the last publishing has returned.
    """
    temporary, snapshot = folder / TEMPORARY, folder / SNAPSHOT
    discard(folder)
    try:
        since = former.next_rows if former is not None and _can_grow(former, snapshot, removals) else None
        try:
            next_rows, before = _copy(connection, temporary, snapshot, since)
        except _OutOfStep:
            discard(folder)
            connection.begin()
            next_rows, before = _copy(connection, temporary, snapshot, None)
        _finish(temporary, folder, before)
        sync_file(temporary)
        temporary.replace(snapshot)
        sync_folder(folder)
    except BaseException:
        discard(folder)
        raise
    return Former(identity(snapshot), removals, next_rows)


def identity(path: Path) -> tuple[int, int, int]:
    """Return what tells a file from another one that has replaced it."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_mtime_ns


def discard(folder: Path) -> None:
    """Remove what an interrupted publishing left."""
    for name in (TEMPORARY, f"{TEMPORARY}.wal"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / f"{TEMPORARY}.tmp", ignore_errors=True)


class _OutOfStep(Exception):
    """Growing tables have other rows than those that were added up."""


def _can_grow(former: Former, snapshot: Path, removals: int) -> bool:
    large = former.next_rows["scores"] > _SORTED_ROWS  # What is small is sorted, and sorting is cheap.
    return large and former.removals == removals and snapshot.exists() and identity(snapshot) == former.identity


def _copy(
    connection: duckdb.DuckDBPyConnection, temporary: Path, snapshot: Path, since: Mapping[str, int] | None
) -> tuple[dict[str, int], int | None]:
    """Copy the tables, or what came `since` to the growing ones of a copy of `snapshot`.

    Returns the rowids from which the next one goes on, and how many scores the copy of `snapshot` had (None: there was none).
    """
    if since is not None:
        shutil.copyfile(snapshot, temporary)
    quoted = str(temporary).replace("'", "''")
    connection.execute(f"ATTACH '{quoted}' AS published")
    try:
        before = None if since is None else _count(connection, "published.data.scores")
        query = "SELECT schema_name, table_name FROM duckdb_tables() WHERE database_name = 'run' AND NOT internal"
        for schema, table in connection.execute(query).fetchall():
            connection.execute(f"CREATE SCHEMA IF NOT EXISTS published.{schema}")
            first = None if since is None or table not in _GROWING else since[table]
            _copy_table(connection, f"{schema}.{table}", first)
        next_rows = {table: _next_row(connection, f"run.data.{table}") for table in _GROWING}
        connection.commit()
    except BaseException:
        with suppress(
            duckdb.Error
        ):  # What failed first is what there is to say; a commit that failed has ended the transaction,
            connection.rollback()
        with suppress(duckdb.Error):  # and undoing it has detached what it had attached.
            connection.execute("DETACH DATABASE IF EXISTS published")
        raise
    connection.execute("DETACH published")
    return next_rows, before


def _copy_table(connection: duckdb.DuckDBPyConnection, table: str, first: int | None) -> None:
    """Copy a table, sorted where it is small enough; or add its rows from `first` on, and raise where then some are missing."""
    source, copied = f"run.{table}", f"published.{table}"
    if first is None:
        order = _ORDER.get(table.partition(".")[2])
        sort = f" ORDER BY {order}" if order and _count(connection, source) <= _SORTED_ROWS else ""
        connection.execute(f"CREATE OR REPLACE TABLE {copied} AS SELECT * FROM {source}{sort}")
        return
    connection.execute(f"INSERT INTO {copied} SELECT * FROM {source} WHERE rowid >= {first}")
    if _count(connection, source) != _count(connection, copied):
        raise _OutOfStep


def _count(connection: duckdb.DuckDBPyConnection, table: str) -> int:
    [(rows,)] = connection.execute(f"SELECT count(*) FROM {table}").fetchall()
    return int(rows)


def _next_row(connection: duckdb.DuckDBPyConnection, table: str) -> int:
    [(row,)] = connection.execute(f"SELECT coalesce(max(rowid) + 1, 0) FROM {table}").fetchall()
    return int(row)


def _finish(temporary: Path, folder: Path, before: int | None) -> None:
    with duckdb.connect(str(temporary)) as snapshot:
        snapshot.execute(QUIET)
        snapshot.execute(f"SET memory_limit = '{MEMORY}'")
        _work_out(snapshot, before)
        # Looking at a damaged part ends a transaction, so before it begins.
        statements = statements_for(snapshot, folder)
        # One transaction: two hundred comments would each wait for the disk.
        snapshot.begin()
        snapshot.execute(
            "CREATE OR REPLACE TABLE data.snapshot AS SELECT ?::TIMESTAMP AS published_at, ?::INTEGER AS schema_version,"
            " ?::VARCHAR AS code_version, ?::VARCHAR AS store",
            [utc_now(), schema_version(), version("exegete"), str(folder)],
        )
        for statement in statements:
            snapshot.execute(statement.replace("CREATE ", "CREATE OR REPLACE ", 1) if _makes(statement) else statement)
        snapshot.commit()
        snapshot.execute("CHECKPOINT")
    require_one_file(temporary)


def _makes(statement: str) -> bool:
    return statement.startswith("CREATE ")


def _work_out(snapshot: duckdb.DuckDBPyConnection, before: int | None) -> None:
    for name, query in worked_out_queries().items():
        if name != BEST:
            snapshot.execute(f"CREATE OR REPLACE TABLE data.{name} AS {query}")
    if before is None:
        snapshot.execute(f"CREATE OR REPLACE TABLE data.{BEST} AS {_best_of('false')}")
        [(latents,)] = snapshot.execute("SELECT coalesce(max(latent) + 1, 0) FROM data.scores").fetchall()
        for first in range(0, latents, _LATENTS_AT_ONCE):
            between = f"latent BETWEEN {first} AND {first + _LATENTS_AT_ONCE - 1}"
            snapshot.execute(f"INSERT INTO data.{BEST} {_best_of(between)}")
    else:
        snapshot.execute(
            f"CREATE TEMP TABLE touched AS SELECT DISTINCT latent FROM data.scores WHERE rowid >= {before}"
        )
        touched = "latent IN (SELECT latent FROM touched)"
        snapshot.execute(f"DELETE FROM data.{BEST} WHERE {touched}")
        snapshot.execute(f"INSERT INTO data.{BEST} {_best_of(touched)}")


def _best_of(chosen: str) -> str:
    return worked_out_queries(f"(SELECT * FROM data.scores WHERE {chosen})")[BEST]


def statements_for(connection: duckdb.DuckDBPyConnection, folder: Path) -> list[str]:
    """Return the statements that make the views and macros over the tables behind `connection`, for a store in `folder`."""
    query = "SELECT dictionary, evidence FROM data.dictionaries WHERE evidence NOT LIKE 'controls/%'"
    evidence = dict(connection.execute(query).fetchall())
    verdicts, calls, embeddings = (_parts(connection, folder, kind) for kind in ("verdict", "call", "embedding"))
    tables = [name for name in WORKED_OUT if _has_table(connection, name)]
    views = view_statements(folder, evidence, verdicts or [], calls, tables, embeddings or [])
    return views + macro_statements()


def _parts(connection: duckdb.DuckDBPyConnection, folder: Path, kind: str) -> list[str] | None:
    """Return the registered parts; None where the tables are those of a version that had no such parts yet."""
    if not _has_table(connection, f"{kind}_parts"):
        return None
    parts = connection.execute(f"SELECT part FROM data.{kind}_parts ORDER BY part").fetchall()
    return _sound_first(connection, folder / f"{kind}s", [part for (part,) in parts])


def _has_table(connection: duckdb.DuckDBPyConnection, name: str) -> bool:
    return bool(connection.execute("SELECT 1 FROM duckdb_tables() WHERE table_name = ?", [name]).fetchall())


def _sound_first(connection: duckdb.DuckDBPyConnection, folder: Path, parts: list[str]) -> list[str]:
    """Return the parts, a readable one first: a view takes its columns from there, and a damaged part must not take it along."""
    for index, part in enumerate(parts):
        try:
            connection.execute("SELECT 1 FROM parquet_schema(?)", [str(folder / part)]).fetchall()
        except duckdb.Error:
            continue
        return [part, *parts[:index], *parts[index + 1 :]]
    return parts
