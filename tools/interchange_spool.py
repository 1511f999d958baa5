"""Checked lines on their way to evidence: spooled as Parquet, then sorted by DuckDB, which keeps to a limit of memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from exegete.tools.evidence import ITEMS, LATENTS, VOCABULARY, WINDOWS
from exegete.tools.interchange_lines import Line, LineWindow

_ROWS = 20_000
_MEMORY_LIMIT = "1GB"


class Spool:
    """The lines of one dictionary."""

    def __init__(self, name: str, folder: Path) -> None:
        folder.mkdir()
        self.name = name
        self.latent_count = 0
        self.item_count = 0
        self._folder = folder
        self._tokens: dict[str, int] = {}
        self._rows: dict[str, list[tuple[Any, ...]]] = {"items": [], "windows": [], "latents": []}
        self._writers = {
            table: pq.ParquetWriter(folder / f"{table}.parquet", schema, compression="zstd", compression_level=1)
            for table, schema in (("items", ITEMS), ("windows", WINDOWS), ("latents", LATENTS))
        }

    def add(self, line: Line) -> None:
        """Take in one latent."""
        ranks: dict[tuple[str, str], int] = {}
        for window in line.windows:
            key = (window.split, window.kind)
            ranks[key] = ranks.get(key, -1) + 1
            self._add_window(line.latent, ranks[key], window)
        status = "live" if any(window.fires for window in line.windows) else "dead"
        unknown = (None,) * (len(LATENTS) - 3)
        self._rows["latents"].append((line.latent, status, *unknown, line.explanation))
        self.latent_count += 1
        self.item_count += len(line.windows)
        if len(self._rows["items"]) >= _ROWS:
            self._flush()

    def close(self) -> None:
        """Finish the spool; it can be read from now on."""
        self._flush()
        for writer in self._writers.values():
            writer.close()

    def vocabulary(self) -> pa.Table:
        """Rows of VOCABULARY."""
        return pa.table([range(len(self._tokens)), list(self._tokens)], schema=VOCABULARY)

    def latents(self) -> Iterator[pa.Table]:
        """Rows of LATENTS, ascending."""
        return self._sorted("SELECT * FROM spooled ORDER BY latent", "latents")

    def items(self) -> Iterator[pa.Table]:
        """Rows of ITEMS, ascending by latent, split, kind and rank."""
        return self._sorted("SELECT * FROM spooled ORDER BY latent, split, kind, rank", "items")

    def windows(self) -> Iterator[pa.Table]:
        """Rows of WINDOWS, each id once, ascending."""
        query = 'SELECT "window", any_value(document) AS document, any_value(tokens) AS tokens FROM spooled GROUP BY 1 ORDER BY 1'
        return self._sorted(query, "windows")

    def _add_window(self, latent: int, rank: int, w: LineWindow) -> None:
        window_id = _window_id(w.tokens, w.document)
        tokens = [self._tokens.setdefault(token, len(self._tokens)) for token in w.tokens]
        self._rows["windows"].append((window_id, w.document, tokens))
        self._rows["items"].append(
            (latent, w.split, w.kind, rank, window_id, w.fires, False, None, w.peak)
            + (w.positions, w.values, w.marks, w.marks_correct)
        )

    def _flush(self) -> None:
        for table, schema in (("items", ITEMS), ("windows", WINDOWS), ("latents", LATENTS)):
            if self._rows[table]:
                self._writers[table].write_table(_table(self._rows[table], schema))
                self._rows[table] = []

    def _sorted(self, query: str, table: str) -> Iterator[pa.Table]:
        with duckdb.connect(config={"threads": 1, "memory_limit": _MEMORY_LIMIT}) as connection:
            connection.execute("SET temp_directory = $1", [str(self._folder / "sorting")])
            spooled = str(self._folder / f"{table}.parquet").replace("'", "''")
            connection.execute(f"CREATE VIEW spooled AS SELECT * FROM read_parquet('{spooled}')")
            for batch in connection.sql(query).to_arrow_reader(_ROWS):
                yield pa.Table.from_batches([batch])


def _table(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )


def _window_id(tokens: Sequence[str], document: str | None) -> int:
    """Return a number of 63 bits over tokens and document, each before its length so that no two lists read the same."""
    parts = [*tokens, "" if document is None else f"document:{document}"]
    content = "".join(f"{len(part)}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little") >> 1
