"""An audit as tables for a person, as plain values for JSON, and as a plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup

from exegete.agent.auditing import AuditReport, Row
from exegete.agent.findings import Findings, Table, plain
from exegete.evaluators.audit import CHECKS, TRUE, MetricAudit, Sanity, Separation
from exegete.evaluators.audit_truths import CORRUPTIONS
from exegete.evaluators.statistics import Interval, mean_interval
from exegete.tools.errors import UserError
from exegete.tools.seeds import generator

HIDDEN = ("tpr", "tnr", "auprc")
"""Metrics that the tables leave out, and AUROC where balanced accuracy stands; JSON has them."""
CONTROL = "_random_"
"""Stands in the name of a metric that is a control of another."""
SUFFIXES = (".svg", ".html")
ROW, CELL, NAME, HEAD = 38, 110, 340, 46


def findings(report: AuditReport) -> Findings:
    """Return the audit for a person or a program."""
    counts = ", ".join(f"{count} {kind}" for kind, count in report.latents.items())
    lines = [
        f"judge {report.judge}; planted latents: {counts or 'none'}; seed {report.wanted.seed}",
        "AUROC of telling true explanations from corrupted ones: 1 always, 0.5 by chance; below, the corrupted score higher",
    ]
    tables = [_separations(report), _checks(report), _planted(report), _spent(report), _not_run(report)]
    return Findings(as_json(report), lines, [table for table in tables if table.rows])


def as_json(report: AuditReport) -> dict[str, Any]:
    """Return everything as plain values, every score of every explanation with it."""
    rows = []
    for row in report.rows:
        values = [
            {"latent": latent, "explanation": which, **scores} for (latent, which), scores in row.audit.values.items()
        ]
        audit = dataclasses.replace(row.audit, values={})
        rows.append({"kind": row.kind, "audit": plain(audit), "spent": plain(row.spent), "values": plain(values)})
    return {
        "command": "audit",
        "parameters": plain(report.wanted),
        "judge": report.judge,
        "latents": dict(report.latents),
        "rows": rows,
        "not_run": dict(report.not_run),
    }


def write_plot(report: AuditReport, file: Path) -> None:
    """Write the AUROCs as a table of coloured cells, to an `.svg` or an `.html` file.

    Raises:
        UserError: the file's name ends otherwise.
    """
    check_plot(file)
    svg = _plot(report)
    title = "Audit of evaluators"
    page = Markup('<!doctype html><meta charset="utf-8"><title>{}</title>{}').format(title, svg)
    file.write_text(str(svg if file.suffix == ".svg" else page), encoding="utf-8")


def check_plot(file: Path) -> None:
    """Raise UserError where a plot cannot be written under that name."""
    if file.suffix not in SUFFIXES:
        raise UserError(f"{str(file)!r}: a plot is written as {' or '.join(SUFFIXES)}; name the file so")


def _shown(report: AuditReport) -> Iterator[tuple[Row, MetricAudit]]:
    for row in report.rows:
        named = {metric.metric: metric for metric in row.audit.metrics}
        hidden = (*HIDDEN, "auroc") if "balanced_accuracy" in named else HIDDEN
        yield from ((row, one) for name, one in named.items() if name not in hidden and CONTROL not in name)


def _columns(report: AuditReport) -> list[tuple[str, int]]:
    """Return the corruptions that occur, and for how many latents at most."""
    found: dict[str, int] = dict.fromkeys(CORRUPTIONS, 0)
    for _, metric in _shown(report):
        for name, one in metric.separations.items():
            found[name] = max(found.get(name, 0), one.n)
    return [(name, n) for name, n in found.items() if n]


def _name(row: Row) -> str:
    return row.audit.evaluator if row.kind is None else f"{row.audit.evaluator} ({row.kind} latents)"


def _separations(report: AuditReport) -> Table:
    columns = _columns(report)
    rows = []
    for row, metric in _shown(report):
        cells = []
        for name, most in columns:
            one = metric.separations.get(name)
            cells.append("" if one is None else interval(one.auroc) + (f" n={one.n}" if 0 < one.n != most else ""))
        rows.append((_name(row), metric.metric, *cells))
    heads = tuple(f"{name.replace('_', ' ')} (n={n})" for name, n in columns)
    return Table("true against corrupted explanations: AUROC [95 %]", ("evaluator", "metric", *heads), rows)


def _checks(report: AuditReport) -> Table:
    rows = []
    for row, metric in _shown(report):
        if not metric.sanity and not metric.coverage.n:
            continue
        cells = [_sanity(metric.sanity[check]) if check in metric.sanity else "" for check in CHECKS]
        covers = interval(metric.coverage.share) + (f" n={metric.coverage.n}" if metric.coverage.n else "")
        mean = "" if metric.true_mean is None else f"{metric.true_mean:.3f}"
        rows.append((_name(row), metric.metric, mean, *cells, covers or metric.coverage.reason))
    heads = tuple(f"{check.replace('_', ' ')} labels" for check in CHECKS)
    title = (
        "share of latents whose score falls (mean change) where labels are made wrong; share of intervals that cover"
    )
    return Table(title, ("evaluator", "metric", "mean, true", *heads, "coverage"), rows)


def _planted(report: AuditReport) -> Table:
    """Latents planted in the subject: the mean score of true explanations, and how it stands above its controls."""
    rows = []
    for row, metric in _shown(report):
        if row.kind is None:
            continue
        values = [
            v
            for (_, which), one in row.audit.values.items()
            if which == TRUE and (v := one.get(metric.metric)) is not None
        ]
        mean = mean_interval(_array(values), generator(report.wanted.seed, "mean", row.kind, metric.metric))
        controls = [f"{metric.metric}{CONTROL}{kind}" for kind in ("latent", "direction")]
        against = [row.audit.against(metric.metric, control).auroc for control in controls]
        rows.append((_name(row), metric.metric, interval(mean), len(values), *map(interval, against)))
    heads = ("AUROC against a random latent, equal KL", "against a random direction, equal KL")
    return Table("latents planted in the subject", ("evaluator", "metric", "mean, true", "n", *heads), rows)


def _array(values: list[float]) -> Any:
    import numpy as np

    return np.array(values, dtype=np.float64)


def _spent(report: AuditReport) -> Table:
    names = ("prompts", "calls", "scored_texts", "input_tokens", "output_tokens")
    rows = []
    for row in report.rows:
        usd = row.spent["usd"]
        failures = {**row.spent["failures"], **{f"score {k}": n for k, n in row.audit.statuses.items()}}
        failed = ", ".join(f"{count} {status}" for status, count in failures.items())
        money = "not known" if usd is None else f"{usd:.4f}"
        rows.append((_name(row), *(row.spent[name] for name in names), money, f"{row.audit.seconds:.1f}", failed))
    heads = (*(name.replace("_", " ") for name in names), "USD", "seconds", "without an answer or a value")
    return Table("spent", ("evaluator", *heads), rows)


def _not_run(report: AuditReport) -> Table:
    return Table("not run", ("evaluator", "needs"), list(report.not_run.items()))


def interval(found: Interval) -> str:
    """Return `0.97 [0.93, 0.99]`; an empty string where nothing is known."""
    if found.value is None:
        return ""
    ends = "" if found.low is None or found.high is None else f" [{found.low:.2f}, {found.high:.2f}]"
    return f"{found.value:.2f}{ends}"


def _sanity(found: Sanity) -> str:
    if found.fell.value is None or found.change is None:
        return ""
    return f"{found.fell.value:.0%} ({found.change:+.3f}) {'passed' if found.passed else 'failed'}"


_STYLE = Markup(
    "<style>svg.audit{font:13px system-ui,sans-serif;background:#fff}.audit text{fill:#1c2024}"
    ".audit .soft{fill:#5f6872;font-size:11px}.audit .ends{font-size:11px}</style>"
)
_CELL = Markup(
    '<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}"><title>{hover}</title></rect>'
    '<text x="{middle}" y="{first}" text-anchor="middle">{value}</text>'
    '<text class="ends" x="{middle}" y="{second}" text-anchor="middle">{ends}</text>'
)
_TEXT = Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>')


def _plot(report: AuditReport) -> Markup:
    columns, rows = _columns(report), list(_shown(report))
    width, height = NAME + CELL * len(columns) + 10, HEAD + ROW * len(rows) + 24
    parts = [
        _TEXT.format("", NAME + CELL * at + CELL / 2, 18, "middle", name.replace("_", " "))
        for at, (name, _) in enumerate(columns)
    ]
    parts += [
        _TEXT.format("soft", NAME + CELL * at + CELL / 2, 34, "middle", f"n = {n}") for at, (_, n) in enumerate(columns)
    ]
    for line, (row, metric) in enumerate(rows):
        y = HEAD + ROW * line
        parts.append(
            _TEXT.format("", NAME - 8, y + ROW / 2 + 4, "end", f"{_name(row)}: {metric.metric.replace('_', ' ')}")
        )
        parts += [
            _cell(NAME + CELL * at, y, f"{_name(row)}, {metric.metric}, {name}", metric.separations[name])
            for at, (name, _) in enumerate(columns)
            if name in metric.separations and metric.separations[name].auroc.value is not None
        ]
    note = f"AUROC of telling true from corrupted explanations, with 95 % intervals; judge {report.judge}"
    parts.append(_TEXT.format("soft", NAME, height - 8, "start", note))
    head = Markup(
        '<svg class="audit" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" width="{}" role="img" aria-label="{}">'
    )
    return head.format(width, height, width, note) + _STYLE + Markup("").join(parts) + Markup("</svg>")


def _cell(x: int, y: int, called: str, one: Separation) -> Markup:
    auroc = one.auroc
    assert auroc.value is not None
    ends = "" if auroc.low is None or auroc.high is None else f"{auroc.low:.2f}–{auroc.high:.2f}"
    return _CELL.format(
        x=x + 1,
        y=y + 1,
        width=CELL - 2,
        height=ROW - 2,
        fill=_colour(auroc.value),
        hover=f"{called}: {interval(auroc)}, n = {one.n}",
        middle=x + CELL / 2,
        first=y + 17,
        second=y + 31,
        value=f"{auroc.value:.2f}",
        ends=ends,
    )


def _colour(auroc: float) -> str:
    """Return white at 0.5, towards green above and red below."""
    away = min(1.0, abs(auroc - 0.5) * 2)
    full = (60, 170, 130) if auroc >= 0.5 else (214, 106, 74)
    return "#" + "".join(f"{round(255 + (one - 255) * away):02x}" for one in full)
