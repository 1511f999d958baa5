"""Metrics of attribution, interventions beneath it, and what a user can get wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, WIDTH, prompt
from torch import Tensor

from exegete.tools.attribution import (
    KLFromClean,
    LogitDifference,
    LogProbability,
    Metric,
    attribute,
    effect_of_set,
    exact_effects,
)
from exegete.tools.dictionaries import opaque_dictionary, random_dictionary
from exegete.tools.errors import UserError
from exegete.tools.interventions import ablate, clamp, patch, push, scale
from exegete.tools.live_model import Batch, LiveModel, Trial
from exegete.tools.metrics import Floats

from .attributed import LATENTS, METRIC, POST, PROMPTS, Bent, bent, halves, line, linear, live, subject_of, values

# Metrics.


def test_divergence_needs_a_path_and_then_adds_up() -> None:
    model, dictionary = live("llama", linear)
    with pytest.raises(UserError, match="no gradient at the clean run; pass steps"):
        attribute(model, dictionary, PROMPTS, KLFromClean())
    found = attribute(model, dictionary, PROMPTS, KLFromClean(), steps=24, exact=4)
    assert found.clean == pytest.approx([0, 0, 0], abs=1e-6)
    assert found.latents_total.exact.value < -0.01
    assert found.latents_total.gap.value < 0.02 * abs(found.latents_total.exact.value)
    logits = torch.stack(model.run([Trial(tokens) for tokens in PROMPTS], lambda reading: list(reading.logits)))
    latent = found.ranked[0].latent
    trials = [Trial(tokens, ablate(dictionary.fingerprint, [latent])) for tokens in PROMPTS]
    changed = torch.stack(model.run(trials, lambda reading: list(reading.logits)))
    clean = logits.log_softmax(-1)
    divergence = (clean.exp() * (clean - changed.log_softmax(-1))).sum(-1)
    exact = exact_effects(model, dictionary, PROMPTS, KLFromClean(), [latent])
    assert exact[0] == pytest.approx(-divergence.numpy(), abs=1e-5)
    assert found.ranked[0].exact is not None and found.ranked[0].exact.value == pytest.approx(exact[0].mean(), abs=1e-6)


def test_any_function_of_the_logits_is_a_metric() -> None:
    model, dictionary = live("llama", linear)
    seen: list[tuple[int, ...]] = []

    def all_positions(logits: Tensor, batch: Batch) -> Tensor:
        seen.append(tuple(logits.shape))
        sums = [row[-length:].log_softmax(-1)[:, 5].sum() for row, length in zip(logits, batch.lengths, strict=True)]
        return torch.stack(sums)

    options: dict[str, Any] = {"exact": 0, "positions": "all"}
    found = attribute(model, dictionary, PROMPTS, all_positions, **options)
    assert (3, 11, VOCABULARY) in seen
    logits = [model.subject.logits(torch.tensor([tokens]))[0].log_softmax(-1)[:, 5].sum().item() for tokens in PROMPTS]
    assert found.clean == pytest.approx(logits, abs=1e-3)
    # A linear combination of metrics has the same combination of attributions.
    one, two = (attribute(model, dictionary, PROMPTS, m, exact=0) for m in (LogProbability([5, 6, 7]), METRIC))
    both = attribute(
        model,
        dictionary,
        PROMPTS,
        lambda logits, batch: 2 * LogProbability([5, 6, 7])(logits, batch) - METRIC(logits, batch),
        exact=0,
    )
    assert both.entries.attribution == pytest.approx(2 * one.entries.attribution - two.entries.attribution, abs=1e-4)
    last = attribute(model, dictionary, PROMPTS, METRIC, **options)
    assert last.entries.attribution == pytest.approx(two.entries.attribution, abs=1e-5)


def test_prompts_may_come_with_interventions() -> None:
    model, dictionary = live("llama", linear)
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)).tolist()
    other = random_dictionary(model.subject, "blocks.2.hook_resid_pre", LATENTS, "topk", k=6, seed=3)
    model = LiveModel(model.subject, [dictionary, other])
    there = push(POST, vector, 2.0, "all") + patch(other.fingerprint, [3, 4, 5, 6], prompt(9, seed=50))
    trials = [Trial(tokens, there) for tokens in PROMPTS]
    found = attribute(model, dictionary, trials, METRIC, exact=4)
    plain = attribute(model, dictionary, PROMPTS, METRIC, exact=0)
    assert found.clean == pytest.approx(values(model, trials, [5, 6, 7]), abs=1e-4)
    assert np.abs(found.clean - plain.clean).min() > 0.01
    leaders = [one.latent for one in found.ranked[:4]]
    step = 0.02

    def scaled(latent: int, factor: float) -> Floats:
        change = there + scale(dictionary.fingerprint, [latent], factor)
        return values(model, [Trial(tokens, change) for tokens in PROMPTS], [5, 6, 7])

    slopes = np.stack([(scaled(k, 1 + step) - scaled(k, 1 - step)) / (2 * step) for k in leaders])
    assert found.by_prompt(leaders) == pytest.approx(slopes, abs=0.01 * np.abs(slopes).max())
    ablated = [Trial(tokens, there + ablate(dictionary.fingerprint, leaders[:1])) for tokens in PROMPTS]
    assert found.ranked[0].exact is not None
    assert found.ranked[0].exact.value == pytest.approx(
        (found.clean - values(model, ablated, [5, 6, 7])).mean(), abs=1e-4
    )
    with pytest.raises(UserError, match=r"changes latents of .*random-jumprelu.* \(clamp\).*without that edit"):
        attribute(model, dictionary, [Trial(PROMPTS[0], clamp(dictionary.fingerprint, [1], 2.0))], LogProbability(1))


def test_out_of_memory_halves_the_batch() -> None:
    model, dictionary = live("llama", linear)
    sizes: list[int] = []

    def scarce(logits: Tensor, batch: Batch) -> Tensor:
        sizes.append(len(batch.trials))
        if len(batch.trials) > 1 and logits.requires_grad:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return METRIC(logits, batch)

    found = attribute(model, dictionary, PROMPTS, scarce, exact=0)
    assert max(sizes) == 3 and sizes[-1] == 1
    plain = attribute(live("llama", linear)[0], dictionary, PROMPTS, METRIC, exact=0)
    assert found.entries.attribution == pytest.approx(plain.entries.attribution, abs=1e-4)


def test_nothing_is_left_behind() -> None:
    model, dictionary = live("llama", bent)
    point = model.subject.bridge.hook_dict[POST]
    before = len(point.fwd_hooks)
    with torch.inference_mode():
        found = attribute(model, dictionary, PROMPTS, METRIC, exact=2)
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    assert torch.is_grad_enabled() and len(point.fwd_hooks) == before
    assert all(parameter.grad is None for parameter in model.subject.bridge.original_model.parameters())
    again = attribute(model, dictionary, PROMPTS, METRIC, exact=2)
    assert again.entries.attribution == pytest.approx(found.entries.attribution)


# Bad input.


def test_bad_metrics_are_said() -> None:
    model, dictionary = live("llama", linear)
    wrong: list[tuple[Metric, str]] = [
        (LogitDifference([5, 6], 9), "2 answers for 3 prompts"),
        (LogitDifference(5, VOCABULARY), f"names token {VOCABULARY}; the subject has 0 to {VOCABULARY - 1}"),
        (LogProbability(-1), "names token -1"),
        (lambda logits, batch: logits, r"returns \(3, 61\); for 3 trials it must return shape \(trial,\)"),
        (lambda logits, batch: logits.sum(), r"returns \(\)"),
        (lambda logits, batch: 1.0, "returns float"),  # type: ignore[list-item, return-value]
        (lambda logits, batch: logits[:, 0] / 0, r"is -?inf on prompt \d"),
        (lambda logits, batch: logits[:, 0].detach(), "no gradient; compute it from the logits with torch"),
        (lambda logits, batch: 0 * logits[:, 0], "gradient is 0 on every prompt"),
        (lambda logits, batch: (logits[:, 0] - logits[:, 0]).abs().sqrt(), "gradient is not finite"),
    ]
    for metric, message in wrong:
        with pytest.raises(UserError, match=message):
            attribute(model, dictionary, PROMPTS, metric)


def test_bad_arguments_are_said() -> None:
    model, dictionary = live("llama", linear)
    wrong: list[dict[str, Any]] = [{"steps": -1}, {"top": 0}, {"exact": -1}, {"groups": 0, "steps": 1}, {"groups": 2}]
    for options in wrong:
        with pytest.raises(UserError, match=r"steps=|groups="):
            attribute(model, dictionary, PROMPTS, METRIC, **options)
    with pytest.raises(UserError, match="no prompt"):
        attribute(model, dictionary, [], LogProbability(1))
    with pytest.raises(UserError, match=r"'w1 w2' is text; give its tokens"):
        attribute(model, dictionary, ["w1 w2"], LogProbability(1))  # type: ignore[list-item]
    with pytest.raises(UserError, match="empty"):
        attribute(model, dictionary, [()], LogProbability(1))
    with pytest.raises(UserError, match=f"no latent {LATENTS}; it has 0 to {LATENTS - 1}"):
        exact_effects(model, dictionary, PROMPTS, METRIC, [0, LATENTS])
    for measure in (exact_effects, effect_of_set):
        with pytest.raises(UserError, match="no latent to ablate"):
            measure(model, dictionary, PROMPTS, METRIC, [])
    with pytest.raises(UserError, match="fits 0 dictionaries"):
        attribute(model, halves(), PROMPTS, METRIC)


def test_a_decoder_without_gradient_is_said() -> None:
    class Cut(Bent):
        @torch.no_grad()
        def decode(self, z: Tensor) -> Tensor:
            return super().decode(z)

    subject = subject_of("llama")
    cut = opaque_dictionary(Cut(), subject, name="cut", hook_point=POST, latents=LATENTS, identity="cut")
    with pytest.raises(UserError, match="'cut' has a decoder that gives no gradient"):
        attribute(LiveModel(subject, [cut]), cut, PROMPTS, METRIC)


def test_a_dictionary_of_which_nothing_fires() -> None:
    silent = replace(halves(), encoder_bias=torch.full((2,), -99.0))
    found = attribute(LiveModel(line(), [silent]), silent, [(2, 1)], LogitDifference(2, 1), exact=2)
    assert not found.ranked and not len(found.active) and found.latents_total.exact.value == 0
    assert found.error_share.value == 1 and found.floor is None
