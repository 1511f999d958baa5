"""Where the recipe predicts figures to lie: hand-worked, at a probability of 0.9, whose odds are 9."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import log
from typing import Any

import numpy as np
import pytest

from exegete.agent.investigation.contract import (
    Call,
    Case,
    Headline,
    Metric,
    MetricKind,
    Outcome,
    Prediction,
    Question,
    Result,
    View,
)
from exegete.agent.investigation.recipe import Recipe
from exegete.agent.investigation.recipe_figures import Figures
from exegete.agent.investigation.recipe_predictions import (
    Ends,
    alone,
    emptied,
    leading,
    metric,
    odds,
    paired,
    steered,
    together,
)
from exegete.agent.investigation.toolbelt import Toolbelt, every_tool

CASES = tuple(Case(f"prompt {n}", "yes", "no", f"variant {n}") for n in range(10))
FROM_9_TO_3 = log(0.9 / 0.75)
"""Loss of one latent that takes the odds from 9 to 3: log 3 in log-odds."""


def near(ends: Ends, low: float | None, high: float | None) -> bool:
    """Return whether both ends are these, to a thousandth."""
    pairs = zip(ends, (low, high), strict=True)
    return all(a == b or (a is not None and b is not None and abs(a - b) < 1e-3) for a, b in pairs)


def result(id: str, **facts: Any) -> Result:
    return Result(Call(id, id, {}), "ok", Outcome("", Headline(id, 1.0), facts))


def prompts(clean: float = log(0.9)) -> Result:
    return result("prompts", prompts=10, showing=10, mean=clean)


def attributed(exact: Mapping[int, Mapping[str, Any] | None]) -> Result:
    rows = [
        {"latent": latent, "attribution": {"value": 4.0 / place}, "exact": one}
        for place, (latent, one) in enumerate(exact.items(), 1)
    ]
    return result("attribute", latents=rows, prompts=[{"prompt": "", "clean": log(0.9)}] * 4)


def ablated(id: str, before: float, after: float) -> Result:
    return result(id, prompts=[{"prompt": "", "clean": before, "changed": after}] * 10)


def figures(*results: Result, kind: MetricKind = "log_probability") -> Figures:
    question = Question("Why?", CASES, Metric(kind))
    return Figures(View(question, Metric(kind), (), results, 0, (), 30))


def test_probabilities_become_log_odds_and_come_back() -> None:
    found = figures()
    assert odds(found, log(0.9)) == pytest.approx(log(9))
    assert metric(found, odds(found, [-1e-9, -0.5, -30.0])) == pytest.approx([-1e-9, -0.5, -30.0])
    assert np.isfinite(odds(found, [0.0, 1e-9])).all()
    assert odds(figures(kind="log_odds"), -2.0) == metric(figures(kind="log_odds"), -2.0) == -2.0


def test_the_first_latent_is_worth_a_tenth_of_the_log_odds() -> None:
    # From 9 to 9^0.9 = 7.225: ln(0.9) − ln(7.225 / 8.225).
    assert near(leading(figures(prompts())), 0.02428, None)
    assert near(leading(figures(prompts(5.0), kind="log_odds")), 0.5, None)


def test_a_leader_alone_is_predicted_by_its_loss_on_the_prompts_that_were_attributed() -> None:
    given = {7: {"value": 2.0, "sd": 1.0, "n": 4}, 8: {"value": -1.0, "sd": 1.0, "n": 4}, 9: None}
    found = figures(prompts(), attributed(given))
    # Student's 3.182 with 3 degrees of freedom, times √(6 / (10 × 4)), is 1.2325; its share of 2 makes the factor 1.852.
    assert near(alone(found, 7), -3.704, -1.080)
    assert near(alone(found, 8), 1 - 1.2325, 1 + 1.2325)
    # The attribution's own estimate, 4 / 3, where there is nothing better.
    assert near(alone(found, 9), -8 / 3, -2 / 3)
    sure = figures(prompts(), attributed({7: {"value": 2.0, "sd": 1.0, "n": 10}}))
    assert near(alone(sure, 7), -2.1, -2 / 1.05)
    vague = figures(prompts(), attributed({7: {"value": 0.01, "sd": 1.0, "n": 4}}))
    assert near(alone(vague, 7), -0.1, -0.001)


def test_leaders_together_fall_between_the_sum_of_losses_and_that_of_log_odds() -> None:
    one, two = ablated("one", log(0.9), log(0.75)), ablated("two", log(0.9), log(0.75))
    found = figures(prompts(), attributed({7: None, 8: None}), one, two)
    # Twice 2 log 3 takes the odds from 9 to 1 / 9.
    assert near(together(found, [7, 8], ["one", "two"]), -log(9), -FROM_9_TO_3)
    # No further than the variants.
    change = {"value": -1.5, "low": -1.6, "high": -1.4, "n": 10}
    varied = figures(prompts(), attributed({7: None, 8: None}), one, two, result("interchange", difference=change))
    assert near(together(varied, [7, 8], ["one", "two"]), -1.5, -FROM_9_TO_3)
    # Where the second was not measured, its exact loss stands for it.
    exact = figures(prompts(), attributed({7: None, 8: {"value": FROM_9_TO_3}}), one)
    assert near(together(exact, [7, 8], ["one", "two"]), -log(9), -FROM_9_TO_3)
    straight = figures(prompts(6.0), ablated("one", 6.0, 2.0), ablated("two", 6.0, 4.0), kind="log_odds")
    assert near(together(straight, [7, 8], ["one", "two"]), -12.0, -3.0)
    rising = figures(prompts(6.0), ablated("one", 6.0, 7.0), ablated("two", 6.0, 7.0), kind="log_odds")
    assert near(together(rising, [7, 8], ["one", "two"]), None, 0.0)


@pytest.mark.parametrize("difference, low", [(-6.0, -6.0), (-0.01, None), (None, None)])
def test_a_set_ends_between_the_line_and_the_variants(difference: float | None, low: float | None) -> None:
    known = None if difference is None else {"value": difference, "low": difference, "high": difference, "n": 10}
    # From ln 0.9 to ln ½.
    ends = emptied(figures(prompts(), result("interchange", difference=known)))
    assert near(ends, low, -log(0.9 / 0.5))


def test_the_strongest_pair_does_what_log_odds_that_add_come_to() -> None:
    losses = {7: {"value": FROM_9_TO_3}, 8: {"value": FROM_9_TO_3}, 9: None}
    found = figures(prompts(), attributed(losses))
    # Odds of 9, 3, 3 and 1; half of it.
    expected = (log(0.5) - 2 * log(0.75) + log(0.9)) / 2
    assert near(paired(found, [7, 8, 9]), None, expected)
    assert near(paired(found, [7, 9]), None, 0.0) and near(paired(figures(prompts()), [7, 8]), None, 0.0)
    assert near(paired(figures(prompts(4.0), attributed(losses), kind="log_odds"), [7, 8]), None, 0.0)


def test_steering_moves_log_odds_by_about_what_its_kl_allows() -> None:
    found = figures(prompts(), ablated("one", log(0.9), log(0.75)))
    low, high = steered(found, 0.5, "one")
    # Odds of 9 / e³ = 0.448 and of 9 / e^⅓ = 6.449.
    assert near((low, high), log(0.3094 / 0.9), log(0.8658 / 0.9))
    assert near(steered(found, 0.5, "two"), None, 0.0)


@pytest.mark.parametrize("kind", ["log_probability", "log_odds"])
def test_every_prediction_of_the_protocol_is_one_that_can_be_recorded(kind: MetricKind) -> None:
    losses = {n: {"value": 0.2 / n, "sd": 0.1, "n": 4} for n in (1, 2, 3, 4)}
    change = {"value": -3.0, "low": -3.1, "high": -2.9, "n": 10}
    given: Sequence[Result] = [
        *(prompts(log(0.9) if kind == "log_probability" else 2.0), attributed(losses), result("compare")),
        *(ablated(f"ablate {name}", -0.1, -0.3) for name in ("first", "second", "third", "leaders")),
        *(result("interchange", difference=change), result("minimal set", latents=[1, 2, 9])),
        *(result("carriers", latents=[1, 9]), result("written")),
    ]
    belt = Toolbelt(None, every_tool())  # type: ignore[arg-type]  # Nothing is run.
    seen: dict[str, Prediction | None] = {}
    view = figures(kind=kind).view
    while not (decision := asyncio.run(Recipe().decide(view))).done:
        seen |= {call.id: belt.checked(call)[2] for call in decision.calls}
        known = {one.call.id: one for one in given}
        more = tuple(known.get(call.id, result(call.id)) for call in decision.calls)
        view = replace(view, results=(*view.results, *more))
    assert list(seen).index("ablate leaders") > list(seen).index("interchange")
    assert {"attribute", "ablate third", "minimal set", "ablate set", "pairs", "exchange", "steer"} <= seen.keys()
    both = [one for one in seen.values() if one and one.low is not None and one.high is not None]
    # Leaders alone and together, both sets and steering: bounded on both sides, and not to one point.
    assert len(both) == 7 and all(one.low < one.high for one in both if one.low is not None and one.high is not None)
