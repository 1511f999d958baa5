"""Sets of latents to ablate, and random sets that they are compared with.

A random set has, for each latent of the set it stands beside, one that fires about as often: drawn from the few live
latents outside the set whose firing rates are nearest, on a logarithmic scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from exegete.tools.codes import blocks
from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.interventions import CLEAN, Intervention, Positions, Tokens, ablate, patch
from exegete.tools.live_model import LiveModel, Trial
from exegete.tools.seeds import generator

_NEAREST = 10
"""Latents among which one of a random set is drawn."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ablation:
    """How latents are taken out: to zero, or to means over a corpus, or to what they are in other texts."""

    positions: Positions = "all"
    means: Sequence[float] | None = None
    """Mean activation of every latent of the dictionary."""
    texts: tuple[Tokens, ...] | None = None
    """Tokens of texts to draw activations from."""
    sources: Mapping[Tokens, Tokens] | None = None
    """Prompt → the prompt whose activations its latents take, for example with the cue changed (interchange)."""
    seed: int = 0
    """Of the draws from `texts`."""

    def of(self, dictionary: Dictionary, latents: Sequence[int], prompt: Tokens) -> Intervention:
        """Return the intervention on these latents while the model reads `prompt`; none for no latents.

        Raises:
            UserError: there is more than one of means, texts and sources, not one mean for each latent of the dictionary,
                or no source for the prompt.
        """
        given = [self.means, self.texts, self.sources]
        if sum(one is not None for one in given) > 1:
            raise UserError("an ablation takes one of means, texts and sources; give one, or none to ablate to zero")
        numbers = [int(latent) for latent in latents]
        if not numbers:
            return CLEAN
        if self.sources is not None:
            return patch(dictionary.fingerprint, numbers, self.source(prompt), self.positions)
        means = None
        if self.means is not None:
            if len(self.means) != dictionary.latents:
                raise UserError(
                    f"{len(self.means)} means are given; dictionary {dictionary.name!r} has {dictionary.latents} latents"
                )
            means = [float(self.means[latent]) for latent in numbers]
        return ablate(dictionary.fingerprint, numbers, self.positions, means=means, texts=self.texts, seed=self.seed)

    def source(self, prompt: Tokens) -> Tokens:
        """Return the prompt that `prompt` takes activations from.

        Raises:
            UserError: there is none.
        """
        found = (self.sources or {}).get(tuple(prompt))
        if found is None:
            raise UserError(f"no source is given for the prompt of {len(prompt)} tokens {tuple(prompt)[:8]}…; give one")
        return tuple(found)

    def trials(self, dictionary: Dictionary, sets: Sequence[Sequence[int]], prompts: Sequence[Tokens]) -> list[Trial]:
        """Return one trial for each set of latents and prompt, set by set."""
        trials = []
        for latents in sets:
            done = self.of(dictionary, latents, prompts[0]) if prompts and self.sources is None else None
            trials += [Trial(prompt, done or self.of(dictionary, latents, prompt)) for prompt in prompts]
        return trials


ZERO = Ablation()


def require_set(model: LiveModel, dictionary: Dictionary, latents: Sequence[int], what: str) -> tuple[int, ...]:
    """Return the latents, as integers.

    Raises:
        UserError: there are none, one is there twice or not in the dictionary, or the dictionary is not attached.
    """
    model.dictionary(dictionary.fingerprint)
    if len(latents) == 0:
        raise UserError(f"there are no {what}; give at least one latent")
    if any(int(latent) != latent for latent in latents):
        raise UserError(f"{what} are numbers of latents, not {list(latents)[:5]}")
    numbers = tuple(int(latent) for latent in latents)
    twice = [latent for latent in dict.fromkeys(numbers) if numbers.count(latent) > 1]
    if twice:
        raise UserError(f"latent {twice[0]} is among the {what} more than once; name each once")
    model.require_latents(dictionary, numbers)
    return numbers


def spelled(model: LiveModel, tokens: Tokens) -> Tensor:
    """Return which tokens of a prompt text spells, shape (token,)."""
    special = model.subject.special_tokens
    return torch.tensor([token not in special for token in tokens], device=model.subject.device)


def dense_codes(dictionary: Dictionary, x: Tensor) -> list[Tensor]:
    """Return the code of one prompt's vectors, shape (token, width), in parts of its tokens, (tokens, latent) each."""
    if dictionary.conditioned:
        return [dictionary.encode(x[None])[0]]
    return [dictionary.encode(part) for part in blocks(x, dictionary)]


def require_rates(dictionary: Dictionary, rates: ArrayLike) -> Floats:
    """Return firing rates as an array, shape (latent,).

    Raises:
        UserError: they are not one share for each latent.
    """
    found = np.asarray(rates, dtype=np.float64)
    if found.shape != (dictionary.latents,):
        raise UserError(
            f"rates have shape {found.shape}; dictionary {dictionary.name!r} needs ({dictionary.latents},): one each"
        )
    wrong = found[~((found >= 0) & (found <= 1))]
    if len(wrong):
        raise UserError(f"a firing rate is {wrong[0]}; it must be between 0 and 1")
    return found


def random_sets(
    latents: Sequence[int], rates: Floats, count: int, seed: int, *, distinct: bool = False
) -> list[tuple[int, ...]]:
    """Return `count` sets of as many live latents outside `latents`, matched in firing rate.

    Args:
        latents: the set that they stand beside.
        rates: share of tokens on which each latent of the dictionary fires, shape (latent,).
        count: how many sets; none come back where fewer live latents than needed are outside the set.
        seed: each set depends on it, its own number and the set alone.
        distinct: no set is there twice, as a test by rank among them needs it. For one latent they are the others nearest
            in firing rate, for more they are drawn from wider neighbourhoods; fewer come back where there are no more.
    """
    outside = np.setdiff1d(np.flatnonzero(rates > 0), latents)
    if len(outside) < len(latents):
        return []
    if distinct:
        return _distinct(latents, outside, rates, count, seed)
    ranked = _ranked(latents, outside, rates, _NEAREST)
    return [_drawn(ranked, _NEAREST, generator(seed, "random set", i, *latents)) for i in range(count)]


def _distinct(
    latents: Sequence[int], outside: NDArray[np.int64], rates: Floats, count: int, seed: int
) -> list[tuple[int, ...]]:
    if len(latents) == 1:
        return [(latent,) for latent in _ranked(latents, outside, rates, count)[0]]
    # Of n neighbours of each of k latents about n^k sets can be made: ten times as many as are wanted are seldom twice.
    nearest = max(_NEAREST, math.ceil((10 * count) ** (1 / len(latents))))
    ranked = _ranked(latents, outside, rates, nearest)
    found: dict[frozenset[int], tuple[int, ...]] = {}
    for i in range(4 * count):
        drawn = _drawn(ranked, nearest, generator(seed, "random set", i, *latents))
        found.setdefault(frozenset(drawn), drawn)
        if len(found) == count:
            break
    return list(found.values())


def _ranked(latents: Sequence[int], outside: NDArray[np.int64], rates: Floats, nearest: int) -> list[list[int]]:
    """Return for each latent those outside that are nearest in firing rate, the nearest first, equal ones by their number.

    Each list has `nearest` and one for each latent that may have been drawn before, as far as there are so many.
    """
    level = np.log(np.maximum(rates, rates[outside].min() / 2))
    most = min(nearest + len(latents) - 1, len(outside))
    found = []
    # The most frequent first: few latents fire as often, and they should not be taken for others.
    for latent in sorted(latents, key=lambda latent: (-rates[latent], latent)):
        distance = np.abs(level[outside] - level[latent])
        # Sorting the whole dictionary for each latent would take most of the time of an experiment.
        last = max(most, 1) - 1
        near = np.flatnonzero(distance <= np.partition(distance, last)[last])
        found.append([int(one) for one in outside[near[np.argsort(distance[near], kind="stable")[:most]]]])
    return found


def _drawn(ranked: Sequence[Sequence[int]], nearest: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Return one of the `nearest` of each ranking that are not drawn yet, in their order."""
    drawn: dict[int, None] = {}
    for ranking in ranked:
        near = list(islice((latent for latent in ranking if latent not in drawn), nearest))
        drawn[near[rng.integers(len(near))]] = None
    return tuple(drawn)
