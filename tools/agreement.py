"""How far the explanations of two dictionaries agree: for each latent of one, the explanation of the other that is nearest in meaning.

1. Every latent stands with its best explanation's vector (`best_explanations`; where it has none, the first by id).
2. Block by block, the cosines of all pairs are taken, and the largest of each latent of A is kept: two dictionaries of 100,000
   latents are 8 · 10¹² operations, some minutes on two cores, in 64 MB beside the vectors.
3. Explanations resemble each other whatever they are about. So each latent's cosine with the partner of another latent stands
   beside it (`floor`), by a seeded permutation without fixed points.
4. And the largest of many cosines is high even where nothing agrees. So the same search is made with as many vectors that mean
   nothing: every component is that of another latent of A, drawn by the seed, so that each component keeps its distribution and
   they no longer belong together (`chance`). What agreement is worth is the difference to that, with its interval.
The macro `explanation_agreement` gives cosine and floor in SQL, and is fit for some 20,000 latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exegete.tools.errors import UserError
from exegete.tools.estimates import Estimate, estimate
from exegete.tools.seeds import generator

if TYPE_CHECKING:
    import duckdb

Numbers = NDArray[np.int64]
Vectors = NDArray[np.float32]

_BLOCK_CELLS = 16_000_000


@dataclass(frozen=True)
class Agreement:
    """For each latent of A, the latent of B whose explanation is nearest."""

    latents: Numbers
    """Of A, ascending; shape (n,)."""
    nearest: Numbers
    """Of B, shape (n,)."""
    cosine: Vectors
    """Of the two explanations, shape (n,)."""
    floor: Vectors
    """Cosine with the nearest of another latent of A, shape (n,)."""
    chance: Vectors
    """Largest cosine of n vectors that mean nothing, shape (n,)."""
    model: str
    mean: Estimate
    """Of `cosine`; intervals are Student's over latents."""
    mean_floor: Estimate
    mean_chance: Estimate
    above: Estimate
    """Of `cosine - chance`."""


def explanation_agreement(
    connection: duckdb.DuckDBPyConnection, a: str, b: str, *, model: str | None = None, seed: int = 0
) -> Agreement:
    """Return how far explanations of dictionary `a` are found again among those of `b`.

    Args:
        connection: of `exegete.connect`.
        a: fingerprint.
        b: fingerprint; the same as `a` compares each latent with all others.
        model: the embedding model, where both have vectors of several.
        seed: of the permutations behind floor and chance.

    Raises:
        UserError: a dictionary has fewer than two embedded explanations, or there is no one model that embedded both.
    """
    model = _common_model(connection, a, b, model)
    latents, own = _vectors(connection, a, model)
    others, theirs = (latents, own) if a == b else _vectors(connection, b, model)
    if min(len(latents), len(others)) < 2:
        raise UserError(
            "agreement needs two embedded explanations of each dictionary; exegete embed --store STORE makes them"
        )
    place, cosine = nearest_rows(own, theirs, same=a == b)
    partner = place[_without_fixed_points(len(latents), seed)]
    floor = np.einsum("nw,nw->n", own, theirs[partner])
    _, chance = nearest_rows(_scrambled(own, seed), theirs)
    mean, mean_floor, mean_chance, above = (
        estimate(values.astype(np.float64)) for values in (cosine, floor, chance, cosine - chance)
    )
    return Agreement(latents, others[place], cosine, floor, chance, model, mean, mean_floor, mean_chance, above)


def nearest_rows(own: Vectors, theirs: Vectors, same: bool = False) -> tuple[Numbers, Vectors]:
    """Return for each row of `own`, shape (n, width), the nearest of `theirs`, shape (m, width), and its cosine.

    With `same`, a row is not compared with itself. Of several equally near ones it is the first.
    """
    place = np.empty(len(own), dtype=np.int64)
    cosine = np.empty(len(own), dtype=np.float32)
    rows = max(1, _BLOCK_CELLS // len(theirs))
    for at in range(0, len(own), rows):
        block = own[at : at + rows] @ theirs.T
        if same:
            block[np.arange(len(block)), np.arange(at, at + len(block))] = -np.inf
        place[at : at + rows] = block.argmax(axis=1)
        cosine[at : at + rows] = block[np.arange(len(block)), place[at : at + rows]]
    return place, cosine


def _without_fixed_points(n: int, seed: int) -> Numbers:
    """A permutation in which nothing stays in place: the next one along a random circle."""
    circle = generator(seed, "agreement").permutation(n)
    found = np.empty(n, dtype=np.int64)
    found[circle] = np.roll(circle, 1)
    return found


def _scrambled(vectors: Vectors, seed: int) -> Vectors:
    """Vectors of unit length, each component of which is that of another row."""
    found: Vectors = generator(seed, "agreement", "chance").permuted(vectors, axis=0)
    length = np.linalg.norm(found, axis=1, keepdims=True)
    unit: Vectors = found / np.maximum(length, np.float32(1e-12))
    return unit


def _common_model(connection: duckdb.DuckDBPyConnection, a: str, b: str, wanted: str | None) -> str:
    query = (
        "SELECT model FROM embeddings WHERE dictionary IN (?, ?) GROUP BY model"
        " HAVING count(DISTINCT dictionary) = ? ORDER BY model"
    )
    found = [model for (model,) in connection.execute(query, [a, b, len({a, b})]).fetchall()]
    if len(found) == 1 and wanted in (None, found[0]):
        return str(found[0])
    if wanted is not None and wanted in found:
        return wanted
    if not found or wanted is not None:
        named = f"{wanted!r} has not embedded" if wanted else "no embedding model has embedded"
        raise UserError(
            f"{named} explanations of both {a[:19]} and {b[:19]}; exegete embed --store STORE --embedder MODEL does"
        )
    raise UserError(f"{', '.join(map(repr, found))} have embedded both dictionaries; choose one with --embedder")


def _vectors(connection: duckdb.DuckDBPyConnection, dictionary: str, model: str) -> tuple[Numbers, Vectors]:
    """Latents, ascending, and the vectors of their best explanations, shape (latent, width)."""
    query = """
        SELECT m.latent, m.vector FROM embeddings m LEFT JOIN best_explanations b USING (dictionary, latent, explanation_id)
        WHERE m.dictionary = $dictionary AND m.model = $model
        QUALIFY row_number() OVER (PARTITION BY m.latent ORDER BY b.explanation_id IS NULL, m.explanation_id) = 1
        ORDER BY m.latent
    """
    found = connection.sql(query, params={"dictionary": dictionary, "model": model}).to_arrow_table()
    latents = found.column("latent").to_numpy().astype(np.int64)
    flat = found.column("vector").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return latents, flat.astype(np.float32, copy=False).reshape(len(latents), -1 if len(latents) else 0)
