"""What of a stream may be thrown away at once, so that the exact top and an exact uniform sample remain.

1. Every event (latent, window) has a seeded 64-bit hash; the K events of lowest hash are a uniform sample without
   replacement of all events of that latent, whatever order or process they came from (bottom-k sampling: Cohen and
   Kaplan 2007).
2. A stream that has seen n events of a group keeps one whose hash u (in [0, 1]) has `u · n ≤ c · K`. The bound
   `c · K / n` only falls, so at its end the stream has kept every event below `c · K / n_end`, with one counter a
   group.
3. Streams merge by union. The sample is exact where at least min(K, n) merged events lie below the smallest bound of
   any stream: the certificate. With c ≥ 4 it fails about never (a Poisson draw of mean 4K below K), but it is computed.
4. For the top, a stream keeps an event whose peak is at least a lower bound of the k-th best peak so far.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exegete.tools.seeds import derive_seed

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]

_UNIT = 2.0**-64


def mix(values: U64) -> U64:
    """Return the splitmix64 finaliser of each value: a bijection of 64-bit numbers that looks random (Steele 2014)."""
    x = values ^ (values >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def event_hash(seed: int, latents: NDArray[np.integer], windows: NDArray[np.integer]) -> U64:
    """Return the hash of each (latent, window), shape of the arguments as they broadcast. `seed` is the evidence's."""
    base = np.uint64(derive_seed(seed, "evidence", "event"))
    inner = mix(latents.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + base)
    return mix(inner + windows.astype(np.uint64) * np.uint64(0xD1342543DE82EF95))


def may_be_sampled(hashes: U64, seen: I64, budget: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which events lie below budget / seen. `seen`: events of the group so far, this included; `budget`: c · K."""
    kept: NDArray[np.bool_] = hashes.astype(np.float64) * _UNIT * seen <= budget
    return kept


def certified(below: I64, total: I64, sample: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Return for which groups the merged sample is provably the bottom-K.

    Args:
        below: merged events below the smallest bound of any stream, shape (group,).
        total: all events, shape (group,).
        sample: K, shape (group,).
    """
    held: NDArray[np.bool_] = below >= np.minimum(total, sample)
    return held


def rank_within(sorted_groups: NDArray[np.integer]) -> I64:
    """Return each element's rank within its run of equal values, for a sorted array: [3, 3, 5] → [0, 1, 0]."""
    count = len(sorted_groups)
    if not count:
        return np.zeros(0, np.int64)
    starts = run_starts(sorted_groups)
    return np.arange(count) - np.repeat(starts, np.diff(starts, append=count))


def run_starts(sorted_values: NDArray[np.integer]) -> I64:
    """Return where each run of equal values begins, for a sorted array: [3, 3, 5] → [0, 2]."""
    if not len(sorted_values):
        return np.zeros(0, np.int64)
    return np.flatnonzero(np.concatenate([[True], sorted_values[1:] != sorted_values[:-1]]))


class RunningBest:
    """The k highest values of each of many groups, and a lower bound of the k-th for each."""

    _ROWS = 16_384
    """Groups merged at once; bounds the temporary memory."""

    def __init__(self, groups: int, k: int) -> None:
        self._values = np.zeros((groups, k), np.float32)
        self.bound = np.zeros(groups, np.float32)
        """The k-th best of each group so far, 0 while there are fewer, shape (group,)."""

    def update(self, groups: I64, values: F32) -> None:
        """Take in positive `values` of `groups`, both of shape (event,), in any order."""
        k = self._values.shape[1]
        better = np.flatnonzero(values > self.bound[groups])
        # Positive floats order as their bits do: one integer sort by group, then value downwards.
        bits = np.uint64(0xFFFFFFFF) - values[better].view(np.uint32).astype(np.uint64)
        keys = np.sort((groups[better].astype(np.uint64) << np.uint64(32)) | bits)
        owners = (keys >> np.uint64(32)).astype(np.int64)
        best = (np.uint64(0xFFFFFFFF) - (keys & np.uint64(0xFFFFFFFF))).astype(np.uint32).view(np.float32)
        ranks = rank_within(owners)
        kept = ranks < k
        owners, best, ranks = owners[kept], best[kept], ranks[kept]
        starts = run_starts(owners)
        touched = owners[starts]
        row = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(owners)))
        for first in range(0, len(touched), self._ROWS):
            chunk = touched[first : first + self._ROWS]
            merged = np.zeros((len(chunk), 2 * k), np.float32)
            merged[:, :k] = self._values[chunk]
            low, high = np.searchsorted(row, [first, first + len(chunk)])
            merged[row[low:high] - first, k + ranks[low:high]] = best[low:high]
            merged.partition(k, axis=1)
            self._values[chunk] = merged[:, k:]
            self.bound[chunk] = merged[:, k]
