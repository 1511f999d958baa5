"""Windows on which a latent verifiably does not fire: at random, and hard ones (PROTOCOLS §1, a and b).

The pool keeps every firing, so that for its windows "does not fire" is the absence of an event. Per latent and split:

1. `random`: windows of the pool at random, less those on which it fires.
2. `hard` (a): windows with one of the latent's top tokens – from the pool, then those that the second pass verified.
3. `hard` (b): windows of the pool on which the latent's nearest latents fire.
4. Half of the hard ones are of (a), half of (b); what one lacks the other fills. None is also `random`.

Candidates are taken evenly spaced, from a start that the seed and the latent give, and by all latents of a block at
once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from exegete.tools.parts import damaged
from exegete.tools.pass_settings import PassSettings
from exegete.tools.sampling import I64, mix, rank_within
from exegete.tools.seeds import derive_seed
from exegete.tools.selecting import slices_of
from exegete.tools.window_pool import Pool
from exegete.tools.windows import SPLITS

CANDIDATES = 24
"""Looked at per top token or neighbour: several times what is kept, since many turn out to fire."""


@dataclass(frozen=True)
class Negatives:
    """Non-firing windows, sorted by latent, split, rank. Arrays of shape (negative,)."""

    latents: I64
    splits: I64
    windows: I64

    @property
    def groups(self) -> I64:
        """Latent and split in one number."""
        return self.latents * len(SPLITS) + self.splits


class PoolFirings:
    """Which latents fire on which windows of the pool, and which tokens its windows hold."""

    def __init__(self, folder: Path, pool: Pool, tokens: NDArray[np.int32], latents: int) -> None:
        """Read every slice's pool events. `tokens`: those of the pool's windows, shape (pooled, position)."""
        by_split = np.argsort(pool.splits, kind="stable")
        self.windows = pool.windows[by_split]
        self.bounds = np.searchsorted(pool.splits[by_split], np.arange(len(SPLITS) + 1))
        """Where each split's windows begin, in pool order: by split, then window."""
        self.latents = latents
        place = np.empty(len(by_split), np.int64)
        place[by_split] = np.arange(len(by_split))
        keys = [_pool_events(part / "pool.parquet", pool, place) for part in slices_of(folder)]
        self.keys: I64 = np.sort(np.concatenate(keys))
        """latent * size + pool index of every firing, ascending."""
        self._count_tokens(tokens[by_split])

    @property
    def size(self) -> int:
        """Windows in the pool."""
        return len(self.windows)

    def _count_tokens(self, tokens: NDArray[np.int32]) -> None:
        if not tokens.size:
            self.vocabulary, self.token_keys = 1, np.zeros(0, np.int64)
            return
        self.vocabulary = int(tokens.max()) + 1
        index = np.repeat(np.arange(len(tokens)), tokens.shape[1])
        self.token_keys = np.unique(tokens.reshape(-1).astype(np.int64) * self.size + index)

    def fires(self, latents: I64, index: I64) -> NDArray[np.bool_]:
        """Return whether each latent fires on the window of that pool index."""
        return _contains(self.keys, latents * self.size + index)

    def rows(self, latents: I64, split: int) -> tuple[I64, I64]:
        """Return where in `keys` the firings of each latent on windows of `split` begin and end."""
        low = np.searchsorted(self.keys, latents * self.size + self.bounds[split])
        high = np.searchsorted(self.keys, latents * self.size + self.bounds[split + 1])
        return low.astype(np.int64), high.astype(np.int64)

    def token_rows(self, tokens: I64, split: int) -> tuple[I64, I64]:
        """Return where in `token_keys` the windows of `split` that hold each token begin and end; −1 holds nothing."""
        known = (tokens >= 0) & (tokens < self.vocabulary)
        low = np.searchsorted(self.token_keys, tokens * self.size + self.bounds[split])
        high = np.searchsorted(self.token_keys, tokens * self.size + self.bounds[split + 1])
        return np.where(known, low, 0), np.where(known, high, 0)


def _pool_events(path: Path, pool: Pool, place: I64) -> I64:
    try:
        table = pq.read_table(path, columns=["latent", "window"], page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from error
    index = place[np.searchsorted(pool.windows, table.column("window").to_numpy())]
    keys: I64 = table.column("latent").to_numpy().astype(np.int64) * len(pool.windows) + index
    return keys


def random_negatives(firings: PoolFirings, latents: I64, settings: PassSettings) -> Negatives:
    """Draw `random` windows of each split for the latents (ascending)."""
    found = [_draw(firings, latents, split, settings) for split in range(len(SPLITS))]
    owners, splits, windows = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(owners * len(SPLITS) + splits, kind="stable")
    return Negatives(owners[order], splits[order], windows[order])


def _draw(firings: PoolFirings, latents: I64, split: int, settings: PassSettings) -> tuple[I64, I64, I64]:
    wanted = settings.counts.random[split]
    low, high = firings.bounds[split], firings.bounds[split + 1]
    size = int(high - low)
    draws = min(2 * wanted + 16, size)
    index = np.zeros((len(latents), draws), np.int64)
    if draws:
        index = low + _random(settings.seed, latents, split, draws) % size
    usable = ~firings.fires(np.repeat(latents, draws), index.reshape(-1)).reshape(index.shape) & _first(index)
    usable &= np.cumsum(usable, axis=1) <= wanted
    # Where too few draws are left (small pools, dense latents) the whole pool is shuffled instead.
    for row in np.flatnonzero(usable.sum(axis=1) < min(wanted, size)):
        whole = low + np.argsort(_random(settings.seed, latents[row : row + 1], split, size)[0], kind="stable")
        whole = whole[~firings.fires(np.full(size, latents[row]), whole)][:wanted]
        usable[row] = np.arange(draws) < min(len(whole), draws)
        index[row, : min(len(whole), draws)] = whole[:draws]
    owners = np.repeat(latents, usable.sum(axis=1))
    return owners, np.full(len(owners), split), firings.windows[index[usable]]


def _random(seed: int, latents: I64, split: int, count: int) -> I64:
    """Return non-negative numbers that depend on seed, latent, split and place only, shape (latent, count)."""
    base = np.uint64(derive_seed(seed, "evidence", "random", SPLITS[split]))
    start = mix(latents.astype(np.uint64) + base)[:, None]
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (mix(start + steps) >> np.uint64(1)).astype(np.int64)


def _first(index: I64) -> NDArray[np.bool_]:
    """Return where each entry is the first of its value in its row."""
    order = np.argsort(index, axis=1, kind="stable")
    ordered = np.take_along_axis(index, order, 1)
    fresh = np.ones(index.shape, bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.zeros(index.shape, bool)
    np.put_along_axis(first, order, fresh, 1)
    return first


def hard_negatives(
    firings: PoolFirings,
    latents: I64,
    top_tokens: I64,
    neighbours: I64,
    verified: Negatives,
    taken: Negatives,
    settings: PassSettings,
) -> Negatives:
    """Choose `hard` windows for the latents (ascending).

    Args:
        firings: the pool.
        latents: shape (latent,).
        top_tokens: shape (latent, token), −1 where there are fewer.
        neighbours: nearest first, shape (latent, neighbour), −1 where there are fewer.
        verified: what the second pass verified for these latents.
        taken: the windows that are `random` already.
        settings: of the pass.
    """
    parts: list[tuple[I64, I64, I64, I64, I64]] = []
    for split in range(len(SPLITS)):
        for b, sources in ((0, top_tokens), (1, neighbours)):
            parts.append(_candidates(firings, latents, sources, split, b, settings))
    late = np.full(len(verified.latents), CANDIDATES * max(1, top_tokens.shape[1]))
    parts.append((verified.latents, verified.splits, verified.windows, np.zeros_like(late), late))
    owners, splits, windows, kinds, turns = (np.concatenate(column) for column in zip(*parts, strict=True))
    groups = owners * len(SPLITS) + splits
    order = np.lexsort((turns, kinds, windows, groups))
    fresh = np.ones(len(order), bool)
    fresh[1:] = (groups[order][1:] != groups[order][:-1]) | (windows[order][1:] != windows[order][:-1])
    order = order[fresh]
    highest = int(max(windows.max(initial=0), taken.windows.max(initial=0))) + 1
    order = order[~_contains(np.sort(taken.groups * highest + taken.windows), (groups * highest + windows)[order])]
    order = order[np.lexsort((windows[order], turns[order], kinds[order], groups[order]))]
    chosen = order[_within_quota(groups[order], kinds[order], np.array(settings.counts.hard))]
    return Negatives(owners[chosen], splits[chosen], windows[chosen])


def _candidates(
    firings: PoolFirings, latents: I64, sources: I64, split: int, b: int, settings: PassSettings
) -> tuple[I64, I64, I64, I64, I64]:
    """Return (latents, splits, windows, kinds, turns) of the pool windows that hold a token (b = 0) or on which a
    neighbour fires (b = 1), less those on which the latent fires."""
    flat = sources.reshape(-1)
    low, high = firings.rows(np.maximum(flat, 0), split) if b else firings.token_rows(flat, split)
    sizes = np.where(flat >= 0, high - low, 0)
    count = np.minimum(sizes, CANDIDATES)
    owner = np.repeat(np.arange(len(flat)), count)
    turn = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    row, source = np.divmod(owner, max(1, sources.shape[1]))
    shift = _random(settings.seed, latents, split, 1)[:, 0][row] % np.maximum(sizes[owner], 1)
    at = low[owner] + (shift + turn * sizes[owner] // np.maximum(count[owner], 1)) % np.maximum(sizes[owner], 1)
    index = (firings.keys if b else firings.token_keys)[at] % max(1, firings.size)
    silent = ~firings.fires(latents[row], index)
    row, index, turn = row[silent], index[silent], (turn * sources.shape[1] + source)[silent]
    return latents[row], np.full(len(row), split), firings.windows[index], np.full(len(row), b), turn


def _within_quota(groups: I64, kinds: I64, hard: I64) -> NDArray[np.bool_]:
    """Return which candidates, in order of group, kind and turn, are kept: half of each kind, else what there is."""
    both = groups * 2 + kinds
    owners, inverse = np.unique(groups, return_inverse=True)
    number = np.bincount(inverse * 2 + kinds, minlength=2 * len(owners)).reshape(-1, 2)
    limit = hard[owners % len(SPLITS)]
    first = np.minimum(number[:, 0], np.maximum((limit + 1) // 2, limit - number[:, 1]))
    quota = np.stack([first, np.minimum(number[:, 1], limit - first)], axis=1)
    kept: NDArray[np.bool_] = rank_within(both) < quota.reshape(-1)[inverse * 2 + kinds]
    return kept


def _contains(ascending: I64, keys: I64) -> NDArray[np.bool_]:
    if not len(ascending):
        return np.zeros(len(keys), bool)
    places = np.minimum(np.searchsorted(ascending, keys), len(ascending) - 1)
    found: NDArray[np.bool_] = ascending[places] == keys
    return found
