"""SQL from a model: whatever it tries, it reads the views and nothing else."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from exegete.tools.errors import ToolError
from exegete.tools.interchange import import_evidence
from exegete.tools.store import safe_query


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sandbox")
    windows = [
        {"tokens": [f" {split}"], "activations": [1.0], "fires": True, "split": split, "kind": "firing"}
        for split in ("explain", "refine", "test")
    ]
    lines = [{"dictionary": "d", "latent": latent, "windows": windows} for latent in range(3)]
    (folder / "f.jsonl").write_text("\n".join(map(json.dumps, lines)))
    import_evidence(folder / "f.jsonl", folder / "store")
    return folder / "store"


def test_views_can_be_read(store: Path) -> None:
    found = safe_query(store, "WITH l AS (FROM latents) SELECT latent, status FROM l ORDER BY latent; -- all of them")
    assert (found.columns, found.rows, found.truncated) == (
        ("latent", "status"),
        [(i, "live") for i in range(3)],
        False,
    )
    assert safe_query(store, "SELECT ';é' AS \"a;b\" /* ; */ -- é;").rows == [(";é",)]
    assert safe_query(store, "SELECT latent FROM latents ORDER BY latent DESC", row_limit=2).rows == [(2,), (1,)]
    assert safe_query(store, "SELECT latent FROM latents", row_limit=2).truncated


def test_the_test_split_is_sealed(store: Path) -> None:
    found = safe_query(store, "SELECT DISTINCT split, text FROM examples ORDER BY 1")
    assert found.rows == [("explain", "<< explain>>"), ("refine", "<< refine>>")]
    items = str(store / "evidence" / "*" / "items-*.parquet")
    for query in (
        "SELECT * FROM labels.examples",
        "SELECT * FROM labels.main.examples",
        "SELECT * FROM main.examples",
        f"SELECT * FROM read_parquet('{items}')",
        f"SELECT * FROM '{items}'",
        f"WITH \"{items}\" AS (SELECT 1) SELECT * FROM (SELECT 2) x, query_table(['{items}'])",
        "SELECT * FROM query('SELECT * FROM labels.main.examples')",
    ):
        with pytest.raises(ToolError):
            safe_query(store, query)


@pytest.mark.parametrize(
    "query",
    [
        "INSERT INTO data.runs VALUES (1)",
        "DELETE FROM data.scores",
        "CREATE TABLE t AS SELECT 1",
        "COPY latents TO '/tmp/stolen.csv'",
        "ATTACH '/tmp/x.duckdb'",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM glob('/*')",
        "SELECT (SELECT content FROM read_text('/etc/passwd'))",
        "SELECT * FROM data.runs",
        "SELECT 1; SELECT 2",
        "SET memory_limit = '100GB'",
        "PRAGMA database_list",
        "INSTALL httpfs",
        "EXPLAIN ANALYZE SELECT 1",
        "SELECT * FROM duckdb_settings()",
        "",
        "SELECT",
        "1) UNION ALL (SELECT 2",
    ],
)
def test_everything_else_is_refused(store: Path, query: str) -> None:
    with pytest.raises(ToolError):
        safe_query(store, query)


def test_duckdb_itself_is_locked_as_well(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the parser let through by mistake, DuckDB refuses."""
    from exegete.tools.store import sandbox

    monkeypatch.setattr(sandbox, "_check_tree", lambda tree, views: None)
    for query in ("SELECT * FROM read_csv('/etc/passwd')", f"SELECT * FROM read_text('{store}/store.json')"):
        with pytest.raises(ToolError, match="disabled by configuration"):
            sandbox.safe_query(store, query)


def test_time_and_memory_are_bounded(store: Path) -> None:
    began = time.monotonic()
    cross = "SELECT count(*) FROM range(100000000) a, range(100000000) b WHERE (a.range * b.range) % 7 = 3"
    with pytest.raises(ToolError, match=r"longer than 0\.5 s"):
        safe_query(store, cross, time_limit_s=0.5)
    assert time.monotonic() - began < 5
    with pytest.raises(ToolError, match="memory"):
        safe_query(store, "SELECT list(range) FROM range(100000000)", memory_limit="100MB", time_limit_s=60)


def test_mistakes_name_the_views(store: Path) -> None:
    with pytest.raises(ToolError, match="Did you mean 'latents'"):
        safe_query(store, "SELECT * FROM latent")
    with pytest.raises(ToolError, match="density"):
        safe_query(store, "SELECT densty FROM latents")
