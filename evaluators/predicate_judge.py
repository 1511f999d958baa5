"""The judge that runs an explanation's predicate: no model, no cost, the same answer every time.

- Detection (PROTOCOLS §3): the explanation applies to a window where its predicate holds at any position.
- Fuzzing (PROTOCOLS §4, "is every marked token an instance of the explanation"): it applies where the predicate holds
  at more than half of the marked tokens. Marks go down to 0.3 of the window's peak, so that a true item can bear the
  weak neighbours of its instance; with one mark or two the rule asks for every mark, as the protocol does.

A predicate answers yes or no: verdicts carry no probability, and AUROC and AUPRC have no value.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from exegete.evaluators.contract import Item, Task, Verdict, judge
from exegete.tools.explainers import Explanation
from exegete.tools.predicates import Predicate, PredicateError, parse


@judge("predicate")
class PredicateJudge:
    """Judges any explanation that carries a predicate; one that carries none gets verdicts of status "no_predicate"."""

    name = "predicate"
    reads_items_alone = True
    """Its verdicts have no more in common within a prompt than across prompts."""

    async def judge(self, task: Task, explanation: Explanation, items: Sequence[Item], seed: int) -> list[Verdict]:
        """Return one verdict per item, in order; of status "unparsed" where the predicate does not parse."""
        if explanation.predicate is None:
            return [Verdict(None, status="no_predicate") for _ in items]
        try:
            predicate = _parsed(explanation.predicate)
        except PredicateError:
            return [Verdict(None, status="unparsed") for _ in items]
        return [Verdict(applies(predicate, task, item)) for item in items]


def applies(predicate: Predicate, task: Task, item: Item) -> bool:
    """Return whether the predicate applies to one item, by the rules above; never where a fuzzing item has no marks."""
    held = predicate.matches(item.tokens)
    if task == "detection":
        return bool(held.any())
    marks = [m for m in item.marks or () if 0 <= m < len(held)]
    return 2 * int(held[marks].sum()) > len(marks) if marks else False


_parsed = lru_cache(maxsize=1024)(parse)
