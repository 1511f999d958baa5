"""What the tests of the live model share: dictionaries of tiny subjects, prompts of four lengths, interventions of every kind."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tiny_models import WIDTH, prompt, tiny_subject
from torch import Tensor

from exegete.tools.dictionaries import Dictionary, PlainDictionary, random_dictionary
from exegete.tools.interventions import CLEAN, Intervention, ablate, clamp, patch, project_out, push, scale, steer
from exegete.tools.live_model import LiveModel, Trial

LATENTS = 64
POST, PRE, MID = "blocks.1.hook_resid_post", "blocks.2.hook_resid_pre", "blocks.1.hook_resid_mid"
ATTENTION, Z, MLP = "blocks.1.hook_attn_out", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out"
NORMALIZED, POST_0 = "blocks.1.ln1.hook_normalized", "blocks.0.hook_resid_post"
PROMPTS = [prompt(length, seed=length) for length in (3, 9, 17, 30)]
OTHER = prompt(12, seed=99)


@cache
def coder(family: str, point: str, activation: Any = "jumprelu", seed: int = 0) -> PlainDictionary:
    return random_dictionary(tiny_subject(family), point, LATENTS, activation, k=12, seed=seed)


def last_logits(model: LiveModel, trials: list[Trial]) -> Tensor:
    return torch.stack(model.run(trials, lambda reading: list(reading.logits)))


def all_logits(model: LiveModel, trial: Trial) -> Tensor:
    logits: Tensor = model.run([trial], lambda reading: list(reading.logits), keep="all")[0]
    return logits


def firing(family: str, d: PlainDictionary, tokens: tuple[int, ...]) -> list[int]:
    """Return latents that fire on the last token, most active first, and on other tokens, so that edits of them matter."""
    z = d.encode(tiny_subject(family).residual(torch.tensor([tokens]), d.hook_point)[0])
    score = (z > 0).float().mean(0) + 2 * (z[-1] > 0)
    return [int(latent) for latent in score.topk(8).indices]


def nulls(d: Dictionary, tokens: tuple[int, ...]) -> list[Intervention]:
    every = list(range(d.latents))
    fingerprint = d.fingerprint
    return [
        steer(fingerprint, every, 0.0, "all"),
        scale(fingerprint, every, 1.0),
        patch(fingerprint, every, tokens),
        push(d.hook_point, [1.0] * d.width, 0.0, "all"),
        Intervention(),
    ]


def mixed(family: str) -> tuple[LiveModel, list[Trial]]:
    """Return trials of every kind on prompts of every length."""
    first, second = coder(family, POST), coder(family, POST_0, "topk")
    same = coder(family, POST, seed=1)
    model = LiveModel(tiny_subject(family), [first, second, same])
    f, s, o = first.fingerprint, second.fingerprint, same.fingerprint
    k = firing(family, first, PROMPTS[2])
    vector = torch.linspace(-1, 1, WIDTH).tolist()
    interventions = [
        CLEAN,
        ablate(f, k),
        ablate(f, k[:1], "last") + steer(s, [1, 2], 3.0),
        steer(o, k[:2], 1.0, "all") + ablate(f, k),
        ablate(f, k) + steer(o, k[:2], 1.0, "all"),
        clamp(s, k[:3], [1.0, 2.0, 3.0], (0, -1)) + push(POST, vector, 2.0),
        push(POST, vector, 2.0, "all") + ablate(f, range(LATENTS)) + push(POST, vector, -1.0, "all"),
        project_out(POST, vector) + scale(f, k, 3.0, (1,)) + push(POST, vector, 1.0, (0,)),
        ablate(f, range(LATENTS), texts=[OTHER, PROMPTS[1]], seed=4),
        ablate(s, k, texts=[PROMPTS[3]], seed=5) + patch(f, k, OTHER),
        patch(f, range(LATENTS), prompt(5, seed=98)),
        ablate(s, k, means=[0.5] * len(k)) + steer(s, k[:1], 2.0),
    ]
    return model, [Trial(tokens, one) for tokens in PROMPTS for one in interventions]
