"""Until when a run goes on."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from planted_store import planted_file, planted_store

from exegete.agent.config import LabelConfig, load_config
from exegete.agent.limits import deadline_of, seconds_until, stops
from exegete.agent.progress import Lines
from exegete.agent.run import run
from exegete.tools.errors import UserError


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_hours_pass_by_the_given_clock_alone() -> None:
    now = [100.0]
    wall = [datetime(2026, 3, 1, 18, 0)]
    deadline = deadline_of(LabelConfig(hours=2.5), lambda: now[0], lambda: wall[0])
    assert deadline is not None and not deadline.reached() and deadline.left_s() == 9_000
    # A wall clock that is set, in either direction, says nothing.
    for wall[0] in (datetime(2030, 1, 1), datetime(1999, 1, 1)):
        now[0] += 4_000
        assert not deadline.reached()
    now[0] = 9_099.9
    assert not deadline.reached() and deadline.left_s() == pytest.approx(0.1)
    now[0] = 9_100.0
    assert deadline.reached() and deadline.left_s() == 0
    assert "label.hours = 2.5" in deadline.message()


def test_a_time_of_day_is_the_next_one() -> None:
    evening = datetime(2026, 11, 21, 18, 0)
    assert seconds_until("08:00", evening) == 14 * 3600
    assert seconds_until("18:30", evening) == 30 * 60
    # The very moment is over.
    assert seconds_until("18:00", evening) == 24 * 3600
    assert seconds_until("8:05", evening.replace(hour=8, minute=4, second=30)) == 30


@pytest.mark.parametrize(("day", "hours"), [(28, 13), (29, 14)])
def test_a_night_in_which_the_clocks_change_has_its_own_length(day: int, hours: int, berlin: None) -> None:
    # Summer time began in the night to 29 March 2026: it was an hour shorter.
    assert seconds_until("08:00", datetime(2026, 3, day, 18, 0)) == hours * 3600


def test_the_earlier_of_both_holds() -> None:
    def limit(hours: float | None, until: str | None) -> tuple[float, str] | None:
        found = deadline_of(LabelConfig(hours=hours, until=until), lambda: 0.0, lambda: datetime(2026, 1, 1, 6, 0))
        return None if found is None else (found.at_s, found.limit)

    assert limit(None, None) is None
    assert limit(3, "08:00") == (7_200, "label.until = 08:00")
    assert limit(1, "08:00") == (3_600, "label.hours = 1")


def test_it_stops_what_asks() -> None:
    now = [0.0]
    asked = [False]
    deadline = deadline_of(LabelConfig(hours=1), lambda: now[0])
    stop = stops(lambda: asked[0], deadline)
    assert not stop()
    now[0] = 3_600
    assert stop()
    now[0], asked[0] = 0.0, True
    assert stop() and stops(lambda: True, None)() and not stops(lambda: False, None)()


def test_what_stops_before_there_is_a_run_is_not_told_to_resume_one(tmp_path: Path) -> None:
    inputs = {"subject.name": "bundled", "dictionary.path": "bundled:tests", "corpus.source": "bundled"}
    for name, given, way in (
        ("pass", inputs, "; go on from there: the same command again"),
        ("run", {}, f"; go on from there: exegete resume --store {tmp_path / 'run'}"),
    ):
        if not given:
            planted_store(planted_file(tmp_path, 2), tmp_path / name)
        said = io.StringIO()
        limits = ["label.hours=1e-9", *(["corpus.documents=200"] if given else [])]
        outcome = run(load_config(None, limits, {**given, "store": str(tmp_path / name)}), Lines(said))
        assert not outcome.finished and bool(outcome.runs) == (name == "run")
        assert f"stopped by label.hours = 1e-09: what was in flight is finished and written{way}\n" in said.getvalue()


@pytest.mark.parametrize("assignment", ["label.until=25:00", "label.until=noon", "label.hours=0", "label.hours=inf"])
def test_limits_that_are_none(assignment: str) -> None:
    with pytest.raises(UserError, match=assignment.partition("=")[0]):
        load_config(None, [assignment])
