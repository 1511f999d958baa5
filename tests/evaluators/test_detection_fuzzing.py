from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from exegete.evaluators import Item, Score, Verdict, evaluator, evaluator_names, make_evaluator, make_judge
from exegete.evaluators.contract import Evaluation, Task
from exegete.evaluators.detection import Detection, evenly
from exegete.evaluators.fuzzing import Fuzzing
from exegete.tools.errors import SealedSplitError, UserError
from exegete.tools.evidence import restrict
from exegete.tools.explainers import Explanation
from exegete.tools.windows import LatentEvidence

from planted import cat_evidence, window

CAT = Explanation("the word cat", predicate='token is " cat"')


class Scripted:
    """Answers with what a function says of each item, and keeps what it was shown."""

    name = "scripted"

    def __init__(self, answer: object = True) -> None:
        self.answer = answer
        self.prompts: list[Sequence[Item]] = []

    async def judge(self, task: Task, explanation: Explanation, items: Sequence[Item], seed: int) -> list[Verdict]:
        self.prompts.append(items)
        if isinstance(self.answer, Verdict):
            return [self.answer for _ in items]
        return [Verdict(bool(self.answer)) for _ in items]


def metric(evaluation: Evaluation, name: str) -> Score:
    return next(score for score in evaluation.scores if score.metric == name)


def test_detection_with_the_true_predicate_is_perfect_and_has_a_width() -> None:
    evaluation = asyncio.run(Detection().evaluate(CAT, cat_evidence(), make_judge("predicate"), 0))
    score = metric(evaluation, "balanced_accuracy")
    assert (score.value, score.high, score.n, score.failures) == (1.0, 1.0, 40, 0)
    assert score.low is not None and 0.85 < score.low < 1.0
    assert metric(evaluation, "auroc").value is None and metric(evaluation, "auroc").status == "no_probabilities"
    assert len(evaluation.verdicts) == 40


def test_detection_uses_the_test_split_only_and_five_windows_a_prompt() -> None:
    judge = Scripted()
    evaluation = asyncio.run(Detection().evaluate(CAT, cat_evidence(), judge, 0))
    assert {item.window.split for item in evaluation.verdicts} == {"test"}
    assert [len(prompt) for prompt in judge.prompts] == [5] * 8
    assert all(item.marks is None for prompt in judge.prompts for item in prompt)
    mixed = sum(0 < sum(" cat" in item.tokens for item in prompt) < 5 for prompt in judge.prompts)
    assert mixed >= 5


def test_failed_verdicts_are_counted_and_enter_no_metric() -> None:
    judge = Scripted(Verdict(None, status="unparsed"))
    evaluation = asyncio.run(Detection().evaluate(CAT, cat_evidence(), judge, 0))
    score = metric(evaluation, "balanced_accuracy")
    assert (score.value, score.n, score.failures, score.status) == (None, 0, 40, "unparsed")


def test_no_test_windows_is_a_score_without_value() -> None:
    evaluation = asyncio.run(Detection().evaluate(CAT, LatentEvidence(1, "live", ()), Scripted(), 0))
    assert {(score.value, score.status) for score in evaluation.scores} == {(None, "no_items")}


def test_a_sealed_test_split_cannot_be_scored() -> None:
    with pytest.raises(SealedSplitError, match="'test'"):
        asyncio.run(Detection().evaluate(CAT, restrict(cat_evidence(), "explain"), Scripted(), 0))


def test_fuzzing_negatives_are_marked_where_positives_are() -> None:
    judge = Scripted()
    evaluation = asyncio.run(Fuzzing().evaluate(CAT, cat_evidence(), judge, 0))
    assert {(item.truth, item.marks) for item in evaluation.verdicts} == {(True, (2,)), (False, (2,))}


def test_fuzzing_misplaced_marks_non_firing_tokens_of_firing_windows() -> None:
    evaluation = asyncio.run(Fuzzing(negatives="misplaced").evaluate(CAT, cat_evidence(), make_judge("predicate"), 0))
    false = [item for item in evaluation.verdicts if not item.truth]
    assert len(false) == 20
    assert all(item.window.fires and item.marks and 2 not in item.marks for item in false)
    assert metric(evaluation, "balanced_accuracy").value == 1.0


def test_imported_marked_windows_are_fuzzing_items_as_they_stand() -> None:
    marked = [
        replace(window(i, (" a", " cat")), marks=(i % 2,), marks_correct=i % 2 == 1, activations=None, fires=i % 2 == 1)
        for i in range(10)
    ]
    evidence = LatentEvidence(3, "live", (*cat_evidence().windows, *marked))
    fuzzing = asyncio.run(Fuzzing().evaluate(CAT, evidence, make_judge("predicate"), 0))
    detection = asyncio.run(Detection().evaluate(CAT, evidence, make_judge("predicate"), 0))
    assert metric(fuzzing, "balanced_accuracy").n == 10 and metric(fuzzing, "balanced_accuracy").value == 1.0
    assert metric(detection, "balanced_accuracy").n == 40


def test_the_same_seed_gives_the_same_evaluation_and_another_one_another_order() -> None:
    def order(seed: int) -> list[int]:
        evaluation = asyncio.run(Detection().evaluate(CAT, cat_evidence(), Scripted(), seed))
        return [item.window.id for item in evaluation.verdicts]

    assert order(1) == order(1) != order(2)


def test_evenly_keeps_every_stratum() -> None:
    chosen = evenly([w for w in cat_evidence().select("test") if w.fires], 10)
    assert sorted(w.stratum or 0 for w in chosen) == list(range(10))


def test_marks_of_several_tokens_are_drawn_in_the_positives_number() -> None:
    windows = [window(i, (" cat", " cat", " x", " y", " z")) for i in range(10)]
    windows += [window(10 + i, (" a", " b", " c", " d", " e")) for i in range(10)]
    evaluation = asyncio.run(Fuzzing().evaluate(CAT, LatentEvidence(1, "live", tuple(windows)), Scripted(), 0))
    assert {item.marks for item in evaluation.verdicts if not item.truth} == {(0, 1)}


def test_registries_name_what_there_is() -> None:
    assert {"detection", "fuzzing"} <= set(evaluator_names())
    with pytest.raises(UserError, match="Did you mean 'detection'"):
        make_evaluator("detecton")
    with pytest.raises(ValueError, match="registered already"):
        evaluator("detection")(Detection)


def test_verdicts_hold_the_truth_and_items_do_not() -> None:
    assert set(Item.__slots__) == {"tokens", "marks"}
    assert np.all(
        [hasattr(v, "truth") for v in asyncio.run(Detection().evaluate(CAT, cat_evidence(), Scripted(), 0)).verdicts]
    )
