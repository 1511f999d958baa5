"""The predicate judge: detection at any position, fuzzing at most of the marks, failures as statuses."""

from __future__ import annotations

import asyncio

from exegete.evaluators.contract import Item, Task, Verdict, make_judge
from exegete.tools.explainers import Explanation

TOKENS = (" a", " cat", " and", " dogs")


def judged(predicate: str | None, task: Task, *items: Item) -> list[Verdict]:
    explanation = Explanation("", predicate)
    return asyncio.run(make_judge("predicate").judge(task, explanation, items, 0))


def test_detection_applies_at_any_position() -> None:
    yes, no = judged('word is "cat"', "detection", Item(TOKENS), Item((" none",)))
    assert yes == Verdict(True) and no == Verdict(False)


def test_fuzzing_asks_for_most_marks() -> None:
    marks = [(1,), (0,), (0, 1), (0, 1, 3), (1, 3), (), (9,)]
    verdicts = judged('word in {"cat", "dogs"}', "fuzzing", *(Item(TOKENS, m) for m in marks))
    assert [v.applies for v in verdicts] == [True, False, False, True, True, False, False]


def test_no_predicate_and_a_broken_one_are_statuses() -> None:
    assert judged(None, "detection", Item(TOKENS)) == [Verdict(None, status="no_predicate")]
    assert judged("token are", "fuzzing", Item(TOKENS, (0,))) == [Verdict(None, status="unparsed")]
    assert judged("always", "detection") == []


def test_empty_windows_are_judged() -> None:
    assert judged("always", "detection", Item(())) == [Verdict(False)]
