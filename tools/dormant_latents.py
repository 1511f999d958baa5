"""Which latents rise when others are ablated: dormant ones, that may repair what was taken away.

1. Each prompt runs clean and with the set ablated, and all latents of a watched dictionary are read at its hook point, after
   the ablation. Their mean activations over the prompt's tokens are subtracted.
2. The mean of these differences over prompts is a latent's rise; divided by their standard deviation it is the effect size
   (Cohen's d of paired samples).
3. The same is done with random sets as large that fire as often. The largest rise under each of them is noted; the 95th
   percentile of these is what a rise must exceed to be called one.

Where the watched dictionary is the ablated one, what is read is the code of the changed residual, encoded again. There
others rise already because the ablated latents leave room (TopK), or because directions overlap; only rises at a later
layer show that the model itself makes up for the loss (McGrath et al. 2023, "The Hydra effect").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from exegete.tools.ablation_sets import (
    ZERO,
    Ablation,
    Floats,
    dense_codes,
    random_sets,
    require_rates,
    require_set,
    spelled,
)
from exegete.tools.controls import firing_rates
from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.intervals import Figure, around
from exegete.tools.interventions import Tokens
from exegete.tools.live_model import LiveModel, Reading

_ENTRIES = 2**25
"""Activations that are held at once."""


@dataclass(frozen=True)
class Riser:
    """A latent whose activation rises."""

    latent: int
    """Of the watched dictionary."""
    clean: float
    """Mean activation over prompts when nothing is changed."""
    rise: Figure
    """What the ablation adds to it, with Student's interval; `n` is the number of prompts."""
    effect_size: float | None
    """The rise over its standard deviation between prompts; None where that is zero."""
    under_random_sets: float | None
    """Mean rise of this latent under the random sets; None without any."""
    above_floor: bool | None
    """Whether it rises more than `DormantLatents.floor`; None without random sets."""


@dataclass(frozen=True)
class DormantLatents:
    """Latents that rise, and how much latents rise when random sets are ablated."""

    risers: tuple[Riser, ...]
    """The largest rise first; never the ablated latents themselves."""
    above_floor: int | None
    """How many of all latents, not only those listed, rise more than `floor`; None without random sets."""
    floor: float | None
    """95th percentile, over random sets, of the largest rise of any latent; None without random sets."""
    random_sets: int
    re_encoded: bool
    """Whether the watched dictionary reads where the ablation was made, so that no later layer had a part in the rise."""


def dormant_latents(
    model: LiveModel,
    dictionary: Dictionary,
    ablated: Sequence[int],
    prompts: Sequence[Tokens],
    *,
    watched: Dictionary | None = None,
    ablation: Ablation = ZERO,
    top: int = 10,
    controls: int = 20,
    rates: ArrayLike | None = None,
    seed: int = 0,
) -> DormantLatents:
    """Return the latents that rise most when a set is ablated, beside random sets.

    Args:
        model: the live model, with `dictionary` and `watched` attached.
        dictionary: of the ablated latents.
        ablated: the set.
        prompts: at least two different ones; repeated ones run once.
        watched: whose latents are read; by default `dictionary` itself.
        ablation: how latents are taken out, and where.
        top: risers to return, at most.
        controls: random sets.
        rates: share of tokens on which each latent of `dictionary` fires, shape (latent,), to match random sets by; by
            default measured on the prompts.
        seed: of the random sets.

    Raises:
        UserError: there are no latents or fewer than two prompts, a latent is given twice or is not in its dictionary,
            the watched one reads before the ablation, too few live latents are outside the set for random sets,
            activations are not finite, or as `LiveModel.run`.
    """
    latents = require_set(model, dictionary, ablated, "ablated latents")
    watched = model.dictionary((watched or dictionary).fingerprint)
    _require_later(model, dictionary, watched)
    different = list(dict.fromkeys(map(tuple, prompts)))
    if len(different) < 2:
        raise UserError(f"{len(different)} prompts cannot show how much a rise varies; give at least 2 different ones")
    if top < 1 or controls < 0:
        raise UserError(f"top is {top}, controls {controls}; give top ≥ 1 and controls ≥ 0")
    sets = [latents, *_sets(model, dictionary, latents, different, controls, rates, seed)]
    changes = _Changes(model, dictionary, watched, ablation, [(), *sets])
    changes.add(different)
    if dictionary.fingerprint == watched.fingerprint:
        changes.leave_out_ablated()
    return changes.found(watched.hook_point == dictionary.hook_point_out, top)


def _require_later(model: LiveModel, dictionary: Dictionary, watched: Dictionary) -> None:
    order = list(model.subject.hook_points)
    if order.index(watched.hook_point) < order.index(dictionary.hook_point_out):
        raise UserError(
            f"dictionary {watched.name!r} reads at {watched.hook_point!r}, before the ablation at "
            f"{dictionary.hook_point_out!r} can change it; watch one at that hook point or later"
        )


def _sets(
    model: LiveModel,
    dictionary: Dictionary,
    latents: tuple[int, ...],
    prompts: Sequence[Tokens],
    count: int,
    rates: ArrayLike | None,
    seed: int,
) -> list[tuple[int, ...]]:
    if not count:
        return []
    known = firing_rates(model, dictionary, prompts) if rates is None else require_rates(dictionary, rates)
    found = random_sets(latents, known, count, seed)
    if not found:
        live = int((known > 0).sum())
        raise UserError(f"only {live} latents are live, too few for random sets of {len(latents)}; pass controls=0")
    return found


class _Changes:
    """What ablating sets changes in the mean activations of all watched latents, summed over prompts.

    The first set is empty; the second is the one in question.
    """

    def __init__(
        self,
        model: LiveModel,
        dictionary: Dictionary,
        watched: Dictionary,
        ablation: Ablation,
        sets: Sequence[tuple[int, ...]],
    ) -> None:
        self._model = model
        self._dictionary = dictionary
        self._watched = watched
        self._ablation = ablation
        self._sets = sets
        self._clean = np.zeros(watched.latents)
        self._sums = np.zeros((len(sets) - 1, watched.latents))
        self._squares = np.zeros(watched.latents)
        self._n = 0

    def add(self, prompts: Sequence[Tokens]) -> None:
        """Run prompts with every set ablated, so many at a time that their codes can be held."""
        size = max(1, _ENTRIES // (len(self._sets) * self._watched.latents))
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            trials = self._ablation.trials(self._dictionary, self._sets, part)
            found = self._model.run(trials, self._read, keep="none", points=[self._watched.hook_point])
            means = np.stack(found).astype(np.float64).reshape(len(self._sets), len(part), -1)
            if not np.isfinite(means).all():
                raise UserError(f"dictionary {self._watched.name!r} gives activations that are not finite")
            differences = means[1:] - means[0]
            self._clean += means[0].sum(0)
            self._sums += differences.sum(1)
            self._squares += (differences[0] ** 2).sum(0)
            self._n += len(part)

    def _read(self, reading: Reading) -> list[NDArray[np.float32]]:
        return [self._mean(reading, row) for row in range(len(reading.batch.trials))]

    def _mean(self, reading: Reading, row: int) -> NDArray[np.float32]:
        tokens = reading.batch.trials[row].tokens
        counted = spelled(self._model, tokens)
        if not bool(counted.any()):
            raise UserError("a prompt has special tokens only; give some text")
        total, start = torch.zeros(self._watched.latents, device=counted.device), 0
        for part in dense_codes(self._watched, reading.of(self._watched.hook_point, row)):
            total += part[counted[start : start + len(part)]].float().sum(0)
            start += len(part)
        found: NDArray[np.float32] = (total / counted.sum()).cpu().numpy()
        return found

    def leave_out_ablated(self) -> None:
        """Let no latent count as rising under its own ablation."""
        for row, latents in enumerate(self._sets[1:]):
            self._sums[row, list(latents)] = -np.inf

    def found(self, re_encoded: bool, top: int) -> DormantLatents:
        """Return the latents that rise most."""
        rises = self._sums / self._n
        controls = rises[1:]
        floor = float(np.quantile(np.maximum(controls.max(1), 0), 0.95)) if len(controls) else None
        order = np.argsort(-rises[0], kind="stable")[:top]
        return DormantLatents(
            risers=tuple(self._riser(int(k), rises, floor) for k in order if rises[0, k] > 0),
            above_floor=None if floor is None else int((rises[0] > floor).sum()),
            floor=floor,
            random_sets=len(controls),
            re_encoded=re_encoded,
        )

    def _riser(self, latent: int, rises: Floats, floor: float | None) -> Riser:
        rise = float(rises[0, latent])
        variance = max(0.0, float(self._squares[latent]) - self._n * rise**2) / (self._n - 1)
        # Squares of equal differences leave rounding.
        deviation = np.sqrt(variance) if variance > 1e-12 * rise**2 else 0.0
        under = rises[1:, latent]
        finite = under[np.isfinite(under)]
        return Riser(
            latent=latent,
            clean=float(self._clean[latent]) / self._n,
            rise=around(rise, float(deviation / np.sqrt(self._n)), self._n - 1, self._n),
            effect_size=rise / float(deviation) if deviation else None,
            under_random_sets=float(finite.mean()) if len(finite) else None,
            above_floor=None if floor is None else rise > floor,
        )
