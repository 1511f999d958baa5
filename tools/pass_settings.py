"""What an activation pass is asked for: how much evidence, from which seed, in which pieces."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from exegete.tools.errors import UserError
from exegete.tools.windows import SPLITS


@dataclass(frozen=True)
class EvidenceCounts:
    """How many windows are kept for each latent. Triples are for the splits explain, refine, test (PROTOCOLS §1)."""

    firing: tuple[int, int, int] = (40, 40, 100)
    """Uniform sample of the firing windows, cut into `strata` of equal size by peak: 100 is 10 per decile."""
    top: tuple[int, int, int] = (20, 10, 10)
    """Windows of highest peak."""
    random: tuple[int, int, int] = (40, 40, 100)
    """Windows of the pool on which the latent does not fire."""
    hard: tuple[int, int, int] = (16, 16, 16)
    """Hard negatives: half that contain the latent's top tokens, half on which its nearest latents fire."""
    strata: int = 10
    """Equal-count quantiles of the peak."""
    minimum_firing: int = 10
    """A latent with fewer firing windows in explain or in test is `rare`: one per stratum is the least that scores."""
    minimum_non_firing: int = 10
    """A latent with fewer non-firing windows of the pool in explain or in test is `dense`."""


@dataclass(frozen=True)
class PassSettings:
    """One activation pass. Neither `slices` nor `batch` changes a bit of the evidence."""

    seed: int = 0
    counts: EvidenceCounts = field(default_factory=EvidenceCounts)
    slices: int | None = None
    """Pieces of the corpus, each complete or absent after a crash; None: one per 2^20 tokens."""
    batch: int | None = None
    """Contexts read at a time, a multiple of the micro-batch; None: one micro-batch."""
    micro_batch: int | None = None
    """Contexts in every forward pass; None: 4 on a CPU, 32 on a GPU. The evidence depends on it in the last bits."""
    pool_windows: int = 16_384
    """Random windows per split whose firings are all kept, at most `pool_share` of the split's windows …"""
    pool_share: float = 0.1
    pool_floor: int = 1_024
    """… but no fewer than this where there are as many: a tenth of a small corpus would be too few to draw from."""
    emission_factor: float = 4.0
    """c in `exegete.tools.sampling`."""
    top_tokens: int = 5
    """Tokens at the peak of a latent's explain windows that hard negatives may contain."""
    neighbours: int = 8
    """Nearest latents that are stored; the first half of them give hard negatives."""
    verify_share: float = 0.05
    """Largest share of the corpus that the second pass runs over, to verify hard negatives with rare tokens."""

    def __post_init__(self) -> None:
        counts = self.counts
        if min(*counts.firing, *counts.top, *counts.random, *counts.hard) < 0 or counts.strata < 1:
            raise UserError(f"evidence counts must not be negative, nor strata below 1: {counts}")
        if self.emission_factor <= 0 or not 0 < self.pool_share <= 1:
            raise UserError("emission_factor must be above 0, and pool_share above 0 and at most 1")
        for name in ("slices", "batch", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")

    def shape(self, device: str) -> tuple[int, int]:
        """Return (micro_batch, batch) in contexts on `device`. Raises UserError where batch is no multiple."""
        micro = self.micro_batch or (4 if device.startswith("cpu") else 32)
        batch = self.batch or micro
        if batch % micro:
            raise UserError(f"batch {batch} is not a multiple of the micro-batch of {micro} contexts; try {micro}")
        return micro, batch

    def identity(self) -> dict[str, Any]:
        """Return what the evidence depends on: everything but `slices` and `batch`."""
        named = asdict(self)
        del named["slices"], named["batch"]
        return named


SPLIT_COUNT = len(SPLITS)
