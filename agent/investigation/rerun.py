"""Doing one experiment of an investigation again, from its record.

1. The bench is made as it was: prompts, metric, other texts, seed and number of controls are the record's; subject and dictionary
   have to be the same by fingerprint.
2. The tool is called with the stored arguments through the same checks.
3. The headline's figure, interval and control are held against the stored ones, one by one. They agree where they differ by no
   more than rounding: batches of other sizes, and other devices, add numbers in another order. That is a thousandth of the
   largest of the stored figures and at least 0.0001 (logits of about 10 are known to 0.00001); where the subject's numbers have
   16 bits, four of their spacings in place of both.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.agent.awaiting import awaited
from exegete.agent.findings import Findings, Table
from exegete.agent.investigation.asked import folder_of
from exegete.agent.investigation.contract import Call, Headline, Result
from exegete.agent.investigation.record import RECIPE, RECORD, ExperimentRecord, InvestigationRecord, read_record
from exegete.tools.errors import UserError

if TYPE_CHECKING:
    from exegete.agent.live import Live
    from exegete.tools.llm import Client

ROUNDING = 1e-3
"""Share of the largest stored figure that figures may differ by."""
LEAST = 1e-4
"""What they may differ by in any case."""
_SPACING = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Of numbers about 1."""
_FIGURES = ("value", "low", "high", "control_value", "control_low", "control_high")
_COUNTS = ("n", "control_n")


@dataclass(frozen=True)
class Compared:
    """One figure, then and now."""

    name: str
    stored: float | None
    again: float | None
    agrees: bool


@dataclass(frozen=True)
class Rerun:
    """An experiment that was done again."""

    investigation: str
    experiment: ExperimentRecord
    result: Result
    compared: tuple[Compared, ...]
    rounding: float
    """What figures may differ by."""

    @property
    def agrees(self) -> bool:
        """Whether it came to the same: the same status, the same headline, every figure of it within rounding."""
        before, now = self.experiment.headline, self.result.outcome.headline
        named = (before.name if before else None) == (now.name if now else None)
        return named and self.experiment.status == self.result.status and all(one.agrees for one in self.compared)

    def findings(self) -> Findings:
        """Return it for a person or a program."""
        one, now = self.experiment, self.result
        head = f"{self.investigation}/{one.id}: {one.tool}"
        lines = [head, f"then {one.status}, now {now.status}" + ("" if now.status == "ok" else f": {now.outcome.text}")]
        name = one.headline.name if one.headline else "no figure"
        rows = [(row.name, row.stored, row.again, "agrees" if row.agrees else "DIFFERS") for row in self.compared]
        verdict = "the same within rounding" if self.agrees else "NOT the same"
        tables = [Table(name, ("", "stored", "again", ""), rows)] if rows else []
        end = f"{verdict} (figures may differ by {self.rounding:.2g})"
        facts: dict[str, Any] = {
            "experiment": f"{self.investigation}/{one.id}",
            "tool": one.tool,
            "arguments": one.arguments,
            "agrees": self.agrees,
            "rounding": self.rounding,
            "stored": {"status": one.status, "headline": one.headline},
            "again": {"status": now.status, "headline": now.outcome.headline, "facts": now.outcome.facts},
        }
        return Findings(facts, [*lines, end], tables)


@dataclass(frozen=True)
class Named:
    """An experiment that somebody has named."""

    record: InvestigationRecord
    experiment: str
    folder: Path
    """Of the investigation."""


def find(named: str, store: Path | None) -> Named:
    """Return the experiment that `named` (`INVESTIGATION/E3`) means.

    Args:
        named: the investigation by its folder, or by its id where it is kept.
        store: where it is kept; None for `out`, where investigations without a store are.

    Raises:
        UserError: it names no experiment, or there is no such record.
    """
    investigation, _, experiment = named.rpartition("/")
    if not investigation or not experiment:
        raise UserError(f"{named!r} names no experiment; expected INVESTIGATION/E3, for example i-20261121/E3")
    folder = Path(investigation)
    if not (folder / RECORD).exists():
        folder = folder_of(investigation, store, None)
    record = read_record(folder)
    record.experiment(experiment)
    return Named(record, experiment, folder)


def rerun_named(named: Named, live: Live) -> Rerun:
    """Do an experiment again as `rerun`; where the metric is judged, the judge's replies that are journaled are not asked again."""
    record = named.record
    if record.metric is None or record.metric.kind != "judged":
        return rerun(record, named.experiment, live)
    return awaited(_judged(named, live))


async def _judged(named: Named, live: Live) -> Rerun:
    from exegete.agent.investigation.language_models import checked_models, language_models

    record = named.record
    opened = record.opened.get("config")
    free = record.budget.usd is None
    judge, models = checked_models(RECIPE, record.judge, record.budget, free, Path(opened) if opened else None)
    async with language_models(named.folder, record.id, RECIPE, judge, models) as asked:
        loop = asyncio.get_running_loop()
        return await asyncio.to_thread(rerun, record, named.experiment, live, asked.judge, loop)


def rerun(
    record: InvestigationRecord,
    experiment: str,
    live: Live,
    judge: Client | None = None,
    loop: asyncio.AbstractEventLoop | None = None,
) -> Rerun:
    """Do an experiment again and return it beside what is stored.

    Args:
        record: of the investigation.
        experiment: its id, for example `E3`.
        live: subject and dictionary, the same as then.
        judge: where the metric is judged.
        loop: in which the judge is asked; None where it may be asked in any.

    Raises:
        UserError: they are others, the experiment never ended or was refused, or there is no such experiment.
    """
    from exegete.agent.investigation.bench import Bench
    from exegete.agent.investigation.toolbelt import Toolbelt

    one = record.experiment(experiment)
    if one.status not in ("ok", "error"):
        why = "never ended" if one.status == "begun" else "was refused"
        raise UserError(f"experiment {record.id}/{one.id} {why}; there is nothing to hold a rerun against")
    if record.metric is None:
        raise UserError(f"investigation {record.id} has no metric; none of its experiments can be done again")
    _require_same(record, live)
    bench = Bench(
        live,
        record.cases,
        record.metric,
        record.seed,
        texts=record.texts,
        judge=judge,
        controls=record.controls,
        sealed=record.sealed,
        loop=loop,
    )
    prediction = {name: value for name, value in asdict(one.prediction).items() if value is not None}
    result = Toolbelt(bench).run(Call(one.id, one.tool, {**prediction, **one.arguments}))
    compared, rounding = compare(one.headline, result.outcome.headline, live.model.subject.dtype)
    return Rerun(record.id, one, result, compared, rounding)


def compare(
    before: Headline | None, now: Headline | None, dtype: str = "float32"
) -> tuple[tuple[Compared, ...], float]:
    """Return every figure of a headline, then and now, and what they may differ by."""
    was, found = ({} if one is None else asdict(one) for one in (before, now))
    largest = max((abs(was[name]) for name in _FIGURES if was.get(name) is not None), default=0.0)
    coarse = 4 * _SPACING.get(dtype, 0.0)
    rounding = max(ROUNDING * largest, LEAST, coarse * largest, coarse)
    names = [name for name in (*_FIGURES, *_COUNTS) if was.get(name) is not None or found.get(name) is not None]
    return tuple(_compared(name, was, found, 0.0 if name in _COUNTS else rounding) for name in names), rounding


def _compared(name: str, was: Mapping[str, Any], found: Mapping[str, Any], most: float) -> Compared:
    stored, again = was.get(name), found.get(name)
    agrees = stored is not None and again is not None and math.isclose(stored, again, rel_tol=0.0, abs_tol=most)
    return Compared(name.replace("_", " "), stored, again, agrees)


def _require_same(record: InvestigationRecord, live: Live) -> None:
    """Raise UserError where subject or dictionary is another than the record's."""
    for what, key, own in (
        ("dictionary", "fingerprint", live.dictionary.fingerprint),
        ("subject", "subject_fingerprint", live.model.subject.fingerprint),
    ):
        stored = record.origin.get(key)
        if stored != own:
            raise UserError(
                f"investigation {record.id} was of {what} {record.origin.get(what)!r} ({str(stored)[:19]}), and this is {own[:19]}; "
                "name the one that it was of: --subject, --dictionary"
            )
