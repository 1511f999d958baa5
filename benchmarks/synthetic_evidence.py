"""Evidence of as many synthetic latents as wanted, made in blocks: what the benchmarks of a whole night label.

Each latent fires on one word, in windows of a shared pool; which windows it gets, with which activations, and on which ones it
stays silent derives from the seed and its number, so no two latents are asked the same questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from exegete.tools.evidence import Evidence
from exegete.tools.evidence_writing import write_evidence
from exegete.tools.seeds import digest, generator

WORDS, TARGETS, WINDOWS_A_TARGET, LENGTH = 8_000, 4_000, 100, 32
SILENT = 16_384
BLOCK = 2_000
COUNTS = {("explain", "firing"): 40, ("refine", "firing"): 10, ("refine", "random"): 10}
_FIRST = {"explain": 0, "refine": 40, "test": 60}
"""Windows of a target: 40 to explain, 20 to refine, 40 to test."""
_POOL = {"explain": 40, "refine": 20, "test": 40}


def synthetic_evidence(folder: Path, latents: int, seed: int = 0, test_windows: int = 20) -> Evidence:
    """Write evidence of so many live latents into `folder`, with `test_windows` of each truth in the test split."""
    counts = {**COUNTS, ("test", "firing"): test_windows, ("test", "random"): test_windows}
    tokens = _windows(seed)
    words = [f" {syllables(number)}" for number in range(WORDS)]
    write_evidence(
        folder,
        vocabulary=pa.table({"token": pa.array(range(WORDS), pa.int32()), "piece": words}),
        windows=_window_rows(tokens),
        items=_items(latents, counts, tokens, seed),
        latents=_latents(latents, seed),
        provenance={"dictionary": digest("synthetic", str(latents), str(seed)), "source": "pass", "seed": seed},
    )
    return Evidence.open(folder)


def syllables(number: int) -> str:
    """Return a word for a number, no two the same: 4711 is "muraba"."""
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    found = ""
    for _ in range(3):
        number, vowel = divmod(number, len(vowels))
        number, consonant = divmod(number, len(consonants))
        found += consonants[consonant] + vowels[vowel]
    return found


def _windows(seed: int) -> NDArray[np.int32]:
    """Return the pool, shape (window, token): those of targets, each with its word at one place, then silent ones."""
    rng = generator(seed, "synthetic windows")
    count = TARGETS * WINDOWS_A_TARGET + SILENT
    tokens = (TARGETS + (WORDS - TARGETS) * rng.random((count, LENGTH)) ** 2).astype(np.int32)
    firing = np.arange(TARGETS * WINDOWS_A_TARGET)
    tokens[firing, _place(firing)] = firing // WINDOWS_A_TARGET
    return tokens


def _place(window: NDArray[np.int64]) -> NDArray[np.int64]:
    return (window * 2_654_435_761 >> 7) % LENGTH


def _window_rows(tokens: NDArray[np.int32]) -> Iterator[pa.Table]:
    for at in range(0, len(tokens), 50_000):
        part = tokens[at : at + 50_000]
        offsets = pa.array(np.arange(len(part) + 1) * LENGTH, pa.int32())
        yield pa.table(
            {
                "window": pa.array(np.arange(at, at + len(part)), pa.int64()),
                "document": pa.array([f"document {(at + i) // 8}" for i in range(len(part))]),
                "tokens": pa.ListArray.from_arrays(offsets, pa.array(part.ravel(), pa.int32())),
            }
        )


def _items(
    latents: int, counts: dict[tuple[str, str], int], tokens: NDArray[np.int32], seed: int
) -> Iterator[pa.Table]:
    for start in range(0, latents, BLOCK):
        stop = min(start + BLOCK, latents)
        columns = [
            _kind(np.arange(start, stop), split, kind, count, seed) for (split, kind), count in sorted(counts.items())
        ]
        table = pa.concat_tables(columns)
        # By latent, each split and kind in the order of its columns.
        order = np.argsort(table.column("latent").to_numpy(), kind="stable")
        yield table.take(pa.array(order))


def _kind(latents: NDArray[np.int64], split: str, kind: str, count: int, seed: int) -> pa.Table:
    """Return the windows of one split and kind of a block of latents."""
    rng = generator(seed, "synthetic items", split, kind, int(latents[0]))
    n, fires = len(latents), kind == "firing"
    drawn = rng.random((n, _POOL[split] if fires else 2 * count)).argsort(axis=1)[:, :count]
    if fires:
        windows = (latents % TARGETS * WINDOWS_A_TARGET)[:, None] + _FIRST[split] + drawn
    else:
        windows = TARGETS * WINDOWS_A_TARGET + (latents[:, None] * 2_654_435_761 % (1 << 31) + drawn * 61) % SILENT
    flat = windows.ravel()
    offsets = pa.array(np.arange(len(flat) + 1) if fires else np.zeros(len(flat) + 1), pa.int32())
    rank = np.tile(np.arange(count), n)
    values = rng.gamma(2.0, 1.0, len(flat) if fires else 0).astype(np.float32) + np.float32(0.1)
    return pa.table(
        {
            "latent": pa.array(np.repeat(latents, count), pa.int32()),
            "split": pa.array(np.full(len(flat), split)),
            "kind": pa.array(np.full(len(flat), kind)),
            "rank": pa.array(rank, pa.int32()),
            "window": pa.array(flat, pa.int64()),
            "fires": pa.array(np.full(len(flat), fires)),
            "top": pa.array(np.zeros(len(flat), bool)),
            "stratum": pa.array(rank % 10, pa.int16()) if fires else pa.nulls(len(flat), pa.int16()),
            "peak": pa.array(values if fires else np.zeros(len(flat), np.float32)),
            "positions": pa.ListArray.from_arrays(
                offsets, pa.array(_place(flat) if fires else np.zeros(0, np.int64), pa.int16())
            ),
            "values": pa.ListArray.from_arrays(offsets, pa.array(values)),
            "marks": pa.nulls(len(flat), pa.list_(pa.int16())),
            "marks_correct": pa.nulls(len(flat), pa.bool_()),
        }
    )


def _latents(latents: int, seed: int) -> Iterator[pa.Table]:
    for start in range(0, latents, 100_000):
        numbers = np.arange(start, min(start + 100_000, latents))
        density = 10 ** generator(seed, "synthetic density", start).normal(-3.5, 0.7, len(numbers))
        yield pa.table(
            {
                "latent": pa.array(numbers, pa.int32()),
                "status": pa.array(np.full(len(numbers), "live")),
                "tokens": pa.array(np.full(len(numbers), 10_000_000), pa.int64()),
                "firing_tokens": pa.array((1e7 * density).astype(np.int64) + 100, pa.int64()),
                "firing_windows": pa.array((1e7 * density).astype(np.int64) + 100, pa.int64()),
                "density": pa.array(density),
            }
        )
