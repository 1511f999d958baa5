from __future__ import annotations

from collections import Counter

import numpy as np

from exegete.evaluators.baselines import (
    CONSTANT,
    firing_tokens,
    floor_subset,
    shuffled_partners,
    token_overlap_siblings,
)
from exegete.evaluators.typing import Scored, benjamini_hochberg, input_types, significant
from exegete.tools.predicates import parse

from planted import cat_evidence


def test_shuffled_partners_are_others_each_used_once() -> None:
    partners = shuffled_partners(list(range(50)), seed=1)
    assert sorted(partners) == sorted(partners.values()) == list(range(50))
    assert all(latent != partner for latent, partner in partners.items())
    assert partners == shuffled_partners(list(range(50)), seed=1) != shuffled_partners(list(range(50)), seed=2)
    assert shuffled_partners([3], seed=0) == {}


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
    assert token_overlap_siblings(tokens, [1, 2, 3]) == {1: 4, 2: 1}


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
    types = input_types({"detection": [*noise, Scored(5000, 0.95, 0.88)]}, {"detection": floor})
    assert types[5000] == "input" and types[0] == "unexplained"


def test_without_floors_nothing_is_explained() -> None:
    assert input_types({"detection": [Scored(1, 0.99, 0.95)]}, {}) == {1: "unexplained"}
