"""Measure what sharing batches is worth. Run `python -m benchmarks.experiments`.

64 experiments on the bundled subject, each with its own prompt and its own latent steered or ablated, and the next-token
logits read off. `alone`: one after another by `LiveModel.run`. `shared`: 64 tasks at the same time through a
`Scheduler`. Both are done by turns in one process, and the median of the rounds' ratios is reported. Whatever else the
machine does falls on both; its load is printed. Seconds of CPU time are those of all threads of the process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from exegete.tools.bundled import dictionary_path, subject_path
from exegete.tools.bundled.grammar import generate
from exegete.tools.dictionaries import Dictionary
from exegete.tools.dictionary_loaders import load_dictionary
from exegete.tools.interventions import ablate, steer
from exegete.tools.live_model import LiveModel, Reading, Trial
from exegete.tools.scheduling import Scheduler
from exegete.tools.subject import load_subject

EXPERIMENTS = 64


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-tokens", type=int, default=None, help="by default, the scheduler's")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    subject = load_subject(str(subject_path()), device=chosen.device)
    dictionary = load_dictionary(str(dictionary_path("tests")), subject)
    model = LiveModel(subject, [dictionary])
    print(json.dumps(measure(model, experiments(model, dictionary), chosen.rounds, chosen.batch_tokens), indent=1))


def experiments(model: LiveModel, dictionary: Dictionary) -> list[Trial]:
    """Return held-out requests up to where their SQL begins, half of them with a latent steered, half ablated."""
    trials = []
    for number, example in enumerate(generate(23, EXPERIMENTS, "held_out")):
        latents = [37 * number % dictionary.latents]
        name = dictionary.fingerprint
        change = steer(name, latents, 5.0) if number % 2 else ablate(name, latents)
        trials.append(Trial(model.tokens("".join(example.prompt)), change))
    return trials


def measure(model: LiveModel, trials: Sequence[Trial], rounds: int, batch_tokens: int | None) -> dict[str, Any]:
    """Return seconds of both ways, their ratio, and how well the batches were filled."""
    with Scheduler(model, batch_tokens=batch_tokens) as scheduler:
        found = alone(model, trials), shared(scheduler, trials)
        ways: dict[str, Callable[[], object]] = {
            "alone": lambda: alone(model, trials),
            "shared": lambda: shared(scheduler, trials),
        }
        taken = [{way: _seconds(work) for way, work in ways.items()} for _ in range(rounds)]
        filled = scheduler.statistics
    difference = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    wall = {way: statistics.median(one[way][0] for one in taken) for way in ways}
    cpu = {way: statistics.median(one[way][1] for one in taken) for way in ways}
    return {
        "experiments": len(trials),
        "prompt_tokens": sum(len(trial.tokens) for trial in trials),
        "device": model.subject.device,
        "torch_threads": torch.get_num_threads(),
        "seconds": {way: round(value, 4) for way, value in wall.items()},
        "cpu_seconds": {way: round(value, 4) for way, value in cpu.items()},
        "ratio": round(statistics.median(one["alone"][0] / one["shared"][0] for one in taken), 2),
        "ratio_cpu": round(statistics.median(one["alone"][1] / one["shared"][1] for one in taken), 2),
        "ratios": [round(one["alone"][0] / one["shared"][0], 2) for one in taken],
        "largest_difference": difference,
        "batches_each_round": round(filled.batches / (rounds + 1), 1),
        "trials_per_batch": round(filled.trials_per_batch, 1),
        "padded_share": round(filled.padded_share, 3),
        "batch_tokens": scheduler.batch_tokens,
        "largest_batch_tokens": filled.largest_batch_tokens,
        "load": [round(value, 1) for value in os.getloadavg()],
        "cores": os.cpu_count(),
    }


def alone(model: LiveModel, trials: Sequence[Trial]) -> list[Tensor]:
    """Run one experiment after another."""
    return [model.run([trial], _logits)[0] for trial in trials]


def shared(scheduler: Scheduler, trials: Sequence[Trial]) -> list[Tensor]:
    """Run all experiments at the same time, each as a task of its own."""

    found: list[list[Tensor]] = []

    async def everyone() -> None:
        # Not returned: asyncio.run spells out its task, and with it a result, which takes longer than a batch.
        found.extend(await asyncio.gather(*(scheduler.run([trial], _logits) for trial in trials)))

    asyncio.run(everyone())
    return [rows[0] for rows in found]


def _logits(reading: Reading) -> list[Tensor]:
    return list(reading.logits.cpu())


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that `work` takes, by the clock and of the CPU."""
    begin = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


if __name__ == "__main__":
    main()
