"""Whether a model still does what it did: behaviours as functions of trials.

A behaviour looks at trials – prompts with what is done to the model – and says of each how much of it is there, from 0 to
1; above one half it is shown. Three are given:

`Prefers`            the next token is rather this one than that one
`Says`               the next token is this one, of all
`WrittenBehaviour`   a judge reads what the model writes

The scores of the first two are the logistic function of a difference of logits, so that among sets of latents that flip
the same prompts the one that moves the model further can be told. `Margin` is that difference itself, for effects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exegete.tools.errors import UserError
from exegete.tools.generation import generate
from exegete.tools.interventions import Tokens
from exegete.tools.live_model import LiveModel, Reading, Trial

SHOWN = 0.5
"""A behaviour is there where its score is above this."""

Answers = int | Mapping[Tokens, int]
"""The token that is looked for: one for all prompts, or prompt → token."""


class Measure(Protocol):
    """Any figure of trials, one finite number for each."""

    def __call__(self, model: LiveModel, trials: Sequence[Trial]) -> Sequence[float]:
        """Return one number for each trial, in their order, which depends on that trial alone."""
        ...


class Behaviour(Measure, Protocol):
    """A measure between 0 (gone) and 1 (there); truth values will do."""


def measured(model: LiveModel, measure: Measure, trials: Sequence[Trial]) -> NDArray[np.float64]:
    """Return what a measure says of trials, shape (trial,).

    Raises:
        UserError: as `LiveModel.run`; or the measure does not return one finite number for each trial.
    """
    values = np.array([float(value) for value in measure(model, trials)], dtype=np.float64)
    if len(values) != len(trials):
        raise UserError(f"the measure returned {len(values)} numbers for {len(trials)} trials; return one for each")
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        prompt = model.text(trials[wrong[0]].tokens)
        raise UserError(f"the measure is {values[wrong[0]]} on the prompt {prompt[-60:]!r}; it must be a finite number")
    return values


def judged(model: LiveModel, behaviour: Behaviour, trials: Sequence[Trial]) -> NDArray[np.float64]:
    """Return the scores of a behaviour, shape (trial,).

    Raises:
        UserError: as `measured`; or a score is outside 0 … 1.
    """
    scores = measured(model, behaviour, trials)
    wrong = scores[(scores < 0) | (scores > 1)]
    if len(wrong):
        raise UserError(f"the behaviour's judge returned {wrong[0]}; return 0 (gone) to 1 (there)")
    return scores


@dataclass(frozen=True)
class Margin:
    """Logit of the answer minus that of the other token: a `Measure`."""

    answers: Answers
    others: Answers

    def __call__(self, model: LiveModel, trials: Sequence[Trial]) -> list[float]:
        """Return one difference for each trial, in logits."""
        tokens = _tokens(model, trials, self.answers, self.others)

        def read(reading: Reading) -> list[float]:
            pairs = _pairs(reading, tokens)
            found = reading.logits.gather(1, pairs)
            return [float(margin) for margin in found[:, 0] - found[:, 1]]

        return model.run(trials, read)


@dataclass(frozen=True)
class Prefers:
    """The answer is more probable than the other token: a `Behaviour`."""

    answers: Answers
    others: Answers

    def __call__(self, model: LiveModel, trials: Sequence[Trial]) -> list[float]:
        """Return the logistic function of `Margin` for each trial."""
        return [_logistic(margin) for margin in Margin(self.answers, self.others)(model, trials)]


@dataclass(frozen=True)
class Says:
    """The answer is the most probable token: a `Behaviour`."""

    answers: Answers

    def __call__(self, model: LiveModel, trials: Sequence[Trial]) -> list[float]:
        """Return the logistic function of the answer's logit minus the largest other one, for each trial."""
        tokens = _tokens(model, trials, self.answers)

        def read(reading: Reading) -> list[float]:
            answers = _pairs(reading, tokens)
            logits = reading.logits
            own = logits.gather(1, answers)[:, 0]
            best_other = logits.scatter(1, answers, -torch.inf).max(1).values
            return [_logistic(float(margin)) for margin in own - best_other]

        return model.run(trials, read)


@dataclass(frozen=True)
class WrittenBehaviour:
    """A judge reads what the model writes: a `Behaviour`."""

    judge: Callable[[str, str], float]
    """Text of the prompt, text of the continuation → 0 (not there) to 1 (there). Asked once for each different pair of a
    call."""
    tokens: int
    """Written for each prompt, at most."""
    temperature: float = 1.0
    draws: int = 1
    """Continuations of each trial; the score is the mean of the judge's."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise UserError(f"draws is {self.draws}; a behaviour needs at least 1 continuation of each prompt")

    def __call__(self, model: LiveModel, trials: Sequence[Trial]) -> list[float]:
        """Return the judge's mean score for each trial."""
        drawn = [replace(trial, draw=trial.draw * self.draws + i) for trial in trials for i in range(self.draws)]
        written = generate(model, drawn, self.tokens, temperature=self.temperature, seed=self.seed)
        texts = [(model.text(trial.tokens), model.text(one.tokens)) for trial, one in zip(drawn, written, strict=True)]
        scores = {pair: float(self.judge(*pair)) for pair in dict.fromkeys(texts)}
        found = np.array([scores[pair] for pair in texts]).reshape(len(trials), self.draws)
        return [float(score) for score in found.mean(1)]


def _tokens(model: LiveModel, trials: Sequence[Trial], *wanted: Answers) -> dict[Tokens, list[int]]:
    """Return prompt → the tokens that are looked for after it."""
    vocabulary = int(model.subject.bridge.cfg.d_vocab)
    found = {trial.tokens: [_answer(model, one, trial.tokens) for one in wanted] for trial in trials}
    for token in {token for tokens in found.values() for token in tokens}:
        if not 0 <= token < vocabulary:
            raise UserError(f"answer {token} is not a token of subject {model.subject.name!r}, which has {vocabulary}")
    return found


def _answer(model: LiveModel, answers: Answers, prompt: Tokens) -> int:
    if isinstance(answers, int):
        return answers
    if prompt not in answers:
        raise UserError(f"no answer is given for the prompt {model.text(prompt)[-60:]!r}; name a token for each prompt")
    return answers[prompt]


def _pairs(reading: Reading, tokens: Mapping[Tokens, list[int]]) -> Tensor:
    """Return the tokens looked for in each row, shape (trial, token looked for)."""
    return torch.tensor([tokens[trial.tokens] for trial in reading.batch.trials], device=reading.logits.device)


def _logistic(margin: float) -> float:
    # Not exp(−margin), which overflows; a NaN stays one, and is reported by its prompt.
    return float(0.5 * (1 + np.tanh(margin / 2)))
