"""What an intervention does to a model's output, always beside what the model does without it.

1. `next_token_effect`: which tokens become more and less probable after the prompt, KL and entropy.
2. `logit_difference`: the log-odds between two tokens.
3. `continuation_logprobs`, `continuation_effect`: how probable given continuations are. The model reads prompt and
   continuation in one pass while the intervention goes on as it does when the model writes: "last" means from the
   prompt's last token on, numbered positions and sources are the prompt's.
4. `generate_pairs`: clean and changed continuations drawn with the same random numbers.
5. `coherence_cost`: how much less probable the changed texts are to the clean model than its own; steering that is too
   strong shows here.

The unit of every interval is the trial: give each prompt once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from exegete.tools.errors import UserError
from exegete.tools.estimates import Estimate, estimate, estimate_from_moments
from exegete.tools.generation import Continuation, generate
from exegete.tools.interventions import Tokens
from exegete.tools.live_model import LiveModel, Trial
from exegete.tools.strength import kl_divergence

_ENTRIES = 2**24
"""Logits of clean and changed runs that are held at once: 64 MB each."""


@dataclass(frozen=True)
class Change:
    """A figure without and with the intervention. Differences are taken trial by trial."""

    clean: Estimate
    changed: Estimate
    change: Estimate
    """changed − clean."""
    values: tuple[tuple[float, float], ...]
    """(clean, changed) of each trial, in their order."""


@dataclass(frozen=True)
class TokenChange:
    """One token of the vocabulary, over all trials."""

    token: int
    text: str
    clean: float
    """Mean probability."""
    changed: float
    probability: Estimate
    """Change of the probability."""
    logprob: Estimate
    """Change of its natural logarithm."""


@dataclass(frozen=True)
class NextTokenEffect:
    """What became of the next-token distribution.

    The intervals of risers and fallers are each token's own. They are the extremes of a vocabulary, so expect the same
    tokens to move less on other prompts.
    """

    risers: tuple[TokenChange, ...]
    """Largest rise first; only tokens that rise."""
    fallers: tuple[TokenChange, ...]
    """Largest fall first; only tokens that fall."""
    kl: Estimate
    """KL(clean ‖ changed) in nats."""
    entropy: Change
    """In nats."""
    n: int
    """Trials."""


@dataclass(frozen=True)
class Pair:
    """Two continuations of one prompt, drawn with the same random numbers."""

    clean: Continuation
    changed: Continuation


@dataclass(frozen=True)
class Coherence:
    """Perplexity per token under the clean model, as geometric mean over texts."""

    clean: Estimate
    """Of the clean texts: the floor."""
    changed: Estimate
    """Of the texts written under the intervention."""
    ratio: Estimate
    """changed / clean, pair by pair: 1 costs nothing."""
    left_out: int
    """Pairs of which one text is empty because the model ended at once."""


def next_token_effect(
    model: LiveModel, trials: Sequence[Trial], top: int = 10, by: Literal["probability", "logprob"] = "probability"
) -> NextTokenEffect:
    """Return the tokens whose probability rises and falls most after the prompts, with KL and entropy.

    Args:
        model: the live model.
        trials: prompts with their interventions; each is compared with its prompt alone.
        top: how many risers, and how many fallers.
        by: what they are ranked by, averaged over the trials.

    Raises:
        UserError: there is no trial, `top` is less than 1, logits are not finite, or as `LiveModel.run`.
    """
    if top < 1:
        raise UserError(f"top is {top}; ask for at least 1 token")
    moments = _Moments(int(model.subject.bridge.cfg.d_vocab), model.subject.device)
    divergences: list[float] = []
    entropies: list[tuple[float, float]] = []
    for clean, changed in _logits(model, trials):
        divergences += kl_divergence(clean, changed).tolist()
        p, q = clean.double().log_softmax(-1), changed.double().log_softmax(-1)
        entropies += zip(_entropy(p).tolist(), _entropy(q).tolist(), strict=True)
        moments.add(p, q)
    ranked = moments.probability_mean if by == "probability" else moments.logprob_mean
    order = ranked.argsort(descending=True, stable=True)
    count = min(top, len(order))
    risers = [token for token in order[:count].tolist() if ranked[token] > 0]
    fallers = [token for token in order.flip(0)[:count].tolist() if ranked[token] < 0]
    return NextTokenEffect(
        tuple(moments.token(model, token) for token in risers),
        tuple(moments.token(model, token) for token in fallers),
        estimate(divergences, least=0.0),
        paired(entropies),
        len(divergences),
    )


def kl_divergences(model: LiveModel, trials: Sequence[Trial]) -> list[float]:
    """Return KL(clean ‖ changed) of the next token, in nats, for each trial.

    Raises:
        UserError: as `next_token_effect`.
    """
    return [kl for clean, changed in _logits(model, trials) for kl in kl_divergence(clean, changed).tolist()]


def logit_difference(
    model: LiveModel, trials: Sequence[Trial], answer: int | Sequence[int], other: int | Sequence[int]
) -> Change:
    """Return the logit of `answer` minus that of `other` after the prompts: the log-odds between them, in nats.

    Args:
        model: the live model.
        trials: prompts with their interventions.
        answer: a token for all, or one for each trial.
        other: the same.

    Raises:
        UserError: there is no such token, or not one for each trial, or as `next_token_effect`.
    """
    answers, others = (_tokens(model, tokens, len(trials)) for tokens in (answer, other))
    found: list[tuple[float, float]] = []
    for pair in _logits(model, trials):
        rows = torch.arange(len(pair[0]), device=pair[0].device)
        mine = slice(len(found), len(found) + len(rows))
        first, second = (torch.tensor(tokens[mine], device=rows.device) for tokens in (answers, others))
        clean, changed = ((one[rows, first] - one[rows, second]).tolist() for one in pair)
        found += zip(clean, changed, strict=True)
    return paired(found)


def continuation_logprobs(
    model: LiveModel, trials: Sequence[Trial], continuations: Sequence[Sequence[int]]
) -> list[tuple[float, ...]]:
    """Return the natural logarithm of the probability of each token of a given continuation, one list for each trial.

    They are what `generate` gives as `Continuation.logprobs` where the model writes these tokens.

    Args:
        model: the live model.
        trials: prompts with their interventions, which go on over the continuation.
        continuations: tokens, one continuation for each trial; an empty one gives an empty list.

    Raises:
        UserError: there is no trial, not one continuation for each, or a prompt with its continuation is longer than the
            subject's context.
    """
    if len(continuations) != len(trials):
        raise UserError(f"{len(continuations)} continuations are given for {len(trials)} trials; give one for each")
    model.check(trials)
    model.check([Trial((*trial.tokens, *tokens)) for trial, tokens in zip(trials, continuations, strict=True)])
    forced = [
        _Forced(trial.tokens, trial.intervention, trial.draw, tuple(tokens))
        for trial, tokens in zip(trials, continuations, strict=True)
    ]
    found: list[tuple[float, ...]] = [()] * len(trials)
    order = sorted(range(len(trials)), key=lambda i: (len(forced[i].continuation), len(forced[i].tokens)))
    # Continuations of one length at a time: then nothing is ever padded on the right.
    for count, group in itertools.groupby(order, lambda i: len(forced[i].continuation)):
        for chosen in model.batches(
            list(group) if count else [], lambda i: len(forced[i].tokens + forced[i].continuation)
        ):
            batch: list[Trial] = [forced[i] for i in chosen]
            for i, logprobs in zip(chosen, model.shrinking(batch, _reading_on(model)), strict=True):
                found[i] = logprobs
    return found


def continuation_effect(model: LiveModel, trials: Sequence[Trial], continuations: Sequence[Sequence[int]]) -> Change:
    """Return the log-probability of whole continuations, in nats, without and with the interventions.

    Raises:
        UserError: as `continuation_logprobs`; or a continuation is empty.
    """
    if empty := [index for index, tokens in enumerate(continuations) if not len(tokens)]:
        raise UserError(f"continuation {empty[0]} is empty; give at least one token")
    both = [*map(_clean, trials), *trials]
    sums = [math.fsum(logprobs) for logprobs in continuation_logprobs(model, both, [*continuations, *continuations])]
    return paired(list(zip(sums[: len(trials)], sums[len(trials) :], strict=True)))


def generate_pairs(
    model: LiveModel,
    trials: Sequence[Trial],
    tokens: int = 8,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    cache: bool = True,
) -> list[Pair]:
    """Return the continuations of every trial without and with its intervention. Arguments as `generate`'s.

    Both use the same random numbers, so they differ only where the intervention changes what is written.

    Raises:
        UserError: as `generate`.
    """
    both = [*map(_clean, trials), *trials]
    found = generate(model, both, tokens, temperature=temperature, seed=seed, cache=cache)
    return [Pair(*pair) for pair in zip(found[: len(trials)], found[len(trials) :], strict=True)]


def coherence_cost(model: LiveModel, prompts: Sequence[Tokens], pairs: Sequence[Pair]) -> Coherence:
    """Return the perplexity that texts have for the clean model: those written under an intervention beside its own.

    Args:
        model: the live model.
        prompts: of the texts.
        pairs: the texts, one pair for each prompt, as `generate_pairs` returns.

    Raises:
        UserError: there is not one pair for each prompt, or no pair with a token on both sides.
    """
    if len(pairs) != len(prompts):
        raise UserError(f"{len(pairs)} pairs of texts are given for {len(prompts)} prompts; give one for each")
    kept = [
        (tokens, pair) for tokens, pair in zip(prompts, pairs, strict=True) if pair.clean.tokens and pair.changed.tokens
    ]
    if not kept:
        raise UserError(
            f"none of {len(pairs)} pairs has a token on both sides; generate more tokens, or from other prompts"
        )
    trials = [Trial(tokens) for tokens, _ in kept]
    clean, changed = (
        [-math.fsum(logprobs) / len(logprobs) for logprobs in continuation_logprobs(model, trials, texts)]
        for texts in ([pair.clean.tokens for _, pair in kept], [pair.changed.tokens for _, pair in kept])
    )
    loss = paired(list(zip(clean, changed, strict=True)))
    return Coherence(_exp(loss.clean), _exp(loss.changed), _exp(loss.change), len(pairs) - len(kept))


def paired(values: Sequence[tuple[float, float]]) -> Change:
    """Return the change between pairs of (clean, changed).

    Raises:
        UserError: there is none, or one is not finite.
    """
    clean, changed = [pair[0] for pair in values], [pair[1] for pair in values]
    return Change(estimate(clean), estimate(changed), estimate([b - a for a, b in values]), tuple(values))


@dataclass(frozen=True)
class _Forced(Trial):
    """A trial whose continuation is given."""

    continuation: Tokens = ()


class _Moments:
    """Sums over trials for every token of the vocabulary."""

    def __init__(self, vocabulary: int, device: str) -> None:
        # Rows: clean probability; changed; their difference and its square; the difference of logarithms and its square.
        self._sums = torch.zeros((6, vocabulary), dtype=torch.float64, device=device)
        self._n = 0

    def add(self, p: Tensor, q: Tensor) -> None:
        """Add trials, from log-probabilities of shape (trial, vocabulary)."""
        clean, changed = p.exp(), q.exp()
        # A token that both runs rule out has not changed.
        logs = torch.where(p == q, 0.0, q - p)
        rows = (clean, changed, changed - clean, (changed - clean) ** 2, logs, logs**2)
        self._sums += torch.stack([row.sum(0) for row in rows])
        self._n += len(p)

    @property
    def probability_mean(self) -> Tensor:
        return self._sums[2] / self._n

    @property
    def logprob_mean(self) -> Tensor:
        return self._sums[4] / self._n

    def token(self, model: LiveModel, token: int) -> TokenChange:
        clean, changed, change, squares, logs, log_squares = self._sums[:, token].tolist()
        return TokenChange(
            token,
            model.subject.pieces[token],
            clean / self._n,
            changed / self._n,
            estimate_from_moments(change, squares, self._n),
            estimate_from_moments(logs, log_squares, self._n),
        )


def _logits(model: LiveModel, trials: Sequence[Trial]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield next-token logits without and with the interventions, shape (trial, vocabulary) each, in parts of `trials`."""
    model.check(trials)
    size = max(1, _ENTRIES // int(model.subject.bridge.cfg.d_vocab))
    for start in range(0, len(trials), size):
        part = trials[start : start + size]
        prompts = list(dict.fromkeys(trial.tokens for trial in part))
        rows = {tokens: row for row, tokens in enumerate(prompts)}
        found = model.run([*map(Trial, prompts), *part], lambda reading: reading.logits.unbind())
        clean = torch.stack([found[rows[trial.tokens]] for trial in part])
        changed = torch.stack(found[len(prompts) :])
        if torch.isnan(changed).any() or (changed == torch.inf).any():
            raise UserError(
                'logits under an intervention are not finite; lower its strength, or load the subject with dtype = "float32"'
            )
        yield clean, changed


def _reading_on(model: LiveModel) -> Callable[[list[Trial]], list[tuple[float, ...]]]:
    """Return what reads one batch of `_Forced` trials, all with continuations of one length."""

    def read(trials: list[Trial]) -> list[tuple[float, ...]]:
        batch = model.pad(trials)
        given = [trial.continuation for trial in trials if isinstance(trial, _Forced)]
        forced = torch.tensor(given, device=batch.tokens.device)
        tokens = torch.cat([batch.tokens, forced[:, :-1]], 1)
        mask = torch.cat([batch.mask, torch.ones_like(forced[:, :-1], dtype=torch.bool)], 1)
        with model.editing(batch), torch.inference_mode():
            logits = model.logits(tokens, mask, last=False)[:, batch.tokens.shape[1] - 1 :]
            logprobs = logits.gather(-1, forced[..., None])[..., 0] - logits.logsumexp(-1)
        return [tuple(row) for row in logprobs.tolist()]

    return read


def _clean(trial: Trial) -> Trial:
    return Trial(trial.tokens, draw=trial.draw)


def _entropy(logprobs: Tensor) -> Tensor:
    return -torch.where(logprobs == -torch.inf, 0.0, logprobs.exp() * logprobs).sum(-1)


def _tokens(model: LiveModel, tokens: int | Sequence[int], count: int) -> list[int]:
    """Return one token for each trial."""
    given = [tokens] * count if isinstance(tokens, int) else list(tokens)
    if len(given) != count:
        raise UserError(f"{len(given)} tokens are given for {count} trials; give one for each, or one for all")
    vocabulary = int(model.subject.bridge.cfg.d_vocab)
    if wrong := [token for token in given if not 0 <= token < vocabulary]:
        raise UserError(f"token {wrong[0]} is not one of subject {model.subject.name!r}, which has {vocabulary}")
    return given


def _exp(loss: Estimate) -> Estimate:
    """Return a perplexity from a loss in nats. A standard deviation has no meaning on that scale."""
    value, low, high = (
        None if nats is None else math.exp(nats) if nats < 700 else math.inf
        for nats in (loss.value, loss.low, loss.high)
    )
    assert value is not None
    return Estimate(value, low, high, None, loss.n)
