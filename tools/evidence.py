"""Evidence on disk: one folder per dictionary, written once, read in ranges of latents.

The folder holds, whatever the evidence came from (an activation pass or an import):

    evidence.json           provenance; written last, so a folder without it is not evidence
    vocabulary.parquet      token → piece (text)
    latents.parquet         one row a latent: status and statistics                          (LATENTS)
    items-*.parquet         one row a latent and window, sorted by latent, split, kind, rank (ITEMS)
    windows.parquet         the tokens of every window that an item names                    (WINDOWS)
    window_{ids,offsets,tokens}.npy   the same, memory-mapped for the reader

`Evidence.read` hands out `LatentEvidence` for a purpose; what the purpose may not see (PROTOCOLS §1) is not even read.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from exegete.tools.errors import UserError
from exegete.tools.windows import KINDS, SPLITS, Kind, LatentEvidence, Split, Status, Window

Purpose = Literal["explain", "refine", "score"]

VISIBLE: dict[Purpose, tuple[Split, ...]] = {
    "explain": ("explain",),
    "refine": ("explain", "refine"),
    "score": SPLITS,
}
"""The splits that each purpose may see. Explainers get `explain`, refinement loops and agents `refine`,
evaluators `score`."""

VOCABULARY = pa.schema([("token", pa.int32()), ("piece", pa.string())])
WINDOWS = pa.schema([("window", pa.int64()), ("document", pa.string()), ("tokens", pa.list_(pa.int32()))])
ITEMS = pa.schema(
    [
        ("latent", pa.int32()),
        ("split", pa.string()),
        ("kind", pa.string()),
        ("rank", pa.int32()),
        ("window", pa.int64()),
        ("fires", pa.bool_()),
        ("top", pa.bool_()),
        ("stratum", pa.int16()),
        ("peak", pa.float32()),
        ("positions", pa.list_(pa.int16())),
        ("values", pa.list_(pa.float32())),
        ("marks", pa.list_(pa.int16())),
        ("marks_correct", pa.bool_()),
    ]
)
"""`positions`, `values`: the firings in the window; both null where only `fires` is known, both empty where it does not
fire. `rank`: position within latent, split and kind; the order in which windows are used. `stratum`: null outside the
uniform sample."""
LATENTS = pa.schema(
    [
        ("latent", pa.int32()),
        ("status", pa.string()),
        ("tokens", pa.int64()),
        ("firing_tokens", pa.int64()),
        ("firing_windows", pa.int64()),
        ("density", pa.float64()),
        ("mean", pa.float64()),
        ("standard_deviation", pa.float64()),
        ("peak", pa.float32()),
        ("histogram", pa.list_(pa.int64())),
        ("certified", pa.bool_()),
        ("hard_shortage", pa.int32()),
        ("explanation", pa.string()),
    ]
)
"""Statistics over the whole corpus (null for imports). `density`: share of tokens on which the latent fires. `mean` and
`standard_deviation`: of the activation where it fires. `histogram`: firings per factor of two of the activation (see
`activations`). `certified`: the uniform sample is provably exact. `explanation`: came with an import."""

_LATENTS_AT_ONCE = 256
"""Read together: bounds the memory, and keeps the cost of a query small beside what it returns."""
_STATISTICS = ("tokens", "firing_tokens", "firing_windows", "density", "mean", "standard_deviation", "peak")


@dataclass(frozen=True)
class Evidence:
    """The evidence of one dictionary, opened for reading. Make one with `Evidence.open`."""

    folder: Path
    provenance: Mapping[str, Any]
    """At least `dictionary` (fingerprint), `source` ("pass" or "import") and `seed`."""

    @classmethod
    def open(cls, folder: Path) -> Evidence:
        """Open the evidence in `folder`.

        Raises:
            UserError: there is none, or it is unfinished.
        """
        marker = folder / "evidence.json"
        if not marker.exists():
            raise UserError(f"{str(folder)!r} holds no finished evidence; run `exegete label` or `evidence import`")
        return cls(folder, json.loads(marker.read_text()))

    @property
    def dictionary(self) -> str:
        """The fingerprint of the dictionary that the evidence is of."""
        return str(self.provenance["dictionary"])

    @property
    def statuses(self) -> dict[int, Status]:
        """Latent → status, ascending by latent: for few latents; `latents` and `live` do for any number."""
        rows = self._query("SELECT latent, status FROM latents ORDER BY latent").fetchall()
        return dict(rows)

    @cached_property
    def latents(self) -> NDArray[np.int64]:
        """All latents, ascending, shape (latent,)."""
        found: NDArray[np.int64] = self._column("latent").astype(np.int64)
        return found

    @cached_property
    def live(self) -> NDArray[np.int64]:
        """The latents that are neither dead, rare nor dense, ascending, shape (live latent,)."""
        return self.latents[self._column("status = 'live'").astype(np.bool_)]

    def silent(self) -> dict[str, NDArray[np.int64]]:
        """Return dead, rare and dense → the latents that are so, ascending."""
        status = self._column("status").astype(str)
        return {name: self.latents[status == name] for name in ("dead", "dense", "rare")}

    def rates(self) -> NDArray[np.float64]:
        """Return the share of tokens on which each of `latents` fires, shape (latent,); NaN where it is not known (imports)."""
        column = np.ma.filled(self._column("coalesce(density, 'nan'::DOUBLE)"), np.nan)
        return np.asarray(column, dtype=np.float64)

    def _column(self, expression: str) -> NDArray[Any]:
        """Return an expression over the latents, ascending by latent."""
        found = self._query(f"SELECT {expression} AS found FROM latents ORDER BY latent").fetchnumpy()["found"]
        column: NDArray[Any] = found
        return column

    def densities(self) -> NDArray[np.float64]:
        """Return the share of tokens on which each latent fires, shape (latent,).

        Raises:
            UserError: the evidence was imported and does not know it.
        """
        rows = self._query("SELECT latent, density FROM latents ORDER BY latent").fetchall()
        if [latent for latent, _ in rows] != list(range(len(rows))) or any(density is None for _, density in rows):
            raise UserError(f"{str(self.folder)!r} does not know how often every latent fires; run the pass itself")
        return np.array([density for _, density in rows], dtype=np.float64)

    @cached_property
    def pieces(self) -> NDArray[np.object_]:
        """The text of each token, shape (vocabulary,), dtype object."""
        table = self._query("SELECT piece FROM vocabulary ORDER BY token").fetchall()
        return np.array([row[0] for row in table], dtype=object)

    def read(
        self,
        latents: Sequence[int],
        purpose: Purpose,
        *,
        first: int | None = None,
        splits: Sequence[Split] = SPLITS,
        kinds: Sequence[Kind] = KINDS,
    ) -> Iterator[LatentEvidence]:
        """Yield the evidence of `latents`, ascending, holding only what `purpose` may see.

        `first`: only the windows of rank below this within each split and kind; any such prefix is spread over the
        strata. None: all. `splits`, `kinds`: only windows of these, of those that `purpose` may see; whoever needs few
        windows reads several times faster so.
        """
        shown = [split for split in VISIBLE[purpose] if split in splits]
        wanted = sorted(set(latents))
        for start in range(0, len(wanted), _LATENTS_AT_ONCE):
            yield from self._read(wanted[start : start + _LATENTS_AT_ONCE], purpose, [shown, list(kinds)], first)

    def _read(
        self, chunk: list[int], purpose: Purpose, chosen: list[Any], first: int | None
    ) -> Iterator[LatentEvidence]:
        wanted = "latent BETWEEN ? AND ? AND latent IN (SELECT unnest(?::INTEGER[]))"
        bounds = [chunk[0], chunk[-1], chunk]
        columns = f"latent, status, explanation, {', '.join(_STATISTICS)}"
        heads = self._query(f"SELECT {columns} FROM latents WHERE {wanted} ORDER BY latent", bounds).fetchall()
        items = (
            f"SELECT * FROM items WHERE {wanted} AND split IN (SELECT unnest(?::VARCHAR[])) "
            "AND kind IN (SELECT unnest(?::VARCHAR[])) AND rank < ? "
            "ORDER BY latent, split, kind, rank"
        )
        limit = 2**31 - 1 if first is None else first
        table = self._table(items, [*bounds, *chosen, limit]).combine_chunks()
        windows = self._windows(table)
        starts = np.searchsorted(table.column("latent").to_numpy(), [head[0] for head in heads] + [2**31 - 1])
        sealed = frozenset(SPLITS) - frozenset(VISIBLE[purpose])
        for i, (latent, status, explanation, *numbers) in enumerate(heads):
            statistics = {k: float(v) for k, v in zip(_STATISTICS, numbers, strict=True) if v is not None}
            own = tuple(windows[starts[i] : starts[i + 1]])
            yield LatentEvidence(latent, status, own, statistics, explanation, sealed)

    def _windows(self, items: pa.Table) -> list[Window]:
        """Make the windows of all items, column by column: a window at a time would cost ten times as much."""
        if not items.num_rows:
            return []
        ids = items.column("window").to_numpy()
        rows = np.searchsorted(self._window_ids, ids)
        offsets = np.asarray(self._window_offsets)
        lengths = offsets[rows + 1] - offsets[rows]
        ends = np.cumsum(lengths)
        flat = np.arange(ends[-1]) + np.repeat(offsets[rows] - ends + lengths, lengths)
        text = self.pieces[self._window_tokens[flat]].tolist()
        spans = list(zip((ends - lengths).tolist(), ends.tolist(), strict=True))
        activations = _activations(items, ends - lengths, int(ends[-1]))
        columns = (
            ids.tolist(),
            (tuple(text[start:stop]) for start, stop in spans),
            (None if a is None else a[start:stop] for a, (start, stop) in zip(activations, spans, strict=True)),
            *(items.column(name).to_pylist() for name in ("fires", "split", "kind", "stratum")),
            (bool(top) for top in items.column("top").to_pylist()),
            _marks(items.column("marks")),
            items.column("marks_correct").to_pylist(),
            self._documents.take(pa.array(rows)).to_pylist(),
        )
        return list(map(Window, *columns))

    @cached_property
    def _documents(self) -> pa.ChunkedArray:
        """The document of each window, in the order of `_window_ids`."""
        import pyarrow.parquet as pq

        path = self.folder / "windows.parquet"
        try:
            return pq.read_table(path, columns=["document"], read_dictionary=["document"]).column("document")
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from error

    @cached_property
    def _window_ids(self) -> NDArray[np.int64]:
        array: NDArray[np.int64] = np.load(self.folder / "window_ids.npy", mmap_mode="r", allow_pickle=False)
        return array

    @cached_property
    def _window_offsets(self) -> NDArray[np.int64]:
        array: NDArray[np.int64] = np.load(self.folder / "window_offsets.npy", mmap_mode="r", allow_pickle=False)
        return array

    @cached_property
    def _window_tokens(self) -> NDArray[np.int32]:
        array: NDArray[np.int32] = np.load(self.folder / "window_tokens.npy", mmap_mode="r", allow_pickle=False)
        return array

    @cached_property
    def _connection(self) -> Any:
        import duckdb

        connection = duckdb.connect(config={"threads": 1})
        for view, files in (
            ("vocabulary", "vocabulary.parquet"),
            ("latents", "latents.parquet"),
            ("items", "items-*.parquet"),
            ("windows", "windows.parquet"),
        ):
            path = str(self.folder / files).replace("'", "''")
            connection.execute(f"CREATE VIEW {view} AS SELECT * FROM read_parquet('{path}')")
        return connection

    def _query(self, query: str, parameters: Sequence[Any] = ()) -> Any:
        import duckdb

        try:
            return self._connection.execute(query, parameters)
        except (duckdb.IOException, duckdb.InvalidInputException) as error:
            raise self._damaged(error) from error

    def _table(self, query: str, parameters: Sequence[Any]) -> pa.Table:
        import duckdb

        try:
            return self._connection.sql(query, params=list(parameters)).to_arrow_table()
        except (duckdb.IOException, duckdb.InvalidInputException) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> UserError:
        first = str(error).splitlines()[0]
        return UserError(f"evidence in {str(self.folder)!r} is damaged ({first}); remove that folder and resume")


def restrict(evidence: LatentEvidence, purpose: Purpose) -> LatentEvidence:
    """Return `evidence` without the windows that `purpose` may not see; asking the result for one of them raises."""
    visible = VISIBLE[purpose]
    kept = tuple(window for window in evidence.windows if window.split in visible)
    return replace(evidence, windows=kept, sealed=evidence.sealed | (frozenset(SPLITS) - frozenset(visible)))


def _activations(items: pa.Table, starts: NDArray[np.int64], size: int) -> list[NDArray[np.float32] | None]:
    """Return for each item the one array of all activations, shape (token of all items,), or None where not known."""
    positions, values = items.column("positions"), items.column("values")
    dense = np.zeros(size, dtype=np.float32)
    known = positions.is_valid().to_numpy()
    counts = np.where(known, pc.list_value_length(positions).fill_null(0).to_numpy(), 0)
    where = np.repeat(starts, counts) + pc.list_flatten(positions).to_numpy()
    dense[where] = pc.list_flatten(values).to_numpy()
    return [dense if is_known else None for is_known in known.tolist()]


def _marks(column: pa.ChunkedArray) -> Iterable[tuple[int, ...] | None]:
    if column.null_count == len(column):
        return itertools.repeat(None, len(column))
    return (None if marks is None else tuple(marks) for marks in column.to_pylist())
