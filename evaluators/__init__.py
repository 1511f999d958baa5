"""Evaluators: explanation + evidence → scores with intervals; one file per protocol (PROTOCOLS §3–9). They never write."""

from exegete.evaluators.contract import (
    Evaluation,
    Evaluator,
    Item,
    Judge,
    Score,
    Verdict,
    evaluator,
    evaluator_names,
    judge,
    judge_names,
    make_evaluator,
    make_judge,
)

__all__ = [
    "Evaluation",
    "Evaluator",
    "Item",
    "Judge",
    "Score",
    "Verdict",
    "evaluator",
    "evaluator_names",
    "judge",
    "judge_names",
    "make_evaluator",
    "make_judge",
]
