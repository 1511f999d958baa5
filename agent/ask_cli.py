"""The command `exegete ask`."""

from __future__ import annotations

import asyncio
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exegete.agent import instrument_cli
from exegete.agent.instrument_cli import (
    BatchTokens,
    Config,
    Controls,
    Device,
    Dictionary,
    Dtype,
    Format,
    Seed,
    Shown,
    Store,
    Subject,
    Texts,
)
from exegete.tools.errors import UserError
from exegete.tools.rendering import visible, visible_json

if TYPE_CHECKING:
    from exegete.agent.investigation.contract import Budget, Metric, Question, Result
    from exegete.agent.investigation.inquiry import Answer
    from exegete.agent.investigation.investigate import Around
    from exegete.agent.investigation.result import Investigation

app = typer.Typer()
"""Its command is registered with the main application."""


class Measured(StrEnum):
    """How a behaviour is measured."""

    log_odds = "log_odds"
    log_probability = "log_probability"
    judged = "judged"


INTERRUPTED = 130
"""Exit status of an investigation that was asked to stop."""

QuestionText = Annotated[str | None, typer.Argument(help='For example "Why does the model answer with DESC here?".')]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="Twenty prompts or more: .txt, a line each, or .jsonl with `prompt`, `answer`, `other`, `variant`.",
    ),
]
MetricKind = Annotated[
    Measured | None,
    typer.Option("--metric", help="How the behaviour is measured; the investigator says if left out."),
]
AnswerToken = Annotated[
    str | None, typer.Option("--answer", help="Token that shows the behaviour, for prompts that name none.")
]
OtherToken = Annotated[
    str | None, typer.Option("--other", help="Token that stands against it: their log-odds are measured.")
]
Criterion = Annotated[
    str | None,
    typer.Option("--criterion", help="What a judge is asked of each continuation; measured as `judged`."),
]
Suggested = Annotated[str, typer.Option("--suggested", help="The cause that the question suggests, in words.")]
Agent = Annotated[
    str,
    typer.Option("--agent", help="recipe (no language model), anthropic:MODEL, openai:MODEL, openai:MODEL@URL."),
]
Judge = Annotated[str, typer.Option("--judge", help="Language model that judges; the agent's where it is one.")]
BudgetUsd = Annotated[
    float | None, typer.Option("--budget", help="What calls to language models may cost in all, in USD.")
]
NoBudget = Annotated[bool, typer.Option("--no-budget", help="Spend without a limit.")]
BudgetTokens = Annotated[
    int | None,
    typer.Option("--budget-tokens", help="What the calls may take in tokens, input and output together."),
]
Passes = Annotated[
    int | None,
    typer.Option("--passes", help="Prompts run through the subject, at most; a quarter is kept to verify. [200000]"),
]
Steps = Annotated[int | None, typer.Option("--steps", help="Decisions of the agent, at most. [40]")]
Interactive = Annotated[
    bool, typer.Option("--interactive", help="Stop to have the metric confirmed, and for remarks between steps.")
]
Resume = Annotated[
    str | None, typer.Option("--resume", metavar="ID", help="Go on with an investigation: its id, or its folder.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder to write to; the store, or `out`, if left out.")]


@app.command()
def ask(
    question: QuestionText = None,
    prompts: PromptFile = None,
    metric: MetricKind = None,
    answer: AnswerToken = None,
    other: OtherToken = None,
    criterion: Criterion = None,
    suggested: Suggested = "",
    agent: Agent = "recipe",
    judge: Judge = "",
    budget: BudgetUsd = None,
    no_budget: NoBudget = False,
    budget_tokens: BudgetTokens = None,
    passes: Passes = None,
    steps: Steps = None,
    interactive: Interactive = False,
    resume: Resume = None,
    out: Out = None,
    texts: Texts = None,
    controls: Controls = 20,
    seed: Seed = 0,
    format: Format = Shown.table,
    store: Store = None,
    config: Config = None,
    subject: Subject = None,
    dictionary: Dictionary = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_tokens: BatchTokens = 4_096,
) -> None:
    """Investigate a behaviour: hypotheses, predictions, experiments with controls, claims verified on held-out prompts, a report."""
    limits = _Limits(steps, passes, budget, budget_tokens)
    if resume is not None:
        _require_alone(
            question=question, prompts=prompts, metric=metric, answer=answer, other=other, criterion=criterion,
            suggested=suggested, judge=judge, texts=texts, agent=agent.removeprefix("recipe"), seed=seed, config=config,
            subject=subject, dictionary=dictionary, device=device, dtype=dtype,
        )  # fmt: skip
        _go(lambda around: _resumed(resume, store, out, limits, no_budget, around), interactive, format, store, out)
        return
    from exegete.agent.investigation.asked import Asked

    if question is None or prompts is None:
        raise UserError('exegete ask: give a question and its prompts, "Why …?" --prompts FILE, or --resume ID')
    asked = Asked(
        question,
        prompts,
        _metric(metric, answer, other, criterion),
        agent,
        suggested,
        _wanted(store, config, subject, dictionary, device, dtype, batch_tokens),
        instrument_cli._texts(None, texts),
        judge,
        limits.on(None),
        no_budget,
        seed,
        controls,
        out=out,
    )
    _go(lambda around: _asked(asked, around), interactive, format, store, out)


@dataclass(frozen=True)
class _Limits:
    """What the command line says of the budget; None says nothing."""

    steps: int | None
    passes: int | None
    usd: float | None
    tokens: int | None

    def on(self, before: Budget | None) -> Budget:
        """Return the budget, where nothing is said as it was before."""
        from exegete.agent.investigation.contract import Budget

        said = {name: value for name, value in self.__dict__.items() if value is not None}
        return replace(before or Budget(), **said)


def _require_alone(**options: object) -> None:
    given = [name if name == "question" else f"--{name}" for name, value in options.items() if value]
    if given:
        raise UserError(f"--resume goes on with what was asked: leave out {', '.join(given)}")


class Terminal:
    """The person at the terminal: confirms the metric, and may say something between steps."""

    def metric(self, question: Question, proposed: Metric) -> Metric:
        """Show the metric that is proposed; take another one."""
        from exegete.agent.investigation.contract import Metric

        typer.echo(visible(f"\nmetric: {_described(proposed)}"), err=True)
        while True:
            said = _prompt("enter to confirm, or: log_odds ANSWER OTHER | log_probability ANSWER | judged CRITERION")
            if not said.strip():
                return proposed
            try:
                kind, *rest = shlex.split(said)
            except ValueError as error:
                typer.echo(visible(f"{said!r} cannot be read ({error})"), err=True)
                continue
            if kind == "log_odds" and len(rest) == 2:
                return Metric("log_odds", rest[0], rest[1])
            if kind == "log_probability" and len(rest) == 1:
                return Metric("log_probability", rest[0])
            if kind == "judged" and rest:
                return Metric("judged", criterion=" ".join(rest))
            typer.echo(visible(f"{said!r} is no metric"), err=True)

    def between(self, step: int, results: Sequence[Result]) -> Answer:
        """Take a remark for the agent, or the word that ends the search."""
        from exegete.agent.investigation.inquiry import Answer

        said = _prompt(
            f"before step {step}: enter to go on, a remark for the agent, or `end` to verify what is claimed"
        )
        return Answer(stop=True) if said.strip() == "end" else Answer(said.strip())


def _prompt(text: str) -> str:
    """Return what is typed. Ctrl-C ends the waiting at once, as the end of the input does: it is gone on with later.

    Raises:
        Interrupted: by one of them.
    """
    from exegete.agent.investigation.inquiry import Interrupted

    try:
        with _raising_interrupts():
            said: str = typer.prompt(text, default="", show_default=False, err=True)
    except (typer.Abort, KeyboardInterrupt):
        raise Interrupted from None
    return said


@contextmanager
def _raising_interrupts() -> Iterator[None]:
    """Let signals raise KeyboardInterrupt: a handler that only notes them leaves whoever waits for a line waiting."""
    both = (signal.SIGINT, signal.SIGTERM)
    try:
        former = {number: signal.signal(number, signal.default_int_handler) for number in both}
    except ValueError:  # Signals reach the main thread only.
        former = {}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _go(work: Callable[[Around], Any], interactive: bool, format: Shown, store: Path | None, out: Path | None) -> None:
    from exegete.agent.interrupts import stop_on_interrupt
    from exegete.agent.investigation.investigate import Around
    from exegete.agent.progress import default_progress
    from exegete.agent.surviving_display import SurvivingDisplay

    progress = SurvivingDisplay(default_progress())
    with stop_on_interrupt(progress) as asked_to:
        around = Around(person=Terminal() if interactive else None, progress=progress, stopping=asked_to)
        found: Investigation = asyncio.run(work(around))
    if format is Shown.json:
        from exegete.agent.investigation.record import to_json

        typer.echo(visible_json(to_json(found.record)))
    else:
        typer.echo("\n".join(visible(line) for line in _lines(found)))
    if not found.finished:
        where = "".join(
            f" {option} {shlex.quote(str(at))}" for option, at in (("--store", store), ("--out", out)) if at
        )
        typer.echo(f"\nGo on: exegete ask --resume {found.id}{where}", err=format is Shown.json)
        raise typer.Exit(INTERRUPTED)


async def _asked(asked: Any, around: Around) -> Investigation:
    from exegete.agent.investigation.investigate import asked_of

    return await asked_of(asked, around)


async def _resumed(
    named: str, store: Path | None, out: Path | None, limits: _Limits, no_budget: bool, around: Around
) -> Investigation:
    from exegete.agent.investigation.investigate import resumed

    return await resumed(named, store, out, limits.on, no_budget, around)


def _lines(found: Investigation) -> list[str]:
    """Return what is shown in the end: the answer, each claim with what checking it found, and where the report is."""
    from exegete.agent.investigation.telling import verdict_line

    record = found.record
    held, of = record.hits
    spent = f"{record.spent.steps} steps, {record.spent.passes:,} forward passes"
    if record.spent.calls:
        spent += f", {record.spent.calls} calls, {record.spent.tokens:,} tokens, {record.spent.usd:.4f} USD"
    return [
        "",
        *([f"ended early: {record.stopped}"] if record.stopped else []),
        *(record.answer.splitlines() or ["no answer was given"]),
        "",
        *(verdict_line(verdict) for verdict in found.claims),
        *([] if found.claims else ["nothing is claimed"]),
        f"{held} of {of} predictions held; {spent}",
        f"report: {found.report}",
    ]


def _metric(kind: Measured | None, answer: str | None, other: str | None, criterion: str | None) -> Metric | None:
    """Return the metric that the options name, None where they name none."""
    from exegete.agent.investigation.contract import Metric

    if criterion is not None and (answer or other or kind not in (None, Measured.judged)):
        raise UserError("--criterion is what a judge is asked: leave --answer, --other and another --metric out")
    if other is not None and (answer is None or kind not in (None, Measured.log_odds)):
        raise UserError(
            f"--other {other!r} stands against an answer: give --answer as well, and --metric log_odds or none"
        )
    if kind is Measured.judged and not criterion:
        raise UserError("--metric judged needs what a judge is asked: --criterion")
    if criterion is not None:
        return Metric("judged", criterion=criterion)
    if kind is None and answer is None:
        return None
    implied = "log_odds" if other is not None else "log_probability"
    return Metric(kind.value if kind else implied, answer, other)  # type: ignore[arg-type]


def _described(metric: Metric) -> str:
    parts = [f"{name} {value!r}" for name in ("answer", "other", "criterion") if (value := getattr(metric, name))]
    return ", ".join([f"{metric.kind} in {metric.unit}", *(parts or ["tokens as each prompt names them"])])


def _wanted(
    store: Path | None,
    config: Path | None,
    subject: str | None,
    dictionary: str | None,
    device: str | None,
    dtype: Dtype,
    batch_tokens: int,
) -> Any:
    from exegete.agent.live import Wanted

    return Wanted(store, config, subject, dictionary, device, dtype.value if dtype else None, batch_tokens)
