"""Candidates for a minimal set, found by attributing again and again under the ablation of those found so far.

One gradient at the clean run misses latents that take over where others are gone, and underrates those whose effect is
saturated (McGrath et al. 2023, "The Hydra Effect"). So the set grows:

1. On the prompts that still show the behaviour while the set so far is ablated, the gradient g of a metric is taken at
   the point that the dictionary writes to.
2. A latent's estimate is the sum over positions of (z − z') · (g · its direction): z its activation on the clean prompt,
   z' what the ablation makes of it. It is averaged over prompts.
3. The latents of the highest estimates join the set: a sixth of its size at a time, at least two.
4. That goes on until the wanted share of prompts no longer shows the behaviour, no estimate is above 0, or the set is full.

`exegete.tools.minimal_set` then prunes what the set can do without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exegete.tools.ablation_sets import ZERO, Ablation, dense_codes, spelled
from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.interventions import Tokens
from exegete.tools.judged_behaviours import SHOWN, Behaviour, judged
from exegete.tools.live_model import Batch, LiveModel, Reading, Trial
from exegete.tools.metrics import Metric, PromptTrial, measured, numbered

_SHARE, _LEAST = 6, 2
_GATHERED = 2**14
"""Directions gathered at once."""


@dataclass(frozen=True)
class Growth:
    """The set, in the order in which latents joined it."""

    latents: tuple[int, ...]
    flipped: tuple[float, ...]
    """Share of prompts that no longer show the behaviour, before each round and after the last."""


def grow(
    model: LiveModel,
    dictionary: Dictionary,
    prompts: Sequence[Tokens],
    metric: Metric,
    behaviour: Behaviour,
    *,
    ablation: Ablation = ZERO,
    wanted: float = 0.95,
    most: int = 128,
) -> Growth:
    """Return latents whose joint ablation makes the behaviour go.

    Args:
        model: with the dictionary attached.
        dictionary: whose latents; its decoder must be linear.
        prompts: that show the behaviour.
        metric: what the latents are to hold up (see `exegete.tools.metrics`), with one token for all prompts or one for
            each of `prompts`.
        behaviour: says whether a prompt still shows it.
        ablation: how latents are taken out.
        wanted: share of prompts to flip.
        most: latents.

    Raises:
        UserError: `wanted` or `most` is out of range, the decoder is not linear, there is no prompt, or as
            `LiveModel.run`.
    """
    if not 0 < wanted <= 1 or most < 1:
        raise UserError(f"wanted={wanted}, most={most}; give a share above 0 and up to 1, and at least 1 latent")
    directions = dictionary.decoder_directions()
    if directions is None:
        raise UserError(
            f"dictionary {dictionary.name!r} has no linear decoder; order candidates by `attribute` instead"
        )
    trials = numbered(model, prompts, metric)
    removed = _removed(model, dictionary, prompts, ablation)
    found: list[int] = []
    flipped: list[float] = []
    while True:
        changed = [_with(trial, ablation, dictionary, found) for trial in trials]
        shown = judged(model, behaviour, changed) > SHOWN
        flipped.append(1 - float(shown.mean()))
        if flipped[-1] >= wanted or len(found) >= most:
            break
        left = np.flatnonzero(shown).tolist()
        gradients = _gradients(model, dictionary, [changed[index] for index in left], metric)
        scores = torch.zeros(dictionary.latents, device=directions.device)
        for index, gradient in zip(left, gradients, strict=True):
            scores += _estimates(removed[index], gradient, directions)
        scores[found] = -torch.inf
        best = scores.topk(min(max(_LEAST, len(found) // _SHARE), most - len(found)))
        joining = best.indices[best.values > 0].tolist()
        if not joining:
            break
        found += joining
    return Growth(tuple(found), tuple(flipped))


def _with(trial: PromptTrial, ablation: Ablation, dictionary: Dictionary, latents: Sequence[int]) -> PromptTrial:
    intervention = ablation.of(dictionary, latents, trial.tokens)
    return PromptTrial(trial.tokens, intervention, trial.draw, trial.prompt)


def _removed(model: LiveModel, dictionary: Dictionary, prompts: Sequence[Tokens], ablation: Ablation) -> list[Tensor]:
    """Return, for each prompt, what ablating every latent takes from its code, sparse, shape (token, latent)."""
    left = _left(model, dictionary, prompts, ablation)
    return [(z - put).to_sparse() for z, put in zip(_codes(model, dictionary, prompts), left, strict=True)]


def _left(model: LiveModel, dictionary: Dictionary, prompts: Sequence[Tokens], ablation: Ablation) -> Iterator[Tensor]:
    """Yield, for each prompt, the code that is left where every latent is ablated, or what stands for it on average."""
    if ablation.sources is not None:
        others = [ablation.source(prompt) for prompt in prompts]
        for prompt, z in zip(prompts, _codes(model, dictionary, others), strict=True):
            short = len(prompt) - len(z)
            # What a shorter source lacks stays as it is: no difference is counted there.
            own = next(_codes(model, dictionary, [prompt]))[: max(short, 0)]
            yield torch.cat([own, z[max(-short, 0) :]])
        return
    put = torch.zeros(dictionary.latents, device=dictionary.device)
    if ablation.means is not None:
        put = torch.tensor(ablation.means, device=dictionary.device, dtype=torch.float32)
    elif ablation.texts is not None:
        drawn = [
            z[spelled(model, text)]
            for text, z in zip(ablation.texts, _codes(model, dictionary, ablation.texts), strict=True)
        ]
        put = torch.cat(drawn).mean(0)
    yield from (put[None] for _ in prompts)


def _codes(model: LiveModel, dictionary: Dictionary, prompts: Sequence[Tokens]) -> Iterator[Tensor]:
    """Yield the clean code of each prompt, shape (token, latent)."""

    def read(reading: Reading) -> list[Tensor]:
        return [reading.of(dictionary.hook_point, row).clone() for row in range(len(reading.batch.trials))]

    found = model.run([Trial(prompt) for prompt in prompts], read, keep="none", points=[dictionary.hook_point])
    for x in found:
        # Not around the yield: whoever takes from two of these in turn would be left without gradients.
        with torch.no_grad():
            code = torch.cat(dense_codes(dictionary, x)).float()
        yield code


def _gradients(model: LiveModel, dictionary: Dictionary, trials: Sequence[PromptTrial], metric: Metric) -> list[Tensor]:
    """Return the metric's gradient at the changed vectors, for each trial, shape (token, width out)."""
    found: dict[int, Tensor] = {}
    order = sorted(range(len(trials)), key=lambda index: len(trials[index].tokens))

    def work(part: list[PromptTrial]) -> list[Tensor]:
        with torch.inference_mode(False):
            return _batch_gradients(model, dictionary, model.pad(part), metric)

    for chosen in model.batches(order, lambda index: len(trials[index].tokens)):
        parts = model.shrinking([trials[index] for index in chosen], work)
        found |= dict(zip(chosen, parts, strict=True))
    return [found[index] for index in range(len(trials))]


def _batch_gradients(model: LiveModel, dictionary: Dictionary, batch: Batch, metric: Metric) -> list[Tensor]:
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        leaves.append(x.detach().clone().requires_grad_())
        # Nothing before this point is in the graph.
        torch.set_grad_enabled(True)
        return leaves[0]

    with model.editing(batch), model.hooked(dictionary.hook_point_out, leaf), torch.no_grad():
        logits = model.logits(batch.tokens, batch.mask, last=True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(measured(metric, logits, batch).sum(), leaves[0])
    return [gradient[row, -length:].float() for row, length in enumerate(batch.lengths)]


def _estimates(removed: Tensor, gradient: Tensor, directions: Tensor) -> Tensor:
    """Return the sum over tokens of removed · (gradient · direction), shape (latent,)."""
    tokens, latents = removed.indices()
    values = torch.zeros(len(directions), device=directions.device)
    for start in range(0, len(tokens), _GATHERED):
        part = slice(start, start + _GATHERED)
        along = (gradient[tokens[part]] * directions[latents[part]].float()).sum(-1)
        values.index_add_(0, latents[part], removed.values()[part] * along)
    return values
