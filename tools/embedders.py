"""Sentence embeddings: one vector of unit length for a text, so that the dot product of two is their cosine.

A query (an explanation) is embedded with the instruction that the embedding model wants before queries, where it has one;
passages (windows) as the model wants documents. What a set of passages gives depends on that set alone, never on what else
was embedded before or together with it; the last sets are kept, since floors ask for the same windows again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from exegete.tools.errors import UserError

Vectors = NDArray[np.float32]

_SETS_KEPT = 64


class Embedder(Protocol):
    """Turns texts into vectors of unit length."""

    name: str

    def query(self, text: str) -> Vectors:
        """Return the vector of a query, shape (width,)."""
        ...

    def passages(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of passages, shape (text, width)."""
        ...


class SentenceEmbedder:
    """A sentence-transformers model. Safe to use from several threads, one call at a time."""

    def __init__(
        self, model: str | Path, *, device: str = "cpu", instruction: str | None = None, batch: int = 64
    ) -> None:
        """Load the model.

        Args:
            model: name on the Hugging Face hub, or a local folder.
            device: torch device.
            instruction: stands before a query; None takes the model's own "query" prompt, where it has one.
            batch: texts in one forward pass.

        Raises:
            UserError: there is no such model, or it cannot be loaded.
        """
        self.name = str(model)
        self._instruction = instruction
        self._batch = batch
        self._model = _load(self.name, device)
        self._sets: OrderedDict[tuple[str, ...], Vectors] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def instruction(self) -> str:
        """What stands before a query."""
        if self._instruction is not None:
            return self._instruction
        return str(self._model.prompts.get("query") or "")

    def query(self, text: str) -> Vectors:
        """Return the vector of a query, shape (width,).

        Raises:
            UserError: the text is blank, or the model gives no finite vector for it.
        """
        if not text.strip():
            raise UserError(f"the query {text!r} is blank; there is nothing to embed")
        with self._lock:
            found = self._checked(self._model.encode_query([text], prompt=self.instruction, **self._options))
        vector: Vectors = found[0]
        return vector

    def passages(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of passages, shape (text, width).

        Raises:
            UserError: there is no text, or the model gives no finite vector for one.
        """
        if not texts:
            raise UserError("no passage is given to embed; give at least one")
        key = tuple(texts)
        with self._lock:
            if key not in self._sets:
                self._sets[key] = self._checked(self._model.encode_document(list(key), **self._options))
            self._sets.move_to_end(key)
            while len(self._sets) > _SETS_KEPT:
                self._sets.popitem(last=False)
            return self._sets[key]

    @property
    def _options(self) -> dict[str, Any]:
        return {"batch_size": self._batch, "show_progress_bar": False, "convert_to_numpy": True}

    def _checked(self, found: Any) -> Vectors:
        vectors: Vectors = np.asarray(found, dtype=np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not (np.isfinite(lengths) & (lengths > 0)).all():
            raise UserError(f"embedding model {self.name!r} gives vectors that are zero or not finite")
        unit: Vectors = vectors / lengths
        return unit


def opened_once(open_embedder: Callable[[str], Embedder]) -> Callable[[str], Embedder]:
    """Return what opens each embedding model once, however many threads ask for it; one that cannot be opened is tried again."""
    lock, opened = threading.Lock(), dict[str, Embedder]()

    def once(name: str) -> Embedder:
        with lock:
            if name not in opened:
                opened[name] = open_embedder(name)
            return opened[name]

    return once


def _load(name: str, device: str) -> Any:
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(name, device=device)
    except Exception as error:  # whatever the hub, the folder or the device raises
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"no sentence-transformers model can be loaded from {name!r} on {device} ({first}); give a name on the hub, "
            "for example 'sentence-transformers/all-MiniLM-L6-v2', or a local folder"
        ) from error
