"""A small set of latents without which a behaviour is gone, and what random sets of its size do.

1. Prompts that do not show the behaviour when nothing is changed are left out and counted; so are repeated ones.
2. The candidates come in an order, for example that of attribution. Their first 1, 2, 4, … are ablated, and between the
   first of these sizes that flips the wanted share of prompts and the one before it the smallest is found by bisection.
   A prompt flips where the behaviour's score falls to one half or below. (Flips need not grow with the set: a smaller
   prefix may do as well.) Where no size does, the search goes on from the one that flips most.
3. Of that prefix latents are dropped one after the other: each time the one without which the ablation flips most, of
   equals the one without which the scores stay lowest, as long as the wanted share, or as many as before, flip. Where
   latents work against each other a smaller set flips more, so the wanted share may be reached on the way down. Of more
   than 16 latents up to a quarter is dropped at once: the largest number, halved each time, of the cheapest that holds.
   All sets of a round run together. At the end no single latent can be dropped: a minimal set, if not always the smallest.
4. The set is judged on held-out prompts, beside random sets as large whose latents fire as often.

Greedy backward elimination with a grouped first phase, after delta debugging (Zeller & Hildebrandt 2002).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from exegete.tools.ablation_sets import (
    ZERO,
    Ablation,
    Floats,
    random_sets,
    require_rates,
    require_set,
)
from exegete.tools.controls import firing_rates
from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.intervals import Figure, share
from exegete.tools.interventions import Tokens
from exegete.tools.judged_behaviours import SHOWN, Behaviour, judged
from exegete.tools.live_model import LiveModel

_ONE_BY_ONE = 16
"""Sets up to this size lose one latent at a time."""

Latents = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """A set that was measured on the search prompts and became the best so far."""

    stage: Literal["prefix", "pruned"]
    size: int
    """Latents in the set."""
    flipped: float
    """Share of the search prompts."""


@dataclass(frozen=True)
class PromptCount:
    """What became of the prompts that were given."""

    given: int
    repeated: int
    """Left out: the same as an earlier one, or held-out but among the search prompts."""
    without: int
    """Left out: they do not show the behaviour when nothing is changed."""
    used: int


@dataclass(frozen=True)
class RandomSets:
    """What ablating random sets does to the same prompts."""

    status: Literal["measured", "too few live latents outside the set", "not asked for"]
    flipped: tuple[float, ...]
    """Share of prompts, for each random set; empty unless measured."""
    rate: float | None
    """Mean firing rate of the latents in the random sets."""

    @property
    def mean(self) -> float | None:
        """Mean share of prompts that a random set flips."""
        return float(np.mean(self.flipped)) if self.flipped else None

    @property
    def high(self) -> float | None:
        """95th percentile of that share over the random sets."""
        return float(np.quantile(self.flipped, 0.95)) if self.flipped else None


@dataclass(frozen=True)
class Judgement:
    """What ablating the set does to some prompts, beside random sets of its size."""

    flipped: Figure
    """Share of prompts that no longer show the behaviour, with Wilson's interval."""
    score: float
    """Mean score of the behaviour that is left, from 0 to 1."""
    clean_score: float
    """The same when nothing is changed."""
    random: RandomSets


@dataclass(frozen=True)
class MinimalSet:
    """The set, and what it does."""

    status: Literal["minimal", "not reached"]
    """"not reached" where the wanted share does not flip; the set is then the prefix of the candidates that flips most, pruned
    as far as it flips as many."""
    latents: Latents
    """In the order of the candidates."""
    candidates: int
    """How many were considered."""
    wanted: float
    search: Judgement
    """On the prompts that the set was chosen on: too good by that choice."""
    held_out: Judgement | None
    """None where no held-out prompts were given, or none of them shows the behaviour."""
    search_prompts: PromptCount
    held_out_prompts: PromptCount
    rate: float
    """Mean firing rate of the set's latents, to hold against `RandomSets.rate`."""
    trace: tuple[Step, ...]


def minimal_set(
    model: LiveModel,
    dictionary: Dictionary,
    candidates: Sequence[int],
    prompts: Sequence[Tokens],
    judge: Behaviour,
    *,
    held_out: Sequence[Tokens] = (),
    wanted: float = 0.9,
    ablation: Ablation = ZERO,
    most: int = 256,
    controls: int = 20,
    rates: ArrayLike | None = None,
    seed: int = 0,
) -> MinimalSet:
    """Find a small set of latents whose ablation takes a behaviour away.

    Args:
        model: the live model, with `dictionary` attached.
        dictionary: of the candidates.
        candidates: latents, the most promising first.
        prompts: the set is chosen on them.
        judge: whether a trial shows the behaviour.
        held_out: the set is judged on these.
        wanted: share of prompts to flip, above 0, at most 1.
        ablation: how latents are taken out, and where.
        most: candidates that are considered, from the front.
        controls: random sets to judge beside the one found, on the held-out prompts or else on the others; 0 for none.
        rates: share of tokens on which each latent fires, shape (latent,), to match random sets by; by default measured
            on all prompts that are used.
        seed: of the random sets.

    Raises:
        UserError: there are no candidates or prompts, a candidate is given twice or is not in the dictionary, no prompt
            shows the behaviour, the judge's scores or the rates are not in 0 … 1, or as `LiveModel.run`.
    """
    _require_given(prompts, wanted, most, controls)
    considered = require_set(model, dictionary, candidates, "candidates")[:most]
    known = None if rates is None else require_rates(dictionary, rates)
    ablated = _Ablated(model, dictionary, judge, ablation)
    chosen, count = _showing(ablated, prompts, [])
    unseen, held_out_count = _showing(ablated, held_out, prompts)
    _require_shown(count)
    search = _Search(ablated, chosen, wanted)
    latents = search.pruned(search.prefix(considered))
    known = firing_rates(model, dictionary, [*chosen, *unseen]) if known is None else known
    random, none = _Controls(controls, random_sets(latents, known, controls, seed), known), _Controls(0, [], known)
    return MinimalSet(
        status="minimal" if search.reached(latents) else "not reached",
        latents=latents,
        candidates=len(considered),
        wanted=wanted,
        search=_judgement(ablated, chosen, latents, none if unseen else random),
        held_out=_judgement(ablated, unseen, latents, random) if unseen else None,
        search_prompts=count,
        held_out_prompts=held_out_count,
        rate=float(known[list(latents)].mean()),
        trace=tuple(search.trace),
    )


def _require_given(prompts: Sequence[Tokens], wanted: float, most: int, controls: int) -> None:
    if not prompts:
        raise UserError("there are no prompts to choose the set on; give some that show the behaviour")
    if not 0 < wanted <= 1 or most < 1 or controls < 0:
        raise UserError(
            f"wanted is {wanted}, most {most}, controls {controls}: give 0 < wanted ≤ 1, most ≥ 1, controls ≥ 0"
        )


def _require_shown(count: PromptCount) -> None:
    if not count.used:
        raise UserError(
            f"none of the {count.given} prompts shows the behaviour when nothing is changed; give prompts that do"
        )


@dataclass(frozen=True)
class _Ablated:
    """The behaviour under ablations."""

    model: LiveModel
    dictionary: Dictionary
    judge: Behaviour
    ablation: Ablation

    def scores(self, prompts: Sequence[Tokens], sets: Sequence[Latents]) -> Floats:
        """Return the behaviour's scores with each set ablated, shape (set, prompt), from one call of the judge."""
        trials = self.ablation.trials(self.dictionary, sets, prompts)
        return judged(self.model, self.judge, trials).reshape(len(sets), len(prompts))


@dataclass(frozen=True)
class _Controls:
    asked: int
    sets: list[Latents]
    rates: Floats

    def judge(self, ablated: _Ablated, prompts: Sequence[Tokens]) -> RandomSets:
        if not self.asked:
            return RandomSets("not asked for", (), None)
        if not self.sets:
            return RandomSets("too few live latents outside the set", (), None)
        flipped = (ablated.scores(prompts, self.sets) <= SHOWN).mean(1)
        return RandomSets("measured", tuple(map(float, flipped)), float(self.rates[np.array(self.sets)].mean()))


class _Search:
    """Sets of latents on the search prompts, each measured once."""

    def __init__(self, ablated: _Ablated, prompts: list[Tokens], wanted: float) -> None:
        self._ablated = ablated
        self._prompts = prompts
        self._wanted = math.ceil(wanted * len(prompts) - 1e-9)
        self._known: dict[Latents, tuple[int, float]] = {}
        self.trace: list[Step] = []

    def prefix(self, candidates: Latents) -> Latents:
        """Return the smallest prefix found that flips the wanted share, or else the smallest of those that flip most."""
        sizes = [2**i for i in range(len(candidates).bit_length()) if 2**i < len(candidates)] + [len(candidates)]
        flips = self._measured([candidates[:size] for size in sizes])
        for size, (count, _) in zip(sizes, flips, strict=True):
            self._note("prefix", size, count)
        first = next((i for i, (count, _) in enumerate(flips) if count >= self._wanted), None)
        if first is None:
            best = max(range(len(sizes)), key=lambda i: (flips[i][0], -i))
            return candidates[: sizes[best]]
        low, high = sizes[first - 1] if first else 0, sizes[first]
        while high - low > 1:
            middle = (low + high) // 2
            count = self.flips(candidates[:middle])
            self._note("prefix", middle, count)
            low, high = (low, middle) if count >= self._wanted else (middle, high)
        return candidates[:high]

    def pruned(self, latents: Latents) -> Latents:
        """Return a subset that flips as much, up to the wanted share, and from which no single latent can be dropped."""
        while len(latents) > 1:
            found = self._measured([_without(latents, [latent]) for latent in latents])
            # Flips most first, then leaves the lowest scores, then stands later among the candidates.
            order = sorted(range(len(latents)), key=lambda i: (-found[i][0], found[i][1], -i))
            smaller = self._dropped(latents, [latents[i] for i in order])
            if smaller is None:
                break
            latents = smaller
            self._note("pruned", len(latents), self.flips(latents))
        return latents

    def _dropped(self, latents: Latents, cheapest: list[int]) -> Latents | None:
        """Return the set without the largest number of its cheapest latents that can be missed together."""
        count = len(latents) // 4 if len(latents) > _ONE_BY_ONE else 1
        counts = [count >> i for i in range(count.bit_length())]
        sets = [_without(latents, cheapest[:count]) for count in counts]
        needed = min(self._wanted, self.flips(latents))
        for smaller, (flips, _) in zip(sets, self._measured(sets), strict=True):
            if flips >= needed:
                return smaller
        return None

    def reached(self, latents: Latents) -> bool:
        """Return whether a set flips the wanted share."""
        return self.flips(latents) >= self._wanted

    def flips(self, latents: Latents) -> int:
        """Return how many prompts flip."""
        return self._measured([latents])[0][0]

    def _measured(self, sets: Sequence[Latents]) -> list[tuple[int, float]]:
        """Return flipped prompts and mean score for each set; those not measured before run together."""
        new = [latents for latents in dict.fromkeys(sets) if latents not in self._known]
        if new:
            for latents, scores in zip(new, self._ablated.scores(self._prompts, new), strict=True):
                self._known[latents] = int((scores <= SHOWN).sum()), float(scores.mean())
        return [self._known[latents] for latents in sets]

    def _note(self, stage: Literal["prefix", "pruned"], size: int, flips: int) -> None:
        self.trace.append(Step(stage, size, flips / len(self._prompts)))


def _without(latents: Latents, dropped: Sequence[int]) -> Latents:
    return tuple(latent for latent in latents if latent not in dropped)


def _showing(ablated: _Ablated, prompts: Sequence[Tokens], seen: Sequence[Tokens]) -> tuple[list[Tokens], PromptCount]:
    """Return the prompts that show the behaviour, once each and none of `seen`, and what became of the others."""
    earlier = set(map(tuple, seen))
    unique = [prompt for prompt in dict.fromkeys(map(tuple, prompts)) if prompt not in earlier]
    scores = ablated.scores(unique, [()])[0] if unique else np.zeros(0)
    showing = [prompt for prompt, score in zip(unique, scores, strict=True) if score > SHOWN]
    count = PromptCount(len(prompts), len(prompts) - len(unique), len(unique) - len(showing), len(showing))
    return showing, count


def _judgement(ablated: _Ablated, prompts: list[Tokens], latents: Latents, controls: _Controls) -> Judgement:
    clean, without = ablated.scores(prompts, [(), latents])
    random = controls.judge(ablated, prompts)
    return Judgement(share(without <= SHOWN), float(without.mean()), float(clean.mean()), random)
