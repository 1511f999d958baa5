"""How strong an intervention must be to change the next token by a given KL divergence (PROTOCOLS §8).

Latents, methods and explanations are compared only at equal effect. The effect is the mean over prompts of
KL(clean ‖ steered) of the next-token distribution at the prompt's last token, in nats. The strength s that reaches a target:

1. The clean logits of every distinct prompt are computed once.
2. The first batch holds strengths around `first`, a factor of 4 apart. For small s the divergence grows as s², so what lies
   below the target is left upwards and what lies above it downwards, still by factors of 4, to `first` times or divided by
   a million.
3. Between the two neighbours that enclose the target – the least strong ones, where several pairs do – the next batch holds
   the log-log secant's point and an even grid in log s. So the bracket shrinks to a quarter or less with every batch,
   whatever the curve; it need not rise everywhere.
4. Where the whole curve stays below the target, batches close in on its highest point before the target is called
   unreachable.

A *batch* is one call of `LiveModel.run` that holds `per_batch` (4) strengths × all prompts of one search; it is one forward pass
where the model's `batch_tokens` has room for these rows, and as many as they need where it has not. The clean run is not
counted. Many searches share their calls, and each still counts every call that it took part in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from exegete.tools.errors import UserError
from exegete.tools.estimates import Estimate, estimate
from exegete.tools.interventions import Intervention, Tokens
from exegete.tools.live_model import LiveModel, Reading, Trial

Make = Callable[[float], Intervention]
"""Gives the intervention of a strength; `lambda s: steer(fingerprint, [3], -s)` searches downwards."""
Prompts = Sequence[Tokens]

_FACTOR = 4.0
_REACH = 1e6
_PEAK_WIDTH = 0.1
"""The highest point of a curve counts as found when its neighbours are this near, in log strength."""
_CLEAN_ENTRIES = 2**26
"""Clean logits held at once: a quarter of a gigabyte."""
_PROMPTS = 4_096
_BLOCK_ENTRIES = 2**23
"""Probabilities in float64 at once: 64 MB."""


@dataclass(frozen=True)
class Matched:
    """The strength that reaches a target divergence, or that none does."""

    status: Literal["matched", "unreachable"]
    """Unreachable: within its batches the search met no strength that does it; `tried` shows whether the curve saturates."""
    strength: float | None
    """None where unreachable."""
    kl: float | None
    """Mean KL(clean ‖ steered) in nats at that strength; where unreachable, the nearest to the target that was seen (the
    largest, where all lie below), None if no finite one was."""
    low: float | None
    """95 % interval of that mean over prompts; None with one prompt."""
    high: float | None
    n: int
    """Prompts."""
    batches: int
    """Calls that this search took part in (see the module)."""
    tried: tuple[tuple[float, float], ...]
    """(strength, mean KL), in order of strength; NaN where the model's output was not finite."""


def match_strength(
    model: LiveModel,
    make: Make,
    prompts: Prompts,
    *,
    target_kl: float = 0.5,
    tolerance: float = 0.1,
    batches: int = 10,
    first: float = 1.0,
    per_batch: int = 4,
) -> Matched:
    """Return the strength at which `make(strength)` changes the next token by `target_kl`. See the module for how.

    Args:
        model: the live model.
        make: the intervention of a positive strength.
        prompts: over which the divergence is averaged: never those that are scored afterwards (PROTOCOLS §8).
        target_kl: mean KL(clean ‖ steered), in nats.
        tolerance: relative: 0.1 accepts 0.9 to 1.1 times the target.
        batches: at most so many (see the module for what one is).
        first: the strength to begin with, in the units of `make`; right within a few powers of ten is enough.
        per_batch: strengths tried in one batch; with 1 it is plain secant and bisection.

    Raises:
        UserError: there is no prompt, a number is out of range, or as `LiveModel.run`.
    """
    return match_strengths(
        model,
        [make],
        list(prompts),
        target_kl=target_kl,
        tolerance=tolerance,
        batches=batches,
        first=first,
        per_batch=per_batch,
    )[0]


def match_strengths(
    model: LiveModel,
    makes: Sequence[Make],
    prompts: Prompts | Sequence[Prompts],
    *,
    target_kl: float = 0.5,
    tolerance: float = 0.1,
    batches: int = 10,
    first: float = 1.0,
    per_batch: int = 4,
) -> list[Matched]:
    """Return what `match_strength` returns for each of `makes`, with all searches in common batches.

    Args:
        model: the live model.
        makes: the interventions.
        prompts: one set for all, or one set for each of `makes`.
        target_kl: as in `match_strength`, like everything that follows.
        tolerance: relative.
        batches: at most so many for each search.
        first: the strength to begin with.
        per_batch: strengths tried in one batch.

    Raises:
        UserError: as `match_strength`; or there is not one set of prompts for each of `makes`.
    """
    aim = _Aim(target_kl, tolerance, batches, first, per_batch)
    sets = _sets(prompts, len(makes))
    searches = [_Search(aim, make, own) for make, own in zip(makes, sets, strict=True)]
    for together in _groups(searches, int(model.subject.bridge.cfg.d_vocab)):
        _search(model, together)
    return [search.outcome() for search in searches]


def kl_divergence(clean: Tensor, changed: Tensor) -> Tensor:
    """Return KL(clean ‖ changed) in nats between next-token distributions, from logits (…, vocabulary) → (…).

    In float64, where differences of small divergences survive; a token that both rule out (−inf) counts nothing.
    """
    flat = clean.reshape(-1, clean.shape[-1]), changed.reshape(-1, changed.shape[-1])
    size = max(1, _BLOCK_ENTRIES // clean.shape[-1])
    parts = [_divergence(p, q) for p, q in zip(*(torch.split(one, size) for one in flat), strict=True)]
    return torch.cat(parts).reshape(clean.shape[:-1]) if parts else clean.new_zeros(clean.shape[:-1])


def _divergence(clean: Tensor, changed: Tensor) -> Tensor:
    p, q = clean.double().log_softmax(-1), changed.double().log_softmax(-1)
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    return terms.sum(-1).clamp_min(0.0)


def _sets(prompts: Prompts | Sequence[Prompts], count: int) -> list[Prompts]:
    """Return one set of prompts for each search."""
    given = list(prompts)
    if not given:
        raise UserError("there is no prompt to match the strength on; give at least one")
    if text := [one for one in given if isinstance(one, str)]:
        raise UserError(f"the prompt {text[0][:40]!r} is text; give its tokens: model.tokens(text)")
    shared = [one for one in given if len(one) and isinstance(one[0], int)]
    if shared:
        return [given] * count  # type: ignore[list-item]
    if len(given) != count:
        raise UserError(
            f"{len(given)} sets of prompts are given for {count} interventions; give one set, or one for each"
        )
    if empty := [index for index, one in enumerate(given) if not len(one)]:
        raise UserError(f"the prompts of intervention {empty[0]} are empty; give at least one to match its strength on")
    return given  # type: ignore[return-value]


@dataclass(frozen=True)
class _Aim:
    """What every search of a call is after."""

    target: float
    tolerance: float
    batches: int
    first: float
    per_batch: int

    def __post_init__(self) -> None:
        wanted = {
            f"target_kl is {self.target}; give a number of nats above 0": 0 < self.target < math.inf,
            f"tolerance is {self.tolerance}; give a share between 0 and 1, for example 0.1": 0 < self.tolerance < 1,
            f"batches is {self.batches}; a search needs at least 1": self.batches >= 1,
            f"per_batch is {self.per_batch}; a batch needs at least 1 strength": self.per_batch >= 1,
            f"first is {self.first}; give a strength above 0, and search downwards with make = lambda s: … -s": (
                0 < self.first < math.inf
            ),
        }
        for message, met in wanted.items():
            if not met:
                raise UserError(message)

    def meets(self, kl: float) -> bool:
        return abs(kl - self.target) <= self.tolerance * self.target


@dataclass
class _Search:
    """One intervention's search: what was tried, and what to try next."""

    aim: _Aim
    make: Make
    prompts: Prompts
    tried: dict[float, list[float]] = field(default_factory=dict)
    """Strength → KL on each prompt."""
    batches: int = 0

    def means(self) -> list[tuple[float, float]]:
        """Return (strength, mean KL) in order of strength."""
        return [(strength, math.fsum(kl) / len(kl)) for strength, kl in sorted(self.tried.items())]

    def proposals(self) -> list[float]:
        """Return the strengths of the next batch; none when the search is over."""
        means = self.means()
        if self.batches >= self.aim.batches or any(self.aim.meets(kl) for _, kl in means):
            return []
        found = self._between(means) if means else self._start()
        return [strength for strength in dict.fromkeys(found) if strength not in self.tried]

    def batch(self, model: LiveModel) -> list[tuple[float, Intervention]]:
        """Return the strengths of the next batch with their interventions; none when the search is over.

        Strengths that the subject's number format cannot hold are set down as too strong, without a run.
        """
        while strengths := self.proposals():
            held: list[tuple[float, Intervention]] = []
            for strength in sorted(strengths):
                try:
                    intervention = self.make(strength)
                    model.check([Trial(self.prompts[0], intervention)])
                    held.append((strength, intervention))
                except UserError:
                    # A weaker one could run, so it is the strength alone that is at fault.
                    if not held and not self.tried:
                        raise
                    self.tried[strength] = [math.nan] * len(self.prompts)
            if held:
                return held
        return []

    def _start(self) -> list[float]:
        lowest = -((self.aim.per_batch - 1) // 3)
        return [self.aim.first * _FACTOR ** (lowest + i) for i in range(self.aim.per_batch)]

    def _between(self, means: list[tuple[float, float]]) -> list[float]:
        """Return strengths inside the bracket, or beyond what was tried where there is none yet."""
        # What is not finite was far too strong.
        above = [not kl < self.aim.target for _, kl in means]
        for (low, high), crossed in zip(itertools.pairwise(means), itertools.pairwise(above), strict=True):
            if crossed[0] != crossed[1]:
                return self._inside(low, high)
        count, (least, most) = self.aim.per_batch, (means[0][0], means[-1][0])
        if all(above):
            steps = [least / _FACTOR ** (i + 1) for i in range(count)]
            return [strength for strength in steps if strength >= self.aim.first / _REACH]
        steps = [most * _FACTOR ** (i + 1) for i in range(count)]
        return [strength for strength in steps if strength <= self.aim.first * _REACH] or self._near_peak(means)

    def _inside(self, low: tuple[float, float], high: tuple[float, float]) -> list[float]:
        """Return the secant's point and an even grid between two tries, one below the target and one above."""
        start, width = math.log(low[0]), math.log(high[0] / low[0])
        share = _secant_share(low[1], high[1], self.aim.target)
        if self.aim.per_batch == 1:
            return [math.exp(start + width * (0.5 if share is None or self.batches % 3 == 2 else share))]
        count = self.aim.per_batch - (share is not None)
        shares = [(i + 1) / (count + 1) for i in range(count)] + ([] if share is None else [share])
        return [math.exp(start + width * share) for share in shares]

    def _near_peak(self, means: list[tuple[float, float]]) -> list[float]:
        """Return strengths on both sides of the largest divergence, until its place is known."""
        top = max(range(len(means)), key=lambda index: means[index][1])
        low, high = means[max(0, top - 1)][0], means[min(len(means) - 1, top + 1)][0]
        width = math.log(high / low)
        if width < _PEAK_WIDTH:
            return []
        count = self.aim.per_batch
        return [low * math.exp(width * (i + 1) / (count + 1)) for i in range(count)]

    def outcome(self) -> Matched:
        """Return what the search found."""
        means = self.means()
        met = [pair for pair in means if self.aim.meets(pair[1])]
        finite = [pair for pair in means if math.isfinite(pair[1])]
        n, tried = len(self.prompts), tuple(means)
        if not finite:
            return Matched("unreachable", None, None, None, None, n, self.batches, tried)
        strength, _ = min(met or finite, key=lambda pair: abs(pair[1] - self.aim.target))
        kl: Estimate = estimate(self.tried[strength], least=0.0)
        status: Literal["matched", "unreachable"] = "matched" if met else "unreachable"
        return Matched(status, strength if met else None, kl.value, kl.low, kl.high, n, self.batches, tried)


def _secant_share(low: float, high: float, target: float) -> float | None:
    """Return how far from `low` to `high` the target lies in log divergence; None where a logarithm is not finite."""
    if not (0 < low < math.inf and 0 < high < math.inf):
        return None
    return min(0.98, max(0.02, math.log(target / low) / math.log(high / low)))


def _groups(searches: Sequence[_Search], vocabulary: int) -> Iterator[list[_Search]]:
    """Yield searches whose prompts' clean logits fit in memory together."""
    most = min(_PROMPTS, max(1, _CLEAN_ENTRIES // vocabulary))
    group: list[_Search] = []
    prompts: set[Tokens] = set()
    for search in searches:
        own = set(search.prompts)
        if group and len(prompts | own) > most:
            yield group
            group, prompts = [], set()
        group.append(search)
        prompts |= own
    if group:
        yield group


def _search(model: LiveModel, searches: Sequence[_Search]) -> None:
    """Carry searches to their ends, in common calls."""
    prompts = list(dict.fromkeys(tokens for search in searches for tokens in search.prompts))
    rows = {tokens: row for row, tokens in enumerate(prompts)}
    clean = torch.stack(model.run([Trial(tokens) for tokens in prompts], lambda reading: reading.logits.unbind()))

    def read(reading: Reading) -> list[float]:
        wanted = [rows[trial.tokens] for trial in reading.batch.trials]
        found: list[float] = kl_divergence(clean[wanted], reading.logits).tolist()
        return found

    waiting = [(search, tries) for search in searches if (tries := search.batch(model))]
    while waiting:
        trials = [
            Trial(tokens, intervention)
            for search, tries in waiting
            for _, intervention in tries
            for tokens in search.prompts
        ]
        found = iter(model.run(trials, read))
        for search, tries in waiting:
            for strength, _ in tries:
                search.tried[strength] = list(itertools.islice(found, len(search.prompts)))
            search.batches += 1
        waiting = [(search, tries) for search, _ in waiting if (tries := search.batch(model))]
