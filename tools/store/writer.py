"""The one writer of a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exegete.tools.store.records import DictionaryRecord, LatentRecord, RunRecord, RunStatus


class Writer:
    """Writes results in transactions and publishes them. Made by `Store.writer()`; safe to call from several threads."""

    def add_dictionary(self, dictionary: DictionaryRecord) -> None:
        """Register a dictionary; once its evidence is finished, the views show its latents. Adding it again changes nothing."""
        raise NotImplementedError

    def begin_run(self, *, config: Mapping[str, Any], seed: int, code_version: str, dictionary: str) -> str:
        """Begin, or take up again, the run of this configuration; return its id.

        The id is a digest of configuration, seed and dictionary, so that the same call finds the same run.
        """
        raise NotImplementedError

    def runs(self) -> list[RunRecord]:
        """Return all runs, the one begun last first."""
        raise NotImplementedError

    def record(self, run: str, records: Sequence[LatentRecord]) -> None:
        """Write records of latents in one transaction: all of them or none. 250–500 at a time.

        A latent that the run has recorded already is left as it is.
        """
        raise NotImplementedError

    def labeled(self, run: str, dictionary: str) -> NDArray[np.int64]:
        """Return the latents that `run` has recorded, whatever their outcome, ascending."""
        raise NotImplementedError

    def set_types(self, run: str, dictionary: str, types: Mapping[int, str]) -> None:
        """Replace the types (PROTOCOLS §12) of a run's latents: `input`, `unexplained`, `rare`, …"""
        raise NotImplementedError

    def finish_run(self, run: str, status: RunStatus, figures: Mapping[str, Any] | None = None) -> None:
        """Store how the run ended, with its figures (shown in the `runs` view)."""
        raise NotImplementedError

    def publish(self) -> Path:
        """Replace the snapshot that readers open by the present state; return its path.

        A reader never sees a part of it, and one that holds the former snapshot open keeps it.
        """
        raise NotImplementedError
