"""Append-only Parquet parts: written, fsynced, renamed; they count once a transaction has registered them."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

SUPERSEDED = ".superseded"
"""Folder beside the parts, with an empty file named like each that was replaced."""
KEPT_S = 86_400.0
"""Seconds for which they stay."""


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


def remove_orphans(folder: Path, registered: Collection[str]) -> int:
    """Remove every file in `folder` that no transaction registered; return how many there were.

    Those that `supersede` has noted stay for a day.
    """
    kept = set(registered)
    for note in (folder / SUPERSEDED).glob("*"):
        if time.time() - note.stat().st_mtime < KEPT_S:
            kept.add(note.name)
        else:
            note.unlink()
    orphans = [path for path in folder.iterdir() if path.is_file() and path.name not in kept]
    for path in orphans:
        path.unlink()
    return len(orphans)


def supersede(folder: Path, names: Iterable[str]) -> None:
    """Note that the parts were replaced just now: who opened a former snapshot may go on reading them for a day."""
    (folder / SUPERSEDED).mkdir(exist_ok=True)
    for name in names:
        (folder / SUPERSEDED / name).touch()


def require_one_file(database: Path) -> None:
    """Raise OSError where a closed database is not in one file: closing it says nothing where the disk was full."""
    if database.with_name(f"{database.name}.wal").exists():
        raise OSError(errno.ENOSPC, "the database could not be brought into one file", str(database))


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
