"""The journal of calls as its users meet it: nothing acknowledged is lost, nothing is counted twice, whatever happens."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest
from language_model_server import serving

import exegete
from exegete.agent.inspection import status_lines
from exegete.tools.errors import UserError
from exegete.tools.llm import (
    BatchJournal,
    Budget,
    Limits,
    Message,
    Reply,
    Request,
    Submission,
    TokenLogprob,
    Usage,
    load_prices,
    open_client,
)
from exegete.tools.store import DictionaryRecord, Store, safe_query
from exegete.tools.store.journal import StoreJournal

MODEL = "openai:model@http://127.0.0.1:9/v1"


def ok(text: str = "yes", usd: float = 0.25, **others: Any) -> Reply:
    return Reply("ok", text, model="model-1", usage=Usage(100, 40, 10, 5), usd=usd, seconds=1.5, **others)


@contextmanager
def journal_at(folder: Path) -> Iterator[StoreJournal]:
    with Store.create_or_open(folder).writer() as writer:
        yield writer.journal


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    with exegete.connect(folder) as connection:
        return connection.execute(query).fetchall()


def publish(folder: Path) -> None:
    with Store.open(folder).writer() as writer:
        writer.publish()


async def call(journal: BatchJournal, name: str, reply: Reply | None, worst_usd: float = 1.0) -> None:
    await journal.intend(name, MODEL, worst_usd)
    if reply is not None:
        await journal.answered(name, reply)


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
        assert await journal.submissions(MODEL) == []
        return submissions

    with journal_at(tmp_path) as journal:
        asyncio.run(begin(journal.of_run("a")))
    publish(tmp_path)
    assert rows(tmp_path, "SELECT status, count(*) FROM calls GROUP BY 1 ORDER BY 1") == [("in_flight", 5), ("ok", 1)]
    with journal_at(tmp_path) as journal:
        # In their order and all of them: request ids in a batch may count them.
        assert asyncio.run(end(journal.of_run("b"))) == [
            Submission("first", MODEL, ("a", "b", "c", "e"), "batch_1"),
            Submission("second", MODEL, ("d",)),
        ]
    publish(tmp_path)
    # c may have been billed in batch_1, e expired there; the second batch never got to the provider, so d is no call.
    assert rows(tmp_path, "SELECT call_id, run, status FROM calls ORDER BY 1") == [
        ("a", "a", "ok"),
        ("b", "a", "ok"),
        ("c/unknown-3", "a", "unknown"),
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
    monkeypatch.setattr("exegete.tools.store.writer._CALLS_IN_A_PART", 10)
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


def test_a_store_from_before_calls_had_parts(tmp_path: Path) -> None:
    Store.create_or_open(tmp_path)
    publish(tmp_path)
    (tmp_path / "calls").rmdir()
    old = """
        DROP TABLE data.call_parts; DROP TABLE data.open_calls; DELETE FROM main.migrations WHERE version >= 4;
        CREATE TABLE data.calls (call_id VARCHAR, run VARCHAR, usd DOUBLE);
    """
    with duckdb.connect(str(tmp_path / "run.duckdb")) as connection:
        connection.execute(old)
    with duckdb.connect(str(tmp_path / "labels.duckdb")) as connection:
        connection.execute("DROP VIEW calls; DROP VIEW costs;" + old)
        connection.execute("CREATE VIEW calls AS FROM data.calls; UPDATE data.snapshot SET schema_version = 3")
    assert rows(tmp_path, "SELECT count(*), sum(worst_usd) FROM calls") == [(0, None)]
    assert rows(tmp_path, "SELECT * FROM costs") == []
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
    import sqlite3

    with journal_at(tmp_path) as journal:
        asyncio.run(call(journal.of_run("a"), "x", ok()))
    other = sqlite3.connect(tmp_path / "journal.sqlite")
    other.execute("SELECT * FROM calls").fetchall()
    with pytest.raises(UserError, match="open in another program"), journal_at(tmp_path):
        pytest.fail("opened")
    other.close()
    with journal_at(tmp_path) as journal:
        assert journal.spent_usd("a") == 0.25


def child(script: str, *arguments: str) -> subprocess.Popen[str]:
    preface = "import sys; sys.path[:0] = sys.argv[1:3]; import test_store_journal as t"
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    command = [sys.executable, "-c", f"{preface}\n{textwrap.dedent(script)}", *paths, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_full_disk_tells_everybody_and_acknowledges_nothing_falsely(tmp_path: Path) -> None:
    script = """
        import asyncio, resource, pathlib

        async def ask(journal, n):
            try:
                await t.call(journal, f"call-{n}", t.ok(str(n) * 50))
                print("kept", n, flush=True)
            except t.UserError as error:
                print("told", error, flush=True)

        async def all_of_it(journal):
            for start in range(0, 4000, 100):
                await asyncio.gather(*(ask(journal, n) for n in range(start, start + 100)))

        with t.journal_at(pathlib.Path(sys.argv[3])) as journal:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
            asyncio.run(all_of_it(journal.of_run("a")))
    """
    with child(script, str(tmp_path)) as process:
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
    kept = [int(line[5:]) for line in lines if line.startswith("kept ")]
    told = [line for line in lines if line.startswith("told ")]
    assert kept and told and len(kept) + len(told) == 4_000 and process.returncode == 0
    assert all("cannot write to the store" in line and "free some space and resume" in line for line in told)

    async def check(journal: BatchJournal) -> None:
        found = await asyncio.gather(*(journal.known(f"call-{n}") for n in range(4_000)))
        assert [n for n, reply in enumerate(found) if reply is not None] == sorted(kept)
        assert found[kept[-1]] == ok(str(kept[-1]) * 50)
        await call(journal, "call-next", ok())

    with journal_at(tmp_path) as journal:
        asyncio.run(check(journal.of_run("a")))


KILLED = """
    import asyncio, os, pathlib, threading, time

    folder, round_ = pathlib.Path(sys.argv[3]), sys.argv[4]
    provider = os.open(folder.parent / "provider", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    async def ask(journal, name):
        reply = await journal.known(name)
        if reply is None:
            await journal.intend(name, t.MODEL, 1.0)
            os.write(provider, f"{name}\\n".encode())  # Billed half a dollar.
            await asyncio.sleep(0.002)
            reply = t.ok(name, usd=0.5)
            await journal.answered(name, reply)
        assert reply == t.ok(name, usd=0.5)
        print(name, flush=True)

    async def worker(journal, queue):
        for n in queue:
            await ask(journal, f"call-{n}")

    async def workers(journal):
        queue = iter(range(1_000_000))
        await asyncio.gather(*(worker(journal, queue) for _ in range(64)))

    def publishing(writer):
        while True:
            writer.publish()

    with t.Store.create_or_open(folder).writer() as writer:
        journal = writer.journal.of_run("run")
        threading.Thread(target=publishing, args=(writer,), daemon=True).start()
        asyncio.run(workers(journal))
"""


def test_kills_lose_nothing_acknowledged_and_double_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    acknowledged: list[str] = []
    for round_ in range(4):
        with child(KILLED, str(folder), str(round_)) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline().strip() for _ in range(len(acknowledged) + 200 + 77 * round_)]
            process.send_signal(signal.SIGKILL)
            # The last line may be cut.
            lines += [line.strip() for line in process.stdout if line.endswith("\n")]
        acknowledged = sorted({*acknowledged, *lines})
        with Store.open(folder).writer() as writer:
            writer.publish()
            journal = writer.journal
            spent = journal.spent_usd("run")

            async def check(journal: StoreJournal = journal, names: list[str] = acknowledged) -> None:
                found = await asyncio.gather(*(journal.of_run("other").known(name) for name in names))
                assert found == [ok(name, usd=0.5) for name in names]

            asyncio.run(check())
        sent = Counter((tmp_path / "provider").read_text().split())
        [(stored, unknown_worst, unknown)] = rows(folder, "SELECT usd, unknown_worst_usd, unknown FROM costs")
        billed = 0.5 * sent.total()
        assert stored <= billed <= stored + unknown_worst and spent == stored + unknown_worst
        assert unknown <= 64 * (round_ + 1)
        # What was answered is never asked again: only unknown calls were sent more than once.
        asked_again = {name for name, times in sent.items() if times > 1}
        lost = {name for (name,) in rows(folder, "SELECT split(call_id, '/')[1] FROM calls WHERE status = 'unknown'")}
        assert asked_again <= lost
        [(calls, distinct)] = rows(folder, "SELECT count(*), count(DISTINCT call_id) FROM calls")
        assert calls == distinct and calls >= len(acknowledged)


def test_a_client_on_the_stores_journal_resumes_what_it_has_paid(tmp_path: Path) -> None:
    prices = load_prices(own={"openai:model": {"input": 1.0, "cached": 0.1, "output": 10.0}})
    requests = [Request((Message("user", f"Number {n}."),), max_tokens=50) for n in range(30)]

    async def ask(url: str, journal: BatchJournal, budget: Budget) -> list[Reply]:
        limits = Limits(total_s=1.0)
        client = open_client(f"openai:model@{url}", journal=journal, budget=budget, prices=prices, limits=limits)
        replies = await asyncio.gather(*(client.complete(request) for request in requests))
        await client.close()
        return replies

    with serving() as server:
        server.behave(faults=[{"kind": "cut_body", "first": 5}])
        with journal_at(tmp_path) as journal:
            budget = Budget(1.0)
            first = asyncio.run(ask(server.openai_url, journal.of_run("a"), budget))
            asked = len(server.log())
        with journal_at(tmp_path) as journal:
            assert journal.spent_usd("a") == pytest.approx(budget.spent_usd) and budget.spent_usd > 0
            second = asyncio.run(ask(server.openai_url, journal.of_run("b"), Budget(0.0)))
            assert journal.spent_usd("b") == 0
        assert len(server.log()) == asked == 35
    assert {reply.status for reply in first} == {"ok"} and all(reply.cached for reply in second)
    assert [reply.text for reply in first] == [reply.text for reply in second]
    publish(tmp_path)
    [(answered, unknown)] = rows(tmp_path, "SELECT answered, unknown FROM costs")
    assert (answered, unknown) == (30, 5) and os.path.getsize(tmp_path / "journal.sqlite") > 0
