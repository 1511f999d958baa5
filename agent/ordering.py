"""In which order a run labels its latents.

1. First a stratified random subset: all latents are laid out by status and by how often they fire (ties by a hash), and from a
   random place on every so-many-th is taken. It holds each firing rate in proportion, so a run that ends early has an unbiased
   picture, with less variance than a simple random sample has (systematic sampling: Cochran 1977, chapter 8).
2. Then the rest, ascending, since evidence lies on disk in that order and is read from front to back.

Nothing that is recorded depends on the order, except that the profile `night` asks the full counts of the subset.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from exegete.tools.evidence import Evidence
from exegete.tools.seeds import generator

Latents = NDArray[np.int64]

LEAST = 100
"""Latents of the subset, where there are so many: a mean over fewer says little."""


def chosen_latents(evidence: Evidence, limit: int | None, seed: int) -> Latents:
    """Return the latents that a run labels, ascending: all, or `limit` of them drawn by the seed."""
    latents = evidence.latents
    if limit is None or limit >= len(latents):
        return latents
    drawn = generator(seed, "limit", evidence.dictionary).permutation(len(latents))[:limit]
    return np.sort(latents[drawn])


def stratified_subset(evidence: Evidence, latents: Latents, share: float, seed: int) -> Latents:
    """Return a stratified random `share` of `latents`, ascending: at least `LEAST`, or all where there are fewer."""
    count = min(len(latents), max(LEAST, math.ceil(share * len(latents))))
    if not count:
        return latents
    rng = generator(seed, "stratified subset", evidence.dictionary)
    positions = np.searchsorted(evidence.latents, latents)
    live = np.isin(latents, evidence.live)
    # Ties, and rates that are not known, come in random order.
    laid_out = np.lexsort((rng.random(len(latents)), evidence.rates()[positions], live))
    places = np.floor((np.arange(count) + rng.random()) * len(latents) / count).astype(np.int64)
    return np.sort(latents[laid_out[places]])


def in_order(latents: Latents, first: Latents) -> Latents:
    """Return `latents`, those in `first` at the beginning, both parts ascending."""
    early = np.isin(latents, first)
    return np.concatenate([latents[early], latents[~early]])
