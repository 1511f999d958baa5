"""What is extrapolated from a few latents, against arithmetic by hand and against what then comes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from exegete.agent.estimating import Extent, Pace, Sample, Stratum, again_to_do, estimate
from exegete.agent.metering import Totals

FREE = Pace(latents=4, calls=8)


def sample(calls: float, scoring: float = 0.0, seconds: float = 0.0) -> Sample:
    """Each call takes 100 tokens in, 10 out, 0.001 USD and 2 seconds."""

    def totals(count: float) -> Totals:
        return Totals(count, 100 * count, 10 * count, 0.001 * count, 2 * count, 50 * count)

    return Sample(totals(calls), totals(scoring), seconds)


def stratum(left: int, *calls: float) -> Stratum:
    return Stratum(left, [sample(one) for one in calls])


def test_by_hand() -> None:
    found = estimate([stratum(8, 1, 3)], Extent(), FREE)
    # Mean 2, variance 2. The sum of 8 more: 8 · 2, with the variance 8² · 2 / 2 of eight times the mean and 8 · 2 of the rest:
    # 80. Student's t with one degree of freedom: 12.706.
    half = 12.7062 * math.sqrt(80)
    assert found.calls.value == 16 and found.calls.n == 2
    assert found.calls.low == 0 and found.calls.high == pytest.approx(16 + half, rel=1e-4)
    assert (
        found.usd.value == pytest.approx(0.016)
        and found.input_tokens.value == 1_600
        and found.output_tokens.value == 160
    )
    assert found.usd.high == pytest.approx(0.001 * (16 + half), rel=1e-4)


def test_floors_and_control_by_hand() -> None:
    one = sample(5, scoring=4)
    found = estimate([Stratum(10, [one, one, one])], Extent(floors=3, control=2), FREE)
    # Ten latents and two of the control at 5 calls, four floors on each of three latents at 4, of which two may fall away.
    assert (found.calls.low, found.calls.value, found.calls.high) == (60 + 24, 60 + 48, 60 + 48)


def test_floors_fall_on_either_stratum_with_its_own_counts() -> None:
    thorough, night = (Stratum(left, [sample(0, scoring=calls)] * 2) for left, calls in ((10, 80), (30, 8)))
    # Of 8 latents with floors 2 are thorough: four floors on each, at 80 calls, and at 8 on the 6 others.
    assert estimate([thorough, night], Extent(floors=8), FREE).calls.value == 4 * (2 * 80 + 6 * 8)


def test_a_control_subset_that_climbs_every_rung_counts_twice() -> None:
    assert estimate([stratum(10, 5, 5)], Extent(climbs=4), FREE).calls.value == 5 * (10 + 2 * 4)


def test_strata_add_up_by_hand() -> None:
    found = estimate([stratum(2, 10, 10, 10), stratum(100, 1, 2, 3)], Extent(floors=0), FREE)
    assert found.calls.value == 20 + 200 and found.calls.n == 6 and list(found.strata) == [2, 100]
    # Only the second varies: variance 1, 100² / 3 + 100; two degrees of freedom: 4.3027.
    assert found.calls.high == pytest.approx(220 + 4.3027 * math.sqrt(1e4 / 3 + 100), rel=1e-4)


def test_one_latent_gives_no_interval_and_none_left_takes_nothing() -> None:
    alone = estimate([stratum(5, 2)], Extent(), FREE)
    assert (alone.calls.value, alone.calls.low, alone.calls.high) == (10, 0, math.inf)
    done = estimate([stratum(0, 2)], Extent(), FREE)
    assert (done.calls.value, done.calls.low, done.calls.high, done.hours.value) == (0, 0, 0, 0)


def test_samples_that_no_journal_keeps_are_to_be_done_again() -> None:
    (again,) = again_to_do([stratum(5, 2, 2, 2)])
    assert estimate([again], Extent(), FREE).calls.value == 16


@pytest.mark.parametrize(
    ("pace", "hours", "bound_by"),
    [
        # 100 latents at 3 calls of 2 seconds each, 6 seconds a latent.
        (Pace(latents=10, calls=1_000), 60 / 3600, "10 latents in flight"),
        (Pace(latents=1_000, calls=5), 120 / 3600, "5 calls in flight"),
        (Pace(1_000, 1_000, requests_per_minute=100), 3 / 60, "requests per minute"),
        (Pace(1_000, 1_000, tokens_per_minute=1_100), 30 / 60, "tokens per minute"),
        (Pace(1_000, 1_000, cpu_s=36), 1, "this machine"),
    ],
)
def test_the_slowest_limit_is_the_time_by_hand(pace: Pace, hours: float, bound_by: str) -> None:
    found = estimate([Stratum(100, [sample(3, seconds=6)] * 2)], Extent(), pace)
    assert found.hours.value == pytest.approx(hours) and found.bound_by == bound_by


def covered(population: Sequence[float], drawn: int, rng: np.random.Generator) -> bool:
    order = rng.permutation(len(population))
    inside, rest = [population[i] for i in order[:drawn]], [population[i] for i in order[drawn:]]
    found = estimate([stratum(len(rest), *inside)], Extent(), FREE).calls
    return bool(found.low <= sum(rest) <= found.high)


@pytest.mark.parametrize(("size", "drawn"), [(24, 12), (500, 12)])
def test_the_interval_holds_what_then_comes(size: int, drawn: int) -> None:
    rng = np.random.default_rng(0)
    held = [covered(rng.normal(20, 5, size).tolist(), drawn, rng) for _ in range(400)]
    # 95 % of 400, give or take three standard errors.
    assert 0.917 <= np.mean(held) <= 0.983
