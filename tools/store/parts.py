"""Append-only Parquet parts: written, fsynced, renamed; they count once a transaction has registered them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa


def write_part(folder: Path, rows: pa.Table, options: Mapping[str, Any] | None = None) -> str:
    """Write `rows` durably to one Parquet file in `folder`, named by its content; return the name.

    `options` are those of `pyarrow.parquet.write_table`.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(rows, buffer, **{"compression": "zstd", "compression_level": 1, **(options or {})})
    content = buffer.getvalue()
    name = f"{hashlib.sha256(content).hexdigest()[:32]}.parquet"
    temporary = folder / f".{name}.writing"
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    temporary.rename(folder / name)
    sync_folder(folder)
    return name


SUPERSEDED = (
    "run = ? AND dictionary = ? AND ((baseline IS NULL AND latent IN (SELECT unnest(?::INTEGER[])))"
    " OR (baseline IS NOT NULL AND latent IN (SELECT unnest(?::INTEGER[]))))"
)
"""Rows of a run about latents that are to be recorded anew: their own, and those of floors."""


def superseded_parts(
    connection: duckdb.DuckDBPyConnection, folder: Path, chosen: Sequence[Any]
) -> dict[str, tuple[str, int] | None]:
    """Return the parts that hold rows for which `SUPERSEDED` is true of `chosen`, each with what is to stand in its place.

    That is a new part without them and its rows, or None where nothing is left. The old part stays on disk, since readers of
    the published snapshot may have it open; it is removed when the store is next opened for writing.
    """
    replaced: dict[str, tuple[str, int] | None] = {}
    for (part,) in connection.execute("SELECT part FROM data.verdict_parts ORDER BY part").fetchall():
        path = str(folder / part)
        query = f"SELECT count(*) FROM read_parquet(?) WHERE {SUPERSEDED}"
        ((found,),) = connection.execute(query, [path, *chosen]).fetchall()
        if not found:
            continue
        query = f"SELECT * FROM read_parquet(?) WHERE NOT ({SUPERSEDED})"
        rows: pa.Table = connection.sql(query, params=[path, *chosen]).to_arrow_table()
        replaced[part] = (write_part(folder, rows), rows.num_rows) if rows.num_rows else None
    return replaced


def remove_orphans(folder: Path, registered: Collection[str]) -> int:
    """Remove every file in `folder` that no transaction registered; return how many there were."""
    orphans = [path for path in folder.iterdir() if path.name not in registered]
    for path in orphans:
        path.unlink()
    return len(orphans)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    _sync(path)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
