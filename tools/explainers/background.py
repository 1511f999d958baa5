"""The background: windows of other latents, against which a latent that brings no non-firing windows is set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from exegete.tools.seeds import derive_seed
from exegete.tools.windows import LatentEvidence


@dataclass(frozen=True, slots=True)
class Background:
    """Windows of the explain split, each with the latent that it was kept for. Plain values: it pickles and compares."""

    windows: tuple[tuple[int, tuple[str, ...]], ...] = ()
    """Pairs of latent and tokens."""


def background(evidence: Iterable[LatentEvidence], size: int = 2048, seed: int = 0) -> Background:
    """Return a sample of `size` explain windows of the given latents.

    The sample is the `size` windows of lowest seeded hash of (latent, window id, text), so it does not depend on the
    order of the latents; a text that several latents share counts once for each. Windows of other splits are never read.

    Args:
        evidence: the latents of a run, or any sample of them; read once, and nothing but the sample is kept.
        size: most windows to keep.
        seed: the run's.
    """
    kept: list[tuple[int, int, tuple[str, ...]]] = []
    for one in evidence:
        for window in one.select("explain"):
            if window.tokens:
                name = derive_seed(seed, "background", one.latent, window.id, window.text)
                kept.append((name, one.latent, window.tokens))
        if len(kept) > 4 * size:
            kept = sorted(kept)[:size]
    return Background(tuple((latent, tokens) for _, latent, tokens in sorted(kept)[:size]))
