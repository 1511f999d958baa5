"""Running SQL that a language model wrote.

1. The query is parsed: one SELECT, over the documented views, the searches and its own subqueries only; no function that reads files.
2. `examples` stands without the windows of the `test` split, which no agent may see (PROTOCOLS §1).
3. DuckDB itself is locked to the store's folders of evidence, verdicts, calls and embeddings, a memory limit and no disk to spill to.
4. A timer interrupts it, and only so many rows are fetched.

DuckDB looks at timer and memory between its steps, not inside a function that makes one long text: `apart` bounds that too.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from exegete.tools.errors import ToolError, nearest
from exegete.tools.store.reading import connect

_SEARCHES = {"search_words", "search_meaning", "nearest_explanations", "explanation_agreement"}
_TABLE_FUNCTIONS = {"unnest", "range", "generate_series", *_SEARCHES}
_UNSAFE_FUNCTIONS = {"query", "query_table", "getvariable", "current_setting"}


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
    connection = connect(store)
    timer = threading.Timer(time_limit_s, connection.interrupt)
    try:
        statement = _checked(connection, sql)
        _lock_down(connection, Path(store).resolve(), memory_limit)
        timer.start()
        # The limit stands around the query, so that DuckDB never makes the rows that nobody will read.
        cursor = connection.execute(f"SELECT * FROM (\n{statement}\n) LIMIT {row_limit + 1}")
        rows = cursor.fetchall()
        columns = tuple(column[0] for column in cursor.description or ())
    except duckdb.InterruptException as error:
        raise ToolError(f"the query ran longer than {time_limit_s:g} s; ask for less") from error
    except duckdb.OutOfMemoryException as error:
        raise ToolError(f"the query needs more than {memory_limit} of memory; ask for less") from error
    except duckdb.Error as error:
        raise ToolError(f"the query is wrong: {error}") from error
    except RecursionError as error:
        raise ToolError("the query has too many expressions inside one another; write it flatter") from error
    finally:
        timer.cancel()
        connection.close()
    return QueryResult(columns, rows[:row_limit], len(rows) > row_limit)


def _checked(connection: duckdb.DuckDBPyConnection, sql: str) -> str:
    """Return the one SELECT statement in `sql`, without its semicolon; raise ToolError where it is anything else."""
    [(serialized,)] = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchall()
    tree = json.loads(serialized)
    if tree["error"]:
        raise ToolError(f"only a SELECT can be run: {tree['error_message']}")
    if len(tree["statements"]) != 1:
        raise ToolError(f"one SELECT at a time; this is {len(tree['statements'])}")
    views = {
        name for (name,) in connection.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()
    }
    _check_tree(tree, views)
    return _without_semicolon(sql)


def _without_semicolon(sql: str) -> str:
    """Cut a single statement at the semicolon that ends it; one in a text, a name or a comment ends nothing."""
    content = sql.encode()
    ends = [
        at for at, kind in duckdb.tokenize(sql) if kind == duckdb.token_type.operator and content[at : at + 1] == b";"
    ]
    return content[: min(ends, default=len(content))].decode()


def _check_tree(tree: Any, views: set[str]) -> None:
    nodes = list(_nodes(tree))
    known = views | {entry["key"] for node in nodes for entry in _own_tables(node)}
    for node in nodes:
        kind = node.get("type")
        if kind == "BASE_TABLE":
            name = node["table_name"]
            if node["schema_name"] or node["catalog_name"] or name.strip('"') not in known:
                raise ToolError(
                    f"there is no view {name!r}; there are: {', '.join(sorted(views))}.{nearest(name, views)}"
                )
        elif kind == "TABLE_FUNCTION" and node["function"]["function_name"].lower() not in _TABLE_FUNCTIONS:
            raise ToolError(f"{node['function']['function_name']}() cannot be used here; read from the views")
        elif kind == "SHOW_REF":
            raise ToolError("SHOW, DESCRIBE and SUMMARIZE cannot be used here; write a SELECT over the views")
        elif kind == "FUNCTION" and node.get("function_name", "").lower() in _UNSAFE_FUNCTIONS:
            raise ToolError(f"{node['function_name']}() cannot be used here")


def _own_tables(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The common table expressions that a node defines."""
    defined: list[dict[str, Any]] = node.get("cte_map", {}).get("map", [])
    return defined


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(child)


def _lock_down(connection: duckdb.DuckDBPyConnection, folder: Path, memory_limit: str) -> None:
    query = "SELECT sql FROM duckdb_views() WHERE view_name = 'examples' ORDER BY temporary DESC LIMIT 1"
    found = connection.execute(query).fetchall()[0]
    whole = found[0][found[0].index(" AS ") + 4 :].rstrip().rstrip(";")
    connection.execute(f"CREATE OR REPLACE TEMP VIEW examples AS SELECT * FROM ({whole}) WHERE split <> 'test'")
    allowed = [str(folder / name) for name in ("evidence", "verdicts", "calls", "embeddings")]
    connection.execute("SET temp_directory = ''")
    connection.execute("SET allowed_directories = $1", [allowed])
    connection.execute("SET enable_external_access = false")
    connection.execute(f"SET memory_limit = '{memory_limit}'")
    connection.execute("SET threads = 2")
    connection.execute("SET lock_configuration = true")
