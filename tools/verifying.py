"""The second pass: hard negatives with tokens too rare for the pool, looked up in the corpus and verified.

1. A latent's top tokens are those at the peaks of its selected explain windows, most frequent first.
2. Where the pool holds too few windows with them, the corpus is searched for more: for each wanted token and split, the
   windows in the micro-batches of lowest seeded hash – the same order for all tokens, so that few micro-batches
   serve many.
3. The micro-batches that serve most candidates are run again, in the same shape and so to the same bits, within
   `verify_share` of the corpus. Candidates on which the latent does not fire are verified.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from exegete.tools.firing_events import EventStream
from exegete.tools.hard_negatives import Negatives, PoolFirings
from exegete.tools.parts import damaged, open_part, parquet_writer, write_whole
from exegete.tools.pass_settings import PassSettings
from exegete.tools.sampling import F32, I64, rank_within, run_starts
from exegete.tools.selecting import selected_path
from exegete.tools.window_pool import Pool, tokens_of, window_hash
from exegete.tools.windows import SPLITS, WINDOW_TOKENS

VERIFIED = pa.schema([("latent", pa.int32()), ("split", pa.uint8()), ("window", pa.int64())])
_PER_TOKEN = 32
"""Windows remembered per wanted token and split."""
_FEWEST_MICRO_BATCHES = 32
_CONTEXTS = 4_096


def verify_rare_tokens(
    stream: EventStream,
    folder: Path,
    pool: Pool,
    settings: PassSettings,
    watch: Callable[[int], Callable[[], None]],
) -> None:
    """Write `top_tokens.npy` and `verified.parquet` into the pass's folder, unless they are there.

    `watch(n)` is called with the number of micro-batches to come, and what it returns after each.
    """
    latents = stream.dictionary.latents
    tops = folder / "top_tokens.npy"
    if not tops.exists():
        found = _find_top_tokens(stream, folder, settings)
        write_whole(tops, lambda path: _save(path, found))
    if (folder / "verified.parquet").exists():
        return
    top_tokens: I64 = np.load(tops, allow_pickle=False)
    firings = PoolFirings(folder, pool, tokens_of(stream.corpus, pool.windows), latents)
    candidates = _lookup(stream, top_tokens, _short(firings, top_tokens, settings), pool, settings)
    verified = _verify(stream, _affordable(stream, candidates, settings), watch)

    def write(path: Path) -> None:
        with parquet_writer(path, VERIFIED) as writer:
            columns = [verified.latents.astype(np.int32), verified.splits.astype(np.uint8), verified.windows]
            writer.write_table(pa.table(columns, schema=VERIFIED))

    write_whole(folder / "verified.parquet", write)


def load_verified(folder: Path) -> Negatives:
    """Return what `verify_rare_tokens` verified, sorted by latent."""
    try:
        table = pq.read_table(folder / "verified.parquet", page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise damaged(folder / "verified.parquet", error) from error
    latents, splits, windows = (column.to_numpy().astype(np.int64) for column in table.columns)
    return Negatives(latents, splits, windows)


def _save(path: Path, array: I64) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _find_top_tokens(stream: EventStream, folder: Path, settings: PassSettings) -> I64:
    """Return the top tokens of each latent, shape (latent, token), −1 where there are fewer."""
    tops = np.full((stream.dictionary.latents, settings.top_tokens), -1, np.int64)
    source = open_part(selected_path(folder))
    pairs: list[I64] = []
    columns = ["latent", "split", "window", "positions", "values"]
    for batch in source.iter_batches(batch_size=1 << 18, columns=columns):
        batch = batch.filter(pa.compute.equal(batch.column("split"), 0))
        windows, inverse = np.unique(batch.column("window").to_numpy(), return_inverse=True)
        tokens = tokens_of(stream.corpus, windows)[inverse, _peak_positions(batch)]
        pairs.append(batch.column("latent").to_numpy().astype(np.int64) << 32 | tokens)
    keys, counts = np.unique(np.concatenate(pairs or [np.zeros(0, np.int64)]), return_counts=True)
    latents, tokens = keys >> 32, keys & 0xFFFFFFFF
    order = np.lexsort((tokens, -counts, latents))
    ranks = rank_within(latents[order])
    kept = order[ranks < settings.top_tokens]
    tops[latents[kept], ranks[ranks < settings.top_tokens]] = tokens[kept]
    return tops


def _peak_positions(batch: pa.RecordBatch) -> I64:
    """Return the first position of the peak of each event."""
    values: F32 = batch.column("values").flatten().to_numpy()
    positions = batch.column("positions").flatten().to_numpy().astype(np.int64)
    lengths = batch.column("values").value_lengths().to_numpy().astype(np.int64)
    if not len(lengths):
        return np.zeros(0, np.int64)
    starts = np.cumsum(lengths) - lengths
    at_peak = np.flatnonzero(values == np.repeat(np.maximum.reduceat(values, starts), lengths))
    owners = np.repeat(np.arange(len(lengths)), lengths)[at_peak]
    first: I64 = positions[at_peak[run_starts(owners)]]
    return first


def _short(firings: PoolFirings, top_tokens: I64, settings: PassSettings) -> NDArray[np.bool_]:
    """Return for which (latent, split) the pool may hold too few windows with top tokens, shape (latent, split)."""
    short = np.zeros((len(top_tokens), len(SPLITS)), bool)
    latents = np.arange(len(top_tokens))
    for split in range(len(SPLITS)):
        low, high = firings.token_rows(top_tokens.reshape(-1), split)
        holding = (high - low).reshape(top_tokens.shape).max(axis=1, initial=0)
        begin, end = firings.rows(latents, split)
        short[:, split] = holding - (end - begin) < (settings.counts.hard[split] + 1) // 2
    return short & (top_tokens >= 0).any(axis=1, keepdims=True)


def _lookup(
    stream: EventStream, top_tokens: I64, short: NDArray[np.bool_], pool: Pool, settings: PassSettings
) -> Negatives:
    """Return candidates outside the pool for the latents that are short of windows."""
    keys, windows = _occurrences(stream, np.unique(top_tokens[short.any(axis=1)]), pool, settings)
    owners, splits = np.nonzero(short)
    token = top_tokens[owners]
    wanted = np.where(token >= 0, token * len(SPLITS) + splits[:, None], -1)
    low, high = np.searchsorted(keys, wanted), np.searchsorted(keys, wanted, side="right")
    count = (high - low).reshape(-1)
    row = np.repeat(np.arange(wanted.size), count)
    at = np.repeat(low.reshape(-1), count) + np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    row //= max(1, top_tokens.shape[1])
    return Negatives(owners[row], splits[row], windows[at])


def _occurrences(stream: EventStream, tokens: I64, pool: Pool, settings: PassSettings) -> tuple[I64, I64]:
    """Return (token * 3 + split, window) of remembered windows outside the pool, sorted by the first."""
    corpus, per_context = stream.corpus, stream.windows_per_context
    keys, windows = np.zeros(0, np.int64), np.zeros(0, np.int64)
    wanted = np.zeros(int(tokens.max(initial=0)) + 1, bool)
    wanted[tokens[tokens >= 0]] = True
    for start in range(0, corpus.contexts, _CONTEXTS):
        stop = min(start + _CONTEXTS, corpus.contexts)
        text = corpus.tokens(start, stop)
        hit = wanted[np.minimum(text, len(wanted) - 1)] & (text < len(wanted))
        hit &= np.repeat(corpus.usable(start, stop), WINDOW_TOKENS, axis=1) & corpus.mask(start, stop)
        context, position = np.nonzero(hit)
        found = (start + context) * per_context + position // WINDOW_TOKENS
        key = text[context, position].astype(np.int64) * len(SPLITS) + corpus.split_of(start + context)
        outside = ~pool.holds(found)
        both = np.unique(np.stack([np.append(keys, key[outside]), np.append(windows, found[outside])]), axis=1)
        keys, windows = both
        hashes = window_hash(settings.seed, windows // (per_context * stream.micro_batch))
        order = np.lexsort((windows, hashes, keys))
        order = np.sort(order[rank_within(keys[order]) < _PER_TOKEN])
        keys, windows = keys[order], windows[order]
    return keys, windows


def _affordable(stream: EventStream, candidates: Negatives, settings: PassSettings) -> Negatives:
    """Return the candidates in the micro-batches that serve most, within the budget; sorted by micro-batch."""
    owner = candidates.windows // (stream.windows_per_context * stream.micro_batch)
    batches, counts = np.unique(owner, return_counts=True)
    budget = max(_FEWEST_MICRO_BATCHES, int(stream.micro_batches * settings.verify_share))
    chosen = batches[np.lexsort((batches, -counts))[:budget]]
    kept = np.flatnonzero(np.isin(owner, chosen))
    kept = kept[np.lexsort((candidates.windows[kept], candidates.latents[kept], owner[kept]))]
    return Negatives(candidates.latents[kept], candidates.splits[kept], candidates.windows[kept])


def _verify(stream: EventStream, candidates: Negatives, watch: Callable[[int], Callable[[], None]]) -> Negatives:
    owner = candidates.windows // (stream.windows_per_context * stream.micro_batch)
    starts = run_starts(owner)
    step = watch(len(starts))
    silent = np.zeros(len(owner), bool)
    for low, high in zip(starts, np.append(starts, len(owner))[1:], strict=True):
        micro_batch = int(owner[low])
        (events,) = stream.over(micro_batch, micro_batch + 1, 1)
        fired = events.latents * (1 << 40) + events.windows
        silent[low:high] = ~np.isin(candidates.latents[low:high] * (1 << 40) + candidates.windows[low:high], fired)
        step()
    kept = np.flatnonzero(silent)
    order = kept[np.lexsort((candidates.windows[kept], candidates.splits[kept], candidates.latents[kept]))]
    return Negatives(candidates.latents[order], candidates.splits[order], candidates.windows[order])
