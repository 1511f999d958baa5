"""What routing is worth on the control subset: by hand on few latents, and on planted ones where the best rule is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from exegete.agent.routing import Rule
from exegete.agent.routing_value import Measured, measured
from exegete.tools.errors import UserError
from exegete.tools.store import StepRecord

RULE = Rule(0.8, None, ("lexical", "one-shot"))


def step(
    rung: str, refine: float | None, test: float | None, usd: float = 0.0, calls: int = 0, explained: bool = True
) -> StepRecord:
    low, high = (None, None) if refine is None else (refine - 0.05, refine + 0.05)
    identity = f"sha256:{rung}{refine}" if explained else None
    return StepRecord(
        0, rung, identity, refine, low, high, 40, calls, 100 * calls, usd, "control", test, 200, control=True
    )


def found(control: Sequence[Sequence[StepRecord]], rule: Rule = RULE, seed: int = 0) -> dict[str, Measured]:
    figures = measured(control, rule, seed)
    assert len({figure.name for figure in figures}) == len(figures)
    return {figure.name: figure for figure in figures}


def test_by_hand() -> None:
    """Two latents that are good enough below and would lose by climbing, two that gain: the rule takes just these."""
    control = [
        [step("lexical", 0.9, 0.90), step("one-shot", 0.95, 0.80, usd=0.02)],
        [step("lexical", 0.9, 0.90), step("one-shot", 0.95, 0.80, usd=0.02)],
        [step("lexical", 0.6, 0.60), step("one-shot", 0.80, 0.80, usd=0.02)],
        [step("lexical", 0.6, 0.60), step("one-shot", 0.80, 0.80, usd=0.04)],
    ]
    figures = found(control)
    expected = {
        "routed": 0.85,
        "cost of routed": 0.015,
        "lowest rung only": 0.75,
        "climb always": 0.80,
        "cost of climb always": 0.025,
        # Half of all climb at random for 0.0125 and score (0.75 + 0.80) / 2; a fifth of the way to always costs 0.015.
        "random at equal cost": 0.78,
        "routed - random at equal cost": 0.07,
        "routed - climb always": 0.05,
        "routed - lowest rung only": 0.10,
        "share that stops on lexical": 0.5,
        "share that stops on one-shot": 0.5,
        "gain of lexical": 0.25,
        "gain of one-shot": 0.05,
        "price of one-shot": 0.025,
        "gain per cost of one-shot": 2.0,
        "left out": 0,
    }
    assert {name: figures[name].value for name in expected} == pytest.approx(expected)
    assert figures["gain per cost of lexical"].value is None and figures["gain per cost of lexical"].low is None
    assert figures["cost of routed"].unit == "USD a latent"
    assert figures["gain per cost of one-shot"].unit == "balanced accuracy per USD"
    assert {figure.n for figure in figures.values()} == {4}
    assert figures["routed"].described()["value"] == pytest.approx(0.85)


def test_where_nothing_costs_money_tokens_do() -> None:
    control = [[step("lexical", 0.6, 0.6), step("one-shot", 0.8, 0.7, calls=9)] for _ in range(4)]
    figures = found(control)
    assert figures["cost of routed"].value == 900.0 and figures["cost of routed"].unit == "tokens a latent"
    assert figures["gain per cost of one-shot"].value == pytest.approx(0.1 / 900 * 1_000_000)
    assert figures["gain per cost of one-shot"].unit == "balanced accuracy per million tokens"


def test_an_explanation_that_scores_lower_on_the_refine_split_is_not_taken() -> None:
    control = [[step("lexical", 0.7, 0.65), step("one-shot", 0.6, 0.9, calls=5)] for _ in range(3)]
    figures = found(control)
    assert figures["routed"].value == figures["climb always"].value == pytest.approx(0.65)
    assert figures["cost of routed"].value == 500.0 and figures["gain of one-shot"].value == 0.0


def test_no_explanation_scores_as_chance() -> None:
    silent = step("lexical", None, None, explained=False)
    figures = found([[silent, step("one-shot", 0.7, 0.7, calls=5)] for _ in range(3)])
    assert figures["lowest rung only"].value == 0.5 and figures["gain of lexical"].value == 0.0
    assert figures["routed"].value == pytest.approx(0.7)


def test_latents_without_a_test_score_or_a_rung_are_left_out_and_counted() -> None:
    whole = [step("lexical", 0.6, 0.6), step("one-shot", 0.8, 0.7, calls=9)]
    unscored = [step("lexical", 0.6, None), step("one-shot", 0.8, 0.7, calls=9)]
    figures = found([whole, whole, unscored, [whole[0]]])
    assert (figures["left out"].value, figures["left out"].n, figures["routed"].n) == (2, 4, 2)
    with pytest.raises(UserError, match=r"of 3 latents .* 1 have a test score .* raise cascade\.control"):
        measured([whole, unscored, [whole[0]]], RULE, 0)
    with pytest.raises(UserError, match="raise cascade"):
        measured([], RULE, 0)
    with pytest.raises(UserError, match="two at least, not 1"):
        measured([whole, whole], RULE, 0, folds=1)


def test_best_of_n_stands_beside_climbing_always() -> None:
    whole = [step("lexical", 0.6, 0.6), step("one-shot", 0.8, 0.7, calls=9)]
    drawn = [*whole, step("best-of", 0.7, 0.9, calls=5), step("best-of", 0.8, 0.65, calls=5)]
    failed = [*whole, step("best-of", 0.7, None, calls=10)]
    figures = found([drawn, drawn, failed, whole])
    # The best on the refine split counts, whatever its test score.
    assert figures["best-of"].value == pytest.approx(0.65) and figures["cost of best-of"].value == 1000.0
    assert figures["climb always - best-of"].value == pytest.approx(0.05) and figures["best-of"].n == 2
    assert figures["cost of climb always - best-of"].value == -100.0
    assert "best-of" not in found([whole, whole])


def test_the_latents_of_a_fold_do_not_fit_the_line_that_routes_them() -> None:
    """One latent gains: whether climbing pays shows by it alone, so it must not climb on its own account."""
    rule = Rule(0.95, 1.0, ("lexical", "one-shot"))
    control = [[step("lexical", 0.6, 0.6), step("one-shot", 0.6, 0.6, usd=0.01)] for _ in range(5)]
    control[0] = [step("lexical", 0.6, 0.6), step("one-shot", 0.95, 0.9, usd=0.01)]
    figures = found(control, rule)
    # The others are routed by it, and pay for nothing; it is routed by them, and stays.
    assert figures["share that stops on one-shot"].value == pytest.approx(0.8)
    assert figures["routed"].value == pytest.approx(0.6)


def planted(informative: bool, latents: int = 300) -> list[list[StepRecord]]:
    """Gains from nothing to 0.3; the refine score below tells them where `informative`, else it is noise."""
    rng = np.random.default_rng(4)
    below = rng.uniform(0.55, 0.95, latents)
    shown = below if informative else rng.permutation(below)
    after = below + 0.75 * (0.95 - below)
    noise = rng.normal(0, 0.03, (3, latents))
    rows = zip(shown + noise[0], shown + 0.02 + noise[0], below + noise[1], after + noise[2], strict=True)
    return [
        [step("lexical", float(r), float(t)), step("one-shot", float(s), float(u), usd=0.01, calls=3)]
        for r, s, t, u in rows
    ]


def test_a_signal_beats_random_routing_at_equal_cost_and_noise_does_not() -> None:
    good = found(planted(True))["routed - random at equal cost"]
    assert good.low is not None and good.low > 0.01
    none = found(planted(False))["routed - random at equal cost"]
    assert none.low is not None and none.high is not None and none.low < 0 < none.high


def test_the_interval_covers_and_depends_on_the_seed_alone() -> None:
    control = planted(True, 60)
    assert measured(control, RULE, 3) == measured(control, RULE, 3)
    assert measured(control, RULE, 3) != measured(control, RULE, 4)
    figures = found(control)
    routed = figures["routed"]
    assert routed.value is not None and routed.low is not None and routed.high is not None
    spread = np.std([own[1].test or 0 for own in control]) / math.sqrt(60)
    assert routed.low < routed.value < routed.high and (routed.high - routed.low) / spread > 2
