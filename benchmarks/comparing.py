"""Measure false discoveries and power of comparing sets of texts. Run `python -m benchmarks.comparing`.

Documents of the bundled corpus are encoded once. Then, for each seed and method:

- `null`: two disjoint random samples of them. Every discovery is false.
- `shifted`: as `null`, but the first side's pooled activation of some latents is raised by `--shift` standard deviations.
  Power is the share of these that are found; the others' discoveries are false.
- `property`: the first side's documents have a DESC in their SQL, the second side's have an ASC. Power is over the
  latents that differ by at least `--shift` standard deviations between all such documents.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack
from scipy.stats import beta

from exegete.tools.bundled import dictionary_path, subject_path
from exegete.tools.bundled.grammar import generate
from exegete.tools.comparing import Comparison, Method, compare
from exegete.tools.dictionary_loaders import load_dictionary
from exegete.tools.effect_sizes import effect_sizes
from exegete.tools.live_model import LiveModel
from exegete.tools.seeds import generator
from exegete.tools.subject import load_subject
from exegete.tools.text_activations import pooled

Indices = NDArray[np.int64]
Sides = tuple[csr_matrix, csr_matrix]
CORPUS_SEED = 20_000
COMMON = 0.1
"""Latents that are raised fire on this share of documents at least: the shift is of texts, not of firings."""


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=4_000, help="of the corpus, encoded once")
    parser.add_argument("--texts", type=int, default=200, help="on each side")
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--planted", type=int, default=20, help="latents that are raised")
    parser.add_argument("--shift", type=float, default=0.8, help="standard deviations")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    matrix, falling, rising = encode(chosen.documents)
    figures: dict[str, Any] = {"options": vars(chosen), "encode_s": round(time.perf_counter() - began, 1)}
    for method in get_args(Method):
        figures[method] = measure(matrix, falling, rising, method, chosen)
    print(json.dumps(figures, indent=1))


def encode(documents: int) -> tuple[csr_matrix, Indices, Indices]:
    """Return the documents' pooled activations, and which of them order downwards and upwards."""
    subject = load_subject(str(subject_path()))
    dictionary = load_dictionary(str(dictionary_path("tests")), subject)
    model = LiveModel(subject, [dictionary])
    examples = list(generate(CORPUS_SEED, documents))
    matrix = pooled(model, dictionary, [model.tokens(example.text) for example in examples])
    words = [example.sql.split() for example in examples]
    falling, rising = (np.flatnonzero([word in sql for sql in words]) for word in ("DESC", "ASC"))
    return matrix, falling, rising


def measure(
    matrix: csr_matrix, falling: Indices, rising: Indices, method: Method, chosen: argparse.Namespace
) -> dict[str, Any]:
    """Return the figures of one method in the three conditions."""
    whole = np.arange(matrix.shape[0])

    def null(seed: int) -> tuple[Sides, Indices]:
        drawn = generator(seed, "texts").permutation(whole)[: 2 * chosen.texts]
        return (matrix[drawn[: chosen.texts]], matrix[drawn[chosen.texts :]]), np.zeros(0, np.int64)

    rates = np.bincount(matrix.indices, minlength=matrix.shape[1]) / len(whole)
    deviation = matrix.toarray().std(0, dtype=np.float64)
    common = np.flatnonzero((rates >= COMMON) & (deviation > 1e-3 * deviation.max()))

    def shifted(seed: int) -> tuple[Sides, Indices]:
        (first, second), _ = null(seed)
        planted = generator(seed, "planted").choice(common, chosen.planted, replace=False)
        raised = np.zeros(matrix.shape[1])
        raised[planted] = chosen.shift * deviation[planted]
        return (csr_matrix(first.toarray() + raised), second), planted

    differing = _differing(matrix[falling], matrix[rising], chosen.shift)

    def by_property(seed: int) -> tuple[Sides, Indices]:
        rng = generator(seed, "property")
        sides = [matrix[rng.choice(part, chosen.texts, replace=False)] for part in (falling, rising)]
        return (sides[0], sides[1]), differing

    seeds = range(chosen.seeds)
    return {
        "null": _figures(null, method, seeds),
        "shifted": _figures(shifted, method, seeds),
        "property": _figures(by_property, method, seeds, all_known=False) | {"documents": [len(falling), len(rising)]},
    }


def _differing(first: csr_matrix, second: csr_matrix, shift: float) -> Indices:
    sides = np.arange(first.shape[0] + second.shape[0]) < first.shape[0]
    return np.flatnonzero(np.abs(effect_sizes(vstack([first, second], format="csr"), sides)["effect"]) >= shift)


def _figures(
    draw: Callable[[int], tuple[Sides, Indices]], method: Method, seeds: range, *, all_known: bool = True
) -> dict[str, Any]:
    began = time.perf_counter()
    found: list[Comparison] = []
    hits, wrong, discoveries = [], [], []
    planted = np.zeros(0, np.int64)
    for seed in seeds:
        sides, planted = draw(seed)
        found.append(compare(*sides, method=method, seed=seed))
        names = [row.latent for row in found[-1].discoveries]
        discoveries.append(len(names))
        hits.append(np.isin(planted, names).mean() if len(planted) else 0.0)
        wrong.append(sum(name not in planted for name in names))
    figures: dict[str, Any] = {
        "seeds": len(seeds),
        "tested": _range([one.tested for one in found]),
        "permutations": _range([one.permutations for one in found]),
        "resolution": max(one.resolution for one in found),
        "resolution_times_tested": round(max(one.resolution * one.tested for one in found), 4),
        "discoveries": _range(discoveries),
        "compare_s": round((time.perf_counter() - began) / len(seeds), 2),
    }
    if len(planted):
        power = {"power": round(float(np.mean(hits)), 4), "power_lowest_seed": round(min(hits), 4)}
        figures |= {"planted": len(planted)} | power
    # Where a property differs, latents outside the list may differ too, by less.
    return figures | (_false(wrong, discoveries) if all_known else {})


def _false(wrong: list[int], discoveries: list[int]) -> dict[str, Any]:
    seeds = sum(count > 0 for count in wrong)
    share = np.mean([count / max(1, total) for count, total in zip(wrong, discoveries, strict=True)])
    return {
        "seeds_with_a_false_discovery": seeds,
        "their_share_interval_95": [round(float(bound), 3) for bound in _exact(seeds, len(wrong))],
        "mean_false_share_of_discoveries": round(float(share), 4),
    }


def _exact(count: int, total: int) -> tuple[float, float]:
    """Return the Clopper–Pearson interval of a share."""
    low = 0.0 if count == 0 else beta.ppf(0.025, count, total - count + 1)
    high = 1.0 if count == total else beta.ppf(0.975, count + 1, total - count)
    return low, high


def _range(values: list[int]) -> list[int]:
    return [min(values), max(values)]


if __name__ == "__main__":
    main()
