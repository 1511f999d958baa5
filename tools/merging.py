"""From the parts of a finished activation pass to an evidence folder (see `exegete.tools.evidence`).

1. The slices' integer statistics are added.
2. In blocks of latents, the selected firing windows are joined with `random` and `hard` non-firing ones
   (`hard_negatives`).
3. Each latent gets its status: dead, rare, dense or live, by the counts in `EvidenceCounts`.
4. The tokens of every window that was named are copied from the corpus. A window that spans documents is given the one
   that holds most of its tokens.
5. The nearest latents go into `neighbours.parquet`.

Everything depends on the parts alone, not on how many there were, and the folder is there whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from exegete.tools.errors import UserError
from exegete.tools.evidence import ITEMS, LATENTS, WINDOWS, Evidence
from exegete.tools.evidence_writing import write_evidence
from exegete.tools.firing_events import HISTOGRAM_BINS, Statistics
from exegete.tools.hard_negatives import Negatives, PoolFirings, hard_negatives, random_negatives
from exegete.tools.neighbours import nearest_latents, neighbours_table
from exegete.tools.parts import damaged, load_statistics, open_part, read_manifest
from exegete.tools.pass_settings import PassSettings
from exegete.tools.sampling import F32, I64, rank_within
from exegete.tools.selecting import read_latents, selected_path, slices_of
from exegete.tools.verifying import load_verified
from exegete.tools.window_pool import draw_pool, tokens_of
from exegete.tools.windows import SPLITS, WINDOW_TOKENS

if TYPE_CHECKING:
    from exegete.tools.corpus import Corpus
    from exegete.tools.dictionaries import Dictionary
    from exegete.tools.subject import Subject

LATENTS_AT_ONCE = 2_048
_WINDOWS_AT_ONCE = 8_192
_KINDS = ("firing", "hard", "random")
"""In stored order, which is alphabetical."""


def merge(
    folder: Path,
    evidence_folder: Path,
    subject: Subject,
    dictionary: Dictionary,
    corpus: Corpus,
    settings: PassSettings,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evidence:
    """Make the evidence of a finished pass, or open it where it is there already.

    Raises:
        UserError: the pass in `folder` is unfinished, of something else or damaged; there is evidence of another
            dictionary in `evidence_folder`; or the disk is full.
    """
    if (evidence_folder / "evidence.json").exists():
        return _same(Evidence.open(evidence_folder), subject, dictionary, corpus, settings)
    manifest = read_manifest(folder)
    if manifest["dictionary"] != dictionary.fingerprint or manifest["corpus"] != corpus.fingerprint:
        raise UserError(
            f"{str(folder)!r} holds an activation pass of another dictionary or corpus; name another folder"
        )
    if not (folder / "verified.parquet").exists():
        raise UserError(f"the activation pass in {str(folder)!r} is unfinished; resume it first")
    merging = _Merging(folder, dictionary, corpus, settings, progress)
    neighbours, cosines, source = nearest_latents(dictionary, merging.firings, settings.neighbours)
    merging.neighbours = neighbours[:, : (settings.neighbours + 1) // 2]
    pieces = subject.pieces
    write_evidence(
        evidence_folder,
        vocabulary=pa.table({"token": np.arange(len(pieces), dtype=np.int32), "piece": pieces}),
        items=merging.items(),
        latents=merging.latent_rows(),
        windows=merging.windows(),
        provenance=_provenance(manifest, corpus, settings) | {"neighbours": source},
        extra={"neighbours": neighbours_table(neighbours, cosines)},
    )
    return Evidence.open(evidence_folder)


def _same(
    evidence: Evidence, subject: Subject, dictionary: Dictionary, corpus: Corpus, settings: PassSettings
) -> Evidence:
    held = evidence.provenance
    wanted = {
        "dictionary": dictionary.fingerprint,
        "subject": subject.fingerprint,
        "corpus": corpus.fingerprint,
        "seed": settings.seed,
    }
    for key, value in wanted.items():
        if held.get(key) != value:
            raise UserError(
                f"{str(evidence.folder)!r} holds evidence of another {key} ({held.get(key)!r}); name another store"
            )
    # The micro-batch follows the device, and evidence that a GPU made may be labeled where there is none.
    was, now = (
        {k: v for k, v in _flat(s).items() if k != "micro_batch"} for s in (held["settings"], settings.identity())
    )
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            raise UserError(
                f"{str(evidence.folder)!r} holds evidence made with other settings ({key} was {was.get(key)}, now "
                f"{now.get(key)}); set it back or name another store"
            )
    return evidence


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings without their nesting, as JSON gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    counts: dict[str, Any] = plain.pop("counts")
    return plain | counts


def _provenance(manifest: dict[str, Any], corpus: Corpus, settings: PassSettings) -> dict[str, Any]:
    import torch

    kept = {key: value for key, value in manifest.items() if key != "slices"}
    return kept | {
        "source": "pass",
        "seed": settings.seed,
        "contexts": corpus.contexts,
        "context_tokens": corpus.context_tokens,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


@dataclass
class _Merging:
    """The tables of one evidence folder; `items` is drawn first and notes what the others need."""

    folder: Path
    dictionary: Dictionary
    corpus: Corpus
    settings: PassSettings
    progress: Callable[[str, int, int], None] | None
    firings: PoolFirings = field(init=False)
    neighbours: I64 = field(init=False)

    def __post_init__(self) -> None:
        latents = self.dictionary.latents
        pool = draw_pool(self.corpus, self.settings)
        self.firings = PoolFirings(self.folder, pool, tokens_of(self.corpus, pool.windows), latents)
        self._verified = load_verified(self.folder)
        self._top_tokens: I64 = np.load(self.folder / "top_tokens.npy", allow_pickle=False)
        self.statistics = Statistics(latents)
        for part in slices_of(self.folder):
            self.statistics.merge(load_statistics(part, latents))
        self._named = np.zeros(self.corpus.contexts * (self.corpus.context_tokens // WINDOW_TOKENS), bool)
        self._sampled, self._random, self._hard = np.zeros((3, latents, len(SPLITS)), np.int64)

    def items(self) -> Iterator[pa.Table]:
        """Yield rows of ITEMS, block by block."""
        source = open_part(selected_path(self.folder))
        total = self.dictionary.latents
        for first in range(0, total, LATENTS_AT_ONCE):
            latents = np.arange(first, min(first + LATENTS_AT_ONCE, total))
            try:
                firing = read_latents(source, first, first + len(latents))
            except (pa.ArrowException, OSError) as error:
                raise damaged(selected_path(self.folder), error) from error
            random = random_negatives(self.firings, latents, self.settings)
            hard = self._hard_of(latents, random)
            self._note(firing, random, hard)
            yield _items(firing, hard, random)
            if self.progress is not None:
                self.progress("merge", first + len(latents), total)

    def _hard_of(self, latents: I64, random: Negatives) -> Negatives:
        fires = latents[self.statistics.firings[latents] > 0]
        verified = self._verified
        low, high = np.searchsorted(verified.latents, [latents[0], latents[-1] + 1])
        own = Negatives(verified.latents[low:high], verified.splits[low:high], verified.windows[low:high])
        tokens, near = self._top_tokens[fires], self.neighbours[fires]
        return hard_negatives(self.firings, fires, tokens, near, own, random, self.settings)

    def _note(self, firing: pa.Table, random: Negatives, hard: Negatives) -> None:
        windows, latents, splits = (firing.column(name).to_numpy() for name in ("window", "latent", "split"))
        sampled = np.flatnonzero(firing.column("stratum").is_valid().to_numpy())
        np.add.at(self._sampled, (latents[sampled], splits[sampled]), 1)
        np.add.at(self._random, (random.latents, random.splits), 1)
        np.add.at(self._hard, (hard.latents, hard.splits), 1)
        for named in (windows, random.windows, hard.windows):
            self._named[named] = True

    def latent_rows(self) -> Iterator[pa.Table]:
        """Yield rows of LATENTS."""
        statistics, total = self.statistics, self.dictionary.latents
        firings = np.maximum(statistics.firings, 1)
        mean, square = statistics.sums() / firings
        deviation = np.sqrt(np.maximum(square - mean * mean, 0))
        never = statistics.firings == 0
        shortage = np.maximum(np.array(self.settings.counts.hard) - self._hard, 0).sum(axis=1)
        offsets = pa.array(np.arange(total + 1, dtype=np.int32) * HISTOGRAM_BINS)
        yield pa.table(
            {
                "latent": np.arange(total, dtype=np.int32),
                "status": pa.array(self._status(), pa.string()),
                "tokens": np.full(total, statistics.tokens),
                "firing_tokens": statistics.firings,
                "firing_windows": statistics.windows.reshape(total, -1).sum(axis=1),
                "density": statistics.firings / max(statistics.tokens, 1),
                "mean": pa.array(mean, mask=never),
                "standard_deviation": pa.array(deviation, mask=never),
                "peak": statistics.peak,
                "histogram": pa.ListArray.from_arrays(offsets, pa.array(statistics.histogram)),
                "certified": np.ones(total, bool),
                "hard_shortage": np.where(never, 0, shortage).astype(np.int32),
            }
        ).cast(pa.schema([f for f in LATENTS if f.name != "explanation"]))

    def _status(self) -> NDArray[np.str_]:
        counts = self.settings.counts
        ends = [SPLITS.index("explain"), SPLITS.index("test")]
        rare = (self._sampled[:, ends] < counts.minimum_firing).any(axis=1)
        dense = (self._random[:, ends] < counts.minimum_non_firing).any(axis=1)
        return np.select([self.statistics.firings == 0, rare, dense], ["dead", "rare", "dense"], "live")

    def windows(self) -> Iterator[pa.Table]:
        """Yield rows of WINDOWS for every window that an item names."""
        named = np.flatnonzero(self._named)
        per_context = self.corpus.context_tokens // WINDOW_TOKENS
        for start in range(0, len(named), _WINDOWS_AT_ONCE):
            ids = named[start : start + _WINDOWS_AT_ONCE]
            contexts, index = np.divmod(ids, per_context)
            positions = index[:, None] * WINDOW_TOKENS + np.arange(WINDOW_TOKENS)
            documents = self.corpus.document_of(np.broadcast_to(contexts[:, None], positions.shape), positions)
            tokens = tokens_of(self.corpus, ids).reshape(-1)
            offsets = pa.array(np.arange(len(ids) + 1, dtype=np.int32) * WINDOW_TOKENS)
            columns = [pa.array(ids), pa.array(_majority(documents)).cast(pa.string())]
            yield pa.table([*columns, pa.ListArray.from_arrays(offsets, pa.array(tokens))], schema=WINDOWS)


def _majority(documents: I64) -> I64:
    """Return the most frequent document of each row, padding (−1) aside; the first where two are as frequent."""
    same = (documents[:, :, None] == documents[:, None, :]).sum(axis=2, dtype=np.int16)
    chosen = np.where(documents >= 0, same, 0).argmax(axis=1)
    most: I64 = documents[np.arange(len(documents)), chosen]
    return most


def _items(firing: pa.Table, hard: Negatives, random: Negatives) -> pa.Table:
    """Return rows of ITEMS for one block, sorted by latent, split, kind, rank."""
    groups = firing.column("latent").to_numpy().astype(np.int64) * len(SPLITS) + firing.column("split").to_numpy()
    kinds = np.repeat(np.arange(3), [len(groups), len(hard.latents), len(random.latents)])
    groups = np.concatenate([groups, hard.groups, random.groups])
    hard_rank, random_rank = rank_within(hard.groups), rank_within(random.groups)
    ranks = np.concatenate([firing.column("rank").to_numpy(), hard_rank, random_rank])
    # Ranks are dense within each run, so a stable sort by group and kind keeps them in order.
    order = np.argsort(groups * 3 + kinds, kind="stable")
    silent = len(hard.latents) + len(random.latents)
    windows = np.concatenate([firing.column("window").to_numpy(), hard.windows, random.windows])
    peaks: F32 = np.append(firing.column("peak").to_numpy(), np.zeros(silent, np.float32))
    latents, splits = np.divmod(groups[order], len(SPLITS))
    columns = {
        "latent": pa.array(latents.astype(np.int32)),
        "split": _named(splits, SPLITS),
        "kind": _named(kinds[order], _KINDS),
        "rank": pa.array(ranks[order].astype(np.int32)),
        "window": pa.array(windows[order]),
        "fires": pa.array(kinds[order] == 0),
        "top": _padded(firing.column("top"), silent, False).take(order),
        "stratum": _padded(firing.column("stratum"), silent, None).take(order),
        "peak": pa.array(peaks[order]),
        "positions": _padded(firing.column("positions"), silent, []).take(order),
        "values": _padded(firing.column("values"), silent, []).take(order),
    }
    return pa.table({name: columns[name] for name in ITEMS.names if name in columns})


def _named(index: I64, names: tuple[str, ...]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(index.astype(np.int8)), pa.array(names)).cast(pa.string())


def _padded(column: pa.ChunkedArray, count: int, value: object) -> pa.Array:
    """Return the column in one piece with `count` times `value` after it."""
    joined = column.combine_chunks()
    if isinstance(joined, pa.ChunkedArray):
        joined = joined.chunk(0) if joined.num_chunks else pa.array([], column.type)
    return pa.concat_arrays([joined, pa.repeat(pa.scalar(value, column.type), count)])
