"""What a metric loses when latents are taken out: measured, not estimated.

1. The metric is measured on every prompt as it is.
2. Each latent is ablated alone on each prompt (`exact_effects`), or a set of latents together (`effect_of_set`), in
   batches that mix latents and prompts. On prompts where a latent fires nowhere, setting it to zero changes nothing:
   its effect there is 0, and no run is spent on it.
3. The effect is metric(clean) − metric(ablated): positive where the latent holds the metric up.

`rank_agreement` says how well estimates order latents as these effects do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exegete.tools.codes import codes
from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.interventions import Intervention, ablate
from exegete.tools.live_model import LiveModel, Reading
from exegete.tools.metrics import Floats, LogitPositions, Metric, Prompt, PromptTrial, numbered, values_under

Ablation = Callable[[Sequence[int]], Intervention]
"""What is done to take latents out; by default they are set to zero at every position."""


@dataclass(frozen=True)
class Agreement:
    """Spearman's rank correlation of estimates with exact effects, over latents."""

    value: float
    low: float
    """Of the 95 % interval, by Fisher's z with the variance of Bonett and Wright (2000)."""
    high: float
    floor: float
    """95th percentile of the correlation of unrelated rankings."""
    n: int


def exact_effects(
    model: LiveModel,
    dictionary: Dictionary,
    prompts: Sequence[Prompt],
    metric: Metric,
    latents: Sequence[int],
    *,
    ablation: Ablation | None = None,
    positions: LogitPositions = "last",
) -> Floats:
    """Return metric(clean) − metric(ablated) for each latent alone, shape (latent, prompt).

    Args:
        model: with the dictionary attached.
        dictionary: whose latents.
        prompts: tokens, or trials whose interventions stay in place.
        metric: see `exegete.tools.metrics`.
        latents: each is ablated by itself.
        ablation: another way to take latents out, for example `lambda latents: ablate(dictionary.fingerprint, latents,
            texts=texts)` to resample them.
        positions: which logits the metric takes.

    Raises:
        UserError: there is no prompt or no latent, one of them is not there, or the metric is not finite.
    """
    trials = _checked(model, dictionary, prompts, metric, latents)
    fires = np.ones((len(latents), len(trials)), dtype=bool)
    if ablation is None:
        fires = _fires(model, dictionary, trials, latents)
    make = ablation or _to_zero(dictionary)
    made = [make([latent]) for latent in latents]
    pairs = np.argwhere(fires)
    changes = [(int(prompt), made[row]) for row, prompt in pairs]
    clean, changed = values_under(model, trials, metric, changes, positions)
    effects = np.zeros(fires.shape)
    effects[fires] = clean[pairs[:, 1]] - changed
    return effects


def effect_of_set(
    model: LiveModel,
    dictionary: Dictionary,
    prompts: Sequence[Prompt],
    metric: Metric,
    latents: Sequence[int],
    *,
    ablation: Ablation | None = None,
    positions: LogitPositions = "last",
) -> Floats:
    """Return metric(clean) − metric(ablated) for latents that are ablated together, shape (prompt,).

    Arguments and errors are those of `exact_effects`.
    """
    trials = _checked(model, dictionary, prompts, metric, latents)
    change = (ablation or _to_zero(dictionary))(list(latents))
    clean, changed = values_under(model, trials, metric, [(index, change) for index in range(len(trials))], positions)
    return clean - changed


def rank_agreement(estimates: Sequence[float] | Floats, exact: Sequence[float] | Floats) -> Agreement:
    """Return Spearman's rank correlation of two lists of numbers over the same latents.

    The list should hold all latents that could matter: among the leaders of one of the two lists alone, the
    correlation is not that of all.

    Raises:
        UserError: there are fewer than four latents, the lists differ in length, a number is not finite, or all numbers
            of one list are the same, so that there is no order to compare.
    """
    from scipy.stats import norm, spearmanr

    first, second = np.asarray(estimates, dtype=np.float64), np.asarray(exact, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or len(first) < 4:
        raise UserError(
            f"cannot rank {first.shape} against {second.shape}; give four latents or more, the same in both"
        )
    for name, values in (("estimates", first), ("exact effects", second)):
        if not np.isfinite(values).all():
            raise UserError(f"the {name} are not all finite numbers")
        if np.ptp(values) == 0:
            raise UserError(f"the {name} are all {values[0]:g}; there is no order to compare")
    value, n = float(spearmanr(first, second).statistic), len(first)
    spread = float(norm.ppf(0.975)) * math.sqrt((1 + value**2 / 2) / (n - 3))
    centre = math.atanh(min(max(value, -1 + 1e-12), 1 - 1e-12))
    floor = min(1.0, float(norm.ppf(0.95)) / math.sqrt(n - 1))
    return Agreement(value, math.tanh(centre - spread), math.tanh(centre + spread), floor, n)


def _checked(
    model: LiveModel, dictionary: Dictionary, prompts: Sequence[Prompt], metric: Metric, latents: Sequence[int]
) -> list[PromptTrial]:
    if not len(latents):
        raise UserError("there is no latent to ablate; give at least one")
    model.require_latents(model.dictionary(dictionary.fingerprint), latents)
    return numbered(model, prompts, metric)


def _to_zero(dictionary: Dictionary) -> Ablation:
    return lambda latents: ablate(dictionary.fingerprint, [int(latent) for latent in latents])


def _fires(
    model: LiveModel, dictionary: Dictionary, trials: Sequence[PromptTrial], latents: Sequence[int]
) -> np.ndarray:
    """Return whether each latent fires anywhere on each prompt, shape (latent, prompt).

    Where a trial has an intervention, which may change these very latents, they count as firing.
    """
    chosen = torch.tensor([int(latent) for latent in latents], device=model.subject.device)

    def read(reading: Reading) -> list[np.ndarray]:
        with torch.no_grad():
            rows = range(len(reading.batch.trials))
            return [_fired(codes(dictionary, reading.of(dictionary.hook_point, row), chosen)) for row in rows]

    found = np.stack(model.run(trials, read, keep="none", points=[dictionary.hook_point]), axis=1)
    changed = np.array([bool(trial.intervention) for trial in trials])
    either: np.ndarray = found | changed
    return either


def _fired(z: Tensor) -> np.ndarray:
    fired: np.ndarray = (z != 0).any(0).cpu().numpy()
    return fired
