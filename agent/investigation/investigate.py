"""Investigating from Python: one call from a question to its report, in a script, in a notebook, or several at a time.

    found = investigate("Why does the model answer with DESC here?", "prompts.jsonl")
    found.answer, found.claims, found.experiments, found.report

1. The question and its prompts are read and split, models and keys are looked at: what can be wrong is said before a model is loaded.
2. The investigation's folder is made, or found again (`asked`), and its graph goes on from where it is (`graph`).
3. `ainvestigate` is the same for an event loop. Several of them that are given one `Sharing` run their trials in shared batches.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.agent.awaiting import awaited
from exegete.agent.config import ModelsConfig
from exegete.agent.investigation.asked import Asked, begun, folder_of, found_folder, wanted_of
from exegete.agent.investigation.contract import Budget, Case, Investigator, Metric, Question
from exegete.agent.investigation.language_models import LanguageModels, checked_models, language_models, require_known
from exegete.agent.investigation.ledger import Ledger
from exegete.agent.investigation.record import RECIPE, RECORD, InvestigationRecord, read_record
from exegete.agent.investigation.result import Investigation
from exegete.agent.live import Live, Wanted, open_live
from exegete.agent.progress import Progress
from exegete.tools.embedders import Embedder, opened_once
from exegete.tools.errors import UserError
from exegete.tools.store import Store

if TYPE_CHECKING:
    from exegete.agent.investigation.bench import Bench
    from exegete.agent.investigation.inquiry import Inquiry, Person
    from exegete.agent.investigation.shared_model import Sharing
    from exegete.agent.investigation.toolbelt import Toolbelt

_NO_STOP: Callable[[], bool] = lambda: False  # noqa: E731


@dataclass(frozen=True)
class Around:
    """Who and what is around an investigation while it goes on; nothing of it is kept, and no figure depends on it."""

    sharing: Sharing | None = None
    """One live model for several investigations at a time; without, each loads its own."""
    investigator: Investigator | None = None
    """An investigator of one's own."""
    person: Person | None = None
    """Who confirms the metric and may say something between steps."""
    progress: Progress | None = None
    """Where it says how far it is."""
    stopping: Callable[[], bool] = field(default=_NO_STOP)
    """Once it is true, the investigation stops after what is under way; the same call goes on."""
    query_s: float = 10.0
    """Seconds that one query of the investigator's over the store may take; what takes longer is refused."""
    query_mb: int = 1_000
    """Megabytes that it may take."""


def investigate(
    question: str,
    prompts: Path | str | Sequence[Case | str],
    metric: Metric | None = None,
    investigator: str | Investigator = RECIPE,
    store: Path | str | None = None,
    **more: Any,
) -> Investigation:
    """Investigate a question, and return what came of it. Asked again, it goes on where it ended.

    Args:
        question: for example "Why does the model answer with DESC here?".
        prompts: a `.txt` or `.jsonl` file, or the prompts; twenty or more.
        metric: how the behaviour is measured; the investigator says where it is left out.
        investigator: `recipe`, a language model such as `anthropic:MODEL`, or an `Investigator` of one's own.
        store: whose newest run names subject and dictionary, whose labels are used, and where the investigation is kept.
        more: fields of `Asked`, of `Around` and of `exegete.agent.live.Wanted`, by name.

    Raises:
        UserError: something that is given is wrong, a model cannot be asked, or the disk is full. What was found is kept.
        TypeError: there is no such field.
    """
    return awaited(ainvestigate(question, prompts, metric, investigator, store, **more))


async def ainvestigate(
    question: str,
    prompts: Path | str | Sequence[Case | str],
    metric: Metric | None = None,
    investigator: str | Investigator = RECIPE,
    store: Path | str | None = None,
    **more: Any,
) -> Investigation:
    """As `investigate`, in the event loop that runs; several at a time share a model that they are given as `sharing`."""
    given = dict(more)
    wanted = _taken(Wanted, given, given.pop("wanted", None), {"store": None if store is None else Path(store)})
    if not isinstance(investigator, str):
        given["investigator"] = investigator
    around = _taken(Around, given)
    asked = Asked(
        question,
        Path(prompts) if isinstance(prompts, str) else prompts,
        metric,
        investigator if isinstance(investigator, str) else investigator.name,
        wanted=wanted,
        **given,
    )
    return await asked_of(asked, around)


async def asked_of(asked: Asked, around: Around = Around()) -> Investigation:
    """Investigate what is asked, from where it is to its report.

    Raises:
        UserError: as `investigate`.
    """
    asked.sides()
    if around.investigator is None:
        require_known(asked.investigator)
    name = asked.investigator if around.investigator is None else ""
    judge, models = checked_models(name, asked.judge, asked.budget, asked.no_budget, asked.wanted.config)
    async with _shared(asked.wanted, around) as sharing:
        live = sharing.live()
        record = begun(asked, live, judge)
        with Ledger(folder_of(record.id, asked.wanted.store, asked.out)) as ledger:
            ledger.begin(record)
            _reopened(ledger, asked.budget)
            return await _gone_on(ledger, live, models, around)


async def resumed(
    named: str,
    store: Path | None = None,
    out: Path | None = None,
    budget: Callable[[Budget], Budget] = lambda budget: budget,
    no_budget: bool = False,
    around: Around = Around(),
) -> Investigation:
    """Go on with an investigation that was begun before.

    Args:
        named: its id, or its folder.
        store: where it is kept.
        out: where it is kept, in place of a store.
        budget: says what may be used from now on, given what might be so far.
        no_budget: spend USD without a limit.
        around: as for `asked_of`.

    Raises:
        UserError: there is none, it was of another subject or dictionary, or as `investigate`.
    """
    folder = found_folder(named, store, out)
    with Ledger(folder) as ledger:
        record = ledger.begun()
        _reopened(ledger, budget(record.budget))
        if ledger.ended and (folder / RECORD).exists() and (folder / "report.html").exists():
            return Investigation(read_record(folder), folder)
        if around.investigator is None:
            require_known(record.investigator)
        name = record.investigator if around.investigator is None else ""
        wanted = wanted_of(record.opened)
        free = no_budget or ledger.begun().budget.usd is None
        _, models = checked_models(name, record.judge, ledger.begun().budget, free, wanted.config)
        async with _shared(wanted, around) as sharing:
            live = sharing.live()
            _require_same(record, live)
            return await _gone_on(ledger, live, models, around)


def _reopened(ledger: Ledger, budget: Budget) -> None:
    """Settle what may be used, and let the investigation go on where that ended it and there is more now, or a failing server did."""
    before = ledger.begun().budget
    ledger.set_budget(budget)
    stopped = ledger.stopped
    if stopped is not None and (stopped.again or (stopped.budget and _more(before, budget))):
        ledger.reopen()


def _more(before: Budget, now: Budget) -> bool:
    pairs = [(getattr(before, one.name), getattr(now, one.name)) for one in fields(Budget)]
    return any(was is not None and (may is None or may > was) for was, may in pairs)


@asynccontextmanager
async def _shared(wanted: Wanted, around: Around) -> AsyncIterator[Sharing]:
    from exegete.agent.investigation.shared_model import Sharing

    if around.sharing is not None:
        yield around.sharing
        return
    if around.progress is not None:
        around.progress.say("loading subject and dictionary")
    with Sharing(await asyncio.to_thread(open_live, wanted)) as sharing:
        yield sharing


async def _gone_on(ledger: Ledger, live: Live, models: ModelsConfig, around: Around) -> Investigation:
    from exegete.agent.investigation.graph import investigated
    from exegete.agent.investigation.inquiry import Interrupted

    record = ledger.begun()
    name = record.investigator if around.investigator is None else ""
    async with language_models(ledger.folder, record.id, name, record.judge, models, around.stopping) as asked:
        inquiry = _inquiry(ledger, live, asked, around)
        try:
            with _steps(ledger, around) as inquiry.advance:
                await investigated(inquiry, around.person)
            if not (ledger.folder / "report.html").exists():
                await asyncio.to_thread(inquiry.write)
        except Interrupted:
            inquiry.write()
        finally:
            inquiry.close()
            live.model.close()  # type: ignore[attr-defined]  # A shared one: what waits is of this investigation.
    if live.store is not None:
        await asyncio.to_thread(Store.open(live.store).show_investigations)
    return Investigation(inquiry.labels(ledger.record()), ledger.folder)


def _steps(ledger: Ledger, around: Around) -> AbstractContextManager[Callable[[int], None]]:
    if around.progress is None:
        return nullcontext(lambda decisions: None)
    steps: AbstractContextManager[Callable[[int], None]] = around.progress.stage(
        "investigation", ledger.begun().budget.steps, "steps", done=ledger.steps
    )
    return steps


def _inquiry(ledger: Ledger, live: Live, models: LanguageModels, around: Around) -> Inquiry:
    from exegete.agent.investigation.inquiry import Inquiry
    from exegete.agent.investigation.reporting import write_report
    from exegete.agent.investigation.toolbelt import Toolbelt
    from exegete.agent.investigation.verifying import verify

    record, loop = ledger.begun(), asyncio.get_running_loop()

    def bench(metric: Metric) -> Bench:
        return replace(_bench(record, live, metric, models, loop), query_s=around.query_s, query_mb=around.query_mb)

    def toolbelt(bench: Bench) -> Toolbelt:
        # Looked up when it is called: the tools are described before there is an inquiry.
        return Toolbelt(bench, recall=lambda experiment: inquiry.recall(experiment))

    inquiry = Inquiry(
        ledger=ledger,
        investigator=around.investigator or _investigator(models, lambda: toolbelt(bench(Metric("log_odds")))),
        question=Question(record.question, record.cases, record.metric, record.suggested, record.seed, record.budget),
        held_out=record.held_out,
        open_bench=bench,
        open_toolbelt=toolbelt,
        verifier=verify,
        reporter=write_report,
        account=models.spent,
        labels=lambda found: _labeled(found, live),
        say=around.progress.say if around.progress else lambda line: None,
        stopping=around.stopping,
        interactive=around.person is not None,
    )
    return inquiry


def _investigator(models: LanguageModels, toolbelt: Callable[[], Toolbelt]) -> Investigator:
    if models.investigator is None:
        from exegete.agent.investigation.recipe import Recipe

        return Recipe()
    from exegete.agent.investigation.model import ModelInvestigator

    return ModelInvestigator(models.investigator, toolbelt().schemas("plain"))


def _bench(
    record: InvestigationRecord, live: Live, metric: Metric, models: LanguageModels, loop: asyncio.AbstractEventLoop
) -> Bench:
    from exegete.agent.investigation.bench import Bench

    return Bench(
        live,
        record.cases,
        metric,
        record.seed,
        texts=record.texts,
        judge=models.judge,
        open_embedder=opened_once(lambda name: _embedder(name, live)),
        controls=record.controls,
        sealed=record.sealed,
        loop=loop,
    )


def _embedder(name: str, live: Live) -> Embedder:
    from exegete.tools.embedders import SentenceEmbedder

    return SentenceEmbedder(name, device=str(live.model.subject.device))


def _labeled(record: InvestigationRecord, live: Live) -> InvestigationRecord:
    """Add what the store says of the latents that experiments and claims name."""
    from exegete.agent.investigation.reporting import named_latents

    named = {latent for one in record.experiments for latent in named_latents(one.arguments)}
    named |= {latent for verdict in record.verdicts for latent in verdict.claim.latents}
    return replace(record, labels={latent: live.labels[latent] for latent in sorted(named) if latent in live.labels})


def _require_same(record: InvestigationRecord, live: Live) -> None:
    for what in ("subject_fingerprint", "fingerprint"):
        if record.origin.get(what) != live.origin[what]:
            noun = "dictionary" if what == "fingerprint" else "subject"
            raise UserError(
                f"investigation {record.id} was of {noun} {record.origin.get(noun)!r}, and {live.origin[noun]!r} is another one now; "
                "put back the one that it was of, or ask the question again"
            )


def _taken(kind: Any, given: dict[str, Any], whole: Any = None, more: dict[str, Any] | None = None) -> Any:
    """Take the fields of a dataclass out of `given` and return it made, or `whole` with them."""
    found = {one.name: given.pop(one.name) for one in fields(kind) if one.name in given}
    found |= {name: value for name, value in (more or {}).items() if value is not None}
    if kind is Wanted:
        found |= {name: Path(found[name]) for name in ("store", "config") if isinstance(found.get(name), str)}
    return replace(whole, **found) if whole is not None else kind(**found)
