"""SQL from a model in a process of its own: what DuckDB cannot bound, the operating system does."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from exegete.tools.errors import ToolError, UserError
from exegete.tools.store import Store, safe_query
from exegete.tools.store.apart import CELL, query_apart


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    opened = Store.create_or_open(tmp_path_factory.mktemp("apart") / "store")
    with opened.writer() as writer:
        writer.publish()
    return opened.folder


def test_rows_come_back_as_json(store: Path) -> None:
    query = (
        "SELECT DATE '2020-01-02' AS day, 1.5::DECIMAL(9,1) AS exact, NULL AS none, repeat('x', 20000) AS long,"
        " [1, 2] AS listed, {'a': 1} AS structured, 'b'::BLOB AS raw, 9007199254740993 AS whole, TRUE AS yes"
    )
    found = query_apart(store, query)
    day, exact, none, long, *others = found.rows[0]
    assert found.columns[:2] == ["day", "exact"] and not found.truncated
    assert (day, exact, none) == ("2020-01-02", "1.5", None) and long == "x" * CELL + "…"
    assert others == [[1, 2], {"a": 1}, "b'b'", 9007199254740993, True]
    assert query_apart(store, "FROM range(5)", row_limit=2).truncated


def test_a_text_of_gigabytes_is_no_concern_of_ours(store: Path) -> None:
    for query in ("SELECT length(printf('%2000000000d', 1))", "SELECT length(repeat('x', 4000000000))"):
        with pytest.raises(ToolError):
            query_apart(store, query, time_limit_s=2, start_s=10)


def test_what_cannot_be_interrupted_is_killed(store: Path) -> None:
    with pytest.raises(ToolError, match="could not be interrupted"):
        query_apart(store, "SELECT 1", time_limit_s=0.01, start_s=0.0)


def test_its_errors_are_those_of_the_sandbox(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="only a SELECT can be run"):
        query_apart(store, "INSERT INTO data.runs VALUES (1)")
    with pytest.raises(UserError, match="nowhere"):
        query_apart(tmp_path / "nowhere", "SELECT 1")
    with pytest.raises(ToolError, match="too long to be shown"):
        query_apart(
            store,
            f"SELECT {', '.join(f'repeat(chr(97 + {i} % 26), 10000) AS c{i}' for i in range(150))} FROM range(200)",
        )


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1" + "+1" * 900,
        "SELECT * FROM " + "(SELECT * FROM " * 400 + "latents" + ")" * 400,
        "SELECT " + "[" * 500 + "1" + "]" * 500,
        "SELECT 1" + "+1" * 50_000,
        "SELECT '\ud800'",
    ],
)
def test_deep_and_broken_queries_are_told_so(store: Path, query: str) -> None:
    with pytest.raises(ToolError):
        safe_query(store, query)


def test_a_query_does_not_look_into_the_folder_that_somebody_works_in(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "duckdb.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    assert query_apart(store, "SELECT 1 AS one").rows == [[1]]


def test_queries_of_several_threads(store: Path) -> None:
    found: dict[int, int] = {}

    def ask(number: int) -> None:
        found[number] = query_apart(store, f"SELECT {number}").rows[0][0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {0: 0, 1: 1, 2: 2}
