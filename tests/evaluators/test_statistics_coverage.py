"""Do 95 % intervals cover? Judges of a known error rate; every case is measured at length by `benchmarks.intervals`."""

from __future__ import annotations

import numpy as np
import pytest

from exegete.evaluators import statistics as s
from exegete.evaluators.clustering import CAUTIOUS, Clustering, Table, pooled

PROMPTS = np.repeat(np.arange(40), 5)
LATENTS = 1000


def table(rng: np.random.Generator, error: float, together: float) -> Table:
    """200 items in prompts of five; with probability `together` a prompt errs as one."""
    truth = rng.permutation(np.repeat([True, False], 100))
    as_one = (rng.random(40) < together)[PROMPTS]
    wrong = np.where(as_one, (rng.random(40) < error)[PROMPTS], rng.random(200) < error)
    return Table(truth, truth ^ wrong, PROMPTS)


@pytest.mark.parametrize("piloted", [True, False])
@pytest.mark.parametrize("together", [0.0, 1 / 3, 1.0])
@pytest.mark.parametrize("error", [0.05, 0.1, 0.2])
def test_balanced_accuracy_and_f1_intervals_cover(error: float, together: float, piloted: bool) -> None:
    rng = np.random.default_rng(7)
    expected: Clustering = pooled(table(rng, error, together) for _ in range(50)) if piloted else CAUTIOUS
    balanced = f1 = 0
    for _ in range(LATENTS):
        shown = table(rng, error, together)
        balanced += covers(s.balanced_accuracy(*shown, expected), 1 - error)
        f1 += covers(s.f1(*shown, expected), 1 - error)
    # 93 to 97 % is asked of 1,000 latents; a share of 0.95 has a standard error of 0.7 points of its own.
    assert 925 <= balanced <= 977, balanced
    assert f1 >= 925, f1


def test_without_errors_intervals_cover_with_a_width() -> None:
    shown = table(np.random.default_rng(0), 0.0, 0.0)
    for found in (s.balanced_accuracy(*shown), s.f1(*shown)):
        assert found.value == found.high == 1.0 and found.low is not None and 0.85 < found.low < 0.99


@pytest.mark.parametrize("together", [0.0, 1.0])
def test_areas_cover(together: float) -> None:
    """Normal scores two standard deviations apart: AUROC = Φ(2/√2) = 0.92135."""
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        truth = rng.permutation(np.repeat([True, False], 100))
        as_one = (rng.random(40) < together)[PROMPTS]
        noise = np.where(as_one, rng.standard_normal(40)[PROMPTS], rng.standard_normal(200))
        found = s.area("auroc", truth, (1 + noise) * np.where(truth, 1, -1), PROMPTS)
        covered += covers(found, 0.92135)
    assert covered >= 276, covered


def covers(found: s.Interval, truth: float) -> bool:
    assert found.low is not None and found.high is not None
    return found.low <= truth + 1e-12 and truth - 1e-12 <= found.high
