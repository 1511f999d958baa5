"""Random sets, drawn without sorting the dictionary again for each: the same ones as by the rule as it is worded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from exegete.tools.ablation_sets import random_sets
from exegete.tools.seeds import generator

Floats = NDArray[np.float64]


def by_sorting(latents: Sequence[int], rates: Floats, number: int, seed: int, nearest: int) -> tuple[int, ...]:
    """The rule: for each latent, the most frequent first, one of the nearest of all that are still free."""
    outside = np.setdiff1d(np.flatnonzero(rates > 0), latents)
    level = np.log(np.maximum(rates, rates[outside].min() / 2))
    rng, free, drawn = generator(seed, "random set", number, *latents), outside, []
    for latent in sorted(latents, key=lambda latent: (-rates[latent], latent)):
        near = np.argsort(np.abs(level[free] - level[latent]), kind="stable")[:nearest]
        chosen = near[rng.integers(len(near))]
        drawn.append(int(free[chosen]))
        free = np.delete(free, chosen)
    return tuple(drawn)


@pytest.mark.parametrize("steps", [4, 30, 10_000])
@pytest.mark.parametrize("size", [1, 2, 7, 19])
def test_sets_are_those_that_sorting_everything_draws(steps: int, size: int) -> None:
    rng = np.random.Generator(np.random.PCG64(steps + size))
    # Few steps make many latents fire equally often, and some of them never.
    rates = rng.integers(0, steps, 60) / steps
    latents = [int(one) for one in rng.permutation(60)[:size]]
    assert random_sets(latents, rates, 6, seed=5) == [by_sorting(latents, rates, i, 5, 10) for i in range(6)]
    if size > 1:
        # 10 × 30 sets of two latents ask for 18 neighbours of each, of more latents for 10.
        nearest = 18 if size == 2 else 10
        drawn = [by_sorting(latents, rates, i, 5, nearest) for i in range(120)]
        expected = [one for i, one in enumerate(drawn) if frozenset(one) not in map(frozenset, drawn[:i])]
        assert random_sets(latents, rates, 30, seed=5, distinct=True) == expected[:30]


def test_all_that_there_are_may_be_drawn() -> None:
    rates = np.array([0.5, 0.1, 0.0, 0.2, 0.2])
    assert random_sets([0, 1], rates, 3, seed=1) == [by_sorting([0, 1], rates, i, 1, 10) for i in range(3)]
    assert random_sets([0, 1, 3], rates, 3, seed=1) == []
    assert random_sets([0], rates, 0, seed=1, distinct=True) == []
