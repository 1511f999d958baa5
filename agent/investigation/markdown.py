"""The report as Markdown: plain text for whoever has no browser, and for diffs.

Every text that is not ours passes `plain_text`: no character of it is mark-up, begins an HTML tag, a link, a table cell or a
line. What is longer, or has lines of its own, stands in a fence that is longer than any run of backticks in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from exegete.agent.investigation.drawing import Tokens
from exegete.agent.investigation.gist import NO_LABELS, READING
from exegete.agent.investigation.wording import Figure, number
from exegete.tools.rendering import visible

if TYPE_CHECKING:
    from exegete.agent.investigation.reporting import ClaimShown, ExperimentShown, Page

MOST_TOKENS = 12
"""Of a shaded prompt: those with the largest numbers."""

_MARK_UP = re.compile(r"[\\`*_\[\]|~$]")
_AT_A_BEGINNING = re.compile(r"^(?:[#+\-=>:]|\d+(?=[.)](?:\s|$)))")
"""What makes a heading, list or line of a paragraph that begins with it; a number is kept, and what follows it escaped."""


def markdown(page: Page) -> str:
    """Return the report as Markdown."""
    return "\n".join(_blocks(page)) + "\n"


def plain_text(text: str) -> str:
    """Return Markdown that shows `text` as it stands, on one line, with unseen characters made visible; not white space around it."""
    shown = _MARK_UP.sub(r"\\\g<0>", visible(text).strip())
    shown = _AT_A_BEGINNING.sub(lambda found: found[0] + "\\" if found[0].isdigit() else f"\\{found[0]}", shown)
    shown = shown.replace("&", "&amp;").replace("<", "&lt;")
    # Renderers make links of bare addresses.
    return shown.replace("://", "&#58;//").replace("@", "&#64;").replace("www.", "www&#46;")


def fenced(text: str, language: str = "") -> str:
    """Return a code block that shows `text`; nothing in it ends the block."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([fence + language, *map(visible, text.split("\n")), fence])


def _blocks(page: Page) -> Iterator[str]:
    record = page.record
    yield f"# {plain_text(record.question)}"
    if page.ended:
        yield f"\n**{plain_text(page.ended)}**"
    yield f"\n{_tally(page)}\n"
    yield from _answer(page)
    yield from _table(("", ""), [(name, plain_text(value)) for name, value in page.facts])
    yield "\n## Claims, checked by code on held-out prompts\n"
    yield READING if page.claims else f"None was made.\n\n{READING}"
    for claim in page.claims:
        yield from _claim(page, claim)
    yield from ("\n## Predictions\n", f"As predicted: {plain_text(page.hit_rate)}.\n")
    rows = [
        (
            f"{_link(one.experiment.id)} {plain_text(one.experiment.tool)}",
            plain_text(one.prediction),
            _value(one.figure),
            _control(one.figure),
            one.outcome,
        )
        for one in page.experiments
    ]
    yield from _table(("experiment", "predicted", "found", "control", ""), rows)
    yield "\n## Hypotheses considered\n"
    yield from _table(
        ("", "hypothesis", "in the end", "as it predicts", "not as it predicts", "no figure"),
        [
            (plain_text(one.id), _said(page, one.statement), one.status)
            + (
                _links(page.tested[one.id].held),
                _links(page.tested[one.id].missed),
                _links(page.tested[one.id].unsettled),
            )
            for one in record.hypotheses
        ],
    )
    yield "\n## Latents\n"
    yield from _latents(page)
    if page.left_out:
        yield f"\n{page.left_out:,} more are named in the record."
    yield "\n## Experiments"
    for experiment in page.experiments:
        yield from _experiment(page, experiment)
    yield f"\n---\nWritten by exegete {plain_text(record.code_version)} from `record.json`. Texts are shown as they stand."


def _tally(page: Page) -> str:
    if not page.tally:
        return "**Nothing is claimed.**"
    parts = [f"**{len(ids)} {status}** ({_links(ids)})" for status, ids in page.tally]
    return f"Claims, checked by code on held-out prompts: {', '.join(parts)}."


def _answer(page: Page) -> Iterator[str]:
    *first, last = page.paragraphs or ("",)
    for part in first:
        yield f"{_cited(page, part)}\n"
    yield f"{_said(page, last) if last else 'No answer was given.'}\n"


def _latents(page: Page) -> Iterator[str]:
    if not page.labeled:
        yield f"{NO_LABELS}\n"
    columns = ("latent", *(("what the store said of it",) if page.labeled else ()), "claims", "experiments")
    rows = [
        (
            str(one.latent),
            *((plain_text(one.label) or "–",) if page.labeled else ()),
            _links(one.claims),
            _links(one.experiments),
        )
        for one in page.latents
    ]
    yield from _table(columns, rows)


def _said(page: Page, text: str) -> str:
    """Return a text of the investigator's, with links to what it cites, marked where it is not the recipe's."""
    shown = _cited(page, text)
    return f"{shown} *({page.whose})*" if page.whose and text else shown


def _cited(page: Page, text: str) -> str:
    known = {one.experiment.id for one in page.experiments} | {one.id for one in page.claims}
    return re.sub(r"\b[EC]\d+\b", lambda found: _link(found[0]) if found[0] in known else found[0], plain_text(text))


def _claim(page: Page, claim: ClaimShown) -> Iterator[str]:
    verdict = claim.verdict
    latents = f"Latents {', '.join(map(str, verdict.claim.latents))}" if verdict.claim.latents else "No latents"
    yield f"\n### {claim.id}\n"
    yield f"**{verdict.status}**: {_said(page, verdict.claim.statement)}\n"
    yield f"{latents}. Claimed: {plain_text(claim.says)}. Check: {plain_text(verdict.why.rstrip('.'))}."
    if claim.figures:
        yield f"\np = {plain_text(claim.p)}, adjusted by Holm {plain_text(claim.p_adjusted)}.\n"
        yield from _figures(claim.figures)
    cited = [_link(id) if known else f"{plain_text(id)} (no such experiment)" for id, known in claim.cited]
    yield f"\nRests on: {', '.join(cited) or 'no experiment'}."


def _experiment(page: Page, one: ExperimentShown) -> Iterator[str]:
    experiment = one.experiment
    yield f"\n### {plain_text(experiment.id)}\n"
    yield f"{plain_text(experiment.tool)}, {experiment.status}; tests {plain_text(experiment.prediction.hypothesis)}\n"
    yield fenced(one.arguments, "json") if one.arguments else "With its defaults."
    yield f"\nPredicted {plain_text(one.prediction)}, since: {_said(page, experiment.prediction.because)}"
    yield f"\n{one.outcome.capitalize()}.\n"
    if one.figure is not None:
        yield from _figures([one.figure])
    for plot in one.plots:
        if isinstance(plot, Tokens):
            yield f"\n{plain_text(plot.title)} ({plain_text(plot.unit)}), largest first: {_largest(plot)}"
    if experiment.text:
        yield f"\n{fenced(experiment.text)}"
    yield f"\n{experiment.passes:,} forward passes, {experiment.seconds:.1f} s. Again:\n\n{fenced(one.again)}"


def _largest(plot: Tokens) -> str:
    known = [(token.value, token.text) for token in plot.tokens if token.value is not None]
    known.sort(key=lambda pair: -abs(pair[0]))
    return ", ".join(f'"{plain_text(text)}" {plain_text(number(value))}' for value, text in known[:MOST_TOKENS])


def _figures(figures: Iterable[Figure]) -> Iterator[str]:
    rows = []
    for one in figures:
        rows.append((plain_text(one.name), *map(plain_text, (one.value, one.interval, one.n))))
        if one.control:
            control = map(plain_text, (one.control_value, one.control_interval, one.control_n))
            rows.append((f"control: {plain_text(one.control)}", *control))
        else:
            rows.append(("no control", "", "", ""))
    return _table(("", "figure", "interval", "n"), rows)


def _value(figure: Figure | None) -> str:
    return "–" if figure is None else plain_text(f"{figure.value} {figure.interval}")


def _control(figure: Figure | None) -> str:
    return (
        "–" if figure is None or not figure.control else plain_text(f"{figure.control_value} {figure.control_interval}")
    )


def _links(ids: Sequence[str]) -> str:
    return ", ".join(map(_link, ids)) or "–"


def _link(id: str) -> str:
    """Return a link to the heading of an experiment or claim, whose id is letters and digits; else its text."""
    return f"[{id}](#{id.lower()})" if id.isascii() and id.isalnum() else plain_text(id)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
