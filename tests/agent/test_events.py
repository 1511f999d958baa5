"""The event log: its lines, its bounds, a kill, a full disk, and whoever reads it meanwhile."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from exegete.agent import events
from exegete.agent.config import load_config
from exegete.agent.events import EVENTS, FIELDS, FORMER, EventLog, follow, line_of, parsed, read_events
from exegete.agent.models import Halted
from exegete.agent.progress import Lines
from exegete.agent.watching import how_it_ended, watched
from exegete.evaluators.contract import Score
from exegete.tools.errors import UserError
from exegete.tools.llm import BudgetUsedUp, Reply
from exegete.tools.store import LatentRecord


class Now:
    """A clock on the wall that goes on by a second at each look."""

    def __init__(self) -> None:
        self.at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.at += timedelta(seconds=1)
        return self.at


def names(folder: Path) -> list[str]:
    return [event.event for event in read_events(folder)]


def test_a_line_is_an_event_with_its_time_and_fields(tmp_path: Path) -> None:
    log = EventLog(tmp_path, now=Now())
    log.write("published", "sha256:r", seconds=1.25)
    log.close()
    text = (tmp_path / EVENTS).read_text()
    assert json.loads(text) == {
        "time": "2026-01-02T03:04:06.000+00:00",
        "run": "sha256:r",
        "event": "published",
        "seconds": 1.25,
    }
    [event] = read_events(tmp_path)
    assert (event.run, event.event, event.fields) == ("sha256:r", "published", {"seconds": 1.25})
    assert line_of(event) == "2026-01-02 03:04:06 published seconds 1.25"


def test_what_the_schema_does_not_know_is_not_written(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    with pytest.raises(ValueError, match="'prompt'"):
        log.write("published", prompt="What does it fire on?")
    with pytest.raises(ValueError, match="'asked'"):
        log.write("asked")
    assert not (tmp_path / EVENTS).exists()


def test_the_schema_is_that_of_the_docstring() -> None:
    told = {}
    for line in (events.__doc__ or "").splitlines():
        if line.startswith("       ") and line.split()[0] in FIELDS:
            told[line.split()[0]] = line
    assert told.keys() == FIELDS.keys()
    for event, fields in FIELDS.items():
        assert all(field in told[event] for field in fields)


def test_the_log_is_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    log = EventLog(tmp_path, now=Now(), max_bytes=2_000)
    for number in range(200):
        log.write("published", seconds=number)
    log.close()
    sizes = [(tmp_path / name).stat().st_size for name in (EVENTS, FORMER)]
    assert all(0 < size <= 2_000 for size in sizes)
    found = [event.fields["seconds"] for event in read_events(tmp_path)]
    assert found == list(range(200 - len(found), 200)) and len(found) > 20


def test_a_long_text_is_cut_and_shown_without_what_is_unseen(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write("halted", reason="budget", told="\x1b[2J" + "x" * 10_000)
    [event] = read_events(tmp_path)
    assert event.fields["told"].startswith("\\x1b[2Jxxx") and len(event.fields["told"]) < 320


KILLED = """
import os, signal, sys
from pathlib import Path
from exegete.agent.events import EVENTS, EventLog
log = EventLog(Path(sys.argv[1]))
log.write("begun", pid=os.getpid(), version="0")
log.write("published", seconds=1.0)
with (Path(sys.argv[1]) / EVENTS).open("a") as file:
    file.write('{"time": "2026-01-02T03:04:06+00:00", "event": "publi')
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_line_that_a_kill_tore_is_left_out_and_ended_by_the_next(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert names(tmp_path) == ["begun", "published"]
    log = EventLog(tmp_path)
    log.write("begun", pid=1, version="0")
    log.write("published", seconds=2.0)
    log.close()
    assert names(tmp_path) == ["begun", "published", "begun", "published"]
    lines = (tmp_path / EVENTS).read_text().splitlines()
    assert len(lines) == 5 and parsed(lines[2]) is None


class FullDisk:
    """Writes until there is no room, then half a line, then nothing, until there is room again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        self.half = False
        self._write = os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, file: int, line: bytes) -> int:
        if self.full and self.half:
            self.half = False
            return self._write(file, line[: len(line) // 2])
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._write(file, line)


def test_a_full_disk_costs_events_and_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, said = FullDisk(monkeypatch), list[str]()
    log = EventLog(tmp_path, said.append)
    log.write("published", seconds=0)
    disk.full = disk.half = True
    for number in range(1, 6):
        log.write("published", seconds=number)
    assert len(said) == 1 and EVENTS in said[0] and "the run goes on" in said[0]
    assert names(tmp_path) == ["published"]
    disk.full = False
    log.write("published", seconds=6)
    found = list(read_events(tmp_path))
    assert [event.event for event in found] == ["published", "dropped", "published"]
    assert found[1].fields == {"count": 5} and found[2].fields == {"seconds": 6}
    disk.full = True
    log.write("published", seconds=7)
    assert len(said) == 2


def test_a_link_in_a_store_is_not_followed(tmp_path: Path) -> None:
    other, said = tmp_path / "other", list[str]()
    other.write_text("mine\n")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / EVENTS).symlink_to(other)
    EventLog(tmp_path / "store", said.append).write("published", seconds=0)
    assert other.read_text() == "mine\n" and len(said) == 1


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "1", '"x"', "{}", '{"time": 1, "event": "x"}', '{"time": "now", "event": "x"}']
    + ['{"time": "2026-01-02T03:04:06+00:00", "event": 1}', '{"time": "2026-01-02T03:04:06", "event": "begun"}']
    + ['{"time": "2026-01-02T03:04:06+00:00", "event": "begun", "run": 7}', "[" * 100_000],
)
def test_what_is_no_event_is_left_out(line: str) -> None:
    assert parsed(line) is None


def test_a_follower_sees_what_is_appended_over_a_change_of_files(tmp_path: Path) -> None:
    log = EventLog(tmp_path, max_bytes=400)
    steps = iter(range(50))
    log.write("published", seconds=-1)

    class Enough(Exception):
        pass

    def wait() -> None:
        number = next(steps, None)
        if number is None:
            raise Enough
        log.write("published", seconds=number)

    found: list[Any] = []
    with pytest.raises(Enough):
        for event in follow(tmp_path, wait):
            found.append(event.fields["seconds"])
    assert found == list(range(-1, 50))
    assert (tmp_path / FORMER).exists()


def test_a_follower_waits_for_the_rest_of_a_line(tmp_path: Path) -> None:
    line = '{"time": "2026-01-02T03:04:06+00:00", "event": "published", "seconds": 8}\n'
    parts = iter([line[:20], line[20:50], line[50:]])

    def wait() -> None:
        with (tmp_path / EVENTS).open("a") as file:
            file.write(next(parts))

    assert next(follow(tmp_path, wait)).fields == {"seconds": 8} and next(parts, None) is None


def test_a_follower_waits_for_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
    waited = 0

    def wait() -> None:
        nonlocal waited
        waited += 1
        if waited == 3:
            EventLog(tmp_path).write("published", seconds=1)

    assert next(follow(tmp_path, wait)).event == "published" and waited == 3


def work(folder: Path, error: BaseException | None = None) -> None:
    """A run in small: two stages, calls, a snapshot, and an end."""
    config = load_config(None, ["models.explainer=openai:m@http://localhost:1/v1", "models.budget_usd=5.0"])
    with watched(folder, Lines(io.StringIO()), every_s=3_600) as watch:
        watch.run_begun("sha256:r", "sha256:d", 3, config, {"detection": "balanced_accuracy"})
        with watch.stage("labeling", 3, "latents") as advance:
            for _ in range(3):
                watch.vitals.call_out("openai:m")
                watch.vitals.call_in("openai:m", Reply("refused"))
                advance(1)
        watch.published(0.5)
        with watch.stage("floors", 2, "latents") as advance:
            advance(1)
            if error is not None:
                raise error
            advance(1)
        watch.finished({"sha256:d": 2, "sha256:e": 0})


def test_a_run_leaves_its_story(tmp_path: Path) -> None:
    work(tmp_path)
    found = list(read_events(tmp_path))
    assert [event.event for event in found] == [
        *("begun", "run_begun", "stage_begun", "stage_ended", "published", "stage_begun", "stage_ended"),
        *("calls_failed", "progress", "finished"),
    ]
    assert found[0].fields["pid"] == os.getpid() and found[0].run is None
    assert {event.run for event in found[1:]} == {"sha256:r"}
    assert found[1].fields == {
        **{"dictionary": "sha256:d", "latents": 3, "explainer": "one-shot", "judge": "predicate"},
        **{"models": ["openai:m@http://localhost:1/v1"], "budget_usd": 5.0},
    }
    assert found[3].fields.items() >= {"stage": "labeling", "done": 3, "total": 3, "complete": True}.items()
    assert found[7].fields == {"failed": {"refused": 3}}
    assert found[8].fields["vitals"]["calls"]["failed"] == {"refused": 3}
    assert line_of(found[8]).endswith("progress between two stages; calls: 0 answered, 0 in flight, failed: 3 refused")
    assert found[9].fields == {"missing": {"sha256:d": 2}}


def test_the_records_of_a_pilot_do_not_count_twice(tmp_path: Path) -> None:
    score = Score("detection", "balanced_accuracy", 0.5, None, None, n=20, failures=0)
    record = LatentRecord("sha256:d", 0, "labeled", scores=[("a", score)])
    with watched(tmp_path, Lines(io.StringIO()), every_s=3_600) as watch:
        watch.vitals.run_begun("sha256:r", {"detection": "balanced_accuracy"})
        counted = []
        for stage in ("pilot", "labeling", "floors", "control"):
            with watch.stage(stage, 1, "latents"):
                watch.recorded([record])
                scores = watch.vitals.snapshot().scores
                counted.append(scores["detection"].own.n if scores else 0)
    assert counted == [0, 1, 2, 2]


def test_a_run_that_breaks_off_says_why(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path, KeyboardInterrupt())
    found = list(read_events(tmp_path))
    assert found[-1].event == "interrupted" and found[-1].fields == {"reason": "signal"}
    [broken] = [event for event in found if event.event == "stage_ended" and event.fields["stage"] == "floors"]
    assert broken.fields["complete"] is False and broken.fields["done"] == 1


def halted(message: str, cause: type[UserError] = UserError) -> Halted:
    try:
        try:
            raise cause(message)
        except UserError as error:
            raise Halted(str(error)) from error
    except Halted as raised:
        return raised


BUDGET = "budget of 5 USD: 4.9990 USD are spent and the next call could exceed it; resume with a larger --budget"


@pytest.mark.parametrize(
    ("error", "event", "fields"),
    [
        (halted(BUDGET, BudgetUsedUp), "halted", {"reason": "budget", "told": BUDGET}),
        (halted("m: the server does not take the key in K: sk-1 and a prompt"), "halted", {"reason": "key", "told": ""}),
        (halted("m: no such model or address: prompt"), "halted", {"reason": "model", "told": ""}),
        (halted("m: the server rejects the request: prompt"), "halted", {"reason": "other", "told": ""}),
        (UserError("cannot write to the store 's' (x); free some space and resume"), "halted", {"reason": "disk", "told": ""}),
        (OSError(errno.ENOSPC, "full"), "failed", {"reason": "disk", "error": "OSError"}),
        (ValueError("a prompt"), "failed", {"reason": "error", "error": "ValueError"}),
    ],
)  # fmt: skip
def test_an_end_is_told_without_a_providers_words(error: BaseException, event: str, fields: dict[str, str]) -> None:
    assert how_it_ended(error) == (event, fields)


def test_the_run_beats_while_it_waits(tmp_path: Path) -> None:
    beaten = threading.Event()

    class Beaten(Lines):
        def beat(self) -> None:
            beaten.set()
            raise OSError("the terminal is gone")

    with watched(tmp_path, Beaten(io.StringIO()), every_s=0.01):
        assert beaten.wait(30)
        beaten.clear()
        assert beaten.wait(30)  # What cannot be shown is still written down, again and again.
    assert names(tmp_path).count("progress") >= 2 and names(tmp_path)[-1] == "finished"
    assert not [thread for thread in threading.enumerate() if thread.name == "exegete-watch"]
