"""Attribution: numbers worked by hand, derivatives and exact effects measured without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from exegete.tools.attribution import (
    LogitDifference,
    LogProbability,
    attribute,
    effect_of_set,
    exact_effects,
    rank_agreement,
)
from exegete.tools.bundled.behaviours import behaviours
from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.interventions import Intervention, Tokens, ablate, clamp, scale
from exegete.tools.live_model import LiveModel, Reading, Trial
from exegete.tools.metrics import Floats
from exegete.tools.subject import Subject

from .attributed import (
    CASES,
    KINDS,
    LATENTS,
    METRIC,
    PROMPTS,
    bent,
    conditioned,
    halves,
    line,
    linear,
    live,
    topk,
    transcoder,
    values,
)


@pytest.mark.parametrize(("steps", "groups"), [(0, 1), (3, 1), (2, 2)])
def test_numbers_worked_by_hand(steps: int, groups: int) -> None:
    model = LiveModel(line(), [halves()])
    found = attribute(
        model, halves(), [(2, 1), (1, 3, 2)], LogitDifference(2, [1, 0]), steps=steps, groups=groups, exact=2
    )
    # Last tokens: x = (3, 1), logits (3, 1, 7, 0), logit 2 − logit 1 = 6 along (2, 0);
    # x = (1, −2), logits (1, −2, 0, 0), logit 2 − logit 0 = −1 along (1, 1).
    assert found.clean == pytest.approx([6, -1])
    # z = (3, 1) writes (1.5, 0), (0, 0.5); z = (1, 0) writes (0.5, 0). Other positions count nothing.
    assert found.by_prompt([0, 1]) == pytest.approx(np.array([[3, 0.5], [0, 0]]))
    assert found.by_prompt([1, 0]) == pytest.approx(np.array([[0, 0], [3, 0.5]]))
    # Errors: (1.5, 1 − 0.5 − 0.25) along (2, 0) is 3; (0.5, −2 − 0.25) along (1, 1) is −1.75.
    at_last = {(int(p), int(t)): float(a) for p, t, a in zip(*columns(found.errors), strict=True)}
    assert at_last == pytest.approx({(0, 0): 0, (0, 1): 3, (1, 0): 0, (1, 1): 0, (1, 2): -1.75})
    assert list(found.entries.position) == [0, 1, 1, 0, 0, 1, 1, 2]
    assert list(found.entries.latent) == [0, 0, 1, 0, 1, 0, 1, 0]
    assert found.entries.activation == pytest.approx([1, 3, 1, 3, 1, 2, 2, 1])
    # The model is linear behind the hook point: estimates are exact, and add up.
    assert [one.latent for one in found.ranked] == [0, 1]
    assert found.ranked[0].attribution.value == pytest.approx(1.75)
    assert found.ranked[0].exact is not None and found.ranked[0].exact.value == pytest.approx(1.75)
    assert found.latents_total.gap.value == pytest.approx(0, abs=1e-5)
    assert found.latents_total.exact.value == pytest.approx(1.75)
    assert found.error_total.exact.value == pytest.approx((3 - 1.75) / 2)
    assert found.error_total.gap.value == pytest.approx(0, abs=1e-5)
    assert found.error_share.value == pytest.approx((3 / 6 + 1.75 / 2.25) / 2)
    assert found.floor is None and found.agreement is None and list(found.active) == [0, 1]


def columns(entries: Any) -> tuple[Any, Any, Any]:
    return entries.prompt, entries.position, entries.attribution


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_attributions_are_derivatives_by_scale(family: str, kind: Callable[[Subject], Dictionary]) -> None:
    model, dictionary = live(family, kind)
    found = attribute(model, dictionary, PROMPTS, METRIC, exact=0)
    leaders = [one.latent for one in found.ranked[:6]]
    step = 0.02

    def scaled(latent: int, factor: float) -> Floats:
        change = scale(dictionary.fingerprint, [latent], factor)
        return values(model, [Trial(tokens, change) for tokens in PROMPTS], [5, 6, 7])

    slopes = [(scaled(latent, 1 + step) - scaled(latent, 1 - step)) / (2 * step) for latent in leaders]
    largest = float(np.abs(slopes).max())
    assert largest > 0.01
    assert found.by_prompt(leaders) == pytest.approx(np.stack(slopes), abs=0.01 * largest)


@pytest.mark.parametrize("kind", [linear, bent, conditioned])
def test_integrated_gradients_add_up(kind: Callable[[Subject], Dictionary]) -> None:
    model, dictionary = live("llama", kind)
    found = attribute(model, dictionary, PROMPTS, METRIC, steps=24, exact=0)
    for total in (found.latents_total, found.error_total):
        assert abs(total.exact.value) > 0.01
        assert total.gap.value < 0.04 * max(abs(total.exact.value), 1)
    assert found.latents_total.attribution.value == pytest.approx(found.by_prompt(found.active).sum(0).mean())
    rough = attribute(model, dictionary, PROMPTS, METRIC, exact=0)
    assert rough.latents_total.gap.value > 3 * found.latents_total.gap.value


@pytest.mark.parametrize("kind", [linear, conditioned])
def test_a_group_for_each_latent_gives_exact_effects(kind: Callable[[Subject], Dictionary]) -> None:
    model, dictionary = live("llama", kind)
    found = attribute(model, dictionary, PROMPTS, METRIC, steps=6, groups=LATENTS, exact=0)
    exact = exact_effects(model, dictionary, PROMPTS, METRIC, found.active.tolist())
    largest = float(np.abs(exact).max())
    assert largest > 0.1
    assert found.by_prompt(found.active) == pytest.approx(exact, abs=0.02 * largest)
    assert found.latents_total.exact.value == pytest.approx(exact.sum(0).mean(), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"steps": 1, "groups": 2}])
def test_padded_batches_equal_single_prompts(kind: Callable[[Subject], Dictionary], options: dict[str, Any]) -> None:
    model, dictionary = live("llama", kind)
    together = attribute(model, dictionary, PROMPTS, METRIC, exact=3, **options)
    for index, tokens in enumerate(PROMPTS):
        alone = attribute(model, dictionary, [tokens], LogitDifference(5 + index, 9), exact=0, **options)
        for ours, theirs in ((together.entries, alone.entries), (together.errors, alone.errors)):
            mine = ours.prompt == index
            assert list(ours.position[mine]) == list(theirs.position)
            assert list(ours.latent[mine]) == list(theirs.latent)
            assert ours.activation[mine] == pytest.approx(theirs.activation, abs=1e-4)
            assert ours.attribution[mine] == pytest.approx(theirs.attribution, abs=1e-4)
        # Nothing is attributed to padding: positions are those of the prompt.
        assert set(alone.errors.position) == set(range(len(tokens)))
        assert together.clean[index] == pytest.approx(alone.clean[0], abs=1e-4)
    small, _ = live("llama", kind, batch_tokens=8)
    again = attribute(small, dictionary, PROMPTS, METRIC, exact=3, **options)
    assert again.entries.attribution == pytest.approx(together.entries.attribution, abs=1e-4)
    assert [one.latent for one in again.drawn] == [one.latent for one in together.drawn]


def test_a_dictionary_without_error_has_none_to_attribute() -> None:
    plain = halves()
    whole = replace(
        plain,
        encoder=torch.cat([torch.eye(2), -torch.eye(2)], 1),
        encoder_bias=torch.zeros(4),
        decoder=torch.cat([torch.eye(2), -torch.eye(2)]),
        decoder_bias=torch.zeros(2),
    )
    found = attribute(LiveModel(line(), [whole]), whole, [(2, 1)], LogProbability(2), steps=64, exact=0)
    assert found.errors.attribution == pytest.approx([0, 0], abs=1e-6)
    assert found.error_share.value == pytest.approx(0, abs=1e-6)
    # Without any latent the logits are 0, and the answer is one of four.
    assert found.latents_total.exact.value == pytest.approx(found.clean[0] - np.log(0.25), abs=1e-5)
    assert found.latents_total.gap.value < 1e-3


# Exact effects.


def test_exact_effects_are_those_of_ablations_run_one_by_one() -> None:
    model, dictionary = live("llama", linear)
    latents = attribute(model, dictionary, PROMPTS, METRIC, exact=0).active.tolist()
    silent = next(latent for latent in range(LATENTS) if latent not in latents)
    effects = exact_effects(model, dictionary, PROMPTS, METRIC, [silent, *latents])
    clean = values(model, [Trial(tokens) for tokens in PROMPTS], [5, 6, 7])
    for latent, row in zip([silent, *latents], effects, strict=True):
        for index, tokens in enumerate(PROMPTS):
            ablated = values(model, [Trial(tokens, ablate(dictionary.fingerprint, [latent]))], [5 + index])[0]
            assert row[index] == pytest.approx(clean[index] - ablated, abs=1e-4)
    assert not effects[0].any() and effects[1:].any(1).all()
    together = values(model, [Trial(t, ablate(dictionary.fingerprint, latents[:9])) for t in PROMPTS], [5, 6, 7])
    found = effect_of_set(model, dictionary, PROMPTS, METRIC, latents[:9])
    assert found == pytest.approx(clean - together, abs=1e-4)


def test_a_latent_that_fires_nowhere_costs_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dictionary = live("llama", linear)
    active = set(attribute(model, dictionary, PROMPTS[:1], LogitDifference(5, 9), exact=0).active.tolist())
    silent = [latent for latent in range(LATENTS) if latent not in active]
    ran: list[Trial] = []
    run = model.run

    def counted(trials: Sequence[Trial], *arguments: Any, **named: Any) -> Any:
        ran.extend(trials)
        return run(trials, *arguments, **named)

    monkeypatch.setattr(model, "run", counted)
    assert not exact_effects(model, dictionary, PROMPTS[:1], LogitDifference(5, 9), silent).any()
    assert not any(trial.intervention for trial in ran)


def test_other_ablations_also_reach_latents_that_are_silent() -> None:
    model, dictionary = live("llama", linear)
    active = attribute(model, dictionary, PROMPTS[:1], LogitDifference(5, 9), exact=0).active.tolist()
    silent = next(latent for latent in range(LATENTS) if latent not in active)
    made: list[Sequence[int]] = []

    def raised(latents: Sequence[int]) -> Intervention:
        made.append(latents)
        return clamp(dictionary.fingerprint, latents, 3.0)

    effects = exact_effects(model, dictionary, PROMPTS, METRIC, [silent], ablation=raised)
    clamped = values(model, [Trial(t, clamp(dictionary.fingerprint, [silent], 3.0)) for t in PROMPTS], [5, 6, 7])
    clean = values(model, [Trial(tokens) for tokens in PROMPTS], [5, 6, 7])
    assert made == [[silent]] and np.abs(effects).min() > 1e-3
    assert effects[0] == pytest.approx(clean - clamped, abs=1e-4)


def test_the_order_of_exact_effects_and_of_estimates_agree_as_ranks_do() -> None:
    # One swap of neighbours among five: 1 − 6 · 2 / (5 · 24).
    found = rank_agreement([1, 2, 3, 4, 5], np.array([1.0, 2, 3, 50, 40]))
    assert found.value == pytest.approx(0.9) and found.n == 5
    # atanh 0.9 ± 1.96 · √((1 + 0.405) / 2); unrelated orders of five stay below 1.645 / √4.
    assert found.low == pytest.approx(-0.1686, abs=1e-3) and found.high == pytest.approx(0.9961, abs=1e-3)
    assert found.floor == pytest.approx(0.822, abs=1e-3)
    assert rank_agreement(range(9), range(9)).value == pytest.approx(1)
    for first, second in (([1, 2, 3], [1, 2, 3]), ([1, 2, 3, 4], [1, 2, 3]), ([1, 2, 3, np.nan], [1, 2, 3, 4])):
        with pytest.raises(UserError, match=r"cannot rank|finite"):
            rank_agreement(first, second)
    with pytest.raises(UserError, match="exact effects are all 2"):
        rank_agreement([1, 2, 3, 4], [2, 2, 2, 2])


@pytest.mark.parametrize("kind", [topk, bent, transcoder])
def test_every_active_latent_has_an_entry(kind: Callable[[Subject], Dictionary]) -> None:
    model, dictionary = live("llama", kind)
    found = attribute(model, dictionary, PROMPTS, METRIC, exact=0)

    def read(reading: Reading) -> list[Tensor]:
        return [dictionary.encode(reading.of(dictionary.hook_point, row)) for row in range(len(reading.batch.trials))]

    codes = model.run([Trial(tokens) for tokens in PROMPTS], read, points=[dictionary.hook_point])
    assert np.bincount(found.entries.prompt).tolist() == [int((z != 0).sum()) for z in codes]
    wanted = torch.cat([z[z != 0] for z in codes]).numpy()
    assert found.entries.activation == pytest.approx(wanted, abs=1e-4)


# The bundled subject, where it is known what a behaviour rests on.


@pytest.mark.parametrize(("name", "options"), [("order.DESC", {}), ("limit.4", {"steps": 1, "groups": 16})])
def test_what_a_behaviour_rests_on_is_found(
    name: str, options: dict[str, Any], model: LiveModel, dictionary: Dictionary
) -> None:
    behaviour = next(one for one in behaviours() if one.name == name)
    pairs = list(behaviour.pairs(3, 6))
    token = {piece: index for index, piece in enumerate(model.subject.pieces)}
    prompts: list[Tokens] = [model.tokens("".join(pair.base)) for pair in pairs]
    metric = LogitDifference([token[p.base_answer] for p in pairs], [token[p.variant_answer] for p in pairs])
    found = attribute(model, dictionary, prompts, metric, exact=10, **options)
    assert (found.clean > 2).all()
    assert found.floor is not None and found.agreement is not None and len(found.drawn) == 10
    exact = [one.exact.value for one in found.ranked[:10] if one.exact is not None]
    assert len(exact) == 10 and found.ranked[10].exact is None
    assert max(exact) > 1 and max(exact) > 5 * found.floor
    assert found.agreement.value > 0.8 > found.agreement.floor and found.agreement.n == 20
