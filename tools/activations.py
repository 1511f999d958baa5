"""The activation pass: one stream over the corpus, in slices that any worker may do in any order.

1. The pool is drawn (`window_pool`): windows that keep all their firings.
2. Each slice of the corpus streams through subject and dictionary in micro-batches of one shape (`firing_events`),
   sparsely encoded (`sparse_code`). Per latent it keeps statistics; of the events it writes those of the pool, and
   those that may still be among a latent's highest or in its uniform sample (`sampling`). Nothing in memory grows
   with the corpus.
3. When all slices are complete, the exact top and the exact sample are chosen (`selecting`), and the certificate of
   each sample is computed. Latents that fail it are redone: a pass that keeps exactly the K lowest hashes of just
   these.
4. Hard negatives that the pool cannot give are looked up in the corpus and verified by a short pass over few
   micro-batches (`verifying`).

Each slice and each later stage is renamed into place when complete, so that after a crash at any moment the same
call goes on. `merging.merge` turns the finished folder into evidence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from exegete.tools.errors import UserError
from exegete.tools.firing_events import Events, EventStream, Statistics, join
from exegete.tools.parts import (
    EVENTS,
    POOL,
    ROW_GROUP,
    check_manifest,
    events_table,
    is_complete,
    parquet_writer,
    save_statistics,
    slice_folders,
    whole_folder,
)
from exegete.tools.pass_settings import PassSettings
from exegete.tools.sampling import I64, RunningBest, event_hash, may_be_sampled
from exegete.tools.selecting import select_firing, uncertified
from exegete.tools.verifying import verify_rare_tokens
from exegete.tools.window_pool import Pool, draw_pool
from exegete.tools.windows import SPLITS

if TYPE_CHECKING:
    from exegete.tools.corpus import Corpus
    from exegete.tools.dictionaries import Dictionary
    from exegete.tools.subject import Subject

Progress = Callable[[str, int, int], None]
"""Called with the stage, the micro-batches done and their number."""

SLICE_TOKENS = 1 << 20
_LOG = logging.getLogger(__name__)


class Stopped(Exception):
    """`stop` asked for the pass to end; what was complete stays."""


@dataclass
class _Watch:
    """Counts micro-batches of one stage for `progress`, and ends it when `stop` says so."""

    stage: str
    total: int
    progress: Progress | None
    stop: Callable[[], bool] | None
    done: int = 0

    def __call__(self, micro_batches: int = 1) -> None:
        self.done += micro_batches
        if self.progress is not None:
            self.progress(self.stage, self.done, self.total)
        if self.stop is not None and self.stop():
            raise Stopped


def run_pass(
    subject: Subject,
    dictionary: Dictionary,
    corpus: Corpus,
    folder: Path,
    settings: PassSettings,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> bool:
    """Do what is still missing of the pass in `folder`, and return whether it is finished (False: `stop` ended it).

    Raises:
        UserError: the dictionary does not fit the subject, the corpus has no usable window, `folder` holds another pass
            or a damaged part, or the disk is full.
    """
    _check(subject, dictionary, corpus)
    micro, batch = settings.shape(subject.device)
    check_manifest(folder, _manifest(subject, dictionary, corpus, settings, micro))
    stream = EventStream(subject, dictionary, corpus, micro)
    pool = draw_pool(corpus, settings)
    if not len(pool.windows):
        raise UserError("the corpus has no usable window: every window is empty or recurs in another split")
    try:
        watch = _Watch("activations", stream.micro_batches, progress, stop)
        for part, start, stop_at in _slices(folder, stream, settings):
            if is_complete(part):
                watch(stop_at - start)
            else:
                run_slice(stream, part, start, stop_at, batch // micro, pool, settings, watch)
        select_firing(folder, dictionary.latents, settings)
        _redo(stream, folder, batch // micro, settings, progress, stop)
        verify_rare_tokens(stream, folder, pool, settings, lambda total: _Watch("verification", total, progress, stop))
    except Stopped:
        return False
    return True


def _check(subject: Subject, dictionary: Dictionary, corpus: Corpus) -> None:
    width = subject.width(dictionary.hook_point)
    if width != dictionary.width:
        raise UserError(
            f"dictionary {dictionary.name!r} takes vectors of {dictionary.width}, but {subject.name!r} gives {width} "
            f"at {dictionary.hook_point!r}; check which subject and hook point it was trained on"
        )
    if not corpus.contexts:
        raise UserError("the corpus is empty; give one with text")


def _manifest(
    subject: Subject, dictionary: Dictionary, corpus: Corpus, settings: PassSettings, micro: int
) -> dict[str, Any]:
    identity = settings.identity() | {"micro_batch": micro}
    return {
        "dictionary": dictionary.fingerprint,
        "subject": subject.fingerprint,
        "corpus": corpus.fingerprint,
        "hook_point": dictionary.hook_point,
        "latents": dictionary.latents,
        "settings": identity,
        "slices": slice_count(corpus, settings, micro),
        "device": subject.device,
        "dtype": [subject.dtype, dictionary.dtype],
    }


def slice_count(corpus: Corpus, settings: PassSettings, micro: int) -> int:
    """Return the number of slices: as asked for or by size, but none empty."""
    wanted = settings.slices or -(-corpus.contexts * corpus.context_tokens // SLICE_TOKENS)
    return max(1, min(wanted, -(-corpus.contexts // micro)))


def _slices(folder: Path, stream: EventStream, settings: PassSettings) -> list[tuple[Path, int, int]]:
    """Return (folder, first micro-batch, end) of each slice."""
    count = slice_count(stream.corpus, settings, stream.micro_batch)
    bounds = [stream.micro_batches * i // count for i in range(count + 1)]
    return list(zip(slice_folders(folder, count), bounds[:-1], bounds[1:], strict=True))


def run_slice(
    stream: EventStream,
    part: Path,
    start: int,
    stop: int,
    batch: int,
    pool: Pool,
    settings: PassSettings,
    watch: Callable[[], None] = lambda: None,
) -> None:
    """Stream the micro-batches `start` … `stop` into the folder `part`, which is there afterwards whole or not at all.

    `batch` micro-batches are read at a time; `watch` is called after each one.
    """
    with whole_folder(part) as temporary:
        writer = _SliceWriter(temporary, stream.dictionary.latents, pool, settings)
        try:
            for events in stream.over(start, stop, batch):
                writer.add(events)
                watch()
            writer.flush()
        finally:
            writer.close()
        save_statistics(temporary / "statistics.npz", writer.statistics)


class _SliceWriter:
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


def _redo(
    stream: EventStream,
    folder: Path,
    batch: int,
    settings: PassSettings,
    progress: Progress | None,
    stop: Callable[[], bool] | None,
) -> None:
    """Draw the samples of uncertified latents again, exactly."""
    latents = uncertified(folder)
    part = folder / "redone"
    if not len(latents) or is_complete(part):
        return
    _LOG.info("the uniform sample of %d latents is not certified; drawing it again", len(latents))
    watch = _Watch("resampling", stream.micro_batches, progress, stop)
    lowest = _LowestHashes(latents, stream.dictionary.latents, settings)
    for events in stream.over(0, stream.micro_batches, batch):
        lowest.add(events)
        watch()
    with whole_folder(part) as temporary, parquet_writer(temporary / "events.parquet", EVENTS) as writer:
        writer.write_table(events_table(lowest.reduce()), row_group_size=ROW_GROUP)
    select_firing(folder, stream.dictionary.latents, settings)


class _LowestHashes:
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
        from exegete.tools.sampling import rank_within

        events = join(self._events)
        hashes = event_hash(self._seed, events.latents, events.windows)
        order = np.lexsort((events.windows, hashes, events.groups))
        ranks = rank_within(events.groups[order])
        kept = events.take(order[ranks < self._sample[events.splits[order]]])
        self._events, self._held = [kept], len(kept.latents)
        return kept
