"""The journal of calls when a process is killed or the disk is full: every dollar is accounted for, once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from journaled_store import call, child, journal_at, ok, publish, rows
from language_model_server import serving

from exegete.tools.llm import BatchJournal, Budget, Limits, Message, Reply, Request, load_prices, open_client
from exegete.tools.store import Store
from exegete.tools.store.journal import StoreJournal


def test_a_full_disk_tells_everybody_and_acknowledges_nothing_falsely(tmp_path: Path) -> None:
    script = """
        import asyncio, resource, pathlib
        from exegete.tools.errors import UserError

        async def ask(journal, n):
            try:
                await t.call(journal, f"call-{n}", t.ok(str(n) * 50))
                print("kept", n, flush=True)
            except UserError as error:
                print("told", error, flush=True)

        async def all_of_it(journal):
            for start in range(0, 4000, 100):
                await asyncio.gather(*(ask(journal, n) for n in range(start, start + 100)))

        with t.journal_at(pathlib.Path(sys.argv[1])) as journal:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
            asyncio.run(all_of_it(journal.of_run("a")))
    """
    with child(script, tmp_path) as process:
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

    folder = pathlib.Path(sys.argv[1])
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
        with child(KILLED, folder) as process:
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


BATCHING = """
    import asyncio, pathlib
    from exegete.tools.llm import BatchLimits, Budget, Limits, Message, Request, load_prices, open_client

    async def ask(journal, budget):
        client = open_client(
            f"openai-batch:model@{sys.argv[2]}",
            journal=journal,
            budget=budget,
            prices=load_prices(own={"openai:model": {"input": 1.0, "cached": 0.1, "output": 10.0}}),
            limits=Limits(total_s=5.0, patience_s=10.0),
            batches=BatchLimits(linger_s=0.05, poll_s=0.05, poll_max_s=0.1, settle_s=0.1, gather_s=5.0, transfer_s=5.0),
        )
        requests = [Request((Message("user", f"Number {n}."),), max_tokens=50) for n in range(50)]
        replies = await asyncio.gather(*map(client.complete, requests))
        await client.close()
        print({reply.status for reply in replies}, budget.spent_usd, flush=True)

    with t.journal_at(pathlib.Path(sys.argv[1])) as journal:
        asyncio.run(ask(journal.of_run("a"), Budget(1.0, journal.spent_usd("a"))))
"""


def test_a_batch_client_that_is_killed_finds_its_batch_again(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with serving(batch_s=0.5) as server:
        with child(BATCHING, store, server.openai_url) as process:
            while not any(row["route"] == "polls" for row in server.log()):
                assert process.poll() is None
            process.send_signal(signal.SIGKILL)
        publish(store)
        in_flight_now = rows(store, "SELECT provider, status, count(*) FROM calls GROUP BY ALL")
        assert in_flight_now == [("openai-batch", "in_flight", 50)]
        with child(BATCHING, store, server.openai_url) as process:
            assert process.stdout is not None
            told = process.stdout.read()
        counts = server.counts()
        assert sum(row["route"] == "batches" for row in server.log()) == 1
    assert (counts["questions"], counts["answered"], counts["asked_again"]) == (50, 50, 0)
    publish(store)
    [(answered, unknown, in_flight, usd)] = rows(store, "SELECT answered, unknown, in_flight, usd FROM costs")
    assert (answered, unknown, in_flight) == (50, 0, 0) and usd > 0
    assert told.startswith("{'ok'}") and float(told.split()[-1]) == pytest.approx(usd)
