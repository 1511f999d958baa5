"""`exegete audit`: what each evaluator can tell, on planted latents whose meaning is known.

1. The bank (`audit_bank`) gives truths and text; `evaluators.audit_evidence` makes evidence of them, and
   `evaluators.audit_truths` the corrupted explanations. For evaluators that run the subject, latents are planted in it
   (`audit_live`).
2. Each evaluator scores all explanations as in a labeling run (`audit_tasks`), and `evaluators.audit` says what it can
   tell. What passes through the language model is counted.
3. An evaluator that lacks what it needs, or that the budget stopped, is listed as not run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from exegete.agent.audit_bank import stream, truths
from exegete.agent.audit_tasks import Instruments, Task, Wanted, tasks
from exegete.evaluators.audit import CASES_AT_ONCE, CHECKS, Case, EvaluatorAudit, Expected, audit
from exegete.evaluators.audit_coverage import RANKINGS, RATES, Population
from exegete.evaluators.audit_evidence import Pool, evidence, fired
from exegete.evaluators.audit_metering import Meter, MeteredClient, MeteredJudge
from exegete.evaluators.audit_truths import Truth, corrupted
from exegete.evaluators.model_judge import ModelJudge
from exegete.tools.explainers import Explanation
from exegete.tools.llm import BudgetUsedUp
from exegete.tools.seeds import derive_seed
from exegete.tools.windows import WINDOW_TOKENS, LatentEvidence, Split

if TYPE_CHECKING:
    from exegete.agent.audit_live import Bench

POPULATION = 300
"""Windows of either class that expectations are taken on."""
COVERED_LATENTS = 16
"""Latents whose expectations are taken."""
RANKED_LATENTS, RANKED_POPULATION = 6, 100
"""The same for evaluators that run a model on every window."""
WINDOWS_OF_TEXT = 110
"""For one that a rare latent fires on."""
EXPLAIN_TOKENS, POPULATION_TOKENS = 20_000, 200_000


@dataclass(frozen=True)
class Row:
    """One evaluator's audit on one kind of latents."""

    audit: EvaluatorAudit
    kind: str | None
    """None for the latents of the bank's text."""
    spent: Mapping[str, Any]


@dataclass(frozen=True)
class AuditReport:
    """What came out."""

    wanted: Wanted
    judge: str
    rows: tuple[Row, ...]
    not_run: Mapping[str, str]
    """Evaluator → what it needs, or what stopped it."""
    latents: Mapping[str, int]
    """Planted latents of each kind."""


@dataclass(frozen=True)
class Planted:
    """The planted latents of an audit."""

    text: Sequence[Case] = ()
    kinds: Mapping[str, int] = field(default_factory=dict)
    bench: Bench | None = None

    def of(self, task: Task) -> Sequence[Case]:
        """Return the latents that a task is run on."""
        if task.kind is None:
            return self.text[: task.most]
        assert self.bench is not None
        cases = self.bench.cases[task.kind]
        # What these write has nothing to do with any explanation: there is nothing to tell apart.
        return [replace(case, corrupted={}) for case in cases] if task.kind == "input" else cases

    @property
    def explanations(self) -> list[Explanation]:
        """Everything that is said of them."""
        live = self.bench.cases.values() if self.bench else ()
        return [said for some in (self.text, *live) for case in some for said in case.explanations.values()]


def plant(wanted: Wanted, instruments: Instruments, say: Callable[[str], None] = lambda line: None) -> Planted:
    """Return the planted latents that the evaluators need which can be run."""
    ready = [task for task in tasks(wanted, instruments) if not task.needs]
    say("planting latents")
    text, kinds = text_cases(wanted) if any(task.kind is None for task in ready) else ((), {})
    if all(task.kind is None for task in ready):
        return Planted(text, kinds)
    from exegete.agent.audit_live import bench

    live = bench(wanted.seed, wanted.live_latents, wanted.live_windows, device=wanted.device)
    return Planted(text, {**kinds, **{f"{kind}, in the subject": len(of) for kind, of in live.cases.items()}}, live)


async def run_audit(
    wanted: Wanted,
    instruments: Instruments,
    say: Callable[[str], None] = lambda line: None,
    planted: Planted | None = None,
) -> AuditReport:
    """Audit evaluators.

    Args:
        wanted: which, and on how much.
        instruments: judge, and whatever client, scorer and embedder there are.
        say: told what is being done, line by line.
        planted: the latents, where they are made already.

    Raises:
        UserError: a language model cannot be asked at all.
    """
    chosen = tasks(wanted, instruments)
    not_run = {task.name: task.needs for task in chosen if task.needs}
    known = planted or plant(wanted, instruments, say)
    rows = []
    for task in chosen:
        if task.needs:
            continue
        say(f"{task.name}: {len(known.of(task))} {task.kind or 'planted'} latents")
        try:
            rows.append(await _run(task, known, wanted, instruments))
        except BudgetUsedUp as used_up:
            not_run[task.name] = str(used_up)
    return AuditReport(wanted, instruments.judge.name, tuple(rows), not_run, known.kinds)


def text_cases(wanted: Wanted) -> tuple[list[Case], dict[str, int]]:
    """Return the planted latents of the bank with evidence and explanations, and how many there are of each kind."""
    chosen = truths(wanted.seed, wanted.latents)
    of = {latent: truth for latent, (_, truth) in enumerate(chosen)}
    found = _evidence(of, wanted, {"explain": EXPLAIN_TOKENS, "test": _tokens(wanted.items)}, wanted.items, "shown")
    some = {latent: of[latent] for latent in list(of)[:COVERED_LATENTS]}
    more = _evidence(some, wanted, {"test": POPULATION_TOKENS}, POPULATION, "population")
    wrong = corrupted(of, found, wanted.seed)
    cases = [Case(n, truth.explanation(), wrong[n], found[n], more.get(n)) for n, truth in of.items()]
    kinds = [kind for kind, _ in chosen]
    return cases, {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _tokens(windows: int) -> int:
    return windows * WINDOWS_OF_TEXT * WINDOW_TOKENS


def _evidence(
    of: Mapping[int, Truth], wanted: Wanted, tokens: Mapping[Split, int], count: int, purpose: str
) -> dict[int, LatentEvidence]:
    seed = derive_seed(wanted.seed, purpose)
    texts = {split: (stream(split, many, seed),) for split, many in tokens.items()}
    pool = Pool(texts)
    return {
        latent: evidence(latent, truth, pool, pool.activations(fired(truth, texts, seed)), count, seed)
        for latent, truth in of.items()
    }


async def _run(task: Task, planted: Planted, wanted: Wanted, instruments: Instruments) -> Row:
    meter = Meter()
    judge = MeteredJudge(instruments.judge, meter)
    if instruments.client is not None and isinstance(instruments.judge, ModelJudge):
        judge = MeteredJudge(ModelJudge(MeteredClient(instruments.client, meter)), meter)
    found = await audit(
        task.name,
        task.make(meter, planted.bench),
        planted.of(task),
        judge,
        wanted.seed,
        expected=_expected(task, planted, wanted, instruments),
        relabeled_metrics=task.relabeled,
        checks=CHECKS if task.kind in (None, "both") else (),
        # One subject serves all of them.
        at_once=CASES_AT_ONCE if task.kind is None else 1,
    )
    return Row(found, task.kind, meter.described(instruments.priced))


def _expected(task: Task, planted: Planted, wanted: Wanted, instruments: Instruments) -> Expected | str:
    if task.expects == "nothing":
        return "what is expected is not known"
    cases = planted.of(task)
    if task.expects == "itself":
        some = [case if at < RANKED_LATENTS else replace(case, population=None) for at, case in enumerate(cases)]
        made = _with_items(task, RANKED_POPULATION)
        return Population(made, some, instruments.judge, wanted.seed, metrics=RANKINGS)
    if instruments.reference is None:
        return "the judge's error rate is not known"
    made = _with_items(task, None)
    return Population(made, cases, instruments.reference, wanted.seed, instruments.error_rate, RATES)


def _with_items(task: Task, items: int | None) -> Any:
    """Return the evaluator with another limit to its windows of either class; what it spends is not the audited one's."""
    made: Any = task.make(Meter(), None)
    made.items_per_class = items
    return made
