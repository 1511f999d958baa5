"""Small stores of known explanations, and an embedding model whose vectors one can work out by hand."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exegete.agent.embedding_run import EmbeddingRun
from exegete.evaluators.contract import Score
from exegete.tools.embedders import Vectors
from exegete.tools.explainers import Explanation
from exegete.tools.store import DictionaryRecord, LatentRecord, Store, Writer

if TYPE_CHECKING:
    from collections.abc import Iterator

A = "sha256:" + "a" * 64
B = "sha256:" + "b" * 64
AXES = {"cat": 0, "kitten": 0, "feline": 0, "dog": 1, "puppy": 1, "price": 2, "money": 2}
WIDTH = 4
"""A word has the axis of its meaning; whatever has none, the last."""


class AxisEmbedder:
    """Counts words by meaning: "cat dog" is (1, 1, 0, 0) / √2. Keeps what it was asked."""

    def __init__(self, name: str = "axes", turned: int = 0) -> None:
        """`turned` shifts the axes: another model."""
        self.name = name
        self.asked: list[str] = []
        self.threads: set[str] = set()
        self._turned = turned

    def query(self, text: str) -> Vectors:
        return self._vector(text)

    def passages(self, texts: Sequence[str]) -> Vectors:
        self.asked += texts
        self.threads.add(threading.current_thread().name)
        return np.stack([self._vector(text) for text in texts])

    def _vector(self, text: str) -> Vectors:
        found = np.zeros(WIDTH, dtype=np.float32)
        for word in text.lower().split():
            found[(AXES.get(word, 3) + self._turned) % WIDTH] += 1
        unit: Vectors = found / np.linalg.norm(found)
        return unit


def explained(latent: int, text: str, dictionary: str = A, detection: float | None = None) -> LatentRecord:
    """Return the record of a latent with one explanation, scored where a figure is given."""
    explanation = Explanation(text, None, explainer="told")
    key = explanation.id(dictionary, latent)
    scores = [] if detection is None else [_score("detection", detection), _score("fuzzing", detection - 0.1)]
    return LatentRecord(
        dictionary, latent, "labeled", explanations=[(explanation, key)], scores=[(key, score) for score in scores]
    )


def floor(latent: int, text: str, dictionary: str = A) -> LatentRecord:
    """Return the record of a latent's shuffled floor."""
    key = Explanation(text, None, explainer="told").id(dictionary, latent)
    found = [(key, _score(name, 0.5, "shuffled")) for name in ("detection", "fuzzing")]
    return LatentRecord(dictionary, latent, "labeled", scores=found)


def _score(evaluator: str, value: float, baseline: str | None = None) -> Score:
    return Score(evaluator, "balanced_accuracy", value, value - 0.05, value + 0.05, 40, 0, baseline)


@contextmanager
def writing(folder: Path) -> Iterator[Writer]:
    """Open a store that knows the dictionaries A and B for writing, and publish it at the end."""
    with Store.create_or_open(folder).writer() as writer:
        for dictionary, name in ((A, "first"), (B, "second")):
            writer.add_dictionary(DictionaryRecord(dictionary, name, 100))
        yield writer
        writer.publish()


def record(writer: Writer, records: Sequence[LatentRecord], floors: bool = False) -> None:
    """Record latents, all of one dictionary, as its run."""
    dictionary = records[0].dictionary
    run = writer.begin_run(config={}, seed=0, code_version="0", dictionary=dictionary)
    writer.record(run, records, floors)


def embed(writer: Writer, embedder: AxisEmbedder) -> int:
    """Embed what is missing; return how many explanations that were."""
    with EmbeddingRun(writer, embedder.name, lambda: embedder) as embedding:
        return embedding.finish().texts
