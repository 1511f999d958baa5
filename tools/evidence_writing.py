"""Write an evidence folder so that it is there whole or not at all; the form is `exegete.tools.evidence`'s.

1. Everything is written into a temporary folder beside the target, each file fsynced.
2. The windows are streamed into Parquet, then from there into the memory-mapped arrays, so nothing is held in memory.
3. `evidence.json` is written last; then the folder is renamed into place and its parent fsynced.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from exegete.tools.arrays import new_array
from exegete.tools.errors import UserError
from exegete.tools.evidence import ITEMS, LATENTS, VOCABULARY, WINDOWS

Rows: TypeAlias = "pa.Table | pa.RecordBatch"
Batches: TypeAlias = "Rows | Iterable[Rows]"

ITEMS_PER_FILE = 4_000_000
ITEMS_PER_ROW_GROUP = 65_536
"""Small enough that a reader of a few latents decodes little, large enough that Parquet compresses well."""


def write_evidence(
    folder: Path,
    *,
    vocabulary: Batches,
    windows: Batches,
    items: Batches,
    latents: Batches,
    provenance: Mapping[str, Any],
    extra: Mapping[str, Batches] | None = None,
    replace: bool = False,
) -> None:
    """Write one finished evidence folder, atomically. Iterables are drawn in turn: vocabulary, items, latents, windows.

    Args:
        folder: where; its parent is made where missing.
        vocabulary: rows of VOCABULARY, ascending by token, without gaps from 0.
        windows: rows of WINDOWS, strictly ascending by window: every window that an item names.
        items: rows of ITEMS, ascending by latent (within one: split, kind, rank in any order).
        latents: rows of LATENTS, strictly ascending by latent. In any table, columns that are missing
            become null.
        provenance: goes to `evidence.json`; at least `dictionary`, `source` ("pass" or "import") and `seed`.
        extra: name → rows of further tables (`neighbours`), written as `NAME.parquet`.
        replace: whether finished evidence in `folder` may be replaced.

    Raises:
        UserError: `folder` holds finished evidence and `replace` is false, or the disk is full.
        ValueError: rows are out of order, or provenance lacks a key.
    """
    missing = {"dictionary", "source", "seed"} - set(provenance)
    if missing:
        raise ValueError(f"provenance lacks {sorted(missing)}")
    if (folder / "evidence.json").exists() and not replace:
        raise UserError(f"{str(folder)!r} holds finished evidence already; remove that folder or name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write_table(temporary / "vocabulary.parquet", VOCABULARY, vocabulary)
        _write_items(temporary, _ascending(items, "latent", strict=False))
        write_table(temporary / "latents.parquet", LATENTS, _ascending(latents, "latent", strict=True))
        write_table(temporary / "windows.parquet", WINDOWS, _ascending(windows, "window", strict=True))
        _write_arrays(temporary)
        for name, rows in (extra or {}).items():
            write_table(temporary / f"{name}.parquet", None, rows)
        _write_synced(temporary / "evidence.json", json.dumps(dict(provenance), indent=1, sort_keys=True).encode())
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write evidence to {str(folder)!r} ({error}); mend that and run again") from error
        raise
    _put_in_place(temporary, folder)


def write_table(path: Path, schema: pa.Schema | None, rows: Batches, *, row_group: int = ITEMS_PER_ROW_GROUP) -> int:
    """Write `rows` to one Parquet file, fsynced, and return their number. `schema` None: that of the first rows."""
    batches = _tables(rows)
    if schema is None:
        first = next(batches)
        schema, batches = first.schema, itertools.chain([first], batches)
    written = 0
    with path.open("wb") as file:
        with pq.ParquetWriter(file, schema, compression="zstd", compression_level=1) as writer:
            for table in batches:
                writer.write_table(_conform(table, schema), row_group_size=row_group)
                written += table.num_rows
        file.flush()
        os.fsync(file.fileno())
    return written


def _write_items(folder: Path, items: Iterator[pa.Table]) -> None:
    pending = next(items, ITEMS.empty_table())
    for number in itertools.count():
        if pending is None:
            return
        chunk: list[pa.Table] = []
        while pending is not None and sum(t.num_rows for t in chunk) < ITEMS_PER_FILE:
            chunk.append(pending)
            pending = next(items, None)
        write_table(folder / f"items-{number:05d}.parquet", ITEMS, chunk)


def _write_arrays(folder: Path) -> None:
    """Copy windows.parquet into the memory-mapped arrays, one row group at a time."""
    source = pq.ParquetFile(folder / "windows.parquet", memory_map=True)
    rows = source.metadata.num_rows
    ids = new_array(folder / "window_ids.npy", np.int64, (rows,))
    offsets = new_array(folder / "window_offsets.npy", np.int64, (rows + 1,))
    at = 0
    for batch in source.iter_batches(columns=["window", "tokens"]):
        ids[at : at + batch.num_rows] = batch.column(0).to_numpy()
        lengths = batch.column(1).value_lengths().to_numpy(zero_copy_only=False)
        offsets[at + 1 : at + 1 + batch.num_rows] = offsets[at] + np.cumsum(lengths)
        at += batch.num_rows
    tokens = new_array(folder / "window_tokens.npy", np.int32, (int(offsets[rows]),))
    at = 0
    for batch in source.iter_batches(columns=["tokens"]):
        flat = batch.column(0).flatten().to_numpy()
        tokens[at : at + len(flat)] = flat
        at += len(flat)
    for name in ("window_ids", "window_offsets", "window_tokens"):
        _sync(folder / f"{name}.npy")


def _tables(rows: Batches) -> Iterator[pa.Table]:
    if isinstance(rows, (pa.Table, pa.RecordBatch)):
        rows = [rows]
    for part in rows:
        yield pa.Table.from_batches([part]) if isinstance(part, pa.RecordBatch) else part


def _ascending(rows: Batches, key: str, *, strict: bool) -> Iterator[pa.Table]:
    last: int | None = None
    for table in _tables(rows):
        if table.num_rows:
            keys = table.column(key).to_numpy().astype(np.int64)
            steps = np.diff(keys, prepend=keys[0] - 1 if last is None else last)
            if (steps < int(strict)).any():
                raise ValueError(f"rows are not {'strictly ' if strict else ''}ascending by {key!r}")
            last = int(keys[-1])
        yield table


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return `table` with exactly the columns of `schema`; missing ones are null."""
    unknown = set(table.column_names) - set(schema.names)
    if unknown:
        raise ValueError(f"columns {sorted(unknown)} are not in the schema")
    columns = [
        table.column(field.name) if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, names=schema.names).cast(schema)


def _put_in_place(temporary: Path, folder: Path) -> None:
    _sync(temporary)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old)
    else:
        temporary.rename(folder)
    _sync(folder.parent)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
