from __future__ import annotations

import math

import numpy as np
import pytest

from exegete.evaluators.clustering import (
    CAUTIOUS,
    INDEPENDENT,
    MARGIN,
    PILOT_ERRORS,
    Clustering,
    Table,
    balanced_influences,
    design_effect,
    pairs,
    pooled,
)

PROMPTS = np.repeat(np.arange(40), 5)


def table(rng: np.random.Generator, error: float, together: float) -> Table:
    """200 items in prompts of five; with probability `together` a prompt errs as one."""
    truth = rng.permutation(np.repeat([True, False], 100))
    as_one = (rng.random(40) < together)[PROMPTS]
    wrong = np.where(as_one, (rng.random(40) < error)[PROMPTS], rng.random(200) < error)
    return Table(truth, truth ^ wrong, PROMPTS)


def test_pairs_of_a_hand_worked_table() -> None:
    """Two prompts of two, one wholly right, one wholly wrong: products 2·1/4 each, and the centring's 1/3."""
    shown = pairs(np.array([0.5, 0.5, -0.5, -0.5]), np.array([0, 0, 1, 1]))
    assert shown == pytest.approx((2 * (2 * 0.25) + 1 / 3, 1.0, 4.0))


def test_prompts_of_one_item_cost_nothing() -> None:
    assert design_effect(np.array([0.5, -0.5, 0.5, -0.5]), np.arange(4), 0.7, 2.0) == 1.0


def test_effect_of_whole_prompts_and_of_no_error_at_all() -> None:
    """Four prompts of five, two lost: icc 1 and more by the moment estimator, bounded. Without errors: what is expected."""
    lost = np.repeat([0.5, -0.5, 0.5, -0.5], 5)
    prompts = np.repeat(np.arange(4), 5)
    assert design_effect(lost, prompts, 1.0, 2.0) == pytest.approx(1 + MARGIN * 4)
    assert design_effect(np.zeros(20), prompts, 0.7, 2.0) == pytest.approx(1 + MARGIN * 0.7 * 4)
    assert design_effect(lost, prompts, 0.0, math.inf) == 1.0


def test_own_evidence_outweighs_what_is_expected_with_its_errors() -> None:
    """Item errors in four prompts of five, one each: each pair of a prompt is negative or zero, so own icc is below zero."""
    right = np.ones(20)
    right[::5] = 0
    own = pairs(right - right.mean(), np.repeat(np.arange(4), 5))
    expected = (own.excess / own.possible * own.errors + 0.7 * 2) / (own.errors + 2)
    found = design_effect(right - right.mean(), np.repeat(np.arange(4), 5), 0.7, 2.0)
    assert found == pytest.approx(1 + MARGIN * max(0.0, expected) * 4)
    assert own.excess < 0


def test_balanced_influences_sum_to_zero_in_each_class() -> None:
    truth, right = np.array([1, 1, 1, 1, 0, 0], dtype=np.bool_), np.array([1, 1, 1, 0, 1, 0], dtype=np.bool_)
    found = balanced_influences(truth, right)
    assert found == pytest.approx([0.25 / 8, 0.25 / 8, 0.25 / 8, -0.75 / 8, 0.5 / 4, -0.5 / 4])


@pytest.mark.parametrize("together", [0.0, 1 / 3, 1.0])
def test_a_pilot_finds_the_correlation(together: float) -> None:
    rng = np.random.default_rng(0)
    found = pooled(table(rng, 0.2, together) for _ in range(100))
    assert found.balanced == pytest.approx(together, abs=0.05)
    assert found.positives == pytest.approx(together, abs=0.07) and found.negatives == pytest.approx(together, abs=0.07)
    assert (found.errors, found.latents) == (PILOT_ERRORS, 100)


def test_a_pilot_without_errors_leaves_caution() -> None:
    right = table(np.random.default_rng(0), 0.0, 0.0)
    assert pooled([right]) == Clustering(CAUTIOUS.balanced, CAUTIOUS.positives, CAUTIOUS.negatives, CAUTIOUS.errors, 1)
    assert pooled([]) == CAUTIOUS


def test_a_pilot_does_not_depend_on_its_order_and_takes_latents_of_one_class() -> None:
    rng = np.random.default_rng(1)
    tables = [table(rng, 0.1, 0.5) for _ in range(10)]
    firing = Table(np.ones(10, dtype=np.bool_), np.arange(10) % 3 > 0, np.arange(10) // 5)
    one, other = pooled([*tables, firing]), pooled([firing, *reversed(tables)])
    assert one.balanced == pytest.approx(other.balanced) and one.balanced == pytest.approx(pooled(tables).balanced)
    assert one.positives != pytest.approx(pooled(tables).positives)


def test_what_is_stored_is_plain() -> None:
    assert CAUTIOUS.described() == {"icc_expected": 0.7, "icc_errors": 2.0, "icc_latents": 0}
    assert INDEPENDENT.described()["icc_errors"] is None
