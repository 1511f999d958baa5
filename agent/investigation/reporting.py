"""The report of an investigation: `report.md` and a self-contained `report.html`, made from its record alone.

1. `page` puts together what both show (in words: `wording`): the answer, every claim with its verdict, its effect beside its
   controls, interval, n, p and Holm-adjusted p; how the predictions fared, with a Wilson interval (1927); hypotheses; latents;
   experiments.
2. Every figure links to the experiment, or the claim's check, that it comes from; an experiment is shown with its arguments and
   the command that does it again.
3. `report.html.j2` and `markdown` lay it out. Whatever a corpus, a user or a language model wrote is escaped; what the language
   model that investigated wrote is marked as its words. The page has no script, forbids any, and loads nothing.

Where the store can still be read, latents are shown with windows on which they fire; their labels are the investigation's.
"""

from __future__ import annotations

import errno
import logging
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup, escape

from exegete.agent.investigation import drawing
from exegete.agent.investigation.contract import Headline, Verdict
from exegete.agent.investigation.drawing import Row, Tokens, Undrawable
from exegete.agent.investigation.gist import NO_LABELS, READING, outside, p_value, tally
from exegete.agent.investigation.record import ExperimentRecord, InvestigationRecord, write_whole
from exegete.agent.investigation.wording import (
    Figure,
    as_json,
    ended,
    facts,
    figure,
    hit_rate,
    predicted,
    probability,
    says,
    whose,
)
from exegete.agent.latent_cards import LatentCard, read_cards
from exegete.agent.plots import Plot
from exegete.tools.errors import UserError
from exegete.tools.rendering import visible
from exegete.tools.store import connect

MOST_LATENTS = 500
"""Latents that are listed; claims' first."""
MOST_CARDS = 24
"""Latents that are shown with windows on which they fire."""
MOST_FACTS = 20_000
"""Characters of an experiment's facts that the page shows; the record has all of them."""
PREDICTED = ("hypothesis", "because", "low", "high")
"""What a call of an experiment says beside its own arguments."""
VERDICTS = {
    "verified": "held on held-out prompts: the effect's interval excludes the control's",
    "failed": "did not hold on held-out prompts",
    "unverified": "could not be checked, and is not shown to be so",
    "correlational": "says what goes together, not what causes it; no intervention was made for it",
    "withdrawn": "was taken back by the investigator; neither checked nor counted among the claims",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClaimShown:
    """One claim as it is shown."""

    id: str
    verdict: Verdict
    says: str
    """What it claims of which latents, by which intervention."""
    figures: tuple[Figure, ...]
    p: str
    p_adjusted: str
    cited: tuple[tuple[str, bool], ...]
    """Experiments that it rests on, and whether there is such an experiment."""


@dataclass(frozen=True)
class ExperimentShown:
    """One experiment as it is shown."""

    experiment: ExperimentRecord
    arguments: str
    """Empty where it was asked for with its defaults."""
    prediction: str
    outcome: Literal["as predicted", "not as predicted", "no figure"]
    figure: Figure | None
    facts: str
    cut: int
    """Characters of its facts that are left out."""
    plots: tuple[Plot | Tokens, ...]
    undrawn: tuple[str, ...]
    again: str
    """The command that does it again."""


@dataclass(frozen=True)
class LatentShown:
    """What is known of one latent that claims or experiments name."""

    latent: int
    label: str
    claims: tuple[str, ...]
    experiments: tuple[str, ...]
    card: LatentCard | None


@dataclass(frozen=True)
class Tested:
    """The experiments that tested a hypothesis, by what became of the predictions that were made from it."""

    held: tuple[str, ...]
    missed: tuple[str, ...]
    unsettled: tuple[str, ...]
    """Those without a figure."""


@dataclass(frozen=True)
class Page:
    """What a report says."""

    record: InvestigationRecord
    whose: str
    """What marks texts of a language model, or of another investigator that was given; empty for the recipe."""
    facts: tuple[tuple[str, str], ...]
    ended: str
    """Why it ended early; empty where it did not."""
    tally: tuple[tuple[str, tuple[str, ...]], ...]
    """Verdict → claims that have it."""
    paragraphs: tuple[str, ...]
    """Of the answer."""
    claims: tuple[ClaimShown, ...]
    effects: Plot | None
    hit_rate: str
    experiments: tuple[ExperimentShown, ...]
    tested: Mapping[str, Tested]
    """By hypothesis."""
    latents: tuple[LatentShown, ...]
    left_out: int
    """Latents that are not listed."""

    @property
    def labeled(self) -> bool:
        """Whether anything is known of a latent but where it is named."""
        return any(one.label or one.card for one in self.latents)

    @property
    def listed(self) -> frozenset[int]:
        """The latents that are."""
        return frozenset(one.latent for one in self.latents)


def write_report(record: InvestigationRecord, folder: Path) -> Path:
    """Write `report.md` and `report.html` into the investigation's folder, each whole or not at all; return the page's path.

    Raises:
        UserError: the folder cannot be written to.
    """
    from exegete.agent.investigation.markdown import markdown

    shown = page(record, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "report.md", markdown(shown))
        return write_whole(folder / "report.html", html(shown))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise  # The command line has its own word for a full disk.
        raise UserError(
            f"cannot write the report into {str(folder)!r} ({error.strerror}); make the folder writable and resume"
        ) from error


def html(shown: Page) -> str:
    """Return the page as HTML: every text made visible and escaped."""
    from jinja2 import Environment, StrictUndefined

    def finalize(value: Any) -> Any:
        return visible(value) if type(value) is str else value

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=finalize
    )
    known = {one.experiment.id for one in shown.experiments} | {one.id for one in shown.claims}
    environment.filters["cited"] = lambda text: _linked(text, known)
    environment.filters |= {"lines": lambda text: Markup("\n").join(escape(visible(line)) for line in text.split("\n"))}
    source = files("exegete.agent.investigation").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        page=shown, record=shown.record, verdicts=VERDICTS, reading=READING, no_labels=NO_LABELS
    )


def _linked(text: str, known: Collection[str]) -> Markup:
    """Return a text, escaped, with links where it names an experiment or a claim that there is."""
    pieces = re.split(r"\b([EC]\d+)\b", visible(text))
    link = Markup('<a href="#{0}">{0}</a>')
    return Markup("").join(
        link.format(piece) if at % 2 and piece in known else escape(piece) for at, piece in enumerate(pieces)
    )


def page(record: InvestigationRecord, folder: Path) -> Page:
    """Return what the report of a record says; `folder` is the investigation's."""
    latents, left_out = _latents(record)
    return Page(
        record=record,
        whose=whose(record),
        facts=(*facts(record), *((("Not in the dictionary", missed),) if (missed := outside(record)) else ())),
        ended=ended(record),
        tally=tally(record),
        paragraphs=tuple(part for part in re.split(r"\n\s*\n", record.answer) if part.strip()),
        claims=tuple(_claim(record, place, verdict) for place, verdict in enumerate(record.verdicts, 1)),
        effects=_effects(record),
        hit_rate=hit_rate(record),
        experiments=tuple(_experiment(record, one, folder) for one in record.experiments),
        tested={one.id: _tested(record, one.id) for one in record.hypotheses},
        latents=latents,
        left_out=left_out,
    )


def _tested(record: InvestigationRecord, hypothesis: str) -> Tested:
    own = [one for one in record.experiments if one.prediction.hypothesis == hypothesis]
    return Tested(*(tuple(one.id for one in own if one.predicted is settled) for settled in (True, False, None)))


def _claim(record: InvestigationRecord, place: int, verdict: Verdict) -> ClaimShown:
    known = {experiment.id for experiment in record.experiments}
    found = (verdict.effect, verdict.flipped, verdict.direction)
    return ClaimShown(
        id=f"C{place}",
        verdict=verdict,
        says=says(verdict.claim),
        figures=tuple(figure(headline) for headline in found if headline is not None),
        p=p_value(verdict),
        p_adjusted=probability(verdict.p_adjusted),
        cited=tuple((id, id in known) for id in verdict.claim.experiments),
    )


def _effects(record: InvestigationRecord) -> Plot | None:
    """Draw the claims' effects on held-out prompts, each above its controls; None where no claim was checked."""
    rows = [
        row
        for place, verdict in enumerate(record.verdicts, 1)
        for headline in (verdict.effect, verdict.direction)
        if headline is not None
        for row in _pair(f"C{place}", verdict.status, headline, own=headline is verdict.effect)
    ]
    unit = record.metric.unit if record.metric else ""
    try:
        return drawing.forest("Effects on held-out prompts, beside their controls", unit, rows)
    except Undrawable:
        return None


def _pair(claim: str, status: str, headline: Headline, own: bool) -> Iterable[Row]:
    if own:
        yield Row(f"{claim} ({status})", headline.value, headline.low, headline.high, link=claim)
    if headline.control:
        ends = (headline.control_value, headline.control_low, headline.control_high)
        yield Row(f"{claim} control: {headline.control}", *ends, control=True, link=claim)


def _experiment(record: InvestigationRecord, one: ExperimentRecord, folder: Path) -> ExperimentShown:
    plots: list[Plot | Tokens] = []
    undrawn: list[str] = []
    for plot in one.plots:
        try:
            plots.append(drawing.drawn(plot))
        except Undrawable as error:
            undrawn.append(str(error))
    whole = as_json(one.facts)
    settled: dict[bool | None, Literal["as predicted", "not as predicted", "no figure"]]
    settled = {True: "as predicted", False: "not as predicted", None: "no figure"}
    return ExperimentShown(
        experiment=one,
        arguments=as_json(own) if (own := _own_arguments(one)) else "",
        prediction=predicted(one.prediction),
        outcome=settled[one.predicted],
        figure=None if one.headline is None else figure(one.headline),
        facts=whole[:MOST_FACTS],
        cut=max(0, len(whole) - MOST_FACTS),
        plots=tuple(plots),
        undrawn=tuple(undrawn),
        again=_again(record, one, folder),
    )


def _own_arguments(one: ExperimentRecord) -> dict[str, Any]:
    return {name: value for name, value in one.arguments.items() if name not in PREDICTED}


def _again(record: InvestigationRecord, one: ExperimentRecord, folder: Path) -> str:
    """Return the command that does an experiment again: by its id where it is in the store, else by its folder."""
    store = record.origin.get("store")
    if store is None:
        return f"exegete rerun {shlex.quote(f'{folder}/{one.id}')}"
    kept = folder.resolve().parent == Path(store).resolve() / "investigations"
    return f"exegete rerun {shlex.quote(f'{record.id if kept else folder}/{one.id}')} --store {shlex.quote(str(store))}"


def _latents(record: InvestigationRecord) -> tuple[tuple[LatentShown, ...], int]:
    claims = {f"C{place}": set(verdict.claim.latents) for place, verdict in enumerate(record.verdicts, 1)}
    experiments = {one.id: set(named_latents(one.arguments)) for one in record.experiments}
    order = [latent for verdict in record.verdicts for latent in verdict.claim.latents]
    order += [latent for one in record.experiments for latent in named_latents(one.arguments)]
    order += sorted(record.labels)
    latents = list(dict.fromkeys(order))
    cards = _cards(record, latents[:MOST_CARDS])
    shown = tuple(
        LatentShown(
            latent,
            record.labels.get(latent, ""),
            tuple(id for id, named in claims.items() if latent in named),
            tuple(id for id, named in experiments.items() if latent in named),
            cards.get(latent),
        )
        for latent in latents[:MOST_LATENTS]
    )
    return shown, len(latents) - len(shown)


def named_latents(arguments: Mapping[str, Any]) -> list[int]:
    """Return the latents that a call names, in the arguments whose names say so."""
    found: list[int] = []
    for name, value in arguments.items():
        if name in ("latent", "latents"):
            found += [one for one in (value if isinstance(value, list) else [value]) if type(one) is int]
    return found


def _cards(record: InvestigationRecord, latents: list[int]) -> dict[int, LatentCard]:
    """Return what the store shows of latents now; nothing where it, or the evidence of the dictionary, is gone."""
    store, dictionary = record.origin.get("store"), record.origin.get("fingerprint")
    if not latents or not isinstance(store, str) or not isinstance(dictionary, str):
        return {}
    try:
        with connect(store) as connection:
            return {card.latent: card for card in read_cards(connection, Path(store), dictionary, latents)}
    except UserError as error:
        log.warning("the report shows no windows of latents (%s)", error)
        return {}
