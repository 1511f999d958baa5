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

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from exegete.tools.errors import UserError
from exegete.tools.windows import SPLITS, LatentEvidence, Split, Status, Window

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

    @cached_property
    def statuses(self) -> dict[int, Status]:
        """Latent → status, ascending by latent."""
        rows = self._query("SELECT latent, status FROM latents ORDER BY latent").fetchall()
        return dict(rows)

    @cached_property
    def pieces(self) -> NDArray[np.object_]:
        """The text of each token, shape (vocabulary,), dtype object."""
        table = self._query("SELECT piece FROM vocabulary ORDER BY token").fetchall()
        return np.array([row[0] for row in table], dtype=object)

    def read(self, latents: Sequence[int], purpose: Purpose) -> Iterator[LatentEvidence]:
        """Yield the evidence of `latents`, ascending, holding only what `purpose` may see."""
        visible = VISIBLE[purpose]
        chunk = sorted(set(latents))
        if not chunk:
            return
        wanted = "latent BETWEEN ? AND ? AND latent IN (SELECT unnest(?::INTEGER[]))"
        bounds = [chunk[0], chunk[-1], chunk]
        columns = f"latent, status, explanation, {', '.join(_STATISTICS)}"
        heads = self._query(f"SELECT {columns} FROM latents WHERE {wanted} ORDER BY latent", bounds).fetchall()
        items = self._query(
            f"SELECT * FROM items WHERE {wanted} AND split IN (SELECT unnest(?)) ORDER BY latent, split, kind, rank",
            [*bounds, list(visible)],
        ).to_arrow_table()
        windows = self._windows(items)
        starts = np.searchsorted(items.column("latent").to_numpy(), [head[0] for head in heads] + [2**31 - 1])
        sealed = frozenset(SPLITS) - frozenset(visible)
        for i, (latent, status, explanation, *numbers) in enumerate(heads):
            statistics = {k: float(v) for k, v in zip(_STATISTICS, numbers, strict=True) if v is not None}
            own = tuple(windows[starts[i] : starts[i + 1]])
            yield LatentEvidence(latent, status, own, statistics, explanation, sealed)

    def _windows(self, items: pa.Table) -> list[Window]:
        ids = items.column("window").to_numpy()
        rows = np.searchsorted(self._window_ids, ids)
        offsets, pieces, tokens = self._window_offsets, self.pieces, self._window_tokens
        documents = self._documents(ids)
        made: list[Window] = []
        for row, item in zip(rows.tolist(), items.to_pylist(), strict=True):
            text = tuple(pieces[tokens[offsets[row] : offsets[row + 1]]].tolist())
            made.append(_window(item, text, documents.get(item["window"])))
        return made

    def _documents(self, ids: NDArray[np.int64]) -> dict[int, str]:
        wanted = np.unique(ids).tolist()
        if not wanted:
            return {}
        query = """SELECT "window", document FROM windows
            WHERE "window" BETWEEN ? AND ? AND "window" IN (SELECT unnest(?::BIGINT[]))"""
        return dict(self._query(query, [wanted[0], wanted[-1], wanted]).fetchall())

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
            message = f"evidence in {str(self.folder)!r} is damaged ({error}); remove that folder and resume"
            raise UserError(message) from error


def restrict(evidence: LatentEvidence, purpose: Purpose) -> LatentEvidence:
    """Return `evidence` without the windows that `purpose` may not see; asking the result for one of them raises."""
    visible = VISIBLE[purpose]
    kept = tuple(window for window in evidence.windows if window.split in visible)
    return replace(evidence, windows=kept, sealed=evidence.sealed | (frozenset(SPLITS) - frozenset(visible)))


def _window(item: Mapping[str, Any], tokens: tuple[str, ...], document: str | None) -> Window:
    activations: NDArray[np.float32] | None = None
    if item["positions"] is not None:
        activations = np.zeros(len(tokens), dtype=np.float32)
        activations[item["positions"]] = item["values"]
    return Window(
        id=item["window"],
        tokens=tokens,
        activations=activations,
        fires=item["fires"],
        split=item["split"],
        kind=item["kind"],
        stratum=item["stratum"],
        top=bool(item["top"]),
        marks=None if item["marks"] is None else tuple(item["marks"]),
        marks_correct=item["marks_correct"],
        document=document,
    )
