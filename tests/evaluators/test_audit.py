"""The audit, with judges of which it is known what they can tell."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from exegete.evaluators import Evaluation, Judge, Score, make_evaluator, make_judge
from exegete.evaluators.audit import CHECKS, Case, EvaluatorAudit, audit, relabeled, sanity, separation
from exegete.evaluators.audit_coverage import Population
from exegete.evaluators.audit_evidence import Pool, evidence, fired
from exegete.evaluators.audit_truths import Sense, Truth, corrupted
from exegete.evaluators.contract import Item, Task, Verdict
from exegete.tools.explainers import Explanation
from exegete.tools.seeds import generator
from exegete.tools.windows import LatentEvidence, Split

WORDS = [f"w{n}" for n in range(48)]


class Opposite:
    """Says the opposite of the predicate."""

    name = "opposite"

    def __init__(self) -> None:
        self.judged = make_judge("predicate")

    async def judge(self, task: Task, explanation: Explanation, items: Sequence[Item], seed: int) -> list[Verdict]:
        found = await self.judged.judge(task, explanation, items, seed)
        return [replace(verdict, applies=not verdict.applies) for verdict in found]


class Ignorant:
    """Draws every verdict."""

    name = "ignorant"

    async def judge(self, task: Task, explanation: Explanation, items: Sequence[Item], seed: int) -> list[Verdict]:
        return [Verdict(bool(x < 0.5)) for x in generator(seed, explanation.text).random(len(items))]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Twelve latents, each of four of 48 words."""
    kinds = {n: tuple(WORDS[4 * n : 4 * n + 4]) for n in range(12)}
    truths = {n: Truth(f"kind {n}", (Sense("Words", w, "All", tuple(WORDS)),)) for n, w in kinds.items()}
    rng = generator(0, "text")
    splits: tuple[Split, ...] = ("explain", "test")
    texts = {split: [tuple(f" w{n}" for n in rng.integers(48, size=6_000))] for split in splits}
    pool = Pool(texts, 8)
    found = {n: evidence(n, t, pool, pool.activations(fired(t, texts, 0)), 20, 0) for n, t in truths.items()}
    wrong = corrupted(truths, found, 0)
    return [Case(n, truth.explanation(), wrong[n], found[n], found[n]) for n, truth in truths.items()]


def audited(cases: Sequence[Case], judge: Judge, name: str = "detection") -> EvaluatorAudit:
    return asyncio.run(audit(name, make_evaluator(name, items_per_class=20), cases, judge, 0))


def aurocs(found: EvaluatorAudit, metric: str = "balanced_accuracy") -> dict[str, float | None]:
    (row,) = [one for one in found.metrics if one.metric == metric]
    return {name: one.auroc.value for name, one in row.separations.items()}


@pytest.mark.parametrize("evaluator", ["detection", "fuzzing"])
def test_a_judge_that_knows_tells_true_from_shuffled(cases: list[Case], evaluator: str) -> None:
    found = audited(cases, make_judge("predicate"), evaluator)
    seen = aurocs(found)
    assert (
        seen["shuffled"] == 1.0 and seen["too_narrow"] == 1.0 and set(seen) == {"shuffled", "too_narrow", "too_broad"}
    )
    assert found.statuses == {"no_probabilities": 2 * (4 + len(CHECKS)) * len(cases)}


def test_a_judge_that_says_the_opposite_has_an_auroc_of_0(cases: list[Case]) -> None:
    seen = aurocs(audited(cases, Opposite()))
    assert seen["shuffled"] == seen["too_narrow"] == 0.0


def test_a_judge_that_guesses_has_an_auroc_near_one_half(cases: list[Case]) -> None:
    (row,) = [one for one in audited(cases, Ignorant()).metrics if one.metric == "balanced_accuracy"]
    for one in row.separations.values():
        assert one.auroc.low is not None and one.auroc.high is not None and one.auroc.low < 0.5 < one.auroc.high
        assert one.n == 12 and one.missing == 0
    assert not any(check.passed for check in row.sanity.values())


def test_a_corruption_that_is_the_truth_cannot_be_told(cases: list[Case]) -> None:
    same = [replace(case, corrupted={"shuffled": case.true}) for case in cases]
    assert aurocs(audited(same, make_judge("predicate"))) == {"shuffled": 0.5}


def test_detection_falls_where_labels_are_made_wrong(cases: list[Case]) -> None:
    (row,) = [one for one in audited(cases, make_judge("predicate")).metrics if one.metric == "balanced_accuracy"]
    assert row.true_mean == 1.0 and row.sanity["missing"].change == pytest.approx(-0.25)
    assert row.sanity["extra"].change == pytest.approx(-0.5)
    assert row.sanity["missing"].passed and row.sanity["extra"].passed
    # The windows that it fires on are half of all: as many more are all others.
    assert row.sanity["extra_in_corpus"].passed
    assert not row.coverage.n and row.coverage.reason == "the expectation is not known"


def test_separation_by_hand() -> None:
    found = separation([0.9, 0.8, None, 0.7], [0.8, 0.8, 0.1, 0.9])
    # 0.9 beats 0.8 twice and ties 0.9; 0.8 ties twice; 0.7 loses thrice: (2½ + 1 + 0) / 9.
    assert found.auroc.value == pytest.approx(3.5 / 9) and found.n == 3 and found.missing == 1
    assert found.wins.value == pytest.approx(1.5 / 3) and found.true_mean == pytest.approx(0.8)
    nothing = separation([None], [0.5])
    assert nothing.auroc.value is None and nothing.n == 0 and nothing.missing == 1


def test_sanity_by_hand() -> None:
    found = sanity([0.9, 0.9, 0.9, None], [0.8, 0.8995, 0.95, 0.1])
    assert found.fell.value == pytest.approx(1 / 3) and found.n == 3 and found.passed is False
    assert found.change == pytest.approx((-0.1 - 0.0005 + 0.05) / 3)
    assert sanity([None], [None]).passed is None


def test_labels_are_made_wrong_by_exchanging_text(cases: list[Case]) -> None:
    shown = cases[0].evidence
    own = frozenset(f" {word}" for word in WORDS[:4])

    def holding(found: LatentEvidence, fires: bool) -> int:
        return sum(bool(own & set(w.tokens)) for w in found.windows if w.split == "test" and w.fires == fires)

    firing, silent = holding(shown, True), sum(w.split == "test" and not w.fires for w in shown.windows)
    assert firing == 20 and holding(shown, False) == 0
    missing = relabeled(shown, "missing", "test", 0)
    assert holding(missing, True) == 10 and holding(missing, False) == 0
    extra = relabeled(shown, "extra", "test", 0)
    assert holding(extra, True) == 20 and silent / 4 < holding(extra, False) <= silent
    for before, after in zip(shown.windows, extra.windows, strict=True):
        assert (before.activations is after.activations) and len(before.tokens) == len(after.tokens)
        assert before.split == "test" or before.tokens == after.tokens


def test_the_expectation_of_a_judge_that_errs() -> None:
    class Fixed:
        name, headline = "fixed", "tpr"

        async def evaluate(self, said: Explanation, evidence: LatentEvidence, judge: Judge, seed: int) -> Evaluation:
            found = {"balanced_accuracy": 0.9, "tpr": 1.0, "f1": 0.7, "tnr": None}
            return Evaluation(tuple(Score("fixed", m, v, None, None, 1, 0) for m, v in found.items()), ())

    said = Explanation("x")
    empty = LatentEvidence(3, "live", ())
    known = Population(Fixed(), [Case(3, said, {}, empty, empty), Case(4, said, {}, empty)], Ignorant(), 0, 0.1)
    # 0.9 · 0.9 + 0.1 · 0.1, and 1 · 0.9.
    assert asyncio.run(known(3, "true")) == {"balanced_accuracy": pytest.approx(0.82), "tpr": pytest.approx(0.9)}
    assert asyncio.run(known(4, "true")) == {}


def test_coverage_counts_the_intervals_that_hold_the_expectation(cases: list[Case]) -> None:
    judge = make_judge("predicate")

    async def wrong(latent: int, which: str) -> dict[str, float]:
        return {"balanced_accuracy": 0.3 if latent % 2 else (await right(latent, which))["balanced_accuracy"]}

    right = Population(make_evaluator("detection"), cases, judge, 0)
    for expected, share in ((right, 1.0), (wrong, None)):
        found = asyncio.run(
            audit("detection", make_evaluator("detection"), cases, judge, 0, expected=expected, checks=())
        )
        (row,) = [one for one in found.metrics if one.metric == "balanced_accuracy"]
        assert row.coverage.n == 48 and not row.sanity
        assert row.coverage.share.value == share if share else 0.4 < (row.coverage.share.value or 0) < 0.8
