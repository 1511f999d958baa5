"""Taking back what a run has recorded of latents, so that they are labeled anew.

The latents are a table of the connection, so that a million of them cost no more than the rows that go:

1. `forgotten` holds latents of which the run's results go, those whose floors go, and of which scores and verdicts go with them.
2. Parts of verdicts that hold such rows are replaced by parts without them. The old ones stay on disk, since readers of the
   published snapshot may have them open; they are removed when the store is next opened for writing.
3. An explanation goes with them where no run has scored or tried it, unless it may belong to a run that does not score.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from exegete.tools.store.parts import supersede, write_part

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

Replaced = Mapping[str, "tuple[str, int] | None"]
"""Part → what stands in its place, a new part and its rows; None where nothing is left."""

_SUPERSEDED = """
run = $run AND dictionary = $dictionary AND (
    (baseline IS NULL AND latent IN (SELECT latent FROM forgotten WHERE NOT of_floors))
    OR (baseline IS NOT NULL AND latent IN (SELECT latent FROM forgotten WHERE of_floors))
)
"""
_DELETE_UNUSED = """
DELETE FROM data.explanations e WHERE dictionary = $dictionary AND latent IN (SELECT latent FROM forgotten WHERE NOT of_floors)
AND explanation_id NOT IN (
    SELECT explanation_id FROM data.scores
    WHERE dictionary = $dictionary AND latent IN (SELECT latent FROM forgotten))
AND explanation_id NOT IN (
    SELECT explanation_id FROM data.climbs
    WHERE dictionary = $dictionary AND explanation_id IS NOT NULL AND latent IN (SELECT latent FROM forgotten))
AND NOT EXISTS (
    FROM data.results r WHERE r.dictionary = e.dictionary AND r.latent = e.latent AND r.status = 'labeled'
    AND NOT EXISTS (FROM data.scores s WHERE s.run = r.run AND s.dictionary = r.dictionary AND s.latent = r.latent)
)
"""
"""Explanations that no run has scored, of latents of which no run has explanations that it has not scored."""


class Forgotten(NamedTuple):
    """What is to go; its latents are the table `forgotten` of the connection."""

    key: dict[str, str]
    latents: int


def chosen(connection: duckdb.DuckDBPyConnection, run: str, dictionary: str, all_of_it: bool) -> Forgotten:
    """Choose the latents about which calls are missing (or `all_of_it`); where there are any, all floors go as well."""
    key = {"run": run, "dictionary": dictionary}
    here = "run = $run AND dictionary = $dictionary"
    incomplete = "true" if all_of_it else "missing_calls > 0"
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE forgotten AS SELECT DISTINCT latent, false AS of_floors FROM data.results WHERE {here}"
        f" AND {incomplete}",
        key,
    )
    connection.execute(
        f"INSERT INTO forgotten SELECT DISTINCT latent, true FROM data.floors WHERE {here}"
        " AND (missing_calls > 0 OR EXISTS (FROM forgotten))",
        key,
    )
    [(latents,)] = connection.execute("SELECT count(DISTINCT latent) FROM forgotten").fetchall()
    return Forgotten(key, int(latents))


def superseded_parts(connection: duckdb.DuckDBPyConnection, folder: Path, forgotten: Forgotten) -> Replaced:
    """Write the parts that are to stand in place of those that hold rows of `forgotten`."""
    parts = [part for (part,) in connection.execute("SELECT part FROM data.verdict_parts ORDER BY part").fetchall()]
    if not parts:
        return {}
    query = f"SELECT DISTINCT filename FROM read_parquet($parts, filename = true) WHERE {_SUPERSEDED}"
    paths = [str(folder / part) for part in parts]
    found = connection.execute(query, {"parts": paths, **forgotten.key}).fetchall()
    replaced: dict[str, tuple[str, int] | None] = {}
    for name in sorted(Path(path).name for (path,) in found):
        query = f"SELECT * FROM read_parquet($part) WHERE NOT ({_SUPERSEDED})"
        given: dict[str, Any] = {"part": str(folder / name), **forgotten.key}
        rows: pa.Table = connection.sql(query, params=given).to_arrow_table()
        replaced[name] = (write_part(folder, rows), rows.num_rows) if rows.num_rows else None
    supersede(folder, replaced)
    return replaced


def forget(connection: duckdb.DuckDBPyConnection, forgotten: Forgotten, replaced: Replaced) -> None:
    """Remove what is forgotten, in the transaction that is open."""
    here, key = "run = $run AND dictionary = $dictionary", forgotten.key
    own = "latent IN (SELECT latent FROM forgotten WHERE NOT of_floors)"
    connection.execute(f"DELETE FROM data.results WHERE {here} AND {own}", key)
    connection.execute(
        f"DELETE FROM data.floors WHERE {here} AND latent IN (SELECT latent FROM forgotten WHERE of_floors)", key
    )
    connection.execute(f"DELETE FROM data.scores WHERE {_SUPERSEDED}", key)
    connection.execute(f"DELETE FROM data.climbs WHERE {here} AND NOT control AND {own}", key)
    forget_unused(connection, key["dictionary"])
    for part, remaining in replaced.items():
        connection.execute("DELETE FROM data.verdict_parts WHERE part = ?", [part])
        if remaining is not None:
            connection.execute("INSERT INTO data.verdict_parts VALUES (?, ?) ON CONFLICT DO NOTHING", remaining)


def choose_control(connection: duckdb.DuckDBPyConnection, run: str, dictionary: str) -> None:
    """Choose the latents of a run's control subset, whose climbs are about to be replaced."""
    query = (
        "CREATE OR REPLACE TEMP TABLE forgotten AS SELECT DISTINCT latent, false AS of_floors FROM data.climbs"
        " WHERE run = $run AND dictionary = $dictionary AND control"
    )
    connection.execute(query, {"run": run, "dictionary": dictionary})


def forget_unused(connection: duckdb.DuckDBPyConnection, dictionary: str) -> None:
    """Remove explanations of the chosen latents that nothing rests on any more, in the transaction that is open."""
    connection.execute(_DELETE_UNUSED, {"dictionary": dictionary})
