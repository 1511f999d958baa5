"""Train a TopK dictionary with sae-lens on a small story model, offline, in a few minutes on two cores.

    python examples/train_stories_dictionary.py            # writes out/stories260K-dictionary
    exegete label examples/stories260K.toml                # labels it

The model is Karpathy's 260K-parameter story teller, the text 2 MB of TinyStories; see the README for where they are
expected. The dictionary reads `blocks.2.hook_resid_post`. It is trained on the documents of the corpus' `explain` and
`refine` splits and measured on `test`, which neither its training nor any explanation sees.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exegete.tools.corpus import Corpus, build_corpus
from exegete.tools.dictionaries import Dictionary
from exegete.tools.dictionary_loaders import load_dictionary
from exegete.tools.seeds import derive_seed
from exegete.tools.subject import Subject, load_subject
from exegete.tools.windows import SPLITS

DATA = Path(__file__).parents[2] / "shared/data"
HOOK_POINT = "blocks.2.hook_resid_post"
CONTEXTS_A_RUN = 16


def vectors(subject: Subject, corpus: Corpus, *splits: str) -> Tensor:
    """Return the vectors at the hook point on all text of some splits, shape (token, width)."""
    wanted = [SPLITS.index(split) for split in splits]  # type: ignore[arg-type]
    kept = []
    for start in range(0, corpus.contexts, CONTEXTS_A_RUN):
        stop = min(start + CONTEXTS_A_RUN, corpus.contexts)
        of_split = np.isin(corpus.split_of(np.arange(start, stop)), wanted)
        if of_split.any():
            tokens, mask = corpus.tokens(start, stop)[of_split], corpus.mask(start, stop)[of_split]
            kept.append(subject.residual(torch.from_numpy(tokens).long(), HOOK_POINT)[torch.from_numpy(mask)].clone())
    return torch.cat(kept)


def batches(x: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Yield random batches, pass after pass, for ever."""
    shuffle = torch.Generator().manual_seed(seed % 2**63)
    while True:
        order = torch.randperm(len(x), generator=shuffle)
        for start in range(0, len(x) - size + 1, size):
            yield x[order[start : start + size]]


def train(x: Tensor, arguments: argparse.Namespace) -> None:
    """Train with sae-lens' own trainer, and save what it calls an inference model."""
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(derive_seed(arguments.seed, "dictionary", "weights") % 2**63)
    configuration = TopKTrainingSAEConfig(
        d_in=x.shape[1],
        d_sae=arguments.latents,
        k=arguments.k,
        normalize_activations="expected_average_only_in",
        metadata=SAEMetadata(model_name="stories260K", hook_name=HOOK_POINT, seed=arguments.seed),
    )
    sae = TopKTrainingSAE(configuration)
    steps = arguments.tokens // arguments.batch
    settings = SAETrainerConfig(
        total_training_samples=steps * arguments.batch,
        train_batch_size_samples=arguments.batch,
        lr=arguments.learning_rate,
        lr_end=0.0,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 3,
        dead_feature_window=200,
        n_batches_for_norm_estimate=20,
    )
    provider = batches(x, arguments.batch, derive_seed(arguments.seed, "dictionary", "batches"))
    SAETrainer(settings, sae, provider).fit()
    sae.save_inference_model(arguments.out)


def measure(dictionary: Dictionary, x: Tensor) -> dict[str, float]:
    """Return L0, the fraction of variance unexplained, and the share of latents that never fire on `x`."""
    fired = torch.zeros(dictionary.latents, dtype=torch.bool)
    active, missed = 0, 0.0
    for part in x.split(8192):
        z = dictionary.encode(part)
        fired |= (z != 0).any(0)
        active += int((z != 0).sum())
        missed += float((dictionary.decode(z) - part).square().sum())
    variance = float((x - x.mean(0)).square().sum())
    return {"l0": active / len(x), "fvu": missed / variance, "dead_share": float((~fired).float().mean())}


def main() -> None:
    """Build the corpus, train, load again through Exegete's own loader, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DATA / "models/stories260K/hf"))
    parser.add_argument("--text", default=str(DATA / "text/tinystories_2MB.txt"))
    parser.add_argument("--out", type=Path, default=Path("out/stories260K-dictionary"))
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8_000_000, help="tokens trained on, over several passes")
    parser.add_argument("--batch", type=int, default=2048, help="tokens a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.monotonic()
    subject = load_subject(arguments.model)
    corpus = build_corpus(arguments.text, subject, arguments.out.with_name("stories260K-corpus"), seed=arguments.seed)
    train(vectors(subject, corpus, "explain", "refine"), arguments)
    dictionary = load_dictionary(str(arguments.out), subject)
    figures = measure(dictionary, vectors(subject, corpus, "test"))
    figures["seconds"] = time.monotonic() - started
    print(json.dumps({"dictionary": str(arguments.out), "hook_point": HOOK_POINT, **figures}, indent=1))


if __name__ == "__main__":
    main()
