"""From micro-batches of contexts to events: what each latent did on each window, and its running statistics.

Every forward pass has the same shape, (micro_batch, context_tokens); the last is padded with contexts in which nothing
counts. A micro-batch therefore gives the same bits whoever computes it, in whatever order.

Sums of activations are exact and independent of order: each micro-batch's partial sum (in a fixed order, float64) is
split into a whole part and a fraction in units of 2^-40, and both are added as integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exegete.tools.sampling import F32, I64, run_starts
from exegete.tools.sparse_code import Firings, SparseEncoder
from exegete.tools.windows import SPLITS, WINDOW_TOKENS

if TYPE_CHECKING:
    from exegete.tools.corpus import Corpus
    from exegete.tools.dictionaries import Dictionary
    from exegete.tools.subject import Subject

HISTOGRAM_BINS = 32
HISTOGRAM_LOWEST = -16
"""Bin b counts firings in [2^(b − 16), 2^(b − 15)); the first and the last also take what lies beyond."""
_FRACTION = 2.0**40


@dataclass(frozen=True)
class Events:
    """The firings of one micro-batch by (latent, window), sorted so. Shape (event,), or (firing,) where said."""

    latents: I64
    windows: I64
    splits: I64
    peaks: F32
    starts: I64
    """Where the event's firings begin."""
    lengths: I64
    positions: NDArray[np.int16]
    """Position within the window, shape (firing,)."""
    values: F32
    """Shape (firing,)."""
    counted: int
    """Tokens on which a latent could have fired."""

    @property
    def groups(self) -> I64:
        """Latent and split in one number: latent * 3 + split."""
        return self.latents * len(SPLITS) + self.splits

    def take(self, kept: NDArray[np.integer]) -> Events:
        """Return the events at `kept`, in that order."""
        lengths = self.lengths[kept]
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        flat = np.arange(total) + np.repeat(self.starts[kept] - ends + lengths, lengths)
        return Events(
            self.latents[kept],
            self.windows[kept],
            self.splits[kept],
            self.peaks[kept],
            ends - lengths,
            lengths,
            self.positions[flat],
            self.values[flat],
            self.counted,
        )


def join(parts: list[Events]) -> Events:
    """Return the events of all parts (at least one), one after another."""
    firings = np.cumsum([0] + [len(part.values) for part in parts[:-1]])
    return Events(
        np.concatenate([part.latents for part in parts]),
        np.concatenate([part.windows for part in parts]),
        np.concatenate([part.splits for part in parts]),
        np.concatenate([part.peaks for part in parts]),
        np.concatenate([part.starts + at for part, at in zip(parts, firings, strict=True)]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.positions for part in parts]),
        np.concatenate([part.values for part in parts]),
        sum(part.counted for part in parts),
    )


class EventStream:
    """Runs the subject and the dictionary over contexts of a corpus, one micro-batch at a time."""

    def __init__(self, subject: Subject, dictionary: Dictionary, corpus: Corpus, micro_batch: int) -> None:
        self.subject, self.dictionary, self.corpus = subject, dictionary, corpus
        self.micro_batch = micro_batch
        self.windows_per_context = corpus.context_tokens // WINDOW_TOKENS
        self._encode = SparseEncoder(dictionary, micro_batch * corpus.context_tokens)

    @property
    def micro_batches(self) -> int:
        """Micro-batches in the whole corpus."""
        return -(-self.corpus.contexts // self.micro_batch)

    def over(self, start: int, stop: int, batch: int) -> Iterator[Events]:
        """Yield the events of each micro-batch from `start` to `stop`, reading `batch` micro-batches at a time."""
        for first in range(start, stop, batch):
            last = min(first + batch, stop)
            contexts = min(last * self.micro_batch, self.corpus.contexts)
            at = first * self.micro_batch
            tokens, mask = self.corpus.tokens(at, contexts), self._counts(at, contexts)
            splits = self.corpus.split_of(np.arange(at, contexts))
            for low in range(0, contexts - at, self.micro_batch):
                high = low + self.micro_batch
                yield self._events(at + low, tokens[low:high], mask[low:high], splits[low:high])

    def _counts(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Where a firing counts: not special, not padding, in a usable window; shape (context, position)."""
        counts: NDArray[np.bool_] = self.corpus.mask(start, stop) & np.repeat(
            self.corpus.usable(start, stop), WINDOW_TOKENS, axis=1
        )
        return counts

    def _events(
        self, context: int, tokens: NDArray[np.int32], mask: NDArray[np.bool_], splits: NDArray[np.uint8]
    ) -> Events:
        import torch

        missing = self.micro_batch - len(tokens)
        if missing:
            tokens = np.concatenate([tokens, np.repeat(tokens[-1:], missing, axis=0)])
            mask = np.concatenate([mask, np.zeros((missing, mask.shape[1]), bool)])
        batch = torch.from_numpy(tokens.astype(np.int64)).to(self.subject.device)
        x = self.subject.residual(batch, self.dictionary.hook_point)
        firings = self._encode(x, mask.reshape(-1))
        return _group(firings, context * self.windows_per_context, self.windows_per_context, splits, int(mask.sum()))


def _group(firings: Firings, first: int, per_context: int, splits: NDArray[np.uint8], counted: int) -> Events:
    local = firings.rows // WINDOW_TOKENS
    # A window is one of few in the micro-batch, so latent and window pack into one number.
    starts = run_starts(firings.latents * (1 << 32) + local)
    empty = not len(starts)
    return Events(
        firings.latents[starts],
        first + local[starts],
        splits[local[starts] // per_context].astype(np.int64),
        firings.values if empty else np.maximum.reduceat(firings.values, starts),
        starts,
        np.diff(starts, append=len(firings.values)) if not empty else starts,
        (firings.rows % WINDOW_TOKENS).astype(np.int16),
        firings.values,
        counted,
    )


class Statistics:
    """What each latent did over all tokens seen: exact, and mergeable in any order. 400 bytes a latent."""

    def __init__(self, latents: int) -> None:
        self.tokens = 0
        self.firings = np.zeros(latents, np.int64)
        self.windows = np.zeros(latents * len(SPLITS), np.int64)
        """Firing windows by latent * 3 + split."""
        self.whole = np.zeros((2, latents), np.int64)
        self.fraction = np.zeros((2, latents), np.int64)
        """Whole part and 2^-40ths of the sums of activations and of their squares."""
        self.peak = np.zeros(latents, np.float32)
        self.histogram = np.zeros(latents * HISTOGRAM_BINS, np.int64)

    def add(self, events: Events) -> None:
        """Take in one micro-batch."""
        self.tokens += events.counted
        if not len(events.latents):
            return
        np.add.at(self.windows, events.groups, 1)
        by_latent = run_starts(events.latents)
        latents = events.latents[by_latent]
        starts = events.starts[by_latent]
        counts = np.diff(starts, append=len(events.values))
        self.firings[latents] += counts
        self.peak[latents] = np.maximum(self.peak[latents], np.maximum.reduceat(events.peaks, by_latent))
        values = events.values.astype(np.float64)
        for row, addend in enumerate((values, values * values)):
            sums = np.add.reduceat(addend, starts)
            whole = np.floor(sums)
            self.whole[row, latents] += whole.astype(np.int64)
            self.fraction[row, latents] += np.rint((sums - whole) * _FRACTION).astype(np.int64)
        exponents = (events.values.view(np.int32) >> 23) - 127 - HISTOGRAM_LOWEST
        bins = np.repeat(latents, counts) * HISTOGRAM_BINS + np.clip(exponents, 0, HISTOGRAM_BINS - 1)
        np.add.at(self.histogram, bins, 1)

    def merge(self, other: Statistics) -> None:
        """Add what `other` saw of other tokens."""
        self.tokens += other.tokens
        for name in ("firings", "windows", "whole", "fraction", "histogram"):
            getattr(self, name)[...] += getattr(other, name)
        np.maximum(self.peak, other.peak, out=self.peak)

    def sums(self) -> NDArray[np.float64]:
        """Return the sum of the activations and of their squares, shape (2, latent)."""
        total: NDArray[np.float64] = self.whole + self.fraction / _FRACTION
        return total
