from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from exegete.evaluators.baselines import (
    CONSTANT,
    firing_tokens,
    floor_subset,
    shuffled_partners,
    token_overlap_siblings,
)
from exegete.evaluators.typing import Scored, bar, benjamini_hochberg, least_controls, significant, types
from exegete.tools.predicates import parse

from planted import cat_evidence


def test_shuffled_partners_are_others_each_used_once() -> None:
    partners = shuffled_partners(list(range(50)), seed=1)
    assert sorted(partners) == sorted(partners.values()) == list(range(50))
    assert all(latent != partner for latent, partner in partners.items())
    assert partners == shuffled_partners(list(range(50)), seed=1) != shuffled_partners(list(range(50)), seed=2)
    assert shuffled_partners([3], seed=0) == {}
    assert shuffled_partners(list(range(50)), 1, wanted=[7, 9]) == {latent: partners[latent] for latent in (7, 9)}


def test_the_floor_subset_is_drawn_by_seed() -> None:
    latents = list(range(0, 1000, 3))
    subset = floor_subset(latents, 100, seed=5)
    assert len(set(subset)) == 100 and set(subset) <= set(latents) and subset == sorted(subset)
    assert floor_subset([4, 9], 100, seed=5) == [4, 9]


def test_the_constant_explanation_applies_everywhere() -> None:
    assert CONSTANT.predicate is not None
    assert parse(CONSTANT.predicate).matches([" a", "b"]).all()


def test_siblings_by_token_overlap() -> None:
    tokens = {1: Counter(cat=3, dog=1), 2: Counter(cat=2), 3: Counter(fish=4), 4: Counter(dog=1, cat=3)}
    own = {latent: tokens[latent] for latent in (1, 2, 3)}
    assert token_overlap_siblings(own, tokens.items()) == {1: 4, 2: 1}
    # 1 and 4 overlap with 2 alike: the lower one it is, whichever comes first.
    assert token_overlap_siblings(own, reversed(tokens.items())) == {1: 4, 2: 1}


def test_firing_tokens_come_from_the_explain_split() -> None:
    assert firing_tokens(cat_evidence(firing=6)) == Counter(cat=6)


def test_benjamini_hochberg_of_a_hand_worked_list() -> None:
    p_values = np.array([0.01, 0.04, 0.03, 0.5])
    assert benjamini_hochberg(p_values, 0.05).tolist() == [True, False, False, False]
    assert benjamini_hochberg(p_values, 0.08).tolist() == [True, True, True, False]


def test_noise_is_not_explained_and_a_clear_latent_is() -> None:
    rng = np.random.default_rng(0)
    floor = (0.5 + 0.05 * rng.standard_normal(100)).tolist()
    noise = [Scored(i, v, v - 0.07) for i, v in enumerate(0.5 + 0.05 * rng.standard_normal(1000))]
    assert significant(noise, floor).mean() <= 0.01
    found = types({"detection": [*noise, Scored(5000, 0.95, 0.88)]}, {"detection": floor})
    assert found[5000] == "input" and found[0] == "unexplained"


FLOOR = [0.40 + 0.01 * i for i in range(20)]  # 0.40 … 0.59: the bar is the ⌈0.95 · 21⌉ = 20th, 0.59.
CLEAR, NOT = Scored(0, 0.9, 0.8), Scored(0, 0.6, 0.5)


def test_the_bar_is_an_order_statistic_that_the_next_score_exceeds_in_one_of_twenty() -> None:
    hundred = [i / 100 for i in range(100)]
    assert bar(hundred) == 0.95  # the ⌈0.95 · 101⌉ = 96th; four of a hundred are above it
    assert bar(hundred[:19]) == 0.18  # the 19th of 19
    assert bar(hundred[:39]) == 0.37  # the 38th of 39, though 0.95 · 40 rounds to a little more or less in binary
    assert bar([0.3, 0.1, 0.2]) == 0.3  # too few for a percentile: the largest
    assert bar([0.3, math.nan, math.inf]) == 0.3
    assert bar([]) == bar([math.nan]) == math.inf


def test_one_more_score_exceeds_the_bar_in_at_most_five_percent() -> None:
    rng = np.random.default_rng(1)
    exceeding = [float(rng.random()) > bar(rng.random(40)) for _ in range(4000)]
    assert np.mean(exceeding) == pytest.approx(2 / 41, abs=0.01)  # the 39th of 40: two of the 41 places are above it


@pytest.mark.parametrize(
    ("detection", "fuzzing", "intervention", "expected"),
    [
        (CLEAR, NOT, NOT, "input"),
        (NOT, CLEAR, NOT, "input"),
        (NOT, NOT, CLEAR, "output"),
        (CLEAR, CLEAR, CLEAR, "both"),
        (NOT, CLEAR, CLEAR, "both"),
        (NOT, NOT, NOT, "unexplained"),
    ],
)
def test_the_four_types(detection: Scored, fuzzing: Scored, intervention: Scored, expected: str) -> None:
    scores = {"detection": [detection], "fuzzing": [fuzzing], "intervention": [intervention]}
    assert types(scores, dict.fromkeys(scores, FLOOR)) == {0: expected}


def test_a_latent_that_one_side_alone_measured_is_typed_by_it() -> None:
    scores = {"detection": [Scored(1, 0.9, 0.8), Scored(3, 0.5, 0.4)], "intervention": [Scored(2, 0.9, 0.8)]}
    assert types(scores, dict.fromkeys(scores, FLOOR)) == {1: "input", 2: "output", 3: "unexplained"}


def test_without_an_output_side_latents_are_input_or_unexplained() -> None:
    scores = {"detection": [Scored(1, 0.9, 0.8), Scored(2, 0.5, 0.4)]}
    assert types(scores, {"detection": FLOOR}) == {1: "input", 2: "unexplained"}


def test_information_in_nats_is_held_against_floors_in_nats() -> None:
    nats = [-2.0 + 0.1 * i for i in range(20)]  # -2.0 … -0.1
    scores = {"intervention": [Scored(1, 0.6, 0.1), Scored(2, -0.05, -0.3)]}
    assert types(scores, {"intervention": nats}) == {1: "output", 2: "unexplained"}


def test_evaluators_that_speak_for_no_side_decide_nothing() -> None:
    scores = {"embedding": [Scored(1, 0.99, 0.95)]}
    assert types(scores, {"embedding": FLOOR}) == {}
    assert types(scores, {"embedding": FLOOR}, input_side=["embedding"]) == {1: "input"}


def test_missing_figures() -> None:
    rows = [Scored(1, None, None), Scored(2, math.nan, math.nan), Scored(3, 0.9, None), Scored(4, 0.9, math.nan)]
    types_of = types({"detection": [*rows, Scored(5, 0.9, 0.8)]}, {"detection": FLOOR})
    assert types_of == {3: "unexplained", 4: "unexplained", 5: "input"}


def test_a_tie_with_the_bar_is_not_above_it() -> None:
    height = bar(FLOOR)
    at_bar = [Scored(1, height, height), Scored(2, 0.9, height)]
    assert significant(at_bar, FLOOR).tolist() == [False, False]
    assert significant([Scored(1, 0.9, math.nextafter(height, 1))], FLOOR).tolist() == [True]


def test_false_discoveries_are_held_over_latents() -> None:
    """0.69 with low 0.591 is 1.98 errors above the bar of 0.59: p = 0.024, a discovery alone and not among a hundred."""
    close = Scored(0, 0.69, 0.591)
    noise = [Scored(i, 0.5, 0.4) for i in range(1, 100)]
    assert significant([close], FLOOR).tolist() == [True]
    assert not significant([close, *noise], FLOOR).any()


def test_the_highest_bar_counts() -> None:
    scores = {"detection": [Scored(1, 0.9, 0.8), Scored(2, 0.75, 0.7)]}
    floors, control = {"detection": FLOOR}, {"detection": [value + 0.15 for value in FLOOR]}  # bars of 0.59 and 0.74
    assert types(scores, floors) == {1: "input", 2: "input"}
    assert types(scores, floors, controls=[control]) == types(scores, control, controls=[floors])
    assert types(scores, floors, controls=[control]) == {1: "input", 2: "unexplained"}
    assert types(scores, floors, controls=[{"fuzzing": FLOOR}]) == {1: "unexplained", 2: "unexplained"}


def test_a_control_for_one_evaluator_alone() -> None:
    scores = {"detection": [Scored(1, 0.9, 0.8)], "intervention": [Scored(1, 0.9, 0.8)]}
    floors = dict.fromkeys(scores, FLOOR)
    assert types(scores, floors, controls=[{**floors, "intervention": [0.85]}]) == {1: "input"}


def test_controls_are_held_over_all_evaluators_that_decide() -> None:
    """Of 39 scores the bar at 0.95 is the 38th, and at 0.975 (two evaluators) the 39th; at 0.9833 59 have it at the 59th."""
    control = [i / 100 for i in range(39)]
    assert (bar(control), bar(control, 0.975)) == (0.37, 0.38)
    assert bar([i / 100 for i in range(79)], 0.975) == 0.77  # the 78th of 79
    between = [Scored(1, 0.9, 0.375)]
    low, both = {"detection": [0.1] * 19, "fuzzing": [0.1] * 19}, {"detection": control, "fuzzing": control}
    assert types({"detection": between}, low, controls=[both]) == {1: "input"}
    assert types({"detection": between, "fuzzing": between}, low, controls=[both]) == {1: "unexplained"}
    # What speaks for no side, or has no figure, decides nothing and costs nothing.
    silent = {"detection": between, "embedding": between, "fuzzing": [Scored(1, None, None)]}
    assert types(silent, low, controls=[both]) == {1: "input"}


def test_how_many_controls_a_bar_takes() -> None:
    assert [least_controls(evaluators) for evaluators in (1, 2, 3)] == [19, 39, 59]
    for evaluators in (1, 2, 3):
        least, level = least_controls(evaluators), 1 - 0.05 / evaluators
        assert (
            level * (least + 1) <= least + 1e-9 < level * least + 1
        )  # with one fewer, the place would lie beyond the last


def test_two_evaluators_together_type_at_most_five_percent_of_latents_like_the_control() -> None:
    rng = np.random.default_rng(3)
    names, shares = ("detection", "fuzzing"), []
    for _ in range(100):
        control = {name: rng.random(79).tolist() for name in names}
        scores = {name: [Scored(i, v, v - 1e-6) for i, v in enumerate(rng.random(200).tolist())] for name in names}
        found = types(scores, dict.fromkeys(names, [-1.0] * 19), controls=[control])
        shares.append(np.mean([one == "input" for one in found.values()]))
    assert 0.035 < np.mean(shares) <= 0.05  # 2 · 2/80 less what both exceed; each at 0.95 would give 0.098


def test_latents_like_the_control_are_explained_in_at_most_five_percent() -> None:
    rng = np.random.default_rng(2)
    control, like_it = (0.75 + 0.1 * rng.standard_normal(n) for n in (200, 2000))
    scores = {"detection": [Scored(i, v, v - 0.02) for i, v in enumerate(like_it.tolist())]}
    shuffled = {"detection": FLOOR}
    found = types(scores, shuffled, controls=[{"detection": control.tolist()}])
    assert sum(one == "input" for one in types(scores, shuffled).values()) > 1500
    assert 0 < sum(one == "input" for one in found.values()) <= 100


def test_without_floors_nothing_is_explained() -> None:
    assert types({"detection": [Scored(1, 0.99, 0.95)]}, {}) == {1: "unexplained"}
    assert types({"detection": [Scored(1, 0.99, 0.95)]}, {"detection": []}) == {1: "unexplained"}
    assert types({}, {}) == {} and significant([], FLOOR).tolist() == []
