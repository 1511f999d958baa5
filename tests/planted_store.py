"""Stores of planted latents, each firing on a word of its own: small enough to label in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import exegete
from exegete.tools.interchange import import_evidence
from exegete.tools.seeds import generator

WORDS = "the a of to and in is it on as at by we he she".split()
TARGETS = (
    "dog cat fish bird tree house river stone cloud rain snow wind fire salt milk bread glass wood iron gold"
    " horse sheep lamp door roof wall road bridge ship harbour"
).split()


def planted_line(latent: int, windows_per_split: int = 24, noise: bool = False) -> dict[str, Any]:
    """Return a latent as JSON evidence: it fires on a word of its own, in every second window (with `noise`, on any word)."""
    rng = generator(0, "planted", latent)
    target = TARGETS[latent] if latent < len(TARGETS) else f"{TARGETS[latent % len(TARGETS)]}{latent // len(TARGETS)}"
    windows = []
    for split in ("explain", "refine", "test"):
        for number in range(windows_per_split):
            tokens = [f" {WORDS[i]}" for i in rng.integers(len(WORDS), size=12)]
            fires, at = number % 2 == 0, int(rng.integers(12))
            if fires and not noise:
                tokens[at] = f" {target}"
            activations = [1.0 if fires and i == at else 0.0 for i in range(12)]
            kind = "firing" if fires else "random"
            windows.append({"tokens": tokens, "activations": activations, "fires": fires, "split": split, "kind": kind})
    return {"dictionary": "planted", "latent": latent, "windows": windows}


def planted_file(folder: Path, latents: int, windows_per_split: int = 24) -> Path:
    """Write so many planted latents as JSON lines into `folder` and return the file."""
    file = folder / "planted.jsonl"
    lines = [json.dumps(planted_line(latent, windows_per_split)) for latent in range(latents)]
    file.write_text("".join(line + "\n" for line in lines))
    return file


def planted_store(file: Path, store: Path) -> Path:
    """Bring the evidence of `file` into a new store and return its folder."""
    import_evidence(file, store)
    return store


def tables(store: Path) -> dict[str, list[Any]]:
    """Return what readers see of a store's results, but for what tells when and at what price."""
    with exegete.connect(store) as connection:
        return {
            view: connection.execute(f"SELECT * FROM {view} ORDER BY ALL").fetchall()
            for view in ("latents", "explanations", "scores", "best_explanations", "verdicts", "examples")
        }
