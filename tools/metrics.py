"""Scalar metrics of what a model is about to say: the thing that latents are held responsible for.

A metric takes next-token logits and the batch that they are of, and returns one number for each trial. It must treat
the trials one by one: batches are made up by length, and gradients are taken of the sum over a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exegete.tools.errors import UserError
from exegete.tools.interventions import Intervention, Tokens
from exegete.tools.live_model import Batch, LiveModel, Reading, Trial
from exegete.tools.strength import kl_divergence

Metric = Callable[[Tensor, Batch], Tensor]
"""From logits, shape (trial, vocabulary) or with `positions="all"` (trial, position, vocabulary), padded on the left, to
values, shape (trial,). `batch.trials[row].prompt` is the index of the prompt among those that were given."""

LogitPositions = Literal["last", "all"]
Floats = npt.NDArray[np.float64]
Prompt = Tokens | Trial
"""Tokens as `LiveModel.tokens` makes them, or a trial: the prompt with an intervention that is in place throughout."""

_KEPT_LOGITS = 2**26


@dataclass(frozen=True)
class PromptTrial(Trial):
    """A trial that knows which of the prompts it is made of."""

    prompt: int = 0


@dataclass(frozen=True)
class LogitDifference:
    """The logit of the answer minus that of the other token: the log-odds between the two."""

    answers: int | Sequence[int]
    """One token for each prompt, or one for all."""
    others: int | Sequence[int]

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return values, shape (trial,)."""
        logits = _last(logits)
        return _at(logits, self.answers, batch) - _at(logits, self.others, batch)


@dataclass(frozen=True)
class LogProbability:
    """The natural logarithm of the probability of a token coming next."""

    tokens: int | Sequence[int]
    """One for each prompt, or one for all."""

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return values, shape (trial,)."""
        return _at(_last(logits).log_softmax(-1), self.tokens, batch)


@dataclass(frozen=True)
class KLFromClean:
    """KL(clean ‖ changed) of the next-token distribution, in nats.

    It is 0 and flat at the clean run, so a gradient there says nothing: attribution of it needs integrated gradients.
    """

    clean: Mapping[int, Tensor] | None = None
    """Prompt → logits of the clean run, shape (vocabulary,). Filled in by what measures."""

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return values, shape (trial,)."""
        assert self.clean is not None, "KLFromClean is measured against a clean run: see `against`"
        clean = torch.stack([self.clean[index] for index in prompts_of(batch)])
        return kl_divergence(clean.to(logits.device), _last(logits))


def against(metric: Metric, batch: Batch, logits: Tensor) -> Metric:
    """Return the metric as it is measured against this clean batch: only `KLFromClean` depends on it."""
    if not isinstance(metric, KLFromClean):
        return metric
    return KLFromClean(dict(zip(prompts_of(batch), _last(logits).detach(), strict=True)))


def measured(metric: Metric, logits: Tensor, batch: Batch) -> Tensor:
    """Return the metric's values, shape (trial,).

    Raises:
        UserError: it returns something else, or a number that is not finite.
    """
    values = metric(logits, batch)
    if not isinstance(values, Tensor) or values.shape != (len(batch.trials),):
        given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise UserError(f"the metric returns {given}; for {len(batch.trials)} trials it must return shape (trial,)")
    for index, value in zip(prompts_of(batch), values.detach().tolist(), strict=True):
        if not np.isfinite(value):
            raise UserError(f"the metric is {value} on prompt {index}; it must be a finite number")
    return values


def numbered(
    model: LiveModel, prompts: Sequence[Prompt], metric: Metric, interventions: Sequence[Intervention] = ()
) -> list[PromptTrial]:
    """Return the prompts as trials that know their index, having checked that metric and prompts fit each other.

    Raises:
        UserError: there is no prompt, one cannot run, or the metric has other numbers of tokens, or unknown ones.
    """
    trials = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            raise UserError(f"the prompt {prompt[:40]!r} is text; give its tokens: model.tokens(text)")
        if isinstance(prompt, Trial):
            trials.append(PromptTrial(prompt.tokens, prompt.intervention, prompt.draw, index))
        else:
            trials.append(PromptTrial(tuple(prompt), prompt=index))
    model.check(trials)
    _check_tokens(metric, len(trials), int(model.subject.bridge.cfg.d_vocab))
    return trials


def values_under(
    model: LiveModel,
    trials: Sequence[PromptTrial],
    metric: Metric,
    changes: Sequence[tuple[int, Intervention]],
    positions: LogitPositions = "last",
) -> tuple[Floats, Floats]:
    """Return the metric of every trial as it is, and of every (index of a trial, intervention added to it).

    Prompts are taken in groups, such that no more than a quarter of a gigabyte of clean logits is kept at once.

    Raises:
        UserError: as `LiveModel.run` and `measured`.
    """
    size = max(1, _KEPT_LOGITS // int(model.subject.bridge.cfg.d_vocab))
    clean = np.zeros(len(trials))
    changed = np.zeros(len(changes))
    for start in range(0, len(trials), size):
        group = trials[start : start + size]
        found = model.run(group, partial(_read, metric), keep=positions)
        clean[start : start + size] = [value for value, _ in found]
        bound = metric
        if isinstance(metric, KLFromClean):
            bound = KLFromClean({t.prompt: kept for t, (_, kept) in zip(group, found, strict=True) if kept is not None})
        mine = [place for place, (index, _) in enumerate(changes) if start <= index < start + size]
        if not mine:
            continue
        pairs = [(trials[changes[place][0]], changes[place][1]) for place in mine]
        edited = [replace(trial, intervention=trial.intervention + change) for trial, change in pairs]
        changed[mine] = [value for value, _ in model.run(edited, partial(_read, bound), keep=positions)]
    return clean, changed


def prompts_of(batch: Batch) -> list[int]:
    """Return which prompt each trial of a batch is; for plain trials, their order in it."""
    return [trial.prompt if isinstance(trial, PromptTrial) else row for row, trial in enumerate(batch.trials)]


def _read(metric: Metric, reading: Reading) -> list[tuple[float, Tensor | None]]:
    """Return values, and for `KLFromClean` the logits of a run that is itself the clean one."""
    kept: Sequence[Tensor | None] = [None] * len(reading.batch.trials)
    with torch.no_grad():
        if isinstance(metric, KLFromClean) and metric.clean is None:
            metric = against(metric, reading.batch, reading.logits)
            assert isinstance(metric, KLFromClean) and metric.clean is not None
            kept = [metric.clean[index] for index in prompts_of(reading.batch)]
        values = measured(metric, reading.logits, reading.batch).tolist()
    return list(zip(values, kept, strict=True))


def _last(logits: Tensor) -> Tensor:
    return logits[:, -1] if logits.dim() == 3 else logits


def _at(values: Tensor, tokens: int | Sequence[int], batch: Batch) -> Tensor:
    chosen = [tokens if isinstance(tokens, int) else tokens[index] for index in prompts_of(batch)]
    return values.gather(1, torch.tensor(chosen, device=values.device)[:, None])[:, 0]


def _check_tokens(metric: Metric, prompts: int, vocabulary: int) -> None:
    named: dict[str, int | Sequence[int]] = {}
    if isinstance(metric, LogitDifference):
        named = {"answers": metric.answers, "others": metric.others}
    elif isinstance(metric, LogProbability):
        named = {"tokens": metric.tokens}
    for name, tokens in named.items():
        given = [tokens] if isinstance(tokens, int) else tokens
        if not isinstance(tokens, int) and len(given) != prompts:
            raise UserError(
                f"the metric has {len(given)} {name} for {prompts} prompts; give one for each, or one for all"
            )
        if wrong := [token for token in given if not 0 <= token < vocabulary]:
            raise UserError(f"the metric names token {wrong[0]}; the subject has 0 to {vocabulary - 1}")
