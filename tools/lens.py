"""What a latent says to the output: its direction through the unembedding, and what changes when it is clamped.

Direct lens (PROTOCOLS §10; nostalgebraist 2020, "interpreting GPT: the logit lens"):

1. The direction v that a latent writes goes through the model's own final norm, alone, and its unembedding, less what
   zero gives: unembed(norm(v)) − unembed(norm(0)). So biases fall out, LayerNorm takes the mean out of v, and the
   weights of the norm count. A norm is no linear map: it brings v alone to unit size, so that the logits say which
   tokens the direction favours, not by how much an activation moves them. Without a norm they are v @ W_U.
2. That norm and unembedding are what the model's logits come from is checked on the model. A softcap (Gemma-2) or a
   positive factor on the logits keeps their order, and is left out.
3. Where `decode` is no linear map, v is decode(a · e_k) − decode(0) at a stated activation a.

Clamped lens: the mean change of the next token's log-probability (that is its logit, but for a constant of the prompt)
while a latent is held at the value that reaches a given KL, on prompts other than those that the value was found on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from exegete.tools.controls import random_direction
from exegete.tools.dictionaries import Dictionary
from exegete.tools.effects import NextTokenEffect, next_token_effect
from exegete.tools.errors import UserError
from exegete.tools.estimates import Estimate, estimate
from exegete.tools.interventions import Positions, Tokens, clamp, push
from exegete.tools.live_model import LiveModel, Trial
from exegete.tools.seeds import derive_seed
from exegete.tools.strength import Make, Matched, match_strengths

_LOGITS = 2**26
"""Held at once."""
_RESIDUAL = (
    *("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_in", "hook_out"),
    *("hook_attn_out", "hook_mlp_out", "mlp.hook_out"),
)
"""Ends of the names, after `blocks.N.`, of points that are on the residual stream or written to it as they are."""


@dataclass(frozen=True)
class TokenLogit:
    """A token of the vocabulary and what the direction gives it."""

    token: int
    piece: str
    logit: float


@dataclass(frozen=True)
class DirectLens:
    """Tokens that a latent's direction favours and disfavours."""

    latent: int
    top: tuple[TokenLogit, ...]
    """The largest logit first."""
    bottom: tuple[TokenLogit, ...]
    """The smallest first."""
    of: Literal["direction", "difference"]
    """The decoder direction; or decode(a · e_k) − decode(0), where `decode` is no linear map."""
    activation: float | None
    """That a; None for a direction."""
    floor: float
    """95th percentile, over random directions, of their largest logit; of the mean length of the latents that are asked
    for, which matters without a norm alone."""


@dataclass(frozen=True)
class ClampedLens:
    """What changes in the next token while a latent is clamped."""

    latent: int
    matched: Matched
    """The clamp, on the prompts that it was matched on; `status` says whether the KL can be reached."""
    effect: NextTokenEffect | None
    """On the other prompts, ranked by log-probability; None where the KL cannot be reached."""
    floor: Estimate | None
    """Largest mean rise in log-probability by a random direction at the same KL, over directions; None without any."""


def direct_lens(
    model: LiveModel,
    dictionary: Dictionary,
    latents: Sequence[int],
    top: int = 50,
    *,
    activation: float = 1.0,
    controls: int = 100,
    seed: int = 0,
) -> list[DirectLens]:
    """Return the tokens that each latent's direction favours and disfavours most. See the module for what a logit is.

    Args:
        model: with the dictionary attached.
        dictionary: which writes to the residual stream.
        latents: of it.
        top: how many tokens at either end.
        activation: at which a decoder that is no linear map is looked at; others do not depend on it.
        controls: random directions for the floor.
        seed: of these.

    Raises:
        UserError: there is no latent, or one that is not there; the dictionary does not write to the residual stream, or
            its decoder depends on the input and is no linear map; the model's logits do not come from its final norm and
            unembedding; or a number is out of range.
    """
    dictionary = model.dictionary(dictionary.fingerprint)
    if not len(latents) or top < 1 or controls < 1 or not 0 < abs(activation) < float("inf"):
        raise UserError(
            f"{len(latents)} latents, top={top}, controls={controls}, activation={activation}; give at least one of each, "
            "and an activation that is a finite number other than 0"
        )
    model.require_latents(dictionary, latents)
    _require_residual(model, dictionary)
    vectors = _written(dictionary, latents, activation)
    read_out = _ReadOut(model)
    floor = read_out.floor(float(vectors.norm(dim=-1).mean()), controls, seed)
    linear = dictionary.decoder_directions() is not None
    found = []
    for latent, logits in zip(latents, read_out.rows(vectors), strict=True):
        best, worst = logits.topk(min(top, len(logits))), (-logits).topk(min(top, len(logits)))
        found.append(
            DirectLens(
                latent=int(latent),
                top=_tokens(model, best.indices, best.values),
                bottom=_tokens(model, worst.indices, -worst.values),
                of="direction" if linear else "difference",
                activation=None if linear else activation,
                floor=floor,
            )
        )
    return found


def clamped_lens(
    model: LiveModel,
    dictionary: Dictionary,
    latent: int,
    prompts: Sequence[Tokens],
    target_kl: float = 0.5,
    top: int = 10,
    *,
    tolerance: float = 0.1,
    batches: int = 10,
    controls: int = 3,
    seed: int = 0,
    positions: Positions = "last",
) -> ClampedLens:
    """Return which next tokens rise and fall while a latent is held at the value that changes them by `target_kl`.

    Every second prompt finds the value, the others are measured.

    Args:
        model: with the dictionary attached.
        dictionary: of the latent.
        latent: to clamp.
        prompts: two or more.
        target_kl: mean KL(clean ‖ clamped) of the next token, in nats.
        top: how many tokens that rise, and that fall.
        tolerance: of the KL, relative.
        batches: to find the value with, at most.
        controls: random directions, matched to the same KL, for the floor.
        seed: of these.
        positions: where the latent is clamped.

    Raises:
        UserError: there are fewer than two prompts, no such latent, or as `match_strength`.
    """
    dictionary = model.dictionary(dictionary.fingerprint)
    model.require_latents(dictionary, [latent])
    if len(prompts) < 2 or controls < 0:
        raise UserError(
            f"{len(prompts)} prompts and {controls} controls are given; one half of the prompts finds the clamp, the other "
            "is measured: give at least two, and 0 controls or more"
        )
    width = model.subject.width(dictionary.hook_point_out)
    pushes = [random_direction(width, derive_seed(seed, "lens", latent, i)).tolist() for i in range(controls)]
    makes: list[Make] = [lambda value: clamp(dictionary.fingerprint, [latent], value, positions)]
    makes += [partial(push, dictionary.hook_point_out, vector, positions=positions) for vector in pushes]
    matched = match_strengths(
        model, makes, list(prompts[::2]), target_kl=target_kl, tolerance=tolerance, batches=batches
    )
    effects: list[NextTokenEffect | None] = []
    for make, match in zip(makes, matched, strict=True):
        trials = [] if match.strength is None else [Trial(tokens, make(match.strength)) for tokens in prompts[1::2]]
        effects.append(next_token_effect(model, trials, top, by="logprob") if trials else None)
    rises = [one.risers[0].logprob.value for one in effects[1:] if one is not None and one.risers]
    return ClampedLens(latent, matched[0], effects[0], estimate(rises) if rises else None)


class _ReadOut:
    """The model's final norm and unembedding, checked."""

    def __init__(self, model: LiveModel) -> None:
        self._model = model
        self._norm = getattr(model.subject.bridge, "ln_final", None)
        self._unembed = getattr(model.subject.bridge, "unembed", None)
        self._width = int(model.subject.bridge.cfg.d_model)
        self._vocabulary = int(model.subject.bridge.cfg.d_vocab)
        if self._norm is None or self._unembed is None:
            raise self._refusal("has no final norm and unembedding that are known")
        self._check()

    def rows(self, vectors: Tensor) -> Iterator[Tensor]:
        """Yield the logits of each vector, shape (vocabulary,), in float32."""
        zero = self._through(vectors.new_zeros((1, self._width)))
        for part in torch.split(vectors, max(1, _LOGITS // self._vocabulary)):
            yield from self._through(part) - zero

    def floor(self, length: float, controls: int, seed: int) -> float:
        """Return the 95th percentile of the largest logit over random directions of a length."""
        subject = self._model.subject
        vectors = [
            random_direction(self._width, derive_seed(seed, "direct lens", index), device=subject.device)
            for index in range(controls)
        ]
        largest = torch.stack([row.max() for row in self.rows(length * torch.stack(vectors))])
        return float(largest.quantile(0.95))

    def _through(self, vectors: Tensor) -> Tensor:
        assert self._norm is not None and self._unembed is not None
        parameter = next(self._model.subject.bridge.original_model.parameters())
        # Not through `LiveModel.run`, but nobody else's hooks may be in place meanwhile.
        with self._model.editing(self._model.pad([_probe(self._model)])), torch.inference_mode():
            logits: Tensor = self._unembed(self._norm(vectors.to(parameter.dtype)[:, None]))
        return logits[:, 0].float()

    def _check(self) -> None:
        """Raise UserError unless the model's logits are those of norm and unembedding, but for a factor or a softcap."""
        model = self._model
        kept: list[Tensor] = []
        batch = model.pad([_probe(model)])
        try:
            with model.editing(batch), torch.inference_mode(), model.hooked("ln_final.hook_in", kept.append):
                logits = model.logits(batch.tokens, batch.mask, last=False)[0]
        except KeyError as error:
            raise self._refusal("has a final norm that cannot be looked at") from error
        if not kept or kept[0].shape[-1] != self._width:
            raise self._refusal("does not come to its logits through its final norm")
        ours = self._through(kept[0][0])
        cap = getattr(model.subject.bridge.original_model.config, "final_logit_softcapping", None)
        if cap:
            ours = cap * torch.tanh(ours / cap)
        ours = ours * ((ours * logits).sum().clamp_min(0) / (ours * ours).sum())
        tolerance = 1e-3 if model.subject.dtype in ("float32", "float64") else 0.05
        if not float((ours - logits).norm()) <= tolerance * float(logits.norm()):
            raise self._refusal("has logits that are not those of its final norm and unembedding")

    def _refusal(self, reason: str) -> UserError:
        return UserError(f"subject {self._model.subject.name!r} {reason}; use clamped_lens, which works on any model")


def _probe(model: LiveModel) -> Trial:
    return Trial(tuple(range(min(8, int(model.subject.bridge.cfg.d_vocab)))))


def _require_residual(model: LiveModel, dictionary: Dictionary) -> None:
    point = dictionary.hook_point_out
    layer, end = point.split(".", 2)[1:] if point.startswith("blocks.") else ("0", point)
    block: Any = model.subject.bridge.blocks[int(layer)]
    # Gemma-2 norms what the MLP gives before it is added.
    normed = end == "mlp.hook_out" and hasattr(block, "ln2_post")
    if (end not in _RESIDUAL and point != "hook_embed") or normed:
        raise UserError(
            f"dictionary {dictionary.name!r} writes at {point!r}, which is not the residual stream; use clamped_lens, "
            "which works at any hook point"
        )


def _written(dictionary: Dictionary, latents: Sequence[int], activation: float) -> Tensor:
    """Return what each latent writes, shape (latent, width)."""
    directions = dictionary.decoder_directions()
    chosen = torch.tensor([int(latent) for latent in latents], device=dictionary.device)
    if directions is not None:
        return directions[chosen].float()
    if dictionary.conditioned:
        raise UserError(
            f"dictionary {dictionary.name!r} decodes relative to its input, by no linear map: a latent has no direction "
            "of its own; use clamped_lens"
        )
    dtype = getattr(torch, dictionary.dtype)
    with torch.no_grad():
        empty = dictionary.decode(torch.zeros((1, dictionary.latents), device=dictionary.device, dtype=dtype))
        rows = []
        for latent in chosen.tolist():
            z = torch.zeros((1, dictionary.latents), device=dictionary.device, dtype=dtype)
            z[0, latent] = activation
            rows.append(dictionary.decode(z) - empty)
    return torch.cat(rows).float()


def _tokens(model: LiveModel, tokens: Tensor, logits: Tensor) -> tuple[TokenLogit, ...]:
    pieces = model.subject.pieces
    return tuple(
        TokenLogit(token, pieces[token], logit) for token, logit in zip(tokens.tolist(), logits.tolist(), strict=True)
    )
