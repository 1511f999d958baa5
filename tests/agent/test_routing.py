"""Routing: when a latent climbs, what a rung is expected to add, and when revisions end."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest

from exegete.agent.routing import (
    CHANCE,
    PRIOR,
    SPREAD,
    Gain,
    Gains,
    Rule,
    Standing,
    after_round,
    best,
    climbs,
    fit_gains,
    ladder,
)
from exegete.evaluators.contract import JudgedItem, Verdict
from exegete.evaluators.refine_score import Refined
from exegete.tools.errors import UserError
from exegete.tools.store import StepRecord
from exegete.tools.windows import Window

RUNGS = ("lexical", "one-shot", "refine")


def rule(worth: float | None = 1.0, target: float = 0.8, rungs: Sequence[str] = RUNGS) -> Rule:
    return Rule(target, worth, tuple(rungs))


def gains(mean: float, slope: float, usd: float) -> Gains:
    one = Gain(64, 0.6, mean, slope, usd, calls=3, tokens=2_000)
    return Gains({"lexical": Gain(64, 0.5, 0.1, 0.0, 0.0, 0, 0), "one-shot": one, "refine": one})


def step(
    rung: str, refine: float | None, test: float | None = None, usd: float = 0.0, calls: int = 0, explained: bool = True
) -> StepRecord:
    low, high = (None, None) if refine is None else (refine - 0.1, refine + 0.1)
    identity = f"sha256:{rung}{refine}" if explained else None
    return StepRecord(
        0, rung, identity, refine, low, high, 40, calls, 100 * calls, usd, "control", test, 200, control=True
    )


# The rule.


@pytest.mark.parametrize(
    ("rung", "standing", "decision"),
    [
        (0, Standing(0.6, 0.5, 0.7), "climbs"),
        (0, Standing(0.75, 0.65, 0.8), "good_enough"),  # The upper limit reaches the target.
        (0, Standing(0.75, 0.65, 0.79), "climbs"),
        (2, Standing(0.6, 0.5, 0.7), "top"),
        (2, Standing(0.9, 0.8, 0.95), "good_enough"),
        (1, Standing(None, None, None), "no_score"),
        (2, Standing(None, None, None), "no_score"),
        (0, CHANCE, "climbs"),  # No explanation: as much as a constant answer.
    ],
)
def test_by_the_target(rung: int, standing: Standing, decision: str) -> None:
    assert climbs(rung, standing, None, rule()) == decision
    assert climbs(rung, standing, gains(0.1, 0.0, 0.001), rule()) == decision


def test_by_the_price() -> None:
    """A gain of 0.1 − 0.5 (score − 0.6), worth 0.20 USD a point, against a price of 0.015 USD: worth it up to 0.65."""
    known, own = gains(0.1, -0.5, 0.015), rule(worth=0.2)
    for value, decision in ((0.55, "climbs"), (0.649, "climbs"), (0.651, "not_worth_it"), (0.7, "not_worth_it")):
        assert climbs(0, Standing(value, value - 0.05, value + 0.05), known, own) == decision
    assert climbs(0, Standing(0.7, 0.65, 0.75), known, rule(worth=None)) == "climbs"
    assert climbs(0, Standing(0.7, 0.65, 0.75), None, own) == "climbs"
    # Nothing is worth nothing, unless it costs nothing.
    assert climbs(0, Standing(0.55, 0.5, 0.6), known, rule(worth=0.0)) == "not_worth_it"
    assert climbs(0, Standing(0.55, 0.5, 0.6), gains(0.1, 0.0, 0.0), rule(worth=0.0)) == "climbs"


def test_the_price_of_the_next_rung_counts() -> None:
    cheap, dear = gains(0.1, 0.0, 0.01).rungs["one-shot"], gains(0.1, 0.0, 10.0).rungs["refine"]
    known = Gains({"one-shot": cheap, "refine": dear})
    low = Standing(0.6, 0.5, 0.7)
    assert (climbs(0, low, known, rule()), climbs(1, low, known, rule())) == ("climbs", "not_worth_it")
    with pytest.raises(UserError, match="knows no rung 'refine'; it knows one-shot"):
        climbs(1, low, Gains({"one-shot": cheap}), rule())


def test_an_expected_gain_is_never_negative_nor_beyond_a_perfect_score() -> None:
    gain = Gain(64, 0.6, 0.1, -0.5, 0.0, 0, 0)
    assert [round(gain.expected(below), 3) for below in (0.4, 0.6, 0.79, 0.9)] == [0.2, 0.1, 0.005, 0.0]
    assert Gain(64, 0.6, 0.4, 0.0, 0.0, 0, 0).expected(0.95) == pytest.approx(0.05)


@pytest.mark.parametrize("target", [0.0, -1.0, 1.1, math.nan])
def test_a_target_must_be_a_score(target: float) -> None:
    with pytest.raises(UserError, match=r"cascade\.target"):
        rule(target=target)


@pytest.mark.parametrize("worth", [-0.1, math.inf, math.nan])
def test_a_worth_must_be_a_price(worth: float) -> None:
    with pytest.raises(UserError, match=r"cascade\.worth_usd"):
        rule(worth=worth)


@pytest.mark.parametrize("rungs", [(), ("lexical", "lexical")])
def test_rungs_must_be_named_once_each(rungs: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"cascade\.rungs"):
        rule(rungs=rungs)


# The frozen fit.


def test_the_fit_by_hand() -> None:
    """Below 0.5, 0.6, 0.7 and gains of 0.3, 0.2, 0.1: mean 0.6 → 0.2, and a slope of −1 before it is drawn to zero."""
    climbed = [
        [step("lexical", below), step("one-shot", below + gain, usd=usd, calls=2)]
        for below, gain, usd in ((0.5, 0.3, 0.01), (0.6, 0.2, 0.02), (0.7, 0.1, 0.03))
    ]
    found = fit_gains(climbed, RUNGS[:2])
    one = found.rungs["one-shot"]
    assert (one.latents, one.calls, one.tokens) == (3, 2, 200)
    assert (one.below, one.usd) == pytest.approx((0.6, 0.02))
    assert one.mean == pytest.approx(0.2 * 3 / (3 + PRIOR))
    assert one.slope == pytest.approx(-0.02 / (0.02 + PRIOR * SPREAD**2))
    lowest = found.rungs["lexical"]
    assert (lowest.below, lowest.slope, lowest.usd) == (0.5, 0.0, 0.0)
    assert lowest.mean == pytest.approx(0.1 * 3 / (3 + PRIOR))


def test_the_fit_is_restored_from_json_as_it_was() -> None:
    found = fit_gains([[step("lexical", 0.6), step("one-shot", 0.7, usd=0.1)]], RUNGS[:2])
    assert Gains.restored(json.loads(json.dumps(found.described()))) == found
    with pytest.raises(UserError, match="another version"):
        Gains.restored({"lexical": {"gain": 1.0}})


def test_the_fit_recovers_what_was_planted() -> None:
    rng = np.random.default_rng(0)
    below = rng.uniform(0.5, 0.9, 500)
    after = below + 0.4 * (0.95 - below) + rng.normal(0, 0.02, 500)
    climbed = [[step("lexical", b), step("one-shot", a)] for b, a in zip(below.tolist(), after.tolist(), strict=True)]
    one = fit_gains(climbed, RUNGS[:2]).rungs["one-shot"]
    assert [one.expected(b) for b in (0.5, 0.7, 0.9)] == pytest.approx([0.18, 0.1, 0.02], abs=0.012)


def test_a_gain_never_rises_with_the_score_below() -> None:
    climbed = [[step("lexical", b), step("one-shot", b + 0.5 * (b - 0.4))] for b in (0.5, 0.6, 0.7)]
    assert fit_gains(climbed, RUNGS[:2]).rungs["one-shot"].slope == 0.0


def test_latents_without_a_score_do_not_count_and_none_at_all_is_said() -> None:
    scored = [step("lexical", 0.6), step("one-shot", 0.8)]
    unscored = [step("lexical", None), step("one-shot", None)]
    short = [step("lexical", 0.6)]
    assert fit_gains([scored, unscored, short], RUNGS[:2]).rungs["one-shot"].latents == 1
    with pytest.raises(UserError, match="nothing to fit"):
        fit_gains([unscored, short], RUNGS[:2])
    with pytest.raises(UserError, match="nothing to fit"):
        fit_gains([], RUNGS[:1])


# Where a latent stands.


def test_the_best_stands_and_the_earlier_of_equals() -> None:
    steps = [
        step("lexical", 0.7, 0.65),
        step("one-shot", 0.6, 0.9, usd=0.01, calls=5),
        step("refine", 0.7, 0.8, usd=0.02, calls=6),
        step("refine", 0.75, 0.7, usd=0.03, calls=7),
        step("best-of", 0.99, 0.99, usd=9.0),
    ]
    treads = ladder(steps, RUNGS)
    assert [tread.standing.value for tread in treads] == [0.7, 0.7, 0.75]
    assert [tread.test for tread in treads] == [0.65, 0.65, 0.7]
    assert [tread.usd for tread in treads] == pytest.approx([0.0, 0.01, 0.05])
    assert [(tread.calls, tread.tokens) for tread in treads] == [(0, 0), (5, 500), (13, 1_300)]
    assert all(tread.reached for tread in treads)


def test_no_explanation_scores_as_chance_and_no_score_is_none() -> None:
    silent = ladder([step("lexical", None, explained=False), step("one-shot", 0.4, 0.45)], RUNGS)
    assert [tread.standing.value for tread in silent] == [0.5, 0.4, 0.4]
    assert [tread.test for tread in silent] == [0.5, 0.45, 0.45]
    assert [tread.reached for tread in silent] == [True, True, False]
    failed = ladder([step("lexical", None, 0.6), step("one-shot", 0.4, 0.45)], RUNGS)
    assert [tread.standing.value for tread in failed] == [None, 0.4, 0.4]


def test_the_best_of_several() -> None:
    assert best([Standing(0.5, 0, 1), None, Standing(0.7, 0, 1), Standing(0.7, 0, 1), Standing(None, None, None)]) == 2
    assert best([None, Standing(None, None, None)]) is None and best([]) is None


# When revisions end.


def refined(right: int, n: int = 20) -> Refined:
    """So many of twenty items right, the first ones."""
    items = tuple(
        JudgedItem(
            Window(number, (" a",), None, number % 2 == 0, "refine", "firing"), None, number % 2 == 0,
            Verdict((number % 2 == 0) == (number < right)), 0,
        )
        for number in range(n)
    )  # fmt: skip
    value = right / n
    return Refined(value, value - 0.1, value + 0.1, n, {"detection": items})


NO_SCORE = Refined(None, None, None, 0)


@pytest.mark.parametrize(
    ("tried", "patience", "follows"),
    [
        ([refined(10)], 1, "climbs"),
        ([refined(16)], 1, "good_enough"),
        ([refined(10), refined(17)], 1, "good_enough"),
        ([refined(10), refined(17), refined(9)], 1, "good_enough"),  # The best counts.
        ([refined(10), refined(14)], 1, "climbs"),
        ([refined(10), refined(11)], 1, "plateau"),  # One item more is within the noise.
        ([refined(10), refined(11)], 2, "climbs"),
        ([refined(10), refined(11), refined(12)], 2, "plateau"),  # Each beats the best before it by one item.
        ([refined(10), None], 1, "plateau"),
        ([refined(10), refined(14), None], 1, "plateau"),
        ([refined(10), refined(8), refined(13)], 2, "climbs"),
        ([refined(10), refined(13), refined(12), None], 2, "rounds_used_up"),
        ([refined(8), refined(11), refined(14), refined(15)], 1, "rounds_used_up"),
        ([None, refined(10)], 1, "climbs"),
        ([NO_SCORE, NO_SCORE], 1, "plateau"),
        ([NO_SCORE], 1, "climbs"),
    ],
)
def test_when_revisions_end(tried: list[Refined | None], patience: int, follows: str) -> None:
    assert after_round(tried, 0.8, rounds=3, patience=patience) == follows


def test_without_rounds_there_is_none() -> None:
    assert after_round([refined(10)], 0.8, rounds=0) == "rounds_used_up"
