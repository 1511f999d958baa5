"""Batches whose interventions all begin at the last token: each prompt is read once, its last token once for each trial.

Strengths are matched, and latents steered, from the last token of a prompt on, so that many trials of one batch differ there alone:

1. Each different prompt of the batch is read up to its last token, as it is, and its keys and values are kept.
2. Each trial is given a copy of those of its prompt, and runs its last token with its interventions.

A transformer that looks back only cannot tell the difference, beyond rounding. Where 16 prompts are steered at 8 strengths each, this
computes about an eighth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exegete.tools.interventions import LatentEdit, Tokens, VectorEdit

if TYPE_CHECKING:
    from exegete.tools.live_model import LiveModel
    from exegete.tools.trials import Batch, Trial

_LEAST_TOKENS = 8
"""Of a prompt, for it to be worth while."""
_LEAST_TRIALS = 2
"""Of a prompt, on average."""


def begins_late(model: LiveModel, batch: Batch) -> bool:
    """Return whether nothing is edited before the last token of any prompt, and it pays to read each prompt apart.

    A dictionary whose code depends on the whole context needs all of it, and an edit of one rules it out.
    """
    different = len({trial.tokens for trial in batch.trials})
    if batch.tokens.shape[1] < _LEAST_TOKENS or len(batch.trials) < _LEAST_TRIALS * different:
        return False
    edits = {edit for trial in batch.trials for edit in trial.intervention.edits}
    return all(_is_late(model, edit) for edit in edits)


def acts_late(model: LiveModel, trial: Trial) -> bool:
    """Return whether a trial has edits, and all of them from the last token of its prompt on."""
    edits = trial.intervention.edits
    return bool(edits) and all(_is_late(model, edit) for edit in edits)


def late_logits(model: LiveModel, batch: Batch) -> Tensor:
    """Return the next-token logits after each trial of a batch that `begins_late`, shape (trial, vocabulary)."""
    from transformers import DynamicCache

    from exegete.tools.live_model import LiveModel

    first, own = prompts_of(batch)
    cache = DynamicCache(config=model.subject.bridge.original_model.config)
    with torch.inference_mode():
        with model.subject.lock:
            # Of a live model as such: no pass of its own, which somebody would count.
            LiveModel.logits(model, batch.tokens[first, :-1], batch.mask[first, :-1], last=True, cache=cache)
        cache.batch_select_indices(torch.tensor(own, device=batch.tokens.device))
        with model.editing(batch) as editor:
            editor.offset = batch.tokens.shape[1] - 1
            return model.logits(batch.tokens[:, -1:], batch.mask, last=True, cache=cache)


def prompts_of(batch: Batch) -> tuple[list[int], list[int]]:
    """Return the first row of each different prompt, and for each row which of these prompts it has."""
    numbers: dict[Tokens, int] = {}
    own = [numbers.setdefault(trial.tokens, len(numbers)) for trial in batch.trials]
    return [own.index(number) for number in range(len(numbers))], own


def _is_late(model: LiveModel, edit: LatentEdit | VectorEdit) -> bool:
    conditioned = isinstance(edit, LatentEdit) and model.dictionary(edit.dictionary).conditioned
    return edit.positions == "last" and not conditioned
