"""Extrapolate a large run from measured unit costs: the tables of docs/scale.md. Run `python -m benchmarks.scale_plan`.

Nothing is measured here. `MEASURED` comes from `benchmarks.scale_units`, `ASSUMED` is a guess that says so.

1. A GPU's tokens a second: its peak times `utilisation` ÷ (2 · parameters up to the layer + 2 · width · latents), times
   `pass_share`. Counting firings takes a processor of its own, one after the other: 1/rate = 1/gpu + active/counted.
2. Events of a latent: each slice writes, for every split, the windows whose hash is below c·K/n, n counted so far in that slice:
   n of them up to n = c·K, c·K·(1 + ln(n/(c·K))) beyond. Splits are taken to be of one size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import log
from typing import Any

MEASURED = {
    "counted_per_s": 3.0e6,
    "bytes_per_event": 16.3,
    "statistics_bytes": 324,
    "selected_per_s": 6.0e5,
    "merged_per_s": 1_335,
    "calls_per_latent": 8.9,
    "input_tokens_per_latent": 8_540,
}
ASSUMED = {
    "gpu_flops": 989e12,
    "utilisation": 0.40,
    "pass_share": 0.85,
    "gpus": 64,
    "usd_per_gpu_hour": 2.50,
    "firing_windows_per_firing": 0.9,
    "output_tokens_per_latent": 200,
    "prefill_tokens_per_s_and_gpu": 30_000,
}
SAMPLED, FACTOR = (40, 40, 100), 4.0
"""K of each split, and c."""


@dataclass(frozen=True)
class Case:
    """Ten million latents of some shape."""

    name: str
    dictionaries: int
    latents: int
    tokens: float
    slices: int
    active: int = 64
    width: int = 4_096
    parameters: float = 16 * 218e6
    """Of the layers that run: 16 of a model like Llama 3 8B, in the mean of dictionaries over all its layers."""


CASES = (
    Case("80 × 131,072, 1e9 tokens, 954 slices", 80, 131_072, 1e9, 954),
    Case("80 × 131,072, 1e9 tokens, 64 slices", 80, 131_072, 1e9, 64),
    Case("10 × 1,048,576, 1e9 tokens, 64 slices", 10, 1_048_576, 1e9, 64),
    Case("80 × 131,072, 1e8 tokens, 64 slices", 80, 131_072, 1e8, 64),
)


def main() -> None:
    """Print one JSON object."""
    print(
        json.dumps(
            {case.name: extrapolated(case) for case in CASES} | {"language model": language_model(1e7)}, indent=1
        )
    )


def extrapolated(case: Case) -> dict[str, Any]:
    """Return times, sizes and money of the activation passes."""
    flops = 2 * case.parameters + 2 * case.width * case.latents
    gpu = ASSUMED["gpu_flops"] * ASSUMED["utilisation"] * ASSUMED["pass_share"] / flops
    counting = MEASURED["counted_per_s"] / case.active
    both = 1 / (1 / gpu + 1 / counting)
    total = case.tokens * case.dictionaries
    hours = {
        name: total / ASSUMED["gpus"] / rate / 3600 for name, rate in (("gpu_alone", gpu), ("with_counting", both))
    }
    events = events_of_latent(case) * case.latents
    return {
        "gflop_per_token": round(flops / 1e9, 1),
        "tokens_per_s_and_gpu": round(gpu),
        "tokens_per_s_with_counting": round(both),
        "hours": {name: round(value, 1) for name, value in hours.items()},
        "usd": round(hours["with_counting"] * ASSUMED["gpus"] * ASSUMED["usd_per_gpu_hour"]),
        "events_per_latent": round(events / case.latents),
        "parts_gb_per_dictionary": round(events * MEASURED["bytes_per_event"] / 1e9),
        "statistics_gb_per_dictionary": round(case.latents * case.slices * MEASURED["statistics_bytes"] / 1e9, 1),
        "select_hours_per_dictionary": round(events / MEASURED["selected_per_s"] / 3600, 1),
        "merge_minutes_per_dictionary": round(case.latents / MEASURED["merged_per_s"] / 60, 1),
    }


def events_of_latent(case: Case) -> float:
    """Return the events that the slices write of a latent that fires as often as the mean."""
    firings = case.tokens * case.active / case.latents
    windows = firings * ASSUMED["firing_windows_per_firing"] / len(SAMPLED) / case.slices
    kept = 0.0
    for sampled in SAMPLED:
        room = FACTOR * sampled
        kept += windows if windows <= room else room * (1 + log(windows / room))
    return kept * case.slices


def language_model(latents: float) -> dict[str, Any]:
    """Return calls, tokens and hours in the profile `night`."""
    tokens = latents * MEASURED["input_tokens_per_latent"]
    hours = tokens / ASSUMED["prefill_tokens_per_s_and_gpu"] / ASSUMED["gpus"] / 3600
    return {
        "calls": latents * MEASURED["calls_per_latent"],
        "input_tokens": tokens,
        "output_tokens": latents * ASSUMED["output_tokens_per_latent"],
        "hours_on_own_gpus": round(hours, 1),
        "usd_on_own_gpus": round(hours * ASSUMED["gpus"] * ASSUMED["usd_per_gpu_hour"]),
        "hours_of_one_process_at_403_calls_per_s": round(latents * MEASURED["calls_per_latent"] / 403 / 3600, 1),
    }


if __name__ == "__main__":
    main()
