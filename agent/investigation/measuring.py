"""A metric on prompts, as the instruments take it.

1. What is measured, `values`, is one number for each case, of one trial for each: logit of the case's answer less that of
   its other token, log-probability of its answer, or the share of continuations that meet a criterion.
2. Tokens belong to cases, not to prompts: a case's variant is measured by the case's own answer.
3. For instruments that know prompts alone, `measure`, `behaviour` (from 0 to 1, shown above one half) and `gradient` say
   the same of the cases' prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exegete.agent.awaiting import awaited
from exegete.agent.investigation.contract import Case, Metric
from exegete.agent.live import Live
from exegete.tools.errors import UserError

if TYPE_CHECKING:
    from exegete.agent.investigation.criterion import Asker, Criterion
    from exegete.tools.interventions import Tokens
    from exegete.tools.judged_behaviours import Behaviour, Measure
    from exegete.tools.live_model import LiveModel, Reading, Trial
    from exegete.tools.llm import Client
    from exegete.tools.metrics import LogitDifference, LogProbability

Floats = NDArray[np.float64]


class Measurable:
    """A metric on cases, with what the instruments need of it. Safe to use from several threads."""

    def __init__(
        self,
        live: Live,
        metric: Metric,
        cases: Sequence[Case],
        *,
        seed: int,
        judge: Client | None = None,
        ask: Asker = awaited,
    ) -> None:
        """Read the prompts and look up the tokens.

        Args:
            live: the subject.
            metric: how the behaviour is measured.
            cases: the prompts.
            seed: of sampled continuations.
            judge: for `judged` metrics.
            ask: runs what is asked of the judge to its end.

        Raises:
            UserError: there is no case, a prompt or variant cannot be read, a variant has another number of tokens than
                its prompt, a case lacks a token that the metric needs or one is no single token, or there is no judge.
        """
        self.live, self.metric, self.cases, self.seed = live, metric, tuple(cases), seed
        self.prompts: list[Tokens] = live.prompts([case.prompt for case in self.cases])
        self.variants: list[Tokens | None] = [
            None if case.variant is None else _variant(live, case, prompt)
            for case, prompt in zip(self.cases, self.prompts, strict=True)
        ]
        self.answers: list[int] = []
        """Token that each case looks for; empty where the metric is judged."""
        self.others: list[int] = []
        """Token that stands against it; empty unless the metric is their log-odds."""
        self.criterion: Criterion | None = None
        if metric.kind == "judged":
            self.criterion = _criterion(metric, seed, judge, ask)
            return
        self.answers = [_token(live, case, "answer", case.answer or metric.answer) for case in self.cases]
        if metric.kind == "log_odds":
            self.others = [_token(live, case, "other", case.other or metric.other) for case in self.cases]
            _require_two(self.cases, self.answers, self.others)

    def values(self, trials: Sequence[Trial]) -> Floats:
        """Return the metric of one trial for each case, in their order, shape (case,); see `table`."""
        found: Floats = self.table([trials])[0]
        return found

    def table(self, rows: Sequence[Sequence[Trial]]) -> Floats:
        """Return the metric of several rows of trials, one trial for each case in each, shape (row, case).

        It is NaN where the metric is judged and no continuation got a verdict (`failures` counts them).

        Raises:
            UserError: a row has not one trial for each case, the metric is not finite, or as `LiveModel.run`.
        """
        if not rows or any(len(row) != len(self.cases) for row in rows):
            raise UserError(
                f"{[len(row) for row in rows]} trials are given for {len(self.cases)} cases; give one for each"
            )
        found = self.at([(i, trial) for row in rows for i, trial in enumerate(row)])
        return found.reshape(len(rows), len(self.cases))

    def at(self, trials: Sequence[tuple[int, Trial]]) -> Floats:
        """Return the metric of trials, each of the case of a number, shape (trial,); else as `table`."""
        if self.criterion is not None:
            return np.array(self.criterion(self.live.model, [trial for _, trial in trials]), dtype=np.float64)
        from exegete.tools.metrics import PromptTrial, measured

        metric = self.gradient
        assert metric is not None

        def read(reading: Reading) -> list[float]:
            values: list[float] = measured(metric, reading.logits, reading.batch).tolist()
            return values

        own = [PromptTrial(trial.tokens, trial.intervention, trial.draw, i) for i, trial in trials]
        return np.array(self.live.model.run(own, read), dtype=np.float64)

    @cached_property
    def clean(self) -> Floats:
        """The metric on the prompts as they are, shape (case,)."""
        from exegete.tools.live_model import Trial

        return self.values([Trial(prompt) for prompt in self.prompts])

    @property
    def failures(self) -> int:
        """Continuations without a verdict, so far; 0 unless the metric is judged."""
        return 0 if self.criterion is None else self.criterion.failures

    @cached_property
    def measure(self) -> Measure:
        """The metric as a function of trials on the cases' prompts. Raises UserError as `behaviour`."""
        from exegete.tools.judged_behaviours import Margin

        if self.criterion is not None:
            return self.criterion
        if self.others:
            return Margin(self._by_prompt(self.answers), self._by_prompt(self.others))
        return _LogProbabilityOf(self._by_prompt(self.answers))

    @cached_property
    def behaviour(self) -> Behaviour:
        """From 0 to 1, above one half where the metric is above its line.

        Raises:
            UserError: two cases have one prompt and different tokens.
        """
        from exegete.tools.judged_behaviours import Prefers

        if self.criterion is not None:
            return self.criterion
        if self.others:
            return Prefers(self._by_prompt(self.answers), self._by_prompt(self.others))
        return _ProbabilityOf(self._by_prompt(self.answers))

    @cached_property
    def gradient(self) -> LogitDifference | LogProbability | None:
        """The metric for attribution, on the prompts in the cases' order; None where it is judged."""
        from exegete.tools.metrics import LogitDifference, LogProbability

        if self.criterion is not None:
            return None
        return LogitDifference(self.answers, self.others) if self.others else LogProbability(self.answers)

    def part(self, chosen: Sequence[int]) -> Measurable:
        """Return the metric on some of the cases, by their places; what a judge has said is kept.

        Raises:
            UserError: none is chosen.
        """
        if not len(chosen):
            raise UserError("no prompt is left to measure; give prompts that show the behaviour")
        found = object.__new__(Measurable)
        found.live, found.metric, found.seed, found.criterion = self.live, self.metric, self.seed, self.criterion
        for name in ("prompts", "variants", "answers", "others"):
            own = getattr(self, name)
            setattr(found, name, [own[i] for i in chosen] if own else [])
        found.cases = tuple(self.cases[i] for i in chosen)
        if "clean" in self.__dict__:
            found.__dict__["clean"] = self.clean[list(chosen)]
        return found

    def _by_prompt(self, tokens: Sequence[int]) -> dict[Tokens, int]:
        found: dict[Tokens, int] = {}
        for case, prompt, token in zip(self.cases, self.prompts, tokens, strict=True):
            if found.setdefault(prompt, token) != token:
                raise UserError(
                    f"the prompt {case.prompt[-60:]!r} reads for the subject like another one that has a different answer; "
                    "keep one of them"
                )
        return found


@dataclass(frozen=True)
class _LogProbabilityOf:
    """Natural logarithm of the answer's probability: a `Measure`."""

    answers: dict[Tokens, int]

    def __call__(self, model: LiveModel, trials: Sequence[Trial]) -> list[float]:
        def read(reading: Reading) -> list[float]:
            logs = reading.logits.double().log_softmax(-1)
            return [float(logs[row, self.answers[trial.tokens]]) for row, trial in enumerate(reading.batch.trials)]

        return model.run(trials, read)


@dataclass(frozen=True)
class _ProbabilityOf:
    """The answer's probability: a `Behaviour`."""

    answers: dict[Tokens, int]

    def __call__(self, model: LiveModel, trials: Sequence[Trial]) -> list[float]:
        return [math.exp(value) for value in _LogProbabilityOf(self.answers)(model, trials)]


def _variant(live: Live, case: Case, prompt: Tokens) -> Tokens:
    tokens = live.model.tokens(case.variant or "")
    if len(tokens) != len(prompt):
        raise UserError(
            f"the variant {(case.variant or '')[-60:]!r} has {len(tokens)} tokens and its prompt {len(prompt)}; their "
            "positions must match: change its wording to as many tokens, or leave it out"
        )
    return tokens


def _token(live: Live, case: Case, name: str, text: str | None) -> int:
    if text is None:
        raise UserError(
            f"the prompt {case.prompt[-60:]!r} has no {name!r}, and the metric names none for all; give one, or choose a "
            "metric that needs none"
        )
    return live.token(text)


def _require_two(cases: Sequence[Case], answers: Sequence[int], others: Sequence[int]) -> None:
    for case, answer, other in zip(cases, answers, others, strict=True):
        if answer == other:
            raise UserError(
                f"the prompt {case.prompt[-60:]!r} has one token as answer and as the other; log-odds are between two"
            )


def _criterion(metric: Metric, seed: int, judge: Client | None, ask: Asker) -> Criterion:
    from exegete.agent.investigation.criterion import Criterion

    if judge is None:
        raise UserError(
            "a judged metric needs a language model that judges; name one with --judge, or measure by log_odds or "
            "log_probability"
        )
    if not metric.criterion.strip() or metric.tokens < 1 or metric.samples < 1:
        raise UserError(
            f"a judged metric with criterion {metric.criterion!r}, {metric.tokens} tokens, {metric.samples} samples; "
            "say what a continuation must meet, and give at least 1 of each"
        )
    return Criterion(metric.criterion, judge, ask, metric.tokens, metric.samples, seed)
