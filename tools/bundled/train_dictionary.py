"""Train the bundled dictionaries with sae-lens' own trainer, and measure them on documents that they never saw.

    python -m exegete.tools.bundled.train_dictionary --which demo
    python -m exegete.tools.bundled.train_dictionary --which tests

1. The subject's vectors at the hook point are collected on documents of the grammar, beginnings left out.
2. sae-lens trains a TopK dictionary on them; demo and tests differ in the seed of weights, documents and batches.
3. L0, FVU, dead share and loss recovered are measured through Exegete's own loader, and put into `figures.json`.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exegete.tools.bundled import subject_path, write_corpus
from exegete.tools.bundled.train_subject import record
from exegete.tools.corpus import Corpus, build_corpus
from exegete.tools.dictionaries import Dictionary
from exegete.tools.dictionary_loaders import load_dictionary
from exegete.tools.seeds import derive_seed
from exegete.tools.subject import Subject, load_subject

HOOK_POINT = "blocks.1.hook_resid_post"
SEEDS = {"demo": 0, "tests": 1}
CONTEXTS_A_RUN = 64
VECTORS_A_STEP = 2048

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What decides a dictionary."""

    seed: int = 0
    latents: int = 1024
    k: int = 16
    vectors: int = 4_000_000
    """Trained on, over several passes through the documents."""
    documents: int = 20_000
    measured_documents: int = 6_000
    learning_rate: float = 1e-3


def collect(subject: Subject, corpus: Corpus) -> Tensor:
    """Return the vectors at the hook point on every token of the corpus' text, shape (token, width)."""
    kept = []
    for start in range(0, corpus.contexts, CONTEXTS_A_RUN):
        stop = min(start + CONTEXTS_A_RUN, corpus.contexts)
        tokens, mask = corpus.tokens(start, stop), corpus.mask(start, stop)
        kept.append(subject.residual(torch.from_numpy(tokens).long(), HOOK_POINT)[torch.from_numpy(mask)].clone())
    return torch.cat(kept)


def train(x: Tensor, settings: Settings, out: Path) -> None:
    """Train with sae-lens on the vectors `x`, shape (token, width), and save what it calls an inference model."""
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(derive_seed(settings.seed, "bundled dictionary", "weights") % 2**63)
    configuration = TopKTrainingSAEConfig(
        d_in=x.shape[1],
        d_sae=settings.latents,
        k=settings.k,
        normalize_activations="expected_average_only_in",
        metadata=SAEMetadata(model_name="bundled", hook_name=HOOK_POINT, seed=settings.seed),
    )
    steps = settings.vectors // VECTORS_A_STEP
    trainer = SAETrainerConfig(
        total_training_samples=steps * VECTORS_A_STEP,
        train_batch_size_samples=VECTORS_A_STEP,
        lr=settings.learning_rate,
        lr_end=0.0,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 3,
        dead_feature_window=200,
        n_batches_for_norm_estimate=20,
    )
    sae = TopKTrainingSAE(configuration)
    batches = _batches(x, derive_seed(settings.seed, "bundled dictionary", "batches"))
    SAETrainer(trainer, sae, batches).fit()
    sae.save_inference_model(out)
    (out / "sae_weights.safetensors").chmod(0o644)


def _batches(x: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield random batches, pass after pass, for ever."""
    shuffle = torch.Generator().manual_seed(seed % 2**63)
    while True:
        order = torch.randperm(len(x), generator=shuffle)
        for start in range(0, len(x) - VECTORS_A_STEP + 1, VECTORS_A_STEP):
            yield x[order[start : start + VECTORS_A_STEP]]


def measure(dictionary: Dictionary, x: Tensor) -> dict[str, float]:
    """Return L0, the fraction of variance unexplained, and the share of latents that never fire on `x`."""
    fired = torch.zeros(dictionary.latents, dtype=torch.bool)
    active, missed = 0, 0.0
    for start in range(0, len(x), 8192):
        part = x[start : start + 8192]
        z = dictionary.encode(part)
        fired |= (z != 0).any(0)
        active += int((z != 0).sum())
        missed += float((dictionary.decode(z) - part).square().sum())
    variance = float((x - x.mean(0)).square().sum())
    return {"l0": active / len(x), "fvu": missed / variance, "dead_share": float((~fired).float().mean())}


def losses(subject: Subject, dictionary: Dictionary, corpus: Corpus) -> dict[str, float]:
    """Return the cross-entropy of the subject, of it with the reconstruction, and with zeros at the hook point.

    And `loss_recovered`, (zeros − reconstruction) / (zeros − subject). Beginnings of documents keep their own vectors,
    since no dictionary was trained on them, and are not predicted.
    """

    def reconstruct(vectors: Tensor) -> Tensor:
        return dictionary.decode(dictionary.encode(vectors))

    changes: dict[str, Any] = {"subject": None, "reconstruction": reconstruct, "zeros": torch.zeros_like}
    sums, count = dict.fromkeys(changes, 0.0), 0
    for start in range(0, corpus.contexts, CONTEXTS_A_RUN):
        stop = min(start + CONTEXTS_A_RUN, corpus.contexts)
        tokens = torch.from_numpy(corpus.tokens(start, stop)).long()
        mask = torch.from_numpy(corpus.mask(start, stop))
        count += int(mask[:, 1:].sum())
        for name, change in changes.items():
            sums[name] += _loss(subject, tokens, mask, change)
    means = {name: total / count for name, total in sums.items()}
    recovered = (means["zeros"] - means["reconstruction"]) / (means["zeros"] - means["subject"])
    return {**{f"loss_{name}": value for name, value in means.items()}, "loss_recovered": recovered}


def _loss(subject: Subject, tokens: Tensor, mask: Tensor, change: Any) -> float:
    """Return the summed cross-entropy of the tokens in `mask`, both (context, position), vectors changed there."""

    def hook(vectors: Tensor, hook: Any) -> Tensor:
        changed = vectors.clone()
        changed[mask] = change(vectors[mask])
        return changed

    hooks = [] if change is None else [(HOOK_POINT, hook)]
    with torch.inference_mode():
        logits = subject.bridge.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
    return float(each[mask[:, 1:].flatten()].sum())


def build(which: str, subject: Subject, out: Path, settings: Settings) -> dict[str, Any]:
    """Train and measure one dictionary, and return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        corpora = []
        for purpose, documents in (("train", settings.documents), ("measure", settings.measured_documents)):
            text = Path(folder) / f"{purpose}.jsonl"
            seed = derive_seed(settings.seed, "bundled dictionary", purpose)
            write_corpus(text, seed, documents)
            corpora.append(build_corpus(str(text), subject, Path(folder) / purpose, seed=settings.seed))
        started = time.monotonic()
        train(collect(subject, corpora[0]), settings, out)
        minutes = (time.monotonic() - started) / 60
        dictionary = load_dictionary(str(out), subject)
        x = collect(subject, corpora[1])
        figures: dict[str, Any] = {
            "hook_point": HOOK_POINT,
            "latents": settings.latents,
            "k": settings.k,
            "seed": settings.seed,
            "vectors_trained_on": settings.vectors // VECTORS_A_STEP * VECTORS_A_STEP,
            "training_minutes": round(minutes, 1),
            "tokens_measured": len(x),
        }
        measured = {**measure(dictionary, x), **losses(subject, dictionary, corpora[1])}
    logger.info("%s: %s", which, json.dumps(measured))
    return figures | {name: float(np.round(value, 5)) for name, value in measured.items()}


def main() -> None:
    """Train one dictionary and put its figures beside those of the subject."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--which", choices=sorted(SEEDS), default="demo")
    parser.add_argument("--subject", type=Path, default=subject_path())
    parser.add_argument("--out", type=Path, default=subject_path().parent, help="where dictionary_… is written")
    parser.add_argument("--vectors", type=int, default=Settings.vectors)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    settings = Settings(SEEDS[arguments.which], vectors=arguments.vectors)
    name = f"dictionary_{arguments.which}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    figures = build(arguments.which, load_subject(str(arguments.subject)), arguments.out / name, settings)
    record(arguments.out / "figures.json", name, figures)


if __name__ == "__main__":
    main()
