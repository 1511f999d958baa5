from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from exegete.agent.progress import Bars, Display, Lines, Notebook, Progress, Quiet, default_progress
from exegete.agent.vitals import Vitals
from exegete.evaluators.contract import Score
from exegete.tools.llm import Reply
from exegete.tools.store import LatentRecord

HOSTILE = "\x1b[2J[bold]evil[/]\u202e\nnext"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def asked(clock: Clock) -> Vitals:
    """Return vital signs with one answered call, one that failed and one in flight."""
    vitals = Vitals(clock)
    for _ in range(3):
        vitals.call_out("openai:m")
    vitals.call_in("openai:m", Reply("ok", usd=0.5))
    vitals.call_in("openai:m", Reply("error"))
    return vitals


FACTS = "calls: 1 answered, 1 in flight, failed: 1 error; spent: 0.50 USD since this start, without a limit"


def test_lines_come_at_most_every_ten_seconds() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = Lines(stream, clock=clock)
    with lines.stage("labeling", 100, "latents", done=20) as advance:
        for _ in range(40):
            clock.now += 0.5
            advance(1)
    assert stream.getvalue().splitlines() == [
        "labeling: 40 of 100 latents, 2.0 a second, 30 seconds to go",
        "labeling: 60 of 100 latents, 2.0 a second, 20 seconds to go",
        "labeling: 60 of 100 latents, 20.0 s",
    ]


def test_lines_tell_the_vital_signs() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = Lines(stream, every_s=10, clock=clock)
    lines.watch(asked(clock))
    with lines.stage("labeling", 100, "latents") as advance:
        clock.now += 10
        advance(20)
    assert stream.getvalue().splitlines()[0] == f"labeling: 20 of 100 latents, 2.0 a second, 40 seconds to go; {FACTS}"


def test_the_scores_so_far_have_lines_of_their_own_once_a_minute() -> None:
    clock, stream = Clock(), io.StringIO()
    lines, vitals = Lines(stream, every_s=10, clock=clock), Vitals(clock)
    lines.watch(vitals)
    vitals.run_begun("run", {"detection": "balanced_accuracy"})
    score = Score("detection", "balanced_accuracy", 0.75, None, None, n=20, failures=0)
    vitals.records([LatentRecord("sha256:d", 1, "labeled", scores=[("a", score)])])
    with lines.stage("labeling", 100, "latents") as advance:
        for _ in range(7):
            clock.now += 10
            advance(10)
    scores = "  detection: mean balanced accuracy 0.750 (n = 1); floors come after labeling"
    told = stream.getvalue().splitlines()
    assert told[:3] == [
        "labeling: 10 of 100 latents, 1.0 a second, 90 seconds to go",
        scores,
        "labeling: 20 of 100 latents, 1.0 a second, 80 seconds to go",
    ]
    assert told[7:9] == ["labeling: 70 of 100 latents, 1.0 a second, 30 seconds to go", scores]
    assert told.count(scores) == 2


def test_a_beat_shows_that_a_run_which_waits_still_lives() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = Lines(stream, every_s=10, clock=clock)
    lines.watch(asked(clock))
    clock.now += 1_000
    lines.beat()
    assert stream.getvalue() == ""  # No stage is open.
    with lines.stage("labeling", 100, "latents"):
        clock.now += 59
        lines.beat()
        assert stream.getvalue() == ""
        clock.now += 1
        lines.beat()
        assert stream.getvalue() == f"labeling: 0 of 100 latents; {FACTS}\n"
        lines.beat()
        assert stream.getvalue().count("\n") == 1


def test_a_stage_that_breaks_off_leaves_no_line_as_if_it_had_ended() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = Lines(stream, clock=clock)
    with pytest.raises(RuntimeError), lines.stage("labeling", 100, "latents"):
        raise RuntimeError
    assert stream.getvalue() == ""
    clock.now += 1_000
    lines.beat()
    assert stream.getvalue() == ""


def test_quiet_says_only_what_is_worth_keeping(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = default_progress(quiet=True)
    quiet.say("pilot: 4 latents")
    with quiet.stage("labeling", 1, "latents") as advance:
        advance(1)
    quiet.beat()
    assert capsys.readouterr().err == "pilot: 4 latents\n" and isinstance(quiet, Quiet)


def test_a_terminal_shows_a_bar_and_the_vital_signs_and_keeps_a_line() -> None:
    clock, stream = Clock(), io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    bars = Bars(console, clock)
    bars.watch(asked(clock))
    with bars.stage("labeling", 100, "latents") as advance:
        clock.now += 10
        advance(25)
        shown = io.StringIO()
        Console(file=shown, width=120, color_system=None).print(bars.drawing())
    bar, calls, spent = shown.getvalue().splitlines()
    assert bar.startswith("labeling ━━━━━━━") and bar.endswith("25 of 100 latents, 2.5 a second, 30 seconds to go")
    assert f"{calls.strip()}; {spent.strip()}" == FACTS
    assert "labeling: 25 of 100 latents, 10.0 s\n" in stream.getvalue().replace("\r", "")


def test_a_stage_within_a_stage_takes_its_place_on_the_terminal() -> None:
    stream = io.StringIO()
    bars = Bars(Console(file=stream, force_terminal=True, width=100, color_system=None), Clock())
    with bars.stage("outer", 2, "parts") as advance:
        with bars.stage("inner", 1, "pieces"):
            assert "inner" in _text(bars)
        assert "outer" in _text(bars)
        advance(1)
        assert "1 of 2 parts" in _text(bars)
    assert _text(bars).strip() == ""


def _text(bars: Bars) -> str:
    shown = io.StringIO()
    Console(file=shown, width=100, color_system=None).print(bars.drawing())
    return shown.getvalue()


def test_a_notebook_has_one_output_that_changes() -> None:
    clock = Clock()
    outputs: list[str] = []

    class Handle:
        def update(self, told: dict[str, str], raw: bool) -> None:
            assert raw
            outputs.append(told["text/plain"])

    def display(told: dict[str, str], raw: bool, display_id: bool) -> Handle:
        assert raw and display_id and not outputs
        outputs.append(told["text/plain"])
        return Handle()

    notebook = Notebook(display, clock)
    notebook.watch(asked(clock))
    notebook.say("loading subject")
    with notebook.stage("labeling", 1_000, "latents") as advance:
        for _ in range(500):
            clock.now += 0.01
            advance(1)
        assert 4 <= len(outputs) <= 6  # Five seconds, not five hundred steps.
        notebook.beat()
        told = outputs[-1].splitlines()
        assert told[:2] == ["loading subject", "labeling: 500 of 1,000 latents, 100.0 a second, 5 seconds to go"]
        assert "; ".join(told[2:]) == FACTS
    assert outputs[-1].splitlines() == ["loading subject", "labeling: 500 of 1,000 latents, 5.0 s"]


def test_what_is_shown_cannot_harm_a_terminal() -> None:
    clock, stream = Clock(), io.StringIO()
    terminal = io.StringIO()
    bars = Bars(Console(file=terminal, force_terminal=True, width=200, color_system=None), clock)
    shown: list[str] = []

    def show(told: dict[str, str], **_: object) -> None:
        shown.append(told["text/plain"])

    notebook = Notebook(show, clock)
    displays: list[Progress] = [Lines(stream, clock=clock), bars]
    for display in displays:
        display.say(HOSTILE)
        with display.stage(HOSTILE, 3, HOSTILE) as advance:
            clock.now += 11
            advance(1)
            assert "\x1b[2J" not in _text(bars) and "\u202e" not in _text(bars)
    notebook.say(HOSTILE)
    for told in (stream.getvalue(), terminal.getvalue(), *shown):
        assert "\x1b[2J" not in told and "\u202e" not in told and "\nnext" not in told
        assert "\\x1b[2J[bold]evil[/]\\u202e⏎next" in told


def test_where_there_is_no_terminal_there_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(default_progress(), Lines)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_bars_unless_it_cannot_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(default_progress(), Bars)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(default_progress(), Lines)


def test_a_notebooks_kernel_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    shell: Any = SimpleNamespace(kernel=object())
    display: Any = SimpleNamespace(display=lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    assert isinstance(default_progress(), Notebook)
    del shell.kernel  # IPython at a terminal.
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(default_progress(), Lines)


def test_every_display_can_be_given_vital_signs() -> None:
    assert all(isinstance(display, Display) for display in (Lines(), Bars(), Quiet(), Notebook(print)))
