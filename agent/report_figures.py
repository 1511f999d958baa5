"""The figures and plots of the report, aggregated in SQL so that a hundred thousand latents cost no more than a hundred.

Headline figures are those that the run stored when it finished. For a run that has not finished, means with normal
intervals stand in, and the page says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from exegete.agent.plots import (
    Plot,
    Series,
    ecdf,
    power_axis,
    round_axis,
    scatter,
    score_histogram,
    stacked_histogram,
)
from exegete.evaluators.baselines import BASELINES
from exegete.evaluators.statistics import Z_95

if TYPE_CHECKING:
    import duckdb

METRIC = "balanced_accuracy"
SCATTER_POINTS = 3000
SCORE_BIN = 0.025
DENSITY_BIN = 0.25
STATUSES = ("live", "rare", "dense", "dead")
Figure = Mapping[str, Any]
"""`value`, `low`, `high`, `n`; all but `n` None where undefined."""

_SPREAD = "latent * 2654435761 % 4294967296"
"""Orders latents as if at random, and the same every time (Knuth's multiplicative hash)."""


@dataclass(frozen=True)
class Source:
    """The published results of one run of one dictionary."""

    connection: duckdb.DuckDBPyConnection
    dictionary: str
    run: str

    def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Return the rows of `query`, in which `own` and `floor` are this run's balanced accuracies."""
        cursor = self.connection.execute(_OWN_AND_FLOOR + query, [self.dictionary, self.run, METRIC, *parameters])
        return cursor.fetchall()

    def evaluators(self) -> list[str]:
        """Return the evaluators that scored something in this run."""
        return [name for (name,) in self.rows("SELECT DISTINCT evaluator FROM own ORDER BY evaluator")]


_OWN_AND_FLOOR = """
WITH scored AS (
    SELECT latent, evaluator, baseline, value, low, high, n, failures FROM scores
    WHERE dictionary = ? AND run = ? AND metric = ?
),
own AS (SELECT * FROM scored WHERE baseline IS NULL),
floor AS (SELECT * FROM scored WHERE baseline IS NOT NULL)
"""


def headline(source: Source, stored: str | None) -> dict[str, Any]:
    """Return evaluator → `balanced_accuracy` and `floors` (as `summarise` has them), with `judged` and `failures` added."""
    figures = json.loads(stored).get("evaluators", {}) if stored else provisional(source)
    counts = source.rows("SELECT evaluator, sum(n), sum(failures) FROM own GROUP BY evaluator")
    for evaluator, judged, failures in counts:
        if evaluator in figures:
            figures[evaluator] |= {"judged": int(judged), "failures": int(failures)}
    for found in figures.values():
        found["floors"] = {name: found["floors"][name] for name in sorted(found["floors"], key=_rank)}
    return {name: {"judged": 0, "failures": 0, **figures[name]} for name in sorted(figures)}


def provisional(source: Source) -> dict[str, Any]:
    """Return what `headline` returns, but means with normal intervals over latents; floors in the order of BASELINES."""
    columns = "avg({0}), stddev_samp({0}), count({0})"
    own = source.rows(f"SELECT evaluator, {columns.format('value')} FROM own GROUP BY evaluator")
    figures: dict[str, Any] = {name: {METRIC: normal(*numbers), "floors": {}} for name, *numbers in own}
    floors = source.rows(
        f"""SELECT f.evaluator, f.baseline, {columns.format("f.value")}, {columns.format("o.value - f.value")}
        FROM floor f JOIN own o USING (latent, evaluator) WHERE o.value IS NOT NULL AND f.value IS NOT NULL GROUP BY ALL"""
    )
    for name, baseline, mean, deviation, n, *above in sorted(floors, key=lambda row: _rank(row[1])):
        difference, spread, pairs = above
        figures[name]["floors"][baseline] = {
            METRIC: normal(mean, deviation, n),
            "above": normal(difference, spread, pairs, least=-1.0),
        }
    return figures


def normal(mean: float | None, deviation: float | None, n: int, least: float = 0.0) -> dict[str, Any]:
    """Return a mean over `n` latents with its normal 95 % interval; no interval where there are fewer than two.

    The interval is cut where no score can be: below `least` (−1 for a difference of scores) and above 1.
    """
    half = None if deviation is None or n < 2 else Z_95 * deviation / math.sqrt(n)
    ends = (None, None) if mean is None or half is None else (max(least, mean - half), min(1.0, mean + half))
    return {"value": mean, "low": ends[0], "high": ends[1], "n": n}


def other_metrics(source: Source) -> list[tuple[str, str, Figure]]:
    """Return evaluator, metric and mean over latents of every other metric that has values."""
    rows = source.connection.execute(
        """SELECT evaluator, metric, avg(value), stddev_samp(value), count(value) FROM scores
        WHERE dictionary = ? AND run = ? AND metric <> ? AND baseline IS NULL AND value IS NOT NULL
        GROUP BY ALL ORDER BY ALL""",
        [source.dictionary, source.run, METRIC],
    ).fetchall()
    return [(evaluator, metric, normal(*numbers)) for evaluator, metric, *numbers in rows]


def extremes(source: Source, count: int, best: bool) -> list[int]:
    """Return the latents with the highest mean lower bound over evaluators, or with the lowest mean upper bound."""
    order = "avg(low) DESC, avg(value) DESC" if best else "avg(high), avg(value)"
    rows = source.rows(
        f"SELECT latent FROM own WHERE value IS NOT NULL GROUP BY latent ORDER BY {order}, latent LIMIT ?", count
    )
    return [latent for (latent,) in rows]


def score_plots(source: Source, evaluator: str) -> list[Plot]:
    """Return the distribution of one evaluator's scores, the explanations' own beside each floor: bins and cumulated."""
    own = source.rows(
        "SELECT round(value, 4) v, count(*) FROM own WHERE evaluator = ? AND value IS NOT NULL GROUP BY v ORDER BY v",
        evaluator,
    )
    floors = source.rows(
        "SELECT baseline, round(value, 4) v, count(*) FROM floor WHERE evaluator = ? AND value IS NOT NULL GROUP BY ALL ORDER BY ALL",
        evaluator,
    )
    if not own:
        return []
    found = {"own": own}
    for baseline, value, count in floors:
        found.setdefault(baseline, []).append((value, count))
    names = sorted(found, key=_rank)
    labels = {name: f"{_named(name)} (n = {sum(count for _, count in found[name]):,})" for name in names}
    exact = [Series(name, labels[name], found[name]) for name in names]
    axis = f"balanced accuracy, {evaluator}"
    return [
        score_histogram(f"{evaluator.capitalize()}: distribution of scores", axis, exact, SCORE_BIN),
        ecdf(f"{evaluator.capitalize()}: cumulative distribution", axis, exact),
    ]


def density_plots(source: Source) -> list[Plot]:
    """Return how often latents fire, by status, and each evaluator's score against it; empty without densities."""
    bins = source.connection.execute(
        """SELECT status, floor(log10(density) / ?) * ? AS bin, count(*) FROM latents
        WHERE dictionary = ? AND density > 0 GROUP BY ALL ORDER BY ALL""",
        [DENSITY_BIN, DENSITY_BIN, source.dictionary],
    ).fetchall()
    if not bins:
        return []
    axis = power_axis(
        "density: share of tokens on which the latent fires (log scale)",
        min(r[1] for r in bins),
        max(r[1] for r in bins) + DENSITY_BIN,
    )
    series = [
        Series(
            status,
            f"{status} ({sum(n for s, _, n in bins if s == status):,})",
            [(at, n) for s, at, n in bins if s == status],
        )
        for status in STATUSES
        if any(row[0] == status for row in bins)
    ]
    plots = [stacked_histogram("Firing densities", axis, "latents", series, DENSITY_BIN)]
    for evaluator in source.evaluators():
        plots += _against_density(source, evaluator)
    return plots


def _against_density(source: Source, evaluator: str) -> list[Plot]:
    joined = """SELECT log10(density) AS x, value AS y, latent FROM own JOIN (
        SELECT latent, density FROM latents WHERE dictionary = ? AND density > 0
    ) USING (latent) WHERE evaluator = ? AND value IS NOT NULL"""
    which = (source.dictionary, evaluator)
    points = source.rows(f"SELECT x, y FROM ({joined}) ORDER BY {_SPREAD} LIMIT {SCATTER_POINTS}", *which)
    if not points:
        return []
    medians = source.rows(
        f"SELECT median(x), median(y) FROM (SELECT x, y, ntile(10) OVER (ORDER BY x, latent) AS part FROM ({joined}))"
        " GROUP BY part HAVING count(*) >= 5 ORDER BY part",
        *which,
    )
    total = source.rows(f"SELECT count(*) FROM ({joined})", *which)[0][0]
    x = power_axis("density (log scale)", min(p[0] for p in points), max(p[0] for p in points))
    y = round_axis(f"balanced accuracy, {evaluator}", min(0.4, *(p[1] for p in points)), 1.0, 6)
    cloud, line = (
        Series("own", _sampled(len(points), total), points),
        Series("median", "median per tenth of the latents", medians),
    )
    return [scatter(f"{evaluator.capitalize()} score against density", x, y, cloud, line)]


def agreement_plots(source: Source) -> list[Plot]:
    """Return each pair of evaluators against each other, with Spearman's correlation over all latents that have both."""
    return [plot for first, second in combinations(source.evaluators(), 2) for plot in _pair(source, first, second)]


def _pair(source: Source, first: str, second: str) -> list[Plot]:
    joined = """SELECT a.value AS x, b.value AS y, latent FROM own a JOIN own b USING (latent)
        WHERE a.evaluator = ? AND b.evaluator = ? AND a.value IS NOT NULL AND b.value IS NOT NULL"""
    points = source.rows(f"SELECT x, y FROM ({joined}) ORDER BY {_SPREAD} LIMIT {SCATTER_POINTS}", first, second)
    if not points:
        return []
    ranks = "rank() OVER (ORDER BY {0}) + (count(*) OVER (PARTITION BY {0}) - 1) / 2.0"
    found, n = source.rows(
        f"SELECT corr(r, s), count(*) FROM (SELECT {ranks.format('x')} AS r, {ranks.format('y')} AS s FROM ({joined}))",
        first,
        second,
    )[0]
    low = min(0.4, *(p[0] for p in points), *(p[1] for p in points))
    axes = [round_axis(f"balanced accuracy, {name}", low, 1.0, 6) for name in (first, second)]
    cloud = Series("own", _sampled(len(points), n), points)
    plot = scatter(f"{first.capitalize()} against {second}", axes[0], axes[1], cloud, diagonal=True)
    return [Plot(plot.title, plot.svg, plot.legend, spearman_text(found, n))]


def spearman_text(rho: float | None, n: int) -> str:
    """Return Spearman's ρ with its 95 % interval (Fisher's z with the variance of Bonett & Wright 2000) and n."""
    if rho is None or not math.isfinite(rho) or n < 5:
        return f"Spearman's ρ undefined (n = {n:,})"
    half = Z_95 * math.sqrt((1 + rho**2 / 2) / (n - 3))
    z = math.atanh(max(-0.999999, min(0.999999, rho)))
    return f"Spearman's ρ = {rho:.2f} [{math.tanh(z - half):.2f}, {math.tanh(z + half):.2f}] (n = {n:,})"


def _sampled(shown: int, total: int) -> str:
    return f"latents (n = {total:,})" if shown == total else f"{shown:,} of {total:,} latents, a fixed sample"


def _rank(name: str) -> int:
    order = ("own", *BASELINES)
    return order.index(name) if name in order else len(order)


def _named(name: str) -> str:
    return "the explanation itself" if name == "own" else f"{name.replace('_', ' ')} explanation"
