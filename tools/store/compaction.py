"""Compaction: many small Parquet parts become few large ones (log-structured merging, O'Neil et al. 1996).

A night writes a part of verdicts with every transaction, four thousand for a million latents, and a query that opens them all
takes a second before it reads a row.

1. Parts of similar size, within a factor of sixteen, are a level. Where sixteen of a level have gathered, those that came one
   after the other are merged, so that a row is rewritten a few times; parts of `LARGE_ROWS` or more are left alone.
2. The rows are written sorted by latent, in row groups small enough that a query for one latent reads one of them.
3. One transaction takes the merged parts from the register and puts the new one there, if all of them still stand there. Until
   then a crash leaves a file that nobody knows, which goes when the store is next opened for writing. So do the old parts, but
   not within a day: readers of a former snapshot may go on with them.

Only that transaction holds the writer's lock. A part that cannot be read is left where it is, with its level.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import duckdb

from exegete.tools.store.parts import supersede, sync_file, sync_folder
from exegete.tools.store.schema import MEMORY, QUIET

FAN = 16
LARGE_ROWS = 1_000_000
MOST_ROWS = 4_000_000
"""Of a merged part."""
SPILLED = ".merging"
"""Folder for what a merge cannot keep in memory."""
MERGES_AT_ONCE = 8
"""At one publishing: what a night writes in between needs one, and a store of an older version is brought up bit by bit."""
_ROW_GROUP = 32_768
_SORTED_BY = {
    "verdict": "dictionary, latent, run, evaluator, baseline NULLS FIRST, explanation_id",
    "call": "noted_at, call_id",
}

log = logging.getLogger(__name__)


class _Part(NamedTuple):
    name: str
    rows: int


def compact(connection: duckdb.DuckDBPyConnection, lock: AbstractContextManager[object], folder: Path) -> int:
    """Merge small parts of the store in `folder`, a few times at most; return how many merges there were.

    Args:
        connection: the writer's; only used while `lock` is held.
        lock: the writer's.
        folder: of the store.
    """
    merges = 0
    for kind in _SORTED_BY:
        while merges < MERGES_AT_ONCE:
            with lock:
                chosen = _level(_registered(connection, kind))
            if not chosen or not _merge(connection, lock, folder / f"{kind}s", kind, chosen):
                break
            merges += 1
    return merges


def _registered(connection: duckdb.DuckDBPyConnection, kind: str) -> list[_Part]:
    # In the order of arrival: what came one after the other has latents that are near each other.
    found = connection.execute(f"SELECT part, rows FROM data.{kind}_parts ORDER BY rowid").fetchall()
    return [_Part(*part) for part in found]


def _level(parts: Sequence[_Part]) -> list[_Part]:
    """Return the parts to be merged next, sixteen of the lowest level that has as many; none where no level has."""
    levels: dict[int, list[_Part]] = {}
    for part in parts:
        if part.rows < LARGE_ROWS:
            levels.setdefault((max(part.rows, 1).bit_length() - 1) // 4, []).append(part)
    full = [level for level, members in levels.items() if len(members) >= FAN]
    if not full:
        return []
    chosen = levels[min(full)][:FAN]
    while sum(part.rows for part in chosen) > MOST_ROWS:
        chosen.pop()
    return chosen


def _merge(
    connection: duckdb.DuckDBPyConnection,
    lock: AbstractContextManager[object],
    folder: Path,
    kind: str,
    parts: Sequence[_Part],
) -> bool:
    """Merge `parts` into one; return whether it stands in their place."""
    names = sorted(part.name for part in parts)
    merged = f"{hashlib.sha256(' '.join(names).encode()).hexdigest()[:32]}.parquet"
    temporary = folder / f".{merged}.writing"
    try:
        _write(temporary, [folder / name for name in names], _SORTED_BY[kind])
    except duckdb.Error as error:
        temporary.unlink(missing_ok=True)
        log.warning("parts of %ss were not merged: %s", kind, str(error).splitlines()[0])
        return False
    sync_file(temporary)
    temporary.rename(folder / merged)
    sync_folder(folder)
    supersede(folder, names)
    with lock:
        return _swap(connection, kind, names, merged, sum(part.rows for part in parts))


def _write(path: Path, parts: Sequence[Path], order: str) -> None:
    quoted = str(path).replace("'", "''")
    # A database of its own, with one thread: the run goes on meanwhile.
    settings: dict[str, str | bool | int | float | list[str]] = {
        "threads": 1,
        "memory_limit": MEMORY,
        "temp_directory": str(path.parent.parent / SPILLED),
    }
    with duckdb.connect(config=settings) as merging:
        merging.execute(QUIET)
        rows = merging.read_parquet([str(part) for part in parts])
        merging.execute(
            f"COPY (SELECT * FROM rows ORDER BY {order}) TO '{quoted}'"
            f" (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, ROW_GROUP_SIZE {_ROW_GROUP})"
        )
        del rows


def _swap(connection: duckdb.DuckDBPyConnection, kind: str, names: Sequence[str], merged: str, rows: int) -> bool:
    columns = "max(settled)" if kind == "call" else None
    connection.begin()
    try:
        where = "part IN (SELECT unnest(?::VARCHAR[]))"
        query = f"SELECT count(*){f', {columns}' if columns else ''} FROM data.{kind}_parts WHERE {where}"
        [(standing, *settled)] = connection.execute(query, [list(names)]).fetchall()
        if standing == len(names):
            connection.execute(f"DELETE FROM data.{kind}_parts WHERE {where}", [list(names)])
            values = [merged, rows, *settled]
            connection.execute(f"INSERT INTO data.{kind}_parts VALUES ({', '.join('?' * len(values))})", values)
        connection.commit()
    except BaseException:
        connection.rollback()
        raise
    return bool(standing == len(names))
