"""An investigation as it is kept: plain values, one JSON file, from which the report, the store's rows and `exegete rerun` are made.

1. The ledger fills an `InvestigationRecord` (`Ledger.record`); it holds everything that a tool was given besides the model:
   prompts, metric, other texts, seed, number of controls.
2. `write_record` writes it beside the ledger, whole or not at all. Numbers that are none (NaN, infinite) are written as null, halves
   of surrogate pairs as U+FFFD: JSON and UTF-8 have no words for them.
3. `read_record` checks every field of it: whoever reads it back trusts its shape, though none of its texts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from exegete.agent.investigation.contract import (
    Budget,
    Case,
    Headline,
    Hypothesis,
    Metric,
    Prediction,
    Verdict,
)
from exegete.tools.errors import UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

RECORD = "record.json"
FORMAT = 1

RECIPE = "recipe"
"""The investigator that is a fixed protocol: nothing in its records was written by a language model."""


@dataclass(frozen=True)
class Spent:
    """What an investigation has used."""

    steps: int = 0
    """Decisions of the investigator."""
    passes: int = 0
    """Prompts run through the model."""
    calls: int = 0
    """To language models, judging included."""
    tokens: int = 0
    """Of those, input and output together."""
    usd: float = 0.0


@dataclass(frozen=True)
class ExperimentRecord:
    """One experiment: what was predicted of it, and what it found."""

    id: str
    """`E1`, …"""
    tool: str
    arguments: Mapping[str, Any]
    """Everything that the tool was called with."""
    prediction: Prediction
    predicted_at: str
    """When the prediction was on the disk: UTC, ISO 8601."""
    finished_at: str | None = None
    """None where it was begun and never ended."""
    status: Literal["begun", "ok", "error", "refused"] = "begun"
    """error: the tool could not do it; refused: it may not be done."""
    headline: Headline | None = None
    predicted: bool | None = None
    """Whether the headline was as predicted; None where there is no figure."""
    text: str = ""
    """What the investigator was told."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    plots: tuple[Mapping[str, Any], ...] = ()
    passes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class InvestigationRecord:
    """One investigation."""

    id: str
    question: str
    investigator: str
    """`recipe`, or the model's name."""
    origin: Mapping[str, Any]
    """Subject and dictionary (`Live.origin`)."""
    cases: tuple[Case, ...]
    """The search prompts."""
    held_out: tuple[Case, ...]
    metric: Metric | None
    """None where it ended before that was settled."""
    seed: int
    code_version: str
    started_at: str
    """UTC, ISO 8601, as all times here."""
    status: Literal["finished", "interrupted", "budget"]
    """budget: it ended because what it may use was used up."""
    finished_at: str | None = None
    stopped: str = ""
    """Why the search ended before the investigator was done; empty where it was done."""
    suggested: str = ""
    """The cause that the question suggests."""
    budget: Budget = field(default_factory=Budget)
    spent: Spent = field(default_factory=Spent)
    hypotheses: tuple[Hypothesis, ...] = ()
    experiments: tuple[ExperimentRecord, ...] = ()
    """In the order of their predictions."""
    verdicts: tuple[Verdict, ...] = ()
    """Every claim of the last decision, with what checking it found."""
    answer: str = ""
    notes: tuple[str, ...] = ()
    """What the person who watched said."""
    lookups: Mapping[str, int] = field(default_factory=dict)
    """Tool that looks something up → times that it was used."""
    failed: Mapping[str, int] = field(default_factory=dict)
    """Tool → calls that were refused or went wrong before they were an experiment: those have records of their own."""
    opened: Mapping[str, Any] = field(default_factory=dict)
    """How subject and dictionary were opened: the fields of `agent.live.Wanted` as plain values (paths as texts)."""
    texts: tuple[str, ...] = ()
    """`Bench.texts`."""
    controls: int = 20
    """`Bench.controls`."""
    sealed: bool = False
    """`Bench.sealed`."""
    judge: str = ""
    """The language model that judged, as it is specified; empty where none did."""
    labels: Mapping[int, str] = field(default_factory=dict)
    """Latent → what the store said of it, for the latents that experiments and claims name."""
    format: int = FORMAT

    @property
    def hits(self) -> tuple[int, int]:
        """How many predictions held, and of how many: those of experiments that gave a figure."""
        settled = [experiment.predicted for experiment in self.experiments if experiment.predicted is not None]
        return sum(settled), len(settled)

    @property
    def hits_of_controls(self) -> tuple[int, int]:
        """How many of those predictions the control's figure would have met as well, and of how many that have one.

        A prediction that controls meet says nothing of the latents that it is about.
        """
        settled = [one for one in self.experiments if one.predicted is not None and one.headline is not None]
        met = [one.prediction.holds(one.headline.control_value) for one in settled if one.headline is not None]
        return sum(one is True for one in met), sum(one is not None for one in met)

    @property
    def by_model(self) -> bool:
        """Whether its hypotheses, reasons, claims and answer may be a language model's: all but the recipe's."""
        return self.investigator != RECIPE

    def experiment(self, id: str) -> ExperimentRecord:
        """Return the experiment called `id` (`E3`). Raises UserError where there is none."""
        for experiment in self.experiments:
            if experiment.id == id:
                return experiment
        known = ", ".join(experiment.id for experiment in self.experiments) or "none"
        raise UserError(f"investigation {self.id} has no experiment {id!r}; it has: {known}")


def to_json(record: InvestigationRecord) -> str:
    """Return the record as JSON text. Raises TypeError where it holds something that is no plain value."""
    return json.dumps(plain(asdict(record)), ensure_ascii=False, allow_nan=False, indent=1)


def from_json(text: str, where: str) -> InvestigationRecord:
    """Return the record in JSON text; `where` names it in errors.

    Raises:
        UserError: it is damaged, or from a newer version.
    """
    from pydantic import ValidationError

    try:
        found = json.loads(text)
        if isinstance(found, dict) and isinstance(found.get("format"), int) and found["format"] > FORMAT:
            raise UserError(
                f"{where} has format {found['format']}; this exegete knows {FORMAT}: pip install -U exegete"
            )
        return _adapter().validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "all of it"
        raise UserError(
            f"{where} is damaged ({place}: {first['msg']}); restore it, or ask the question again"
        ) from error
    except ValueError as error:
        raise UserError(f"{where} is damaged ({error}); restore it, or ask the question again") from error


@cache
def _adapter() -> TypeAdapter[InvestigationRecord]:
    """Made once: that takes longer than any reading, and a ledger is read at every step."""
    from pydantic import TypeAdapter

    return TypeAdapter(InvestigationRecord)


def write_record(record: InvestigationRecord, folder: Path) -> Path:
    """Write `record.json` into the investigation's folder, whole or not at all, and return its path. Raises OSError."""
    return write_whole(folder / RECORD, to_json(record))


def read_record(folder: Path) -> InvestigationRecord:
    """Return the record in an investigation's folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / RECORD
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {str(path)!r} ({error}); it is written when an investigation ends: name one that has ended"
        ) from error
    return from_json(text, repr(str(path)))


def write_whole(path: Path, text: str) -> Path:
    """Write a file whole or not at all, durably; return its path. Raises OSError where it cannot be written."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
        raise
    return path


def plain(value: Any) -> Any:
    """Return the value as JSON has it: see 2. Raises TypeError where it is no plain value."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain(inner) for inner in value]
    raise TypeError(f"a record holds plain values; {value!r} is a {type(value).__name__}")
