"""Embedding explanations while a run writes them, without holding it up.

1. `written` takes the explanations of a batch that the store has just recorded; nothing is computed there.
2. A thread of its own embeds them, some hundred at a time, and writes a part whenever enough have gathered or ten minutes passed.
3. Where labeling is faster, what does not fit the queue is let go: `finish` asks the store which explanations have no embedding
   yet, in SQL, and embeds those. So a run that was killed anywhere ends, once taken up again, with an embedding for every
   explanation and none twice.
4. An embedding model that fails does not end labeling; `finish` says what was wrong.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from exegete.tools.embedders import Embedder, Vectors
from exegete.tools.store import LatentRecord, Writer
from exegete.tools.store.embeddings import PART_ROWS, Embeddings, Text

TEXTS_AT_ONCE = 256
_WAITING = 8 * PART_ROWS
_WRITE_EVERY_S = 600.0
_LOOK_EVERY_S = 0.2

Stop = Callable[[], bool]


class Embedded(NamedTuple):
    """What became of a run's embeddings."""

    texts: int
    """Explanations embedded by this call of the run."""
    complete: bool
    """Whether every explanation in the store has one; False where it was asked to stop."""


def name_of_embedder(model: str) -> str:
    """Return the name under which embeddings of `model` are stored: folders by their full path, so that it is found again."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


class EmbeddingRun:
    """Embeds what a run writes. Use it in a `with` statement: leaving it writes what is embedded and ends the thread."""

    def __init__(
        self,
        writer: Writer,
        model: str | None,
        open_embedder: Callable[[], Embedder],
        said: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Embed for the store that `writer` has open.

        Args:
            writer: of the store.
            model: name or folder of the embedding model; with None, nothing is embedded.
            open_embedder: loads it, when the first explanation is there.
            said: is told at once where it fails.
        """
        self._store = writer.embeddings
        self._model = None if model is None else name_of_embedder(model)
        self._open = open_embedder
        self._said = said
        self._embedder: Embedder | None = None
        self._waiting: deque[Text] = deque()
        self._changed = threading.Condition()
        self._ending = self._abandoned = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._texts = 0

    def __enter__(self) -> EmbeddingRun:
        return self

    def __exit__(self, *ended: object) -> None:
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def written(self, records: Sequence[LatentRecord]) -> None:
        """Take the explanations of records that the store has."""
        if self._model is None or self._error is not None:
            return
        new = [
            Text(r.dictionary, r.latent, key, e.text) for r in records for e, key in r.explanations if e.text.strip()
        ]
        with self._changed:
            self._waiting.extend(new[: _WAITING - len(self._waiting)])
            if self._thread is None and self._waiting:
                self._thread = threading.Thread(target=self._work, name="embedding", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def finish(self, stop: Stop = lambda: False) -> Embedded:
        """Embed whatever has no embedding yet, of this run and of those before; call it when everything is recorded.

        `stop` is asked every few hundred texts; what is embedded by then is kept.

        Raises:
            UserError: the model cannot be loaded or gives vectors that are not finite, the disk is full, or a part is damaged.
        """
        if self._model is None:
            return Embedded(0, True)
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_LOOK_EVERY_S)
            if stop():
                self.__exit__()
        if self._error is not None:
            raise self._error
        complete = self._catch_up(self._model, stop)
        return Embedded(self._texts, complete)

    def _catch_up(self, model: str, stop: Stop) -> bool:
        part = _Part(self._store, model)
        try:
            with self._store.missing(model, TEXTS_AT_ONCE) as missing:
                for texts in missing:
                    if stop():
                        return False
                    self._embed(part, texts)
            return True
        finally:
            part.write()

    def _work(self) -> None:
        assert self._model is not None
        part = _Part(self._store, self._model)
        try:
            while texts := self._next():
                self._embed(part, self._store.without_known(self._model, texts))
            part.write()
        except BaseException as error:  # It is raised by `finish`, in the thread that can tell somebody.
            self._error = error
            self._said(f"explanations are no longer embedded: {error}")

    def _next(self) -> list[Text]:
        """Wait for texts and take some; none where there are no more to come."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) >= TEXTS_AT_ONCE or self._ending or self._abandoned)
            if self._abandoned:
                return []
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), TEXTS_AT_ONCE))]

    def _embed(self, part: _Part, texts: Sequence[Text]) -> None:
        if not texts:
            return
        if self._embedder is None:
            self._embedder = self._open()
        part.add(texts, vectors_of(self._embedder, texts))
        self._texts += len(texts)


def vectors_of(embedder: Embedder, texts: Sequence[Text]) -> Vectors:
    """Return the vectors of explanations, shape (text, width); the same text is embedded once."""
    places = {text: place for place, text in enumerate(dict.fromkeys(text.text for text in texts))}
    distinct = embedder.passages(list(places))
    return distinct[[places[text.text] for text in texts]]


class _Part:
    """Gathers vectors until they are worth a file."""

    def __init__(self, store: Embeddings, model: str) -> None:
        self._store = store
        self._model = model
        self._texts: list[Text] = []
        self._vectors: list[Vectors] = []
        self._written_at = time.monotonic()

    def add(self, texts: Sequence[Text], vectors: Vectors) -> None:
        # Within what has gathered, too, an explanation stands once.
        known = {text.explanation_id for text in self._texts}
        new = [place for place, text in enumerate(texts) if text.explanation_id not in known]
        self._texts += [texts[place] for place in new]
        self._vectors.append(vectors[new])
        if len(self._texts) >= PART_ROWS or time.monotonic() - self._written_at > _WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        if self._texts:
            self._store.add(self._model, self._texts, np.concatenate(self._vectors))
        self._texts, self._vectors, self._written_at = [], [], time.monotonic()
