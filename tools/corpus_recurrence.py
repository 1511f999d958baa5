"""Which windows of a corpus count: those with text whose tokens recur in no other split (PROTOCOLS §1).

1. The hash of every window's tokens goes to one of several files, by its leading bits.
2. Each file, small enough to sort in memory, shows which hashes occur in more than one split.
3. All windows with such a hash are unusable, in every split: none can leak what another split is tested on.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exegete.tools.arrays import new_array
from exegete.tools.windows import WINDOW_TOKENS

_BATCH_CONTEXTS = 8_192
_WINDOWS_A_FILE = 500_000
_ENTRY = np.dtype([("hash", np.uint64), ("window", np.int64)])


def find_usable_windows(folder: Path, special_tokens: frozenset[int]) -> dict[str, int]:
    """Write `usable.npy` for the contexts in `folder`; return `recurring_windows` and `usable_windows`."""
    tokens: NDArray[Any] = np.load(folder / "tokens.npy", mmap_mode="r")
    lengths: NDArray[Any] = np.load(folder / "lengths.npy", mmap_mode="r")
    splits: NDArray[Any] = np.load(folder / "splits.npy", mmap_mode="r")
    contexts, windows = len(tokens), tokens.shape[1] // WINDOW_TOKENS
    usable: Any = new_array(folder / "usable.npy", np.bool_, (contexts, windows))
    parts = _HashFiles(folder / "hashes", max(1, -(-contexts * windows // _WINDOWS_A_FILE)))
    special = sorted(special_tokens)
    for start in range(0, contexts, _BATCH_CONTEXTS):
        block = slice(start, min(start + _BATCH_CONTEXTS, contexts))
        positions = np.arange(tokens.shape[1])
        real = positions < np.asarray(lengths[block])[:, None]
        text = real & ~np.isin(tokens[block], special)
        usable[block] = text.reshape(-1, windows, WINDOW_TOKENS).any(-1)
        # Padding hashes as no token does, so that a last window equals another only where the padding does.
        hashes = _hashes(np.where(real, tokens[block], -1).reshape(-1, WINDOW_TOKENS))
        numbers = np.arange(block.start * windows, block.stop * windows)
        kept = usable[block].reshape(-1)
        parts.add(hashes[kept], numbers[kept])
    recurring = 0
    flat = usable.reshape(-1)
    for entries in parts:
        repeated = _in_several_splits(entries, splits, windows)
        flat[repeated] = False
        recurring += len(repeated)
    usable.flush()
    shutil.rmtree(folder / "hashes")
    return {"recurring_windows": recurring, "usable_windows": int(np.count_nonzero(flat))}


class _HashFiles:
    """Windows by the leading bits of their hash, one file for each."""

    def __init__(self, folder: Path, parts: int) -> None:
        folder.mkdir()
        self._bits = (parts - 1).bit_length()
        self._paths = [folder / str(part) for part in range(2**self._bits)]

    def add(self, hashes: NDArray[np.uint64], windows: NDArray[np.int64]) -> None:
        part_of = (hashes >> np.uint64(63 - self._bits)) >> np.uint64(1)
        entries = np.empty(len(hashes), _ENTRY)
        entries["hash"], entries["window"] = hashes, windows
        for part in np.unique(part_of).tolist():
            with self._paths[part].open("ab") as file:
                file.write(entries[part_of == part].tobytes())

    def __iter__(self) -> Any:
        return (np.fromfile(path, _ENTRY) for path in self._paths if path.exists())


def _hashes(rows: NDArray[Any]) -> NDArray[np.uint64]:
    """Return a 64-bit polynomial hash of each row, finished as splitmix64 finishes; shape (row, token) → (row,)."""
    state = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        state = (state + (column.astype(np.int64) + 2).astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        state ^= state >> np.uint64(29)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return state ^ (state >> np.uint64(31))


def _in_several_splits(entries: NDArray[np.void], splits: NDArray[np.uint8], windows: int) -> NDArray[np.int64]:
    """Return the windows whose hash occurs in more than one split."""
    entries = entries[np.argsort(entries["hash"], kind="stable")]
    if not len(entries):
        return np.empty(0, np.int64)
    of_split = splits[entries["window"] // windows]
    first = np.flatnonzero(np.r_[True, entries["hash"][1:] != entries["hash"][:-1]])
    mixed = np.minimum.reduceat(of_split, first) != np.maximum.reduceat(of_split, first)
    repeated: NDArray[np.int64] = entries["window"][np.repeat(mixed, np.diff(np.r_[first, len(entries)]))]
    return repeated
