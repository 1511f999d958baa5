"""The store as its users meet it: one writer, readers of snapshots, and the same tables whatever happened in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import duckdb
import pytest
from latent_records import DICTIONARY, FakeScore, begin, content, fill, record

import exegete
from exegete.agent.sql import run_sql
from exegete.tools.errors import UserError
from exegete.tools.explainers import Explanation
from exegete.tools.interchange import import_evidence
from exegete.tools.store import LatentRecord, Store, reading
from exegete.tools.store.parts import SUPERSEDED
from exegete.tools.store.records import StepRecord
from exegete.tools.store.schema import schema_version


def test_order_and_batching_do_not_show(tmp_path: Path) -> None:
    forth = fill(tmp_path / "a", [range(20)])
    back = fill(tmp_path / "b", [range(19, 9, -1), [3, 12], range(9, -1, -1)])
    assert content(forth) == content(back)
    assert len(content(forth)["verdicts"]) == 40


def test_a_run_is_found_again_and_knows_what_it_has(tmp_path: Path) -> None:
    store = fill(tmp_path, [[4, 2]])
    with store.writer() as writer:
        run = begin(writer)
        assert writer.labeled(run, DICTIONARY).tolist() == [2, 4]
        assert [(r.run, r.config, r.status) for r in writer.runs()] == [(run, {"a": 1}, "running")]
        assert writer.begin_run(config={"a": 2}, seed=0, code_version="0", dictionary=DICTIONARY) != run
        writer.finish_run(run, "finished", {"mean": 0.5})
        writer.publish()
    with exegete.connect(store.folder) as connection:
        found = connection.execute("SELECT status, figures->>'mean' FROM runs WHERE run = ?", [run]).fetchall()
    assert found == [("finished", "0.5")]


def test_forgetting_leaves_explanations_that_another_run_has(tmp_path: Path) -> None:
    with Store.create_or_open(tmp_path / "store").writer() as writer:
        run = begin(writer)
        other = writer.begin_run(config={"a": 2}, seed=0, code_version="0", dictionary=DICTIONARY)
        writer.record(run, [replace(record(latent), missing_calls=int(latent < 4)) for latent in (1, 2, 3, 4)])
        # The other run has scored the explanation of 2, and has one of 3 that it has not scored.
        writer.record(other, [record(2), replace(record(3), scores=(), verdicts=())])
        assert writer.forget_incomplete(run, DICTIONARY) == 3
        assert writer.labeled(run, DICTIONARY).tolist() == [4] and writer.labeled(other, DICTIONARY).tolist() == [2, 3]
        writer.publish()
    with exegete.connect(tmp_path / "store") as connection:
        assert connection.execute("SELECT latent FROM explanations ORDER BY ALL").fetchall() == [(2,), (3,), (4,)]
        found = connection.execute("SELECT DISTINCT run, latent FROM scores ORDER BY latent").fetchall()
        assert found == [(other, 2), (run, 4)]
        assert connection.execute("SELECT DISTINCT run, latent FROM verdicts ORDER BY latent").fetchall() == found


def test_a_control_subset_that_is_made_anew_takes_its_explanations_with_it(tmp_path: Path) -> None:
    def climbed(latent: int, *texts: str) -> LatentRecord:
        explanations = [(Explanation(text), Explanation(text).id(DICTIONARY, latent)) for text in texts]
        steps = [
            StepRecord(number, "refine", identity, None, None, None, 0, 1, 10, 0.0, "control", control=True)
            for number, (_, identity) in enumerate(explanations)
        ]
        return LatentRecord(DICTIONARY, latent, "labeled", explanations, steps=steps)

    with Store.create_or_open(tmp_path / "store").writer() as writer:
        run = begin(writer)
        writer.record(run, [record(1), record(3)])
        writer.set_control(run, DICTIONARY, [climbed(1, "first", "astray"), climbed(2, "first")])
        writer.set_control(run, DICTIONARY, [climbed(1, "first", "second"), climbed(2, "other")])
        writer.publish()
    with exegete.connect(tmp_path / "store") as connection:
        found = connection.execute("SELECT latent, text FROM explanations ORDER BY ALL").fetchall()
    own = [(latent, f"months, as in latent {latent}") for latent in (1, 3)]
    assert found == [(1, "first"), own[0], (1, "second"), (2, "other"), own[1]]


def test_what_readers_see_outlives_a_process_that_was_killed_before_it_could_publish(tmp_path: Path) -> None:
    store = Store.create_or_open(tmp_path / "store")
    with store.writer() as writer:
        run = begin(writer)
        writer.record(run, [replace(record(latent), missing_calls=int(latent < 4)) for latent in (1, 2, 3, 4)])
        writer.publish()
    before = content(store)
    with store.writer() as writer:
        writer.forget_incomplete(run, DICTIONARY)
    with store.writer() as writer:
        assert content(store) == before and len(before["verdicts"]) == 8
        writer.publish()
    verdicts = tmp_path / "store" / "verdicts"
    [note] = (verdicts / SUPERSEDED).iterdir()
    assert (verdicts / note.name).exists() and len(list(verdicts.glob("*.parquet"))) == 2
    os.utime(note, (0, 0))
    with store.writer():
        assert len(content(store)["verdicts"]) == 2
    assert len(list(verdicts.glob("*.parquet"))) == 1


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = fill(tmp_path, [[0]])
    broken = LatentRecord(DICTIONARY, 7, "labeled", [(Explanation("x"), "id")], [("id", FakeScore(n=2**40))])
    with store.writer() as writer, pytest.raises(Exception, match=r"int32|range|large"):
        writer.record(begin(writer), [record(5), broken])
    with store.writer() as writer:
        assert writer.labeled(begin(writer), DICTIONARY).tolist() == [0]
        writer.record(begin(writer), [record(5)])
        assert writer.labeled(begin(writer), DICTIONARY).tolist() == [0, 5]


def test_best_explanations_take_the_highest_mean_and_name_the_floors(tmp_path: Path) -> None:
    store = Store.create_or_open(tmp_path)
    worse, better = Explanation("worse"), Explanation("better")
    ids = [e.id(DICTIONARY, 1) for e in (worse, better)]
    scores = [
        (ids[0], FakeScore(value=0.9)),
        (ids[0], FakeScore("fuzzing", value=0.5)),
        (ids[1], FakeScore(value=0.8)),
        (ids[1], FakeScore("fuzzing", value=0.8)),
        (ids[1], FakeScore(value=0.45, baseline="shuffled")),
        (ids[1], FakeScore("fuzzing", value=1.0, baseline="constant")),
    ]
    with store.writer() as writer:
        run = begin(writer)
        writer.record(
            run, [LatentRecord(DICTIONARY, 1, "labeled", list(zip((worse, better), ids, strict=True)), scores)]
        )
        writer.publish()
    query = "SELECT text, mean_score, detection, detection_shuffled, fuzzing_constant, fuzzing_shuffled FROM best_explanations"
    with exegete.connect(tmp_path) as connection:
        assert connection.execute(query).fetchall() == [("better", 0.8, 0.8, 0.45, 1.0, None)]


def test_an_open_reader_keeps_its_snapshot_and_a_new_one_sees_the_next(tmp_path: Path) -> None:
    store = fill(tmp_path, [[0]])
    notebook = exegete.connect(tmp_path)
    direct = duckdb.connect(str(tmp_path / "labels.duckdb"), read_only=True)
    fill(tmp_path, [[1, 2]])
    count = "SELECT count(*) FROM explanations"
    with exegete.connect(str(tmp_path)) as fresh:
        assert [c.execute(count).fetchone() for c in (notebook, direct, fresh)] == [(1,), (1,), (3,)]
    assert not list(store.folder.glob(".labels*"))
    notebook.close()
    direct.close()


@pytest.mark.parametrize("fails", [False, True])
def test_a_snapshot_replaced_while_it_is_opened_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """DuckDB opens the file twice by its path: a header of the former one over the rows of the next is no snapshot."""
    fill(tmp_path / "next", [[1, 2, 3]])
    store = fill(tmp_path / "store", [[0]])
    shutil.copytree(tmp_path / "next" / "verdicts", store.folder / "verdicts", dirs_exist_ok=True)
    attach, attached = reading._attach, []

    def slow(connection: duckdb.DuckDBPyConnection, snapshot: Path) -> None:
        attached.append(snapshot)
        if len(attached) == 1:
            (tmp_path / "next" / "labels.duckdb").replace(snapshot)
            if fails:
                raise duckdb.IOException("No more data remaining in MetadataReader")
        attach(connection, snapshot)

    monkeypatch.setattr(reading, "_attach", slow)
    with exegete.connect(store.folder) as connection:
        assert connection.execute("SELECT latent FROM explanations ORDER BY ALL").fetchall() == [(1,), (2,), (3,)]
    assert len(attached) == 2


def test_a_damaged_snapshot_is_not_opened_again_and_again(tmp_path: Path) -> None:
    store = fill(tmp_path, [[0]])
    (store.folder / "labels.duckdb").write_bytes(b"no database")
    with pytest.raises(UserError, match="publish it again"):
        exegete.connect(store.folder)


def test_readers_cannot_write(tmp_path: Path) -> None:
    fill(tmp_path, [[0]])
    with exegete.connect(tmp_path) as connection:
        assert connection.sql("SELECT latent FROM scores LIMIT 1").fetchall() == [(0,)]
        with pytest.raises(duckdb.Error, match="read-only"):
            connection.execute("DELETE FROM data.scores")


def test_a_moved_store_is_healed(tmp_path: Path) -> None:
    line = {"tokens": [" a", " <b"], "activations": [0, 2.0], "fires": True, "split": "explain", "kind": "firing"}
    (tmp_path / "f.jsonl").write_text(json.dumps({"dictionary": "d", "latent": 0, "windows": [line]}))
    import_evidence(tmp_path / "f.jsonl", tmp_path / "here")
    before = content(fill(tmp_path / "here", [[0, 1]]))
    shutil.move(tmp_path / "here", tmp_path / "there's")
    assert content(Store.open(tmp_path / "there's")) == before
    with exegete.connect(tmp_path / "there's") as connection:
        assert connection.execute("SELECT text FROM examples").fetchall() == [(" a<< ‹b>>",)]


def test_every_view_and_column_is_documented(tmp_path: Path) -> None:
    fill(tmp_path, [[0]])
    with exegete.connect(tmp_path) as connection:
        views = dict(connection.execute("SELECT view_name, comment FROM duckdb_views() WHERE NOT internal").fetchall())
        columns = connection.execute(
            "SELECT table_name, column_name FROM duckdb_columns() WHERE schema_name = 'main' AND comment IS NULL"
            " AND table_name IN (SELECT view_name FROM duckdb_views() WHERE NOT internal)"
        ).fetchall()
    named = "latents explanations scores best_explanations verdicts examples neighbours runs calls costs"
    assert set(f"{named} investigations experiments snapshot".split()) <= set(views)
    assert [name for name, comment in views.items() if not comment] == []
    assert columns == []


def test_a_second_writer_learns_who_the_first_is(tmp_path: Path) -> None:
    store = Store.create_or_open(tmp_path)
    with store.writer(), pytest.raises(UserError, match=f"process {os.getpid()} is writing"), store.writer():
        pytest.fail("two writers at once")
    with store.writer() as writer:
        assert writer.runs() == []


def test_a_killed_writer_blocks_nobody_and_loses_nothing_acknowledged(tmp_path: Path) -> None:
    script = """
        import sys, pathlib
        sys.path[:0] = [sys.argv[2], sys.argv[2] + "/.."]
        import test_store as t
        with t.Store.create_or_open(pathlib.Path(sys.argv[1])).writer() as writer:
            run = t.begin(writer)
            for latent in range(10_000):
                writer.record(run, [t.record(latent)])
                print(latent, flush=True)
    """
    arguments = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in process.stdout]
    (tmp_path / "verdicts" / "0123.parquet").write_bytes(b"an orphan")
    with Store.open(tmp_path).writer() as writer:
        done = writer.labeled(begin(writer), DICTIONARY).tolist()
        writer.publish()
    assert set(acknowledged) <= set(done) and len(done) <= len(acknowledged) + 1
    assert not (tmp_path / "verdicts" / "0123.parquet").exists()
    with exegete.connect(tmp_path) as connection:
        found = connection.execute("SELECT latent, count(*) FROM verdicts GROUP BY 1 ORDER BY 1").fetchall()
    assert found == [(latent, 2) for latent in done]


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    store = fill(tmp_path, [[0]])
    newer = schema_version() + 1
    with duckdb.connect(str(tmp_path / "run.duckdb")) as connection:
        connection.execute("INSERT INTO main.migrations VALUES (?, 'x', 'y', now())", [newer])
    with duckdb.connect(str(tmp_path / "labels.duckdb")) as connection:
        connection.execute("UPDATE data.snapshot SET schema_version = ?", [newer])
    with pytest.raises(UserError, match=f"schema {newer}"), store.writer():
        pytest.fail("opened")
    with pytest.raises(UserError, match=f"schema {newer}"):
        exegete.connect(tmp_path)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        Store.create_or_open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="is no store"):
        exegete.connect(tmp_path / "absent")
    store = Store.create_or_open(tmp_path / "new")
    with pytest.raises(UserError, match="nothing was published"):
        exegete.connect(store.folder)
    (store.folder / "store.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 99"):
        Store.create_or_open(store.folder)


def test_a_reader_elsewhere_sees_whole_snapshots_only(tmp_path: Path) -> None:
    fill(tmp_path, [range(5)])
    script = """
        import sys, pathlib, exegete
        seen = set()
        while not (pathlib.Path(sys.argv[1]) / "stop").exists():
            with exegete.connect(sys.argv[1]) as connection:
                counts = "SELECT (SELECT count(*) FROM explanations), (SELECT count(*) FROM verdicts)"
                seen.add(connection.execute(counts).fetchall()[0])
                if len(seen) == 1:
                    print("reading", flush=True)
        print(sorted(seen))
    """
    arguments = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        with Store.open(tmp_path).writer() as writer:
            run = begin(writer)
            for start in range(5, 50, 5):
                writer.record(run, [record(latent) for latent in range(start, start + 5)])
                writer.publish()
        (tmp_path / "stop").touch()
        last = process.stdout.read().splitlines()[-1]
    seen = json.loads(last.replace("(", "[").replace(")", "]"))
    assert process.returncode == 0
    assert len(seen) > 1 and all(n % 5 == 0 and verdicts == 2 * n for n, verdicts in seen)


def test_a_truncated_part_is_named(tmp_path: Path) -> None:
    store = fill(tmp_path, [range(5)])
    [part] = (store.folder / "verdicts").iterdir()
    part.write_bytes(part.read_bytes()[:-50])
    with pytest.raises(UserError, match=part.name) as caught:
        run_sql(tmp_path, "SELECT count(*) FROM verdicts")
    assert "\n" not in str(caught.value)
    assert run_sql(tmp_path, "SELECT count(*) AS n FROM scores", "csv") == "n\n15\n"


@pytest.mark.parametrize("damaged", [0, 1])
def test_one_damaged_part_takes_nothing_else_along(tmp_path: Path, damaged: int) -> None:
    store = fill(tmp_path, [range(5), range(5, 9)])
    part = sorted((store.folder / "verdicts").iterdir())[damaged]
    part.write_bytes(part.read_bytes()[:-50])
    with store.writer() as writer:
        writer.publish()
    assert run_sql(tmp_path, "SELECT count(*) AS n FROM scores", "csv") == "n\n27\n"
    with pytest.raises(UserError, match=part.name):
        run_sql(tmp_path, "SELECT count(*) FROM verdicts")
