"""Documents → fixed-length contexts of tokens on disk, memory-mapped, each of one split (PROTOCOLS §1).

1. Documents are read one at a time (`corpus_readers`). Exact duplicates, up to case and white space, are dropped.
2. A keyed hash of the normalised content assigns each document to `explain`, `refine` or `test`.
3. Tokens are packed into contexts of one split: beginning of text (where the subject has one), a document, beginning of
   text, the next document, … A document that does not fit continues in the next context, after a beginning of its own.
   Only the last context of a split is padded.
4. Contexts of the splits are interleaved evenly, so that any run of contexts holds all splits in their proportions.
5. Windows whose tokens recur in another split are marked unusable and counted.

The folder, written beside its place and renamed when it is complete:

    corpus.json             parameters, counts, fingerprint; written last
    tokens.npy              (context, position), uint16 where the vocabulary allows, else int32
    lengths.npy             (context,) positions that are not padding
    splits.npy              (context,) index into SPLITS
    segment_starts.npy      (segment,) context * context_tokens + position where a document begins or continues
    segment_documents.npy   (segment,) its number, in order of reading
    usable.npy              (context, window)

Memory does not grow with the corpus.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exegete.tools.corpus_building import pack_documents, place_contexts
from exegete.tools.corpus_readers import Source
from exegete.tools.corpus_recurrence import find_usable_windows
from exegete.tools.errors import UserError
from exegete.tools.seeds import digest
from exegete.tools.windows import CONTEXT_TOKENS, SPLITS, WINDOW_TOKENS, Split

if TYPE_CHECKING:
    from exegete.tools.subject import Subject

DEFAULT_SPLITS: Mapping[Split, float] = {"explain": 0.5, "refine": 0.2, "test": 0.3}

_FORMAT = 1
"""Changes when the same inputs would give other contexts."""
_ARRAYS = ("tokens", "lengths", "splits", "segment_starts", "segment_documents", "usable")


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus, opened for reading. Make one with `build_corpus` or `Corpus.open`."""

    folder: Path
    fingerprint: str
    """`sha256:…` over the parameters, the tokenizer and the content."""
    contexts: int
    context_tokens: int
    counts: Mapping[str, Any]
    """`documents`, `tokens`, `duplicates`, `empty`, `invalid_utf8`, `recurring_windows`, `usable_windows`, and in
    `splits` for each its `documents`, `contexts` and `tokens`. Tokens are without padding."""
    special_tokens: frozenset[int] = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """Open the corpus in `folder`.

        Raises:
            UserError: there is none, or it is unfinished or damaged.
        """
        marker = folder / "corpus.json"
        if not marker.exists():
            raise UserError(f"{str(folder)!r} holds no finished corpus; build it again")
        stored = json.loads(marker.read_text())
        corpus = cls(
            folder=folder,
            fingerprint=stored["fingerprint"],
            contexts=stored["contexts"],
            context_tokens=stored["context_tokens"],
            counts=stored["counts"],
            special_tokens=frozenset(stored["special_tokens"]),
        )
        corpus._require_whole()
        return corpus

    @property
    def windows_per_context(self) -> int:
        """Windows of a context; window `context * windows_per_context + index` begins at position index * 32."""
        return self.context_tokens // WINDOW_TOKENS

    def tokens(self, start: int, stop: int) -> NDArray[np.int32]:
        """Return the tokens of the contexts `start` … `stop`, shape (context, position)."""
        return self._arrays["tokens"][start:stop].astype(np.int32)

    def mask(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return where a latent may count as firing, shape (context, position): not special, not padding."""
        lengths = np.asarray(self._arrays["lengths"][start:stop])
        real = np.arange(self.context_tokens) < lengths[:, None]
        if self.special_tokens:
            real &= ~np.isin(self._arrays["tokens"][start:stop], sorted(self.special_tokens))
        return real

    def split_of(self, contexts: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the index into SPLITS of each context, shape of `contexts`."""
        return np.asarray(self._arrays["splits"][contexts])

    def document_of(self, contexts: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of the document at each (context, position), −1 for padding; shape of the arguments."""
        contexts, positions = np.asarray(contexts), np.asarray(positions)
        places = contexts.astype(np.int64) * self.context_tokens + positions
        segments = np.searchsorted(self._arrays["segment_starts"], places, side="right") - 1
        documents = self._arrays["segment_documents"][segments].astype(np.int64)
        return np.where(positions < self._arrays["lengths"][contexts], documents, -1)

    def usable(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return which windows count, shape (context, window): some text in it, and not recurring in another split."""
        return np.array(self._arrays["usable"][start:stop])

    @cached_property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {}
        for name in _ARRAYS:
            path = self.folder / f"{name}.npy"
            try:
                arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise UserError(f"{str(path)!r} is damaged ({error}); remove its folder and build it again") from error
        return arrays

    def _require_whole(self) -> None:
        shapes = {
            "tokens": (self.contexts, self.context_tokens),
            "lengths": (self.contexts,),
            "splits": (self.contexts,),
            "usable": (self.contexts, self.windows_per_context),
        }
        for name, shape in shapes.items():
            if self._arrays[name].shape != shape:
                path = str(self.folder / f"{name}.npy")
                raise UserError(f"{path!r} is damaged (not of shape {shape}); remove its folder and build it again")


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
    """Tokenise `source` (see `corpus_readers`) into `folder`, or open what is there if it was built from the same.

    `limit_documents` and `limit_tokens` end the reading early: at so many distinct documents, before the document that
    would exceed so many tokens.

    Raises:
        UserError: the source is missing, damaged, empty, or too small for every split to have a document; the contexts
            are longer than the subject's or no multiple of 32; or `folder` holds a corpus of something else.
    """
    _check(context_tokens, splits, subject)
    documents = Source(source, text_field, separator)
    parameters = {
        "format": _FORMAT,
        "source": documents.identity(),
        "tokenizer": subject.tokenizer_digest,
        "bos": subject.bos,
        "special_tokens": sorted(subject.special_tokens),
        "seed": seed,
        "context_tokens": context_tokens,
        "splits": {split: splits.get(split, 0.0) for split in SPLITS},
        "limits": [limit_documents, limit_tokens],
    }
    inputs = digest(json.dumps(parameters, sort_keys=True))
    if (folder / "corpus.json").exists():
        return _reuse(folder, inputs, source)
    building = folder.with_name(f".{folder.name}.building")
    _clear(building, folder)
    counts = pack_documents(building, documents, subject, parameters, limit_documents, limit_tokens)
    place_contexts(building, seed, context_tokens, len(subject.pieces))
    counts |= find_usable_windows(building, subject.special_tokens)
    return _publish(building, folder, {"inputs": inputs, "source": source, **parameters}, counts)


def _check(context_tokens: int, splits: Mapping[Split, float], subject: Subject) -> None:
    if context_tokens < WINDOW_TOKENS or context_tokens % WINDOW_TOKENS:
        raise UserError(
            f"context_tokens = {context_tokens} is not a multiple of {WINDOW_TOKENS}, the tokens of a window"
        )
    if context_tokens > subject.max_context:
        most = subject.max_context // WINDOW_TOKENS * WINDOW_TOKENS
        raise UserError(
            f"context_tokens = {context_tokens}, but {subject.name!r} takes {subject.max_context}; use {most}"
        )
    if set(splits) - set(SPLITS) or min(splits.values()) < 0 or abs(sum(splits.values()) - 1) > 1e-6:
        raise UserError(f"splits = {dict(splits)}: shares of {', '.join(SPLITS)} that add up to 1 are expected")


def _reuse(folder: Path, inputs: str, source: str) -> Corpus:
    stored = json.loads((folder / "corpus.json").read_text())
    if stored["inputs"] != inputs:
        raise UserError(
            f"{str(folder)!r} holds a corpus built from {stored['source']!r} with other content, tokenizer or "
            f"parameters; give {source!r} another folder, or remove that one"
        )
    return Corpus.open(folder)


def _clear(building: Path, folder: Path) -> None:
    """Remove what an interrupted build left."""
    for leftover in (building, folder):
        if leftover.exists():
            shutil.rmtree(leftover)
    building.mkdir(parents=True)


def _publish(building: Path, folder: Path, parameters: Mapping[str, Any], counts: Mapping[str, Any]) -> Corpus:
    import hashlib

    shape = np.load(building / "tokens.npy", mmap_mode="r").shape
    contents = []
    for name in _ARRAYS:
        with (building / f"{name}.npy").open("rb") as file:
            contents.append(hashlib.file_digest(file, "sha256").hexdigest())
            os.fsync(file.fileno())
    marker = building / "corpus.json"
    fingerprint = digest(parameters["inputs"], *contents)
    marker.write_text(
        json.dumps({"fingerprint": fingerprint, "contexts": shape[0], **parameters, "counts": counts}, indent=1)
    )
    with marker.open("rb") as file:
        os.fsync(file.fileno())
    building.rename(folder)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Corpus.open(folder)
