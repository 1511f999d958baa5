"""`exegete status` from another process: what a run that goes on is doing, and what one that ended needs."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from exegete.agent.events import EVENTS, EventLog, read_events
from exegete.agent.final_report import stage_seconds
from exegete.agent.inspection import status_json, status_lines, store_status
from exegete.agent.models import Halted
from exegete.agent.needs import Need, need_of
from exegete.agent.progress import Lines
from exegete.agent.watching import Watch, watched
from exegete.tools.errors import UserError
from exegete.tools.llm import Budget, BudgetUsedUp, Reply
from exegete.tools.store import Store

StoreMaker = Callable[..., str]


def work(folder: Path, during: Callable[[Watch], None]) -> None:
    """A run in small, watched as a real one."""
    with watched(folder, Lines(io.StringIO()), every_s=3_600) as watch:
        during(watch)


def need(folder: Path) -> Need:
    return store_status(folder).need


def test_vital_signs_of_a_run_that_goes_on_are_those_of_now(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store(finish=False)
    store = tmp_path / "store"

    def during(watch: Watch) -> None:
        watch.vitals.pays_from(Budget(5.0, spent_usd=1.25))
        with watch.stage("labeling", 400, "latents") as advance:
            watch.vitals.call_out("openai:m")
            watch.vitals.call_out("openai:m")
            watch.vitals.call_in("openai:m", Reply("error"))
            advance(100)
            watch.beat()
            lines = status_lines(store)
            assert f"process {os.getpid()} is writing" in lines[0]
            told = next(line for line in lines if "labeling: 100 of 400 latents" in line)
            assert told.startswith(("0 seconds ago", "1 seconds ago", "2 seconds ago"))
            assert "  calls: 0 answered, 1 in flight, failed: 1 error" in lines
            assert "  spent: 1.25 of 5.00 USD" in lines
            assert need(store).state == "running"
            found = json.loads(status_json(store))
            assert found["vitals"]["stage"]["done"] == 100 and found["vitals_age_s"] < 60
            assert found["pid"] == os.getpid() and found["runs"][0]["outcomes"]["labeled"] == 9

    with Store.open(store).writer():
        work(store, during)
    assert store_status(store).vitals is None  # Nobody is writing: they are of the past.


def test_vital_signs_tell_their_age(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store(finish=False)
    store = tmp_path / "store"
    with Store.open(store).writer():
        work(store, lambda watch: None)
        lines = (store / EVENTS).read_text().splitlines()
        begun, beat = (json.loads(line) for line in lines[:2])
        beat["time"] = (datetime.now(UTC) - timedelta(minutes=7)).isoformat()
        (store / EVENTS).write_text(json.dumps(begun) + "\n" + json.dumps(beat) + "\n")
        assert any(line.startswith("7 minutes ago: between two stages") for line in status_lines(store))
        begun["pid"] += 1  # Of a process before this one.
        (store / EVENTS).write_text(json.dumps(begun) + "\n" + json.dumps(beat) + "\n")
        assert not any("ago:" in line for line in status_lines(store))


def test_a_status_before_anything_was_published_tells_what_goes_on(tmp_path: Path) -> None:
    store = Store.create_or_open(tmp_path / "store")

    def during(watch: Watch) -> None:
        with watch.stage("activations", 10, "micro-batches") as advance:
            advance(4)
            watch.beat()
            lines = status_lines(store.folder)
            assert lines[1] == "nothing was published yet" and "activations: 4 of 10 micro-batches" in lines[2]

    with store.writer():
        work(store.folder, during)


def end_with(error: BaseException, spent: Budget | None = None) -> Callable[[Watch], None]:
    def during(watch: Watch) -> None:
        watch.vitals.pays_from(spent)
        raise error

    return during


def halted(cause: UserError) -> Halted:
    error = Halted(str(cause))
    error.__cause__ = cause
    return error


USD = BudgetUsedUp("budget of 5 USD: 4.9 USD are spent; resume with a larger --budget")
TOKENS = BudgetUsedUp("budget of 900 tokens: 899 are spent; resume with a larger --budget-tokens")
KEY = UserError("openai:m: the server does not take the key in K: You said <prompt>")


@pytest.mark.parametrize(
    ("error", "budget", "state", "told", "options"),
    [
        (halted(USD), Budget(5.0, 4.9), "budget", "stopped at its budget of 5.00 USD, of which 4.90 USD are spent", " --budget 10"),
        (halted(TOKENS), Budget(None, max_tokens=900), "budget", "its budget of 900 tokens", " --budget-tokens 1800"),
        (halted(KEY), None, "halted", "set the right one", ""),
        (UserError("x: no such model or address: y"), None, "halted", "does not know the model", ""),
        (UserError("something else"), None, "halted", "what it printed last says", ""),
        (OSError(28, "No space left on device"), None, "halted", "free some space", ""),
        (RuntimeError("<prompt>"), None, "failed", "failed with RuntimeError", ""),
        (KeyboardInterrupt(), None, "stopped", "stopped on request", ""),
    ],
)  # fmt: skip
def test_a_run_that_broke_off_says_what_it_needs(
    make_store: StoreMaker, tmp_path: Path, error: BaseException, budget: Budget, state: str, told: str, options: str
) -> None:
    make_store(finish=False)
    store = tmp_path / "store"
    with pytest.raises(type(error)):
        work(store, end_with(error, budget))
    found = need(store)
    assert found.state == state and told in found.told
    assert found.command == f"exegete resume --store {store}{options}"
    assert f"state: {found.told}; go on: {found.command}" in status_lines(store)
    assert "<prompt>" not in (store / EVENTS).read_text()


def test_a_run_that_was_killed_says_so(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store(finish=False)
    store = tmp_path / "store"
    assert need(store) == Need("interrupted", "interrupted", f"exegete resume --store {store}")  # No log: it is older.
    log = EventLog(store)
    log.write("begun", pid=999_999_999, version="0")
    log.write("stage_begun", stage="labeling", done=0, total=3, unit="latents")
    assert need(store).state == "killed" and need(store).command == f"exegete resume --store {store}"


WRITING = """
import io, sys, time
from pathlib import Path
from exegete.agent.progress import Lines
from exegete.agent.watching import watched
from exegete.tools.llm import Reply
from exegete.tools.store import Store
store = Store.open(Path(sys.argv[1]))
with store.writer(), watched(store.folder, Lines(io.StringIO()), every_s=0.05) as watch:
    with watch.stage("labeling", 400, "latents") as advance:
        watch.vitals.call_out("openai:m")
        advance(100)
        time.sleep(600)
"""


def test_another_process_is_seen_at_work_and_killed(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store(finish=False)
    store = tmp_path / "store"
    writing = subprocess.Popen([sys.executable, "-c", WRITING, str(store)])
    try:
        while not ((status := store_status(store)).vitals and status.vitals.stage):
            assert writing.poll() is None
        assert status.pid == writing.pid and status.need == Need("running", f"process {writing.pid} is at work")
        found = json.loads(status_json(store))["vitals"]
        assert found["calls"]["in_flight"] == 1 and found["stage"]["total"] == 400
    finally:
        writing.kill()
        writing.wait()
    assert need(store).state == "killed" and store_status(store).vitals is None
    assert stage_seconds(list(read_events(store)))["labeling"] >= 0.0


def test_a_finished_run_needs_nothing(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store()
    work(tmp_path / "store", lambda watch: watch.finished({}))
    assert need(tmp_path / "store") == Need("finished", "finished")
    assert "state: finished" in status_lines(tmp_path / "store")


def test_missing_calls_are_named(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store()
    store = tmp_path / "my store"
    shutil.move(tmp_path / "store", store)
    [run] = store_status(store).runs
    found = need_of(store, None, replace(run, missing=37), None)
    told = "finished, but 37 latents miss calls that failed"
    assert found == Need("calls_missing", told, f"exegete resume --store '{store}'")


def test_a_run_that_drained_says_by_what_it_was_stopped(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store(finish=False)
    for reason, told in (("signal", "stopped on request"), ("deadline", "stopped at its limit in time")):
        with watched(tmp_path / "store", Lines(io.StringIO()), every_s=3_600) as watch:
            watch.interrupted(reason)
        assert need(tmp_path / "store").told == told


def test_the_writers_files_stay_closed(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store()
    before = status_lines(tmp_path / "store")[2:]
    for name in ("run.duckdb", "run.duckdb.wal", "journal.sqlite", "journal.sqlite-wal"):
        (tmp_path / "store" / name).unlink(missing_ok=True)
    assert status_lines(tmp_path / "store")[2:] == before and not (tmp_path / "store" / "run.duckdb").exists()


@pytest.mark.parametrize(
    "vitals",
    [None, 7, {}, {"stage": "x"}, {"run": None, "elapsed_s": "long"}, {"scores": {"a": []}}],
)
def test_vital_signs_that_are_none_are_taken_as_not_there(make_store: StoreMaker, tmp_path: Path, vitals: Any) -> None:
    make_store(finish=False)
    store = tmp_path / "store"
    with Store.open(store).writer():
        log = EventLog(store)
        log.write("begun", pid=os.getpid(), version="0")
        log.write("progress", vitals=vitals)
        assert store_status(store).vitals is None and status_lines(store)


def test_a_hostile_log_cannot_harm_a_terminal(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store(finish=False)
    store = tmp_path / "store"

    def during(watch: Watch) -> None:
        with watch.stage("\x1b[2J\u202e", 3, "latents"):
            watch.beat()
            text = "\n".join(status_lines(store))
            assert "\\x1b[2J\\u202e: 0 of 3" in text and "\x1b" not in text and "\x1b" not in status_json(store)

    with Store.open(store).writer():
        work(store, during)
