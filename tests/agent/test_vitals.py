from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from exegete.agent.vital_lines import duration, facts, stage_text
from exegete.agent.vitals import Rate, RunningMean, Vitals
from exegete.evaluators.contract import Score
from exegete.tools.llm import Reply, Usage
from exegete.tools.store import LatentRecord


@dataclass
class Clock:
    """A clock that stands until it is moved."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Purse:
    """What is read of a budget."""

    max_usd: float = 5.0
    spent_usd: float = 0.25
    reserved_usd: float = 0.03
    max_tokens: float = math.inf
    spent_tokens: int = 900
    reserved_tokens: int = 40
    others: list[Any] = field(default_factory=list)


def scored(latent: int, value: float | None, baseline: str | None = None, chosen: str | None = None) -> LatentRecord:
    scores = [
        ("a", Score("detection", "balanced_accuracy", value, None, None, n=20, failures=0, baseline=baseline)),
        ("a", Score("detection", "f1", 0.1, None, None, n=20, failures=0, baseline=baseline)),
        ("b", Score("detection", "balanced_accuracy", 0.0, None, None, n=20, failures=0, baseline=baseline)),
    ]
    return LatentRecord("sha256:d", latent, "labeled", scores=scores[: 2 if chosen is None else 3], chosen=chosen)


def test_running_means_are_those_of_a_hand_worked_example() -> None:
    mean = RunningMean()
    for value in (0.5, 0.7, 0.9):
        mean.add(value)
    found = mean.figure()
    half = 1.959964 * 0.2 / math.sqrt(3)  # Their standard deviation is 0.2.
    assert found.mean == pytest.approx(0.7) and found.n == 3
    assert found.low == pytest.approx(0.7 - half) and found.high == pytest.approx(0.7 + half)


def test_one_number_has_no_interval() -> None:
    mean = RunningMean()
    mean.add(0.5)
    assert (mean.figure().mean, mean.figure().low, mean.figure().n) == (0.5, None, 1)


def test_a_rate_is_that_of_the_last_minute() -> None:
    rate = Rate(began=100.0)
    rate.add(10, 100.5)
    assert rate.per_s(105.0) == pytest.approx(2.0)  # 10 in the 5 seconds that there have been.
    rate.add(120, 159.0)
    assert rate.per_s(159.5) == pytest.approx(130 / 59.5)
    assert rate.per_s(161.5) == pytest.approx(120 / 59.5)  # The first ten are older than a minute.
    rate.add(1, 100.5 + 600)
    assert rate.per_s(701.0) == pytest.approx(1 / 59)
    assert rate.per_s(1_000.0) == 0.0


def test_a_stage_tells_pace_and_time_to_go() -> None:
    clock = Clock()
    vitals = Vitals(clock)
    assert vitals.snapshot().stage is None
    vitals.stage_begun("labeling", 1_000, "latents", done=400)
    assert stage_text(_stage(vitals)) == "labeling: 400 of 1,000 latents"
    clock.now += 10
    vitals.advanced(100)
    found = _stage(vitals)
    assert (found.done, found.rate, found.minute_rate, found.left_s) == (500, 10.0, 10.0, 50.0)
    assert stage_text(found) == "labeling: 500 of 1,000 latents, 10.0 a second, 50 seconds to go"
    clock.now += 190
    vitals.advanced(59)
    found = _stage(vitals)
    assert (found.minute_rate, found.left_s) == (1.0, 441.0) and found.rate == pytest.approx(159 / 200)
    clock.now += 1_000  # A minute that saw nothing: the whole must do.
    found = _stage(vitals)
    assert "559 of 1,000 latents, 0.1 a second" in stage_text(found)
    assert "559 of 1,000 latents, 3.0 a minute" in stage_text(replace(found, rate=0.05))
    assert found.minute_rate == 0.0 and found.left_s == pytest.approx(441 * 1_200 / 159)
    ended = vitals.stage_ended()
    assert ended is not None and ended.done == 559 and vitals.snapshot().stage is None
    assert vitals.stage_ended() is None


def _stage(vitals: Vitals) -> Any:
    stage = vitals.snapshot().stage
    assert stage is not None
    return stage


@pytest.mark.parametrize(("total", "enough"), [(300, 8), (12, 3), (1, 1)])
def test_what_is_left_is_told_once_a_few_units_are_done(total: int, enough: int) -> None:
    clock = Clock()
    vitals = Vitals(clock)
    vitals.stage_begun("labeling", 2 * total, "latents", done=total)
    for done in range(enough):
        assert _stage(vitals).left_s is None
        clock.now += 2
        vitals.advanced(1)
        assert stage_text(_stage(vitals)).startswith(
            f"labeling: {total + done + 1:,} of {2 * total:,} latents, 0.5 a second"
        )
    assert _stage(vitals).left_s == 2 * (total - enough)


def test_calls_are_counted_in_exactly_one_place() -> None:
    vitals = Vitals(Clock())
    for _ in range(7):
        vitals.call_out("openai:m")
    vitals.call_in("openai:m", Reply("ok", usage=Usage(100, output_tokens=7), usd=0.02))
    vitals.call_in("openai:m", Reply("unparsed", usage=Usage(50, output_tokens=3), usd=0.01))
    vitals.call_in("openai:m", Reply("error"))
    vitals.call_in("openai:m", Reply("ok", usage=Usage(999, output_tokens=9), usd=9.0, cached=True))
    vitals.call_in("openai:m", None)
    vitals.call_out("openai:other")
    vitals.call_in("openai:other", Reply("ok", usage=Usage(1, output_tokens=1), usd=0.5))
    found = vitals.snapshot()
    own = found.models["openai:m"]
    assert (own.ok, own.cached, own.in_flight) == (1, 1, 2)
    assert own.failed == {"error": 1, "stopped": 1, "unparsed": 1}
    assert own.ok + own.cached + own.in_flight + sum(own.failed.values()) == 7
    assert (own.input_tokens, own.output_tokens, own.usd) == (150, 10, 0.03)
    assert (found.calls.ok, found.calls.input_tokens) == (2, 151) and found.calls.usd == pytest.approx(0.53)
    assert facts(found) == [
        "calls: 2 answered, 1 from the journal, 2 in flight, failed: 1 error, 1 stopped, 1 unparsed, 151 tokens in and 11 out",
        "spent: 0.53 USD since this start, without a limit",
    ]


def test_spending_stands_beside_the_budget() -> None:
    vitals = Vitals(Clock())
    purse = Purse()
    vitals.pays_from(purse)
    assert facts(vitals.snapshot()) == ["spent: 0.25 of 5.00 USD (and at most 0.03 in flight)"]
    purse.spent_usd = purse.reserved_usd = 0.0
    assert facts(vitals.snapshot()) == []  # Nothing was asked yet, or what was asked is free.
    purse.spent_usd, purse.reserved_usd, purse.max_tokens = 4.5, 0.0, 1_000
    told = "spent: 4.50 of 5.00 USD; 900 of 1,000 tokens (and at most 40 in flight)"
    assert facts(vitals.snapshot()) == [told]
    vitals.pays_from(Purse(max_usd=math.inf))
    found = vitals.snapshot().budget
    assert found is not None and (found.max_usd, found.max_tokens) == (None, None)
    assert facts(vitals.snapshot()) == []


def test_running_scores_stand_beside_their_floors() -> None:
    vitals = Vitals(Clock())
    vitals.records([scored(0, 0.9)])
    assert vitals.snapshot().scores == {}  # Which metric is the headline has not been said.
    vitals.run_begun("run-1", {"detection": "balanced_accuracy", "fuzzing": "balanced_accuracy"})
    vitals.records([scored(0, 0.6), scored(1, None), scored(2, 0.8, chosen="a"), scored(3, math.nan)])
    assert facts(vitals.snapshot()) == [
        "detection: mean balanced accuracy 0.700 [0.504, 0.896] (n = 2); floors come after labeling"
    ]
    vitals.records([scored(0, 0.5, "shuffled"), scored(1, 0.55, "constant"), scored(2, 0.6, "shuffled")])
    found = vitals.snapshot()
    assert found.run == "run-1" and found.scores["detection"].own.n == 2
    floors = found.scores["detection"].floors
    assert floors["shuffled"].mean == pytest.approx(0.55) and floors["shuffled"].n == 2
    assert floors["constant"].n == 1 and floors["constant"].low is None
    vitals.run_begun("run-2", {"detection": "balanced_accuracy"})
    assert vitals.snapshot().scores == {}


def test_every_call_counts_however_many_threads_tell_of_it() -> None:
    vitals = Vitals()
    vitals.stage_begun("labeling", 4_000, "latents")

    def work() -> None:
        for _ in range(1_000):
            vitals.call_out("m")
            vitals.call_in("m", Reply("ok", usd=0.5))
            vitals.advanced(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = vitals.snapshot()
    assert (found.calls.ok, found.calls.in_flight, found.calls.usd) == (4_000, 0, 2_000.0)
    assert found.stage is not None and found.stage.done == 4_000


def test_whoever_draws_does_not_wait_for_whoever_counts() -> None:
    vitals = Vitals(Clock())
    vitals.stage_begun("labeling", 3, "latents")
    assert vitals.glance() == vitals.snapshot()
    seen: list[Any] = []
    with vitals._lock:  # As a handler of a signal finds it that came while its own thread was counting.
        vitals.advanced(1)
        assert _stage(vitals).done == 1
        drawing = threading.Thread(target=lambda: seen.append(vitals.glance()))
        drawing.start()
        drawing.join(30)
        assert seen[0].stage.done == 0
    assert vitals.glance() == vitals.snapshot()
    with vitals._lock:
        never_seen = Vitals(Clock())
        never_seen._lock = vitals._lock
        drawing = threading.Thread(target=lambda: seen.append(never_seen.glance()))
        drawing.start()
        drawing.join(30)
    assert seen[1].stage is None


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.4, "0 seconds"), (119, "119 seconds"), (120, "2 minutes"), (7_200, "2 hours"), (2e5, "2 days")],
)
def test_spans_of_time(seconds: float, told: str) -> None:
    assert duration(seconds) == told
