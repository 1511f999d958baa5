"""What detection and fuzzing share: items into prompts, prompts to the judge, verdicts into scores.

1. Items are shuffled by the latent's seed and cut into prompts of `items_per_prompt` (5 by default).
2. Each prompt goes to the judge; its verdicts come back in order, failures with a status (never dropped).
3. Metrics rest on the verdicts that were given; failures are counted beside every figure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exegete.evaluators import statistics
from exegete.evaluators.contract import Evaluation, Item, Judge, JudgedItem, Score, Task
from exegete.evaluators.statistics import UNDEFINED, Interval
from exegete.tools.explainers import Explanation
from exegete.tools.seeds import derive_seed, generator
from exegete.tools.windows import Window

METRICS = ("balanced_accuracy", "tpr", "tnr", "f1", "auroc", "auprc")
ITEMS_PER_PROMPT = 5


@dataclass(frozen=True, slots=True)
class Question:
    """An item with its truth, which stays here: only tokens and marks go to the judge."""

    window: Window
    truth: bool
    marks: tuple[int, ...] | None = None


async def evaluate(
    task: Task,
    explanation: Explanation,
    questions: Sequence[Question],
    judge: Judge,
    seed: int,
    parameters: Mapping[str, Any],
) -> Evaluation:
    """Have `questions` judged and return every metric with its interval, and the verdicts."""
    judged = await _judge(task, explanation, questions, judge, seed, int(parameters["items_per_prompt"]))
    described = {**parameters, "judge": judge.name}
    return Evaluation(tuple(_scores(task, judged, seed, described)), tuple(judged))


async def _judge(
    task: Task, explanation: Explanation, questions: Sequence[Question], judge: Judge, seed: int, per_prompt: int
) -> list[JudgedItem]:
    order = generator(seed, task, "order").permutation(len(questions))
    shuffled = [questions[i] for i in order]
    prompts = [shuffled[at : at + per_prompt] for at in range(0, len(shuffled), per_prompt)]
    answers = await asyncio.gather(
        *(
            judge.judge(
                task, explanation, [Item(q.window.tokens, q.marks) for q in prompt], derive_seed(seed, task, number)
            )
            for number, prompt in enumerate(prompts)
        )
    )
    return [
        JudgedItem(question.window, question.marks, question.truth, verdict, number)
        for number, (prompt, verdicts) in enumerate(zip(prompts, answers, strict=True))
        for question, verdict in zip(prompt, verdicts, strict=True)
    ]


def _scores(task: Task, judged: Sequence[JudgedItem], seed: int, parameters: Mapping[str, Any]) -> list[Score]:
    given = [item for item in judged if item.verdict.applies is not None]
    failures = len(judged) - len(given)
    positives = sum(item.truth for item in given)
    described = {**parameters, "positives": positives, "base_rate": positives / len(given) if given else None}
    intervals = _intervals(given, generator(seed, task, "bootstrap"))
    return [
        Score(task, metric, *interval, n=len(given), failures=failures, status=_status(judged, given, interval, metric),
              parameters=described)
        for metric, interval in intervals.items()
    ]  # fmt: skip


def _status(judged: Sequence[JudgedItem], given: Sequence[JudgedItem], interval: Interval, metric: str) -> str:
    if interval.value is not None:
        return "ok"
    if not judged:
        return "no_items"
    if not given:
        return judged[0].verdict.status
    return "no_probabilities" if metric in ("auroc", "auprc") else "one_class"


def _intervals(given: Sequence[JudgedItem], rng: np.random.Generator) -> dict[str, Interval]:
    truth = np.array([item.truth for item in given], dtype=np.bool_)
    said = np.array([bool(item.verdict.applies) for item in given], dtype=np.bool_)
    prompts = np.array([item.prompt for item in given], dtype=np.int64)
    intervals = {
        "balanced_accuracy": statistics.balanced_accuracy(truth, said, prompts),
        "tpr": statistics.rate_interval(said[truth], prompts[truth]),
        "tnr": statistics.rate_interval(~said[~truth], prompts[~truth]),
        "f1": statistics.f1(truth, said, prompts, rng),
        "auroc": UNDEFINED,
        "auprc": UNDEFINED,
    }
    if given and all(item.verdict.probability is not None for item in given):
        probabilities = np.array([item.verdict.probability for item in given], dtype=np.float64)
        for name, metric in (("auroc", statistics.auroc), ("auprc", statistics.auprc)):
            intervals[name] = statistics.bootstrap(metric, truth, probabilities, prompts, rng)
    return intervals
