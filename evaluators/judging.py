"""What detection and fuzzing share: items into prompts, prompts to the judge, verdicts into scores.

1. Items are shuffled by the latent's seed and cut into prompts of `items_per_prompt` (5 by default).
2. Each prompt goes to the judge; its verdicts come back in order, failures with a status (never dropped).
3. Metrics rest on the verdicts that were given; failures are counted beside every figure (`scoring`).

With `stopping`, each prompt holds both classes in the same proportion, prompts are asked in rounds of a few, and no more
round is asked once the confidence sequence over prompts excludes the target (PROTOCOLS §13). Rounds are cut in advance, so
what is asked depends on the latent's seed and verdicts alone and not on which reply comes first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exegete.evaluators import scoring
from exegete.evaluators.clustering import Clustering
from exegete.evaluators.contract import Evaluation, Item, Judge, JudgedItem, Task
from exegete.evaluators.scoring import METRICS as METRICS
from exegete.evaluators.stopping import ConfidenceSequence, Stopping, balanced_order
from exegete.tools.explainers import Explanation
from exegete.tools.seeds import derive_seed, generator
from exegete.tools.windows import Window

ITEMS_PER_PROMPT = 5


@dataclass(frozen=True, slots=True)
class Question:
    """An item with its truth, which stays here: only tokens and marks go to the judge."""

    window: Window
    truth: bool
    marks: tuple[int, ...] | None = None


Prompt = Sequence[Question]


async def evaluate(
    task: Task,
    explanation: Explanation,
    questions: Sequence[Question],
    judge: Judge,
    seed: int,
    parameters: Mapping[str, Any],
    *,
    clustering: Clustering | None = None,
    stopping: Stopping | None = None,
) -> Evaluation:
    """Have `questions` judged and return every metric with its interval, and the verdicts.

    `clustering`: what a frozen pilot has shown of the judge; where None, what is expected of any judge of its kind.
    `stopping`: when to ask no more; all questions are asked where None. Its fields, the bound's name, the prompts asked
    and planned, and whether it stopped are parameters of the scores then.
    """
    per_prompt = int(parameters["items_per_prompt"])
    described = {**parameters, "judge": judge.name, **_made_with(judge, task)}
    if stopping is None:
        prompts = _shuffled(questions, per_prompt, seed, task)
        judged = await _ask(task, explanation, prompts, judge, seed, 0)
    else:
        prompts = _balanced(questions, per_prompt, seed, task)
        judged, more = await _ask_until(task, explanation, prompts, judge, seed, stopping)
        described |= {"prompts_planned": len(prompts), **more}
    expected = clustering or scoring.expected_clustering(judge)
    return Evaluation(scoring.scores(task, judged, described, expected, stopping), tuple(judged))


def _made_with(judge: Judge, task: Task) -> dict[str, Any]:
    """Return what a judge says that its verdicts depend on beside its name (prompt digest, request options), if it does."""
    own = getattr(judge, "parameters", None)
    return {"judge_parameters": dict(own(task))} if own else {}


async def _ask_until(
    task: Task, explanation: Explanation, prompts: Sequence[Prompt], judge: Judge, seed: int, stopping: Stopping
) -> tuple[list[JudgedItem], dict[str, Any]]:
    """Ask round after round until the sequence excludes the target; return the verdicts, and how it ended."""
    sequence = ConfidenceSequence(stopping.target, stopping.confidence)
    judged: list[JudgedItem] = []
    asked = 0
    while asked < len(prompts) and not sequence.stopped:
        coming = prompts[asked : asked + stopping.prompts_per_round]
        answered = await _ask(task, explanation, coming, judge, seed, asked)
        sequence.update(scoring.outcomes(answered))
        judged += answered
        asked += len(coming)
    return judged, {"prompts_asked": asked, "stopped": sequence.stopped}


async def _ask(
    task: Task, explanation: Explanation, prompts: Sequence[Prompt], judge: Judge, seed: int, first: int
) -> list[JudgedItem]:
    """Ask all of `prompts` at once; the number of the first one is `first`."""
    answers = await asyncio.gather(
        *(
            judge.judge(
                task, explanation, [Item(q.window.tokens, q.marks) for q in prompt], derive_seed(seed, task, number)
            )
            for number, prompt in enumerate(prompts, first)
        )
    )
    return [
        JudgedItem(question.window, question.marks, question.truth, verdict, number)
        for number, (prompt, verdicts) in enumerate(zip(prompts, answers, strict=True), first)
        for question, verdict in zip(prompt, verdicts, strict=True)
    ]


def _shuffled(questions: Sequence[Question], per_prompt: int, seed: int, task: Task) -> list[Prompt]:
    order = generator(seed, task, "order").permutation(len(questions))
    shuffled = [questions[i] for i in order]
    return [shuffled[at : at + per_prompt] for at in range(0, len(shuffled), per_prompt)]


def _balanced(questions: Sequence[Question], per_prompt: int, seed: int, task: Task) -> list[Prompt]:
    truth = [question.truth for question in questions]
    return [
        [questions[i] for i in prompt] for prompt in balanced_order(truth, per_prompt, generator(seed, task, "order"))
    ]
