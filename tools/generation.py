"""Continuations of prompts under interventions, sampled with a key-value cache.

Every trial may have its own length, temperature and seed (`Sampling`); those that have written enough wait for the others of their
batch. One uniform number per step decides each token, drawn from the prompt's tokens and `Trial.draw` alone. So a continuation
does not depend on its batch, and a clean and a steered run of one prompt use the same numbers: where the intervention
changes nothing, so does the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from exegete.tools.errors import UserError
from exegete.tools.interventions import LatentEdit, Tokens
from exegete.tools.live_model import Batch, LiveModel, Trial
from exegete.tools.seeds import generator


@dataclass(frozen=True)
class Continuation:
    """What the model wrote."""

    tokens: Tokens
    """Without the end token."""
    logprobs: tuple[float, ...]
    """Natural logarithms of each token's probability under the model that wrote it, at temperature 1."""
    ended: bool
    """Whether it wrote the end token."""


@dataclass(frozen=True)
class Sampling:
    """How one trial is continued."""

    tokens: int
    """At most."""
    temperature: float = 1.0
    """0 takes the most probable token."""
    seed: int = 0

    def numbers(self, trial: Trial) -> np.ndarray:
        """Return the uniform random numbers that decide the trial's tokens, shape (tokens,)."""
        return generator(self.seed, "generate", trial.draw, *trial.tokens).random(self.tokens)


@runtime_checkable
class Continues(Protocol):
    """A live model that continues trials in a way of its own, as one does that shares its batches with others."""

    def continued(
        self, trials: Sequence[Trial], tokens: int, *, temperature: float, seed: int, cache: bool
    ) -> list[Continuation]:
        """Return what `generate` returns."""
        ...


def generate(
    model: LiveModel,
    trials: Sequence[Trial],
    tokens: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    cache: bool = True,
) -> list[Continuation]:
    """Continue every trial by up to `tokens` tokens, in the order of `trials`.

    Args:
        model: the live model.
        trials: prompts with their interventions, which go on while the model writes (see `Positions`).
        tokens: how many at most; a trial that reaches the subject's context ends there.
        temperature: 0 takes the most probable token.
        seed: of the sampling.
        cache: keep keys and values; without, every step reads everything again (for comparison, and used by itself
            for dictionaries whose code depends on the whole context).

    Raises:
        UserError: as `LiveModel.run`; or a prompt leaves no room, or `tokens` or `temperature` is out of range; or
            an intervention is more than the subject's number format can hold.
    """
    if isinstance(model, Continues):
        return model.continued(trials, tokens, temperature=temperature, seed=seed, cache=cache)
    check_generation(model, trials, tokens, temperature)
    return continue_each(model, trials, [Sampling(tokens, temperature, seed)] * len(trials), cache=cache)


def continue_each(
    model: LiveModel, trials: Sequence[Trial], sampling: Sequence[Sampling], *, cache: bool = True
) -> list[Continuation]:
    """Continue every trial as its own `Sampling` says; they have been checked (`check_generation`).

    Raises:
        UserError: one prompt alone does not fit the device's memory, or as `generate` for what an intervention does.
    """
    room = model.subject.max_context
    results: dict[int, Continuation] = {}
    order = sorted(range(len(trials)), key=lambda index: len(trials[index].tokens))
    own = [_Sampled(one.tokens, one.intervention, one.draw, how) for one, how in zip(trials, sampling, strict=True)]
    for chosen in model.batches(order, lambda index: min(room, len(trials[index].tokens) + sampling[index].tokens)):
        more = max(sampling[index].tokens for index in chosen)
        found = model.shrinking([own[index] for index in chosen], lambda part: _continue(model, part, cache), more=more)
        results |= dict(zip(chosen, found, strict=True))
    return [results[index] for index in range(len(trials))]


def check_generation(model: LiveModel, trials: Sequence[Trial], tokens: int, temperature: float) -> None:
    """Raise UserError where `generate` would."""
    if tokens < 1 or not 0 <= temperature < float("inf"):
        raise UserError(f"cannot generate {tokens} tokens at temperature {temperature}; give at least 1, at 0 or above")
    model.check(trials)
    room = model.subject.max_context
    for trial in trials:
        if len(trial.tokens) >= room:
            raise UserError(f"the prompt has {len(trial.tokens)} tokens and leaves no room to write, of {room}")


@dataclass(frozen=True)
class _Sampled(Trial):
    """A trial that says how it is continued, so that it may be sorted and split like any other."""

    sampling: Sampling = Sampling(1)


def _continue(model: LiveModel, trials: list[_Sampled], cached: bool) -> list[Continuation]:
    from transformers import DynamicCache

    batch, sampling = model.pad(trials), [trial.sampling for trial in trials]
    keeps = cached and not _conditioned(model, trials)
    cache = DynamicCache(config=model.subject.bridge.original_model.config) if keeps else None
    picking = _Picking(batch, sampling)
    writing = _Writing(model, batch, sampling)
    with model.editing(batch) as editor, torch.inference_mode():
        tokens, mask = batch.tokens, batch.mask
        for step in range(max(how.tokens for how in sampling)):
            logits = model.logits(tokens, mask, last=True, cache=cache)
            written = picking.token(step, logits)
            writing.add(written, logits)
            if writing.finished:
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            tokens = written[:, None] if cache is not None else torch.cat([tokens, written[:, None]], 1)
            editor.offset = mask.shape[1] - 1 if cache is not None else 0
    return writing.continuations()


class _Picking:
    """Picks the tokens of one batch."""

    def __init__(self, batch: Batch, sampling: Sequence[Sampling]) -> None:
        device, most = batch.tokens.device, max(how.tokens for how in sampling)
        # Past its own length a trial needs no number, and waits with the first token that may be.
        numbers = [
            np.pad(how.numbers(trial), (0, most - how.tokens))
            for how, trial in zip(sampling, batch.trials, strict=True)
        ]
        self._uniform = torch.from_numpy(np.stack(numbers)).to(device)
        temperatures = torch.tensor([how.temperature for how in sampling], dtype=torch.float64, device=device)
        self._greedy = temperatures == 0
        self._all_greedy = bool(self._greedy.all())
        self._temperatures = torch.where(self._greedy, 1.0, temperatures)[:, None]

    def token(self, step: int, logits: Tensor) -> Tensor:
        """Return one token for each row of logits, shape (trial, vocabulary) → (trial,)."""
        most_probable = logits.argmax(-1)
        if self._all_greedy:
            return most_probable
        cumulative = (logits.double() / self._temperatures).softmax(-1).cumsum(-1)
        below = self._uniform[:, step, None].to(cumulative) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, below, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
        return torch.where(self._greedy, most_probable, drawn)


class _Writing:
    """The continuations of one batch so far."""

    def __init__(self, model: LiveModel, batch: Batch, sampling: Sequence[Sampling]) -> None:
        self._end = model.subject.tokenizer.eos_token_id
        most = model.subject.max_context
        rooms = [min(how.tokens, most - length) for how, length in zip(sampling, batch.lengths, strict=True)]
        self._rooms = torch.tensor(rooms, device=batch.tokens.device)
        self._tokens: list[Tensor] = []
        self._logprobs: list[Tensor] = []
        self._ended = torch.zeros(len(rooms), dtype=torch.bool, device=batch.tokens.device)

    def add(self, written: Tensor, logits: Tensor) -> None:
        self._tokens.append(written)
        self._logprobs.append(logits.log_softmax(-1).gather(-1, written[:, None])[:, 0])
        if self._end is not None:
            self._ended |= written == self._end

    @property
    def finished(self) -> bool:
        """Whether every continuation has ended, is as long as it may be, or has no room left."""
        return bool((self._ended | (self._rooms <= len(self._tokens))).all())

    def continuations(self) -> list[Continuation]:
        tokens = torch.stack(self._tokens, 1).tolist()
        logprobs = torch.stack(self._logprobs, 1).tolist()
        if any(math.isnan(number) for row in logprobs for number in row):
            raise UserError("the model's logits are not numbers under an intervention; make its strength smaller")
        found = []
        for row, room in enumerate(self._rooms.tolist()):
            written = tokens[row][:room]
            ended = self._end in written
            length = written.index(self._end) if ended else len(written)
            found.append(Continuation(tuple(written[:length]), tuple(logprobs[row][:length]), ended))
        return found


def _conditioned(model: LiveModel, trials: Sequence[Trial]) -> bool:
    edits = [edit for trial in trials for edit in trial.intervention.edits if isinstance(edit, LatentEdit)]
    return any(model.dictionary(edit.dictionary).conditioned for edit in edits)
