"""Sentence embeddings of explanations: which are missing, and Parquet parts of those that are there.

1. What is missing is found in SQL, by an anti-join of the explanations with the parts of the same model; only as many texts as
   are embedded next are ever in Python.
2. Rows are written as a part (fsync, rename) and count once a transaction has registered it, so a crash loses at most what
   was embedded since the last part, and the next anti-join finds exactly that.

A row keeps its vector twice. `vector` is exact and made for SQL; reading lists back costs DuckDB about 2 µs a row and core.
`code` has each component in one byte (int8, scaled to the row's largest), which is read four times as fast: the cosine of two
unit vectors, one of them a code, is off by 0.0003 on average and 0.0025 at most (of a million), and searching needs no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from exegete.tools.errors import UserError
from exegete.tools.store.parts import write_part

if TYPE_CHECKING:
    Transaction = Callable[[], AbstractContextManager[duckdb.DuckDBPyConnection]]
    Unwritten = Callable[[Exception], UserError]

FOLDER = "embeddings"
PART_ROWS = 8_192
"""Rows of a part, where there are so many: 12 MB of vectors with 384 components."""

_CONTROLS = "SELECT dictionary FROM data.dictionaries WHERE evidence LIKE 'controls/%'"
_MISSING = f"""
CREATE OR REPLACE TEMP TABLE missing_embeddings AS
SELECT row_number() OVER (ORDER BY dictionary, latent, explanation_id) AS number, dictionary, latent, explanation_id, text
FROM data.explanations e
WHERE dictionary NOT IN ({_CONTROLS}) AND trim(text) <> ''
"""


class Text(NamedTuple):
    """An explanation to embed."""

    dictionary: str
    latent: int
    explanation_id: str
    text: str


class Embeddings:
    """The embeddings of the store that a writer has open. Made by `Writer.embeddings`; safe to use from another thread."""

    def __init__(
        self, folder: Path, connection: duckdb.DuckDBPyConnection, transaction: Transaction, unwritten: Unwritten
    ) -> None:
        self._folder = folder / FOLDER
        self._connection = connection
        self._transaction = transaction
        self._unwritten = unwritten

    @contextmanager
    def missing(self, model: str, at_a_time: int = PART_ROWS) -> Iterator[Iterator[list[Text]]]:
        """Open the explanations that `model` has not embedded, so many at a time, by dictionary and latent.

        They are those of the moment at which this is entered, without the random-weight controls' and without blank ones.

        Raises:
            UserError: a part is damaged.
        """
        with self._connection.cursor() as cursor:
            parts, chosen = self._parts(cursor, model), {}
            query = _MISSING
            if parts:
                query += " AND NOT EXISTS (FROM read_parquet($parts) p WHERE p.explanation_id = e.explanation_id)"
                chosen = {"parts": parts}
            with self._readable():
                cursor.execute(query, chosen)
            yield _in_chunks(cursor, at_a_time)

    def without_known(self, model: str, texts: Sequence[Text]) -> list[Text]:
        """Return those of `texts` that `model` has not embedded, each once, and none of a random-weight control.

        Raises:
            UserError: a part is damaged.
        """
        with self._connection.cursor() as cursor, self._readable():
            controls = {dictionary for (dictionary,) in cursor.execute(_CONTROLS).fetchall()}
            wanted = {text.explanation_id: text for text in texts if text.dictionary not in controls}
            if parts := self._parts(cursor, model):
                query = (
                    "SELECT explanation_id FROM read_parquet(?) WHERE explanation_id IN (SELECT unnest(?::VARCHAR[]))"
                )
                for (known,) in cursor.execute(query, [parts, list(wanted)]).fetchall():
                    wanted.pop(known, None)
        return list(wanted.values())

    def add(self, model: str, texts: Sequence[Text], vectors: NDArray[np.float32]) -> None:
        """Write the embeddings of `texts` durably.

        Args:
            model: name of the embedding model.
            texts: explanations, none of which this model has embedded.
            vectors: of unit length, shape (text, width).

        Raises:
            UserError: the disk is full; nothing was added.
        """
        try:
            part = write_part(self._folder, _rows(model, texts, vectors), _WRITING)
        except OSError as error:
            raise self._unwritten(error) from error
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO data.embedding_parts VALUES (?, ?, ?) ON CONFLICT DO NOTHING", [part, len(texts), model]
            )

    def _parts(self, cursor: duckdb.DuckDBPyConnection, model: str) -> list[str]:
        query = "SELECT part FROM data.embedding_parts WHERE model = ? ORDER BY part"
        return [str(self._folder / part) for (part,) in cursor.execute(query, [model]).fetchall()]

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (duckdb.IOException, duckdb.InvalidInputException) as error:
            first = str(error).splitlines()[0]
            raise UserError(
                f"a part of embeddings in {str(self._folder)!r} is damaged ({first}); restore it"
            ) from error


def codes_of(vectors: NDArray[np.float32]) -> NDArray[np.int8]:
    """Return vectors, shape (row, width), with every component in a byte, scaled to the largest of its row."""
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    codes: NDArray[np.int8] = np.rint(vectors * (127 / largest)).astype(np.int8)
    return codes


_WRITING: dict[str, Any] = {
    # Vectors do not compress, and unpacking them is what a search would wait for.
    "compression": {
        **dict.fromkeys(("vector.list.element", "code"), "none"),
        **dict.fromkeys(("dictionary", "latent", "explanation_id", "model"), "zstd"),
    },
    "compression_level": None,
    "use_dictionary": ["dictionary", "model"],
}


def _rows(model: str, texts: Sequence[Text], vectors: NDArray[np.float32]) -> pa.Table:
    count, width = vectors.shape
    flat = np.ascontiguousarray(vectors, dtype=np.float32)
    codes = pa.py_buffer(codes_of(flat).tobytes())
    return pa.table(
        {
            "dictionary": pa.array([text.dictionary for text in texts], pa.string()),
            "latent": pa.array([text.latent for text in texts], pa.int32()),
            "explanation_id": pa.array([text.explanation_id for text in texts], pa.string()),
            "model": pa.array([model] * count, pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), width),
            "code": pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), count, [None, codes]),
        }
    )


def _in_chunks(cursor: duckdb.DuckDBPyConnection, at_a_time: int) -> Iterator[list[Text]]:
    query = (
        "SELECT dictionary, latent, explanation_id, text FROM missing_embeddings"
        " WHERE number > ? AND number <= ? ORDER BY number"
    )
    at = 0
    while found := cursor.execute(query, [at, at + at_a_time]).fetchall():
        at += at_a_time
        yield [Text(*row) for row in found]
