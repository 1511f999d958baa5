"""The journal of calls as its users meet it: nothing acknowledged is lost, nothing is counted twice, whatever happens."""

from __future__ import annotations

import asyncio
import math
import shutil
import sqlite3
from pathlib import Path

import duckdb
import pytest
from journaled_store import MODEL, call, journal_at, ok, publish, rows

from exegete.agent.inspection import calls_lines, status_lines
from exegete.tools.errors import UserError
from exegete.tools.llm import BatchJournal, Reply, Submission, TokenLogprob
from exegete.tools.store import DictionaryRecord, Store, safe_query
from exegete.tools.store.journal import StoreJournal


def test_a_reply_comes_back_whole_in_other_loops_runs_and_processes(tmp_path: Path) -> None:
    logprobs = (TokenLogprob("y", -0.5, (("y", -0.5), ("n", -math.inf))), TokenLogprob("es", -0.25))
    replies = {
        "short": ok(),
        "long": ok("ein Wort – " * 500, detail="d", attempts=3),
        "tokens": ok(logprobs=logprobs),
        "half": ok("half a pair: \ud83d"),
        "no tokens": ok(logprobs=()),
        "refused": Reply("refused", detail="I'd rather not"),
        "failed": Reply("error", detail="HTTP 500: down"),
    }
    with journal_at(tmp_path) as journal:
        run = journal.of_run("a")
        for name, reply in replies.items():
            asyncio.run(call(run, name, reply))
        for name, reply in replies.items():
            assert asyncio.run(journal.of_run("b").known(name)) == reply
    with journal_at(tmp_path) as journal:
        for name, reply in replies.items():
            assert asyncio.run(journal.of_run("b").known(name)) == reply
        assert asyncio.run(journal.of_run("b").known("never asked")) is None


def test_what_is_parsed_is_left_to_the_client_and_large_text_is_compressed(tmp_path: Path) -> None:
    with journal_at(tmp_path) as journal:
        asyncio.run(call(journal.of_run("a"), "x", ok('{"a": 1}' * 100_000, parsed={"a": 1}, cached=True)))
        assert asyncio.run(journal.of_run("a").known("x")) == ok('{"a": 1}' * 100_000)
    assert (tmp_path / "journal.sqlite").stat().st_size < 200_000


def test_calls_side_by_side_share_transactions_and_a_lone_one_waits_for_none(tmp_path: Path) -> None:
    async def side_by_side(journal: StoreJournal) -> None:
        await asyncio.gather(*(call(journal.of_run("a"), f"call-{n}", ok()) for n in range(500)))

    async def in_turn(journal: StoreJournal) -> None:
        for n in range(5):
            await journal.of_run("a").intend(f"lone-{n}", MODEL, 1.0)

    with journal_at(tmp_path) as journal:
        asyncio.run(side_by_side(journal))
        assert 2 <= journal.transactions <= 100  # For 1,000 entries.
        before = journal.transactions
        asyncio.run(in_turn(journal))
        assert journal.transactions == before + 5


def test_what_a_run_has_spent(tmp_path: Path) -> None:
    async def ask(journal: StoreJournal) -> None:
        a, b = journal.of_run("a"), journal.of_run("b")
        await call(a, "1", ok(usd=0.25))
        await call(a, "2", Reply("refused", usd=0.5))
        await call(a, "3", Reply("error"))
        await call(a, "4/lost-77", None, worst_usd=2.0)
        await call(a, "4", ok(usd=0.125))
        await call(a, "5", None, worst_usd=4.0)
        await call(b, "6", ok(usd=8.0))
        await a.submitting("n", MODEL, {"7": 16.0, "8": 16.0})

    with journal_at(tmp_path) as journal:
        asyncio.run(ask(journal))
        # 0.25 + 0.5 + 0.125, and 2 for the lost one; call 5 may still be answered.
        assert journal.spent_usd("a") == 2.875
    with journal_at(tmp_path) as journal:
        # Nobody will answer call 5 any more; the batch can still be taken up.
        assert journal.spent_usd("a") == 6.875
        assert (journal.spent_usd("b"), journal.spent_usd("c")) == (8.0, 0.0)


def test_each_call_is_one_row_and_each_cost_is_counted_once(tmp_path: Path) -> None:
    async def ask(journal: StoreJournal) -> None:
        a, b = journal.of_run("a"), journal.of_run("b")
        await call(a, "down", Reply("error", detail="HTTP 500: 'a window of the corpus' is down"))
        await call(a, "down", Reply("error", detail="HTTP 500: down"))
        await call(b, "down", ok(usd=1.0))
        # Two clients that ask the same at the same time both pay.
        await asyncio.gather(a.intend("twice", MODEL, 1.0), a.intend("twice", MODEL, 1.0))
        await a.answered("twice", ok("first", usd=0.5))
        await a.answered("twice", ok("second", usd=0.5))
        await a.answered("never intended", ok("kept all the same"))
        await call(a, "quoting", Reply("unparsed", usd=0.1, detail="at $.a: 'a window of the corpus' is no number"))
        await call(a, "in flight", None)
        assert await a.known("twice") == ok("first", usd=0.5)

    store = Store.create_or_open(tmp_path)
    with store.writer() as writer:
        asyncio.run(ask(writer.journal))
        writer.publish()
        writer.publish()
        query = "SELECT call_id, run, status, usd, worst_usd, detail FROM calls ORDER BY noted_at, call_id"
        assert sorted(rows(tmp_path, query)) == [
            ("down", "b", "ok", 1.0, 1.0, None),
            ("down/failed-1", "a", "error", 0.0, 1.0, "HTTP 500:"),
            ("down/failed-2", "a", "error", 0.0, 1.0, "HTTP 500: down"),
            ("in flight/in-flight-1", "a", "in_flight", None, 1.0, None),
            ("never intended", "a", "ok", 0.25, 0.25, None),
            ("quoting", "a", "unparsed", 0.1, 1.0, None),
            ("twice", "a", "ok", 0.5, 1.0, None),
            ("twice/again-5", "a", "ok", 0.5, 1.0, None),
        ]
    publish(tmp_path)
    assert rows(tmp_path, "SELECT call_id, usd FROM calls WHERE status IN ('unknown', 'in_flight')") == [
        ("in flight/unknown-8", None)
    ]
    with journal_at(tmp_path) as journal:  # And can be asked again.
        assert asyncio.run(journal.of_run("b").known("in flight")) is None
        asyncio.run(call(journal.of_run("b"), "in flight", ok(usd=2.0)))
    publish(tmp_path)
    counts = rows(tmp_path, "SELECT run, calls, answered, failed, unknown, in_flight, usd FROM costs ORDER BY ALL")
    assert counts == [("a", 1, 1, 0, 0, 0, 0.25), ("a", 6, 3, 2, 1, 0, 1.1), ("b", 2, 2, 0, 0, 0, 3.0)]
    assert rows(tmp_path, "SELECT count(*) - count(DISTINCT call_id) FROM calls") == [(0,)]


def test_views_tell_provider_model_and_tokens(tmp_path: Path) -> None:
    store = Store.create_or_open(tmp_path)
    with store.writer() as writer:
        writer.add_dictionary(DictionaryRecord("sha256:ab", "toy", 10))
        run = writer.begin_run(config={}, seed=0, code_version="0", dictionary="sha256:ab")
        idle = writer.begin_run(config={"a": 1}, seed=0, code_version="0", dictionary="sha256:ab")
        asyncio.run(call(writer.journal.of_run(run), "x", ok()))
        asyncio.run(call(writer.journal.of_run(run), "y/lost-1", None, worst_usd=0.5))
        writer.publish()
    columns = "provider, model, answered_by, input_tokens, cached_tokens, cache_write_tokens, output_tokens, seconds"
    assert rows(tmp_path, f"SELECT {columns}, attempts FROM calls WHERE call_id = 'x'") == [
        ("openai", "model@http://127.0.0.1:9/v1", "model-1", 100, 40, 10, 5, 1.5, 1)
    ]
    costs = {found[0]: found[1:] for found in rows(tmp_path, "SELECT * EXCLUDE (model) FROM costs")}
    assert costs == {run: (2, 1, 0, 1, 0, 100, 40, 5, 0.25, 0.5), idle: (0,) * 10}
    assert safe_query(tmp_path, "SELECT count(*) FROM calls").rows == [(2,)]
    told = "\n".join(status_lines(tmp_path))
    assert "calls: 1 answered, 0 failed, 1 unknown; 0.25 USD, and at most 0.50 USD for the unknown" in told
    shutil.move(tmp_path, tmp_path.with_name("elsewhere"))
    assert rows(tmp_path.with_name("elsewhere"), "SELECT count(*) FROM calls") == [(2,)]


def test_status_says_why_calls_failed_and_what_an_ended_run_left_in_flight(tmp_path: Path) -> None:
    Store.create_or_open(tmp_path)
    with Store.open(tmp_path).writer() as writer:
        writer.add_dictionary(DictionaryRecord("sha256:ab", "toy", 3))
        models = {"models": {"judge": MODEL, "explainer": None}}
        run = writer.begin_run(config=models, seed=0, code_version="0", dictionary="sha256:ab")
        for name, detail in {"x": "HTTP 500: down", "y": "HTTP 503", "z": "HTTP 500: down"}.items():
            asyncio.run(call(writer.journal.of_run(run), name, Reply("error", detail=detail)))
        asyncio.run(writer.journal.of_run(run).intend("w", MODEL, 1.0))
        writer.publish()
        counts = "calls: 0 answered, 3 failed (most often: HTTP 500: down), 0 unknown, 1 in flight"
        assert f"  {counts}; 0.00 USD" in status_lines(tmp_path)
    assert f"  models: judge {MODEL}" in status_lines(tmp_path)
    assert f"  {counts} when it ended; 0.00 USD" in status_lines(tmp_path)
    assert calls_lines(tmp_path, [run]) == [f"{counts} when it ended; 0.00 USD"] and calls_lines(tmp_path, []) == []


def test_a_batch_outlives_the_process_until_it_lands(tmp_path: Path) -> None:
    async def begin(journal: BatchJournal) -> None:
        await journal.submitting("first", MODEL, {"a": 1.0, "b": 1.0, "c": 1.0, "e": 1.0})
        await journal.submitting("other", "anthropic-batch:x", {"o": 1.0})
        await journal.submitting("second", MODEL, {"d": 1.0})
        await journal.submitted("first", "batch_1")
        await journal.answered("b", ok("b"))

    async def end(journal: BatchJournal) -> list[Submission]:
        submissions = await journal.submissions(MODEL)
        assert await journal.known("b") == ok("b") and await journal.known("a") is None
        await journal.answered("a", ok("a"))
        for one in submissions:
            await journal.landed(one.nonce, undone=["b", "e"])
        await journal.landed("first")
        with pytest.raises(ValueError, match="no batch 'first'"):
            await journal.submitted("first", "batch_1")
        await journal.answered("e", Reply("error", detail="expired in the third batch as well"))
        assert await journal.submissions(MODEL) == []
        return submissions

    with journal_at(tmp_path) as journal:
        asyncio.run(begin(journal.of_run("a")))
    publish(tmp_path)
    assert rows(tmp_path, "SELECT status, count(*) FROM calls GROUP BY 1 ORDER BY 1") == [("in_flight", 5), ("ok", 1)]
    with journal_at(tmp_path) as journal:
        # In their order and all of them: request ids in a batch may count them.
        assert asyncio.run(end(journal.of_run("b"))) == [
            Submission("first", MODEL, ("a", "b", "c", "e"), "batch_1", worst_usd=3.0),
            Submission("second", MODEL, ("d",), worst_usd=1.0),
        ]
    publish(tmp_path)
    # c may have been billed in batch_1, e expired there; the second batch never got to the provider, so d is no call.
    assert rows(tmp_path, "SELECT DISTINCT model FROM calls ORDER BY 1") == [(MODEL[7:],), ("x",)]
    assert rows(tmp_path, "SELECT call_id, run, status FROM calls ORDER BY 1") == [
        ("a", "a", "ok"),
        ("b", "a", "ok"),
        ("c/unknown-3", "a", "unknown"),
        ("e/failed-4", "a", "error"),
        ("o/in-flight-5", "a", "in_flight"),
    ]


def test_a_part_that_was_not_registered_is_written_anew(tmp_path: Path) -> None:
    with journal_at(tmp_path) as journal:
        asyncio.run(call(journal.of_run("a"), "x", ok()))
    publish(tmp_path)
    with duckdb.connect(str(tmp_path / "run.duckdb")) as connection:  # As if killed before the transaction.
        connection.execute("DELETE FROM data.call_parts")
    (tmp_path / "calls" / "0123.parquet").write_bytes(b"an orphan")
    publish(tmp_path)
    assert rows(tmp_path, "SELECT call_id FROM calls") == [("x",)]
    assert len(list((tmp_path / "calls").iterdir())) == 1


def test_many_calls_go_into_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exegete.tools.store.exported_calls._CALLS_IN_A_PART", 10)
    with Store.create_or_open(tmp_path).writer() as writer:
        journal = writer.journal.of_run("a")

        async def ask(first: int, last: int) -> None:
            await asyncio.gather(*(call(journal, f"call-{n}", ok()) for n in range(first, last)))

        for first, last in ((0, 30), (30, 37)):
            asyncio.run(ask(first, last))
            writer.publish()
    assert len(list((tmp_path / "calls").iterdir())) == 4
    assert rows(tmp_path, "SELECT count(*), count(DISTINCT call_id) FROM calls") == [(37, 37)]


def test_a_journal_that_was_put_away_does_not_hide_new_calls(tmp_path: Path) -> None:
    with journal_at(tmp_path) as journal:
        for name in ("x", "y"):
            asyncio.run(call(journal.of_run("a"), name, ok()))
    publish(tmp_path)
    (tmp_path / "journal.sqlite").unlink()
    with journal_at(tmp_path) as journal:
        asyncio.run(call(journal.of_run("a"), "z", ok()))
    publish(tmp_path)
    assert rows(tmp_path, "SELECT call_id FROM calls ORDER BY 1") == [("x",), ("y",), ("z",)]


def test_a_budget_counts_what_was_paid_before_the_journal_was_lost(tmp_path: Path) -> None:
    with journal_at(tmp_path) as journal:
        asyncio.run(call(journal.of_run("a"), "x", ok()))
        asyncio.run(call(journal.of_run("b"), "y", ok()))
    with Store.open(tmp_path).writer() as writer:
        assert writer.spent_usd("a") == 0.25
        writer.publish()
        assert writer.spent_usd("a") == 0.25
    (tmp_path / "journal.sqlite").unlink()
    with journal_at(tmp_path) as journal:
        asyncio.run(call(journal.of_run("a"), "z", ok()))
    with Store.open(tmp_path).writer() as writer:
        assert (writer.spent_usd("a"), writer.spent_usd("b"), writer.spent_usd("c")) == (0.5, 0.25, 0.0)


def test_a_store_from_before_calls_had_parts(tmp_path: Path) -> None:
    Store.create_or_open(tmp_path)
    publish(tmp_path)
    (tmp_path / "calls").rmdir()
    old = """
        DROP TABLE data.call_parts; DROP TABLE data.open_calls; DROP TABLE data.settings;
        DROP TABLE data.embedding_parts; DROP TABLE data.climbs; DROP TABLE data.claims; ALTER TABLE data.results DROP explanation_id;
        DELETE FROM main.migrations WHERE version >= 4;
        CREATE TABLE data.calls (call_id VARCHAR, run VARCHAR, usd DOUBLE);
    """
    with duckdb.connect(str(tmp_path / "run.duckdb")) as connection:
        connection.execute(old)
    with duckdb.connect(str(tmp_path / "labels.duckdb")) as connection:
        connection.execute("DROP VIEW calls; DROP VIEW costs;" + old)
        connection.execute("CREATE VIEW calls AS FROM data.calls; UPDATE data.snapshot SET schema_version = 3")
        connection.execute("DROP VIEW climbs; DROP TABLE data.outcomes; DROP TABLE data.best_explanations")
        connection.execute("CREATE OR REPLACE VIEW best_explanations AS SELECT 'its own' AS text")
    assert rows(tmp_path, "SELECT count(*), sum(worst_usd) FROM calls") == [(0, None)]
    assert rows(tmp_path, "SELECT * FROM costs") == [] == rows(tmp_path, "SELECT outcome FROM latents")
    assert rows(tmp_path, "SELECT text FROM best_explanations") == [("its own",)]
    with journal_at(tmp_path) as journal:
        asyncio.run(call(journal.of_run("a"), "x", ok()))
    publish(tmp_path)
    assert rows(tmp_path, "SELECT call_id FROM calls") == [("x",)]


def test_whoever_goes_away_takes_nothing_along(tmp_path: Path) -> None:
    async def ask(journal: BatchJournal) -> None:
        tasks = [asyncio.create_task(call(journal, f"call-{n}", None)) for n in range(20)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    with journal_at(tmp_path) as journal:
        asyncio.run(ask(journal.of_run("a")))
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(journal.of_run("a").known("call-1"))
    publish(tmp_path)
    assert rows(tmp_path, "SELECT count(*) FROM calls") == [(20,)]


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with journal_at(tmp_path) as journal:

        async def ask() -> None:
            await asyncio.gather(*(call(journal.of_run("a"), f"call-{n}", ok()) for n in range(2_000)))

        asyncio.run(ask())
    whole = path.read_bytes()
    path.write_bytes(whole[: 4096 * 6] + b"\xff" * (len(whole) - 4096 * 6))
    with pytest.raises(UserError, match=r"journal\.sqlite' is damaged.*restore it"):
        publish(tmp_path)
    path.write_bytes(b"x" * 5000)
    with pytest.raises(UserError, match=r"journal\.sqlite' is damaged"), journal_at(tmp_path):
        pytest.fail("opened")
    path.write_bytes(whole)
    publish(tmp_path)
    assert rows(tmp_path, "SELECT count(*) FROM calls") == [(2_000,)]


def test_another_program_in_the_journal_is_named(tmp_path: Path) -> None:
    with journal_at(tmp_path) as journal:
        asyncio.run(call(journal.of_run("a"), "x", ok()))
    other = sqlite3.connect(tmp_path / "journal.sqlite")
    other.execute("SELECT * FROM calls").fetchall()
    with pytest.raises(UserError, match="open in another program"), journal_at(tmp_path):
        pytest.fail("opened")
    other.close()
    with journal_at(tmp_path) as journal:
        assert journal.spent_usd("a") == 0.25
