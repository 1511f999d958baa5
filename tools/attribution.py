"""Attribution: which latents hold a metric up, estimated for all of them at once from gradients.

Attribution patching, as in Marks et al. 2024, "Sparse Feature Circuits", section 3.1, on one dictionary:

1. The vector x at the point that the dictionary writes to becomes a leaf: x = decode(z) + error.
2. One backward pass gives the gradient g of the metric at x, for every prompt and position of a batch.
3. The attribution of a latent at a position is z · ∂metric/∂z = z · (g · its direction); where `decode` is no linear
   map, g is taken back through it. The attribution of the error node is error · g.
4. With `steps` > 0, integrated gradients: g is averaged along α z, α from 0 to 1 by the midpoint rule, the error as it
   is. These attributions sum to metric(clean) − metric(all latents at zero). For the error node likewise, with α · error.
5. With `groups` > 1, latents are dealt at random into so many groups, and each group has a path of its own, on which
   all others stay. One path for all leads far from what the model ever sees, and what it averages there says little
   about a latent taken out alone. The more groups, the nearer an estimate is to its exact effect, for as many passes.

Sign: an attribution estimates metric(clean) − metric(without it), positive where the latent holds the metric up. What
the estimates are worth stands beside them: the exact effect of the leaders and of as many latents drawn at random, how
well the two orders agree, and for all latents, and the error node, the sum of the attributions and the exact effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exegete.tools.attribution_passes import Found, attributed
from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.estimates import Estimate, estimate
from exegete.tools.exact_effects import (
    Ablation,
    Agreement,
    effect_of_set,
    exact_effects,
    rank_agreement,
)
from exegete.tools.live_model import LiveModel
from exegete.tools.metrics import (
    Floats,
    KLFromClean,
    LogitDifference,
    LogitPositions,
    LogProbability,
    Metric,
    Prompt,
    numbered,
)
from exegete.tools.seeds import generator

__all__ = [
    "Ablation",
    "Agreement",
    "Attribution",
    "Completeness",
    "Entries",
    "KLFromClean",
    "LatentAttribution",
    "LogProbability",
    "LogitDifference",
    "Metric",
    "attribute",
    "effect_of_set",
    "exact_effects",
    "rank_agreement",
]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Entries:
    """Attributions, one entry for each place where a latent is active. Each column has shape (entries,)."""

    prompt: Ints
    position: Ints
    """Of the prompt's tokens, from 0."""
    latent: Ints
    """−1 for the error node."""
    activation: Floats
    """For the error node, the length of the error vector."""
    attribution: Floats


@dataclass(frozen=True)
class LatentAttribution:
    """What is held about one latent: summed over positions, then averaged over prompts."""

    latent: int
    attribution: Estimate
    exact: Estimate | None
    """The effect of ablating it alone; None where it was not asked for."""


@dataclass(frozen=True)
class Completeness:
    """The sum of attributions beside the exact effect of taking all of it out at once."""

    attribution: Estimate
    exact: Estimate
    gap: Estimate
    """Of the absolute difference; integrated gradients bring it to 0 as `steps` grow."""


@dataclass(frozen=True, eq=False)
class Attribution:
    """The result of `attribute`."""

    dictionary: str
    """Fingerprint."""
    steps: int
    groups: int
    clean: Floats
    """The metric on each prompt, shape (prompt,)."""
    ranked: tuple[LatentAttribution, ...]
    """By absolute mean attribution, the largest first; those of the first `exact` with their exact effect."""
    drawn: tuple[LatentAttribution, ...]
    """Latents drawn at random from the other active ones: what an exact effect is like by chance."""
    floor: float | None
    """95th percentile of the absolute exact effects of `drawn`; None where there are none."""
    agreement: Agreement | None
    """Of estimate and exact effect over leaders and `drawn`; None where fewer than four have an exact effect, or all of
    these are equal."""
    entries: Entries
    """Of every active latent, sorted by prompt, position, latent."""
    errors: Entries
    """Of the error node, one for each position."""
    latents_total: Completeness
    """All latents of a group at zero, the error kept; summed over groups."""
    error_total: Completeness
    """The error at zero, the latents kept."""
    error_share: Estimate
    """Of the absolute attributions over all nodes and positions of a prompt, those of the error node."""

    @property
    def active(self) -> Ints:
        """Every latent that is active on a prompt, in rising order."""
        return np.unique(self.entries.latent)

    def by_prompt(self, latents: Sequence[int] | Ints) -> Floats:
        """Return attributions summed over positions, shape (latent, prompt): the estimate of `exact_effects`."""
        return _summed(self.entries, np.asarray(latents, dtype=np.int64), len(self.clean))


def attribute(
    model: LiveModel,
    dictionary: Dictionary,
    prompts: Sequence[Prompt],
    metric: Metric,
    *,
    steps: int = 0,
    groups: int = 1,
    top: int = 50,
    exact: int = 20,
    seed: int = 0,
    positions: LogitPositions = "last",
) -> Attribution:
    """Attribute a metric to every active latent at every position, and to the dictionary's error.

    Args:
        model: with the dictionary attached.
        dictionary: whose latents.
        prompts: tokens, or trials whose interventions stay in place (on anything but latents of this dictionary).
        metric: `LogitDifference`, `LogProbability`, `KLFromClean`, or any function of logits (see `metrics`), which
            gradients must pass through.
        steps: of integrated gradients; 0 takes the gradient at the clean run alone.
        groups: of latents, each with paths of its own. `steps=1, groups=32` costs 33 forward and backward passes, and
            is the choice where a rank must be trusted.
        top: how many latents to rank.
        exact: how many of the leaders get their exact effect, and how many others, drawn at random, as the control.
        seed: of that draw, and of the groups.
        positions: which logits the metric takes.

    Raises:
        UserError: `steps`, `groups`, `top` or `exact` is out of range; the metric is flat at the clean run and `steps` is 0, does
            not depend on the logits, or is not finite; a trial changes latents of this dictionary; or as
            `LiveModel.run`.
    """
    dictionary = model.dictionary(dictionary.fingerprint)
    _check(metric, steps, groups, top, exact)
    trials = numbered(model, prompts, metric)
    found = attributed(model, dictionary, trials, metric, steps, _dealt(dictionary, groups, seed), positions)
    _require_slope(found, steps)
    entries = _entries(found)
    leaders = _leaders(entries)
    drawn = generator(seed, "attribution", "control").permutation(np.sort(leaders[exact:]))[:exact]
    measure = partial(exact_effects, model, dictionary, prompts, metric, positions=positions)
    effects, controls = _measured(leaders[:exact], drawn, len(found), measure)
    ranked, control = _estimates(entries, leaders[:top], effects), _estimates(entries, drawn, controls)
    return Attribution(
        dictionary=dictionary.fingerprint,
        steps=steps,
        groups=groups,
        clean=np.array([one.clean for one in found]),
        ranked=ranked,
        drawn=control,
        floor=_floor(control),
        agreement=_agreement([*ranked, *control]),
        entries=entries,
        errors=_errors(found),
        latents_total=_completeness([(float(one.attributions.sum()), one.without_latents) for one in found]),
        error_total=_completeness([(float(one.errors.sum()), one.without_error) for one in found]),
        error_share=estimate([_error_share(one) for one in found]),
    )


def _check(metric: Metric, steps: int, groups: int, top: int, exact: int) -> None:
    if steps < 0 or top < 1 or exact < 0:
        raise UserError(f"steps={steps}, top={top}, exact={exact}; steps and exact must be 0 or more, top 1 or more")
    if groups < 1 or (groups > 1 and not steps):
        raise UserError(f"groups={groups}, steps={steps}; give 1 group or more, and with several at least 1 step")
    if isinstance(metric, KLFromClean) and not steps:
        raise UserError(
            "KL from the clean run has no gradient at the clean run; pass steps=1, groups=32 for integrated gradients"
        )


def _require_slope(found: Sequence[Found], steps: int) -> None:
    if not steps and not any(one.moves for one in found):
        raise UserError(
            "the metric's gradient is 0 on every prompt at the clean run; pass steps=1, groups=32, or another metric"
        )


def _dealt(dictionary: Dictionary, groups: int, seed: int) -> Tensor:
    """Return in which group each latent is, shape (latent,)."""
    order = generator(seed, "attribution", "groups").permutation(dictionary.latents)
    return torch.from_numpy(order % groups).to(dictionary.device)


def _entries(found: Sequence[Found]) -> Entries:
    return Entries(
        prompt=np.repeat(np.arange(len(found)), [len(one.latents) for one in found]),
        position=np.concatenate([one.positions for one in found]),
        latent=np.concatenate([one.latents for one in found]),
        activation=np.concatenate([one.activations for one in found]),
        attribution=np.concatenate([one.attributions for one in found]),
    )


def _errors(found: Sequence[Found]) -> Entries:
    lengths = [len(one.errors) for one in found]
    return Entries(
        prompt=np.repeat(np.arange(len(found)), lengths),
        position=np.concatenate([np.arange(length) for length in lengths]),
        latent=np.full(sum(lengths), -1),
        activation=np.concatenate([one.error_lengths for one in found]),
        attribution=np.concatenate([one.errors for one in found]),
    )


def _leaders(entries: Entries) -> Ints:
    """Return every active latent, the one of the largest absolute sum first, of equal ones the smaller index."""
    latents, places = np.unique(entries.latent, return_inverse=True)
    totals = np.bincount(places, entries.attribution, len(latents))
    return latents[np.argsort(-np.abs(totals), kind="stable")]


def _measured(
    leaders: Ints, drawn: Ints, prompts: int, measure: Callable[[Sequence[int]], Floats]
) -> tuple[Floats, Floats]:
    """Return exact effects of the leaders and of the others, shape (latent, prompt), from runs that both share."""
    latents = np.concatenate([leaders, drawn]).tolist()
    effects = measure(latents) if latents else np.zeros((0, prompts))
    return effects[: len(leaders)], effects[len(leaders) :]


def _summed(entries: Entries, latents: Ints, prompts: int) -> Floats:
    """Return attributions summed over positions, shape (latent, prompt)."""
    totals = np.zeros((len(latents), prompts))
    if not len(latents):
        return totals
    order = np.argsort(latents, kind="stable")
    rows = order[np.minimum(np.searchsorted(latents, entries.latent, sorter=order), len(latents) - 1)]
    held = latents[rows] == entries.latent
    np.add.at(totals, (rows[held], entries.prompt[held]), entries.attribution[held])
    return totals


def _estimates(entries: Entries, latents: Ints, effects: Floats) -> tuple[LatentAttribution, ...]:
    """Return the estimates of latents; the first of them have exact effects, shape (latent, prompt)."""
    return tuple(
        LatentAttribution(latent, estimate(total), estimate(effects[rank]) if rank < len(effects) else None)
        for rank, (latent, total) in enumerate(
            zip(latents.tolist(), _summed(entries, latents, effects.shape[1]), strict=True)
        )
    )


def _agreement(estimates: Sequence[LatentAttribution]) -> Agreement | None:
    pairs = [(one.attribution.value, one.exact.value) for one in estimates if one.exact is not None]
    if len(pairs) < 4:
        return None
    attributions, exact = np.array(pairs).T
    if np.ptp(attributions) == 0 or np.ptp(exact) == 0:
        return None
    return rank_agreement(attributions, exact)


def _floor(control: Sequence[LatentAttribution]) -> float | None:
    effects = [abs(one.exact.value) for one in control if one.exact is not None]
    return float(np.quantile(effects, 0.95)) if effects else None


def _completeness(pairs: Sequence[tuple[float, float]]) -> Completeness:
    attributions, exact = np.array(pairs).T
    gap = np.abs(attributions - exact)
    return Completeness(estimate(attributions), estimate(exact), estimate(gap))


def _error_share(found: Found) -> float:
    error, latents = float(np.abs(found.errors).sum()), float(np.abs(found.attributions).sum())
    return error / (error + latents) if error + latents else 0.0
