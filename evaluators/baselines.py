"""Floors: explanations that must be beaten before a score means anything (PROTOCOLS §11).

`shuffled`  the explanation of another latent of the same run, drawn by seed
`sibling`   the explanation of the most similar latent: by decoder cosine, or by token overlap where there is no decoder
`constant`  one sentence for every latent
`token_list` the marked tokens of the explain windows, listed
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from exegete.tools.explainers import Explanation
from exegete.tools.seeds import generator
from exegete.tools.windows import LatentEvidence

Baseline = Literal["shuffled", "sibling", "constant", "token_list"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)

CONSTANT = Explanation("Any token of any text.", predicate="always", explainer="constant")
"""Says the same of every latent; as a predicate it matches everywhere, so its balanced accuracy is exactly one half."""


def floor_subset(latents: Sequence[int], count: int, seed: int) -> list[int]:
    """Return `count` of the explained latents, drawn by `seed`, ascending; all of them where there are fewer."""
    drawn = generator(seed, "floors", "subset").permutation(len(latents))[:count]
    return sorted(latents[i] for i in drawn)


def shuffled_partners(latents: Sequence[int], seed: int) -> dict[int, int]:
    """Return for each latent another one, each used once: a seeded cyclic permutation. Empty for fewer than two."""
    if len(latents) < 2:
        return {}
    order = [latents[i] for i in generator(seed, "floors", "shuffled").permutation(len(latents))]
    return dict(zip(order, order[1:] + order[:1], strict=True))


def token_overlap_siblings(tokens: Mapping[int, Counter[str]], wanted: Sequence[int]) -> dict[int, int]:
    """Return for each wanted latent the one whose firing tokens overlap most with its own (weighted Jaccard).

    `tokens`: latent → counts of the tokens it fires on in its explain windows. Ties go to the lower latent; a latent with
    no overlap at all is left out.
    """
    holders: dict[str, list[int]] = {}
    for latent in sorted(tokens):
        for token in tokens[latent]:
            holders.setdefault(token, []).append(latent)
    siblings = {}
    for latent in wanted:
        rivals = {other for token in tokens[latent] for other in holders[token]} - {latent}
        best = max(sorted(rivals), key=lambda other: _jaccard(tokens[latent], tokens[other]), default=None)
        if best is not None:
            siblings[latent] = best
    return siblings


def firing_tokens(evidence: LatentEvidence) -> Counter[str]:
    """Return how often each token is marked in the latent's explain windows, white space and case aside."""
    counts: Counter[str] = Counter()
    for window in evidence.select("explain"):
        counts.update(window.tokens[i].strip().casefold() for i in window.firing_positions())
    return counts


def _jaccard(one: Counter[str], other: Counter[str]) -> float:
    union = (one | other).total()
    return (one & other).total() / union if union else 0.0
