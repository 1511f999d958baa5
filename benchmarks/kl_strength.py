"""How many latents reach KL 0.5 within 10 % in at most 10 batches (PROTOCOLS §8).

1. Documents are drawn from the bundled grammar with a seed that no training used.
2. Every latent that fires on them gets up to `--prompts` prompts: documents drawn at random among those on which it fires,
   each cut just after its first firing token.
3. All latents are steered from the last prompt token on, and their strengths matched in common calls.
4. Those that did not reach the target are steered with 61 strengths from a hundredth to ten thousand, a factor of 1.26 apart:
   `largest_kl` says whether any would have done.

`python -m benchmarks.kl_strength` prints one JSON object. With `--per-batch 1` a batch tries one strength only; with
`--cut random` the prompts are documents cut anywhere instead, whether the latent fires or not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from exegete.tools.bundled import dictionary_path, subject_path, write_corpus
from exegete.tools.codes import blocks
from exegete.tools.dictionaries import Dictionary
from exegete.tools.dictionary_loaders import load_dictionary
from exegete.tools.effects import kl_divergences
from exegete.tools.interventions import Tokens, steer
from exegete.tools.live_model import LiveModel, Reading, Trial
from exegete.tools.seeds import generator
from exegete.tools.strength import Make, Matched, match_strengths
from exegete.tools.subject import load_subject


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dictionary", default=str(dictionary_path("tests")))
    parser.add_argument("--subject", default=str(subject_path()))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--documents", type=int, default=1_000)
    parser.add_argument("--prompts", type=int, default=8, help="for each latent, at most")
    parser.add_argument("--cut", choices=["firing", "random"], default="firing", help="where documents are cut")
    parser.add_argument("--sign", type=int, choices=[1, -1], default=1, help="-1 steers downwards")
    parser.add_argument("--latents", type=int, default=None, help="only the first so many live ones")
    parser.add_argument("--per-batch", type=int, default=4, help="strengths that one batch tries")
    parser.add_argument("--target-kl", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=77)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    subject = load_subject(chosen.subject, device=chosen.device)
    dictionary = load_dictionary(chosen.dictionary, subject)
    model = LiveModel(subject, [dictionary])
    texts = documents(model, chosen.seed, chosen.documents)
    prompts = firing_prompts(model, dictionary, texts, chosen.prompts)
    fires = len(prompts)
    live = sorted(prompts)[: chosen.latents]
    if chosen.cut == "random":
        prompts = {latent: random_prompts(texts, latent, chosen.prompts) for latent in live}
    begin = time.perf_counter()
    found = match_strengths(
        model,
        [_steering(dictionary, latent, chosen.sign) for latent in live],
        [prompts[latent] for latent in live],
        target_kl=chosen.target_kl,
        per_batch=chosen.per_batch,
    )
    wall = round(time.perf_counter() - begin, 1)
    missed = [latent for latent, one in zip(live, found, strict=True) if one.status != "matched"]
    largest = {latent: scan(model, _steering(dictionary, latent, chosen.sign), prompts[latent]) for latent in missed}
    reachable = sum(kl >= 0.9 * chosen.target_kl for kl in largest.values()) + len(live) - len(missed)
    figures = {"latents": dictionary.latents, "live": fires, **_figures(live, found, largest), "reachable": reachable}
    settings = {name: value for name, value in vars(chosen).items() if name not in ("dictionary", "subject")}
    print(json.dumps(figures | {"wall_s": wall, "settings": settings}, indent=1))


def documents(model: LiveModel, seed: int, count: int) -> list[Tokens]:
    """Return the tokens of documents of the grammar, cut to the subject's context."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.jsonl"
        write_corpus(path, seed, count)
        texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    begin = () if model.subject.bos is None else (model.subject.bos,)
    return [(*begin, *tokens)[: model.subject.max_context] for tokens in model.subject.encode(texts)]


def firing_prompts(
    model: LiveModel, dictionary: Dictionary, texts: Sequence[Tokens], most: int
) -> dict[int, list[Tokens]]:
    """Return for each latent that fires up to `most` texts drawn at random, cut just after its first firing token."""
    firsts = np.stack(_first_firings(model, dictionary, texts))
    found: dict[int, list[Tokens]] = {}
    for latent in range(dictionary.latents):
        rows = np.flatnonzero(firsts[:, latent] >= 0)
        drawn = generator(0, "kl_strength", latent).permutation(rows)[:most]
        cut = [texts[row][: firsts[row, latent] + 1] for row in drawn]
        if cut:
            found[latent] = list(dict.fromkeys(cut))
    return found


def random_prompts(texts: Sequence[Tokens], latent: int, count: int) -> list[Tokens]:
    """Return documents drawn at random, each cut anywhere."""
    rng = generator(0, "kl_strength", "random", latent)
    rows = rng.permutation(len(texts))[:count]
    return [texts[row][: rng.integers(2, len(texts[row]))] for row in rows]


def scan(model: LiveModel, make: Make, prompts: Sequence[Tokens]) -> float:
    """Return the largest mean KL over a fine grid of strengths."""
    strengths = np.logspace(-2, 4, 61)
    trials = [Trial(tokens, make(float(strength))) for strength in strengths for tokens in prompts]
    return float(np.reshape(kl_divergences(model, trials), (len(strengths), -1)).mean(1).max())


def _first_firings(model: LiveModel, dictionary: Dictionary, texts: Sequence[Tokens]) -> list[np.ndarray]:
    """Return for each text at which token each latent fires first, shape (latent,); -1 where it does not."""
    special = model.subject.special_tokens

    def first(row: int, reading: Reading) -> np.ndarray:
        x = reading.of(dictionary.hook_point, row)
        codes = (
            [dictionary.encode(x[None])[0]] if dictionary.conditioned else map(dictionary.encode, blocks(x, dictionary))
        )
        fires = torch.cat([code > 0 for code in codes]).cpu().numpy()
        fires[[token in special for token in reading.batch.trials[row].tokens]] = False
        return np.where(fires.any(0), fires.argmax(0), -1).astype(np.int32)

    def read(reading: Reading) -> list[np.ndarray]:
        return [first(row, reading) for row in range(len(reading.batch.trials))]

    return model.run([Trial(tokens) for tokens in texts], read, keep="none", points=[dictionary.hook_point])


def _steering(dictionary: Dictionary, latent: int, sign: int) -> Make:
    return lambda strength: steer(dictionary.fingerprint, [latent], sign * strength)


def _figures(latents: Sequence[int], found: Sequence[Matched], largest: Mapping[int, float]) -> dict[str, Any]:
    matched = [one for one in found if one.status == "matched"]
    unreachable = [(latent, one) for latent, one in zip(latents, found, strict=True) if one.status != "matched"]
    strengths = [one.strength for one in matched if one.strength is not None]
    evaluations = [len(one.tried) for one in found]
    return {
        "searched": len(found),
        "matched": len(matched),
        "share_matched": round(len(matched) / len(found), 4),
        "unreachable": [
            {"latent": latent, "nearest_kl": one.kl, "largest_kl": largest[latent], "batches": one.batches, "n": one.n}
            for latent, one in unreachable
        ],
        "batches": {"median": median(one.batches for one in found), "max": max(one.batches for one in found)},
        "batches_counted": dict(sorted(Counter(one.batches for one in found).items())),
        "strengths_tried": {"median": median(evaluations), "max": max(evaluations)},
        "strength": {"least": min(strengths, default=None), "most": max(strengths, default=None)},
        "prompts": {"median": median(one.n for one in found), "least": min(one.n for one in found)},
    }


if __name__ == "__main__":
    main()
