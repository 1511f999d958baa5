"""Running SQL that a language model wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class QueryResult:
    """The rows of a query."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    truncated: bool
    """Whether there were more rows than the limit."""


def safe_query(
    store: str | Path, sql: str, *, time_limit_s: float = 10.0, row_limit: int = 200, memory_limit: str = "1GB"
) -> QueryResult:
    """Run one SELECT over the documented views and return its rows.

    The query can read nothing but the views, without the windows of the `test` split (PROTOCOLS §1), and write nothing.

    Raises:
        ToolError: the query is not one SELECT over the views, is wrong, or ran past a limit; the message goes to the model.
        UserError: the store cannot be read.
    """
    raise NotImplementedError
