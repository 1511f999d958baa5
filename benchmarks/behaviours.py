"""Do attribution and minimal sets find what a behaviour rests on, where the rule is known? `python -m benchmarks.behaviours`.

For every behaviour that the bundled grammar enumerates, on minimal pairs (same length, one cue changed):

1. *Attribution.* The metric is the log-odds of the right token against the one that the changed cue asks for. Of the ten
   latents that attribution ranks highest, the largest exact effect of ablating one alone, against the 95th percentile of
   the absolute effects of 100 random live latents of the same firing rates.
2. *Agreement.* Spearman's correlation of attribution and exact effect over the latents active on the prompts, the 200 of
   largest exact effect at most.
3. *Minimal set, ablated to zero.* Latents found by attribution under ablation (`grow`), pruned (`minimal_set`); a prompt
   flips when the right token is no longer the most probable one. Held-out prompts, beside random sets of that size.
4. *Minimal set, interchanged.* The same, but the latents take the activations that they have on the pair's other prompt; a
   prompt flips when the other prompt's token becomes the more probable of the two.

A behaviour *holds* when 1 is at least 5, and in 3 the set flips at least 80 % of held-out prompts and random sets at most 10 %.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exegete.tools.ablation_sets import ZERO, Ablation, random_sets
from exegete.tools.attribution import LogitDifference, attribute, exact_effects, rank_agreement
from exegete.tools.bundled import dictionary_path, subject_path
from exegete.tools.bundled.behaviours import Behaviour, behaviours
from exegete.tools.bundled.grammar import generate
from exegete.tools.controls import firing_rates
from exegete.tools.dictionaries import Dictionary
from exegete.tools.dictionary_loaders import load_dictionary
from exegete.tools.growing import grow
from exegete.tools.interventions import Tokens
from exegete.tools.judged_behaviours import Behaviour as Judged
from exegete.tools.judged_behaviours import Prefers, Says
from exegete.tools.live_model import LiveModel
from exegete.tools.minimal_set import minimal_set
from exegete.tools.subject import load_subject

LEADERS, RANDOM, LARGEST = 10, 100, 200


@dataclass(frozen=True)
class Bench:
    """What every behaviour is measured with."""

    model: LiveModel
    dictionary: Dictionary
    rates: np.ndarray
    attributed: int
    """Prompts for attribution and exact effects."""
    search: int
    """Prompts on which sets are searched."""
    held_out: int
    groups: int
    """Of latents, each with a path of its own; 0 takes one gradient for all."""
    seed: int


@dataclass(frozen=True)
class Prompts:
    """Minimal pairs as tokens."""

    base: list[Tokens]
    variant: list[Tokens]
    answers: list[int]
    others: list[int]

    def part(self, start: int, stop: int) -> Prompts:
        """Return some of the pairs."""
        some = slice(start, stop)
        return Prompts(self.base[some], self.variant[some], self.answers[some], self.others[some])


def main() -> None:
    """Print one JSON object, and each behaviour's row as it is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subject", type=Path, default=subject_path())
    parser.add_argument("--dictionary", type=Path, default=dictionary_path("tests"))
    parser.add_argument("--only", nargs="*", help="names of behaviours")
    parser.add_argument("--prompts", type=int, nargs=3, default=(16, 48, 48), help="attributed, search, held-out")
    parser.add_argument("--groups", type=int, default=32, help="of latents in attribution; 0 takes one gradient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    subject = load_subject(str(chosen.subject))
    dictionary = load_dictionary(str(chosen.dictionary), subject)
    model = LiveModel(subject, [dictionary], batch_tokens=8_192)
    rates = firing_rates(model, dictionary, [model.tokens(example.text) for example in generate(3, 400)])
    attributed, search, held_out = chosen.prompts
    bench = Bench(model, dictionary, rates, attributed, search, held_out, chosen.groups, chosen.seed)
    rows = []
    for behaviour in behaviours():
        if not chosen.only or behaviour.name in chosen.only:
            rows.append(measure(bench, behaviour))
            print(json.dumps(rows[-1]), flush=True)
    print(json.dumps(summary(rows)))


def measure(bench: Bench, behaviour: Behaviour) -> dict[str, Any]:
    """Return the figures of one behaviour."""
    began = time.perf_counter()
    pairs = drawn(bench, behaviour)
    few = pairs.part(0, bench.attributed)
    row: dict[str, Any] = {"behaviour": behaviour.name, "pairs": len(pairs.base)}
    row |= against_exact(bench, few)
    row |= {f"zero_{key}": value for key, value in smallest(bench, pairs, interchange=False).items()}
    row |= {f"interchange_{key}": value for key, value in smallest(bench, pairs, interchange=True).items()}
    row["holds"] = bool(row["ratio"] >= 5 and (row["zero_flipped"] or 0) >= 0.8 and (row["zero_random"] or 0) <= 0.1)
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def drawn(bench: Bench, behaviour: Behaviour) -> Prompts:
    """Return different minimal pairs, as tokens, as many as are needed (or as the grammar has)."""
    subject = bench.model.subject
    tokens = {piece: token for token, piece in enumerate(subject.pieces)}
    begin = () if subject.bos is None else (subject.bos,)
    found: dict[Tokens, tuple[Tokens, int, int]] = {}
    wanted = bench.search + bench.held_out
    for pair in behaviour.pairs(bench.seed, 3 * wanted):
        base, variant = ((*begin, *(tokens[piece] for piece in side)) for side in (pair.base, pair.variant))
        found.setdefault(base, (variant, tokens[pair.base_answer], tokens[pair.variant_answer]))
        if len(found) == wanted:
            break
    variants, answers, others = zip(*found.values(), strict=True)
    return Prompts(list(found), list(variants), list(answers), list(others))


def against_exact(bench: Bench, pairs: Prompts) -> dict[str, Any]:
    """Return how attribution's leaders and its order compare with exact effects."""
    model, dictionary = bench.model, bench.dictionary
    metric = LogitDifference(pairs.answers, pairs.others)
    paths = bool(bench.groups)
    found = attribute(
        model,
        dictionary,
        pairs.base,
        metric,
        steps=int(paths),
        groups=max(1, bench.groups),
        top=dictionary.latents,
        exact=0,
    )
    active = found.active
    exact = exact_effects(model, dictionary, pairs.base, metric, active.tolist()).mean(1)
    estimates = found.by_prompt(active).mean(1)
    leaders = active[np.argsort(-estimates)[:LEADERS]]
    control = random_effects(bench, pairs.base, metric, leaders.tolist())
    largest = np.argsort(-np.abs(exact))[:LARGEST]
    agreement = rank_agreement(estimates[largest], exact[largest])
    best = float(max(exact[active == leader][0] for leader in leaders))
    return {
        "log_odds": round(float(found.clean.mean()), 2),
        "best_effect": round(best, 3),
        "random_95": round(control, 4),
        "ratio": round(best / max(control, 1e-9), 1),
        "rank": round(agreement.value, 3),
        "rank_low": round(agreement.low, 3),
        "rank_latents": agreement.n,
        "error_share": round(found.error_share.value, 3),
    }


def random_effects(bench: Bench, prompts: Sequence[Tokens], metric: LogitDifference, leaders: Sequence[int]) -> float:
    """Return the 95th percentile of the absolute mean effects of random live latents of the leaders' firing rates."""
    sets = random_sets(leaders, bench.rates, RANDOM // len(leaders), bench.seed)
    latents = sorted({latent for one in sets for latent in one})
    effects = exact_effects(bench.model, bench.dictionary, prompts, metric, latents).mean(1)
    by_latent = dict(zip(latents, np.abs(effects), strict=True))
    return float(np.quantile([by_latent[latent] for one in sets for latent in one], 0.95))


def smallest(bench: Bench, pairs: Prompts, interchange: bool) -> dict[str, Any]:
    """Return what a minimal set does to held-out prompts, beside random sets of its size."""
    answers = dict(zip(pairs.base, pairs.answers, strict=True))
    others = dict(zip(pairs.base, pairs.others, strict=True))
    judge: Judged = Prefers(answers, others) if interchange else Says(answers)
    ablation = Ablation(sources=dict(zip(pairs.base, pairs.variant, strict=True))) if interchange else ZERO
    split = min(bench.search, len(pairs.base) * 3 // 5)
    search, held_out = pairs.part(0, split), pairs.part(split, len(pairs.base))
    metric = LogitDifference(search.answers, search.others)
    grown = grow(bench.model, bench.dictionary, search.base, metric, judge, ablation=ablation, most=128)
    found = minimal_set(
        bench.model,
        bench.dictionary,
        grown.latents,
        search.base,
        judge,
        held_out=held_out.base,
        wanted=min(0.95, max(grown.flipped)),
        ablation=ablation,
        rates=bench.rates,
        seed=bench.seed,
    )
    result: dict[str, Any] = {"status": found.status, "grown": len(grown.latents), "size": len(found.latents)}
    result["search"] = round(found.search.flipped.value, 3)
    if found.held_out is None:
        return result | {"flipped": None, "random": None, "n": 0}
    held = found.held_out
    result |= {"flipped": round(held.flipped.value, 3), "low": round(held.flipped.low, 3), "n": held.flipped.n}
    return result | {
        "random": None if held.random.mean is None else round(held.random.mean, 4),
        "random_95": None if held.random.high is None else round(held.random.high, 4),
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the shares of behaviours that hold, in all and by part."""

    def share(test: Any) -> str:
        return f"{sum(bool(test(row)) for row in rows)} of {len(rows)}"

    return {
        "holds": share(lambda row: row["holds"]),
        "ratio of 5": share(lambda row: row["ratio"] >= 5),
        "rank of 0.8": share(lambda row: row["rank"] >= 0.8),
        "zero": share(lambda row: (row["zero_flipped"] or 0) >= 0.8 and (row["zero_random"] or 0) <= 0.1),
        "interchange": share(
            lambda row: (row["interchange_flipped"] or 0) >= 0.8 and (row["interchange_random"] or 0) <= 0.1
        ),
        "median rank": float(np.median([row["rank"] for row in rows])),
        "smallest n": min(row["zero_n"] for row in rows),
        "minutes": round(sum(row["seconds"] for row in rows) / 60, 1),
    }


if __name__ == "__main__":
    main()
