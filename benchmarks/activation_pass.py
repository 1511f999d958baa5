"""Measure the activation pass against the bare work that it cannot avoid. Run `python -m benchmarks.activation_pass`.

The limit is the forward pass to the hook point in transformers itself (fused attention, no hooks) plus the dense encoder
product, in micro-batches of the same shape, with nothing selected and nothing written. Ours is everything that a slice
does: forward through the subject, encoding, selection, statistics, events, pool, Parquet, fsync. Both run in turns, on the
same tokens, in one process; `ratio` is of the median times of a turn, `ratio_of_totals` of the sums, which hold the end of
the slice in full although a slice is twenty times as long by default. `ratio_cpu` is of the medians of processor time, which other
programs on the machine disturb less (but which does not see waiting for the disk).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.synthetic import HOOK_POINT, LAYERS, gpt2_small, random_corpus
from exegete.tools.activations import run_slice
from exegete.tools.corpus import Corpus
from exegete.tools.firing_events import EventStream
from exegete.tools.parts import load_statistics
from exegete.tools.pass_settings import PassSettings
from exegete.tools.window_pool import draw_pool

DICTIONARIES: dict[str, dict[str, Any]] = {
    "topk": {"latents": 65_536, "activation": "topk", "k": 32},
    "jumprelu": {"latents": 16_384, "activation": "jumprelu", "k": 64},
}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, default=12, help="of 1,024 tokens, in each round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--memory", nargs=2, metavar=("DICTIONARY", "MICRO_BATCHES"), help="measure only the peak memory"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory, which takes minutes")
    chosen = parser.parse_args()
    if chosen.memory:
        print(json.dumps(peak_memory(chosen.memory[0], int(chosen.memory[1]))))
        return
    figures: dict[str, Any] = {"machine": machine(chosen.device), "tokens_per_round": chosen.micro_batches * 1_024}
    bare, subject = gpt2_small(chosen.device, chosen.dtype)
    for name in DICTIONARIES:
        figures |= ratio(bare, subject, name, chosen.rounds, chosen.micro_batches)
    if chosen.device == "cpu" and not chosen.no_memory:
        for name in DICTIONARIES:
            figures |= memory_growth(name)
    print(json.dumps(figures, indent=1))


def machine(device: str) -> str:
    """Return what the figures were measured on."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{device}, {os.cpu_count()} cores, {memory:.0f} GiB, torch {torch.__version__}, {torch.get_num_threads()} threads"


def ratio(bare: Any, subject: Any, name: str, rounds: int, micro_batches: int) -> dict[str, Any]:
    """Return tokens per second of the limit and of the pass, their ratio, and how the latents fired."""
    from exegete.tools.dictionaries import random_dictionary

    dictionary = random_dictionary(subject, HOOK_POINT, **DICTIONARIES[name])
    settings = PassSettings(pool_floor=1)  # a tenth of the windows, as in any corpus of size
    micro, _ = settings.shape(subject.device)
    corpus = random_corpus(rounds * micro_batches * 4)
    batches = micro_batches * 4 // micro
    stream, pool = EventStream(subject, dictionary, corpus, micro), draw_pool(corpus, settings)
    turns = _Turns(
        lambda number: _limit(bare, dictionary, corpus, micro, number * batches, (number + 1) * batches), batches
    )
    with tempfile.TemporaryDirectory() as folder:
        _limit(bare, dictionary, corpus, micro, 0, 2)
        list(stream.over(0, 2, 1))
        part = Path(folder) / "slice"
        turns.begin()
        run_slice(stream, part, 0, rounds * batches, 1, pool, settings, turns)
        turns.end()
        firing = _firing([part], dictionary.latents)
        written = sum(f.stat().st_size for f in part.iterdir())
    tokens = batches * micro * 256
    limit, own = tokens / statistics.median(turns.limits), tokens / statistics.median(turns.ours)
    cpu = np.median(turns.limits_cpu) / np.median(turns.ours_cpu)
    return {
        f"ratio_{name}": round(own / limit, 3),
        f"ratio_of_totals_{name}": round(sum(turns.limits) / sum(turns.ours), 3),
        f"ratio_cpu_{name}": round(float(cpu), 3),
        f"limit_tokens_per_s_{name}": round(limit),
        f"pass_tokens_per_s_{name}": round(own),
        f"written_bytes_per_token_{name}": round(written / tokens / rounds),
        f"firing_{name}": firing,
    }


class _Turns:
    """Watches one slice: after every so many micro-batches the slice waits while the limit does the same tokens.

    The last turn of the pass holds what ends a slice: the last flush, the statistics, fsync and the renaming.
    """

    def __init__(self, limit: Callable[[int], float], micro_batches: int) -> None:
        self._limit, self._every, self._seen = limit, micro_batches, 0
        self.limits: list[float] = []
        self.limits_cpu: list[float] = []
        self.ours: list[float] = []
        self.ours_cpu: list[float] = []

    def begin(self) -> None:
        """Start the pass's clock."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def __call__(self) -> None:
        """Count a micro-batch; at the end of a turn measure the limit."""
        self._seen += 1
        if self._seen % self._every:
            return
        self.ours.append(time.perf_counter() - self._wall)
        self.ours_cpu.append(time.process_time() - self._cpu)
        before = time.process_time()
        self.limits.append(self._limit(len(self.limits)))
        self.limits_cpu.append(time.process_time() - before)
        self.begin()

    def end(self) -> None:
        """Add what ended the slice to the last turn."""
        self.ours[-1] += time.perf_counter() - self._wall
        self.ours_cpu[-1] += time.process_time() - self._cpu


def _limit(bare: Any, dictionary: Any, corpus: Corpus, micro: int, first: int, last: int) -> float:
    import torch

    begin = time.perf_counter()
    with torch.inference_mode():
        for number in range(first, last):
            tokens = torch.from_numpy(corpus.tokens(number * micro, (number + 1) * micro).astype(np.int64))
            tokens = tokens.to(dictionary.device)
            body = bare.transformer
            x = body.wte(tokens) + body.wpe(torch.arange(tokens.shape[1], device=tokens.device))
            for layer in body.h[:LAYERS]:
                out = layer(x)
                x = out[0] if isinstance(out, tuple) else out
            x = x.reshape(-1, x.shape[-1]) - dictionary.input_shift
            code = torch.addmm(dictionary.encoder_bias, x, dictionary.encoder)
        if code.device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - begin


def _firing(parts: list[Path], latents: int) -> dict[str, Any]:
    """Return how the latents fired: a dictionary that is dead, or always on, would prove nothing."""
    tokens, firings = 0, np.zeros(latents, np.int64)
    for part in parts:
        seen = load_statistics(part, latents)
        tokens += seen.tokens
        firings += seen.firings
    bounds = [0, 1, 10, 100, 1_000, 10_000, 1 << 62]
    histogram = np.histogram(firings, bounds)[0].tolist()
    return {
        "tokens": tokens,
        "mean_l0": round(firings.sum() / tokens, 1),
        "latents_by_firings": dict(
            zip(["0", "1-9", "10-99", "100-999", "1000-9999", "10000-"], histogram, strict=True)
        ),
        "events_written": sum(pq.read_metadata(part / "events.parquet").num_rows for part in parts),
        "pool_events_written": sum(pq.read_metadata(part / "pool.parquet").num_rows for part in parts),
    }


def memory_growth(name: str) -> dict[str, Any]:
    """Return the peak memory beyond weights and one batch, and how it grows when the tokens double."""
    found = []
    for micro_batches in (24, 48):
        command = [sys.executable, "-m", "benchmarks.activation_pass", "--memory", name, str(micro_batches)]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    once, twice = found
    return {
        f"peak_mb_{name}": once["peak_mb"],
        f"peak_mb_beyond_weights_and_batch_{name}": once["beyond_mb"],
        f"peak_kb_per_latent_{name}": round(once["beyond_mb"] * 1024 / DICTIONARIES[name]["latents"], 2),
        f"peak_growth_when_tokens_double_{name}": round(twice["peak_mb"] / once["peak_mb"] - 1, 4),
    }


def peak_memory(name: str, micro_batches: int) -> dict[str, float]:
    """Return this process's peak memory over one slice, in MiB: in all, and beyond weights and one dense batch."""
    from exegete.tools.dictionaries import random_dictionary

    _, subject = gpt2_small()
    dictionary = random_dictionary(subject, HOOK_POINT, **DICTIONARIES[name])
    settings, corpus = PassSettings(), random_corpus(micro_batches * 4)
    stream = EventStream(subject, dictionary, corpus, 4)
    stream.subject.residual(_tokens(corpus), HOOK_POINT)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        run_slice(stream, Path(folder) / "slice", 0, micro_batches, 1, draw_pool(corpus, settings), settings)
    peak = _status("VmHWM")
    return {"peak_mb": round(peak), "beyond_mb": round(peak - before)}


def _tokens(corpus: Corpus) -> Any:
    import torch

    return torch.from_numpy(corpus.tokens(0, 4).astype(np.int64))


def _status(key: str) -> float:
    """Return an entry of this process's memory status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


if __name__ == "__main__":
    main()
