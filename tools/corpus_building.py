"""Packing documents into contexts, and bringing the contexts into their final order. Steps 1–4 of `corpus`."""

from __future__ import annotations

import hashlib
import itertools
import sqlite3
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exegete.tools.arrays import new_array
from exegete.tools.corpus_readers import Source
from exegete.tools.errors import UserError
from exegete.tools.seeds import derive_seed
from exegete.tools.windows import SPLITS, Split

if TYPE_CHECKING:
    from exegete.tools.subject import Subject

_BATCH_DOCUMENTS = 256
_BATCH_CONTEXTS = 8_192
_KINDS = ("tokens", "lengths", "segments")
_SEGMENT = np.dtype([("context", np.int64), ("position", np.int32), ("document", np.int64)])


def split_of_text(text: str, seed: int, splits: Mapping[Split, float]) -> tuple[int, Split]:
    """Return the 64-bit keyed hash of a document's normalised content, and the split that it falls to."""
    normalised = " ".join(text.casefold().split())
    key = derive_seed(seed, "corpus", "splits").to_bytes(8, "little")
    number = int.from_bytes(
        hashlib.blake2b(normalised.encode(errors="replace"), key=key, digest_size=8).digest(), "little"
    )
    place, bound = number / 2**64, 0.0
    for split in SPLITS:
        bound += splits.get(split, 0.0)
        if place < bound:
            return number, split
    return number, next(split for split in reversed(SPLITS) if splits.get(split, 0.0))


class _Packer:
    """Packs the documents of one split into contexts, and appends them to files.

    `<split>.tokens` holds contexts (int32), `<split>.lengths` their lengths, `<split>.segments` where documents begin.
    """

    def __init__(self, folder: Path, split: Split, context_tokens: int, bos: int | None) -> None:
        self._files = {kind: (folder / f"{split}.{kind}").open("wb") for kind in _KINDS}
        self._bos = bos
        self._context = np.full(context_tokens, self._padding, dtype=np.int32)
        self._filled = 0
        self.documents = self.contexts = self.tokens = 0

    @property
    def _padding(self) -> int:
        # Any token of the vocabulary will do: attention is causal, and `lengths` says what is padding.
        return 0 if self._bos is None else self._bos

    def add(self, document: int, tokens: NDArray[np.int32]) -> None:
        size, start = len(self._context), 0
        self.documents += 1
        while start < len(tokens):
            if self._filled and self._filled + 2 > size:
                self._close()  # no room for a beginning and a token
            self._files["segments"].write(np.array([(self.contexts, self._filled, document)], _SEGMENT).tobytes())
            if self._bos is not None:
                self._context[self._filled] = self._bos
                self._filled += 1
            taken = min(size - self._filled, len(tokens) - start)
            self._context[self._filled : self._filled + taken] = tokens[start : start + taken]
            self._filled += taken
            start += taken
            if self._filled == size:
                self._close()

    def _close(self) -> None:
        self._files["tokens"].write(self._context.tobytes())
        self._files["lengths"].write(np.int32(self._filled).tobytes())
        self.contexts += 1
        self.tokens += self._filled
        self._context[:] = self._padding
        self._filled = 0

    def finish(self) -> None:
        if self._filled:
            self._close()
        for file in self._files.values():
            file.close()


def pack_documents(
    folder: Path,
    source: Source,
    subject: Subject,
    parameters: Mapping[str, Any],
    limit_documents: int | None,
    limit_tokens: int | None,
) -> dict[str, Any]:
    """Read, deduplicate, split, tokenise and pack all documents into files of `folder`; return the counts.

    Raises:
        UserError: there is no document, or a split gets none.
    """
    size, shares = parameters["context_tokens"], parameters["splits"]
    packers = {split: _Packer(folder, split, size, subject.bos) for split in SPLITS}
    counts: dict[str, Any] = {"documents": 0, "tokens": 0, "duplicates": 0, "empty": 0, "invalid_utf8": 0}
    with closing(_distinct(folder, source, parameters["seed"], shares, counts)) as distinct:
        for split, tokens in _tokenised(itertools.islice(distinct, limit_documents), subject):
            if limit_tokens is not None and counts["tokens"] + len(tokens) > limit_tokens:
                break
            if not tokens:
                counts["empty"] += 1
                continue
            packers[split].add(counts["documents"], np.asarray(tokens, dtype=np.int32))
            counts["tokens"] += len(tokens)
            counts["documents"] += 1
    for packer in packers.values():
        packer.finish()
    counts["invalid_utf8"] = source.invalid_utf8
    _require_documents(source, shares, packers, counts)
    counts["tokens"] = sum(packer.tokens for packer in packers.values())
    counts["splits"] = {
        split: {"documents": packer.documents, "contexts": packer.contexts, "tokens": packer.tokens}
        for split, packer in packers.items()
    }
    return counts


def _tokenised(documents: Iterator[tuple[str, Split]], subject: Subject) -> Iterator[tuple[Split, list[int]]]:
    while batch := list(itertools.islice(documents, _BATCH_DOCUMENTS)):
        encoded = subject.encode([text for text, _ in batch])
        yield from zip((split for _, split in batch), encoded, strict=True)


def _distinct(
    folder: Path, source: Source, seed: int, splits: Mapping[Split, float], counts: dict[str, Any]
) -> Generator[tuple[str, Split]]:
    """Yield each distinct document with its split, counting the others. The hashes seen are on disk, not in memory."""
    path = folder / "seen.sqlite"
    with closing(sqlite3.connect(path)) as seen:
        seen.execute("PRAGMA journal_mode = OFF")
        seen.execute("PRAGMA synchronous = OFF")
        seen.execute("CREATE TABLE seen (hash INTEGER PRIMARY KEY)")
        for text in source.documents():
            if not text.strip():
                counts["empty"] += 1
                continue
            number, split = split_of_text(text, seed, splits)
            if seen.execute("INSERT OR IGNORE INTO seen VALUES (?)", (number - 2**63,)).rowcount:
                yield text, split
            else:
                counts["duplicates"] += 1


def _require_documents(
    source: Source, shares: Mapping[Split, float], packers: Mapping[Split, _Packer], counts: Mapping[str, Any]
) -> None:
    if not counts["documents"]:
        raise UserError(f"corpus {source.spec!r} is empty: {counts['empty']} documents, none with text")
    for split in SPLITS:
        if shares[split] and not packers[split].documents:
            raise UserError(
                f"corpus {source.spec!r} has {counts['documents']} distinct documents, too few: none fell to "
                f"the {split!r} split; give more documents, a separator between them, or another seed"
            )


def place_contexts(folder: Path, seed: int, context_tokens: int, vocabulary: int) -> None:
    """Interleave the contexts of the splits into the corpus' arrays, in blocks, and remove the packers' files."""
    packed = {index: _Packed(folder, split, context_tokens) for index, split in enumerate(SPLITS)}
    contexts = sum(part.contexts for part in packed.values())
    segments = sum(len(part.segments) for part in packed.values())
    tokens = _array(folder, "tokens", np.uint16 if vocabulary <= 2**16 else np.int32, (contexts, context_tokens))
    lengths = _array(folder, "lengths", np.int32, (contexts,))
    splits = _array(folder, "splits", np.uint8, (contexts,))
    segment_starts = _array(folder, "segment_starts", np.int64, (segments,))
    segment_documents = _array(folder, "segment_documents", np.int64, (segments,))
    start = segment = 0
    for order in _interleaved([part.contexts for part in packed.values()], seed):
        places, documents = [], []
        for index, part in packed.items():
            rows = start + np.flatnonzero(order == index)
            own = part.take(len(rows))
            tokens[rows], lengths[rows] = part.tokens[own], part.lengths[own]
            begun = part.segments_of(own)
            places.append(rows[begun["context"] - own.start] * context_tokens + begun["position"])
            documents.append(begun["document"])
        ascending = np.argsort(np.concatenate(places))
        block = slice(segment, segment + len(ascending))
        segment_starts[block] = np.concatenate(places)[ascending]
        segment_documents[block] = np.concatenate(documents)[ascending]
        splits[start : start + len(order)] = order
        start, segment = start + len(order), block.stop
    for array in (tokens, lengths, splits, segment_starts, segment_documents):
        array.flush()
    for leftover in ("seen.sqlite", *(f"{split}.{kind}" for split in SPLITS for kind in _KINDS)):
        (folder / leftover).unlink()


class _Packed:
    """What a packer wrote, mapped, and how much of it is placed already."""

    def __init__(self, folder: Path, split: Split, context_tokens: int) -> None:
        self.lengths: NDArray[np.int32] = _mapped(folder / f"{split}.lengths", np.int32)
        self.contexts = len(self.lengths)
        self.tokens: NDArray[np.int32] = _mapped(folder / f"{split}.tokens", np.int32).reshape(-1, context_tokens)
        self.segments: NDArray[np.void] = _mapped(folder / f"{split}.segments", _SEGMENT)
        self._taken = self._segments_taken = 0

    def take(self, contexts: int) -> slice:
        """Return the next so many contexts, by number."""
        self._taken += contexts
        return slice(self._taken - contexts, self._taken)

    def segments_of(self, contexts: slice) -> NDArray[np.void]:
        """Return the segments of contexts that follow upon those asked for before."""
        first = self._segments_taken
        # A context of n tokens begins at most n segments.
        most = first + (contexts.stop - contexts.start) * self.tokens.shape[1]
        ahead = self.segments["context"][first:most]
        self._segments_taken = first + int(np.searchsorted(ahead, contexts.stop))
        return self.segments[first : self._segments_taken]


def _mapped(path: Path, dtype: Any) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _array(folder: Path, name: str, dtype: Any, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    array = new_array(folder / f"{name}.npy", dtype, shape)
    assert isinstance(array, np.memmap)  # A corpus is never empty: `_require_documents`.
    return array


def _interleaved(sizes: list[int], seed: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the order of the splits' contexts, in blocks: which split comes next, by number.

    The j-th of n contexts of a split stands at (j + u) / n of the way, u drawn for each: even, yet not periodic.
    """
    blocks = -(-sum(sizes) // _BATCH_CONTEXTS)
    for block in range(blocks):
        low, high = block / blocks, (block + 1) / blocks
        keys, owners = [], []
        for index, size in enumerate(sizes):
            numbers = np.arange(max(0, int(low * size) - 1), min(size, int(high * size) + 2))
            place = (numbers + _uniform(numbers, derive_seed(seed, "corpus", "order", index))) / max(size, 1)
            inside = (place >= low) & ((place < high) | (block == blocks - 1))
            keys.append(place[inside])
            owners.append(np.full(int(inside.sum()), index, np.uint8))
        yield np.concatenate(owners)[np.argsort(np.concatenate(keys), kind="stable")]


def _uniform(numbers: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """Return a fraction in [0, 1) for each number, from splitmix64 (Steele, Lea and Flood 2014)."""
    state = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53
