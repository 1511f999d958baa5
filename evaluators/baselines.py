"""Floors: explanations that must be beaten before a score means anything (PROTOCOLS §11).

`shuffled`  the explanation of another latent of the same run, drawn by seed
`sibling`   the explanation of the most similar latent: by decoder cosine, or by token overlap where there is no decoder
`constant`  one sentence for every latent
`token_list` the marked tokens of the explain windows, listed
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from exegete.tools.explainers import Explanation
from exegete.tools.seeds import generator
from exegete.tools.windows import LatentEvidence

Baseline = Literal["shuffled", "sibling", "constant", "token_list"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)

Latents = Sequence[int] | NDArray[np.int64]

CONSTANT = Explanation("Any token of any text.", predicate="always", explainer="constant")
"""Says the same of every latent; as a predicate it matches everywhere, so its balanced accuracy is exactly one half."""


def floor_subset(latents: Latents, count: int, seed: int) -> list[int]:
    """Return `count` of the explained latents, drawn by `seed`, ascending; all of them where there are fewer."""
    drawn = generator(seed, "floors", "subset").permutation(len(latents))[:count]
    return sorted(np.asarray(latents, dtype=np.int64)[drawn].tolist())


def shuffled_partners(latents: Latents, seed: int, wanted: Latents | None = None) -> dict[int, int]:
    """Return for each of `latents` another one, each used once: a seeded cyclic permutation. Empty for fewer than two.

    `wanted`: only for these of them; as arrays, a million latents are no dictionary.
    """
    if len(latents) < 2:
        return {}
    known = np.asarray(latents, dtype=np.int64)
    order = known[generator(seed, "floors", "shuffled").permutation(len(known))]
    asked = np.ones(len(known), dtype=np.bool_) if wanted is None else np.isin(order, np.asarray(wanted, np.int64))
    return dict(zip(order[asked].tolist(), np.roll(order, -1)[asked].tolist(), strict=True))


def token_overlap_siblings(
    own: Mapping[int, Counter[str]], others: Iterable[tuple[int, Counter[str]]]
) -> dict[int, int]:
    """Return for each latent of `own` the one of `others` whose firing tokens overlap most with its own (weighted Jaccard).

    Both: latents and the counts of the tokens that they fire on in their explain windows; `others`, which may be many, are
    drawn one by one. Ties go to the lower latent; a latent is not its own sibling, and one with no overlap is left out.
    """
    best: dict[int, tuple[float, int]] = {}
    for other, theirs in others:
        for latent, tokens in own.items():
            # Most latents share no token, and that is quickly seen.
            if other != latent and not tokens.keys().isdisjoint(theirs):
                rival = (_jaccard(tokens, theirs), -other)
                best[latent] = max(best.get(latent, rival), rival)
    return {latent: -best[latent][1] for latent in own if latent in best}


def firing_tokens(evidence: LatentEvidence) -> Counter[str]:
    """Return how often each token is marked in the latent's explain windows, white space and case aside."""
    counts: Counter[str] = Counter()
    for window in evidence.select("explain"):
        counts.update(window.tokens[i].strip().casefold() for i in window.firing_positions())
    return counts


def _jaccard(one: Counter[str], other: Counter[str]) -> float:
    union = (one | other).total()
    return (one & other).total() / union if union else 0.0
