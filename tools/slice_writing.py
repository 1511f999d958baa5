"""What a slice of an activation pass keeps of its events, and what a redone sample does.

1. `SliceWriter` keeps statistics, and writes the events that may still be among a latent's highest or in its uniform
   sample (`sampling`), and all those of the pool.
2. `LowestHashes` keeps exactly the K events of lowest hash, of a few latents.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from exegete.tools.firing_events import Events, Statistics, join
from exegete.tools.parts import EVENTS, POOL, ROW_GROUP, events_table, parquet_writer
from exegete.tools.pass_settings import PassSettings
from exegete.tools.sampling import I64, RunningBest, event_hash, may_be_sampled, rank_within
from exegete.tools.window_pool import Pool
from exegete.tools.windows import SPLITS


class SliceWriter:
    """Keeps a slice's statistics and writes the events that may still matter."""

    def __init__(self, folder: Path, latents: int, pool: Pool, settings: PassSettings) -> None:
        counts = settings.counts
        self.statistics = Statistics(latents)
        self._pool, self._seed = pool, settings.seed
        self._budget = settings.emission_factor * np.array(counts.firing, np.float64)
        self._best = RunningBest(latents * len(SPLITS), max(1, *counts.top))
        self._events: list[Events] = []
        self._pooled: list[Events] = []
        self._firings = 0
        # A few buffered firings per latent amortise the update of the running best, and bound the memory.
        self._capacity = min(max(8 * latents, 1 << 15), 1 << 20)
        self._event_file = parquet_writer(folder / "events.parquet", EVENTS)
        self._pool_file = parquet_writer(folder / "pool.parquet", POOL)

    def add(self, events: Events) -> None:
        """Take in one micro-batch."""
        self.statistics.add(events)
        if not len(events.latents):
            return
        groups = events.groups
        hashes = event_hash(self._seed, events.latents, events.windows)
        kept = may_be_sampled(hashes, self.statistics.windows[groups], self._budget[events.splits])
        kept |= events.peaks >= self._best.bound[groups]
        self._events.append(events if kept.all() else events.take(np.flatnonzero(kept)))
        pooled = np.flatnonzero(self._pool.holds(events.windows))
        if len(pooled):
            self._pooled.append(events.take(pooled))
        self._firings += len(self._events[-1].values) + sum(len(p.values) for p in self._pooled[-1:])
        if self._firings >= self._capacity:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered, and raise the bounds of the running best."""
        if self._events:
            events = join(self._events)
            self._best.update(events.groups, events.peaks)
            self._event_file.write_table(events_table(events), row_group_size=ROW_GROUP)
        if self._pooled:
            pooled = join(self._pooled)
            columns = [pooled.latents.astype(np.int32), pooled.windows, pooled.peaks]
            self._pool_file.write_table(pa.table(columns, schema=POOL), row_group_size=ROW_GROUP)
        self._events, self._pooled, self._firings = [], [], 0

    def close(self) -> None:
        """Finish the files."""
        self._event_file.close()
        self._pool_file.close()


class LowestHashes:
    """Keeps for some latents exactly the K events of lowest hash in each split."""

    def __init__(self, chosen: I64, latents: int, settings: PassSettings) -> None:
        self._chosen = np.zeros(latents, bool)
        self._chosen[chosen] = True
        self._seed = settings.seed
        self._sample = np.array(settings.counts.firing, np.int64)
        self._events: list[Events] = []
        self._held = 0
        self._capacity = 2 * len(chosen) * int(self._sample.sum()) + (1 << 15)

    def add(self, events: Events) -> None:
        """Take in one micro-batch."""
        self._events.append(events.take(np.flatnonzero(self._chosen[events.latents])))
        self._held += len(self._events[-1].latents)
        if self._held > self._capacity:
            self.reduce()

    def reduce(self) -> Events:
        """Drop what is not among the lowest so far, and return the rest."""
        events = join(self._events)
        hashes = event_hash(self._seed, events.latents, events.windows)
        order = np.lexsort((events.windows, hashes, events.groups))
        ranks = rank_within(events.groups[order])
        kept = events.take(order[ranks < self._sample[events.splits[order]]])
        self._events, self._held = [kept], len(kept.latents)
        return kept
