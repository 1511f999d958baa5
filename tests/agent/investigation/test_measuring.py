"""Metrics on the bundled subject: what is measured is what the model's logits are, and what a judge says."""

from __future__ import annotations

import asyncio
import math
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_clients import FakeClient

from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Case, Metric
from exegete.agent.investigation.measuring import Measurable
from exegete.tools.errors import UserError
from exegete.tools.interventions import ablate, clamp
from exegete.tools.judged_behaviours import judged, measured
from exegete.tools.live_model import Trial
from exegete.tools.llm import Reply

ODDS, PROBABILITY = Metric("log_odds"), Metric("log_probability")
JUDGED = Metric("judged", criterion="It sorts.", tokens=3, samples=2)


def measurable(bench: Bench, metric: Metric = ODDS, count: int = 4, **options: Any) -> Measurable:
    return Measurable(bench.live, metric, bench.cases[:count], seed=3, **options)


def logits(bench: Bench, text: str) -> np.ndarray:
    model = bench.live.model
    (found,) = model.run([Trial(model.tokens(text))], lambda reading: reading.logits.double().cpu().tolist())
    return np.array(found)


def test_the_three_kinds_of_number_are_those_of_the_logits(bench: Bench) -> None:
    case = bench.cases[1]
    own = logits(bench, case.prompt)
    answer, other = (bench.live.token(text or "") for text in (case.answer, case.other))
    odds, probability = measurable(bench), measurable(bench, PROBABILITY)
    assert odds.clean[1] == pytest.approx(own[answer] - own[other], abs=1e-3)
    expected = own[answer] - math.log(np.exp(own).sum())
    assert probability.clean[1] == pytest.approx(expected, abs=1e-3)
    trials = [Trial(prompt) for prompt in odds.prompts]
    for one in (odds, probability):
        assert measured(bench.live.model, one.measure, trials) == pytest.approx(one.clean, abs=1e-4)
        scores = judged(bench.live.model, one.behaviour, trials)
        assert list(scores > 0.5) == list(one.clean > one.metric.shown)
    assert judged(bench.live.model, probability.behaviour, trials)[1] == pytest.approx(math.exp(expected), abs=1e-3)


def test_a_variant_is_measured_by_its_cases_answer(bench: Bench) -> None:
    here = bench.cases[0]
    assert here.variant is not None
    there = Case(here.variant, here.other, here.answer, here.prompt)
    own = Measurable(bench.live, ODDS, [here, there], seed=0)
    variants = own.values([Trial(variant) for variant in own.variants if variant is not None])
    assert variants == pytest.approx(-own.clean[::-1], abs=1e-3)
    assert variants[0] < 0 < own.clean[0]


def test_rows_of_trials_are_measured_together_as_alone(bench: Bench) -> None:
    own = measurable(bench)
    change = ablate(bench.live.dictionary.fingerprint, list(range(200)))
    rows = [[Trial(prompt) for prompt in own.prompts], [Trial(prompt, change) for prompt in own.prompts]]
    both = own.table(rows)
    assert both.shape == (2, 4)
    assert both[1] == pytest.approx(own.values(rows[1]), abs=1e-3) and not np.allclose(both[0], both[1], atol=0.1)
    with pytest.raises(UserError, match="one for each"):
        own.table([rows[0][:3]])


def test_a_part_measures_the_same(bench: Bench) -> None:
    own = measurable(bench)
    assert own.part([2, 0]).clean == pytest.approx(own.clean[[2, 0]], abs=1e-4)
    assert (own.part([2]).cases, own.part([2]).variants) == ((bench.cases[2],), [own.variants[2]])
    fresh = measurable(bench).part([1, 3])
    assert fresh.clean == pytest.approx(own.clean[[1, 3]], abs=1e-3)
    with pytest.raises(UserError, match="no prompt is left"):
        own.part([])


def test_the_metrics_tokens_stand_in_where_a_case_names_none(bench: Bench) -> None:
    bare = [Case(case.prompt) for case in bench.cases[:2]]
    metric = Metric("log_odds", bench.cases[0].answer, bench.cases[0].other)
    assert Measurable(bench.live, metric, bare, seed=0).clean == pytest.approx(measurable(bench, count=2).clean)


@pytest.mark.parametrize(
    ("changes", "metric", "said"),
    [
        ({"answer": None}, ODDS, "has no 'answer'"),
        ({"other": None}, ODDS, "has no 'other'"),
        ({"other": " DESC"}, ODDS, "one token as answer and as the other"),
        ({"answer": " notatoken"}, PROBABILITY, "is no token"),
        ({"variant": "SELECT"}, ODDS, "their positions must match"),
        ({}, JUDGED, "a language model that judges"),
    ],
)
def test_what_cannot_be_measured(bench: Bench, changes: dict[str, Any], metric: Metric, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Measurable(bench.live, metric, [replace(bench.cases[0], **changes)], seed=0)


def test_an_empty_criterion(bench: Bench) -> None:
    with pytest.raises(UserError, match="say what a continuation must meet"):
        measurable(bench, replace(JUDGED, criterion=" "), judge=FakeClient(lambda *_: {"meets": True}))


def test_a_judge_reads_each_continuation_once(bench: Bench) -> None:
    judge = FakeClient(lambda text, _: {"meets": "<continuation> DESC" in text})
    own = measurable(bench, JUDGED, judge=judge)
    assert own.clean == pytest.approx([1, 1, 1, 1]) and own.gradient is None and own.answers == []
    asked = [request.messages[-1].text for request in judge.asked]
    assert len(set(asked)) == len(asked) <= 8 and all("<criterion>It sorts.</criterion>" in text for text in asked)
    count = len(asked)
    own.values([Trial(prompt) for prompt in own.prompts])
    assert len(judge.asked) == count and own.failures == 0


def test_failures_are_counted_and_score_nothing(bench: Bench) -> None:
    answers = iter([{"meets": True}, Reply("refused"), Reply("error"), {"meets": False}, {"meets": "yes"}])
    judge = FakeClient(lambda *_: next(answers))
    # Something else is written for every sample, so that each is asked about.
    own = Measurable(bench.live, replace(JUDGED, samples=5), bench.cases[:1], seed=0, judge=judge)
    noise = clamp(bench.live.dictionary.fingerprint, [1, 2, 3], 40.0)
    written = [Trial(own.prompts[0], noise)]
    value = own.values(written)
    assert len(judge.asked) == 5 and own.failures == 3 and value == pytest.approx([0.5])
    silent = measurable(bench, JUDGED, count=2, judge=FakeClient(lambda *_: Reply("error")))
    assert np.isnan(silent.clean).all() and silent.failures == 4
    with pytest.raises(UserError, match="must be a finite number"):
        measured(bench.live.model, silent.measure, [Trial(prompt) for prompt in silent.prompts])


def test_a_judge_is_asked_in_its_own_loop(bench: Bench) -> None:
    loops: list[Any] = []

    class Bound(FakeClient):
        async def complete(self, request: Any) -> Reply:
            loops.append(asyncio.get_running_loop())
            return await super().complete(request)

    async def investigate() -> tuple[Any, np.ndarray]:
        loop = asyncio.get_running_loop()
        own = replace(bench, metric=JUDGED, cases=bench.cases[:2], judge=Bound(lambda *_: {"meets": True}), loop=loop)
        return loop, await asyncio.to_thread(lambda: own.measurable.clean)

    loop, clean = asyncio.run(investigate())
    assert set(loops) == {loop} and list(clean) == [1, 1]
    assert threading.active_count() < 50
