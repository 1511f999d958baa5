"""The lens: directions through known norms and unembeddings, clamps at a common KL, and bad input."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY, WIDTH, bare, prompt, tiny_subject, tokenizer
from torch import Tensor, nn

from exegete.tools.dictionaries import Dictionary, PlainDictionary, opaque_dictionary, random_dictionary
from exegete.tools.errors import UserError
from exegete.tools.interventions import Tokens, clamp
from exegete.tools.lens import TokenLogit, clamped_lens, direct_lens
from exegete.tools.live_model import LiveModel, Trial
from exegete.tools.subject import Subject, subject_from_model

POST, LATENTS = "blocks.1.hook_resid_post", 24
PROMPTS = [prompt(length, seed=length) for length in (5, 11, 7, 9)]
EPSILON = {"llama": 1e-6, "gpt2": 1e-5, "gpt_neox": 1e-5, "gemma2": 1e-6}


def linear(subject: Subject, point: str = POST) -> PlainDictionary:
    return random_dictionary(subject, point, LATENTS, "jumprelu", k=6)


@cache
def weights(family: str) -> Any:
    return bare(family)


def by_hand(family: str, v: Tensor) -> Tensor:
    """Norm and unembedding written out, shape (width,) → (vocabulary,)."""
    model = weights(family)
    inner = model.base_model
    norm = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(family, "norm")
    weight = getattr(inner, norm).weight.detach() + (family == "gemma2")
    if family in ("gpt2", "gpt_neox"):
        v = v - v.mean()
    v = v / (v.pow(2).mean() + EPSILON[family]).sqrt() * weight
    logits: Tensor = model.get_output_embeddings().weight.detach() @ v
    return logits


def order(tokens: tuple[TokenLogit, ...]) -> list[int]:
    return [one.token for one in tokens]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_direction_goes_through_norm_and_unembedding(family: str) -> None:
    subject = tiny_subject(family)
    dictionary = linear(subject)
    model = LiveModel(subject, [dictionary])
    for found in direct_lens(model, dictionary, [3, 11], top=5):
        wanted = by_hand(family, dictionary.decoder[found.latent])
        assert order(found.top) == wanted.topk(5).indices.tolist()
        assert order(found.bottom) == (-wanted).topk(5).indices.tolist()
        for one in (*found.top, *found.bottom):
            assert one.logit == pytest.approx(float(wanted[one.token]), abs=1e-4)
            assert one.piece == subject.pieces[one.token]
        assert (found.of, found.activation) == ("direction", None)
        random = torch.stack(
            [by_hand(family, torch.randn(WIDTH, generator=torch.Generator().manual_seed(i))) for i in range(200)]
        )
        assert found.floor == pytest.approx(float(random.max(1).values.quantile(0.95)), rel=0.2)
    whole = direct_lens(model, dictionary, [3], top=1000)[0]
    assert len(whole.top) == len(whole.bottom) == VOCABULARY and order(whole.top) == order(whole.bottom)[::-1]


@cache
def plain() -> Subject:
    """A model without a final norm."""
    model = bare("llama")
    model.model.norm = nn.Identity()
    return subject_from_model(model, tokenizer(), "plain")


def test_without_a_norm_it_is_the_direction_times_the_unembedding() -> None:
    dictionary = linear(plain())
    found = direct_lens(LiveModel(plain(), [dictionary]), dictionary, [3], top=VOCABULARY)[0]
    unembedding = plain().bridge.unembed.W_U.detach()
    wanted = dictionary.decoder[3] @ unembedding
    assert [one.logit for one in found.top] == pytest.approx(wanted[order(found.top)].tolist(), abs=1e-5)
    # Three times the direction gives three times the logits, and the floor grows with it.
    longer = replace(dictionary, decoder=3 * dictionary.decoder)
    again = direct_lens(LiveModel(plain(), [longer]), longer, [3], top=VOCABULARY)[0]
    assert [one.logit for one in again.top] == pytest.approx([3 * one.logit for one in found.top], abs=1e-4)
    assert again.floor == pytest.approx(3 * found.floor, rel=1e-4)


class Bent:
    def encode(self, x: Tensor) -> Tensor:
        return x.abs()[..., :LATENTS]

    def decode(self, z: Tensor) -> Tensor:
        return torch.nn.functional.pad(torch.exp(z), (0, WIDTH - LATENTS)) + 5

    def differences(self, latent: int, activation: float) -> Tensor:
        v = torch.zeros(WIDTH)
        v[latent] = torch.tensor(activation).exp() - 1
        return v


def test_a_decoder_that_is_no_linear_map_is_looked_at_at_an_activation() -> None:
    subject = tiny_subject("gpt2")
    dictionary = opaque_dictionary(Bent(), subject, name="bent", hook_point=POST, latents=LATENTS, identity="bent")
    model = LiveModel(subject, [dictionary])
    for activation in (0.5, -2.0):
        found = direct_lens(model, dictionary, [4], top=4, activation=activation)[0]
        wanted = by_hand("gpt2", Bent().differences(4, activation))
        assert (found.of, found.activation) == ("difference", activation)
        assert order(found.top) == wanted.topk(4).indices.tolist()
        assert found.top[0].logit == pytest.approx(float(wanted.max()), abs=1e-4)


def refused(dictionary: Dictionary, subject: Subject, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match):
        direct_lens(LiveModel(subject, [dictionary]), dictionary, options.pop("latents", [0]), **options)


def test_where_a_direction_says_nothing_about_the_output_it_is_refused() -> None:
    subject = tiny_subject("llama")
    refused(
        linear(subject, "blocks.1.attn.hook_z"), subject, "hook_z', which is not the residual stream; use clamped_lens"
    )
    refused(linear(subject, "blocks.1.ln2.hook_normalized"), subject, "not the residual stream")
    gemma = tiny_subject("gemma2")
    refused(linear(gemma, "blocks.1.mlp.hook_out"), gemma, "not the residual stream")
    direct_lens(LiveModel(gemma, [linear(gemma, "blocks.1.hook_mlp_out")]), linear(gemma, "blocks.1.hook_mlp_out"), [0])
    options: dict[str, Any] = {"name": "given", "hook_point": POST, "latents": LATENTS, "identity": "given"}

    class Given(Bent):
        def decode(self, z: Tensor, given: Tensor) -> Tensor:  # type: ignore[override]
            return super().decode(z) * given

    refused(opaque_dictionary(Given(), subject, conditioned=True, **options), subject, "decodes relative to its input")


def test_a_model_whose_logits_come_from_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny_subject("llama")
    dictionary = linear(subject)
    model = LiveModel(subject, [dictionary])
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda *given, **named: 3 * logits(*given, **named))
    assert direct_lens(model, dictionary, [0], top=1)  # a factor changes no order
    monkeypatch.setattr(model, "logits", lambda *given, **named: logits(*given, **named).sin())
    with pytest.raises(UserError, match=r"'tiny-llama' has logits that are not those of its final norm.*clamped_lens"):
        direct_lens(model, dictionary, [0], top=1)


def test_bad_arguments_are_said() -> None:
    subject = tiny_subject("llama")
    dictionary = linear(subject)
    refused(dictionary, subject, f"no latent {LATENTS}; it has 0 to", latents=[LATENTS])
    bad: list[dict[str, Any]] = [{"latents": []}, {"top": 0}, {"controls": 0}, {"activation": 0.0}]
    for options in [*bad, {"activation": float("nan")}]:
        refused(dictionary, subject, "give at least one of each", **options)
    model = LiveModel(subject, [dictionary])
    with pytest.raises(UserError, match=r"1 prompts and 3 controls are given.*at least two"):
        clamped_lens(model, dictionary, 0, PROMPTS[:1])
    with pytest.raises(UserError, match=f"no latent {LATENTS}"):
        clamped_lens(model, dictionary, LATENTS, PROMPTS)
    with pytest.raises(UserError, match="target_kl is -1"):
        clamped_lens(model, dictionary, 0, PROMPTS, target_kl=-1)


def test_a_clamp_is_matched_on_some_prompts_and_measured_on_others() -> None:
    subject = tiny_subject("llama")
    dictionary = linear(subject)
    model = LiveModel(subject, [dictionary])
    found = clamped_lens(model, dictionary, 3, PROMPTS, target_kl=0.3, top=4, controls=2)
    assert found.matched.status == "matched" and found.matched.strength is not None and found.matched.n == 2
    assert found.matched.kl == pytest.approx(0.3, rel=0.1)
    there = clamp(dictionary.fingerprint, [3], found.matched.strength, "last")

    def logprobs(trials: list[Trial]) -> Tensor:
        return torch.stack(model.run(trials, lambda reading: list(reading.logits))).double().log_softmax(-1)

    def change(prompts: list[Tokens]) -> tuple[Tensor, Tensor]:
        clean, held = logprobs([Trial(t) for t in prompts]), logprobs([Trial(t, there) for t in prompts])
        return (held - clean).mean(0), (clean.exp() * (clean - held)).sum(-1).mean()

    assert float(change(PROMPTS[::2])[1]) == pytest.approx(found.matched.kl, rel=1e-3)
    wanted, divergence = change(PROMPTS[1::2])
    assert found.effect is not None and found.effect.n == 2
    assert found.effect.kl.value == pytest.approx(float(divergence), rel=1e-3)
    assert [one.token for one in found.effect.risers] == wanted.topk(4).indices.tolist()
    assert [one.token for one in found.effect.fallers] == (-wanted).topk(4).indices.tolist()
    assert found.effect.risers[0].logprob.value == pytest.approx(float(wanted.max()), abs=1e-4)
    assert found.floor is not None and found.floor.n == 2 and found.floor.value > 0
    assert clamped_lens(model, dictionary, 3, PROMPTS, target_kl=0.3, top=4, controls=0).floor is None


def test_a_latent_that_cannot_reach_the_divergence_says_so() -> None:
    subject = tiny_subject("llama")
    dictionary = linear(subject)
    deaf = replace(dictionary, decoder=dictionary.decoder.index_fill(0, torch.tensor([3]), 0.0))
    found = clamped_lens(LiveModel(subject, [deaf]), deaf, 3, PROMPTS, controls=1)
    assert found.matched.status == "unreachable" and found.effect is None and found.floor is not None


def test_on_the_bundled_subject(model: LiveModel, dictionary: Dictionary) -> None:
    # 954 holds up the direction of a sort (see test_attribution).
    found = direct_lens(model, dictionary, [954, 1], top=3)
    assert [one.latent for one in found] == [954, 1] and found[0].floor == found[1].floor > 0
    assert all(len(one.piece) for one in found[0].top)


def test_lenses_leave_no_hook() -> None:
    subject = tiny_subject("llama")
    dictionary = linear(subject)
    model = LiveModel(subject, [dictionary])
    points = [subject.bridge.hook_dict[name] for name in ("ln_final.hook_in", POST)]
    before = [len(point.fwd_hooks) for point in points]
    direct_lens(model, dictionary, [0])
    clamped_lens(model, dictionary, 3, PROMPTS, controls=1)
    assert [len(point.fwd_hooks) for point in points] == before
