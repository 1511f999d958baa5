"""The ledger: what was decided, predicted, done and found in one investigation, each on the disk before anybody goes on.

1. Everything may be written twice, as a resumed investigation does: the first writing counts, and every method returns what is
   stored. So what goes on after a crash sees the same values as what would have gone on without it.
2. A prediction, with the experiment's id, is written before the experiment runs; the figure is held against it by code.
3. A call that has a result is finished; nobody runs it again. A call that is made again is given the former result.
4. What a hypothesis says is never rewritten; its status is the newest one.

The file is described in `ledger_file`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from exegete.agent.investigation.contract import (
    Budget,
    Call,
    Decision,
    Hypothesis,
    Metric,
    Outcome,
    Prediction,
    Result,
    Verdict,
)
from exegete.agent.investigation.ledger_file import LedgerFile, as_text
from exegete.agent.investigation.record import ExperimentRecord, InvestigationRecord, Spent, from_json, to_json
from exegete.tools.errors import UserError

LEDGER = "ledger.sqlite"
"""Its name in the folder of an investigation."""
_ENDING = ("stopped", "verdicts", "passes verifying", "ended")
"""Facts that are forgotten where an investigation goes on after all."""


@dataclass(frozen=True)
class Finished:
    """A call that has ended, with what the ledger knows of it."""

    result: Result
    step: int
    """Of the decision that it belongs to."""
    repeats: str
    """Id of the call whose result it was given again; empty where it ran."""


@dataclass(frozen=True)
class Stopped:
    """Why a search ended before the investigator was done."""

    why: str
    budget: bool
    """Whether something was used up."""
    again: bool = False
    """Whether it may end otherwise when it is gone on with: the language model could not be reached."""


class Ledger:
    """The open ledger of one investigation. Safe to use from several threads. A context manager.

    Every method raises UserError where the file is damaged, the disk is full, or another process works on the investigation.
    """

    def __init__(self, folder: Path) -> None:
        """Open the ledger in an investigation's folder, or make both."""
        self.folder = folder
        self._file = LedgerFile(folder / LEDGER)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def begin(self, record: InvestigationRecord) -> InvestigationRecord:
        """Write down what the investigation is about: the fields of `record` that are known now. Return what is stored."""
        self._file.change("INSERT OR IGNORE INTO facts VALUES ('begun', ?)", to_json(record))
        return self.begun()

    def begun(self) -> InvestigationRecord:
        """Return what `begin` wrote down, with the newest budget. Raises UserError where nothing has been begun."""
        found = self._file.rows("SELECT content FROM facts WHERE name = 'begun'")
        if not found:
            raise UserError(f"{str(self._file.path)!r} holds no investigation; ask the question again")
        begun = from_json(found[0][0], repr(str(self._file.path)))
        return replace(begun, budget=self._file.fact("budget", Budget) or begun.budget)

    def set_budget(self, budget: Budget) -> None:
        """Write down what may be used from now on."""
        self._file.set("budget", budget)

    def propose(self, metric: Metric) -> Metric:
        """Write down the metric that the investigator proposes."""
        return self._file.first("proposed", Metric, metric)

    @property
    def proposed(self) -> Metric | None:
        """The metric that the investigator proposed, or None."""
        return self._file.fact("proposed", Metric)

    def settle(self, metric: Metric) -> Metric:
        """Write down how the behaviour is measured."""
        return self._file.first("metric", Metric, metric)

    @property
    def metric(self) -> Metric | None:
        """How the behaviour is measured; None where that is not settled yet."""
        return self._file.fact("metric", Metric)

    def decide(self, step: int, decision: Decision) -> Decision:
        """Write down the decision of a step, from 1 on, with its calls and hypotheses.

        Raises:
            ValueError: a call's id is taken by another one.
        """
        with self._file.writing():
            if self._file.change("INSERT OR IGNORE INTO decisions VALUES (?, ?)", step, as_text(decision)):
                for call in decision.calls:
                    if not self._write_call(step, call):
                        raise ValueError(f"call {call.id!r} was made before; ids are unique within an investigation")
                for hypothesis in decision.hypotheses:
                    self._write_hypothesis(hypothesis)
        stored = self.decision(step)
        assert stored is not None
        return stored

    def decision(self, step: int) -> Decision | None:
        """Return what was decided in a step, None where that is to come."""
        return self._file.value(Decision, "SELECT content FROM decisions WHERE step = ?", step)

    @property
    def steps(self) -> int:
        """How many decisions there are."""
        return int(self._file.rows("SELECT count(*) FROM decisions")[0][0])

    @property
    def hypotheses(self) -> tuple[Hypothesis, ...]:
        """All hypotheses, in the order in which they were stated, with their newest status."""
        rows = self._file.rows("SELECT content FROM hypotheses ORDER BY number")
        return tuple(self._file.read(Hypothesis, text) for (text,) in rows)

    def note(self, step: int, text: str) -> None:
        """Write down what the person who watches says, to be told before the decision of `step`."""
        self._file.change("INSERT OR IGNORE INTO notes (step, text) VALUES (?, ?)", step, as_text(text))

    def notes(self, step: int | None = None) -> tuple[str, ...]:
        """Return what was said before the decision of `step`, or all of it."""
        rows = self._file.rows("SELECT step, text FROM notes ORDER BY number")
        return tuple(self._file.read(str, text) for told, text in rows if step in (None, told))

    def predict(self, call: Call, prediction: Prediction) -> str:
        """Write down what is predicted of an experiment, before it runs; return its id, `E1`, …"""
        with self._file.writing():
            self._write_call(0, call)
            count = self._file.rows("SELECT count(experiment) FROM calls")[0][0]
            self._file.change(
                "UPDATE calls SET experiment = ?, prediction = ?, predicted_at = ? WHERE call = ? AND experiment IS NULL",
                *(f"E{count + 1}", as_text(prediction), _now(), call.id),
            )
            return str(self._file.rows("SELECT experiment FROM calls WHERE call = ?", call.id)[0][0])

    def experiment(self, call_id: str) -> str:
        """Return the id that `predict` gave to a call; empty where it gave none."""
        found = self._file.rows("SELECT experiment FROM calls WHERE call = ?", call_id)
        return (found[0][0] or "") if found else ""

    def finish(self, result: Result, passes: int = 0, seconds: float = 0.0, repeats: str = "") -> Result:
        """Write down what became of a call.

        Args:
            result: its `predicted` is left to `score`, and so is its `experiment` unless it repeats one.
            passes: prompts run through the model for it.
            seconds: that it took.
            repeats: id of the call whose result this is, where it was not run again.
        """
        with self._file.writing():
            self._write_call(0, result.call)
            self._file.change(
                "UPDATE calls SET status = ?, outcome = ?, repeats = ?, passes = ?, seconds = ?, finished_at = ? "
                "WHERE call = ? AND status IS NULL",
                *(result.status, as_text(result.outcome), repeats, passes, seconds, _now(), result.call.id),
            )
        stored = self.finished(result.call.id)
        assert stored is not None
        return stored

    def finished(self, call_id: str) -> Result | None:
        """Return what became of a call, None where it has not ended."""
        found = self._finished("one.call = ?", call_id)
        return found[0].result if found else None

    def calls(self, step: int | None = None) -> list[Finished]:
        """Return every call that has ended, or those of a step, in the order of the decisions."""
        return self._finished("TRUE") if step is None else self._finished("one.step = ?", step)

    def score(self, step: int) -> list[Result]:
        """Hold the figures of a step's experiments against their predictions; return all results of the step."""
        with self._file.writing():
            for one in self._finished("one.step = ? AND one.experiment IS NOT NULL", step):
                call, headline = one.result.call.id, one.result.outcome.headline
                prediction = self._file.value(Prediction, "SELECT prediction FROM calls WHERE call = ?", call)
                holds = prediction.holds(headline.value) if prediction and headline else None
                self._file.change("UPDATE calls SET predicted = ? WHERE call = ?", holds, call)
        return [one.result for one in self.calls(step)]

    def use(self, purpose: Literal["opening", "verifying"], passes: int) -> None:
        """Write down prompts run through the model for something that is no call. What a crash makes run again counts once."""
        self._file.first(f"passes {purpose}", int, passes)

    def passes(self, before_step: int | None = None) -> int:
        """Return how many prompts have been run through the model: of the search before a step, or in all."""
        rows = self._file.rows("SELECT step, sum(passes) FROM calls GROUP BY step")
        calls = sum(int(passes) for step, passes in rows if before_step is None or step < before_step)
        verifying = 0 if before_step is not None else self._file.fact("passes verifying", int) or 0
        return calls + verifying + (self._file.fact("passes opening", int) or 0)

    def spent_before(self, step: int, spent: Callable[[], Spent]) -> Spent:
        """Return what was used of language models before the decision of a step, as it was when that was first to be made."""
        known = self._file.fact(f"spent before {step}", Spent)
        return known or self._file.first(f"spent before {step}", Spent, spent())

    def stop(self, why: str, budget: bool, again: bool = False) -> None:
        """Write down why the search ended before the investigator was done."""
        self._file.first("stopped", Stopped, Stopped(why, budget, again))

    @property
    def stopped(self) -> Stopped | None:
        """Why the search ended before the investigator was done; None where it did not."""
        return self._file.fact("stopped", Stopped)

    def judge(self, verdicts: Sequence[Verdict]) -> tuple[Verdict, ...]:
        """Write down what checking the claims found."""
        return self._file.first("verdicts", tuple[Verdict, ...], tuple(verdicts))

    @property
    def verdicts(self) -> tuple[Verdict, ...] | None:
        """What checking the claims found; None where they have not been checked."""
        return self._file.fact("verdicts", tuple[Verdict, ...])

    def end(self, spent: Spent) -> None:
        """Write down that it has ended. Of `spent` the calls to language models, their tokens and USD are taken."""
        with self._file.writing():
            self._file.first("ended", dict[str, Any], {"at": _now(), **asdict(spent)})

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._file.fact("ended", dict[str, Any]) is not None

    def reopen(self) -> int:
        """Forget how it ended, since it may go on; return how often that has been done."""
        with self._file.writing():
            self._file.change(f"DELETE FROM facts WHERE name IN ({', '.join('?' * len(_ENDING))})", *_ENDING)
            self._file.set("round", self.round + 1)
            self._file.set("reopened", self.steps)
        return self.round

    @property
    def round(self) -> int:
        """How often it has been opened again."""
        return self._file.fact("round", int) or 0

    @property
    def reopened(self) -> int:
        """After how many decisions it was last opened again; 0 where it never was."""
        return self._file.fact("reopened", int) or 0

    def spent(self) -> Spent:
        """Return what has been used; of language models, what was written down at the end."""
        ended = self._file.fact("ended", dict[str, Any]) or {}
        known = {name: ended[name] for name in ("calls", "tokens", "usd") if name in ended}
        return Spent(steps=self.steps, passes=self.passes(), **known)

    def record(self) -> InvestigationRecord:
        """Return everything, as the report, the store and reruns take it."""
        ended, stopped, last = self._file.fact("ended", dict[str, Any]), self.stopped, self.decision(self.steps)
        return replace(
            self.begun(),
            metric=self.metric,
            status=_status(ended is not None, stopped),
            stopped=stopped.why if stopped else "",
            finished_at=ended["at"] if ended else None,
            spent=self.spent(),
            hypotheses=self.hypotheses,
            experiments=tuple(self._experiments()),
            verdicts=self.verdicts or (),
            answer=last.answer if last else "",
            notes=self.notes(),
            lookups=self._used("status = 'ok'"),
            failed=self._used("status <> 'ok'"),
        )

    def _used(self, where: str) -> dict[str, int]:
        """Return how often each tool was called where that came to no experiment."""
        return dict(
            self._file.rows(
                f"SELECT tool, count(*) FROM calls WHERE {where} AND experiment IS NULL AND repeats = '' "
                "GROUP BY tool ORDER BY tool"
            )
        )

    def _experiments(self) -> Iterator[ExperimentRecord]:
        for row in self._file.rows(
            f"{_SELECT} WHERE one.experiment IS NOT NULL ORDER BY CAST(substr(one.experiment, 2) AS INT)"
        ):
            result, (prediction, predicted_at, finished_at, passes, seconds) = self._result(row), row[7:]
            yield ExperimentRecord(
                id=result.experiment,
                tool=result.call.tool,
                arguments=result.call.arguments,
                prediction=self._file.read(Prediction, prediction),
                predicted_at=predicted_at,
                finished_at=finished_at,
                status=result.status if finished_at else "begun",
                headline=result.outcome.headline,
                predicted=result.predicted,
                text=result.outcome.text,
                facts=result.outcome.facts,
                plots=result.outcome.plots,
                passes=passes,
                seconds=seconds,
            )

    def _finished(self, where: str, *values: Any) -> list[Finished]:
        rows = self._file.rows(f"{_SELECT} WHERE one.status IS NOT NULL AND {where} ORDER BY one.number", *values)
        return [Finished(self._result(row), step=row[5], repeats=row[6]) for row in rows]

    def _result(self, row: Sequence[Any]) -> Result:
        call, status, outcome, experiment, predicted = row[:5]
        return Result(
            self._file.read(Call, call),
            status or "error",
            self._file.read(Outcome, outcome) if outcome else Outcome(""),
            experiment or "",
            None if predicted is None else bool(predicted),
        )

    def _write_call(self, step: int, call: Call) -> bool:
        return self._file.change(
            "INSERT OR IGNORE INTO calls (call, step, tool, content) VALUES (?, ?, ?, ?)",
            *(call.id, step, call.tool, as_text(call)),
        )

    def _write_hypothesis(self, hypothesis: Hypothesis) -> None:
        known = self._file.value(Hypothesis, "SELECT content FROM hypotheses WHERE id = ?", hypothesis.id)
        if known is None:
            self._file.change("INSERT INTO hypotheses (id, content) VALUES (?, ?)", hypothesis.id, as_text(hypothesis))
        else:
            # Rewording what was tested already would make a prediction of a result.
            changed = replace(known, status=hypothesis.status)
            self._file.change("UPDATE hypotheses SET content = ? WHERE id = ?", as_text(changed), hypothesis.id)


_SELECT = (
    "SELECT one.content, one.status, one.outcome, coalesce(one.experiment, former.experiment), "
    "CASE WHEN one.experiment IS NULL THEN former.predicted ELSE one.predicted END, one.step, one.repeats, "
    "one.prediction, one.predicted_at, one.finished_at, one.passes, one.seconds "
    "FROM calls one LEFT JOIN calls former ON former.call = one.repeats"
)


def _status(ended: bool, stopped: Stopped | None) -> Literal["finished", "interrupted", "budget"]:
    if not ended or (stopped is not None and stopped.again):
        return "interrupted"
    return "budget" if stopped is not None and stopped.budget else "finished"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
