"""The bundled subject with planted latents, for tests of evaluators that run it.

`PLANTED` never fires on input and writes the unembedding of a few words of SQL; `CONSTANT` fires on every token alike and
writes the same, too faintly to be seen; the latents from `DEAD` on never fire and write random directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from exegete.tools.bundled import dictionary_path, subject_path
from exegete.tools.bundled.grammar import generate
from exegete.tools.dictionaries import PlainDictionary
from exegete.tools.dictionary_loaders import load_dictionary
from exegete.tools.live_model import LiveModel
from exegete.tools.seeds import generator
from exegete.tools.subject import load_subject
from exegete.tools.windows import LatentEvidence, Split, Window

WORDS = (" AVG", " SUM", " MAX", " MIN")
CONSTANT, PLANTED, DEAD = 999, 1000, 1001


@cache
def planted_model() -> LiveModel:
    """Return the live model with the one dictionary `planted`."""
    subject = load_subject(str(subject_path()))
    loaded = load_dictionary(str(dictionary_path("tests")), subject)
    assert isinstance(loaded, PlainDictionary)
    bias, decoder = loaded.encoder_bias.clone(), loaded.decoder.clone()
    bias[PLANTED:] = -1e6
    random = generator(0, "dead latents").standard_normal(tuple(decoder[DEAD:].shape))
    decoder[DEAD:] = torch.from_numpy(random).float()
    unembedding = subject.bridge.W_U.detach()
    chosen = unembedding[:, [subject.pieces.index(word) for word in WORDS]]
    decoder[PLANTED] = chosen.mean(-1) - unembedding.mean(-1)
    decoder[PLANTED:] /= decoder[PLANTED:].norm(dim=-1, keepdim=True)
    # Active everywhere at 100, and 100 of these write a vector of length 1.
    encoder = loaded.encoder.clone()
    encoder[:, CONSTANT], bias[CONSTANT], decoder[CONSTANT] = 0.0, 100.0, decoder[PLANTED] / 100
    planted = replace(
        loaded, encoder=encoder, name="planted", fingerprint="sha256:planted", encoder_bias=bias, decoder=decoder
    )
    return LiveModel(subject, [planted])


@cache
def rates() -> np.ndarray:
    """Return made-up firing rates: none from `PLANTED` on."""
    found = np.linspace(0.01, 0.1, planted_model().dictionary().latents)
    found[PLANTED:] = 0.0
    return found


def random_windows(latent: int, count: int = 20, splits: Sequence[Split] = ("refine", "test")) -> LatentEvidence:
    """Return windows of the grammar's text, cut somewhere in the SQL, on which nothing fires."""
    model, windows = planted_model(), []
    for number, split in enumerate(splits):
        for index, example in enumerate(generate(11 + number, count, "held_out")):
            tokens = model.tokens(example.text)
            pieces = tuple(model.subject.pieces[token] for token in tokens[: -(4 + index % 5)])
            silent = np.zeros(len(pieces), dtype=np.float32)
            windows.append(Window(1_000 * number + index, pieces, silent, False, split, "random"))
    return LatentEvidence(latent, "dead", tuple(windows))
