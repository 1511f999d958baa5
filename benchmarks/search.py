"""Search over a million explanations: `python -m benchmarks.search --store FOLDER [--latents 1000000] [--repeats 7]`.

1. A store of so many explanations of varied sentences and their scores is generated in SQL (about 3 GB with the embeddings).
2. They are embedded through `EmbeddingRun`, as `exegete embed` does, by a stand-in of 384 components: a text's vector is the sum of
   those of its words, drawn by the seed. So no model's speed is in the figures, and what is near in meaning is known.
3. Each question is asked several times with a warm file cache; printed as JSON are the median of the wall clock and the
   processor seconds of all threads, which other work on the machine disturbs less. What searching by codes finds is held
   against the exact cosines.
A folder that holds the store already is used again.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import duckdb
import numpy as np

import exegete
from exegete.agent.embedding_run import EmbeddingRun
from exegete.tools.embedders import Vectors
from exegete.tools.search import nearest_to_latent, search
from exegete.tools.seeds import generator
from exegete.tools.store import DictionaryRecord, Store, Writer

WIDTH = 384
_VOCABULARY = 4_096
A, B = ("sha256:" + letter * 64 for letter in "ab")
PHRASES = {
    "a word in 1 of 1,000": "zither",
    "a word in 1 of 20": "harbour",
    "two words": "court ruling",
    "the beginning of words": "crypt",
    "no explanation": "xylophone",
    "a word in every explanation": "fires",
}

_PARTS = {
    "opening": "references to;mentions of;tokens that follow;words describing;the beginning of;punctuation after;names of;"
    "numbers in;verbs about;prepositions before;technical terms for;fragments of;quotations of;abbreviations of",
    "subject": "a court ruling;protein structure;weather reports;football matches;stock prices;Python functions;a harbour;"
    "medieval castles;railway timetables;chess openings;legal contracts;song lyrics;clinical trials;cryptography;"
    "tax returns;insect anatomy;shipping routes;parliament;wine regions;bridge engineering",
    "place": "in news articles;in source code comments;at the end of sentences;in dialogue;in abstracts;in lists;"
    "within URLs;in loanwords;near dates;in headlines;after commas;in footnotes;before proper names;in questions",
    "extra": "with a negative tone;often in the past tense;mostly in the plural;when a person is named;usually capitalised;"
    "where a quantity is given;especially in British English;where a comparison is drawn",
}


class WordVectors:
    """Embeds a text as the sum of random vectors of its words."""

    name = "sum-of-words"

    def __init__(self) -> None:
        self._vectors = generator(0, "words").standard_normal((_VOCABULARY, WIDTH), dtype=np.float32)

    def query(self, text: str) -> Vectors:
        """Return the vector of a text, shape (384,)."""
        vector: Vectors = self.passages([text])[0]
        return vector

    def passages(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of texts, shape (text, 384)."""
        split = [text.lower().split() for text in texts]
        rows = [crc32(word.encode()) % _VOCABULARY for words in split for word in words]
        begins = np.cumsum([0, *map(len, split[:-1])])
        found = np.add.reduceat(self._vectors[rows], begins)
        unit: Vectors = found / np.linalg.norm(found, axis=1, keepdims=True)
        return unit


def make_store(folder: Path, latents: int) -> dict[str, float]:
    """Generate the store, embed and publish it; return seconds."""
    seconds = {}
    with Store.create_or_open(folder).writer() as writer:
        for dictionary, name in ((A, "first"), (B, "second")):
            writer.add_dictionary(DictionaryRecord(dictionary, name, latents // 2))
        seconds["generate"] = _timed(lambda: _insert(writer, latents))
        with EmbeddingRun(writer, WordVectors.name, WordVectors) as embedding:
            seconds["embed, without the model"] = _timed(embedding.finish)
        with EmbeddingRun(writer, WordVectors.name, WordVectors) as embedding:
            seconds["find that nothing is missing"] = _timed(embedding.finish)
        seconds["publish"] = _timed(writer.publish)
    return {name: round(value, 2) for name, value in seconds.items()}


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """Return wall and processor seconds of every question."""
    embedder = WordVectors()
    asked = "numbers in a harbour where a quantity is given"
    found: dict[str, Any] = {}
    with exegete.connect(folder) as connection:
        connection.execute("SET threads = 2")

        def sql(query: str, *given: Any) -> Callable[[], Any]:
            return lambda: connection.execute(query, list(given)).fetchall()

        def searching(phrase: str, by: Any) -> Callable[[], Any]:
            return lambda: search(connection, phrase, by=by, open_embedder=lambda _: embedder)

        vector = embedder.query(asked).tolist()
        questions = {f"words: {what}": searching(phrase, "words") for what, phrase in PHRASES.items()}
        questions |= {
            "meaning": searching(asked, "meaning"),
            "words and meaning": searching("harbour", "both"),
            "nearest to a latent": lambda: nearest_to_latent(connection, A, 17),
            "sql: search_words": sql("FROM search_words('harbour')"),
            "sql: search_meaning (exact)": sql("FROM search_meaning(?::FLOAT[])", vector),
            "sql: nearest_explanations (exact)": sql("FROM nearest_explanations(?, 17)", A),
            "sql: score histogram": sql("SELECT floor(detection * 20), count(*) FROM best_explanations GROUP BY ALL"),
        }
        for name, question in questions.items():
            found[name] = _median(question, repeats)
        found["of the 20 nearest, found by codes"] = _recall(connection, embedder)
    return found


def _insert(writer: Writer, latents: int) -> None:
    run = writer.begin_run(config={}, seed=0, code_version="0", dictionary=A)
    connection: duckdb.DuckDBPyConnection = writer._connection
    connection.execute(
        """
        INSERT INTO data.explanations
        SELECT 'sha256:' || md5(i::VARCHAR) || md5('x' || i), CASE WHEN i < $n // 2 THEN $a ELSE $b END, i % ($n // 2),
               'Fires on ' || o[1 + (hash(i, 1) % len(o))::INTEGER] || ' ' || s[1 + (hash(i, 2) % len(s))::INTEGER] || ' '
               || p[1 + (hash(i, 3) % len(p))::INTEGER] || ', ' || e[1 + (hash(i, 4) % len(e))::INTEGER]
               || CASE WHEN hash(i, 5) % 1000 = 0 THEN ' like zither' ELSE '' END
               || ', for example ' || substr(md5('e' || i), 1, 6), NULL, 'one-shot', 'm', NULL, '{}', NULL
        FROM range($n) t(i), (SELECT string_split($opening, ';') AS o, string_split($subject, ';') AS s,
                                     string_split($place, ';') AS p, string_split($extra, ';') AS e)
        """,
        {"n": latents, "a": A, "b": B, **_PARTS},
    )
    connection.execute(
        """
        INSERT INTO data.scores
        SELECT ?, dictionary, latent, explanation_id, evaluator, 'balanced_accuracy', value, value - 0.1, value + 0.1, 40, 0, NULL,
               'ok', '{}'
        FROM (SELECT *, 0.5 + 0.4 * (hash(explanation_id, evaluator) % 1000) / 1000.0 AS value
              FROM data.explanations, (SELECT unnest(['detection', 'fuzzing']) AS evaluator))
        """,
        [run],
    )


def _recall(connection: duckdb.DuckDBPyConnection, embedder: WordVectors, questions: int = 10) -> dict[str, float]:
    """Of the 20 nearest by exact cosine the share that codes find, and the largest difference of a cosine."""
    shares, off = [], []
    texts = connection.execute(
        "SELECT text FROM explanations WHERE latent % 997 = 5 ORDER BY explanation_id LIMIT ?", [questions]
    ).fetchall()
    for (text,) in texts:
        found = search(connection, text[:200], by="meaning", open_embedder=lambda _: embedder)
        query = "SELECT explanation_id, cosine FROM search_meaning(?::FLOAT[])"
        exact = dict(connection.execute(query, [embedder.query(text).tolist()]).fetchall())
        cosines = {hit.explanation_id: hit.cosine or 0.0 for hit in found.hits}
        shares.append(len(cosines.keys() & exact.keys()) / len(exact))
        off += [abs(cosines[key] - exact[key]) for key in cosines.keys() & exact.keys()]
    return {"share": round(statistics.mean(shares), 3), "largest difference of a cosine": round(max(off), 5)}


def _median(question: Callable[[], Any], repeats: int) -> dict[str, float]:
    question()
    walls, processors = [], []
    for _ in range(repeats):
        processor = time.process_time()
        walls.append(_timed(question))
        processors.append(time.process_time() - processor)
    return {"wall_s": round(statistics.median(walls), 3), "processor_s": round(statistics.median(processors), 3)}


def _timed(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--latents", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    made = None if options.store.exists() else make_store(options.store, options.latents)
    asked = measure(options.store, options.repeats)
    parts = sum(part.stat().st_size for part in (options.store / "embeddings").iterdir())
    print(
        json.dumps(
            {
                "explanations": options.latents,
                "making_s": made,
                "embeddings_gb": round(parts / 1e9, 2),
                "asking": asked,
                "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
