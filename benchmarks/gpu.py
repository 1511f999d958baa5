"""Measure the activation pass on CUDA in bfloat16, and hold its evidence against the CPU's in float32.

Run `python -m benchmarks.gpu`. Without a CUDA device it says that nothing was measured. The tolerances are those of
`TOLERANCES`: bfloat16 has eight bits, so peaks agree to about a percent, and windows of nearly equal peak change places.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.activation_pass import DICTIONARIES, machine, ratio
from benchmarks.synthetic import HOOK_POINT, gpt2_small, random_corpus
from exegete.tools.activations import run_pass
from exegete.tools.merging import merge
from exegete.tools.pass_settings import PassSettings

TOLERANCES = {"firings_off": 0.02, "median_peak_off": 0.02, "top_windows_shared": 0.8}
"""Largest relative difference in all firings and in the median latent's peak; least share of top windows in common."""
CONTEXTS = 64


def main() -> None:
    """Print one JSON object."""
    import torch

    if not torch.cuda.is_available():
        print(json.dumps({"gpu": "not measured", "why": "torch finds no CUDA device"}))
        return
    figures: dict[str, Any] = {"gpu": "measured", "machine": f"{torch.cuda.get_device_name()}; {machine('cuda')}"}
    bare, subject = gpt2_small("cuda", "bfloat16")
    for name in DICTIONARIES:
        figures |= ratio(bare, subject, name, rounds=5, micro_batches=160)
        figures[f"agreement_{name}"] = agreement(name)
    within = [_within(figures[f"agreement_{name}"]) for name in DICTIONARIES]
    print(json.dumps(figures | {"tolerances": TOLERANCES, "within_tolerances": all(within)}, indent=1))


def agreement(name: str) -> dict[str, float]:
    """Return how the evidence of CUDA in bfloat16 differs from that of the CPU in float32, on the same small corpus."""
    from exegete.tools.dictionaries import random_dictionary

    settings, corpus = replace(PassSettings(), micro_batch=4), random_corpus(CONTEXTS)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        _, reference = gpt2_small()
        dictionary = random_dictionary(reference, HOOK_POINT, **DICTIONARIES[name])
        for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
            _, subject = gpt2_small(device, dtype)
            moved, base = dictionary.to(device, dtype), Path(folder) / device
            run_pass(subject, moved, corpus, base / "pass", settings)
            merge(base / "pass", base / "evidence", subject, moved, corpus, settings)
            latents = pq.read_table(base / "evidence" / "latents.parquet").to_pandas()
            items = pq.read_table(
                base / "evidence" / "items-00000.parquet", filters=[("top", "=", True)], columns=["latent", "window"]
            )
            found.append((latents, set(zip(*(c.to_pylist() for c in items.columns), strict=True))))
    (own, own_top), (other, other_top) = found
    fires = (own["firing_tokens"] > 10).to_numpy()
    peaks = np.abs(other["peak"] - own["peak"])[fires] / own["peak"][fires]
    return {
        "firings_off": abs(other["firing_tokens"].sum() / own["firing_tokens"].sum() - 1),
        "median_peak_off": float(np.median(peaks)),
        "top_windows_shared": len(own_top & other_top) / max(1, len(own_top)),
    }


def _within(agreed: dict[str, float]) -> bool:
    return (
        agreed["firings_off"] <= TOLERANCES["firings_off"]
        and agreed["median_peak_off"] <= TOLERANCES["median_peak_off"]
        and agreed["top_windows_shared"] >= TOLERANCES["top_windows_shared"]
    )


if __name__ == "__main__":
    main()
