"""`exegete sql`: run a query on the published results and write its rows for a person or a program."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Format = Literal["table", "csv", "json", "parquet"]


def run_sql(store: str | Path, query: str, format: Format = "table", output: Path | None = None) -> str:
    """Run `query` on the snapshot of `store`; return its rows as text, or write them to `output` and return "".

    Raises:
        UserError: the query is wrong (quoted), the store cannot be read, or Parquet was asked for without `output`.
    """
    raise NotImplementedError
