"""Latents that fire on the same windows, from the firings that an activation pass kept (`exegete.tools.window_pool`).

1. The pool's firings are a sparse matrix of 0 and 1, latent × window, in the memory of its entries.
2. A block of the asked latents is multiplied with it; the product is sparse again, since few latents share a window.
3. Each latent's best are kept, and the block is dropped: a matrix latent × latent is never formed.

Jaccard: windows on which both fire over windows on which either does. Cosine: over the root of the product of both
counts. Beside them stands what two latents would share if they fired independently of each other: `expected`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from exegete.tools.errors import UserError
from exegete.tools.sampling import I64
from exegete.tools.windows import SPLITS, Split

if TYPE_CHECKING:
    from exegete.tools.corpus import Corpus
    from exegete.tools.hard_negatives import PoolFirings
    from exegete.tools.pass_settings import PassSettings

By = Literal["jaccard", "cosine"]

_BLOCK_LATENTS = 32
"""Multiplied together. At worst, where latents fire everywhere, a row of the product has an entry for every latent."""


@dataclass(frozen=True)
class CofiringNeighbour:
    """A latent that fires on windows on which another does."""

    neighbour: int
    jaccard: float
    cosine: float
    both: int
    """Windows on which both fire."""
    windows: int
    """On which this neighbour fires."""
    expected: float
    """Windows that both would share by chance: product of both counts over the windows of the pool."""


@dataclass(frozen=True)
class Cofirings:
    """What is known of one latent: the windows on which it fires, of so many, and its neighbours, nearest first."""

    latent: int
    windows: int
    pool_windows: int
    neighbours: tuple[CofiringNeighbour, ...]
    """Empty where the latent fires on no window of the pool, or alone."""


def pass_firings(folder: Path, corpus: Corpus, settings: PassSettings, latents: int) -> PoolFirings:
    """Read the pool's firings of the activation pass in `folder`, which `corpus` and `settings` were given to.

    Raises:
        UserError: the pass is not there, is of another corpus, or is damaged.
    """
    from exegete.tools.hard_negatives import PoolFirings
    from exegete.tools.parts import read_manifest
    from exegete.tools.window_pool import draw_pool, tokens_of

    if read_manifest(folder)["corpus"] != corpus.fingerprint:
        raise UserError(f"{str(folder)!r} holds an activation pass of another corpus; name its own")
    pool = draw_pool(corpus, settings)
    return PoolFirings(folder, pool, tokens_of(corpus, pool.windows), latents)


def cofiring_neighbours(
    firings: PoolFirings,
    latents: Sequence[int],
    count: int,
    *,
    by: By = "jaccard",
    splits: Sequence[Split] = ("explain",),
) -> list[Cofirings]:
    """Return for each of `latents` the `count` others that share most of their windows with it, ties by number.

    Args:
        firings: of a pass, see `pass_firings`.
        latents: which.
        count: neighbours of each, at most; latents that share no window are no neighbours.
        by: the order.
        splits: windows of these splits only. The others stay sealed (PROTOCOLS §1).

    Raises:
        UserError: there is no such latent, `count` is below 1, `by` or a split is unknown, or the pool has no window
            of these splits.
    """
    _check(firings, latents, count, by, splits)
    matrix, pooled = _matrix(firings, splits)
    fired = np.diff(matrix.indptr)
    transposed = matrix.T.tocsr()
    found: list[Cofirings] = []
    for start in range(0, len(latents), _BLOCK_LATENTS):
        block = np.asarray(latents[start : start + _BLOCK_LATENTS], np.int64)
        shared = (matrix[block] @ transposed).tocsr()
        for row, latent in enumerate(block.tolist()):
            entries = slice(shared.indptr[row], shared.indptr[row + 1])
            near = _nearest(latent, shared.indices[entries], shared.data[entries], fired, pooled, count, by)
            found.append(Cofirings(latent, int(fired[latent]), pooled, near))
    return found


def _check(firings: PoolFirings, latents: Sequence[int], count: int, by: str, splits: Sequence[str]) -> None:
    if wrong := [latent for latent in latents if not 0 <= latent < firings.latents]:
        raise UserError(f"there is no latent {wrong[0]}; the pass has 0 to {firings.latents - 1}")
    if not len(latents) or count < 1:
        raise UserError(f"{count} neighbours of {len(latents)} latents are asked for; give at least one of each")
    if by not in ("jaccard", "cosine"):
        raise UserError(f"neighbours by {by!r} are unknown; give 'jaccard' or 'cosine'")
    if not splits or set(splits) - set(SPLITS):
        raise UserError(f"splits {list(splits)} are not of {', '.join(SPLITS)}")


def _matrix(firings: PoolFirings, splits: Sequence[Split]) -> tuple[Any, int]:
    """Return on which windows each latent fires, sparse of shape (latent, window of the pool), and how many there are."""
    from scipy.sparse import csr_matrix

    latents, index = np.divmod(firings.keys, max(firings.size, 1))
    shown = np.zeros(firings.size, bool)
    for split in splits:
        place = SPLITS.index(split)
        shown[firings.bounds[place] : firings.bounds[place + 1]] = True
    if not shown.any():
        raise UserError(f"the pool has no window of the splits {', '.join(splits)}; make the pass over a larger corpus")
    kept = shown[index]
    entries = np.ones(int(kept.sum()), np.int32)
    matrix = csr_matrix((entries, (latents[kept], index[kept])), shape=(firings.latents, firings.size))
    return matrix, int(shown.sum())


def _nearest(
    latent: int, others: I64, both: NDArray[np.int32], fired: I64, pooled: int, count: int, by: By
) -> tuple[CofiringNeighbour, ...]:
    kept = others != latent
    others, both = others[kept].astype(np.int64), both[kept].astype(np.int64)
    jaccard = both / (fired[latent] + fired[others] - both)
    cosine = both / np.sqrt(fired[latent] * fired[others].astype(np.float64))
    order = np.lexsort((others, -(jaccard if by == "jaccard" else cosine)))[:count]
    return tuple(
        CofiringNeighbour(
            neighbour=int(others[i]),
            jaccard=float(jaccard[i]),
            cosine=float(cosine[i]),
            both=int(both[i]),
            windows=int(fired[others[i]]),
            expected=float(fired[latent]) * float(fired[others[i]]) / pooled,
        )
        for i in order
    )
