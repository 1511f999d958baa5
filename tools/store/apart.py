"""SQL that a language model wrote, run in a process of its own.

DuckDB looks at the clock and counts memory between its steps, not inside a function that makes one long text:
`printf('%2000000000d', 1)` takes four gigabytes and half a minute, whatever its limits. So

1. a child process runs the query through the sandbox (`safe_query`), with limits of the operating system on its memory and
   processor time;
2. it writes the rows as JSON: numbers, texts up to `CELL` characters, lists, and whatever else there is as text;
3. where it has not ended in time it is killed. What happens to it happens to nobody else.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exegete.tools.errors import ToolError, UserError
from exegete.tools.store.sandbox import safe_query

CELL = 10_000
"""Characters of a text in a cell, at most."""
START_SECONDS = 20.0
"""Beyond the time limit, for the child to start and to write."""
MEMORY_BYTES = 3 * 2**30
"""Of the child, what DuckDB does not count included."""
_MOST_CHARACTERS = 4_000_000
_SHORT_CELL = 200


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a query as JSON values."""

    columns: list[str]
    rows: list[list[Any]]
    truncated: bool
    """Whether there were more rows than the limit."""


def query_apart(
    store: str | Path,
    sql: str,
    *,
    time_limit_s: float = 10.0,
    row_limit: int = 200,
    memory_mb: int = 1_000,
    start_s: float = START_SECONDS,
) -> Rows:
    """Run one SELECT as `safe_query` does, in a process of its own.

    Args:
        store: folder.
        sql: the query.
        time_limit_s: of the query.
        row_limit: rows, at most.
        memory_mb: megabytes (10⁶ bytes) that DuckDB may take for it.
        start_s: beyond that, for the process to start and end.

    Raises:
        ToolError: as `safe_query`; or it needs more memory than a process may have, or gives more than can be shown.
        UserError: the store cannot be read.
    """
    limits = {"time_limit_s": time_limit_s, "row_limit": row_limit, "memory_limit": f"{memory_mb}MB"}
    asked = json.dumps({"store": str(Path(store).resolve()), "sql": sql, "limits": limits})
    # -P: a folder that somebody works in may hold files that are called like modules.
    command = [sys.executable, "-P", "-m", __name__]
    try:
        ended = subprocess.run(
            command, input=asked.encode(), capture_output=True, timeout=time_limit_s + start_s, env=_environment()
        )
    except subprocess.TimeoutExpired as error:
        raise ToolError(
            f"the query ran longer than {time_limit_s:g} s and could not be interrupted; ask for less"
        ) from error
    if ended.returncode < 0:
        raise ToolError(f"the query needs more than {MEMORY_BYTES / 2**30:g} GB of memory; ask for less")
    if ended.returncode > 0:
        raise RuntimeError(f"the process of a query failed: {ended.stderr.decode(errors='replace')[-2_000:]}")
    return _answer(json.loads(ended.stdout))


def _answer(told: Mapping[str, Any]) -> Rows:
    if "tool_error" in told:
        raise ToolError(told["tool_error"])
    if "user_error" in told:
        raise UserError(told["user_error"])
    return Rows(told["columns"], told["rows"], told["truncated"])


def _environment() -> dict[str, str]:
    """The child does no linear algebra: threads for it would take the memory that it may have."""
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _run(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the child tells."""
    try:
        found = safe_query(asked["store"], asked["sql"], **asked["limits"])
        rows = [[_cell(value, CELL) for value in row] for row in found.rows]
        if len(json.dumps(rows)) > _MOST_CHARACTERS:
            rows = [[_cell(value, _SHORT_CELL) for value in row] for row in rows]
        if len(json.dumps(rows)) > _MOST_CHARACTERS:
            raise ToolError("the rows are too long to be shown; ask for fewer columns or rows, or shorter texts")
    except ToolError as error:
        return {"tool_error": str(error)}
    except UserError as error:
        return {"user_error": str(error)}
    except MemoryError:
        return {"tool_error": f"the query needs more than {MEMORY_BYTES / 2**30:g} GB of memory; ask for less"}
    return {"columns": list(found.columns), "rows": rows, "truncated": found.truncated}


def _cell(value: Any, most: int) -> Any:
    """A value of a row as JSON has it."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_cell(one, most) for one in value[:most]]
    if isinstance(value, dict):
        return {str(key)[:most]: _cell(one, most) for key, one in value.items()}
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}…"


def _limit(asked: Mapping[str, Any]) -> None:
    seconds = int(2 * (asked["limits"]["time_limit_s"] + START_SECONDS))
    for kind, most in ((resource.RLIMIT_DATA, MEMORY_BYTES), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (bound, bound))


def _main() -> None:
    asked = json.load(sys.stdin)
    _limit(asked)
    sys.stdout.write(json.dumps(_run(asked)))


if __name__ == "__main__":
    _main()
