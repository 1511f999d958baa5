"""Search over explanations, by words and by meaning.

1. Words: explanations that hold every word of the phrase, ranked by BM25 (the macro `search_words`, in SQL).
2. Meaning: the cosine of the phrase's vector with those that the store holds. Their codes (a byte a component) are read by DuckDB
   and multiplied by NumPy, chunk by chunk, so that a million take half a second; what a code loses changes a cosine by 0.0003
   on average. The mean cosine over all explanations stands beside them: what one at random has.
3. Both are fused by reciprocal rank: a hit scores the sum of 1 / (60 + rank) over the rankings that found it (Cormack, Clarke and
   Büttcher, "Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods", SIGIR 2009).
4. Each hit stands beside its held-out scores with their intervals and floors, where the store has them.

Vectors of different models cannot be compared, and a folder can hold another model than yesterday. So the model that embeds a
phrase is first asked for texts that the store has vectors of: where it gives others, it is not the one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
from duckdb.func import ARROW
from numpy.typing import NDArray

from exegete.tools.embedders import Embedder, Vectors
from exegete.tools.errors import UserError
from exegete.tools.store.macros import MOST_WORDS

if TYPE_CHECKING:
    OpenEmbedder = Callable[[str], Embedder]
    """Opens an embedding model by its name or folder."""

By = Literal["both", "words", "meaning"]

LONGEST = 1_000
"""Characters of a phrase, at most."""
_RRF = 60
_DEPTH = 100
_SAME = 0.99
_CHECKED_TEXTS = 2


@dataclass(frozen=True, slots=True)
class Hit:
    """An explanation that was found."""

    dictionary: str
    latent: int
    explanation_id: str
    text: str
    word_rank: int | None
    """Position among those found by words, from 1; None where its words did not find it."""
    cosine: float | None
    """Cosine of its vector with the phrase's; None where it is not among the nearest in meaning."""
    detection: float | None = None
    """Balanced accuracy on held-out windows, its 95 % interval, and that of shuffled explanations in the same run; None where
    the run that chose this explanation has no such score."""
    detection_low: float | None = None
    detection_high: float | None = None
    detection_shuffled: float | None = None
    fuzzing: float | None = None
    fuzzing_low: float | None = None
    fuzzing_high: float | None = None
    fuzzing_shuffled: float | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """The answer to a search."""

    hits: tuple[Hit, ...]
    """Best first."""
    cosine_mean: float | None = None
    """Mean cosine over all explanations searched: what one at random has. None where meaning was not searched."""
    embedded: int = 0
    """Explanations whose meaning was searched."""
    model: str | None = None
    """That embedded them."""
    note: str | None = None
    """Why meaning was not searched although it was asked for."""


def search(
    connection: duckdb.DuckDBPyConnection,
    phrase: str,
    *,
    by: By = "both",
    limit: int = 20,
    dictionary: str | None = None,
    model: str | None = None,
    open_embedder: OpenEmbedder | None = None,
) -> Found:
    """Return the explanations that a phrase finds.

    Args:
        connection: of `exegete.connect`.
        phrase: up to 1,000 characters; words are found whole or as the beginning of a word, whatever their case.
        by: `words`, `meaning`, or both where the store has embeddings.
        limit: hits, at most.
        dictionary: only of this one, by fingerprint.
        model: name or folder of the embedding model, where the store has several or its folder was moved.
        open_embedder: opens an embedding model; never called where only words are searched.

    Raises:
        UserError: the phrase is blank, too long or has too many words, the limit is not positive, or meaning alone is asked
            for and the store has no embeddings, or the model is not the one that made them.
    """
    cleaned = _cleaned(phrase, limit)
    words = _by_words(connection, cleaned, max(_DEPTH, limit), dictionary) if by != "meaning" else []
    if by == "words" or (by == "both" and not _models(connection)):
        note = None if by == "words" else f"found by words alone: {_NO_EMBEDDINGS}"
        return Found(_fused(connection, words, [], limit), note=note)
    stored, embedder = _embedder(connection, model, open_embedder)
    nearest = _nearest(connection, embedder.query(cleaned), stored, max(_DEPTH, limit), dictionary)
    hits = _fused(connection, words, nearest.keys, limit)
    return Found(hits, nearest.mean, nearest.embedded, stored)


def nearest_to_latent(
    connection: duckdb.DuckDBPyConnection, dictionary: str, latent: int, *, limit: int = 20, within: str | None = None
) -> Found:
    """Return the explanations nearest in meaning to the best one of a latent, its own left out. No model is loaded.

    Args:
        connection: of `exegete.connect`.
        dictionary: fingerprint.
        latent: index.
        limit: hits, at most.
        within: only explanations of this dictionary, by fingerprint.

    Raises:
        UserError: the latent has no embedding, or the limit is not positive.
    """
    _cleaned("x", limit)
    query = (
        "SELECT m.vector, m.model FROM embeddings m LEFT JOIN best_explanations b USING (dictionary, latent, explanation_id)"
        " WHERE m.dictionary = ? AND m.latent = ? ORDER BY b.explanation_id IS NULL, m.explanation_id, m.model LIMIT 1"
    )
    found = connection.execute(query, [dictionary, latent]).fetchall()
    if not found:
        what = "has no explanation that is embedded" if _models(connection) else f"has no embedding: {_NO_EMBEDDINGS}"
        raise UserError(f"latent {latent} of {dictionary[:23]}… {what}")
    [(vector, model)] = found
    own = np.array(vector, dtype=np.float32)
    nearest = _nearest(connection, own, model, limit, within, without=(dictionary, latent))
    return Found(_fused(connection, [], nearest.keys, limit), nearest.mean, nearest.embedded, model)


def is_same_model(embedder: Embedder, texts: Sequence[str], vectors: Vectors) -> bool:
    """Return whether `embedder` gives `texts` these vectors, shape (text, width): whether it is the model that made them."""
    found = embedder.passages(list(texts))
    return found.shape == vectors.shape and bool((np.einsum("tw,tw->t", found, vectors) > _SAME).all())


_NO_EMBEDDINGS = (
    "the store has no embeddings (exegete embed --store STORE --embedder MODEL makes them, "
    "models.embedder in a run's configuration as it goes)"
)

Key = tuple[str, int, str]
"""Dictionary, latent and id of an explanation."""


class _Nearest(NamedTuple):
    keys: list[tuple[Key, float]]
    """The nearest, each with its cosine, best first."""
    mean: float | None
    embedded: int


def _cleaned(phrase: str, limit: int) -> str:
    """The phrase without what no text can hold: NUL, and halves of surrogate pairs."""
    cleaned = "".join(" " if c == "\0" or "\ud800" <= c <= "\udfff" else c for c in phrase).strip()
    if limit < 1:
        raise UserError(f"a search for {limit} explanations finds nothing; ask for 1 or more")
    if not cleaned:
        raise UserError(f"the phrase {phrase!r} is blank; say what to search for")
    if len(cleaned) > LONGEST:
        raise UserError(
            f"the phrase {cleaned[:40]!r}… has {len(cleaned):,} characters; a search takes {LONGEST:,} at most"
        )
    return cleaned


def _by_words(
    connection: duckdb.DuckDBPyConnection, phrase: str, depth: int, dictionary: str | None
) -> list[tuple[Key, float]]:
    [(count,)] = connection.execute("SELECT len(phrase_words(?))", [phrase]).fetchall()
    if count > MOST_WORDS:
        raise UserError(
            f"the phrase {phrase[:40]!r}… has {count} different words; a search for words takes {MOST_WORDS} at most"
            " (--meaning takes any number)"
        )
    # As a literal: DuckDB compiles a pattern once only where it is a constant when the query is planned.
    query = (
        f"SELECT dictionary, latent, explanation_id, word_score FROM search_words({_literal(phrase)},"
        f" most := {depth:d}, of_dictionary := {_literal(dictionary or '')})"
    )
    return [((d, latent, key), score) for d, latent, key, score in connection.execute(query).fetchall()]


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _models(connection: duckdb.DuckDBPyConnection) -> list[str]:
    found = connection.execute("SELECT DISTINCT model FROM embeddings ORDER BY model").fetchall()
    return [model for (model,) in found]


def _embedder(
    connection: duckdb.DuckDBPyConnection, wanted: str | None, open_embedder: OpenEmbedder | None
) -> tuple[str, Embedder]:
    """Return the name under which the store has embeddings, and the model that made them."""
    stored = _models(connection)
    if not stored:
        raise UserError(_NO_EMBEDDINGS)
    if open_embedder is None:
        raise UserError(f"to search by meaning, give the embedding model that the store has vectors of: {stored[0]!r}")
    if wanted is None and len(stored) > 1:
        raise UserError(f"the store has embeddings of {', '.join(map(repr, stored))}; choose one with --embedder")
    embedder = open_embedder(wanted or stored[0])
    for model in [wanted] if wanted in stored else stored:
        if is_same_model(embedder, *_sample(connection, str(model))):
            return str(model), embedder
    raise UserError(
        f"the embedding model {wanted or stored[0]!r} does not give the vectors that the store has; "
        f"they were made by {', '.join(map(repr, stored))}"
    )


def _sample(connection: duckdb.DuckDBPyConnection, model: str) -> tuple[list[str], Vectors]:
    query = (
        "SELECT e.text, m.vector FROM (SELECT dictionary, latent, explanation_id, vector FROM embeddings WHERE model = ? LIMIT 50) m"
        " JOIN explanations e USING (dictionary, latent, explanation_id) ORDER BY length(e.text) DESC, e.text LIMIT ?"
    )
    found = connection.execute(query, [model, _CHECKED_TEXTS]).fetchall()
    return [text for text, _ in found], np.array([vector for _, vector in found], dtype=np.float32)


def _nearest(
    connection: duckdb.DuckDBPyConnection,
    vector: Vectors,
    model: str,
    depth: int,
    dictionary: str | None,
    without: tuple[str, int] = ("", -1),
) -> _Nearest:
    """The explanations of highest cosine with `vector`, shape (width,), and the mean over all."""
    query = """
        SELECT avg(cosine), count(*),
               max({'cosine': cosine, 'turned': -latent, 'dictionary': dictionary, 'id': explanation_id}, ?)
        FROM (SELECT dictionary, latent, explanation_id, cosine_of_code(code) AS cosine FROM embeddings
              WHERE model = ? AND starts_with(dictionary, ?) AND NOT (latent = ? AND dictionary = ?))
    """
    with _cosines(connection, vector):
        chosen = [depth, model, dictionary or "", without[1], without[0]]
        [(mean, count, best)] = connection.execute(query, chosen).fetchall()
    # Compared in the order of their fields, so that which of several equal ones are kept depends on nothing else.
    keys = [((row["dictionary"], -row["turned"], row["id"]), float(row["cosine"])) for row in best or []]
    return _Nearest(sorted(keys, key=lambda found: (-found[1], found[0])), mean, count)


@contextmanager
def _cosines(connection: duckdb.DuckDBPyConnection, vector: Vectors) -> Iterator[None]:
    """Let SQL on this connection ask `cosine_of_code(code)`: the cosine of an embedding with `vector`."""

    def of_codes(codes: Any) -> Any:  # DuckDB evaluates annotations: they may name nothing that is not imported.
        chunks = codes.chunks if isinstance(codes, pa.ChunkedArray) else [codes]
        found = [_cosine(_components(chunk, len(vector)), vector) for chunk in chunks if len(chunk)]
        return pa.array(np.concatenate(found) if found else np.empty(0, np.float32), pa.float32())

    connection.create_function("cosine_of_code", of_codes, ["BLOB"], "FLOAT", type=ARROW)
    try:
        yield
    finally:
        connection.remove_function("cosine_of_code")


def _components(codes: Any, width: int) -> NDArray[np.int8]:
    """A column of binary values as an array, shape (row, width), without a copy."""
    offsets = np.frombuffer(codes.buffers()[1], dtype=np.int32)[codes.offset :][: len(codes) + 1]
    found = np.frombuffer(codes.buffers()[2], dtype=np.int8)[offsets[0] : offsets[-1]]
    return found.reshape(len(codes), width)


def _cosine(components: NDArray[np.int8], vector: Vectors) -> Vectors:
    exact = components.astype(np.float32)
    cosines: Vectors = (exact @ vector) / np.sqrt(np.einsum("rw,rw->r", exact, exact))
    return cosines


def _fused(
    connection: duckdb.DuckDBPyConnection, words: list[tuple[Key, float]], nearest: list[tuple[Key, float]], limit: int
) -> tuple[Hit, ...]:
    """The hits of both rankings, best first, with their texts and scores."""
    ranks = [{key: rank for rank, (key, _) in enumerate(ranking, 1)} for ranking in (words, nearest)]
    fused = {key: sum(1 / (_RRF + rank[key]) for rank in ranks if key in rank) for rank in ranks for key in rank}
    rows = _rows(connection, list(fused))
    # What stands no longer in the store (a run that was taken back) has a vector, but no row.
    order = sorted((key for key in fused if key in rows), key=lambda key: (-fused[key], key))[:limit]
    cosines = dict(nearest)
    return tuple(Hit(*key, rows[key][0], ranks[0].get(key), cosines.get(key), *rows[key][1:]) for key in order)


_SCORES = (
    "detection, detection_low, detection_high, detection_shuffled, fuzzing, fuzzing_low, fuzzing_high, fuzzing_shuffled"
)


def _rows(connection: duckdb.DuckDBPyConnection, keys: Sequence[Key]) -> dict[Key, tuple[Any, ...]]:
    """Text and scores of explanations."""
    query = f"""
        WITH wanted AS (SELECT unnest(?::VARCHAR[]) AS explanation_id, unnest(?::INTEGER[]) AS latent)
        SELECT e.dictionary, e.latent, e.explanation_id, e.text, {_SCORES}
        FROM explanations e JOIN wanted USING (latent, explanation_id)
        LEFT JOIN best_explanations b USING (dictionary, latent, explanation_id)
    """
    found = connection.execute(query, [[key[2] for key in keys], [key[1] for key in keys]]).fetchall()
    return {(row[0], row[1], row[2]): row[3:] for row in found}
