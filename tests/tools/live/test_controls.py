from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from exegete.tools.controls import controlled, firing_rates, random_direction, random_latents
from exegete.tools.dictionaries import Dictionary, opaque_dictionary
from exegete.tools.effects import kl_divergences, logit_difference
from exegete.tools.errors import UserError
from exegete.tools.interventions import Intervention, LatentEdit, Tokens, VectorEdit
from exegete.tools.live_model import LiveModel, Trial
from exegete.tools.subject import Subject


def test_firing_rates_count_tokens_that_are_not_special(
    model: LiveModel, subject: Subject, dictionary: Dictionary, prompts: list[Tokens]
) -> None:
    counts, tokens = torch.zeros(dictionary.latents), 0
    for prompt in prompts:
        x = subject.residual(torch.tensor([prompt]), dictionary.hook_point)[0]
        shown = [index for index, token in enumerate(prompt) if token not in subject.special_tokens]
        counts += (dictionary.encode(x[shown]) > 0).sum(0)
        tokens += len(shown)
    found = firing_rates(model, dictionary, prompts)
    assert tokens < sum(map(len, prompts)), "the prompts begin with a special token"
    np.testing.assert_allclose(found, (counts / tokens).numpy(), atol=2 / tokens)
    assert found.sum() == pytest.approx(16, rel=1e-3), "TopK with k = 16"
    small = firing_rates(LiveModel(subject, [dictionary], batch_tokens=64), dictionary, prompts)
    np.testing.assert_allclose(found, small, atol=2 / tokens)


class _Signed:
    """Codes of both signs; a code depends on the vector before it, where there is one."""

    def __init__(self, width: int) -> None:
        self.width = width

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x - torch.cat([torch.zeros_like(x[..., :1, :]), x[..., :-1, :]], -2)

    def decode(self, z: torch.Tensor, given: torch.Tensor | None = None) -> torch.Tensor:
        return z


def test_a_code_that_depends_on_its_context_is_counted_context_by_context(
    subject: Subject, dictionary: Dictionary, prompts: list[Tokens]
) -> None:
    point, width = dictionary.hook_point, dictionary.width
    coder = opaque_dictionary(
        _Signed(width), subject, name="steps", hook_point=point, latents=width, identity="1", conditioned=True
    )
    found = firing_rates(LiveModel(subject, [coder]), coder, prompts[:3])
    firing, tokens = np.zeros(width), 0
    for prompt in prompts[:3]:
        x = subject.residual(torch.tensor([prompt]), point)[0]
        shown = [index for index, token in enumerate(prompt) if token not in subject.special_tokens]
        firing += (_Signed(width).encode(x)[shown] > 0).sum(0).numpy()
        tokens += len(shown)
    np.testing.assert_allclose(found, firing / tokens, atol=2 / tokens)
    assert 0.2 < found.mean() < 0.8, "negative codes do not count"


def test_random_latents_fire_about_as_often() -> None:
    rates = np.array([0.1, 0.11, 0.105, 0.095, 0.2, 0.001, 0.0, 0.1, 0.0])
    found = random_latents(rates, 0, 2, seed=3)
    # Three lie within 10 %, fewer than the 4 × 2 that are asked for, and only six others are live at all.
    assert found.candidates == 6 and found.wanted == 0.1 and 0 not in found.latents
    assert found.rates == tuple(rates[list(found.latents)])
    assert found.farthest == pytest.approx(max(max(r / 0.1, 0.1 / r) for r in found.rates))
    rates = np.concatenate([np.linspace(0.098, 0.102, 50), np.full(100, 0.5)])
    found = random_latents(rates, 7, 10, seed=3)
    assert (found.candidates, len(set(found.latents))) == (49, 10) and found.farthest < 1.05
    assert max(found.latents) < 50 and 7 not in found.latents


def test_random_latents_are_the_same_for_the_same_seed_and_leave_out_what_is_excluded() -> None:
    rates = np.full(30, 0.25)
    draws = [random_latents(rates, 4, 5, seed).latents for seed in range(200)]
    assert random_latents(rates, 4, 5, 0).latents == draws[0] != draws[1]
    assert {latent for draw in draws for latent in draw} == set(range(30)) - {4}
    few = [random_latents(rates, 4, 5, seed, exclude=range(20)).latents for seed in range(20)]
    assert min(map(min, few)) >= 20


def test_a_latent_that_never_fires_has_others_that_never_fire_as_controls() -> None:
    rates = np.array([0.0, 0.5, 0.0, 0.0, 0.1])
    found = random_latents(rates, 0, 2, seed=0)
    assert (set(found.latents), found.rates, found.farthest) == ({2, 3}, (0.0, 0.0), 1.0)
    with pytest.raises(UserError, match="only 2 others never fire"):
        random_latents(rates, 0, 3, seed=0)


def test_random_latents_refuse_what_cannot_be_drawn() -> None:
    with pytest.raises(UserError, match="only 1 others fire"):
        random_latents(np.array([0.1, 0.1, 0.0]), 0, 2, seed=0)
    with pytest.raises(UserError, match="latent 5 of 3"):
        random_latents(np.array([0.1, 0.1, 0.0]), 5, 1, seed=0)
    with pytest.raises(UserError, match="not one share between 0 and 1"):
        random_latents(np.array([0.1, np.nan, 0.0]), 0, 1, seed=0)


def test_random_directions_have_length_one_and_no_preference() -> None:
    found = torch.stack([random_direction(8, seed) for seed in range(2_000)])
    assert torch.allclose(found.norm(dim=1), torch.ones(2_000), atol=1e-5)
    assert float(found.mean(0).abs().max()) < 0.05
    assert torch.allclose(found.T @ found / 2_000, torch.eye(8) / 8, atol=0.02)
    assert torch.equal(random_direction(8, 5), found[5]) and random_direction(8, 5, dtype="float64").dtype.itemsize == 8
    with pytest.raises(UserError, match="width 0"):
        random_direction(0, 0)


def test_a_latent_and_its_controls_are_measured_at_one_kl(
    model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]
) -> None:
    matching, scored = prompts[:4], prompts[4:8]
    rates = firing_rates(model, dictionary, prompts)
    latent = int(rates.argsort()[-200])
    asked: list[Intervention] = []

    def measure(intervention: Intervention) -> Sequence[float]:
        asked.append(intervention)
        found = logit_difference(model, [Trial(tokens, intervention) for tokens in scored], 5, 6)
        return [changed - clean for clean, changed in found.values]

    found = controlled(model, dictionary, latent, matching, rates, measure, controls=2, first=8.0, seed=1)
    arms = [found.latent, *found.random_latents, *found.random_directions]
    assert [arm.kind for arm in arms] == ["latent", *["random latent"] * 2, *["random direction"] * 2]
    assert found.latent.latent == latent and [arm.latent for arm in found.random_latents] == list(found.drawn.latents)
    reached = [arm for arm in arms if arm.intervention is not None]
    assert asked == [arm.intervention for arm in reached] and len(reached) >= 4
    for arm in reached:
        assert arm.intervention is not None and arm.measure is not None and arm.matched.kl is not None
        divergences = kl_divergences(model, [Trial(tokens, arm.intervention) for tokens in matching])
        assert sum(divergences) / 4 == pytest.approx(arm.matched.kl, rel=1e-2)
        assert abs(arm.matched.kl - 0.5) <= 0.05
        assert arm.measure.n == 4 and arm.measure.value == pytest.approx(sum(arm.values) / 4)
    edits = [arm.intervention.edits[0] for arm in reached if arm.intervention]
    assert isinstance(edits[0], LatentEdit) and edits[0].latents == (latent,) and edits[0].positions == "last"
    directions = [edit.vector for edit in edits if isinstance(edit, VectorEdit)]
    assert len(set(directions)) == 2 and len(directions[0]) == dictionary.width
    control = found.control("random direction")
    means = [arm.measure.value for arm in found.random_directions if arm.measure]
    assert control is not None and control.value == pytest.approx(sum(means) / 2) and control.n == 2


def test_controls_that_cannot_reach_the_kl_say_so(
    model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]
) -> None:
    rates = firing_rates(model, dictionary, prompts)
    latent = int(rates.argmax())
    found = controlled(
        model, dictionary, latent, prompts[:2], rates, lambda _: [0.0], target_kl=500.0, controls=1, batches=2
    )
    assert found.latent.matched.status == "unreachable"
    assert found.latent.measure is None and found.latent.intervention is None and found.latent.values == ()
    assert found.control("random latent") is None
    with pytest.raises(UserError, match="no latent 1024"):
        controlled(model, dictionary, 1_024, prompts[:2], rates, lambda _: [0.0])
