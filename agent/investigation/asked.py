"""What an investigation is asked, how it is known, and where it is kept.

1. An investigation is known by everything that its results depend on: question, prompts, metric, seed, investigator, subject and
   dictionary by fingerprint, other texts, number of controls, and the version of this code. Asked again, it goes on where it ended.
2. It has a folder of its own: STORE/investigations/ID, or OUT/investigations/ID. What it was asked is the first thing in its ledger,
   so it can be gone on with by its id alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from exegete.agent.gathering import bundled_texts, is_bundled
from exegete.agent.investigation.contract import Budget, Case, Metric, Question
from exegete.agent.investigation.ledger import LEDGER
from exegete.agent.investigation.questions import read_question, split
from exegete.agent.investigation.record import InvestigationRecord, to_json
from exegete.agent.live import Live, Wanted
from exegete.tools.errors import UserError, nearest
from exegete.tools.seeds import derive_seed, digest
from exegete.tools.store.investigations import FOLDER

OUT = Path("out")
"""Where there is no store."""
BUNDLED_TEXTS = 200
"""Texts of the bundled grammar that stand beside the prompts, where the subject is the bundled one and no others are given."""
_SLUG_CHARACTERS = 40


@dataclass(frozen=True)
class Asked:
    """What an investigation is asked to do, and with what."""

    question: str
    prompts: Path | Sequence[Case | str]
    """A `.txt` or `.jsonl` file, or the prompts themselves."""
    metric: Metric | None = None
    """None where the investigator is to say."""
    investigator: str = "recipe"
    """`recipe`, or a language model: `anthropic:MODEL`, `openai:MODEL`, `openai:MODEL@URL`."""
    suggested: str = ""
    """The cause that the question suggests, in words."""
    wanted: Wanted = field(default_factory=Wanted)
    """Subject, dictionary and store."""
    texts: Sequence[str] = ()
    """Other texts of the subject's kind, on which firing rates, means and strengths are measured."""
    judge: str = ""
    """Language model that judges; the investigator's where that is one."""
    budget: Budget = field(default_factory=Budget)
    no_budget: bool = False
    """Spend USD without a limit."""
    seed: int = 0
    controls: int = 20
    """Random sets of latents beside each experiment."""
    sealed: bool = False
    """Whether a labeling is asked for: then no tool shows windows of the test split."""
    out: Path | None = None
    """Folder to write to, in place of the store."""

    def sides(self) -> tuple[Question, tuple[Case, ...]]:
        """Return the question with its search prompts, and the held-out prompts.

        Raises:
            UserError: the question, the prompts or the numbers are wrong.
        """
        if self.controls < 1:
            raise UserError(f"controls = {self.controls}: a figure needs at least one to stand beside")
        question = read_question(self.question, self.prompts, self.metric, self.seed, self.budget, self.suggested)
        search, held_out = split(question)
        return replace(question, cases=search), held_out


def begun(asked: Asked, live: Live, judge: str) -> InvestigationRecord:
    """Return what is known of an investigation when it begins. Raises UserError as `Asked.sides`."""
    question, held_out = asked.sides()
    texts = tuple(asked.texts) or _bundled_texts(asked, live)
    record = InvestigationRecord(
        id="",
        question=question.text,
        investigator=asked.investigator,
        origin=live.origin,
        cases=question.cases,
        held_out=held_out,
        metric=asked.metric,
        seed=asked.seed,
        code_version=version("exegete"),
        started_at="",
        status="interrupted",
        suggested=question.suggested,
        opened=_as_texts(asked.wanted),
        texts=texts,
        controls=asked.controls,
        sealed=asked.sealed,
        judge=judge,
    )
    known_by = digest(to_json(_without_places(record)))
    return replace(
        record,
        id=f"{_slug(question.text)}-{known_by.removeprefix('sha256:')[:8]}",
        started_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        budget=asked.budget,
    )


def folder_of(id: str, store: Path | None, out: Path | None) -> Path:
    """Return the folder of an investigation."""
    return (out or store or OUT) / FOLDER / id


def found_folder(named: str, store: Path | None, out: Path | None) -> Path:
    """Return the folder of an investigation that has begun, by its id or its folder.

    Raises:
        UserError: there is none; those that there are are named.
    """
    if (Path(named) / LEDGER).exists():
        return Path(named)
    folder = folder_of(named, store, out)
    if (folder / LEDGER).exists():
        return folder
    there = sorted(path.parent.name for path in folder.parent.glob(f"*/{LEDGER}"))
    raise UserError(
        f"there is no investigation {named!r} in {str(folder.parent)!r}; there are: {', '.join(there[:10]) or 'none'}."
        f"{nearest(named, there)} Elsewhere it is found with --store or --out"
    )


def wanted_of(opened: Mapping[str, Any]) -> Wanted:
    """Return what `opened` of a record says of subject and dictionary."""
    paths = {name: Path(opened[name]) for name in ("store", "config") if opened.get(name)}
    return Wanted(**{**opened, "store": None, "config": None, **paths})


def _as_texts(wanted: Wanted) -> dict[str, Any]:
    return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in asdict(wanted).items()}


def _without_places(record: InvestigationRecord) -> InvestigationRecord:
    """Leave out of a record where things were, on which nothing depends: the fingerprints say what they were."""
    prints = {name: record.origin[name] for name in ("subject_fingerprint", "fingerprint") if name in record.origin}
    return replace(record, origin=prints, opened={})


def _bundled_texts(asked: Asked, live: Live) -> tuple[str, ...]:
    if not is_bundled(live.model.subject.name):
        return ()
    return tuple(bundled_texts(derive_seed(asked.seed, "investigation", "texts"), BUNDLED_TEXTS))


def _slug(question: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", question.lower()).strip("-")
    return words[:_SLUG_CHARACTERS].rstrip("-") or "investigation"
