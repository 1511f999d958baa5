"""Latents planted in the bundled subject's dictionary, for evaluators that run it.

1. Four kinds replace the last latents of the bundled dictionary: `output` never fires and writes the unembedding of its
   words; `input` fires on its words and writes a random direction; `both` fires on its words and writes them; `random`
   never fires and writes a random direction.
2. Who fires does so by a logistic regression on the subject's own activations, with the threshold of the best F1 for its
   words, scaled so that their median is 10. What it fires on is then measured, not assumed.
3. Windows are documents of the grammar that the subject was not trained on, cut somewhere in their SQL: there the subject
   knows how to go on. (Windows of 32 tokens begin anywhere; few of their next tokens are open, and planted latents act on few.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exegete.agent.audit_bank import documents, live_truths
from exegete.agent.gathering import BUNDLED, open_dictionary, open_subject
from exegete.evaluators.audit import Case
from exegete.evaluators.audit_evidence import Floats, Pool, Texts, evidence
from exegete.evaluators.audit_truths import Truth, corrupted
from exegete.tools.blas_threads import one_blas_thread
from exegete.tools.controls import firing_rates
from exegete.tools.dictionaries import PlainDictionary
from exegete.tools.interventions import Tokens
from exegete.tools.live_model import LiveModel, Reading, Trial
from exegete.tools.seeds import derive_seed, generator
from exegete.tools.subject import Subject
from exegete.tools.text_activations import activations
from exegete.tools.windows import Split

Rows = NDArray[np.float64]
Kind = Literal["output", "input", "both", "random"]
KINDS: tuple[Kind, ...] = get_args(Kind)

TRUTHS: dict[Kind, str] = {"output": "written", "input": "read", "both": "both"}
RANDOM_LATENTS = 100
"""Many, so that a control is rarely another planted latent."""
DISCRIMINANT_DOCUMENTS = 500
RIDGE = 1e-2
OTHER_TOKENS = 4_000
"""Tokens beside the words that a discriminant is fitted on."""
STRENGTH = 10.0
NEVER = -1e6


@dataclass(frozen=True)
class Bench:
    """A live model with planted latents."""

    model: LiveModel
    dictionary: PlainDictionary
    rates: NDArray[np.float64]
    """Share of tokens on which each latent fires, shape (latent,)."""
    cases: Mapping[Kind, Sequence[Case]]
    """Of each kind but the random latents."""


def bench(seed: int, latents: int, windows: int, *, device: str | None = None) -> Bench:
    """Return the bundled subject with planted latents.

    Args:
        seed: of everything random.
        latents: of each kind, at most; there are as many as the bank has truths for.
        windows: of each kind of window, in the refine and the test split.
        device: torch device of the subject.
    """
    from exegete.agent.config import SubjectConfig

    subject = open_subject(SubjectConfig(name=BUNDLED, device=device or "cpu"))
    base = open_dictionary(f"{BUNDLED}:tests", subject)
    assert isinstance(base, PlainDictionary)
    named = {kind: _spelled(subject, live_truths(seed)[name])[:latents] for kind, name in TRUTHS.items()}
    planted, places = plant(subject, base, named, seed)
    model = LiveModel(subject, [planted])
    counts: dict[Split, int] = {"explain": 40, "refine": 2 * windows, "test": 4 * windows}
    whole, cut_off = (
        {split: [model.tokens(text) for text in documents(split, count, seed, whole=one)] for split, count in counts.items()}
        for one in (True, False)
    )  # fmt: skip
    rates = firing_rates(model, planted, [prompt for prompts in whole.values() for prompt in prompts])
    cases = {
        kind: _cases(
            model, planted, dict(zip(places[kind], truths, strict=True)), kind,
            cut_off if kind == "output" else whole, windows, seed,
        )
        for kind, truths in named.items()
    }  # fmt: skip
    return Bench(model, planted, rates, cases)


def plant(
    subject: Subject, base: PlainDictionary, truths: Mapping[Kind, Sequence[Truth]], seed: int
) -> tuple[PlainDictionary, dict[Kind, list[int]]]:
    """Return the dictionary with planted latents in its last places, and which places each kind has.

    Args:
        subject: whose unembedding is written.
        base: the dictionary, of the subject's residual stream.
        truths: what the latents of each kind write or read; their words are single tokens. There are random latents beside.
        seed: of the random directions.
    """
    counts = {kind: len(truths[kind]) if kind in truths else RANDOM_LATENTS for kind in KINDS}
    first = base.latents - sum(counts.values())
    places: dict[Kind, list[int]] = {}
    for kind in KINDS:
        places[kind] = list(range(first, first + counts[kind]))
        first += counts[kind]
    encoder, bias, decoder = base.encoder.clone(), base.encoder_bias.clone(), base.decoder.clone()
    bias[places["output"][0] :] = NEVER
    for kind, at in places.items():
        drawn = generator(seed, "planted directions", kind).standard_normal((len(at), decoder.shape[1]))
        decoder[at] = torch.from_numpy(drawn).to(decoder)
        if kind in ("output", "both"):
            decoder[at] = torch.stack([_written(subject, truth) for truth in truths[kind]])
        decoder[at] /= decoder[at].norm(dim=-1, keepdim=True)
    read: list[Kind] = ["input", "both"]
    readers, offsets = _discriminants(subject, base, [truth for kind in read for truth in truths[kind]], seed)
    reading = [place for kind in read for place in places[kind]]
    encoder[:, reading], bias[reading] = readers, offsets
    name = f"{base.name} with planted latents"
    planted = replace(
        base, name=name, fingerprint=f"{base.fingerprint}-planted-{derive_seed(seed, *(t.name for some in truths.values() for t in some))}",
        encoder=encoder, encoder_bias=bias, decoder=decoder,
    )  # fmt: skip
    return planted, places


def _spelled(subject: Subject, truths: Sequence[Truth]) -> list[Truth]:
    """Return the truths, each without the words that are no token of the subject; at least two are left of each."""
    pieces = frozenset(subject.pieces)
    found = []
    for truth in truths:
        (sense,) = truth.senses
        kept = tuple(word for word in sense.words if f" {word}" in pieces)
        if len(kept) > 1:
            found.append(Truth(truth.name, (replace(sense, words=kept),)))
    return found


def _written(subject: Subject, truth: Truth) -> Tensor:
    """Return the mean unembedding of the words over that of all tokens, shape (width,)."""
    unembedding = subject.bridge.W_U.detach()
    (sense,) = truth.senses
    tokens = [subject.pieces.index(f" {word}") for word in sense.words]
    written: Tensor = unembedding[:, tokens].mean(-1) - unembedding.mean(-1)
    return written


def _discriminants(
    subject: Subject, base: PlainDictionary, truths: Sequence[Truth], seed: int
) -> tuple[Tensor, Tensor]:
    """Return encoder columns (width, truth) and biases (truth,) that tell the words of each truth from other tokens."""
    model = LiveModel(subject, [base])
    # Any documents will do here, and those that are kept back are slower to draw.
    texts = documents("explain", DISCRIMINANT_DOCUMENTS, derive_seed(seed, "fit"), whole=True, part=None)
    prompts = [model.tokens(text) for text in texts]

    def read(reading: Reading) -> list[Tensor]:
        return [reading.of(base.hook_point, row).cpu() for row in range(len(reading.batch.trials))]

    found = torch.cat(model.run([Trial(p) for p in prompts], read, keep="none", points=[base.hook_point]))
    vectors = found.double().numpy()
    spelled = [subject.pieces[token].strip().lower() for prompt in prompts for token in prompt]
    shift = np.zeros(vectors.shape[1]) if base.input_shift is None else base.input_shift.cpu().double().numpy()
    with one_blas_thread():
        values, axes = np.linalg.eigh(np.cov(vectors.T))
        whitening = axes / np.sqrt(values + RIDGE)
        masks = [np.array([piece in {w.lower() for w in t.senses[0].words} for piece in spelled]) for t in truths]
        seeds = [derive_seed(seed, "others", truth.name) for truth in truths]
        directions = [_fitted(vectors, whitening, *given) for given in zip(masks, seeds, strict=True)]
    readers, offsets = [], []
    for of_words, direction in zip(masks, directions, strict=True):
        scores = vectors @ direction
        border = _border(scores, of_words)
        scale = STRENGTH / (np.median(scores[of_words & (scores > border)]) - border)
        readers.append(scale * direction)
        offsets.append(scale * float(shift @ direction - border))
    return torch.tensor(np.stack(readers, axis=1)).to(base.encoder), torch.tensor(offsets).to(base.encoder_bias)


def _fitted(vectors: Rows, whitening: Rows, of_words: NDArray[np.bool_], seed: int) -> Rows:
    """Return the weights (width,) of a logistic regression on all tokens of the words and a sample of the others."""
    from sklearn.linear_model import LogisticRegression

    others = generator(seed, "sample").permutation(np.flatnonzero(~of_words))[:OTHER_TOKENS]
    rows = np.concatenate([np.flatnonzero(of_words), others])
    # In whitened columns it converges in a few steps.
    fitted = LogisticRegression(max_iter=100, tol=1e-3, class_weight="balanced").fit(
        vectors[rows] @ whitening, of_words[rows]
    )
    weights: Rows = whitening @ fitted.coef_[0]
    return weights


def _border(scores: Rows, of_words: NDArray[np.bool_]) -> float:
    """Return the threshold on `scores` (token,) above which F1 for `of_words` is best, halfway to the next score below."""
    order = np.argsort(-scores)
    ranked, hits = scores[order], np.cumsum(of_words[order])
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + of_words.sum())
    best = min(int(f1.argmax()), len(order) - 2)
    return float((ranked[best] + ranked[best + 1]) / 2)


def _cases(
    model: LiveModel,
    dictionary: PlainDictionary,
    truths: Mapping[int, Truth],
    kind: Kind,
    prompts: Mapping[Split, Sequence[Tokens]],
    windows: int,
    seed: int,
) -> list[Case]:
    begin = "Makes likelier: " if kind == "output" else ""
    pieces = model.subject.pieces
    first = 0 if model.subject.bos is None else 1
    runs: Texts = {
        split: [tuple(pieces[token] for token in prompt[first:]) for prompt in found]
        for split, found in prompts.items()
    }
    latents = list(truths)
    read = {split: activations(model, dictionary, list(found), latents) for split, found in prompts.items()}
    pool, known = Pool(runs, None), {}
    for place, (latent, truth) in enumerate(truths.items()):
        values: dict[Split, list[Floats]] = {
            split: [np.asarray(one[first:, place], dtype=np.float32) for one in found] for split, found in read.items()
        }
        known[latent] = evidence(latent, truth, pool, values, windows, seed)
    # Siblings are told by what fires: a latent that never does has none.
    wrong = corrupted(truths, known, seed, begin)
    return [
        Case(latent, truth.explanation(begin=begin), wrong[latent], known[latent]) for latent, truth in truths.items()
    ]
