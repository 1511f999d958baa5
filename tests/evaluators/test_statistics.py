from __future__ import annotations

import math

import numpy as np
import pytest

from exegete.evaluators import statistics as s
from exegete.evaluators.clustering import INDEPENDENT
from exegete.tools.seeds import generator

AREAS: tuple[s.Area, ...] = ("auroc", "auprc")


def bools(*values: int) -> s.Bools:
    return np.array(values, dtype=np.bool_)


def test_wilson_equals_the_textbook() -> None:
    low, high = s.wilson(8, 10)
    assert (low, high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_wilson_keeps_a_width_at_the_ends() -> None:
    assert s.wilson(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    assert s.wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)


def test_balanced_accuracy_of_a_hand_worked_table() -> None:
    truth, said = bools(1, 1, 1, 1, 0, 0), bools(1, 1, 1, 0, 0, 1)
    found = s.balanced_accuracy(truth, said, np.arange(6), INDEPENDENT)
    assert found.value == pytest.approx((3 / 4 + 1 / 2) / 2)
    tpr, tnr = s.wilson(3, 4), s.wilson(1, 2)
    assert found.low == pytest.approx(0.625 - math.hypot(0.75 - tpr[0], 0.5 - tnr[0]) / 2)
    assert found.high == pytest.approx(0.625 + math.hypot(tpr[1] - 0.75, tnr[1] - 0.5) / 2)


def test_one_class_has_no_balanced_accuracy() -> None:
    assert s.balanced_accuracy(bools(1, 1), bools(1, 0), np.arange(2)) == s.UNDEFINED


def test_f1_auroc_auprc_of_a_hand_worked_table() -> None:
    truth = bools(1, 1, 0, 0)
    assert s.f1(truth, bools(1, 0, 1, 0), np.arange(4)).value == pytest.approx(0.5)
    probabilities = np.array([0.9, 0.4, 0.4, 0.1])
    assert s.auroc(truth, probabilities) == pytest.approx(3.5 / 4)
    assert s.auprc(truth, probabilities) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert s.auroc(bools(1, 1), probabilities[:2]) is None and s.auprc(bools(0, 0), probabilities[:2]) is None


def test_areas_without_each_item_are_those_of_the_rest() -> None:
    truth, probabilities = bools(1, 1, 0, 0), np.array([0.9, 0.4, 0.4, 0.1])
    assert s.auroc_left_out(truth, probabilities)[1] == pytest.approx([0.75, 1.0, 1.0, 0.75])
    assert s.auprc_left_out(truth, probabilities)[1] == pytest.approx([0.5, 1.0, 1.0, 5 / 6])
    assert np.isnan(s.auroc_left_out(bools(1, 0, 0), np.array([0.1, 0.2, 0.3]))[1]).tolist() == [True, False, False]
    rng = np.random.default_rng(4)
    for levels in (4, 1000):
        truth, probabilities = rng.random(30) < 0.4, rng.integers(levels, size=30) / levels
        for metric, left_out in ((s.auroc, s.auroc_left_out), (s.auprc, s.auprc_left_out)):
            rest = [metric(np.delete(truth, i), np.delete(probabilities, i)) for i in range(30)]
            assert left_out(truth, probabilities)[1] == pytest.approx(rest)


def test_f1_interval_is_wilsons_on_the_sample_size_of_its_variance() -> None:
    """TP 3, FN 1, FP 1, TN 3: F1 = 6/8; an item adds (2 TP − F1 (2 TP + FP + FN)) / 8, less its class's mean."""
    truth, said = bools(1, 1, 1, 1, 0, 0, 0, 0), bools(1, 1, 1, 0, 1, 0, 0, 0)
    found = s.f1(truth, said, np.arange(8), INDEPENDENT)
    # Firing: three of 0.5/8 and one of −0.75/8; silent: one of −0.75/8 and three of 0.
    variance = (3 * (0.3125 / 8) ** 2 + (0.9375 / 8) ** 2) + (3 * (0.1875 / 8) ** 2 + (0.5625 / 8) ** 2)
    n = 0.75 * 0.25 / variance
    assert n < 8.0 and found == pytest.approx((0.75, *s.wilson(0.75 * n, n)))


def test_areas_keep_a_width_at_a_perfect_ranking_and_with_a_lone_item() -> None:
    truth = np.repeat([True, False], 10)
    for name in AREAS:
        found = s.area(name, truth, truth.astype(np.float64), np.arange(20) // 5)
        assert found.value == found.high == 1.0 and found.low is not None and 0.3 < found.low < 0.9
    assert s.area("auroc", bools(1, 1), np.array([0.5, 0.5]), np.arange(2)) == s.UNDEFINED
    lone = s.area("auroc", bools(1, 0, 0), np.array([0.5, 0.9, 0.1]), np.arange(3))
    assert lone.value == 0.5 and lone.low is not None and lone.high is not None and lone.low < 0.3 < 0.7 < lone.high


def test_paired_interval_finds_a_constant_gain() -> None:
    rng = np.random.default_rng(3)
    base = rng.random(50)
    found = s.paired_interval(base + 0.1, base, rng)
    assert found == pytest.approx((0.1, 0.1, 0.1))


def test_the_difference_of_two_sets_of_latents() -> None:
    """0.9 − 0.5 without spread; with spread, the normal interval of two means, √(0.04/400 + 0.01/100) = 0.0141 either side · 1.96."""
    rng = np.random.default_rng(0)
    assert s.difference_interval(np.full(3, 0.9), np.full(2, 0.5), rng) == pytest.approx((0.4, 0.4, 0.4))
    first, second = np.tile([0.9, 0.5], 200), np.tile([0.6, 0.4], 50)
    found = s.difference_interval(first, second, rng)
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.2 - 1.96 * 0.01414, 0.2 + 1.96 * 0.01414), abs=0.002)
    assert s.difference_interval(first, np.array([]), rng).value is None


def test_the_interval_of_many_latents_is_the_bootstraps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of judged windows, bunched and skewed as they are: means to the digit, limits to a few hundredths of the width."""
    scores = generator(0, "scores").beta(8, 3, 5_000).round(1)
    others = generator(0, "others").beta(3, 3, 4_000).round(1)
    exact = [s.mean_interval(scores, generator(1)), s.difference_interval(scores, others, generator(1))]
    monkeypatch.setattr(s, "MANY_LATENTS", 1_000)
    normal = [s.mean_interval(scores, generator(1)), s.difference_interval(scores, others, generator(1))]
    for one, other in zip(exact, normal, strict=True):
        assert one.value == other.value
        assert one.low is not None and one.high is not None
        assert (other.low, other.high) == pytest.approx((one.low, one.high), abs=0.04 * (one.high - one.low))
    assert normal[0].low == pytest.approx(scores.mean() - s.Z_95 * scores.std() / math.sqrt(5_000))
