"""Controls of causal claims: random latents of the same firing rate and random directions, at the same KL (PROTOCOLS §8).

Any vector of enough length changes what a model says. A claim about a latent needs to know what another latent that fires
as often, and a direction that means nothing, do at equal strength:

1. `firing_rates`: on which share of tokens each latent fires, on given texts.
2. `random_latents`: drawn from those nearest in log rate; the result says how near.
3. `random_direction`: uniform on the unit sphere.
4. `controlled`: the strength of each is matched to one KL in common batches, and the same measure is taken of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exegete.tools.codes import blocks
from exegete.tools.dictionaries import Dictionary, PlainDictionary
from exegete.tools.errors import UserError
from exegete.tools.estimates import Estimate, estimate
from exegete.tools.interventions import Intervention, Positions, Tokens, push, steer
from exegete.tools.live_model import LiveModel, Reading, Trial
from exegete.tools.seeds import derive_seed, generator
from exegete.tools.strength import Make, Matched, match_strengths

Rates = NDArray[np.float64]
"""Share of tokens on which a latent fires, shape (latent,)."""
Measure = Callable[[Intervention], Sequence[float]]
"""What an intervention does: one number for each prompt or other independent unit, the same units every time."""
Kind = Literal["latent", "random latent", "random direction"]

_BAND = 0.1
"""Controls are drawn from the latents this near in log rate …"""
_CHOICE = 4
"""… or, where these are too few, from so many times as many as are wanted."""


@dataclass(frozen=True)
class RandomLatents:
    """Latents drawn for their firing rate, which is all that is matched."""

    latents: tuple[int, ...]
    rates: tuple[float, ...]
    """Theirs, in the same order."""
    wanted: float
    """The rate that was to be matched."""
    candidates: int
    """Latents that they were drawn from."""
    farthest: float
    """Largest ratio between a rate drawn and the wanted one, either way up: 1.1 is 10 % off. 1 where none fires."""


@dataclass(frozen=True)
class Arm:
    """The latent, or one control, at the common KL."""

    kind: Kind
    latent: int | None
    """None for directions."""
    matched: Matched
    intervention: Intervention | None
    """At the matched strength; None where the KL cannot be reached."""
    measure: Estimate | None
    values: tuple[float, ...]
    """What `measure` gave."""


@dataclass(frozen=True)
class Controlled:
    """A latent's measure beside that of its controls, all at one KL."""

    latent: Arm
    random_latents: tuple[Arm, ...]
    random_directions: tuple[Arm, ...]
    drawn: RandomLatents
    target_kl: float

    def control(self, kind: Literal["random latent", "random direction"]) -> Estimate | None:
        """Return the mean measure of the controls of a kind; each is a unit. None where none reached the KL."""
        arms = self.random_latents if kind == "random latent" else self.random_directions
        means = [arm.measure.value for arm in arms if arm.measure is not None]
        return estimate(means) if means else None


def firing_rates(model: LiveModel, dictionary: Dictionary, prompts: Sequence[Tokens]) -> Rates:
    """Return on which share of the prompts' tokens each latent fires, special tokens left out, shape (latent,).

    A latent fires where its activation is above 0. Nothing is held that grows with the number of prompts.

    Raises:
        UserError: there is no prompt, all tokens are special, or as `LiveModel.run`.
    """
    special = torch.tensor(sorted(model.subject.special_tokens), dtype=torch.long, device=model.subject.device)
    total = np.zeros(dictionary.latents + 1, dtype=np.int64)

    def read(reading: Reading) -> list[None]:
        batch = reading.batch
        shown = batch.mask & ~torch.isin(batch.tokens, special)
        counts = torch.zeros(dictionary.latents, dtype=torch.long, device=shown.device)
        for row in range(len(batch.trials)) if dictionary.conditioned else [None]:
            x = reading.vectors[dictionary.hook_point]
            if row is None:
                counts += _firings(dictionary, x[shown])
            else:
                firing = dictionary.encode(reading.of(dictionary.hook_point, row)[None])[0] > 0
                counts += firing[shown[row][-len(batch.trials[row].tokens) :]].sum(0)
        # Last of all, and at once: a batch that runs out of memory before is read again.
        np.add(total, np.append(counts.cpu().numpy(), int(shown.sum())), out=total)
        return [None] * len(batch.trials)

    model.run([Trial(tokens) for tokens in prompts], read, keep="none", points=[dictionary.hook_point])
    if not total[-1]:
        raise UserError(f"{len(prompts)} prompts have no token that is not special; give some with text")
    rates: Rates = total[:-1] / total[-1]
    return rates


def random_latents(rates: Rates, latent: int, count: int, seed: int, exclude: Sequence[int] = ()) -> RandomLatents:
    """Return `count` other latents, drawn at random from those that fire about as often as `latent`.

    Candidates are the live latents within 10 % of its rate, or, where these are few, the 4 × `count` nearest in log rate.
    For a latent that never fires they are the others that never do.

    Args:
        rates: of all latents, shape (latent,), as `firing_rates` returns.
        latent: whose rate to match.
        count: how many.
        seed: of the draw.
        exclude: latents that may not be drawn.

    Raises:
        UserError: there is no such latent, rates are not shares, or there are fewer than `count` to draw from.
    """
    if rates.ndim != 1 or not ((rates >= 0) & (rates <= 1)).all():
        raise UserError(
            f"rates of shape {rates.shape} are not one share between 0 and 1 for each latent; see firing_rates"
        )
    if not 0 <= latent < len(rates) or count < 1:
        raise UserError(f"cannot draw {count} latents for latent {latent} of {len(rates)}; give 0 to {len(rates) - 1}")
    wanted = float(rates[latent])
    allowed = (rates > 0) == (wanted > 0)
    allowed[[latent, *exclude]] = False
    others = np.flatnonzero(allowed)
    if len(others) < count:
        state = "fire" if wanted else "never fire"
        raise UserError(
            f"{count} random latents are wanted for latent {latent}, but only {len(others)} others {state} and are not "
            "excluded; ask for fewer, or take rates over more text"
        )
    distances = np.abs(np.log(rates[others] / wanted)) if wanted else np.zeros(len(others))
    order = np.argsort(distances, kind="stable")
    near = max(int((distances <= _BAND).sum()), min(len(others), _CHOICE * count))
    chosen = generator(seed, "random_latents", latent).permutation(order[:near])[:count]
    drawn = others[chosen]
    return RandomLatents(
        tuple(drawn.tolist()), tuple(rates[drawn].tolist()), wanted, near, float(np.exp(distances[chosen].max()))
    )


def random_direction(width: int, seed: int, *, device: str = "cpu", dtype: str = "float32") -> Tensor:
    """Return a direction uniform on the unit sphere, shape (width,), the same on every device.

    Raises:
        UserError: `width` is less than 1.
    """
    if width < 1:
        raise UserError(f"a direction of width {width} is wanted; give at least 1")
    vector = generator(seed, "random_direction").standard_normal(width)
    return torch.from_numpy(vector / np.linalg.norm(vector)).to(device=device, dtype=getattr(torch, dtype))


def controlled(
    model: LiveModel,
    dictionary: Dictionary,
    latent: int,
    prompts: Sequence[Tokens],
    rates: Rates,
    measure: Measure,
    *,
    target_kl: float = 0.5,
    tolerance: float = 0.1,
    batches: int = 10,
    first: float = 1.0,
    controls: int = 5,
    seed: int = 0,
    sign: Literal[1, -1] = 1,
    positions: Positions = "last",
) -> Controlled:
    """Return what steering a latent does beside `controls` random latents and as many random directions, at one KL.

    Args:
        model: the live model.
        dictionary: of the latent.
        latent: the one that the claim is about.
        prompts: to match strengths on: others than `measure` uses (PROTOCOLS §8).
        rates: firing rates of the dictionary's latents.
        measure: is called once for each arm that reaches the KL.
        target_kl: as for `match_strength`, like the next three.
        tolerance: relative.
        batches: at most so many for each arm.
        first: the strength to begin with, in units of activation.
        controls: how many of each kind.
        seed: of the draws.
        sign: -1 steers all arms downwards.
        positions: where, on prompts and in `measure`.

    Raises:
        UserError: as `match_strengths` and `random_latents`; or `measure` gives no values, or some that are not finite.
    """
    model.require_latents(dictionary, [latent])
    drawn = random_latents(rates, latent, controls, derive_seed(seed, "controls"))
    steered = [_steering(dictionary, one, sign, positions) for one in (latent, *drawn.latents)]
    pushed = [_pushing(dictionary, latent, index, seed, sign, positions) for index in range(controls)]
    makes = [*steered, *pushed]
    matched = match_strengths(
        model, makes, prompts, target_kl=target_kl, tolerance=tolerance, batches=batches, first=first
    )
    kinds: list[tuple[Kind, int | None]] = [("latent", latent), *(("random latent", one) for one in drawn.latents)]
    kinds += [("random direction", None)] * controls
    arms = [_arm(*kind, make, match, measure) for kind, make, match in zip(kinds, makes, matched, strict=True)]
    return Controlled(arms[0], tuple(arms[1 : 1 + controls]), tuple(arms[1 + controls :]), drawn, target_kl)


def _firings(dictionary: Dictionary, x: Tensor) -> Tensor:
    """Return on how many of the vectors, shape (token, width), each latent fires."""
    counts = torch.zeros(dictionary.latents, dtype=torch.long, device=x.device)
    for part in blocks(x, dictionary):
        if isinstance(dictionary, PlainDictionary):
            counts += torch.bincount(dictionary.encode_sparse(part).latents, minlength=dictionary.latents)
        else:
            counts += (dictionary.encode(part) > 0).sum(0)
    return counts


def _steering(dictionary: Dictionary, latent: int, sign: int, positions: Positions) -> Make:
    return lambda strength: steer(dictionary.fingerprint, [latent], sign * strength, positions)


def _pushing(dictionary: Dictionary, latent: int, index: int, seed: int, sign: int, positions: Positions) -> Make:
    directions = dictionary.decoder_directions()
    point = dictionary.hook_point_out
    width = dictionary.width if directions is None else directions.shape[-1]
    vector = random_direction(width, derive_seed(seed, "random directions", latent, index)).tolist()
    return lambda strength: push(point, vector, sign * strength, positions)


def _arm(kind: Kind, latent: int | None, make: Make, matched: Matched, measure: Measure) -> Arm:
    if matched.strength is None:
        return Arm(kind, latent, matched, None, None, ())
    intervention = make(matched.strength)
    values = tuple(map(float, measure(intervention)))
    return Arm(kind, latent, matched, intervention, estimate(values), values)
