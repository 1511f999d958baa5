"""What came of an investigation, for a notebook: answer, claims, experiments as rows, plots, and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.agent.investigation.contract import Headline, Verdict
from exegete.agent.investigation.record import ExperimentRecord, InvestigationRecord
from exegete.agent.investigation.telling import figure
from exegete.tools.rendering import visible

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Investigation:
    """One investigation, as far as it has come."""

    record: InvestigationRecord
    """All of it, as plain values."""
    folder: Path

    @property
    def id(self) -> str:
        """By which it is gone on with: `exegete ask --resume ID`."""
        return self.record.id

    @property
    def finished(self) -> bool:
        """Whether it has come to its report; where not, the same call goes on."""
        return self.record.status != "interrupted"

    @property
    def answer(self) -> str:
        """The investigator's answer, in its own words: only `claims` are checked."""
        return self.record.answer

    @property
    def claims(self) -> tuple[Verdict, ...]:
        """Every claim with what checking it on the held-out prompts found."""
        return self.record.verdicts

    @property
    def experiments(self) -> list[dict[str, Any]]:
        """One row for each experiment: what was predicted, what it found, its control."""
        return [_row(one) for one in self.record.experiments]

    @property
    def plots(self) -> list[dict[str, Any]]:
        """What experiments give to be drawn, each with its `experiment`; the report draws them."""
        return [{"experiment": one.id, **plot} for one in self.record.experiments for plot in one.plots]

    @property
    def report(self) -> Path:
        """The page that reports it; `report.md` lies beside it."""
        return self.folder / "report.html"

    def table(self) -> pa.Table:
        """Return the experiments as an Arrow table."""
        import pyarrow as pa

        return pa.Table.from_pylist(self.experiments)

    def __repr__(self) -> str:
        held, of = self.record.hits
        verified = sum(verdict.status == "verified" for verdict in self.claims)
        return (
            f"<Investigation {self.id}: {self.record.status}, {len(self.record.experiments)} experiments, {held} of {of} "
            f"predictions held, {verified} of {len(self.claims)} claims verified>"
        )

    def _repr_html_(self) -> str:
        held, of = self.record.hits
        claims = "".join(
            _cells(verdict.status, verdict.claim.statement, _figure(verdict.effect), verdict.why)
            for verdict in self.claims
        )
        experiments = "".join(
            _cells(one.id, one.tool, _figure(one.headline), _WORDS[one.predicted], one.status)
            for one in self.record.experiments
        )
        parts = [
            f"<h3>{_shown(self.record.question)}</h3>",
            f"<p>{_shown(self.answer)}</p>",
            f"<p>{_shown(self.record.stopped)}</p>" if self.record.stopped else "",
            f"<table>{_cells('claim', '', 'effect', 'why', tag='th')}{claims}</table>"
            if claims
            else "<p>No claims.</p>",
            f"<table>{_cells('experiment', 'tool', 'found', 'predicted', 'status', tag='th')}{experiments}</table>",
            f"<p>{held} of {of} predictions held. Report: {_shown(str(self.report))}</p>",
        ]
        return "\n".join(filter(None, parts))


_WORDS = {True: "yes", False: "no", None: ""}


def _row(one: ExperimentRecord) -> dict[str, Any]:
    headline = one.headline or Headline("", None)
    return {
        "experiment": one.id,
        "tool": one.tool,
        "arguments": _as_json(one.arguments),
        "status": one.status,
        "hypothesis": one.prediction.hypothesis,
        "because": one.prediction.because,
        "predicted_low": one.prediction.low,
        "predicted_high": one.prediction.high,
        "predicted": one.predicted,
        "figure": headline.name,
        "value": headline.value,
        "low": headline.low,
        "high": headline.high,
        "n": headline.n,
        "control": headline.control,
        "control_value": headline.control_value,
        "control_low": headline.control_low,
        "control_high": headline.control_high,
        "control_n": headline.control_n,
        "passes": one.passes,
        "seconds": one.seconds,
    }


def _as_json(arguments: Mapping[str, Any]) -> str:
    from exegete.agent.investigation.ledger_file import as_text

    return as_text(arguments)


def _cells(*texts: str | None, tag: str = "td") -> str:
    cells = (f"<{tag}>{_shown(text or '')}</{tag}>" for text in texts)
    return f"<tr>{''.join(cells)}</tr>"


def _figure(headline: Headline | None) -> str:
    return "" if headline is None else figure(headline)


def _shown(text: str) -> str:
    return escape(visible(text))
