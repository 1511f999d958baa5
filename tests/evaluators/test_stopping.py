from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from exegete.evaluators import Evaluation, Item, Score, Verdict, make_judge
from exegete.evaluators.clustering import CAUTIOUS, INDEPENDENT, Clustering
from exegete.evaluators.contract import Task
from exegete.evaluators.detection import Detection
from exegete.evaluators.fuzzing import Fuzzing
from exegete.evaluators.scoring import outcomes, pilot_clustering, scores
from exegete.evaluators.stopping import (
    BOUND,
    FRACTIONS,
    SHARES,
    ConfidenceSequence,
    Stopping,
    balanced_order,
    balanced_outcome,
)
from exegete.tools.errors import UserError
from exegete.tools.explainers import Explanation
from exegete.tools.seeds import generator

from planted import cat_evidence

CAT = Explanation("the word cat", predicate='token is " cat"')


class Erring:
    """Judges by the predicate and errs with probability `rate`, by the seed of the prompt; may answer out of order."""

    name = "erring"

    def __init__(self, rate: float, slow: bool = False, failing: int | None = None) -> None:
        self.rate, self.slow, self.failing = rate, slow, failing
        self.asked = 0

    async def judge(self, task: Task, explanation: Explanation, items: Sequence[Item], seed: int) -> list[Verdict]:
        self.asked += 1
        rng = generator(seed, "errors")
        if self.slow:
            for _ in range(int(rng.integers(20))):
                await asyncio.sleep(0)
        right = await make_judge("predicate").judge(task, explanation, items, seed)
        if self.failing is not None and self.asked % self.failing == 0:
            return [Verdict(None, status="unparsed") for _ in items]
        flips = generator(seed, "errors").random(len(items)) < self.rate
        return [Verdict(bool(v.applies) ^ bool(flip), 0.5 + 0.4 * (1 if v.applies ^ flip else -1))
                for v, flip in zip(right, flips, strict=True)]  # fmt: skip


def metric(evaluation: Evaluation, name: str = "balanced_accuracy") -> Score:
    return next(score for score in evaluation.scores if score.metric == name)


def detect(judge: Any, stopping: Stopping | None = None, items: int = 100, seed: int = 0) -> Evaluation:
    detection = Detection(stopping=stopping)
    return asyncio.run(detection.evaluate(CAT, cat_evidence(items, items), judge, seed))


def test_wealth_of_a_hand_worked_gambler() -> None:
    """Outcomes of 1 multiply wealth on "above m" by 1 + c (1/m − 1): at m = 0.75 by 1.33 for the boldest."""
    sequence = ConfidenceSequence(target=0.75)

    def wealth(n: int) -> float:
        return float((SHARES * (1 + FRACTIONS / 3) ** n).sum())

    needed = next(n for n in range(1, 100) if wealth(n) >= 2 / 0.05)
    sequence.update([1.0] * (needed - 1))
    assert not sequence.stopped and sequence.low < 0.75
    low, high = sequence.update([1.0])
    assert sequence.stopped and 0.75 <= low < 0.8 and high == 1.0 and sequence.n == needed == 15


def test_a_mirrored_game_gives_a_mirrored_interval() -> None:
    rng = np.random.default_rng(0)
    shown = rng.random(30).tolist()
    low, high = ConfidenceSequence(target=0.5).update(shown)
    mirrored = ConfidenceSequence(target=0.5).update([1 - x for x in shown])
    assert mirrored == pytest.approx((1 - high, 1 - low)) and 0 < low < 0.5 < high < 1


def test_one_at_a_time_and_all_at_once_are_the_same_and_never_widen() -> None:
    shown = np.random.default_rng(1).random(40).tolist()
    single, whole = ConfidenceSequence(), ConfidenceSequence()
    limits = [single.update([x]) for x in shown]
    assert whole.update(shown) == limits[-1]
    assert all(a[0] <= b[0] and a[1] >= b[1] for a, b in pairwise(limits))


def test_the_interval_holds_at_all_times_at_once() -> None:
    """1,000 sequences of whole prompts right or wrong together, looked at after each of 60: at most 5 % ever miss."""
    rng = np.random.default_rng(2)
    missed = 0
    for _ in range(1000):
        low, high = ConfidenceSequence().update((rng.random(60) < 0.75).astype(float).tolist())
        missed += not low <= 0.75 <= high  # What was excluded stays so: the last limits tell of all.
    assert missed <= 50, missed


def test_it_covers_at_the_stopping_time_and_saves_a_third() -> None:
    """True rates 0.95, 0.75 and 0.5 for 30, 40 and 30 % of 500 latents; at most 40 prompts of five, two at a time."""
    rng = np.random.default_rng(3)
    covered = asked = 0
    for number in range(500):
        rate = (0.95, 0.95, 0.95, 0.75, 0.75, 0.75, 0.75, 0.5, 0.5, 0.5)[number % 10]
        right = rng.random((40, 5)) < rate
        sequence = ConfidenceSequence(0.75)
        while sequence.n < 40 and not sequence.stopped:
            sequence.update([(x[:2].mean() + x[2:].mean()) / 2 for x in right[sequence.n : sequence.n + 2]])
        covered += sequence.low <= rate <= sequence.high
        asked += sequence.n
    assert covered >= 475, covered
    assert 1 - asked / (500 * 40) >= 0.35, asked


def test_outcomes_that_are_no_shares_are_refused() -> None:
    for wrong in (math.nan, 1.2, -0.1):
        with pytest.raises(UserError, match="expected a number from 0 to 1"):
            ConfidenceSequence().update([wrong])


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="stopping target="):
        Stopping(target=1.0)
    with pytest.raises(UserError, match="prompts_per_round=0"):
        Stopping(prompts_per_round=0)


def test_the_outcome_of_a_prompt_is_its_balanced_accuracy() -> None:
    truth, right = np.array([1, 1, 0, 0, 0], dtype=np.bool_), np.array([1, 0, 1, 1, 0], dtype=np.bool_)
    assert balanced_outcome(truth, right) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert balanced_outcome(truth[:2], right[:2]) is None


def test_prompts_hold_both_classes_in_proportion_and_every_item_once() -> None:
    truth = [True] * 100 + [False] * 100
    prompts = balanced_order(truth, 5, np.random.default_rng(0))
    assert sorted(i for prompt in prompts for i in prompt) == list(range(200))
    assert [sum(truth[i] for i in prompt) for prompt in prompts] == [2, 3] * 20
    uneven = balanced_order([True] * 30 + [False] * 12, 5, np.random.default_rng(0))
    assert {sum(i >= 30 for i in prompt) for prompt in uneven[:-1]} <= {1, 2}
    assert [len(prompt) for prompt in uneven] == [5] * 8 + [2]


def test_asking_stops_once_the_target_is_excluded_and_says_so() -> None:
    judge = Erring(0.0)
    evaluation = detect(judge, Stopping())
    score = metric(evaluation)
    assert judge.asked == score.parameters["prompts_asked"] == 16
    assert score.parameters["prompts_planned"] == 40 and score.parameters["stopped"] is True
    assert score.parameters["bound"] == BOUND and score.parameters["target"] == 0.75
    assert (score.value, score.high, score.n) == (1.0, 1.0, 80) and score.low is not None and 0.75 <= score.low < 0.8
    assert len(evaluation.verdicts) == 80


def test_an_undecided_latent_is_asked_to_the_end() -> None:
    judge = Erring(0.25)
    score = metric(detect(judge, Stopping()))
    assert judge.asked == 40 and score.parameters["stopped"] is False
    assert score.low is not None and score.high is not None and score.low < 0.75 < score.high


def test_stopping_is_off_by_default_and_leaves_no_trace() -> None:
    judge = Erring(0.0)
    score = metric(detect(judge))
    assert judge.asked == 40 and "bound" not in score.parameters and score.parameters["icc_expected"] == 0.7


def test_other_metrics_hold_under_stopping_or_have_no_interval() -> None:
    evaluation = detect(Erring(0.05), Stopping())
    for name in ("tpr", "tnr", "f1"):
        score = metric(evaluation, name)
        assert score.value is not None and score.low is not None and score.high is not None
        assert score.low < score.value <= score.high
    area = metric(evaluation, "auroc")
    assert area.value is not None and (area.low, area.high) == (None, None)


@pytest.mark.parametrize("per_round", [1, 3])
def test_the_result_does_not_depend_on_which_reply_comes_first(per_round: int) -> None:
    stopping = Stopping(prompts_per_round=per_round)
    quick, slow = detect(Erring(0.1), stopping), detect(Erring(0.1, slow=True), stopping)
    assert quick.scores == slow.scores and order(quick) == order(slow)
    assert order(quick) != order(detect(Erring(0.1), stopping, seed=1))


def test_failed_prompts_are_passed_over_and_counted() -> None:
    judge = Erring(0.0, failing=2)
    score = metric(detect(judge, Stopping()))
    assert judge.asked == 30 and (score.n, score.failures) == (75, 75)
    nothing = metric(detect(Erring(0.0, failing=1), Stopping()))
    assert (nothing.value, nothing.status, nothing.failures) == (None, "unparsed", 200)


def test_without_windows_nothing_is_asked() -> None:
    score = metric(detect(Erring(0.0), Stopping(), items=0))
    assert (score.value, score.status, score.parameters["prompts_asked"]) == (None, "no_items", 0)


def test_fuzzing_stops_as_well() -> None:
    judge = Erring(0.0)
    asyncio.run(Fuzzing(stopping=Stopping()).evaluate(CAT, cat_evidence(100, 100), judge, 0))
    assert judge.asked == 16


def test_scores_can_be_taken_again_from_verdicts_with_a_pilots_clustering() -> None:
    pilot = [detect(Erring(0.1), seed=seed).verdicts for seed in range(20)]
    found = pilot_clustering(pilot)
    assert found.latents == 20 and found.balanced < 0.1
    judged = detect(Erring(0.1)).verdicts
    cautious, piloted = (scores("detection", judged, {}, expected)[0] for expected in (CAUTIOUS, found))
    assert cautious.value == piloted.value
    assert width(piloted) < width(cautious) and piloted.parameters["icc_latents"] == 20


def test_a_judge_that_reads_each_item_alone_has_independent_errors() -> None:
    score = metric(detect(make_judge("predicate")))
    assert {key: score.parameters[key] for key in INDEPENDENT.described()} == INDEPENDENT.described()
    given = asyncio.run(
        Detection(clustering=Clustering(0.5, 0.5, 0.5, 2.0)).evaluate(CAT, cat_evidence(), make_judge("predicate"), 0)
    )
    assert metric(given).parameters["icc_expected"] == 0.5


def test_outcomes_are_those_of_prompts_in_order() -> None:
    assert outcomes(detect(Erring(0.0), Stopping()).verdicts) == [1.0] * 16


@pytest.mark.parametrize("probability", [None, math.nan])
def test_one_verdict_without_a_probability_leaves_no_area(probability: float | None) -> None:
    first, *others = detect(Erring(0.1)).verdicts
    lacking = replace(first, verdict=Verdict(first.verdict.applies, probability))
    areas = [score for score in scores("detection", [lacking, *others], {}) if score.metric in ("auroc", "auprc")]
    assert {(score.value, score.status) for score in areas} == {(None, "no_probabilities")}


def order(evaluation: Evaluation) -> list[tuple[int, int]]:
    return [(item.window.id, item.prompt) for item in evaluation.verdicts]


def width(score: Score) -> float:
    assert score.low is not None and score.high is not None
    return score.high - score.low
