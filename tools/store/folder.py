"""The folder of a store: where things lie, and how it is made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from exegete.tools.errors import UserError
from exegete.tools.store.writer import Writer

FORMAT = 1
_FOLDERS = ("evidence", "verdicts", "corpora", "passes")


@dataclass(frozen=True, slots=True)
class Store:
    """A store's folder. Make one with `Store.create_or_open` or `Store.open`."""

    folder: Path
    """Absolute."""

    @classmethod
    def create_or_open(cls, folder: Path) -> Store:
        """Open the store in `folder`, or make one there if the folder is missing or empty.

        Raises:
            UserError: the folder holds something that is no store, or a store of a newer format.
        """
        raise NotImplementedError

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Open the store in `folder`.

        Raises:
            UserError: there is none, or it has a newer format.
        """
        raise NotImplementedError

    def evidence_folder(self, dictionary: str) -> Path:
        """Return where the evidence of the dictionary with this fingerprint lies (`sha256:…` or bare hex digits)."""
        raise NotImplementedError

    @property
    def corpora(self) -> Path:
        """Where token stores lie."""
        return self.folder / "corpora"

    @property
    def passes(self) -> Path:
        """Where activation passes keep their working files."""
        return self.folder / "passes"

    @contextmanager
    def writer(self) -> Iterator[Writer]:
        """Open the store for writing; everything else may go on reading the published snapshot.

        On entry migrations are applied and parts of verdicts that no transaction registered are removed.

        Raises:
            UserError: another process writes (its pid is named), the store has a newer schema, or the disk is full.
        """
        raise NotImplementedError
        yield
