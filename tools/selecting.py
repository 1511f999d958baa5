"""Merge the events of all slices: the exact top and the exact uniform sample of each latent and split.

1. Latents are taken in blocks; of each file only the row groups that touch the block are read.
2. By hash, the first K of each latent and split are its sample; by peak (ties by hash, then window), the first T its
   top.
3. The certificate (`sampling`) is computed; latents that fail it are written down for `activations` to redo, and
   selected again with the redone events.
4. The sample is cut into strata of equal size by peak. Ranks take one window of each stratum in turn, so that any
   prefix is spread over the strata; windows that are only among the top follow, highest first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from exegete.tools.parts import (
    damaged,
    load_statistics,
    open_part,
    parquet_writer,
    read_manifest,
    slice_folders,
    write_whole,
)
from exegete.tools.pass_settings import PassSettings
from exegete.tools.sampling import F32, I64, U64, certified, event_hash, may_be_sampled, rank_within, run_starts
from exegete.tools.windows import SPLITS

SELECTED = pa.schema(
    [
        ("latent", pa.int32()),
        ("split", pa.uint8()),
        ("rank", pa.int32()),
        ("window", pa.int64()),
        ("top", pa.bool_()),
        ("stratum", pa.int16()),
        ("peak", pa.float32()),
        ("positions", pa.list_(pa.int16())),
        ("values", pa.list_(pa.float32())),
    ]
)
EVENTS_AT_ONCE = 2_000_000


def slices_of(folder: Path) -> list[Path]:
    """Return the slices of a pass, as its manifest names them."""
    return slice_folders(folder, int(read_manifest(folder)["slices"]))


def selected_path(folder: Path) -> Path:
    """Return where the selection is: another file once latents were redone."""
    return folder / ("selected-redone.parquet" if (folder / "redone").exists() else "selected.parquet")


def uncertified(folder: Path) -> I64:
    """Return the latents whose sample is not provably exact from the slices alone."""
    latents: I64 = np.load(folder / "uncertified.npy", allow_pickle=False)
    return latents


def select_firing(folder: Path, latents: int, settings: PassSettings) -> None:
    """Write the selection of firing windows (SELECTED, sorted by latent, split, rank), unless it is there."""
    target = selected_path(folder)
    if target.exists():
        return
    largest = _largest_slice(folder, latents)
    failed: list[I64] = []

    def write(temporary: Path) -> None:
        with parquet_writer(temporary, SELECTED) as writer:
            for table in _blocks(folder, latents):
                chosen, bad = _select(table, largest, settings)
                failed.append(bad)
                writer.write_table(chosen, row_group_size=65_536)
        if target.name == "selected.parquet":
            write_whole(folder / "uncertified.npy", lambda path: _save(path, np.concatenate(failed)))

    write_whole(target, write)


def _save(path: Path, array: I64) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _largest_slice(folder: Path, latents: int) -> tuple[I64, I64]:
    """Return the firing windows of each latent and split, in the slice with most of them and in all."""
    largest, total = np.zeros((2, latents * len(SPLITS)), np.int64)
    for part in slices_of(folder):
        windows = load_statistics(part, latents).windows
        np.maximum(largest, windows, out=largest)
        total += windows
    return largest, total


def _blocks(folder: Path, latents: int) -> Iterator[pa.Table]:
    """Yield all events, a block of latents at a time."""
    paths = [part / "events.parquet" for part in slices_of(folder)]
    if (folder / "redone").exists():
        paths.append(folder / "redone" / "events.parquet")
    files = [open_part(path) for path in paths]
    events = sum(file.metadata.num_rows for file in files)
    size = max(1, min(latents, latents * EVENTS_AT_ONCE // max(events, 1)))
    for first in range(0, latents, size):
        tables = []
        for path, file in zip(paths, files, strict=True):
            try:
                tables.append(read_latents(file, first, first + size))
            except (pa.ArrowException, OSError) as error:
                raise damaged(path, error) from error
        yield pa.concat_tables(tables)


def read_latents(file: pq.ParquetFile, low: int, high: int) -> pa.Table:
    """Return the rows of latents `low` … `high`, decoding only the row groups that touch them."""
    tables = [_between(file, group, low, high) for group in range(file.num_row_groups)]
    return pa.concat_tables([t for t in tables if t is not None] or [file.schema_arrow.empty_table()])


def _between(file: pq.ParquetFile, group: int, low: int, high: int) -> pa.Table | None:
    statistics = file.metadata.row_group(group).column(0).statistics
    if statistics is None or statistics.max < low or statistics.min >= high:
        return None
    table = file.read_row_group(group)
    if statistics.min >= low and statistics.max < high:
        return table
    latent = table.column("latent")
    return table.filter(pc.and_(pc.greater_equal(latent, low), pc.less(latent, high)))


def _select(table: pa.Table, largest: tuple[I64, I64], settings: PassSettings) -> tuple[pa.Table, I64]:
    """Return the selected rows of one block of latents, and the latents whose sample is uncertified."""
    latents, splits, windows, peaks = _columns(table)
    groups = latents * len(SPLITS) + splits
    hashes = event_hash(settings.seed, latents, windows)
    counts = settings.counts
    order = np.lexsort((windows, hashes, groups))
    # A redone latent has an event both from its slice and from the redoing.
    distinct = np.ones(len(order), bool)
    distinct[1:] = (windows[order][1:] != windows[order][:-1]) | (groups[order][1:] != groups[order][:-1])
    order = order[distinct]
    sampled = order[rank_within(groups[order]) < np.array(counts.firing)[splits[order]]]
    failed = _failed(groups[order], hashes[order], largest, settings)
    order = order[np.lexsort((windows[order], hashes[order], -peaks[order], groups[order]))]
    top = order[rank_within(groups[order]) < np.array(counts.top)[splits[order]]]
    strata = np.full(len(groups), -1, np.int16)
    turn = np.zeros(len(groups), np.int64)
    strata[sampled], turn[sampled] = _strata(groups[sampled], peaks[sampled], hashes[sampled], counts.strata)
    is_top = np.zeros(len(groups), bool)
    is_top[top] = True
    kept = np.flatnonzero(is_top | (strata >= 0))
    extra = strata[kept] < 0
    within = np.where(extra, -peaks[kept], strata[kept].astype(np.float32))
    kept = kept[np.lexsort((hashes[kept], within, turn[kept], extra, groups[kept]))]
    rows = table.take(pa.array(kept))
    chosen = {
        "rank": pa.array(rank_within(groups[kept]).astype(np.int32)),
        "top": pa.array(is_top[kept]),
        "stratum": pa.array(strata[kept], mask=strata[kept] < 0),
    }
    made = pa.table([chosen[f.name] if f.name in chosen else rows.column(f.name) for f in SELECTED], schema=SELECTED)
    return made, failed


def _columns(table: pa.Table) -> tuple[I64, I64, I64, F32]:
    latents, splits, windows, peaks = (table.column(name).to_numpy() for name in ("latent", "split", "window", "peak"))
    return latents.astype(np.int64), splits.astype(np.int64), windows, peaks


def _failed(groups: I64, hashes: U64, largest: tuple[I64, I64], settings: PassSettings) -> I64:
    """Return the latents of `groups` (sorted) whose sample fails the certificate."""
    starts = run_starts(groups)
    owners = groups[starts]
    sample = np.array(settings.counts.firing, np.int64)
    budget = settings.emission_factor * sample.astype(np.float64)
    most, total = largest
    below = may_be_sampled(hashes, most[groups], budget[groups % len(SPLITS)])
    count = np.add.reduceat(below.astype(np.int64), starts) if len(starts) else starts
    held = certified(count, total[owners], sample[owners % len(SPLITS)])
    return np.unique(owners[~held] // len(SPLITS))


def _strata(groups: I64, peaks: F32, hashes: U64, strata: int) -> tuple[I64, I64]:
    """Return each sampled event's stratum, and its turn: its rank by hash within the stratum."""
    order = np.lexsort((hashes, peaks, groups))
    starts = run_starts(groups[order])
    sizes = np.diff(starts, append=len(order))
    stratum = np.zeros(len(order), np.int64)
    stratum[order] = rank_within(groups[order]) * strata // np.repeat(sizes, sizes)
    order = np.lexsort((hashes, stratum, groups))
    turn = np.zeros(len(order), np.int64)
    turn[order] = rank_within((groups * strata + stratum)[order])
    return stratum, turn
