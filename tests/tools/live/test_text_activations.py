"""Activations on demand, against the dense code and against hand-worked signed ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from exegete.tools.dictionaries import Dictionary, OpaqueDictionary, PlainDictionary
from exegete.tools.errors import UserError
from exegete.tools.interventions import Tokens
from exegete.tools.live_model import LiveModel
from exegete.tools.subject import Subject
from exegete.tools.text_activations import Pooling, activations, pooled, top_latents

LATENTS = (0, 3, 17, 400, 1023)


@pytest.fixture(scope="module")
def model(subject: Subject, dictionary: Dictionary) -> LiveModel:
    return LiveModel(subject, [dictionary])


@pytest.fixture(scope="module")
def few(prompts: list[Tokens]) -> list[Tokens]:
    return prompts[:5]


@pytest.fixture(scope="module")
def alone(model: LiveModel, dictionary: Dictionary, few: list[Tokens]) -> list[Any]:
    """The code of each prompt that runs alone, shape (token, latent)."""
    return [dense(model, dictionary, prompt) for prompt in few]


def dense(model: LiveModel, dictionary: Dictionary, prompt: Tokens) -> Any:
    """The code of one prompt that runs alone, shape (token, latent)."""
    x = model.subject.residual(torch.tensor([prompt]), dictionary.hook_point)
    return dictionary.encode(x)[0].numpy()


def spelled(model: LiveModel, prompt: Tokens) -> list[bool]:
    return [token not in model.subject.special_tokens for token in prompt]


def opaque(dictionary: Dictionary, encode: Any, *, conditioned: bool = False, latents: int | None = None) -> Any:
    return OpaqueDictionary(
        name="opaque",
        fingerprint="sha256:opaque",
        hook_point=dictionary.hook_point,
        width=dictionary.width,
        latents=latents or dictionary.latents,
        device="cpu",
        dtype="float32",
        encoder=encode,
        decoder=lambda z, given: z,
        directions=torch.zeros(latents or dictionary.latents, dictionary.width),
        conditioned=conditioned,
    )


def test_batched_equals_single(model: LiveModel, dictionary: Dictionary, few: list[Tokens], alone: list[Any]) -> None:
    found = activations(model, dictionary, few, LATENTS)
    for prompt, values, code in zip(few, found, alone, strict=True):
        assert values.shape == (len(prompt), len(LATENTS))
        np.testing.assert_allclose(values, code[:, LATENTS], atol=1e-4)
    np.testing.assert_allclose(found[0], activations(model, dictionary, few[:1], LATENTS)[0], atol=1e-4)


def test_latents_come_in_the_order_asked_for(model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]) -> None:
    one = activations(model, dictionary, prompts[:2], (17, 3))
    other = activations(model, dictionary, prompts[:2], (3, 17))
    np.testing.assert_allclose(one[1], other[1][:, ::-1], atol=1e-6)


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_pooled_is_the_dense_code_pooled(
    pooling: Any, model: LiveModel, dictionary: Dictionary, few: list[Tokens], alone: list[Any]
) -> None:
    found = pooled(model, dictionary, few, pooling)
    assert found.shape == (len(few), dictionary.latents)
    assert found.dtype == np.float32
    assert found.has_canonical_format
    for row, prompt in enumerate(few):
        code = alone[row][spelled(model, prompt)]
        expected = code.max(0) if pooling == "max" else code.mean(0)
        np.testing.assert_allclose(found[row].toarray()[0], expected, atol=1e-4)


def test_small_blocks_give_the_same(
    model: LiveModel, dictionary: Dictionary, few: list[Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: tuple[Pooling, ...] = ("max", "mean")
    whole = {pooling: pooled(model, dictionary, few, pooling) for pooling in kinds}
    tops = top_latents(model, dictionary, few[:3], 4)
    monkeypatch.setattr("exegete.tools.codes._ENTRIES", 7 * dictionary.latents)
    for pooling, expected in whole.items():
        found = pooled(model, dictionary, few, pooling)
        np.testing.assert_allclose(found.toarray(), expected.toarray(), atol=1e-4)
    again = top_latents(model, dictionary, few[:3], 4)
    assert [[a.latent for a in one.text] for one in again] == [[a.latent for a in one.text] for one in tops]


def test_top_latents_of_tokens_and_texts(
    model: LiveModel, dictionary: Dictionary, few: list[Tokens], alone: list[Any]
) -> None:
    for prompt, found, code in zip(few, top_latents(model, dictionary, few, 5), alone, strict=True):
        assert len(found.tokens) == len(prompt)
        for position, (token, actives) in enumerate(zip(code, found.tokens, strict=True)):
            np.testing.assert_allclose([a.value for a in actives], np.sort(token)[::-1][:5], atol=1e-4)
            np.testing.assert_allclose(token[[a.latent for a in actives]], [a.value for a in actives], atol=1e-4)
            assert {a.position for a in actives} == {position}
        kept = np.where(np.array(spelled(model, prompt))[:, None], code, 0)
        np.testing.assert_allclose([a.value for a in found.text], np.sort(kept.max(0))[::-1][:5], atol=1e-4)
        for active in found.text:
            assert kept[active.position, active.latent] == pytest.approx(active.value, abs=1e-4)


SIGNED = torch.tensor([[9.0, -9.0, 0.0], [1.0, -2.0, 0.0], [-3.0, 2.0, 0.0], [0.5, 0.0, 0.0]])
"""Codes of a prompt of four tokens, of which the first is special."""


@pytest.mark.parametrize("conditioned", [False, True])
def test_signed_codes_pool_by_magnitude(conditioned: bool, subject: Subject, dictionary: Dictionary) -> None:
    def encode(x: Tensor) -> Tensor:
        assert x.dim() == (3 if conditioned else 2)
        return SIGNED[None] if conditioned else SIGNED

    coder = opaque(dictionary, encode, conditioned=conditioned, latents=3)
    model = LiveModel(subject, [coder])
    prompt = (0, 10, 11, 12)
    assert pooled(model, coder, [prompt]).toarray().tolist() == [[-3.0, 2.0, 0.0]]
    assert pooled(model, coder, [prompt], "mean").toarray().tolist() == [[-0.5, 0.0, 0.0]]
    (found,) = top_latents(model, coder, [prompt], 2)
    assert found.text == ((0, -3.0, 2), (1, 2.0, 2))
    assert found.tokens == (
        ((0, 9.0, 0), (1, -9.0, 0)),
        ((1, -2.0, 1), (0, 1.0, 1)),
        ((0, -3.0, 2), (1, 2.0, 2)),
        ((0, 0.5, 3),),
    )
    assert activations(model, coder, [prompt], [1])[0][:, 0].tolist() == [-9.0, -2.0, 2.0, 0.0]


def test_conditioned_dictionaries_see_whole_prompts(
    subject: Subject, dictionary: Dictionary, few: list[Tokens]
) -> None:
    def encode(x: Tensor) -> Tensor:
        return x[..., :8].relu() + x[..., :8].mean(1, keepdim=True).relu()

    coder = opaque(dictionary, encode, conditioned=True, latents=8)
    model = LiveModel(subject, [coder])
    found = activations(model, coder, few, list(range(8)))
    matrix = pooled(model, coder, few, "mean").toarray()
    for row, prompt in enumerate(few):
        code = dense(model, coder, prompt)
        np.testing.assert_allclose(found[row], code, atol=1e-4)
        np.testing.assert_allclose(matrix[row], code[spelled(model, prompt)].mean(0), atol=1e-4)


def test_bad_input_is_one_clear_line(model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]) -> None:
    assert isinstance(dictionary, PlainDictionary)
    stranger = replace(dictionary, fingerprint="sha256:stranger", name="stranger")
    broken = replace(dictionary, fingerprint="sha256:broken", encoder_bias=dictionary.encoder_bias + torch.nan)
    attached = LiveModel(model.subject, [broken])
    cases: list[tuple[Any, str]] = [
        (lambda: activations(model, dictionary, prompts, []), "no latent is given"),
        (lambda: activations(model, dictionary, prompts, [1024]), "no latent 1024; it has 0 to 1023"),
        (lambda: activations(model, dictionary, [], [0]), "no prompt"),
        (lambda: pooled(model, dictionary, []), "no prompt"),
        (lambda: pooled(model, dictionary, [(0, 2)]), "prompt 0 has no token that a text spells"),
        (lambda: pooled(model, dictionary, prompts, cast(Any, "median")), "pooling 'median' is not one of"),
        (lambda: pooled(model, stranger, prompts), "'stranger' is not attached"),
        (lambda: top_latents(model, dictionary, prompts, 0), "top is 0"),
        (lambda: top_latents(model, dictionary, [(5,) * 300]), "300 tokens"),
        (lambda: activations(attached, broken, prompts[:1], [0]), "not finite"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()
