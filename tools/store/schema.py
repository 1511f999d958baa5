"""Numbered, append-only SQL migrations; each runs in a transaction and is recorded with its digest."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.resources import files
from typing import TYPE_CHECKING

from exegete.tools.errors import UserError
from exegete.tools.seeds import digest

if TYPE_CHECKING:
    import duckdb

QUIET = "SET enable_progress_bar = false"
"""DuckDB draws progress bars in notebooks, of everything that takes seconds; what the store does by itself is not to."""

MEMORY = "384MB"
"""For each database that the store opens by itself; the rest goes to the disk. DuckDB's own limit is 80 % of the machine's memory, and
caches grow towards it: a run of millions of latents would take gigabytes that its subject and models need."""

_LEDGER = """
CREATE TABLE IF NOT EXISTS main.migrations (
    version INTEGER PRIMARY KEY, name VARCHAR NOT NULL, digest VARCHAR NOT NULL,
    applied_at TIMESTAMP NOT NULL
)
"""


def migrations() -> list[tuple[int, str, str]]:
    """Return version, name and SQL of every migration this code knows, ascending and without gaps from 1."""
    folder = files("exegete.tools.store").joinpath("migrations")
    found = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".sql")), key=lambda entry: entry.name)
    known = [(int(entry.name[:4]), entry.name, entry.read_text(encoding="utf-8")) for entry in found]
    if [version for version, _, _ in known] != list(range(1, len(known) + 1)):
        raise ValueError(f"migrations are not numbered without gaps: {[name for _, name, _ in known]}")
    return known


def schema_version() -> int:
    """Return the version of the schema that this code writes."""
    return len(migrations())


def migrate(connection: duckdb.DuckDBPyConnection, where: str) -> None:
    """Bring the database behind `connection` to the newest schema; `where` names it in errors.

    Raises:
        UserError: the database is newer than this code, or a migration that it had was changed since.
    """
    connection.execute(_LEDGER)
    applied = dict(connection.execute("SELECT version, digest FROM main.migrations").fetchall())
    check_version(max(applied, default=0), where)
    for version, name, sql in migrations():
        if version not in applied:
            connection.begin()
            connection.execute(sql)
            connection.execute(
                "INSERT INTO main.migrations VALUES (?, ?, ?, ?)", [version, name, digest(sql), utc_now()]
            )
            connection.commit()
        elif applied[version] != digest(sql):
            raise UserError(
                f"{where} was made with another {name!r} than this version of exegete has; use the version that made it"
            )


def utc_now() -> datetime:
    """Return the time as the store keeps it: UTC, without a zone (DuckDB needs another package to read a time with one)."""
    return datetime.now(UTC).replace(tzinfo=None)


def check_version(version: int, where: str) -> None:
    """Raise UserError where `version` is newer than what this code knows."""
    if version > schema_version():
        raise UserError(
            f"{where} has schema {version}, and this exegete knows only {schema_version()}: update it (pip install -U exegete)"
        )
