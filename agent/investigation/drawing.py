"""The plots of an investigation's report, as inline SVG without script (see `agent.plots`).

Three kinds, as tools return them (`Outcome.plots`):

1. `bars`: figures with their intervals, controls among them in grey, one below the other on one axis with its zero.
2. `curve`: lines with their bands, controls dashed: what a steering strength does.
3. `tokens`: the tokens of a prompt, shaded by a signed number each; these are words, not SVG, so that they wrap and can be copied.

What a record holds is not trusted: a plot that is not what its kind says raises `Undrawable`, and every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from exegete.agent.plots import WIDTH, Axis, Canvas, Plot, Point, round_axis
from exegete.tools.rendering import visible

MOST_ROWS = 60
MOST_POINTS = 1_000
MOST_TOKENS = 1_000
OWN = ("a", "b", "c", "d")
CONTROLS = ("control", "beside")
"""Styles of lines, and of those that are controls; used again from the first on."""

_LEFT, _RIGHT, _ROW, _HEAD, _FOOT = 206, 86, 24, 8, 40
_LABEL = 29
"""Characters of a row's label; the whole of it is shown to the pointer."""


class Undrawable(ValueError):
    """A plot is not what its kind says."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of a forest plot."""

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    control: bool = False
    link: str = ""
    """Anchor within the page."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a prompt with the number that it is shaded by."""

    text: str
    value: float | None
    strength: float
    """The number's share of the largest one, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt whose tokens are shaded."""

    title: str
    unit: str
    tokens: tuple[Token, ...]
    note: str = ""


def drawn(plot: Mapping[str, Any]) -> Plot | Tokens:
    """Return a tool's plot, drawn. Raises Undrawable."""
    kinds: dict[str, Callable[[Mapping[str, Any]], Plot | Tokens]] = {"bars": _bars, "curve": _curve, "tokens": _tokens}
    draw = kinds.get(str(plot.get("kind")))
    if draw is None:
        raise Undrawable(f"there is no plot of kind {plot.get('kind')!r}")
    try:
        return draw(plot)
    except Undrawable:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, StopIteration) as error:
        raise Undrawable(
            f"a plot of kind {plot['kind']!r} cannot be drawn ({type(error).__name__}: {error})"
        ) from error


def forest(title: str, unit: str, rows: Sequence[Row]) -> Plot:
    """Draw figures with their intervals one below the other, on one axis that shows zero. Raises Undrawable."""
    shown = rows[:MOST_ROWS]
    numbers = [x for row in shown for x in (row.value, row.low, row.high) if x is not None]
    if not numbers:
        raise Undrawable("there is no figure to draw")
    try:
        axis = _around_zero(unit, numbers)
    except (ArithmeticError, ValueError, StopIteration) as error:
        raise Undrawable("its figures are too large, or too small, for an axis") from error
    height = _HEAD + _ROW * len(shown) + _FOOT
    head = Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        WIDTH, height, visible(title)
    )
    parts = [head, *_scale(axis, height), *(_row(axis, row, at) for at, row in enumerate(shown)), Markup("</svg>")]
    note = f"{len(rows) - len(shown)} more figures are in the record" if len(rows) > len(shown) else ""
    return Plot(visible(title), Markup("").join(parts), (), note)


def _bars(plot: Mapping[str, Any]) -> Plot:
    rows = []
    for bar in plot["bars"]:
        value, low, high = (_number(bar.get(key)) for key in ("value", "low", "high"))
        rows.append(Row(str(bar["label"]), value, low, high, bool(bar.get("control", False))))
    return forest(str(plot["title"]), str(plot.get("unit", "")), rows)


def _around_zero(unit: str, numbers: Sequence[float]) -> Axis:
    low, high = min(0.0, *numbers), max(0.0, *numbers)
    pad = 0.04 * ((high - low) or 1.0)
    return round_axis(visible(unit), low - pad * (low < 0), high + pad * (high > 0 or low == high))


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.share(value) * (WIDTH - _LEFT - _RIGHT)


def _scale(axis: Axis, height: int) -> list[Markup]:
    bottom, parts = height - _FOOT, []
    for value, text in axis.ticks:
        style = "axis" if value == 0 else "grid"
        x = _x(axis, value)
        parts.append(_LINE.format(style, x, _HEAD, x, bottom))
        parts.append(_TEXT.format(x, bottom + 16, "middle", text))
    parts.append(_TEXT.format((_LEFT + WIDTH - _RIGHT) / 2, height - 7, "middle", axis.label))
    return parts


def _row(axis: Axis, row: Row, at: int) -> Markup:
    y, label = _HEAD + _ROW * (at + 0.5), visible(row.label)
    short = label if len(label) <= _LABEL else f"{label[: _LABEL - 1]}…"
    name = _TEXT.format(_LEFT - 10, y + 4, "end", short) + Markup("<title>{}</title>").format(label)
    name = Markup("<g>{}</g>").format(name)
    if row.link:
        name = Markup('<a href="#{}">{}</a>').format(row.link, name)
    style = "control" if row.control else "a"
    parts = [name]
    if row.low is not None and row.high is not None:
        parts.append(_INTERVAL.format(style, _x(axis, row.low), y, _x(axis, row.high), y))
    if row.value is not None:
        parts.append(_DOT.format(style, _x(axis, row.value), y))
    parts.append(
        _TEXT.format(WIDTH - _RIGHT + 8, y + 4, "start", "no figure" if row.value is None else f"{row.value:.3g}")
    )
    return Markup("").join(parts)


_LINE = Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
_TEXT = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
_INTERVAL = Markup('<line class="interval s-{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
_DOT = Markup('<circle class="dot s-{}" cx="{:.1f}" cy="{:.1f}" r="4"/>')


@dataclass(frozen=True, slots=True)
class _Line:
    style: str
    label: str
    points: list[Point]
    low: list[Point]
    high: list[Point]


def _curve(plot: Mapping[str, Any]) -> Plot:
    lines = _lines(plot["series"][:MOST_ROWS])
    points = [point for line in lines for point in (*line.points, *line.low, *line.high)]
    if not points:
        raise Undrawable("there is no point to draw")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    title = visible(str(plot["title"]))
    pad = 0.04 * ((max(ys) - min(ys)) or 1.0)
    canvas = Canvas(
        title,
        round_axis(visible(str(plot.get("x", ""))), min(xs), max(xs)),
        round_axis(visible(str(plot.get("y", ""))), min(ys) - pad, max(ys) + pad),
    )
    for line in lines:
        if len(line.low) > 1:
            canvas.band(line.low, line.high, line.style)
        elif line.low:
            canvas.line([*line.low, *line.high], line.style)
    for line in lines:
        canvas.line(line.points, line.style)
        canvas.dots(line.points, line.style)
    return Plot(title, canvas.svg(), tuple((line.style, line.label) for line in lines))


def _lines(series: Sequence[Mapping[str, Any]]) -> list[_Line]:
    found: list[_Line] = []
    for one in series:
        styles = CONTROLS if one.get("control", False) else OWN
        style = styles[sum(line.style in styles for line in found) % len(styles)]
        pairs = [(_number(x), _number(y)) for x, y in one["points"][:MOST_POINTS]]
        lows, highs = ([_number(y) for y in one.get(end) or [None] * len(pairs)] for end in ("low", "high"))
        if not len(pairs) <= min(len(lows), len(highs)):
            raise Undrawable(f"{len(pairs)} points have {len(lows)} lower and {len(highs)} upper ends")
        known = [
            (x, y, low, high)
            for (x, y), low, high in zip(pairs, lows, highs, strict=False)
            if x is not None and y is not None
        ]
        known.sort(key=lambda point: point[0])
        band = [(x, low, high) for x, _, low, high in known if low is not None and high is not None]
        points = [(x, y) for x, y, _, _ in known]
        low_line, high_line = [(x, low) for x, low, _ in band], [(x, high) for x, _, high in band]
        found.append(_Line(style, visible(str(one["label"])), points, low_line, high_line))
    return found


def _tokens(plot: Mapping[str, Any]) -> Tokens:
    texts, values = plot["tokens"], [_number(value) for value in plot["values"]]
    if len(texts) != len(values):
        raise Undrawable(f"{len(texts)} tokens have {len(values)} values")
    if not texts:
        raise Undrawable("there is no token to draw")
    largest = max((abs(value) for value in values if value is not None), default=0.0) or 1.0
    tokens = [
        Token(visible(str(text)), value, abs(value or 0.0) / largest)
        for text, value in zip(texts[:MOST_TOKENS], values, strict=False)
    ]
    note = f"{len(texts) - MOST_TOKENS} more tokens are in the record" if len(texts) > MOST_TOKENS else ""
    return Tokens(visible(str(plot["title"])), visible(str(plot.get("unit", ""))), tuple(tokens), note)


def _number(value: Any) -> float | None:
    """Return a number of a plot; None for null. Raises Undrawable for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Undrawable(f"{str(value)[:40]!r} is no number")
    return float(value)
