"""The recipe decides by the view alone: what it does next, what it predicts, what it claims and what it does not."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import (
    Call,
    Case,
    Decision,
    Headline,
    Metric,
    Outcome,
    Question,
    Result,
    View,
)
from exegete.agent.investigation.recipe import Recipe
from exegete.agent.investigation.toolbelt import Toolbelt
from exegete.agent.investigation.verifying import verify
from exegete.agent.live import Live
from exegete.tools.bundled import sample_texts
from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.live_model import LiveModel
from exegete.tools.subject import Subject

from .conftest import cases_of

CASE = Case("… ORDER BY age", " DESC", " ASC", "… the other way ORDER BY age")
METRIC = Metric("log_probability")
FLAT: dict[str, Any] = {
    "control": "random sets",
    "control_value": 0.0,
    "control_low": -0.1,
    "control_high": 0.1,
    "control_n": 20,
}


def decided(results: list[Result], metric: Metric = METRIC, case: Case = CASE, steps_left: int = 30) -> Decision:
    question = Question("Why does the model write DESC?", (case,) * 10, metric, "the word descending")
    view = View(question, metric, (), tuple(results), len(results), (), steps_left)
    return asyncio.run(Recipe().decide(view))


def result(
    id: str, facts: Mapping[str, Any] | None = None, headline: Headline | None = None, experiment: str = ""
) -> Result:
    call = Call(id, id, {})
    return Result(call, "ok", Outcome("", headline, facts or {}), experiment, True if experiment else None)


def figure(value: float, half: float = 0.5, **control: Any) -> Headline:
    return Headline("figure", value, value - half, value + half, 10, **(FLAT | control))


def prompts(showing: int = 10, mean: float = -0.01) -> Result:
    return result("prompts", {"prompts": 10, "showing": showing, "mean": mean})


def attributed(**estimates: float) -> Result:
    rows = [
        {"latent": int(name[1:]), "attribution": {"value": value}, "exact": None} for name, value in estimates.items()
    ]
    return result("attribute", {"latents": rows}, figure(2.0), "E1")


def searched(difference: float = -6.0, flipped: float = 0.9, set_change: float = -5.0) -> list[Result]:
    """Everything up to the end of the protocol."""
    end = difference + 0.1
    carried = {"difference": {"value": difference, "low": difference - 0.1, "high": end, "n": 10}}
    share = Headline("flipped", flipped, flipped - 0.2, 1.0, 10, "random sets", 0.02, 0.0, 0.1, 20)
    return [
        prompts(),
        attributed(l7=2.0, l3=4.0),
        result("compare", {"latents": []}, Headline("latents that differ", 3.0)),
        result("ablate first", {}, figure(-4.0), "E2"),
        result("ablate second", {}, figure(-2.0), "E3"),
        result("ablate leaders", {}, figure(-6.0), "E4"),
        result("interchange", carried, figure(-3.0), "E5"),
        result("minimal set", {"latents": [3, 7, 11]}, share, "E6"),
        result("carriers", {"latents": [3, 5]}, share, "E7"),
        result("ablate set", {}, figure(set_change), "E8"),
        result("pairs", {}, figure(-1.0), "E9"),
        result("exchange", {}, figure(-4.0), "E10"),
        result("steer", {}, figure(0.0), "E11"),
    ]


def statuses(decision: Decision) -> dict[str, str]:
    return {hypothesis.id: hypothesis.status for hypothesis in decision.hypotheses}


def test_first_it_asks_whether_the_behaviour_is_there() -> None:
    first = decided([])
    assert [call.tool for call in first.calls] == ["prompts"] and not first.done
    assert set(statuses(first).values()) == {"open"}
    # Two tokens that are never written have log-odds as well.
    odds = decided([], Metric("log_odds"))
    assert [call.tool for call in odds.calls] == ["prompts", "generate"]


def test_a_behaviour_that_is_not_there_is_not_explained() -> None:
    last = decided([prompts(showing=5)])
    assert last.done and not last.claims and not last.calls
    assert statuses(last)["H1"] == "rejected"
    assert "5 of 10 search prompts" in last.answer and "nothing is claimed" in last.answer


def test_a_preference_between_tokens_that_are_never_written_is_no_behaviour() -> None:
    written = result("written", {}, Headline("the answer is written first", 0.1, 0.0, 0.4, 10), "E1")
    last = decided([prompts(showing=10, mean=9.0), written], Metric("log_odds"))
    assert last.done and not last.claims and "writes the answer is 0.1 [0, 0.4] (n = 10; E1)" in last.answer


def test_predictions_follow_from_the_attribution() -> None:
    calls = decided([prompts(), attributed(l7=2.0, l3=4.0, l5=-3.0), result("compare")]).calls
    ablations = {tuple(call.arguments["latents"]): call.arguments for call in calls if call.tool == "ablate"}
    # Strongest first; what holds the metric down is no leader. An estimate of 4 predicts a fall between 2 and 8.
    assert list(ablations) == [(3,), (7,)]
    assert (ablations[3,]["low"], ablations[3,]["high"]) == (-8.0, -2.0)
    (interchange,) = [call for call in calls if call.tool == "interchange"]
    # A tenth of what lies between the mean of −0.01 and the line of ln ½.
    assert interchange.arguments["high"] == pytest.approx(-0.0683, abs=1e-4)


def test_what_lies_beyond_its_controls_is_claimed() -> None:
    last = decided(searched())
    assert last.done
    necessary, carried = last.claims
    assert (necessary.latents, necessary.intervention, necessary.flips) == ((3, 7, 11), "ablate", True)
    assert (carried.latents, carried.intervention, carried.flips) == ((3, 5), "interchange", True)
    assert necessary.experiments == ("E6", "E8") and carried.experiments == ("E7", "E10")
    assert {claim.expects for claim in last.claims} == {"falls"}
    assert statuses(last) == dict(zip(("H1", "H2", "H3", "H4", "H5", "H6"), ["supported"] * 6, strict=True)) | {
        "H7": "not shown"
    }
    # Every figure has its interval, its number and its control.
    assert "changes by -5 [-5.5, -4.5] (n = 10; E8; random sets: 0 [-0.1, 0.1], n = 20)" in last.answer
    assert "no language model" in last.answer and "11 of 11 held" in last.answer


@pytest.mark.parametrize("broken", ["minimal set", "ablate set"])
def test_what_a_control_does_as_well_is_not_claimed(broken: str) -> None:
    random: dict[str, Any] = {"control_low": -9.0, "control_high": 0.95}
    results = [
        replace(one, outcome=replace(one.outcome, headline=replace(one.outcome.headline, **random)))
        if one.call.id == broken and one.outcome.headline
        else one
        for one in searched()
    ]
    last = decided(results)
    assert last.done and [claim.intervention for claim in last.claims] == ["interchange"]
    assert statuses(last)["H4"] == "not shown" and "is not claimed" in last.answer


def test_a_set_that_could_not_be_tested_is_not_claimed() -> None:
    results = [
        replace(one, status="refused", outcome=Outcome("no passes are left")) if one.call.id == "ablate set" else one
        for one in searched()
    ]
    last = decided(results)
    assert last.done and statuses(last)["H4"] == "open"
    assert all(claim.intervention != "ablate" for claim in last.claims)


def test_a_suggested_cause_without_effect_is_said_to_have_none() -> None:
    results = [one for one in searched(difference=0.0) if one.call.id not in ("carriers", "exchange")]
    last = decided(results)
    # Nothing is exchanged where prompts and variants do not differ, so the protocol is at its end.
    assert last.done and [claim.intervention for claim in last.claims] == ["ablate"]
    # Ten prompts leave open a fall of 0.1, and 0.07 would count.
    assert statuses(last)["H2"] == "not shown"
    assert "the word descending) the metric changes by 0 [-0.1, 0.1] (n = 10; E5)" in last.answer
    assert "that the suggested cause matters is not shown" in last.answer


def test_a_fall_that_is_sure_but_tiny_is_no_cause() -> None:
    carried = {"difference": {"value": -0.01, "low": -0.011, "high": -0.009, "n": 10}}
    results = [replace(one, outcome=replace(one.outcome, facts=carried)) if one.call.id == "interchange" else one
               for one in searched() if one.call.id not in ("carriers", "exchange")]  # fmt: skip
    assert statuses(decided(results))["H2"] == "rejected"


def test_without_variants_nothing_is_said_of_a_cause() -> None:
    last = decided(searched(), case=replace(CASE, variant=None))
    assert set(statuses(last)) == {"H1", "H3", "H4", "H5", "H7"}
    calls = decided([prompts(), attributed(l3=4.0)], case=replace(CASE, variant=None)).calls
    # One leader is not taken out twice.
    assert [call.tool for call in calls] == ["ablate"]


def test_a_judged_metric_has_no_gradient_so_what_differs_is_searched() -> None:
    failed = Result(Call("attribute", "attribute", {}), "error", Outcome("a judged metric has no gradient"))
    rows = [{"difference": {"latent": latent}} for latent in (5, 9)]
    compared = result("compare", {"latents": rows}, Headline("latents that differ", 2.0), "E1")
    metric = Metric("judged", criterion="it apologises")
    (exchanged,) = decided([prompts(mean=0.9), failed, compared], metric).calls
    assert exchanged.tool == "interchange" and exchanged.arguments["latents"] == [5, 9]
    carried = result("interchange", {"difference": {"value": -0.5, "low": -0.6, "high": -0.4, "n": 10}}, figure(-0.5))
    calls = decided([prompts(mean=0.9), failed, compared, carried], metric).calls
    assert [(call.tool, call.arguments["candidates"]) for call in calls] == [("minimal_set", [5, 9])] * 2


def test_an_experiment_that_was_asked_for_twice_counts_once() -> None:
    one, *rest = searched()
    again = replace(rest[1], call=replace(rest[1].call, id="ablate third"), experiment="E2")
    assert "11 of 11 held" in decided([one, *rest, again]).answer


def test_with_one_step_left_it_ends_with_what_there_is() -> None:
    last = decided(searched()[:8], steps_left=1)
    assert last.done and not last.claims and "a set of 3 latents" in last.answer


def test_the_metric_is_read_off_the_prompts_or_asked_for() -> None:
    def framed(*cases: Case) -> Metric:
        return asyncio.run(Recipe().frame(Question("why?", cases)))

    assert framed(CASE).kind == "log_odds"
    assert framed(CASE, Case("…", " DESC")).kind == "log_probability"
    with pytest.raises(UserError, match="--metric"):
        framed(CASE, Case("…"))


@pytest.mark.slow
def test_order_desc_of_the_bundled_subject(subject: Subject, dictionary: Dictionary) -> None:
    """The whole protocol through the real tools, and its claims on prompts that it has not seen."""
    cases, unseen = cases_of("order.DESC", 8), cases_of("order.DESC", 9, seed=9)
    live = Live(LiveModel(subject, [dictionary]), dictionary, None)
    bench = Bench(live, cases, METRIC, seed=5, texts=tuple(sample_texts(77, 20)), controls=3)
    tools = Toolbelt(bench)
    view = View(Question("Why DESC?", cases, METRIC, "the word"), METRIC, (), (), 0, (), 30)
    while not (decision := asyncio.run(Recipe().decide(view))).done:
        found = [tools.run(call) for call in decision.calls]
        assert [one.outcome.text for one in found if one.status != "ok"] == []
        started = len(view.results)
        numbered = [replace(one, experiment=f"E{started + place}") for place, one in enumerate(found)]
        view = replace(view, results=(*view.results, *numbered), steps_left=view.steps_left - 1)
    known = [one.experiment for one in view.results]
    verdicts = asyncio.run(verify(bench, unseen, decision.claims, known))
    assert [(one.claim.intervention, one.status) for one in verdicts] == [
        ("ablate", "verified"),
        ("interchange", "verified"),
    ]
    assert statuses(decision)["H2"] == "supported" and "it matters" in decision.answer
