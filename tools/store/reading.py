"""Reading a store: always the published snapshot, never the file that a run writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import duckdb


def connect(store: str | Path) -> duckdb.DuckDBPyConnection:
    """Return a read-only connection to the published results of the store in folder `store`.

    Keep it open as long as you like: it never blocks a run, and goes on showing the snapshot that it opened. Connect again
    to see newer results. A store that was moved is found again where it is now.

    Raises:
        UserError: there is no store, nothing was published yet, or the store is from a newer version.
    """
    raise NotImplementedError
