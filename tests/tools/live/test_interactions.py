"""Random masks, pairwise interactions and rising latents, on planted effects and on the bundled subject."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from exegete.tools.ablation_sets import ZERO
from exegete.tools.controls import firing_rates
from exegete.tools.dictionaries import Dictionary
from exegete.tools.dormant_latents import dormant_latents
from exegete.tools.errors import UserError
from exegete.tools.interactions import exact_interactions, interactions
from exegete.tools.interventions import LatentEdit, Tokens
from exegete.tools.live_model import LiveModel, Trial
from exegete.tools.random_masks import random_masks
from exegete.tools.seeds import generator

Masks = NDArray[np.bool_]
Floats = NDArray[np.float64]
LATENTS = list(range(100, 120))


def ablated_in(trial: Trial) -> set[int]:
    return {k for edit in trial.intervention.edits if isinstance(edit, LatentEdit) for k in edit.latents}


def planted(model: LiveModel, trials: Sequence[Trial]) -> list[float]:
    """Latent 5 is worth 2, latent 9 worth −1; 20 and 21 hold 3 up between them: it falls when both are gone."""
    found = []
    for trial in trials:
        gone = ablated_in(trial)
        found.append(10.0 - 2 * (5 in gone) + (9 in gone) - 3 * ({20, 21} <= gone))
    return found


def masks_and_noise(count: int, noise: float) -> tuple[Masks, Floats]:
    rng = generator(0, "planted")
    masks = rng.random((count, len(LATENTS))) < 0.5
    single = masks @ rng.normal(0, 0.5, len(LATENTS))
    return masks, single + noise * rng.standard_normal(count)


def test_planted_pairs_are_recovered() -> None:
    masks, values = masks_and_noise(400, 0.2)
    # Redundancy (both must go) is an interaction of −3; exclusive or, worth 2, is one of −4.
    values = values - 3 * (masks[:, 2] & masks[:, 7]) + 2 * (masks[:, 3] ^ masks[:, 11])
    found = interactions(LATENTS, masks, values, top=4, shuffles=3)
    assert [one.pair for one in found.pairs[:2]] == [(103, 111), (102, 107)]
    assert [one.weight for one in found.pairs[:2]] == [pytest.approx(-4, abs=0.4), pytest.approx(-3, abs=0.4)]
    assert [one.above_floor for one in found.pairs] == [True, True, False, False]
    assert found.r2 > 0.95 > 0.8 > found.linear_r2
    assert found.gain.value == pytest.approx(found.r2 - found.linear_r2) and found.gain.low > 0.1
    assert (found.gain.n, found.fitted_masks) == (100, 300)
    assert interactions(LATENTS, masks, values, top=4, shuffles=3) == found
    assert interactions(LATENTS, masks, values, top=4, shuffles=3, seed=1) != found


def test_where_there_are_none_none_is_above_the_floor() -> None:
    masks, values = masks_and_noise(300, 0.5)
    found = interactions(LATENTS, masks, values, shuffles=5)
    assert not any(one.above_floor for one in found.pairs)
    assert found.gain.value < 0.02 and found.linear_r2 > 0.7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": np.ones((80, 20), bool)}, "ablated in all masks or in none"),
        ({"masks": np.full((80, 20), 0.5)}, "masks must be true or false"),
        ({"masks": np.ones((80, 3), bool)}, r"masks have shape \(80, 3\)"),
        ({"values": np.full(80, np.nan)}, "a value is nan"),
        ({"values": np.ones(80)}, "the metric is the same"),
        ({"values": np.zeros(0)}, r"values \(0,\)"),
        ({"latents": [100] * 20}, "pairs need at least 2"),
        ({"rank": 0}, "rank is 0"),
        ({"ridge": float("nan")}, "ridge nan"),
        ({"held_out": 0.99}, "80 masks are too few"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    masks, values = masks_and_noise(80, 0.1)
    given: dict[str, object] = {"latents": LATENTS, "masks": masks, "values": values} | change
    with pytest.raises(UserError, match=message):
        interactions(**given)  # type: ignore[arg-type]


def test_random_masks_tell_effects_apart(model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]) -> None:
    found = random_masks(model, dictionary, [5, 9, 20, 21, 33], prompts[:4], planted, trials=200, controls=5)
    assert found.masks.shape == (200, 10) and found.values.shape == (200, 4) and found.latents[:5] == (5, 9, 20, 21, 33)
    effects = {one.latent: one.effect for one in found.effects}
    # Each of 20 and 21 takes 3 away when the other is gone as well, which is half of the time.
    for latent, true in {5: -2, 9: 1, 20: -1.5, 21: -1.5, 33: 0}.items():
        assert effects[latent].value == pytest.approx(true, abs=0.4)
        assert effects[latent].low <= true <= effects[latent].high
    assert [one.control for one in found.effects] == [False] * 5 + [True] * 5
    assert found.floor is not None and found.floor < 0.4 and found.r2 is not None and 0.7 < found.r2 < 0.95
    pairs = interactions(found.latents, found.masks, found.values, shuffles=3)
    assert pairs.pairs[0].pair == (20, 21) and pairs.pairs[0].above_floor and pairs.r2 > 0.99
    exact = exact_interactions(
        model, dictionary, [(21, 20), (5, 9)], [5, 9, 20, 21, 33], prompts[:4], planted, controls=4
    )
    assert [(one.pair, one.both.value, one.interaction.value) for one in exact.pairs] == [
        ((20, 21), -3.0, -3.0),
        ((5, 9), -1.0, 0.0),
    ]
    assert len(exact.controls) == 4 and exact.floor == 0.0 and exact.pairs[0].interaction.n == 4


def test_random_masks_do_not_depend_on_how_many(
    model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]
) -> None:
    few, many = (
        random_masks(model, dictionary, [5, 9], prompts[:2], planted, trials=trials, controls=2, seed=3)
        for trials in (20, 40)
    )
    assert (few.masks == many.masks[:20]).all() and few.latents == many.latents
    other = random_masks(model, dictionary, [5, 9], prompts[:2], planted, trials=20, controls=2, seed=4)
    assert (few.masks != other.masks).any()


def test_bad_masks_and_pairs(model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]) -> None:
    with pytest.raises(UserError, match="10 masks are too few to tell 8 latents apart"):
        random_masks(model, dictionary, range(8), prompts, planted, trials=10, controls=0)
    with pytest.raises(UserError, match="keep_share is 1"):
        random_masks(model, dictionary, range(3), prompts, planted, keep_share=1.0)
    with pytest.raises(UserError, match="no prompts to try masks on"):
        random_masks(model, dictionary, range(3), [], planted)
    with pytest.raises(UserError, match="the measure is nan"):
        nans = lambda model, trials: [float("nan")] * len(trials)  # noqa: E731
        random_masks(model, dictionary, range(3), prompts, nans, trials=20, controls=0)
    with pytest.raises(UserError, match="latent 4 is among the latents of a pair more than once"):
        exact_interactions(model, dictionary, [(4, 4)], [4, 5], prompts, planted)
    with pytest.raises(UserError, match="0 pairs"):
        exact_interactions(model, dictionary, [], [4, 5], prompts, planted)


def test_rises_are_differences_of_re_encoded_activations(
    model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]
) -> None:
    some = sorted(prompts, key=len)[:3]
    ablated = [int(latent) for latent in np.argsort(-firing_rates(model, dictionary, some))[:4]]
    found = dormant_latents(model, dictionary, ablated, some, controls=2, top=5)
    special = model.subject.special_tokens
    differences = []
    for prompt in some:
        means = []
        for trial in ZERO.trials(dictionary, [(), ablated], [prompt]):
            x = model.run(
                [trial], lambda reading: [reading.of(dictionary.hook_point, 0)], points=[dictionary.hook_point]
            )[0]
            counted = [i for i, token in enumerate(prompt) if token not in special]
            means.append(dictionary.encode(x[counted]).mean(0).cpu().numpy().astype(np.float64))
        differences.append(means[1] - means[0])
    rises = np.stack(differences)
    rises[:, ablated] = -1
    for one in found.risers:
        own = rises[:, one.latent]
        assert one.rise.value == pytest.approx(own.mean(), abs=1e-6) and one.rise.n == 3
        assert one.effect_size == pytest.approx(own.mean() / own.std(ddof=1), rel=1e-3)
    values = [one.rise.value for one in found.risers]
    assert len(values) == 5
    assert values == sorted(values, reverse=True) and values[0] == pytest.approx(rises.mean(0).max(), abs=1e-6)
    assert found.re_encoded and found.random_sets == 2 and found.floor is not None
    assert found.above_floor == int((rises.mean(0) > found.floor).sum())
    assert not {one.latent for one in found.risers} & set(ablated)
    assert dormant_latents(model, dictionary, ablated, some, controls=2, top=5) == found


def test_bad_dormant_input(model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]) -> None:
    with pytest.raises(UserError, match="give at least 2 different ones"):
        dormant_latents(model, dictionary, [1], [prompts[0], prompts[0]])
    with pytest.raises(UserError, match="too few for random sets of 2"):
        dormant_latents(model, dictionary, [1, 2], prompts[:2], rates=np.zeros(dictionary.latents))
