"""The score on the refine split: its value, an interval that covers, and what an improvement is measured against."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from exegete.evaluators import make_judge
from exegete.evaluators.clustering import CAUTIOUS, INDEPENDENT
from exegete.evaluators.contract import Item, JudgedItem, Task, Verdict
from exegete.evaluators.refine_score import EXPECTED, Refined, RefineScore, correlation, dependent_mean, noise, stretch
from exegete.evaluators.statistics import UNDEFINED, Interval, balanced_accuracy
from exegete.tools.errors import SealedSplitError
from exegete.tools.evidence import restrict
from exegete.tools.explainers import Explanation
from exegete.tools.windows import LatentEvidence, Window

from planted import cat_evidence, window

CAT = Explanation("Cats.", 'word is "cat"')


class Wrong:
    """Says yes where the window is not among `missed`; fails where it is among `failed`."""

    name = "wrong"

    def __init__(self, yes: Mapping[str, set[str]]) -> None:
        self.yes = yes

    async def judge(self, task: Task, explanation: Explanation, items: Sequence[Item], seed: int) -> list[Verdict]:
        if task not in self.yes:
            return [Verdict(None, status="refused") for _ in items]
        return [Verdict(item.tokens[1] in self.yes[task]) for item in items]


def judged(score: RefineScore, evidence: LatentEvidence | None = None, seed: int = 0) -> Refined:
    found = restrict(cat_evidence(), "refine") if evidence is None else evidence
    return asyncio.run(score.judged(CAT, found, seed))


def test_value_interval_and_verdicts() -> None:
    score = RefineScore(make_judge("predicate"))
    found = judged(score)
    # All right: each figure is 1 with a lower limit; so is the mean, at no lower a limit than theirs.
    assert (found.value, found.high, found.n) == (1.0, 1.0, 40)
    assert found.low is not None and 0.80 < found.low < 0.95
    assert {name: len(items) for name, items in found.verdicts.items()} == {"detection": 20, "fuzzing": 20}
    assert all(item.window.split == "refine" for items in found.verdicts.values() for item in items)
    assert asyncio.run(score(CAT, restrict(cat_evidence(), "refine"), 0)) == 1.0


def test_a_failed_evaluator_leaves_no_value() -> None:
    found = judged(RefineScore(Wrong({"detection": {" b1"}})))
    assert (found.value, found.low, found.high, found.n) == (None, None, None, 20)
    assert all(item.verdict.status == "refused" for item in found.verdicts["fuzzing"])


def test_without_windows_there_is_no_value() -> None:
    bare = replace(cat_evidence(), windows=())
    assert judged(RefineScore(make_judge("predicate")), bare) == Refined(
        None, None, None, 0, {"detection": (), "fuzzing": ()}
    )


def test_windows_of_one_evaluator_only_score_by_it() -> None:
    silent = [replace(w, activations=None) for w in cat_evidence().windows]  # Unknown positions: nothing can be marked.
    found = judged(RefineScore(make_judge("predicate")), replace(cat_evidence(), windows=tuple(silent)))
    assert found.value == 1.0 and found.n == 20 and found.verdicts["fuzzing"] == ()


def test_the_refine_split_must_be_visible_and_the_test_split_is_not_read() -> None:
    with pytest.raises(SealedSplitError, match="'refine'"):
        judged(RefineScore(make_judge("predicate")), restrict(cat_evidence(), "explain"))
    evidence = cat_evidence()
    sealed = judged(RefineScore(make_judge("predicate")), restrict(evidence, "refine"))
    assert sealed == judged(RefineScore(make_judge("predicate")), evidence)


def test_clustering_is_set_once_a_pilot_has_shown_it() -> None:
    half = {" b0", " b1", " b2", " b3", " b4"}
    score = RefineScore(Wrong({"detection": half, "fuzzing": half}))
    cautious = judged(score)
    assert score.clustering == {}
    score.clustering = {"detection": INDEPENDENT, "fuzzing": INDEPENDENT}
    assert score.clustering == {"detection": INDEPENDENT, "fuzzing": INDEPENDENT}
    independent = judged(score)
    assert cautious.value == independent.value == 0.5
    assert width(independent) < width(cautious)
    score.clustering = {"detection": CAUTIOUS}
    assert score.clustering == {"detection": CAUTIOUS}


def width(found: Refined | Interval) -> float:
    assert found.high is not None and found.low is not None
    return found.high - found.low


def test_the_mean_of_dependent_figures_by_hand() -> None:
    first, second = Interval(0.8, 0.7, 0.85), Interval(0.6, 0.3, 0.8)
    # Distances below 0.1 and 0.3, above 0.05 and 0.2.
    independent = dependent_mean(first, second, 0.0)
    assert independent == pytest.approx((0.7, 0.7 - math.sqrt(0.1) / 2, 0.7 + math.sqrt(0.0425) / 2))
    assert dependent_mean(first, second, 1.0) == pytest.approx((0.7, 0.5, 0.825))
    assert dependent_mean(first, second, 1.0, stretch=1.2) == pytest.approx((0.7, 0.46, 0.85))
    assert dependent_mean(first, UNDEFINED, 0.5) == UNDEFINED
    assert dependent_mean(Interval(0.0, 0.0, 0.2), Interval(1.0, 0.9, 1.0), 0.0) == pytest.approx((0.5, 0.45, 0.6))


def test_student_stretches_small_samples() -> None:
    # t(0.975) is 2.262 with 9 degrees of freedom and 12.706 with one, 1.984 with 99; the normal one 1.960.
    assert [round(stretch(n), 3) for n in (0, 2, 10, 100)] == [6.483, 6.483, 1.154, 1.012]


def items(truth: Sequence[bool], right: Sequence[bool | None], first: int = 0) -> tuple[JudgedItem, ...]:
    return tuple(
        JudgedItem(
            Window(first + n, (" a",), None, fires, "refine", "firing" if fires else "random"), None, fires,
            Verdict(None, status="error") if good is None else Verdict(fires == good), n // 5,
        )
        for n, (fires, good) in enumerate(zip(truth, right, strict=True))
    )  # fmt: skip


TRUTH = [True, False] * 10


def test_the_correlation_is_one_where_the_same_windows_are_wrong() -> None:
    right = [n not in (2, 3, 8, 11) for n in range(20)]
    same = correlation(items(TRUTH, right), items(TRUTH, right))
    # Each class has eight items that add 0.2/20 and two that add -0.8/20: 3.2²/(8·0.2⁴ + 2·0.8⁴)/… = 40/13 errors.
    errors = 2 * (8 * 0.04 + 2 * 0.64) ** 2 / (8 * 0.0016 + 2 * 0.4096)
    assert same == pytest.approx((errors + 0.5 * 2) / (errors + 2))
    apart = correlation(items(TRUTH, right), items(TRUTH, right, first=100))
    assert apart == EXPECTED == correlation(items(TRUTH, right), items(TRUTH, [True] * 20))
    # Verdicts that failed count on neither side; a class without a verdict tells nothing.
    assert correlation(items(TRUTH, [None] * 20), items(TRUTH, right)) == EXPECTED


@pytest.mark.parametrize("together", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("error", [0.05, 0.15, 0.3])
def test_the_interval_of_the_mean_covers(error: float, together: float) -> None:
    """Ten windows of either class; with probability `together` fuzzing errs exactly where detection does."""
    rng = np.random.default_rng(5)
    truth, latents, covered = np.array(TRUTH), 600, 0
    for _ in range(latents):
        wrong = rng.random(20) < error
        again = np.where(rng.random(20) < together, wrong, rng.random(20) < error)
        verdicts = [items(TRUTH, (~one).tolist()) for one in (wrong, again)]
        figures = [balanced_accuracy(truth, truth ^ one, np.arange(20), INDEPENDENT) for one in (wrong, again)]
        mean = dependent_mean(figures[0], figures[1], correlation(*verdicts), stretch(10))
        assert mean.low is not None and mean.high is not None
        covered += mean.low <= 1 - error <= mean.high
    # 92.5 % is all that 20 windows allow at an error of 0.05, and Wilson's own share there (three errors are excluded);
    # a share of 600 has a standard error of a point. Without the stretch, 0.89 to 0.94.
    assert covered >= 0.91 * latents, covered / latents


def test_the_noise_of_an_improvement_by_hand() -> None:
    before = Refined(
        0.0, 0.0, 0.0, 40, {"detection": items(TRUTH, [False] * 20), "fuzzing": items(TRUTH, [False] * 20)}
    )
    right = [n < 2 for n in range(20)]
    one = Refined(0.0, 0.0, 0.0, 40, {"detection": items(TRUTH, right), "fuzzing": items(TRUTH, [False] * 20)})
    # One of ten items of each class is right now: 0.05 each over two classes, and half of that over two evaluators.
    assert noise(before, one) == pytest.approx(math.sqrt(2 * (1 / 20) ** 2) / 2)
    assert noise(before, before) == 0.0
    # Items that only one of them judged, or that failed on both, say nothing.
    failed = Refined(None, None, None, 0, {"detection": items(TRUTH, [None] * 20)})
    assert noise(failed, failed) == 0.0
    assert noise(Refined(0.5, 0.4, 0.6, 0, {"detection": items(TRUTH, right, first=50)}), one) == 0.0


def test_an_improvement_by_one_item_is_within_the_noise_and_by_two_beyond_it() -> None:
    def scored(rights: int) -> Refined:
        truth, right = np.array(TRUTH), np.arange(20) < rights
        value = float(right[truth].mean() + right[~truth].mean()) / 2
        return Refined(value, 0.0, 1.0, 20, {"detection": items(TRUTH, right.tolist())})

    start, one, two = scored(10), scored(11), scored(12)
    assert one.value is not None and two.value is not None and start.value is not None
    assert one.value - start.value <= noise(start, one) + 1e-12
    assert two.value - start.value > noise(start, two)


def test_a_window_is_known_by_its_marks_as_well() -> None:
    marked = replace(items([True], [True])[0], marks=(1,))
    before = Refined(0.0, 0.0, 0.0, 1, {"fuzzing": (replace(items([True], [False])[0], marks=(2,)),)})
    assert noise(before, Refined(1.0, 1.0, 1.0, 1, {"fuzzing": (marked,)})) == 0.0
    assert window(0, (" cat",)).fires
