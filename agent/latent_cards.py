"""What people are shown of a latent: its numbers, explanation, scores, marked windows and the judge's mistakes.

Read from the published snapshot and from the evidence beside it; `exegete show` and the report draw the same cards.
Corpus text is untrusted: every token passes `visible`, so that no control or direction character reaches a screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.tools.errors import UserError
from exegete.tools.evidence import Evidence
from exegete.tools.rendering import visible
from exegete.tools.store import Store
from exegete.tools.windows import LatentEvidence, Window

if TYPE_CHECKING:
    import duckdb

TOP_WINDOWS = 3
QUANTILE_WINDOWS = 4
MISTAKES = 4
STATISTICS = ("density", "firing_tokens", "firing_windows", "tokens", "mean", "standard_deviation", "peak")
_EXPLANATION_COLUMNS = "latent, explanation_id, text, predicate, explainer, model"


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of a shown window."""

    text: str
    """Safe to show: see `visible`."""
    strength: float
    """Activation as a share of the latent's peak, 0 to 1; 1 where only the marks of an import are known."""
    activation: float | None
    marked: bool = False
    """Whether the judge saw it marked (fuzzing)."""


@dataclass(frozen=True, slots=True)
class ShownWindow:
    """A window as people see it."""

    caption: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One row of the `scores` view."""

    evaluator: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    failures: int
    baseline: str | None
    status: str


@dataclass(frozen=True, slots=True)
class LatentCard:
    """Everything that is shown of one latent."""

    latent: int
    status: str
    outcome: str | None
    typed: str | None
    detail: str | None
    statistics: Mapping[str, float | None]
    explanation: Mapping[str, str | None] | None
    """`explanation_id`, `text`, `predicate`, `explainer`, `model`; None where there is none."""
    run: str | None
    """The run that scored it."""
    scores: tuple[ScoreRow, ...]
    windows: tuple[ShownWindow, ...]
    mistakes: tuple[ShownWindow, ...]

    def own(self, metric: str = "balanced_accuracy") -> list[ScoreRow]:
        """Return the scores of the explanation itself under `metric`."""
        return [row for row in self.scores if row.baseline is None and row.metric == metric]

    def floors(self, evaluator: str, metric: str = "balanced_accuracy") -> list[ScoreRow]:
        """Return what other explanations reached on the same windows."""
        return [row for row in self.scores if row.baseline and (row.evaluator, row.metric) == (evaluator, metric)]


def choose_dictionary(connection: duckdb.DuckDBPyConnection, wanted: str | None) -> str:
    """Return the fingerprint of the dictionary that `wanted` names: its name, or how its fingerprint starts.

    Raises:
        UserError: there is none, or several fit.
    """
    known: list[tuple[str, str]] = connection.execute(
        "SELECT dictionary, name FROM dictionaries ORDER BY name, dictionary"
    ).fetchall()
    if not known:
        [(store,)] = connection.execute("SELECT store FROM data.snapshot").fetchall()
        raise UserError(
            f"the store {store!r} holds no dictionary yet; run `exegete label` or `exegete evidence import`"
        )
    fitting = known
    if wanted is not None:
        start = wanted.removeprefix("sha256:")
        fitting = [row for row in known if row[1] == wanted] or [
            row for row in known if start and row[0].removeprefix("sha256:").startswith(start)
        ]
    if len(fitting) == 1:
        return fitting[0][0]
    listed = ", ".join(f"{visible(name)!r} ({fingerprint[:19]})" for fingerprint, name in (fitting or known))
    if fitting:
        raise UserError(f"{len(fitting)} dictionaries fit {wanted or ''!r}: {listed}; choose one with --dictionary")
    raise UserError(f"no dictionary is named {wanted!r} or has that fingerprint; there are: {listed}")


def read_cards(
    connection: duckdb.DuckDBPyConnection, store: Path, dictionary: str, latents: Sequence[int], run: str | None = None
) -> list[LatentCard]:
    """Return the cards of `latents` in their order; those that the dictionary lacks are left out.

    Args:
        run: show the explanation and scores of this run; of the run with the best score where it is left out.
    """
    rows = _rows(
        connection, "latents", "latent, status, outcome, typed, detail, " + ", ".join(STATISTICS), dictionary, latents
    )
    numbers = {row["latent"]: row for row in rows}
    if not numbers:
        return []
    explanations = _explanations(connection, dictionary, latents, run)
    evidence = Evidence.open(Store.open(store).evidence_folder(dictionary))
    found = {own.latent: own for own in evidence.read([n for n in latents if n in numbers], "score")}
    return [
        _card(connection, dictionary, numbers[latent], explanations.get(latent), found[latent])
        for latent in latents
        if latent in numbers
    ]


def _card(
    connection: duckdb.DuckDBPyConnection,
    dictionary: str,
    numbers: Mapping[str, Any],
    explanation: Mapping[str, Any] | None,
    own: LatentEvidence,
) -> LatentCard:
    scale = _scale(numbers, own)
    scores: tuple[ScoreRow, ...] = ()
    mistakes: tuple[ShownWindow, ...] = ()
    if explanation is not None:
        which = (dictionary, own.latent, explanation["explanation_id"], explanation["run"])
        scores = _scores(connection, which)
        mistakes = _mistakes(connection, which, own, scale)
    return LatentCard(
        latent=own.latent,
        status=numbers["status"],
        outcome=numbers["outcome"],
        typed=numbers["typed"],
        detail=None if numbers["detail"] is None else visible(numbers["detail"]),
        statistics={name: numbers[name] for name in STATISTICS},
        explanation=None if explanation is None else _shown_explanation(explanation),
        run=None if explanation is None else explanation["run"],
        scores=scores,
        windows=tuple(_shown(caption, window, scale) for caption, window in _chosen(own)),
        mistakes=mistakes,
    )


def _rows(
    connection: duckdb.DuckDBPyConnection, view: str, columns: str, dictionary: str, latents: Sequence[int]
) -> list[dict[str, Any]]:
    query = f"SELECT {columns} FROM {view} WHERE dictionary = ? AND latent IN (SELECT unnest(?::INTEGER[]))"
    cursor = connection.execute(query, [dictionary, list(latents)])
    names = [column[0] for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _explanations(
    connection: duckdb.DuckDBPyConnection, dictionary: str, latents: Sequence[int], run: str | None
) -> dict[int, dict[str, Any]]:
    """Return for each latent the explanation that scored best (in `run`), else one that nothing scored."""
    rows = _rows(connection, "explanations", _EXPLANATION_COLUMNS, dictionary, latents)
    by_id = {row["explanation_id"]: row for row in sorted(rows, key=lambda row: str(row["explanation_id"]))}
    scored = connection.execute(
        """SELECT latent, explanation_id, run FROM scores
        WHERE dictionary = ? AND latent IN (SELECT unnest(?::INTEGER[])) AND run = coalesce(?, run)
          AND baseline IS NULL AND metric = 'balanced_accuracy'
        GROUP BY ALL ORDER BY avg(value) DESC NULLS LAST, explanation_id, run""",
        [dictionary, list(latents), run],
    ).fetchall()
    best: dict[int, dict[str, Any]] = {}
    for latent, identity, scored_in in scored:
        best.setdefault(latent, {**by_id[identity], "run": scored_in})
    for row in by_id.values():
        best.setdefault(row["latent"], {**row, "run": None})
    return best


def _scores(connection: duckdb.DuckDBPyConnection, which: tuple[str, int, str, str | None]) -> tuple[ScoreRow, ...]:
    rows = connection.execute(
        """SELECT evaluator, metric, value, low, high, n, failures, baseline, status FROM scores
        WHERE dictionary = ? AND latent = ? AND explanation_id = ? AND run = ?
        ORDER BY evaluator, metric, baseline NULLS FIRST""",
        which,
    ).fetchall()
    return tuple(ScoreRow(*row) for row in rows)


def _mistakes(
    connection: duckdb.DuckDBPyConnection, which: tuple[str, int, str, str | None], own: LatentEvidence, scale: float
) -> tuple[ShownWindow, ...]:
    """Return windows that the judge got wrong, each once: evaluators and both kinds of mistake take turns."""
    rows = connection.execute(
        """SELECT evaluator, truth, window_id, marks FROM verdicts
        WHERE dictionary = ? AND latent = ? AND explanation_id = ? AND run = ? AND baseline IS NULL AND applies <> truth
        QUALIFY row_number() OVER (PARTITION BY evaluator, truth ORDER BY window_id) <= ?
        ORDER BY evaluator, truth, window_id""",
        [*which, 4 * MISTAKES],
    ).fetchall()
    waiting: dict[tuple[str, bool], list[tuple[int, Sequence[int] | None]]] = {}
    for evaluator, truth, identity, marks in rows:
        waiting.setdefault((evaluator, truth), []).append((identity, marks))
    windows = {window.id: window for window in own.windows}
    shown: list[ShownWindow] = []
    while waiting and len(shown) < MISTAKES:
        for (evaluator, truth), left in list(waiting.items()):
            found = next(((i, marks) for i, marks in left if i in windows), None)
            if found is None:
                del waiting[evaluator, truth]
            else:
                caption = f"false {'negative' if truth else 'positive'} · {evaluator}"
                shown.append(_shown(caption, windows.pop(found[0]), scale, found[1] or ()))
    return tuple(shown[:MISTAKES])


def _shown_explanation(explanation: Mapping[str, Any]) -> dict[str, str | None]:
    names = ("explanation_id", "text", "predicate", "explainer", "model")
    return {name: None if explanation[name] is None else visible(explanation[name]) for name in names}


def _scale(numbers: Mapping[str, Any], own: LatentEvidence) -> float:
    peaks = [window.peak or 0.0 for window in own.windows]
    return max([numbers["peak"] or 0.0, *peaks])


def _chosen(own: LatentEvidence) -> list[tuple[str, Window]]:
    """Return the windows of highest peak, then one each from strata spread over the sample, strongest first."""
    firing = [window for window in own.windows if window.kind == "firing" and window.fires]
    if any(window.activations is None for window in firing):
        return [("firing", window) for window in firing[: TOP_WINDOWS + QUANTILE_WINDOWS]]
    ranked = sorted(firing, key=lambda window: (-(window.peak or 0.0), window.id))
    seen: set[int] = set()
    chosen: list[tuple[str, Window]] = []
    for window in ranked:
        if window.id not in seen and len(chosen) < TOP_WINDOWS:
            chosen.append((f"top · peak {window.peak:.3g}", window))
            seen.add(window.id)
    strata: dict[int, Window] = {}
    for window in ranked:
        if window.stratum is not None and window.id not in seen:
            strata.setdefault(window.stratum, window)
    levels = sorted(strata, reverse=True)
    count = 1 + max((window.stratum for window in firing if window.stratum is not None), default=0)
    for level in levels[:: max(1, -(-len(levels) // QUANTILE_WINDOWS))]:
        window = strata[level]
        chosen.append((f"quantile {level + 1} of {count} · peak {window.peak:.3g}", window))
    return chosen


def _shown(caption: str, window: Window, scale: float, marks: Sequence[int] = ()) -> ShownWindow:
    values = window.activations
    known = frozenset(window.firing_positions()) if values is None else frozenset()
    seen_marked = frozenset(marks)
    pieces = []
    for position, token in enumerate(window.tokens):
        activation = None if values is None else float(values[position])
        share = float(position in known) if activation is None else activation / scale if scale > 0 else 0.0
        pieces.append(Piece(visible(token), min(1.0, max(0.0, share)), activation, position in seen_marked))
    return ShownWindow(f"{caption} · {window.split}", tuple(pieces))
