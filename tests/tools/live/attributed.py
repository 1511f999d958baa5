"""What the tests of attribution share: a model worked by hand, dictionaries of every kind, models of every family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from tiny_models import WIDTH, prompt, tiny_subject, tokenizer
from torch import Tensor, nn

from exegete.tools.attribution import LogitDifference
from exegete.tools.dictionaries import Dictionary, PlainDictionary, opaque_dictionary, random_dictionary
from exegete.tools.live_model import LiveModel, Trial
from exegete.tools.metrics import Floats
from exegete.tools.subject import Subject, subject_from_model

POST, LATENTS = "blocks.1.hook_resid_post", 24
PROMPTS = [prompt(length, seed=length) for length in (3, 11, 7)]
METRIC = LogitDifference([5, 6, 7], 9)


# A model whose logits are the embedding of the last token times an unembedding, worked by hand.

EMBEDDING = torch.tensor([[0.0, 0.0], [3.0, 1.0], [1.0, -2.0], [2.0, 2.0]])
UNEMBEDDING = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 0.0]])


@cache
def line() -> Subject:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4, max_position_embeddings=8, bos_token_id=None, **shape))
    model.model.norm = nn.Identity()
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    model.model.embed_tokens.weight.data = EMBEDDING.clone()
    model.lm_head.weight.data = UNEMBEDDING.clone()
    return subject_from_model(model, tokenizer(), "line")


def halves() -> PlainDictionary:
    """Two latents that fire on the positive parts of x, and write half of these."""
    return PlainDictionary(
        name="halves",
        fingerprint="sha256:halves",
        hook_point="blocks.0.hook_resid_post",
        encoder=torch.eye(2),
        encoder_bias=torch.zeros(2),
        decoder=torch.eye(2) / 2,
        decoder_bias=torch.tensor([0.0, 0.25]),
        activation="relu",
    )


# Dictionaries of every kind, on models of every family, against derivatives that interventions measure.


class Bent:
    """Decoded by a function that is no linear map; codes of either sign."""

    def __init__(self) -> None:
        self.weights = torch.randn(WIDTH, LATENTS, generator=torch.Generator().manual_seed(5)) * 0.2

    def encode(self, x: Tensor) -> Tensor:
        z: Tensor = x @ self.weights.to(x)
        return z * (z.abs() > 0.7)

    def decode(self, z: Tensor) -> Tensor:
        decoded: Tensor = torch.tanh(z @ self.weights.T.to(z))
        return decoded


class Conditioned(Bent):
    """A code that depends on the tokens before, decoded relative to its input."""

    def encode(self, x: Tensor) -> Tensor:
        assert x.dim() == 3
        return super().encode(x + x.cumsum(1) * 0.1)

    def decode(self, z: Tensor, given: Tensor) -> Tensor:  # type: ignore[override]
        lengths: Tensor = given.norm(dim=-1, keepdim=True)
        return super().decode(z) * lengths * 0.2


def linear(subject: Subject) -> Dictionary:
    return random_dictionary(subject, POST, LATENTS, "jumprelu", k=6)


def topk(subject: Subject) -> Dictionary:
    return random_dictionary(subject, "blocks.0.hook_resid_post", LATENTS, "topk", k=6)


def opaque(subject: Subject) -> Dictionary:
    plain = random_dictionary(subject, POST, LATENTS, "jumprelu", k=6)
    options: dict[str, Any] = {"name": "opaque", "hook_point": POST, "latents": LATENTS}
    return opaque_dictionary(plain, subject, identity="opaque", directions=plain.decoder, **options)


def bent(subject: Subject) -> Dictionary:
    return opaque_dictionary(Bent(), subject, name="bent", hook_point=POST, latents=LATENTS, identity="bent")


def conditioned(subject: Subject) -> Dictionary:
    options: dict[str, Any] = {"name": "conditioned", "hook_point": POST, "latents": LATENTS}
    return opaque_dictionary(Conditioned(), subject, identity="conditioned", conditioned=True, **options)


def transcoder(subject: Subject) -> Dictionary:
    plain = random_dictionary(subject, "blocks.1.ln2.hook_normalized", LATENTS, "relu", k=6)
    return replace(plain, output="blocks.1.hook_mlp_out")


def between(subject: Subject) -> Dictionary:
    return random_dictionary(subject, "blocks.1.hook_resid_mid", LATENTS, "topk", k=6)


KINDS = [linear, topk, opaque, bent, conditioned, transcoder]
CASES = [("llama", kind) for kind in [*KINDS, between]] + [(f, linear) for f in ("gpt2", "gpt_neox", "gemma2")]


@cache
def subject_of(family: str) -> Subject:
    return tiny_subject(family)


def live(family: str, kind: Callable[[Subject], Dictionary], batch_tokens: int = 4_096) -> tuple[LiveModel, Dictionary]:
    dictionary = kind(subject_of(family))
    return LiveModel(subject_of(family), [dictionary], batch_tokens=batch_tokens), dictionary


def values(model: LiveModel, trials: Sequence[Trial], answers: Sequence[int]) -> Floats:
    """Return the logit of each answer minus that of token 9."""
    logits = torch.stack(model.run(trials, lambda reading: list(reading.logits)))
    return (logits[range(len(trials)), list(answers)] - logits[:, 9]).double().numpy()
