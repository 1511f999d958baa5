"""Evidence of planted latents, as an activation pass would give it (PROTOCOLS §1).

1. Runs of text are cut into windows of 32 tokens. A planted latent fires where its predicate holds in the run, which sees
   what stands before a window, with a strength drawn by seed, from 0.5 to 1.5: every firing token is marked.
2. For each split: a sample of the windows on which it fires, in equal-count strata of the peak; random windows on which it
   does not; and hard ones, which hold its words, or words of their class, and on which it does not fire either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from exegete.evaluators.audit_truths import Truth
from exegete.tools.predicates import words_of
from exegete.tools.seeds import derive_seed, generator
from exegete.tools.windows import WINDOW_TOKENS, Kind, LatentEvidence, Split, Window

Floats = NDArray[np.float32]
Pieces = tuple[str, ...]
Run = TypeVar("Run", Pieces, Floats)
Texts = Mapping[Split, Sequence[Pieces]]
"""Runs of tokens by split, each run of its own documents."""

STRATA = 10
EXPLAINED = 40
"""Windows of each kind in the explain split, at least."""


class Pool:
    """The windows that evidence is drawn from, shared by all latents."""

    def __init__(self, texts: Texts, length: int | None = WINDOW_TOKENS) -> None:
        """Cut each run into windows of `length` tokens and drop what is left over; None takes each run as one window."""
        self.length = length
        self.windows: dict[Split, list[Pieces]] = {split: self._cut(runs) for split, runs in texts.items()}
        self.words = {
            split: [frozenset(word for words in words_of(window) for word in words) for window in windows]
            for split, windows in self.windows.items()
        }

    def activations(self, of_runs: Mapping[Split, Sequence[Floats]]) -> dict[Split, list[Floats]]:
        """Return activations on the windows from activations on the runs that they were cut from."""
        return {split: self._cut(runs) for split, runs in of_runs.items()}

    def _cut(self, runs: Sequence[Run]) -> list[Run]:
        if self.length is None:
            return list(runs)
        step = self.length
        return [run[at : at + step] for run in runs for at in range(0, len(run) - step + 1, step)]


def fired(truth: Truth, texts: Texts, seed: int) -> dict[Split, list[Floats]]:
    """Return the activations of a planted latent on each run, shapes (tokens,)."""
    predicate = truth.predicate
    found: dict[Split, list[Floats]] = {}
    for split, runs in texts.items():
        rng = generator(seed, "strength", truth.name, split)
        found[split] = [(predicate.matches(run) * rng.uniform(0.5, 1.5, len(run))).astype(np.float32) for run in runs]
    return found


def evidence(
    latent: int, truth: Truth, pool: Pool, activations: Mapping[Split, Sequence[Floats]], count: int, seed: int
) -> LatentEvidence:
    """Return the evidence of one planted latent.

    Args:
        latent: its number.
        truth: what it stands for; its words say which windows are hard.
        pool: windows by split.
        activations: on each of them.
        count: windows of each kind, in each split; all there are where they are fewer. The explain split has 40 at least.
        seed: of the samples; which windows are drawn depends on nothing else but the latent.
    """
    own, kept = derive_seed(seed, "audit evidence", latent), []
    first = windows = firing_windows = tokens = firing_tokens = 0
    for split, runs in pool.windows.items():
        values = activations[split]
        fires = np.array([bool((one > 0).any()) for one in values], dtype=np.bool_)
        wanted = max(count, EXPLAINED) if split == "explain" else count
        chosen = _chosen(truth, pool.words[split], fires, wanted, derive_seed(own, split))
        strata = _strata({index: float(values[index].max()) for index, kind in chosen if kind == "firing"})
        kept += [
            Window(first + index, runs[index], values[index], kind == "firing", split, kind, strata.get(index))
            for index, kind in chosen
        ]
        first, windows, firing_windows = first + len(runs), windows + len(runs), firing_windows + int(fires.sum())
        tokens += sum(map(len, runs))
        firing_tokens += sum(int((one > 0).sum()) for one in values)
    statistics = {
        "tokens": float(tokens),
        "firing_tokens": float(firing_tokens),
        "density": firing_tokens / max(1, tokens),
        "window_density": firing_windows / max(1, windows),
    }
    return LatentEvidence(latent, "live" if firing_windows else "dead", tuple(kept), statistics)


def _chosen(
    truth: Truth, words: Sequence[frozenset[str]], fires: NDArray[np.bool_], count: int, seed: int
) -> list[tuple[int, Kind]]:
    order = generator(seed, "windows").permutation(len(fires)).tolist()
    firing = [index for index in order if fires[index]][:count]
    silent = [index for index in order if not fires[index]]
    found: list[tuple[int, Kind]] = [(index, "firing") for index in firing]
    found += [(index, "random") for index in silent[:count]]
    return found + [(index, "hard") for index in _hard(truth, words, silent[count:])[:count]]


def _hard(truth: Truth, words: Sequence[frozenset[str]], silent: Sequence[int]) -> list[int]:
    """Return silent windows with the latent's words in other places, then such with words of the same class."""
    own = frozenset(word.lower() for sense in truth.senses for word in sense.words)
    kin = frozenset(word.lower() for sense in truth.senses for word in sense.wider)
    nearest = [index for index in silent if words[index] & own]
    return nearest + [index for index in silent if words[index] & kin and not words[index] & own]


def _strata(peaks: Mapping[int, float]) -> dict[int, int]:
    """Return the equal-count stratum of each window by its peak, 0 lowest."""
    ranked = sorted(peaks, key=lambda index: (peaks[index], index))
    return {index: rank * STRATA // len(ranked) for rank, index in enumerate(ranked)}
