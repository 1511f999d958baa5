"""The window: what a latent did on a run of consecutive tokens of one context (PROTOCOLS §1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Split = Literal["explain", "refine", "test"]
Kind = Literal["firing", "random", "hard"]
Status = Literal["live", "rare", "dense", "dead"]

SPLITS: tuple[Split, ...] = get_args(Split)
KINDS: tuple[Kind, ...] = get_args(Kind)

CONTEXT_TOKENS = 256
WINDOW_TOKENS = 32
FIRING_SHARE_OF_PEAK = 0.3
"""A token is marked when its activation is at least this share of the window's peak (PROTOCOLS §2)."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """One window and what one latent did there.

    For example: tokens (" the", " cat", " sat"), activations [0, 3.1, 0], fires True, split "test", kind "firing".
    """

    id: int
    """Identifies the run of tokens within one evidence set; the same run has the same id for every latent."""
    tokens: tuple[str, ...]
    """Pieces as they join into text (a leading space belongs to its word)."""
    activations: NDArray[np.float32] | None
    """Shape (tokens,); None where only `fires` is known."""
    fires: bool
    split: Split
    kind: Kind
    stratum: int | None = None
    """Equal-count quantile of the peak among the latent's sampled firing windows, 0 lowest; None where not sampled."""
    top: bool = False
    """Whether the window is among the latent's highest by peak (it may be in the uniform sample as well)."""
    marks: tuple[int, ...] | None = None
    """Token positions that an imported fuzzing item has marked; None for every other window."""
    marks_correct: bool | None = None
    document: str | None = None

    @property
    def text(self) -> str:
        """The tokens joined."""
        return "".join(self.tokens)

    @property
    def peak(self) -> float | None:
        """The largest activation, or None where activations are not known."""
        return None if self.activations is None else float(self.activations.max(initial=0.0))

    def firing_positions(self) -> tuple[int, ...]:
        """Positions that a reader is shown as firing: activation at least 0.3 of the window's peak, and above zero.

        Where activations are not known: the imported marks if they are correct, else nothing.
        """
        if self.activations is None:
            return self.marks if self.marks and self.marks_correct else ()
        peak = self.activations.max(initial=0.0)
        shown = (self.activations > 0) & (self.activations >= FIRING_SHARE_OF_PEAK * peak)
        return tuple(int(i) for i in np.flatnonzero(shown))


@dataclass(frozen=True, slots=True)
class LatentEvidence:
    """What is known of one latent. Holds only the splits its reader was allowed (see `Evidence.read`)."""

    latent: int
    status: Status
    windows: tuple[Window, ...]
    statistics: Mapping[str, float] = field(default_factory=dict)
    """Firing statistics of the whole corpus: `firing_tokens`, `tokens`, `density`, `mean`, `peak`, … (may be empty)."""
    given_explanation: str | None = None
    sealed: frozenset[Split] = frozenset()
    """Splits that this reader must not see; asking for one raises."""

    def select(self, *splits: Split, kind: Kind | None = None) -> list[Window]:
        """Return the windows of `splits` (and of `kind`), in stored order.

        Raises:
            SealedSplitError: one of the splits is sealed to this reader.
        """
        from exegete.tools.errors import SealedSplitError

        for split in splits:
            if split in self.sealed:
                raise SealedSplitError(f"latent {self.latent}: the {split!r} split is sealed to this reader")
        return [w for w in self.windows if w.split in splits and (kind is None or w.kind == kind)]
