"""Publishing: the snapshot that readers open is replaced whole, while the writer goes on.

1. In one transaction the tables are copied into a database beside the snapshot: what was committed before it, whatever is
   written meanwhile. Result tables that are small enough are sorted by latent; larger ones stay in the order of arrival, which
   is nearly that of the latents, since sorting ten million rows takes longer than all the rest and several gigabytes.
2. What readers would otherwise aggregate on every query is worked out there once, as tables (`worked_out.sql`).
3. The views are made there, over the store's present place and the registered parts.
4. It is closed (which writes its checkpoint), fsynced, and renamed over the former snapshot.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import duckdb

from exegete.tools.store.macros import macro_statements
from exegete.tools.store.parts import sync_file, sync_folder
from exegete.tools.store.schema import schema_version, utc_now
from exegete.tools.store.views import WORKED_OUT, view_statements, worked_out_queries

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


def publish(connection: duckdb.DuckDBPyConnection, folder: Path) -> Path:
    """Publish the database behind `connection` (attached as `run`) as the snapshot of the store in `folder`.

    `connection` is to be one of its own: the transaction of the copy is open for as long as that takes.
    """
    temporary = folder / TEMPORARY
    discard(folder)
    try:
        _copy(connection, temporary)
        _finish(temporary, folder)
        sync_file(temporary)
        temporary.replace(folder / SNAPSHOT)
        sync_folder(folder)
    except BaseException:
        discard(folder)
        raise
    return folder / SNAPSHOT


def discard(folder: Path) -> None:
    """Remove what an interrupted publishing left."""
    for name in (TEMPORARY, f"{TEMPORARY}.wal"):
        (folder / name).unlink(missing_ok=True)


def _copy(connection: duckdb.DuckDBPyConnection, temporary: Path) -> None:
    quoted = str(temporary).replace("'", "''")
    connection.execute(f"ATTACH '{quoted}' AS published")
    try:
        connection.begin()
        connection.execute("COPY FROM DATABASE run TO published (SCHEMA)")
        query = "SELECT schema_name, table_name FROM duckdb_tables() WHERE database_name = 'run' AND NOT internal"
        for schema, table in connection.execute(query).fetchall():
            order = f" ORDER BY {_ORDER[table]}" if _is_to_be_sorted(connection, table) else ""
            connection.execute(f"INSERT INTO published.{schema}.{table} SELECT * FROM run.{schema}.{table}{order}")
        connection.commit()
    except BaseException:
        connection.rollback()
        raise
    finally:
        connection.execute("DETACH published")


def _is_to_be_sorted(connection: duckdb.DuckDBPyConnection, table: str) -> bool:
    if table not in _ORDER:
        return False
    [(rows,)] = connection.execute(f"SELECT count(*) FROM run.data.{table}").fetchall()
    return int(rows) <= _SORTED_ROWS


def _finish(temporary: Path, folder: Path) -> None:
    with duckdb.connect(str(temporary)) as snapshot:
        for name, query in worked_out_queries().items():
            snapshot.execute(f"CREATE TABLE data.{name} AS {query}")
        # Looking at a damaged part ends a transaction, so before it begins.
        statements = statements_for(snapshot, folder)
        # One transaction: two hundred comments would each wait for the disk.
        snapshot.begin()
        snapshot.execute(
            "CREATE TABLE data.snapshot AS SELECT ?::TIMESTAMP AS published_at, ?::INTEGER AS schema_version,"
            " ?::VARCHAR AS code_version, ?::VARCHAR AS store",
            [utc_now(), schema_version(), version("exegete"), str(folder)],
        )
        for statement in statements:
            snapshot.execute(statement)
        snapshot.commit()


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
