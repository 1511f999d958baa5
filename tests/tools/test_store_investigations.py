"""Investigations in the store: records are taken in once, whole, by whoever writes, and answered for in SQL."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pytest
from investigation_records import DICTIONARY, investigation, keep
from latent_records import begin, record

import exegete
from exegete.tools.errors import ToolError, UserError
from exegete.tools.store import Store, safe_query
from exegete.tools.store.schema import migrations, utc_now

HIT_RATES = "SELECT investigator, avg(hit::INTEGER), count(hit) FROM experiments GROUP BY investigator ORDER BY 1"
ABOUT_17 = "SELECT claim_id FROM claims WHERE verdict = 'verified' AND list_contains(latents, 17)"


def asked(store: Path, query: str) -> list[tuple[Any, ...]]:
    """Return rows of the published snapshot, as a person gets them; and as a model's SQL does, which are the same."""
    with exegete.connect(store) as connection:
        found = connection.execute(query).fetchall()
    assert safe_query(store, query).rows == found
    return found


def published(folder: Path) -> Path:
    with Store.create_or_open(folder).writer() as writer:
        writer.publish()
    return folder


def test_hit_rates_and_verified_claims_are_a_query_away(tmp_path: Path) -> None:
    store = published(tmp_path / "store")
    assert asked(store, HIT_RATES) == [] and asked(store, ABOUT_17) == []
    keep(investigation(), store)
    keep(investigation(id="i-0002", investigator="anthropic:m", experiments=investigation().experiments[:2]), store)
    published(store)
    assert asked(store, HIT_RATES) == [("anthropic:m", 0.5, 2), ("recipe", 0.75, 4)]
    assert asked(store, ABOUT_17) == [("i-0001/C1",), ("i-0002/C1",)]
    [row] = asked(
        store,
        "SELECT investigator, dictionary, search_prompts, held_out_prompts, experiments, predictions, hits, claims, verified,"
        " failed, passes, metric->>'answer', parameters->'budget'->>'passes', epoch(finished_at - started_at)"
        " FROM investigations WHERE investigation_id = 'i-0001'",
    )
    assert row == ("recipe", DICTIONARY, 6, 4, 5, 4, 3, 4, 1, 1, 1_234, " DESC", "20000", 90.0)


def test_an_experiment_stands_beside_its_prediction_and_control(tmp_path: Path) -> None:
    keep(investigation(), published(tmp_path))
    published(tmp_path)
    columns = (
        "prediction, outcome, hit, value, low, high, control, control_value, control_n, hypothesis, hypothesis_status"
    )
    assert asked(tmp_path, f"SELECT {columns} FROM experiments WHERE experiment_id = 'i-0001/E2'") == [
        ("at least 0.5", "refuted", False, -0.2, -0.5, 0.1, "random latents", -0.1, 20)
        + ("Latents 17 and 21 carry it", "supported")
    ]
    found = asked(tmp_path, "SELECT prediction, outcome, status FROM experiments ORDER BY place")
    assert [prediction for prediction, _, _ in found[:3]] == ["at most -1.0", "at least 0.5", "from -0.5 to 0.5"]
    assert found[4] == ("at least 0.9", "undecided", "error")
    columns = "verdict, value, control_high, flipped, flipped_control_high, direction_control, p_adjusted, experiments"
    claims = asked(tmp_path, f"SELECT {columns} FROM claims ORDER BY claim_id")
    assert claims[0] == ("verified", -3.1, 0.2, 0.75, 0.49, None, 0.004, ["i-0001/E1"])
    assert claims[1] == ("failed", -0.2, 0.2, None, None, -0.3, 0.4, ["i-0001/E2", "i-0001/E3"])
    assert [claim[0] for claim in claims] == ["verified", "failed", "unverified", "correlational"]


def test_held_out_prompts_are_in_no_table(tmp_path: Path) -> None:
    keep(investigation(), published(tmp_path))
    published(tmp_path)
    with duckdb.connect(str(tmp_path / "labels.duckdb"), read_only=True) as connection:
        tables = connection.execute("SELECT schema_name || '.' || table_name FROM duckdb_tables()").fetchall()
        assert not [table for (table,) in tables if "held out 0" in str(connection.execute(f"FROM {table}").fetchall())]


def test_taking_in_twice_changes_nothing_and_a_newer_record_replaces_the_former(tmp_path: Path) -> None:
    store = Store.create_or_open(tmp_path)
    keep(investigation(status="interrupted"), tmp_path)
    with store.writer() as writer:
        assert writer.take_in_investigations() == 0  # Opening the store did it.
        keep(investigation(answer="anew"), tmp_path)
        assert writer.take_in_investigations() == 1
        assert writer.take_in_investigations() == 0
        keep(investigation(answer="and anew", verdicts=()), tmp_path)
        writer.publish()  # Takes in what came while the store was open.
    tables = ("investigations", "experiments", "claims")
    counted = [asked(tmp_path, f"SELECT count(*) FROM {table}")[0][0] for table in tables]
    assert counted == [1, 5, 0]
    assert asked(tmp_path, "SELECT status, answer FROM investigations") == [("finished", "and anew")]
    # A copy of the folder has other files, and the same rows come of them.
    os.utime(tmp_path / "investigations/i-0001/record.json")
    published(tmp_path)
    assert [asked(tmp_path, f"SELECT count(*) FROM {table}")[0][0] for table in tables] == counted


def test_an_investigation_that_ends_while_another_process_writes_is_taken_in_by_that(tmp_path: Path) -> None:
    store = Store.create_or_open(tmp_path)
    with store.writer() as writer:
        run = begin(writer)
        keep(investigation(), tmp_path)
        with pytest.raises(UserError, match="is writing to the store"), store.writer():
            pytest.fail("two writers at once")
        assert not store.show_investigations()
        writer.record(run, [record(1)])
        assert writer.publish_soon(0.0)
        writer.record(run, [record(2)])
    assert asked(tmp_path, ABOUT_17) == [("i-0001/C1",)]


def changed(**fields: Any) -> Callable[[bytes], bytes]:
    """Return what puts other values into a record."""
    return lambda content: json.dumps(json.loads(content) | fields).encode()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda content: content[: len(content) // 2],
    "deep": lambda _: b"[" * 100_000,
    "latin": lambda _: b"\xff",
    "list": lambda _: b"[]",
    "renamed": lambda content: content.replace(b'"renamed"', b'"another"'),
    "words": changed(seed="many"),
    "huge": changed(seed=2**80),
    "null": changed(question=None),
    "time": changed(started_at="yesterday"),
    "claims": changed(verdicts=[{"claim": {}}]),
    "surrogate": changed(answer="\ud800"),
}


def test_a_damaged_record_is_logged_once_and_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, damage in DAMAGES.items():
        path = keep(investigation(id=name), tmp_path / "store")
        path.write_bytes(damage(path.read_bytes()))
    for name in ("a", "zz"):
        keep(investigation(id=name), tmp_path / "store")
    with caplog.at_level(logging.WARNING), Store.create_or_open(tmp_path / "store").writer() as writer:
        writer.publish()
        writer.take_in_investigations()
    told = [line for line in caplog.messages if "is damaged" in line]
    assert sorted(DAMAGES) == sorted(Path(line.split("'")[1]).parent.name for line in told)
    for table in ("investigations", "experiments", "claims"):
        found = asked(tmp_path / "store", f"SELECT DISTINCT investigation_id FROM {table} ORDER BY 1")
        assert found == [("a",), ("zz",)]
    for name in DAMAGES:
        keep(investigation(id=name), tmp_path / "store")
    published(tmp_path / "store")
    assert len(asked(tmp_path / "store", "SELECT 1 FROM investigations")) == len(DAMAGES) + 2


def test_what_a_sound_record_said_outlives_its_damage(tmp_path: Path) -> None:
    path = keep(investigation(), published(tmp_path))
    published(tmp_path)
    path.write_text("{")
    published(tmp_path)
    assert asked(tmp_path, ABOUT_17) == [("i-0001/C1",)]
    keep(replace(investigation(), verdicts=()), tmp_path)
    published(tmp_path)
    assert asked(tmp_path, ABOUT_17) == []


def test_stores_of_the_former_schema_are_brought_up_and_their_snapshots_still_read(tmp_path: Path) -> None:
    store = published(tmp_path)
    former = [row for row in migrations() if row[0] < 8]
    for name in ("run.duckdb", "labels.duckdb"):
        with duckdb.connect(str(tmp_path / name)) as connection:
            if name == "labels.duckdb":
                connection.execute("UPDATE data.snapshot SET schema_version = 7")
                for view in ("claims", "experiments", "investigations"):
                    connection.execute(f"DROP VIEW {view}")
                connection.execute("DROP TABLE data.claims")
                continue
            for table in ("claims", "experiments", "investigations"):
                connection.execute(f"DROP TABLE data.{table}")
            connection.execute(
                "CREATE TABLE data.experiments (a INTEGER); CREATE TABLE data.investigations (a INTEGER)"
            )
            connection.execute("DELETE FROM main.migrations WHERE version >= 8")
            assert len(connection.execute("FROM main.migrations").fetchall()) == len(former)
    with exegete.connect(store) as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchall() == [(0,)]
    keep(investigation(), store)
    published(store)
    assert asked(store, ABOUT_17) == [("i-0001/C1",)]
    assert utc_now() > asked(store, "SELECT published_at FROM snapshot")[0][0]


def test_an_investigation_that_ends_while_nobody_writes_is_shown_at_once(tmp_path: Path) -> None:
    keep(investigation(), published(tmp_path))
    assert asked(tmp_path, ABOUT_17) == []
    assert Store.open(tmp_path).show_investigations()
    assert asked(tmp_path, ABOUT_17) == [("i-0001/C1",)]
    assert asked(tmp_path, "SELECT parameters->>'stopped' FROM investigations") == [("",)]


def test_a_models_sql_cannot_open_the_records(tmp_path: Path) -> None:
    path = keep(investigation(), published(tmp_path))
    published(tmp_path)
    for query in ("FROM read_text('{0}')", "FROM '{0}'", "SELECT * FROM read_json('{0}')"):
        with pytest.raises(ToolError):
            safe_query(tmp_path, query.format(path))


def test_of_what_is_large_the_row_has_the_smaller_parts_and_says_where_the_others_are(tmp_path: Path) -> None:
    one, *rest = investigation().experiments
    facts = {
        "mode": "zero",
        "prompts": ["p" * 100] * 300,
        "share": 0.5,
        "sets": list(range(2_000)),
        "also": "a" * 15_000,
    }
    small = {"latents": list(range(1_000))}
    keep(investigation(experiments=(replace(one, facts=facts), replace(rest[0], facts=small))), published(tmp_path))
    published(tmp_path)
    (large,), (whole,) = asked(tmp_path, "SELECT facts FROM experiments ORDER BY place")
    found = json.loads(large)
    # 300 texts of 102 characters with two between them and around them, and 15,000 with quotes.
    assert found["left_out"] == {"prompts": 31_200, "also": 15_002} and found["sets"] == facts["sets"]
    assert (found["mode"], found["share"]) == ("zero", 0.5) and len(large) < 20_500
    kept = json.loads((tmp_path / found["record"]).read_text())
    assert kept["experiments"][0]["facts"] == facts and json.loads(whole) == small
