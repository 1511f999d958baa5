"""One vector for each prompt and hook point: of its last token, or the mean over its tokens; special tokens left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exegete.tools.errors import UserError
from exegete.tools.interventions import CLEAN, Intervention, Tokens
from exegete.tools.live_model import Batch, LiveModel, Reading, Trial

Pooling = Literal["last", "mean"]
POOLINGS: tuple[Pooling, ...] = ("last", "mean")


def prompt_vectors(
    model: LiveModel,
    prompts: Sequence[Tokens],
    points: Sequence[str],
    poolings: Sequence[Pooling] = ("last",),
    intervention: Intervention = CLEAN,
) -> Mapping[tuple[str, Pooling], NDArray[np.float32]]:
    """Return the vectors of prompts, for each hook point and pooling, shape (prompt, width).

    Args:
        model: that reads them.
        prompts: tokens, as `LiveModel.tokens` makes them.
        points: hook points, all read in one pass.
        poolings: "last" for the last token that is not special, "mean" for the mean over all that are not.
        intervention: what is done meanwhile.

    Raises:
        UserError: there is no prompt, one has special tokens only, a hook point or pooling is unknown or none is given,
            or the subject gives values that are not finite.
    """
    if not points:
        raise UserError("no hook point is given; give at least one")
    if wrong := [pooling for pooling in poolings if pooling not in POOLINGS]:
        raise UserError(f"pooling {wrong[0]!r} is not one of {', '.join(POOLINGS)}")
    _require_text(model, prompts)
    points = tuple(dict.fromkeys(points))
    keys = [(point, pooling) for point in points for pooling in dict.fromkeys(poolings)]

    def read(reading: Reading) -> list[list[NDArray[np.float32]]]:
        weights = {pooling: _weights(model, reading.batch, pooling) for pooling in poolings}
        pooled = [_pooled(reading.vectors[point], weights[pooling]) for point, pooling in keys]
        return [list(rows) for rows in zip(*pooled, strict=True)]

    trials = [Trial(tuple(prompt), intervention) for prompt in prompts]
    rows = model.run(trials, read, keep="none", points=points)
    found = {key: np.stack([row[index] for row in rows]) for index, key in enumerate(keys)}
    for (point, _), vectors in found.items():
        if not np.isfinite(vectors).all():
            raise UserError(f"the subject gives values that are not finite at {point!r}")
    return found


def canonical(
    prompts: Sequence[Tokens], labels: Sequence[bool | int], groups: Sequence[int | str] | None
) -> tuple[list[int], list[int | str]]:
    """Return an order of labelled prompts that does not depend on the one they are given in, and their groups in it.

    Without groups, equal prompts are one.

    Raises:
        UserError: labels or groups are not as many as prompts.
    """
    for what, given in (("labels", labels), ("groups", groups)):
        if given is not None and len(given) != len(prompts):
            raise UserError(f"{len(given)} {what} are given for {len(prompts)} texts; give one for each")
    order = sorted(range(len(prompts)), key=lambda index: (tuple(prompts[index]), str(labels[index])))
    if groups is not None:
        return order, [groups[index] for index in order]
    numbers: dict[Tokens, int] = {}
    return order, [numbers.setdefault(tuple(prompts[index]), len(numbers)) for index in order]


def _require_text(model: LiveModel, prompts: Sequence[Tokens]) -> None:
    special = model.subject.special_tokens
    for prompt in prompts:
        if prompt and special.issuperset(prompt):
            raise UserError(f"the prompt of tokens {list(prompt)[:8]} has special tokens only; give it some text")


def _weights(model: LiveModel, batch: Batch, pooling: Pooling) -> Tensor:
    """Return how much each position counts, shape (trial, position)."""
    special = torch.tensor(sorted(model.subject.special_tokens), device=batch.tokens.device, dtype=batch.tokens.dtype)
    counts = batch.mask & ~torch.isin(batch.tokens, special)
    if pooling == "last":
        # The one token of text that has no other after it.
        counts &= counts.flip(1).cumsum(1).flip(1) == 1
    return counts.float() / counts.sum(1, keepdim=True)


def _pooled(vectors: Tensor, weights: Tensor) -> NDArray[np.float32]:
    # What stands at padding may be anything, and zero times infinity is no zero.
    kept = torch.where(weights[..., None] > 0, vectors.float(), 0.0)
    pooled: NDArray[np.float32] = torch.einsum("tp,tpw->tw", weights, kept).cpu().numpy()
    return pooled
