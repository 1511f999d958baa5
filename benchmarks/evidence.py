"""Measure how fast evidence becomes prompts. Run `python -m benchmarks.evidence`.

An activation pass over random text with a random dictionary gives real evidence folders. Two processes then read every
latent's windows for the `night` profile – 40 explain windows, and 10 firing and 10 non-firing test windows for each of
detection and fuzzing – and render them as prompt text. `full` reads and renders every window that is stored.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.synthetic import random_corpus
from exegete.tools.activations import run_pass
from exegete.tools.dictionaries import PlainDictionary
from exegete.tools.evidence import Evidence
from exegete.tools.merging import merge
from exegete.tools.pass_settings import PassSettings
from exegete.tools.rendering import render_window

LATENTS, WIDTH, K = 4_096, 64, 32


class _Embedding:
    """A subject without layers: what is measured begins after the forward pass."""

    name, fingerprint, device, dtype = "embedding", "embedding", "cpu", "float32"

    def __init__(self, vocabulary: int) -> None:
        self.table = torch.randn(vocabulary, WIDTH, generator=torch.Generator().manual_seed(0))
        self.pieces = [f" word{i}" for i in range(vocabulary)]

    def width(self, hook_point: str) -> int:
        """Return the length of the vectors."""
        return WIDTH

    def residual(self, tokens: torch.Tensor, hook_point: str) -> torch.Tensor:
        """Return each token's vector with a share of the one before."""
        vectors = self.table[tokens]
        return vectors + 0.5 * torch.roll(vectors, 1, dims=1)


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--contexts", type=int, default=2_000, help="of 256 tokens, in the pass that makes the evidence"
    )
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = make(Path(folder), chosen.contexts)
        for mode in ("night", "full"):
            figures[f"latents_per_s_{mode}"] = round(LATENTS / _parallel(Path(folder), mode, chosen.processes))
    print(json.dumps(figures | {"processes": chosen.processes}, indent=1))


def make(folder: Path, contexts: int) -> dict[str, Any]:
    """Make evidence in `folder`, and return how long choosing and merging took."""
    torch.set_num_threads(1)
    noise = torch.Generator().manual_seed(1)
    directions = torch.randn(LATENTS, WIDTH, generator=noise)
    dictionary = PlainDictionary(
        name="random",
        fingerprint="random",
        hook_point="embedding",
        encoder=directions.T.contiguous(),
        encoder_bias=torch.zeros(LATENTS),
        decoder=directions,
        decoder_bias=torch.zeros(WIDTH),
        activation="topk",
        k=K,
    )
    subject: Any = _Embedding(50_257)
    corpus, settings, stages = random_corpus(contexts), PassSettings(), {"": time.perf_counter()}
    run_pass(
        subject,
        dictionary,
        corpus,
        folder / "pass",
        settings,
        lambda stage, *_: stages.update({stage: time.perf_counter()}),
    )
    begin = time.perf_counter()
    evidence = merge(folder / "pass", folder / "evidence", subject, dictionary, corpus, settings)
    merged = time.perf_counter() - begin
    live = sum(status == "live" for status in evidence.statuses.values())
    return {
        "latents": LATENTS,
        "live": live,
        "selected_and_verified_latents_per_s": round(LATENTS / (begin - stages["activations"])),
        "merged_latents_per_s": round(LATENTS / merged),
    }


def _parallel(folder: Path, mode: str, processes: int) -> float:
    """Return the seconds that all latents take, shared by so many processes; starting them is not counted."""
    bounds = [LATENTS * i // processes for i in range(processes + 1)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(render, [(folder / "evidence", mode, 0, 8)] * processes)
        begin = time.perf_counter()
        jobs = [(folder / "evidence", mode, low, high) for low, high in pairwise(bounds)]
        assert sum(pool.starmap(render, jobs, chunksize=1)) > LATENTS
        return time.perf_counter() - begin


def render(folder: Path, mode: str, low: int, high: int) -> int:
    """Render the windows of the latents `low` … `high`, and return the number of characters."""
    evidence = Evidence.open(folder)
    if mode == "full":
        found = evidence.read(range(low, high), "score")
        return sum(
            len(render_window(window.tokens, window.firing_positions()))
            for latent in found
            for window in latent.windows
        )
    size = 0
    for latent in evidence.read(range(low, high), "explain", first=40, kinds=["firing"]):
        size += sum(len(render_window(w.tokens, w.firing_positions())) for w in latent.select("explain", kind="firing"))
    for latent in evidence.read(range(low, high), "score", first=10, splits=["test"], kinds=["firing", "random"]):
        for window in latent.select("test"):
            size += len(render_window(window.tokens))
            size += len(render_window(window.tokens, window.firing_positions() or (3, 4)))
    return size


if __name__ == "__main__":
    main()
