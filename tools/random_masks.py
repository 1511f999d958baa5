"""What each latent of a set does on its own and in company: ablations of random subsets.

1. Every trial ablates a random subset of the latents, each kept with probability `keep_share`, and takes the metric on
   every prompt. Some random latents that fire as often are masked with them: what these seem to do is the noise floor.
2. For each prompt the metric is fitted by least squares as a constant plus one effect for each ablated latent. With
   `keep_share` one half an effect estimates the latent's Banzhaf value (Hammer & Holzman 1992), the cousin of Shapley's
   that weighs all subsets alike: its mean effect over what else is ablated.
3. The mean over prompts has two sources of error: which masks were drawn (heteroscedasticity-robust, HC3) and which
   prompts. Their variances are added, which is conservative (Cameron, Gelbach & Miller 2011 subtract what both share).
4. How much of the metric such a sum explains is measured by leaving out each mask in turn. What it does not explain is
   noise of the metric or interactions: see `exegete.tools.interactions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
from exegete.tools.intervals import Figure, around
from exegete.tools.interventions import Tokens
from exegete.tools.judged_behaviours import Measure, measured
from exegete.tools.live_model import LiveModel
from exegete.tools.seeds import generator


@dataclass(frozen=True)
class OwnEffect:
    """What the ablation of one latent adds to the metric, on average over random subsets of the others."""

    latent: int
    control: bool
    """Whether it is a random latent, put among the others for comparison."""
    effect: Figure
    """With its interval over masks and prompts; `n` is the number of different prompts."""


@dataclass(frozen=True, eq=False)
class RandomMasks:
    """Trials of random masks, and the effects fitted to them."""

    latents: tuple[int, ...]
    """Columns of `masks`: those asked for, then the controls."""
    masks: NDArray[np.bool_]
    """Shape (mask, latent): true where it is ablated."""
    values: Floats
    """The metric, shape (mask, prompt)."""
    effects: tuple[OwnEffect, ...]
    """Of the latents asked for, the largest size first; then of the controls, likewise."""
    floor: float | None
    """95th percentile of the controls' absolute effects; None without controls."""
    r2: float | None
    """Share of the variance over masks of the mean metric that the fit predicts for masks left out of it; below 0 where it
    predicts worse than the mean does, None where the metric does not vary."""


def random_masks(
    model: LiveModel,
    dictionary: Dictionary,
    latents: Sequence[int],
    prompts: Sequence[Tokens],
    measure: Measure,
    *,
    trials: int = 256,
    keep_share: float = 0.5,
    ablation: Ablation = ZERO,
    controls: int = 10,
    rates: ArrayLike | None = None,
    seed: int = 0,
) -> RandomMasks:
    """Ablate random subsets of latents and estimate what each does.

    Args:
        model: the live model, with `dictionary` attached.
        dictionary: of the latents.
        latents: that are masked.
        prompts: on each of which every mask is tried; repeated ones once.
        measure: what is taken of each trial; a logit difference (`Margin`) is better suited than a yes or no.
        trials: masks, more than twice as many as latents and controls.
        keep_share: probability that a latent is not ablated.
        ablation: how latents are taken out, and where.
        controls: random latents, matched in firing rate, masked together with the others.
        rates: share of tokens on which each latent fires, shape (latent,); by default measured on the prompts.
        seed: of masks and controls; a mask depends on its number, not on how many there are.

    Raises:
        UserError: there are no latents or prompts, a latent is given twice or is not in the dictionary, there are too few
            masks or too few live latents for the controls, the metric is not finite, or as `LiveModel.run`.
    """
    asked = require_set(model, dictionary, latents, "latents")
    different = list(dict.fromkeys(map(tuple, prompts)))
    if not different:
        raise UserError("there are no prompts to try masks on; give at least one")
    if not 0 < keep_share < 1 or controls < 0:
        raise UserError(f"keep_share is {keep_share}, controls {controls}; give 0 < keep_share < 1 and controls ≥ 0")
    together = (*asked, *_controls(model, dictionary, asked, different, controls, rates, seed))
    if trials <= 2 * len(together):
        raise UserError(
            f"{trials} masks are too few to tell {len(together)} latents apart (controls included); "
            f"give trials={4 * len(together)} or more"
        )
    masks = _masks(len(together), trials, keep_share, seed)
    values = _values(model, dictionary, together, masks, different, measure, ablation)
    found, r2 = _fit(masks, values)
    effects = [OwnEffect(k, i >= len(asked), found[i]) for i, k in enumerate(together)]
    effects.sort(key=lambda one: (one.control, -abs(one.effect.value), one.latent))
    sizes = [abs(one.effect.value) for one in effects if one.control]
    return RandomMasks(together, masks, values, tuple(effects), float(np.quantile(sizes, 0.95)) if sizes else None, r2)


def _controls(
    model: LiveModel,
    dictionary: Dictionary,
    latents: tuple[int, ...],
    prompts: Sequence[Tokens],
    count: int,
    rates: ArrayLike | None,
    seed: int,
) -> tuple[int, ...]:
    if not count:
        return ()
    known = firing_rates(model, dictionary, prompts) if rates is None else require_rates(dictionary, rates)
    # As many as wanted, each matched to a latent drawn from the set: whole rounds of it, then a part.
    rng = generator(seed, "matched to", *latents)
    wanted = list(latents) * (count // len(latents)) + [
        int(k) for k in rng.permutation(latents)[: count % len(latents)]
    ]
    sets = random_sets(wanted, known, 1, seed)
    if not sets:
        live = int((known > 0).sum())
        raise UserError(
            f"only {live} latents are live, too few for {count} controls beside {len(latents)}; give fewer controls"
        )
    return sets[0]


def _masks(latents: int, trials: int, keep_share: float, seed: int) -> NDArray[np.bool_]:
    return np.stack([generator(seed, "random mask", i).random(latents) >= keep_share for i in range(trials)])


def _values(
    model: LiveModel,
    dictionary: Dictionary,
    latents: tuple[int, ...],
    masks: NDArray[np.bool_],
    prompts: Sequence[Tokens],
    measure: Measure,
    ablation: Ablation,
) -> Floats:
    """Return the metric, shape (mask, prompt)."""
    sets = [[latents[i] for i in np.flatnonzero(mask)] for mask in masks]
    trials = ablation.trials(dictionary, sets, prompts)
    return measured(model, measure, trials).reshape(len(masks), len(prompts))


def _fit(masks: NDArray[np.bool_], values: Floats) -> tuple[list[Figure], float | None]:
    """Return the effect of each column of `masks`, and the share of variance explained of masks left out."""
    design = np.column_stack([np.ones(len(masks)), masks.astype(np.float64)])
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise UserError(f"{len(masks)} masks do not tell all latents apart; give more trials, or keep_share nearer 0.5")
    inverse = np.linalg.pinv(design)
    each = inverse @ values
    level = values.mean(1)
    leverage = (design * inverse.T).sum(1)
    left_out = (level - design @ (inverse @ level)) / np.maximum(1 - leverage, 1e-9)
    variance = (inverse**2) @ left_out**2
    prompts = values.shape[1]
    degrees = len(masks) - design.shape[1]
    if prompts > 1:
        variance = variance + each.var(1, ddof=1) / prompts
        degrees = min(degrees, prompts - 1)
    found = [
        around(float(effect), float(np.sqrt(error)), degrees, prompts)
        for effect, error in zip(each.mean(1)[1:], variance[1:], strict=True)
    ]
    return found, _r2(level, left_out)


def _r2(level: Floats, left_out: Floats) -> float | None:
    # The mean, too, is taken without the mask that it predicts.
    total = float((((level - level.mean()) * len(level) / (len(level) - 1)) ** 2).sum())
    return 1 - float((left_out**2).sum()) / total if total > 0 else None
