"""The fixed pool: random windows of each split on which the pass keeps every firing.

Because every firing there is known, a window of the pool on which a latent has no event verifiably does not make it
fire: `random` negatives cost nothing more, and neither do most hard ones. Which windows are in it depends on the
corpus and the seed alone, so that every worker draws the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exegete.tools.pass_settings import PassSettings
from exegete.tools.sampling import I64, mix
from exegete.tools.seeds import derive_seed
from exegete.tools.windows import SPLITS, WINDOW_TOKENS

if TYPE_CHECKING:
    from exegete.tools.corpus import Corpus

_CONTEXTS = 4_096
"""Contexts looked at together; bounds the memory."""


@dataclass(frozen=True)
class Pool:
    """The windows of the pool."""

    windows: I64
    """Ids, ascending, shape (pooled,)."""
    splits: NDArray[np.uint8]
    """Index into SPLITS, shape (pooled,)."""

    def holds(self, windows: I64) -> NDArray[np.bool_]:
        """Return which of the window ids are in the pool."""
        if not len(self.windows):
            return np.zeros(len(windows), bool)
        places = np.minimum(np.searchsorted(self.windows, windows), len(self.windows) - 1)
        held: NDArray[np.bool_] = self.windows[places] == windows
        return held


def draw_pool(corpus: Corpus, settings: PassSettings) -> Pool:
    """Draw the pool: per split the usable windows of lowest seeded hash."""
    totals = np.zeros(len(SPLITS), np.int64)
    for _, splits in _usable(corpus):
        totals += np.bincount(splits, minlength=len(SPLITS))
    sizes = [min(settings.pool_windows, max(int(n * settings.pool_share), min(n, settings.pool_floor))) for n in totals]
    best: list[I64] = [np.zeros(0, np.int64)] * len(SPLITS)
    for windows, splits in _usable(corpus):
        for split, size in enumerate(sizes):
            candidates = np.concatenate([best[split], windows[splits == split]])
            hashes = window_hash(settings.seed, candidates)
            best[split] = candidates[np.argsort(hashes, kind="stable")[:size]]
    windows = np.concatenate(best)
    owners = np.repeat(np.arange(len(SPLITS), dtype=np.uint8), [len(b) for b in best])
    order = np.argsort(windows)
    return Pool(windows[order], owners[order])


def window_hash(seed: int, windows: I64) -> NDArray[np.uint64]:
    """Return the seeded hash by which windows enter the pool."""
    return mix(mix(windows.astype(np.uint64)) + np.uint64(derive_seed(seed, "evidence", "pool")))


def _usable(corpus: Corpus) -> Iterator[tuple[I64, NDArray[np.uint8]]]:
    """Yield (window ids, splits) of the usable windows, in order."""
    per_context = corpus.context_tokens // WINDOW_TOKENS
    for start in range(0, corpus.contexts, _CONTEXTS):
        stop = min(start + _CONTEXTS, corpus.contexts)
        contexts, index = np.nonzero(corpus.usable(start, stop))
        yield (start + contexts) * per_context + index, corpus.split_of(start + contexts)


def tokens_of(corpus: Corpus, windows: I64) -> NDArray[np.int32]:
    """Return the tokens of `windows` (ascending ids), shape (window, position), reading the corpus in order."""
    per_context = corpus.context_tokens // WINDOW_TOKENS
    found = np.zeros((len(windows), WINDOW_TOKENS), np.int32)
    for start in range(0, corpus.contexts, _CONTEXTS):
        stop = min(start + _CONTEXTS, corpus.contexts)
        low, high = np.searchsorted(windows, [start * per_context, stop * per_context])
        if low < high:
            tokens = corpus.tokens(start, stop).reshape(-1, WINDOW_TOKENS)
            found[low:high] = tokens[windows[low:high] - start * per_context]
    return found
