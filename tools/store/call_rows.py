"""Calls as columns: from the rows of the journal to what readers see."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from exegete.tools.store.journal_file import CALL_COLUMNS

CALLS = pa.schema(
    [
        ("call_id", pa.string()),
        ("run", pa.string()),
        ("provider", pa.string()),
        ("model", pa.string()),
        ("answered_by", pa.string()),
        ("status", pa.string()),
        ("input_tokens", pa.int64()),
        ("cached_tokens", pa.int64()),
        ("cache_write_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
        ("usd", pa.float64()),
        ("worst_usd", pa.float64()),
        ("seconds", pa.float64()),
        ("attempts", pa.int32()),
        ("detail", pa.string()),
        ("noted_at", pa.timestamp("us")),
    ]
)


def calls(found: Sequence[tuple[Any, ...]]) -> pa.Table:
    """One row a call, from rows of the journal (each behind its number)."""
    columns = list(zip(*found, strict=True))[1:] if found else [()] * len(CALL_COLUMNS)
    shown: dict[str, Sequence[Any]] = dict(zip(CALL_COLUMNS, columns, strict=True))
    clients = [str(name).partition(":") for name in shown["model"]]
    # A client is named `provider:model`, or in a way of its own.
    shown["provider"] = [provider if colon else None for provider, colon, _ in clients]
    shown["model"] = [model if colon else name for name, colon, model in clients]
    shown["noted_at"] = [datetime.fromtimestamp(at, UTC).replace(tzinfo=None) for at in shown["noted_at"]]
    return pa.table([pa.array(shown[field.name], field.type) for field in CALLS], schema=CALLS)
