"""Documents → fixed-length contexts of tokens on disk, memory-mapped, each of one split (PROTOCOLS §1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exegete.tools.subject import Subject
from exegete.tools.windows import CONTEXT_TOKENS, Split

DEFAULT_SPLITS: Mapping[Split, float] = {"explain": 0.5, "refine": 0.2, "test": 0.3}


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus, opened for reading. Make one with `build_corpus` or `Corpus.open`."""

    folder: Path
    fingerprint: str
    contexts: int
    context_tokens: int
    counts: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """Open the corpus in `folder`. Raises UserError where there is none, or it is unfinished or damaged."""
        raise NotImplementedError

    def tokens(self, start: int, stop: int) -> NDArray[np.int32]:
        """Return the tokens of contexts `start` … `stop`, shape (context, position)."""
        raise NotImplementedError

    def mask(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return where a latent may count as firing (not BOS, special or padding), shape (context, position)."""
        raise NotImplementedError

    def split_of(self, contexts: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the index into SPLITS of each context, shape of `contexts`."""
        raise NotImplementedError

    def document_of(self, contexts: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the document number at each (context, position), −1 for padding; same shape as the arguments."""
        raise NotImplementedError

    def usable(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return which windows count, shape (context, window): not padding only, and not recurring in another split.

        A window's id is `context * (context_tokens // WINDOW_TOKENS) + index`.
        """
        raise NotImplementedError


def build_corpus(
    source: str,
    subject: Subject,
    folder: Path,
    *,
    seed: int,
    context_tokens: int = CONTEXT_TOKENS,
    splits: Mapping[Split, float] = DEFAULT_SPLITS,
    text_field: str = "text",
    separator: str | None = None,
    limit_documents: int | None = None,
    limit_tokens: int | None = None,
) -> Corpus:
    """Tokenise `source` into `folder`, or reuse what is there if it was built from the same."""
    raise NotImplementedError
