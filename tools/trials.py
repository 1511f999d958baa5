"""What runs: trials, the padded batch that they make, and what is read off it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exegete.tools.errors import UserError
from exegete.tools.interventions import CLEAN, Intervention, Tokens


@dataclass(frozen=True)
class Trial:
    """A prompt, and what is done to the model while it reads and continues it."""

    tokens: Tokens
    """As `LiveModel.tokens` makes them."""
    intervention: Intervention = CLEAN
    draw: int = 0
    """Which of several random continuations; the same prompt and draw use the same random numbers, clean or not."""

    def __post_init__(self) -> None:
        try:
            # Plain integers, whatever they came in: random draws are keyed by how they are written.
            object.__setattr__(self, "tokens", tuple(int(operator.index(token)) for token in self.tokens))
        except TypeError as error:
            raise UserError(
                f"{str(self.tokens)[:60]!r} are no tokens ({error}); make them with model.tokens(text)"
            ) from error


@dataclass(frozen=True)
class Batch:
    """Trials padded to the left to one length."""

    trials: Sequence[Trial]
    tokens: Tensor
    """Shape (trial, position)."""
    mask: Tensor
    """Shape (trial, position): false where it is padding."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt, without padding."""
        return [len(trial.tokens) for trial in self.trials]


@dataclass(frozen=True)
class Reading:
    """What was read off one batch. Positions are of the padded batch: a prompt of n tokens has the last n."""

    batch: Batch
    logits: Tensor
    """Next-token logits in float32: shape (trial, vocabulary) with `keep="last"`, (trial, position, vocabulary) with
    "all", (0,) with "none". NaN where an intervention is more than the subject's number format can hold."""
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    """Hook point → vectors after the interventions there, shape (trial, position, width)."""

    def of(self, hook_point: str, row: int) -> Tensor:
        """Return one prompt's vectors without the padding, shape (token, width)."""
        return self.vectors[hook_point][row, -len(self.batch.trials[row].tokens) :]


def padded(trials: Sequence[Trial], device: str) -> Batch:
    """Return the trials padded to the left. What fills the gaps is token 0, which every model has; it is masked."""
    longest = max(len(trial.tokens) for trial in trials)
    rows = [[0] * (longest - len(trial.tokens)) + list(trial.tokens) for trial in trials]
    gaps = torch.tensor([longest - len(trial.tokens) for trial in trials], device=device)
    mask = torch.arange(longest, device=device) >= gaps[:, None]
    return Batch(trials, torch.tensor(rows, device=device), mask)
