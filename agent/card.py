"""`exegete show`: the card of one latent for a terminal."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from exegete.agent.latent_cards import LatentCard, Piece, ScoreRow, ShownWindow, choose_dictionary, read_cards
from exegete.agent.report_figures import Source, provisional
from exegete.tools.errors import UserError
from exegete.tools.rendering import visible
from exegete.tools.store import connect

if TYPE_CHECKING:
    import duckdb

PLAIN_WIDTH = 120
METRICS = ("balanced_accuracy", "tpr", "tnr", "f1", "auroc", "auprc")
_COLUMNS: tuple[tuple[str, Literal["left", "right"]], ...] = (
    ("evaluator", "left"), ("metric", "left"), ("score", "left"), ("n", "right"), ("failed", "right"), ("floors", "left")
)  # fmt: skip
_SHADES = ("", "yellow", "bold yellow", "bold black on yellow", "bold black on bright_yellow")


def card(store: Path, latent: int, dictionary: str | None) -> str:
    """Return the card of a latent as text, with ANSI styles only where standard output is a terminal.

    Args:
        dictionary: name, or start of the fingerprint; may be None where the store has one dictionary.

    Raises:
        UserError: there is no such latent or dictionary, or several dictionaries fit.
    """
    with connect(store) as connection:
        fingerprint = choose_dictionary(connection, dictionary)
        name, subject, hook_point = connection.execute(
            "SELECT name, subject, hook_point FROM dictionaries WHERE dictionary = ?", [fingerprint]
        ).fetchall()[0]
        found = read_cards(connection, store, fingerprint, [latent])
        if not found:
            raise _unknown(latent, visible(name), *_range(connection, fingerprint))
        run_floors = _run_floors(connection, fingerprint, found[0].run)
    where = " · ".join(visible(part) for part in (name, subject, hook_point) if part)
    return _printed(_layout(found[0], f"{where} · {fingerprint[:19]}", run_floors))


def _range(connection: duckdb.DuckDBPyConnection, fingerprint: str) -> tuple[int | None, int | None]:
    query = "SELECT min(latent), max(latent) FROM latents WHERE dictionary = ?"
    first, last = connection.execute(query, [fingerprint]).fetchall()[0]
    return first, last


def _unknown(latent: int, name: str, first: int | None, last: int | None) -> UserError:
    if first is None:
        return UserError(f"latent {latent}: the dictionary {name!r} has no finished evidence yet; run `exegete resume`")
    return UserError(f"no latent {latent} in the dictionary {name!r}; it has the latents {first} to {last}")


def _printed(layout: RenderableType) -> str:
    styled = sys.stdout.isatty()
    width = shutil.get_terminal_size((PLAIN_WIDTH, 40)).columns if styled else PLAIN_WIDTH
    buffer = io.StringIO()
    console = Console(file=buffer, force_terminal=styled, width=width, highlight=False, no_color=not styled)
    console.print(layout, markup=False)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).strip("\n")


def _run_floors(connection: duckdb.DuckDBPyConnection, fingerprint: str, run: str | None) -> dict[str, str]:
    """Return evaluator → what the run's floors reached on average, for latents that were not among those drawn."""
    if run is None:
        return {}
    told = {}
    for evaluator, figures in provisional(Source(connection, fingerprint, run)).items():
        means = [f"{name} {_interval(**floor['balanced_accuracy'])}" for name, floor in figures["floors"].items()]
        told[evaluator] = "\n".join(["means of the run:", *means]) if means else "the run has none yet"
    return told


def _layout(shown: LatentCard, where: str, run_floors: dict[str, str]) -> Group:
    parts: list[RenderableType] = [
        Text.assemble((f"Latent {shown.latent}", "bold"), "  ", (where, "dim")),
        Text(_state(shown)),
        Text(_numbers(shown)),
        *_explanation(shown),
    ]
    if shown.scores:
        parts += [Text(""), _scores(shown, run_floors)]
    parts += _windows("Windows", shown.windows, "none were kept")
    if shown.scores:
        parts += _windows("The judge's mistakes on test windows", shown.mistakes, "none")
    return Group(*parts)


def _state(shown: LatentCard) -> str:
    words = [f"status: {shown.status}", f"outcome: {shown.outcome or 'not reached yet'}"]
    words.append(f"type: {shown.typed or 'not typed'}")
    return " · ".join(words) + (f"\n{shown.detail}" if shown.detail else "")


def _numbers(shown: LatentCard) -> str:
    s = shown.statistics
    if s["tokens"] is None:
        return "no firing statistics: the evidence was imported"
    fires = f"fires on {s['firing_tokens'] or 0:,.0f} of {s['tokens']:,.0f} tokens (density {s['density'] or 0:.3g})"
    if not s["firing_tokens"]:
        return fires
    spread = "" if s["standard_deviation"] is None else f" ± {s['standard_deviation']:.3g}"
    return f"{fires}, {s['firing_windows'] or 0:,.0f} windows; activation mean {s['mean'] or 0:.3g}{spread}, peak {s['peak'] or 0:.3g}"


def _explanation(shown: LatentCard) -> list[RenderableType]:
    told = shown.explanation
    if told is None:
        return [Text("\nNo explanation.", style="italic")]
    author = f"by {told['explainer']}" + (f" with {told['model']}" if told["model"] else ", no language model")
    if told["explainer"] == "given":
        author = "given with the evidence"
    lines: list[RenderableType] = [Text.assemble("\n", (told["text"] or "", "bold"), "  ", (f"({author})", "dim"))]
    if told["predicate"]:
        lines.append(Text(f"predicate: {told['predicate']}", style="cyan"))
    return lines


def _scores(shown: LatentCard, run_floors: dict[str, str]) -> Table:
    table = Table(
        title="Scores on held-out windows, with 95 % intervals", title_justify="left", box=None, pad_edge=False
    )
    for heading, justify in _COLUMNS:
        table.add_column(heading, justify=justify, header_style="dim")
    for metric in METRICS:
        for row in shown.own(metric):
            if row.value is None and metric in ("auroc", "auprc"):
                continue
            floors = [f"{floor.baseline} {_figure(floor)}" for floor in shown.floors(row.evaluator, metric)]
            none = run_floors.get(row.evaluator, "") if metric == "balanced_accuracy" else ""
            cells = (row.evaluator, metric, _figure(row), str(row.n), str(row.failures), "\n".join(floors) or none)
            table.add_row(*(Text(cell) for cell in cells))
    return table


def _figure(row: ScoreRow) -> str:
    if row.value is None:
        return f"none ({row.status})"
    return _interval(row.value, row.low, row.high)


def _interval(value: float | None, low: float | None, high: float | None, n: int | None = None) -> str:
    counted = "" if n is None else f" (n = {n:,})"
    if value is None:
        return f"none{counted}"
    return f"{value:.3f} [no interval]{counted}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]{counted}"


def _windows(title: str, windows: tuple[ShownWindow, ...], none: str) -> list[RenderableType]:
    lines: list[RenderableType] = [Text(f"\n{title}", style="bold")]
    if not windows:
        lines.append(Padding(Text(none, style="italic"), (0, 0, 0, 2)))
    for window in windows:
        lines.append(Padding(Text(window.caption, style="dim"), (0, 0, 0, 2)))
        lines.append(Padding(_marked(window.pieces), (0, 0, 0, 4)))
    return lines


def _marked(pieces: tuple[Piece, ...]) -> Text:
    """Return the window: firing tokens in « » (a terminal without colours shows them too), brighter where stronger."""
    text = Text()
    for number, piece in enumerate(pieces):
        fires = piece.strength > 0
        before = number > 0 and pieces[number - 1].strength > 0
        after = number + 1 < len(pieces) and pieces[number + 1].strength > 0
        shade = _SHADES[min(4, 1 + int(piece.strength * 4))] if fires else ""
        style = f"{shade} underline".strip() if piece.marked else shade
        text.append(
            f"{'«' if fires and not before else ''}{piece.text}{'»' if fires and not after else ''}", style=style
        )
    return text
