"""Which latents runs have recorded already: a byte a latent, so that a million of them are a megabyte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import duckdb

Bools = NDArray[np.bool_]


class Recorded:
    """The latents recorded by each run, of themselves or of their floors; read from the store when first asked for."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Read through `connection`, which is the writer's own."""
        self._connection = connection
        self._known: dict[tuple[str, str, bool], Bools] = {}

    def latents(self, run: str, dictionary: str, floors: bool) -> NDArray[np.int64]:
        """Return the recorded latents, ascending."""
        return np.flatnonzero(self._of((run, dictionary, floors)))

    def has(self, run: str, dictionary: str, floors: bool, latent: int) -> bool:
        """Return whether a latent is recorded."""
        known = self._of((run, dictionary, floors))
        return latent < len(known) and bool(known[latent])

    def add(self, run: str, dictionary: str, floors: bool, latent: int) -> None:
        """Take in that a latent is recorded now."""
        known = self._of((run, dictionary, floors))
        if latent >= len(known):
            # Half as much again at a time, so that adding one after the other copies each a few times only.
            known = self._known[run, dictionary, floors] = np.pad(known, (0, latent + 1 - len(known) + latent // 2))
        known[latent] = True

    def forget(self) -> None:
        """Read everything anew when it is next asked for."""
        self._known.clear()

    def _of(self, key: tuple[str, str, bool]) -> Bools:
        if key not in self._known:
            run, dictionary, floors = key
            query = f"SELECT latent FROM data.{'floors' if floors else 'results'} WHERE run = ? AND dictionary = ?"
            found = self._connection.execute(query, [run, dictionary]).fetchnumpy()["latent"]
            self._known[key] = np.zeros(int(found.max(initial=-1)) + 1, dtype=np.bool_)
            self._known[key][found] = True
        return self._known[key]
