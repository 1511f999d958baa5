"""A store that has become large: snapshots that grow, publishing beside the writer, and parts that are merged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from latent_records import DICTIONARY, FakeScore, begin, record

import exegete
from exegete.tools.errors import UserError
from exegete.tools.explainers import Explanation
from exegete.tools.store import LatentRecord, Store, Writer, compaction, publishing
from exegete.tools.store.parts import SUPERSEDED, write_part
from exegete.tools.store.publisher import Publisher

VIEWS = ("latents", "explanations", "scores", "best_explanations", "verdicts", "climbs", "runs", "calls", "costs")


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Let snapshots grow from the first row on; filled with how many scores each one began with, None for made from nothing."""
    monkeypatch.setattr(publishing, "_SORTED_ROWS", 0)
    began: list[int | None] = []
    finish = publishing._finish

    def noted(temporary: Path, folder: Path, before: int | None) -> None:
        began.append(before)
        finish(temporary, folder, before)

    monkeypatch.setattr(publishing, "_finish", noted)
    return began


def seen(store: Store) -> dict[str, Any]:
    """What readers see, but for times."""
    with exegete.connect(store.folder) as connection:
        shown = {view: connection.execute(f"SELECT * FROM {view} ORDER BY ALL").fetchall() for view in VIEWS}
    shown["runs"] = [row[:7] for row in shown["runs"]]
    return shown


def whole(store: Store) -> dict[str, Any]:
    """The same from a snapshot that is made from nothing."""
    with store.writer() as writer:
        writer.publish()
    return seen(store)


def test_a_grown_snapshot_is_the_same_as_one_made_from_nothing(tmp_path: Path, growing: list[int | None]) -> None:
    store = Store.create_or_open(tmp_path)
    with store.writer() as writer:
        run = begin(writer)
        other = writer.begin_run(config={"a": 2}, seed=0, code_version="0", dictionary=DICTIONARY)
        writer.record(run, [record(latent, 0.5 + latent / 100) for latent in range(10)])
        writer.publish()
        writer.record(run, [record(latent) for latent in range(10, 15)])
        # Another run finds a better explanation of latent 3 and a worse one of latent 4.
        writer.record(other, [scored(3, "better", 0.9), scored(4, "worse", 0.1)])
        writer.publish()
        stands_beside = record(3).explanations[0][1]
        beside = FakeScore(value=0.5, baseline="shuffled")
        floor = LatentRecord(DICTIONARY, 3, "labeled", scores=[(stands_beside, beside)])
        writer.record(run, [floor], floors=True)
        writer.set_types(run, DICTIONARY, {3: "input"})
        writer.publish()
        writer.publish()
    grown = seen(store)
    assert growing == [None, 30, 49, 50]
    assert whole(store) == grown and growing[-1] is None
    best = {row[1]: row[3] for row in grown["best_explanations"]}
    assert best[3] == "better" and best[4] == "months, as in latent 4" and len(best) == 15


def scored(latent: int, text: str, value: float) -> LatentRecord:
    explanation = Explanation(text)
    key = explanation.id(DICTIONARY, latent)
    scores = [(key, FakeScore(value=value)), (key, FakeScore("fuzzing", value=value))]
    return LatentRecord(DICTIONARY, latent, "labeled", [(explanation, key)], scores)


def test_what_was_forgotten_is_in_no_snapshot(tmp_path: Path, growing: list[int | None]) -> None:
    store = Store.create_or_open(tmp_path)
    with store.writer() as writer:
        run = begin(writer)
        writer.record(run, [replace(record(latent), missing_calls=int(latent == 2)) for latent in range(5)])
        writer.publish()
        assert writer.forget_incomplete(run, DICTIONARY) == 1
        writer.record(run, [record(7)])  # As many rows as before.
        writer.publish()
        writer.record(run, [record(8)])
        writer.publish()
    assert growing == [None, None, 15]
    assert {row[1] for row in seen(store)["scores"]} == {0, 1, 3, 4, 7, 8}
    assert whole(store) == seen(store)


def test_rows_that_went_unnoticed_and_files_of_others_are_no_ground_to_grow_on(
    tmp_path: Path, growing: list[int | None]
) -> None:
    store = Store.create_or_open(tmp_path)
    with store.writer() as writer:
        run = begin(writer)
        writer.record(run, [record(latent) for latent in range(5)])
        writer.publish()
        writer._connection.execute("DELETE FROM data.scores WHERE latent = 2")
        writer.record(run, [record(5)])
        writer.publish()  # The numbers of rows do not agree.
        shutil.copyfile(tmp_path / "labels.duckdb", tmp_path / "copy")
        (tmp_path / "copy").replace(tmp_path / "labels.duckdb")
        writer.publish()  # The file is another one.
        (tmp_path / "labels.duckdb").unlink()
        writer.publish()
    assert growing == [None] * 4
    assert {row[1] for row in seen(store)["scores"]} == {0, 1, 3, 4, 5}


def test_the_best_explanation_of_a_run_is_the_one_it_stands_by(tmp_path: Path) -> None:
    chosen, other = Explanation("chosen"), Explanation("better on test, and not chosen")
    keys = [one.id(DICTIONARY, 1) for one in (chosen, other)]
    scores = [(key, FakeScore(value=value)) for key, value in zip(keys, (0.6, 0.9), strict=True)]
    both = list(zip((chosen, other), keys, strict=True))
    store = Store.create_or_open(tmp_path)
    with store.writer() as writer:
        writer.record(begin(writer), [LatentRecord(DICTIONARY, 1, "labeled", both, scores, chosen=keys[0])])
        writer.publish()
    assert [row[3] for row in seen(store)["best_explanations"]] == ["chosen"]


def test_the_writer_goes_on_while_a_snapshot_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written after the copy began is not in it, whole transactions or nothing, and is in the next."""
    copying, go_on = threading.Event(), threading.Event()
    copy = publishing._copy_table

    def slow(connection: duckdb.DuckDBPyConnection, table: str, first: int | None) -> None:
        copying.set()
        assert go_on.wait(30)
        copy(connection, table, first)

    monkeypatch.setattr(publishing, "_copy_table", slow)
    store = Store.create_or_open(tmp_path)
    with store.writer() as writer:
        run = begin(writer)
        writer.record(run, [record(1)])
        assert writer.publish_soon(0.0) and copying.wait(30)
        assert not writer.publish_soon(0.0)
        writer.record(run, [record(2)])
        go_on.set()
        writer._publisher.close()
        assert {row[1] for row in seen(store)["scores"]} == {1}
        writer.publish()
        assert {row[1] for row in seen(store)["scores"]} == {1, 2}


def test_publishing_takes_a_tenth_of_the_time(tmp_path: Path) -> None:
    now = 0.0
    published = []

    def publish() -> None:
        nonlocal now
        published.append(now)
        now += 5.0

    publisher = Publisher(publish, lambda: now)

    def soon(at: float) -> bool:
        nonlocal now
        now = at
        begun = publisher.soon(10.0)
        publisher.close()
        return begun

    assert not soon(9.0) and soon(10.0)
    assert not soon(59.0) and soon(60.0)  # It took 5 s, so it pauses for 45.
    publisher.now()
    assert not soon(114.0) and soon(115.0)
    assert published == [10.0, 60.0, 65.0, 115.0]


def test_errors_in_the_background_are_tried_again_or_raised(tmp_path: Path) -> None:
    raised: list[Exception] = [UserError("the disk is full"), ZeroDivisionError()]

    def publish() -> None:
        if raised:
            raise raised.pop(0)

    publisher = Publisher(publish, lambda: 0.0)
    assert publisher.soon(0.0)
    publisher.close()
    assert publisher.soon(0.0)
    publisher.close()
    assert not publisher.soon(0.0)
    with pytest.raises(ZeroDivisionError):
        publisher.now()
    publisher.now()
    assert publisher.soon(0.0)


def parts_of(store: Store) -> list[tuple[str, int]]:
    with duckdb.connect(str(store.folder / "run.duckdb"), read_only=True) as connection:
        return connection.execute("SELECT part, rows FROM data.verdict_parts ORDER BY rowid").fetchall()


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def write_many(writer: Writer, latents: Sequence[int]) -> str:
    run = begin(writer)
    for latent in latents:
        writer.record(run, [record(latent)])
    return run


def test_too_little_memory_for_a_snapshot_costs_that_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.create_or_open(tmp_path / "s").writer() as writer:
        run = begin(writer)
        writer.record(run, [record(0)])
        writer.publish()
        writer.record(run, [record(1)])
        with monkeypatch.context() as little:
            little.setattr(publishing, "MEMORY", "200KB")
            with pytest.raises(UserError, match="cannot write to the store"):
                writer.publish()
        with exegete.connect(tmp_path / "s") as connection:
            assert connection.execute("SELECT count(*) FROM data.results").fetchall() == [(1,)]
        writer.publish()
    with exegete.connect(tmp_path / "s") as connection:
        assert connection.execute("SELECT count(*) FROM data.results").fetchall() == [(2,)]


def test_small_parts_are_merged_and_nothing_is_lost(tmp_path: Path) -> None:
    store = Store.create_or_open(tmp_path)
    with store.writer() as writer:
        write_many(writer, range(2 * compaction.FAN + 3)[::-1])
        before = {part for (part,) in writer._connection.execute("SELECT part FROM data.verdict_parts").fetchall()}
        writer.publish()
    parts = parts_of(store)
    assert sorted(rows for _, rows in parts) == [2, 2, 2, 32, 32]
    standing = {part for part, _ in parts}
    assert files(tmp_path / "verdicts") == before | standing
    verdicts = seen(store)["verdicts"]
    assert [row[1] for row in verdicts] == [latent for latent in range(35) for _ in range(2)]
    [merged, *_] = [part for part, rows in parts if rows == 32]
    latents = duckdb.read_parquet(str(tmp_path / "verdicts" / merged)).project("latent").fetchall()
    assert latents == sorted(latents)


def test_readers_of_a_former_snapshot_keep_its_parts_for_a_day(tmp_path: Path) -> None:
    store = Store.create_or_open(tmp_path)
    with store.writer() as writer:
        run = write_many(writer, range(compaction.FAN - 1))
        writer.publish()
    with exegete.connect(tmp_path) as former:
        with store.writer() as writer:
            writer.record(run, [record(compaction.FAN)])
            writer.publish()
        standing = {part for part, _ in parts_of(store)}
        assert len(standing) == 1
        with store.writer() as writer:
            writer.publish()
        assert former.execute("SELECT count(*), count(DISTINCT latent) FROM verdicts").fetchall() == [(30, 15)]
    noted = list((tmp_path / "verdicts" / SUPERSEDED).iterdir())
    assert {note.name for note in noted} | standing == files(tmp_path / "verdicts") and len(noted) == compaction.FAN
    for note in noted:
        os.utime(note, (0, 0))
    with store.writer():
        assert files(tmp_path / "verdicts") == standing
    assert not list((tmp_path / "verdicts" / SUPERSEDED).iterdir())


def test_a_merge_of_parts_that_were_replaced_meanwhile_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.create_or_open(tmp_path)
    with store.writer() as writer:
        run = begin(writer)
        for latent in range(compaction.FAN):
            writer.record(run, [replace(record(latent), missing_calls=int(latent == 3))])
        write = compaction._write

        def forgetting(path: Path, parts: Sequence[Path], order: str) -> None:
            write(path, parts, order)
            writer.forget_incomplete(run, DICTIONARY)

        monkeypatch.setattr(compaction, "_write", forgetting)
        writer.publish()
    assert {row[1] for row in seen(store)["verdicts"]} == set(range(compaction.FAN)) - {3}
    assert len(parts_of(store)) == compaction.FAN - 1


def test_a_damaged_part_stays_where_it_is(tmp_path: Path) -> None:
    store = Store.create_or_open(tmp_path)
    with store.writer() as writer:
        write_many(writer, range(compaction.FAN))
        [damaged, *_] = sorted((tmp_path / "verdicts").iterdir())
        damaged.write_bytes(damaged.read_bytes()[:-50])
        writer.publish()
    assert len(parts_of(store)) == compaction.FAN
    assert len(seen_scores(store)) == 3 * compaction.FAN


def seen_scores(store: Store) -> list[Any]:
    with exegete.connect(store.folder) as connection:
        return connection.execute("FROM scores").fetchall()


@pytest.mark.parametrize("moment", ["before it is renamed", "before it is registered", "after it is registered"])
def test_a_kill_amid_a_merge_loses_nothing(tmp_path: Path, moment: str) -> None:
    store = Store.create_or_open(tmp_path)
    script = """
        import os, sys, pathlib, signal
        sys.path[:0] = [sys.argv[2], sys.argv[2] + "/.."]
        import test_store_growing as t
        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        c = t.compaction
        if sys.argv[3] == "before it is renamed":
            c.sync_file = die
        elif sys.argv[3] == "before it is registered":
            c._swap = die
        else:
            swap = c._swap
            c._swap = lambda *arguments: (swap(*arguments), die())
        with t.Store.open(pathlib.Path(sys.argv[1])).writer() as writer:
            t.write_many(writer, range(c.FAN))
            writer.publish()
    """
    arguments = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), str(Path(__file__).parent), moment]
    found = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert found.returncode == -9, found.stderr
    with store.writer() as writer:
        assert writer.labeled(begin(writer), DICTIONARY).tolist() == list(range(compaction.FAN))
        writer.publish()
    assert [row[1] for row in seen(store)["verdicts"]] == [n for n in range(compaction.FAN) for _ in range(2)]
    [(_, rows)] = parts_of(store)
    assert rows == 2 * compaction.FAN


def test_levels_are_merged_from_the_lowest_and_up_to_a_size() -> None:
    def level(*rows: int) -> list[int]:
        parts = [compaction._Part(f"{number}", count) for number, count in enumerate(rows)]
        return [part.rows for part in compaction._level(parts)]

    assert level(*[300] * 15, *[4] * 15) == []
    assert level(*[300] * 16, *[4] * 17) == [4] * 16
    assert level(*[300] * 15, *[4_000] * 2) == [300] * 15 + [4_000]
    assert level(*[compaction.LARGE_ROWS] * 40) == []
    assert level(*[900_000] * 20) == [900_000] * 4


def test_merged_calls_go_on_from_the_last_one(tmp_path: Path) -> None:
    store = Store.create_or_open(tmp_path)
    with store.writer() as writer:
        for settled in range(1, compaction.FAN + 1):
            part = write_part(tmp_path / "calls", pa.table({"call_id": [str(settled)], "noted_at": [settled]}))
            writer._connection.execute("INSERT INTO data.call_parts VALUES (?, 1, ?)", [part, settled])
        assert compaction.compact(writer._connection, writer._lock, tmp_path) == 1
        found = writer._connection.execute("SELECT rows, settled FROM data.call_parts").fetchall()
    assert found == [(compaction.FAN, compaction.FAN)]
