"""Queries from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from exegete.agent.sql import format_table, run_sql
from exegete.tools.errors import UserError
from exegete.tools.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with Store.create_or_open(tmp_path / "store").writer() as writer:
        writer.publish()
    return tmp_path / "store"


QUERY = "SELECT * FROM (VALUES (1, 'a,b', 0.123456::DOUBLE, [1, 2]), (20, NULL, 2.0, NULL)) t(number, name, share, list) ORDER BY 1"


def test_table() -> None:
    text = format_table(["n", "name"], [(1, "a"), (20, None), (3, "x" * 100)])
    assert text.splitlines()[:4] == [" n  name", "──  " + "─" * 60, " 1  a", "20"]
    assert text.endswith("x…\n(3 rows)\n")


def test_formats(store: Path, tmp_path: Path) -> None:
    assert run_sql(store, QUERY).splitlines()[2] == "     1  a,b   0.1235  [1, 2]"
    assert run_sql(store, QUERY, "csv") == 'number,name,share,list\n1,"a,b",0.123456,"[1, 2]"\n20,,2.0,\n'
    assert json.loads(run_sql(store, QUERY, "json"))[0] == {
        "number": 1,
        "name": "a,b",
        "share": 0.123456,
        "list": [1, 2],
    }
    assert run_sql(store, QUERY, "parquet", tmp_path / "out.parquet") == ""
    assert pq.read_table(tmp_path / "out.parquet").to_pylist()[1]["number"] == 20
    assert run_sql(store, QUERY, "csv", tmp_path / "out.csv") == ""
    assert (tmp_path / "out.csv").read_text().startswith("number,")


def test_mistakes_are_one_line_that_quotes_them(store: Path, tmp_path: Path) -> None:
    for query, said in (("SELECT * FROM scors", "scores"), ("SELEC 1", "SELEC"), ("SELECT valu FROM scores", "value")):
        with pytest.raises(UserError, match=said) as caught:
            run_sql(store, query)
        assert query in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="name a file"):
        run_sql(store, "SELECT 1", "parquet")
    with pytest.raises(UserError, match=r"Did you mean 'json'"):
        run_sql(store, "SELECT 1", "jsn")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot write"):
        run_sql(store, "SELECT 1", "csv", tmp_path / "absent" / "out.csv")


def test_sql_imports_no_model_code() -> None:
    script = (
        "import sys, exegete.agent.sql; print([m for m in ('torch', 'transformers', 'langgraph') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
