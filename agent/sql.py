"""`exegete sql`: run a query on the published results and write its rows for a person or a program.

Cells hold what corpora and language models say: a table shows control characters as escapes, JSON escapes them in its own
way, and CSV, which has none, keeps them except on a terminal.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, get_args

import duckdb

from exegete.tools.errors import UserError, nearest
from exegete.tools.rendering import visible, visible_json
from exegete.tools.store import connect

Format = Literal["table", "csv", "json", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)

WIDEST = 60
"""Characters of a cell that a table shows; the other formats show all."""


def run_sql(store: str | Path, query: str, format: Format = "table", output: Path | None = None) -> str:
    """Run `query` on the snapshot of `store`; return its rows as text, or write them to `output` and return "".

    Raises:
        UserError: the query is wrong (quoted), the store cannot be read, the format is unknown, `output` cannot be
            written, or Parquet was asked for without `output`.
    """
    if format not in FORMATS:
        raise UserError(f"{format!r} is no format; there are: {', '.join(FORMATS)}.{nearest(format, FORMATS)}")
    if format == "parquet" and output is None:
        raise UserError("Parquet is no text: name a file for it (--output FILE.parquet)")
    with connect(store) as connection:
        try:
            if format == "parquet" and output is not None:
                connection.sql(query).write_parquet(str(output))
                return ""
            cursor = connection.execute(query)
            columns = [column[0] for column in cursor.description or ()]
            rows = cursor.fetchall()
        except duckdb.Error as error:
            raise UserError(f"the query {query!r} fails: {_one_line(error)}") from error
    text = _render(format, columns, rows)
    if output is None:
        return "\n".join(map(visible, text.split("\n"))) if format == "csv" and sys.stdout.isatty() else text
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {str(output)!r} ({error.strerror}); name another file") from error
    return ""


def format_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as aligned columns: numbers to the right with four digits, long text cut, NULL empty."""
    cells = [[_cell(value) for value in row] for row in rows]
    names = [visible(name) for name in columns]
    widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(names)]
    right = [_is_numeric([row[i] for row in rows]) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return "  ".join(padded).rstrip()

    count = f"({len(rows)} row{'' if len(rows) == 1 else 's'})"
    return "\n".join([line(names), line(["─" * w for w in widths]), *map(line, cells), count]) + "\n"


def _render(format: Format, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if format == "table":
        return format_table(columns, rows)
    if format == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_plain(value) if isinstance(value, list | dict) else value for value in row] for row in rows)
        return text.getvalue()
    records = [dict(zip(columns, map(_finite, row), strict=True)) for row in rows]
    return visible_json(json.dumps(records, ensure_ascii=False, default=str, indent=1)) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float | Decimal) else _plain(value)
    # What is cut off need not be made visible first.
    text = visible(text[: WIDEST + 1])
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else str(value)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no decimals."""
    if isinstance(value, Decimal):
        return float(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_numeric(values: Sequence[Any]) -> bool:
    known = [value for value in values if value is not None]
    return bool(known) and all(
        isinstance(value, int | float | Decimal) and not isinstance(value, bool) for value in known
    )


def _one_line(error: Exception) -> str:
    """DuckDB's message without the copy of the query that it appends; a candidate binding is kept."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for i, line in enumerate(lines) if i == 0 or line.startswith(("Did you mean", "Candidate"))]
    return " ".join(kept)
