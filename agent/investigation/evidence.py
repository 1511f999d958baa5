"""Windows of latents for an investigation: the store's, or made here from the bench's texts. Never of the test split.

1. Where the store has evidence of this dictionary, it is read for the purpose `refine`: what that may not see is not read.
2. Else the bench's texts run through the model and are cut into windows of 32 tokens. A text belongs to `explain` or
   `refine` by a hash of its words, so that equal texts are in one split; there is no test split that could be seen.
3. Their order is drawn by the seed: whoever takes the first ones has a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exegete.agent.investigation.bench import Bench
from exegete.tools.errors import ToolError
from exegete.tools.evidence import Evidence
from exegete.tools.seeds import derive_seed, generator
from exegete.tools.store import Store
from exegete.tools.windows import WINDOW_TOKENS, LatentEvidence, Split, Window

MOST_TEXTS = 1_000


@dataclass(frozen=True)
class Gathered:
    """What is known of some latents."""

    evidence: tuple[LatentEvidence, ...]
    """In the order that was asked for, of the splits explain and refine."""
    source: str
    """Where the windows come from, in words."""


def gathered(bench: Bench, latents: Sequence[int]) -> Gathered:
    """Return the evidence of `latents`.

    Raises:
        ToolError: there is neither evidence nor a text, or the store's evidence lacks one of them.
    """
    stored = stored_evidence(bench)
    if stored is None:
        return _of_texts(bench, latents)
    found = {own.latent: own for own in stored.read(latents, "refine")}
    if missing := [latent for latent in latents if latent not in found]:
        raise ToolError(f"the store has no evidence of latent {missing[0]}")
    return Gathered(tuple(found[latent] for latent in latents), "the store's evidence, splits explain and refine")


def stored_evidence(bench: Bench) -> Evidence | None:
    """Return the store's evidence of the bench's dictionary, None where it has none."""
    if bench.live.store is None:
        return None
    folder = Store.open(bench.live.store).evidence_folder(bench.live.dictionary.fingerprint)
    return Evidence.open(folder) if (folder / "evidence.json").exists() else None


def firing_latents(bench: Bench) -> NDArray[np.int64]:
    """Return the latents that fire often enough to be looked at, ascending, shape (firing latent,)."""
    stored = stored_evidence(bench)
    return np.flatnonzero(bench.rates > 0) if stored is None else stored.live


def _of_texts(bench: Bench, latents: Sequence[int]) -> Gathered:
    from exegete.tools.text_activations import activations

    texts = list(dict.fromkeys(bench.texts))[:MOST_TEXTS]
    if not texts:
        raise ToolError("there is no evidence in a store and no other text to look at (--texts); use activations")
    model = bench.live.model
    tokens = [model.tokens(text) for text in texts]
    codes = activations(model, bench.live.dictionary, tokens, latents)
    cuts: list[tuple[int, int, Split, tuple[str, ...]]] = []
    for number, (text, own) in enumerate(zip(texts, tokens, strict=True)):
        split: Split = "refine" if derive_seed(bench.seed, "split of texts", text) % 2 else "explain"
        begin = next((i for i, token in enumerate(own) if token not in model.subject.special_tokens), len(own))
        for start in range(begin, len(own), WINDOW_TOKENS):
            pieces = tuple(model.subject.pieces[token] for token in own[start : start + WINDOW_TOKENS])
            cuts.append((number, start, split, pieces))
    order = generator(bench.seed, "windows of texts").permutation(len(cuts)).tolist()
    found = tuple(
        LatentEvidence(
            latent, "live", tuple(_window(i, cuts[i], codes, place) for i in order), sealed=frozenset({"test"})
        )
        for place, latent in enumerate(latents)
    )
    return Gathered(found, f"{len(texts)} other texts, cut into {len(cuts)} windows")


def _window(
    number: int,
    cut: tuple[int, int, Split, tuple[str, ...]],
    codes: Sequence[NDArray[np.float32]],
    place: int,
) -> Window:
    text, start, split, pieces = cut
    values = codes[text][start : start + len(pieces), place]
    fires = bool((values > 0).any())
    return Window(number, pieces, values, fires, split, "firing" if fires else "random", document=f"text {text}")
