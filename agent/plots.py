"""Plots as inline SVG, drawn by hand: a few kilobytes each, no script, and coloured by the page's style sheet.

A `Canvas` maps values to pixels and collects shapes; the functions above it draw the plots of the report. Every text is
escaped; colours are classes (`s-own`, `s-shuffled`, `s-live`, …), so a plot follows the page into the dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 520, 290
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 44
CUT = 4.0

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear axis from `low` to `high` with labeled ticks."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def share(self, value: float) -> float:
        """Return where `value` lies between `low` and `high`, from 0 to 1; values outside are drawn at the border."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


@dataclass(frozen=True, slots=True)
class Series:
    """One distribution or cloud: `points` are (bin or x, count or y), ascending where the order matters."""

    style: str
    """The class that colours it, without its `s-`."""
    label: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawn plot with what stands around it."""

    title: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()
    """Style and label of each series."""
    note: str = ""


def round_axis(label: str, low: float, high: float, count: int = 5) -> Axis:
    """Return an axis over `low`…`high` with about `count` round ticks (steps of 1, 2, 2.5 or 5 times a power of ten)."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m * count >= span * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor((low + span) / step + 1e-9)
    return Axis(label, low, low + span, tuple((i * step, f"{i * step:,.4g}") for i in range(first, last + 1)))


def power_axis(label: str, low: float, high: float) -> Axis:
    """Return an axis for log10 values, its ticks whole powers of ten: -3 is labeled 0.001."""
    first, last = math.floor(low), math.ceil(high)
    last = max(last, first + 1)
    return Axis(label, first, last, tuple((float(i), f"{10.0**i:g}") for i in range(first, last + 1)))


def score_histogram(title: str, label: str, series: Sequence[Series], width: float) -> Plot:
    """Draw distributions as shares per bin of `width`: the first filled, the others as outlines.

    One whose values are all the same (a constant explanation scores exactly one half) is a vertical line: its spike would
    flatten the rest. Bins more than `CUT` times as high as the highest of the first distribution are cut off, and the note
    says so. `Series.points` are (value, count), ascending; a value of one belongs to the last bin below it.
    """
    spread = [one for position, one in enumerate(series) if position == 0 or len(one.points) > 1]
    shares = {one.style: _shares(one.points, width) for one in spread}
    highest = [max((height for _, height in bins), default=1.0) for bins in shares.values()]
    top = min(max(highest), CUT * highest[0])
    canvas = Canvas(title, _score_axis(label, series), round_axis("share of latents", 0.0, top * 1.06, 4))
    for position, one in enumerate(series):
        if one.style not in shares:
            canvas.vertical(one.points[0][0], one.style)
            continue
        outline = _steps(shares[one.style], width)
        if position == 0:
            canvas.area(outline, one.style)
        canvas.line(outline, one.style)
    note = (
        f"the highest bins of a floor are cut off; they reach {max(highest):.0%} of its latents"
        if max(highest) > top
        else ""
    )
    return Plot(title, canvas.svg(), tuple((one.style, one.label) for one in series), note)


def ecdf(title: str, label: str, series: Sequence[Series]) -> Plot:
    """Draw the share of latents at or below each value. `Series.points` are (value, count), ascending."""
    canvas = Canvas(title, _score_axis(label, series), UNIT_SHARE)
    for one in series:
        reached, outline = 0.0, [(canvas.x.low, 0.0)]
        total = sum(count for _, count in one.points) or 1.0
        for value, count in one.points:
            outline.append((value, reached))
            reached += count / total
            outline.append((value, reached))
        canvas.line([*outline, (1.0, reached)], one.style)
    return Plot(title, canvas.svg(), tuple((one.style, one.label) for one in series))


def stacked_histogram(title: str, x: Axis, y_label: str, series: Sequence[Series], width: float) -> Plot:
    """Draw counts per bin of `width`, the series on top of each other. `Series.points` are (lower end of bin, count)."""
    totals: dict[float, float] = {}
    for one in series:
        for at, count in one.points:
            totals[at] = totals.get(at, 0.0) + count
    canvas = Canvas(title, x, round_axis(y_label, 0.0, max(totals.values(), default=1.0) * 1.04, 4))
    floor: dict[float, float] = {}
    for one in series:
        for at, count in one.points:
            base = floor.get(at, 0.0)
            canvas.bar(at, at + width, base, base + count, one.style, f"{one.label}: {count:,.0f}")
            floor[at] = base + count
    return Plot(title, canvas.svg(), tuple((one.style, one.label) for one in series))


def scatter(title: str, x: Axis, y: Axis, cloud: Series, median: Series | None = None, diagonal: bool = False) -> Plot:
    """Draw a cloud of points, with the line of its medians and the diagonal where asked for."""
    canvas = Canvas(title, x, y)
    if diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        canvas.line([(low, low), (high, high)], "diagonal")
    canvas.dots(cloud.points, cloud.style)
    legend = [(cloud.style, cloud.label)]
    if median is not None and len(median.points) > 1:
        canvas.line(median.points, median.style)
        legend.append((median.style, median.label))
    return Plot(title, canvas.svg(), tuple(legend))


UNIT_SHARE = Axis("share of latents at or below", 0.0, 1.0, tuple((i / 4, f"{i / 4:g}") for i in range(5)))


@dataclass
class Canvas:
    """A frame with two axes that shapes are drawn into, in the order of the calls."""

    title: str
    x: Axis
    y: Axis
    shapes: list[Markup] = field(default_factory=list)

    def line(self, points: Sequence[Point], style: str) -> None:
        """Draw straight lines from point to point."""
        self._add('<path class="line s-{}" d="{}"/>', style, self._path(points))

    def area(self, points: Sequence[Point], style: str) -> None:
        """Fill between the points and the x axis."""
        if points:
            closed = [(points[0][0], self.y.low), *points, (points[-1][0], self.y.low)]
            self._add('<path class="area s-{}" d="{}Z"/>', style, self._path(closed))

    def band(self, low: Sequence[Point], high: Sequence[Point], style: str) -> None:
        """Fill between two lines, both ascending in x."""
        self._add('<path class="area s-{}" d="{}Z"/>', style, self._path([*low, *reversed(high)]))

    def vertical(self, at: float, style: str) -> None:
        """Draw a vertical line over the whole height."""
        self.line([(at, self.y.low), (at, self.y.high)], style)

    def bar(self, left: float, right: float, low: float, high: float, style: str, hover: str) -> None:
        """Draw a bar, with a text for the pointer that rests on it."""
        (x0, y0), (x1, y1) = self._pixel((left, high)), self._pixel((right, low))
        shape = '<rect class="bar s-{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
        self._add(shape, style, x0 + 0.4, y0, max(0.6, x1 - x0 - 0.8), max(0.0, y1 - y0), hover)

    def dots(self, points: Sequence[Point], style: str) -> None:
        """Draw one dot a point; all of them are one path of empty strokes with round ends, a few bytes each."""
        path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in map(self._pixel, points))
        size = "few" if len(points) <= 300 else "many"
        self._add('<path class="dots {} s-{}" d="{}"/>', size, style, path)

    def svg(self) -> Markup:
        """Return the finished plot."""
        head = Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">')
        return head.format(WIDTH, HEIGHT, self.title) + self._axes() + Markup("").join(self.shapes) + Markup("</svg>")

    def _add(self, shape: str, *values: object) -> None:
        self.shapes.append(Markup(shape).format(*values))

    def _pixel(self, point: Point) -> Point:
        x = LEFT + self.x.share(point[0]) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - self.y.share(point[1]) * (HEIGHT - TOP - BOTTOM)
        return x, y

    def _path(self, points: Iterable[Point]) -> str:
        return "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(map(self._pixel, points)))

    def _axes(self) -> Markup:
        bottom, parts = HEIGHT - BOTTOM, []
        for value, text in self.y.ticks:
            _, y = self._pixel((self.x.low, value))
            parts.append(_GRID.format(LEFT, y, WIDTH - RIGHT, y))
            parts.append(_TICK.format(LEFT - 7, y + 4, "end", text))
        for value, text in self.x.ticks:
            x, _ = self._pixel((value, self.y.low))
            parts.append(_MARK.format(x, bottom, x, bottom + 4))
            parts.append(_TICK.format(x, bottom + 17, "middle", text))
        parts.append(_AXIS.format(LEFT, bottom, WIDTH - RIGHT, bottom))
        parts.append(_TICK.format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 7, "middle", self.x.label))
        middle = (TOP + bottom) / 2
        parts.append(_TURNED.format(13, middle, 13, middle, escape(self.y.label)))
        return Markup("").join(parts)


_GRID = Markup('<line class="grid" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
_MARK = Markup('<line class="axis" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
_AXIS = _MARK
_TICK = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
_TURNED = Markup('<text transform="rotate(-90 {:.1f} {:.1f})" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>')


def _score_axis(label: str, series: Sequence[Series]) -> Axis:
    low = min((value for one in series for value, _ in one.points), default=0.0)
    return round_axis(label, min(0.4, math.floor(low * 10) / 10), 1.0, 6)


def _shares(points: Sequence[Point], width: float) -> list[Point]:
    """Return the share of the counts in each bin that has any, as (lower end, share), ascending."""
    total = sum(count for _, count in points) or 1.0
    bins: dict[int, float] = {}
    for value, count in points:
        number = min(math.floor(value / width + 1e-9), round(1 / width) - 1)
        bins[number] = bins.get(number, 0.0) + count / total
    return [(number * width, bins[number]) for number in sorted(bins)]


def _steps(points: Sequence[Point], width: float) -> list[Point]:
    """Return the outline of a histogram, down to zero wherever bins are missing."""
    outline: list[Point] = []
    end = None
    for at, height in points:
        if end is None or at - end > width / 2:
            if end is not None:
                outline.append((end, 0.0))
            outline.append((at, 0.0))
        outline += [(at, height), (at + width, height)]
        end = at + width
    return [*outline, (end, 0.0)] if end is not None else []
