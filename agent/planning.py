"""What a run would do, said before it does anything, and asked about where it is much.

1. `plan` (`--dry-run`) checks the configuration, then measures (`estimating`): a few latents where there is evidence, a few
   micro-batches of the pass (`pass_rate`) where there is none yet. Calls are real ones, within the budget; they go into the
   store's journal where no other process writes to the store, and then a later run does not pay for them again.
2. A run does the same before it labels (`plan_of`), with its own instruments.
3. Above `models.confirm_usd` or `label.confirm_hours` whoever started the run is asked (`confirmed`): once, since a run that has
   recorded latents was agreed to when it was begun, and its budget holds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exegete.agent.awaiting import awaited
from exegete.agent.config import RunConfig
from exegete.agent.run_facts import explainer_of, models_text
from exegete.agent.rungs import TEST_AND_REFINE
from exegete.agent.workbench import check_workbench
from exegete.tools.errors import UserError
from exegete.tools.evidence import Evidence

if TYPE_CHECKING:
    from exegete.agent.estimating import Estimate, Extent, Figure
    from exegete.agent.gathering import Inputs
    from exegete.agent.graph import Workbench
    from exegete.tools.llm import BatchJournal
    from exegete.tools.store import Store, Writer

Ask = Callable[[str], bool]
"""Asks a question that is answered with yes or no."""
Latents = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """What is still to come of labeling one dictionary."""

    dictionary: str
    outcomes: Mapping[str, int]
    """live, dead, rare, dense → latents of the run."""
    recorded: int
    """Latents that are labeled already."""
    extent: Extent
    estimate: Estimate | None
    """None where nothing can be measured: nothing is left, or answers come in batches."""
    spent_usd: float
    """By the calls of the run so far, those of measuring included."""
    kept: bool
    """Whether what was measured is in the run's journal."""
    evidence_bytes: int


async def plan_of(
    config: RunConfig,
    evidence: Evidence,
    latents: Latents,
    recorded: Latents,
    bench: Workbench,
    spent_usd: Callable[[], float],
    *,
    control: int = 0,
    kept: bool = True,
) -> Plan:
    """Measure a few latents with a run's own instruments and return what is still to come.

    Args:
        config: of the run.
        evidence: of the dictionary.
        latents: that the run labels, shape (latent,).
        recorded: those that it has labeled, shape (latent,).
        bench: the run's instruments.
        spent_usd: what the run's calls have cost so far; asked once the sample is measured.
        control: latents of a random-weight control that are still to be labeled.
        kept: whether the run's journal keeps the replies.

    Raises:
        Halted: no language model can be asked any more.
    """
    from exegete.agent.estimating import Extent, again_to_do, estimate, measured, pace_of

    left = np.setdiff1d(latents, recorded, assume_unique=True)
    live = int(np.isin(latents, evidence.live).sum())
    floors = min(config.label.floors, live)
    climbs = 0 if bench.cascade is None or len(recorded) else min(config.cascade.control, live)
    extent = Extent(floors, control, climbs, draws=2 if TEST_AND_REFINE in config.cascade.rungs else 1)
    if bench.cascade is not None:  # Its control subset has shown nothing yet: judged on every rung, at any price.
        bench = replace(bench, cascade=replace(bench.cascade, screen=None))
    found: Estimate | None = None
    if not batched(config):
        strata, cpu_s = await measured(evidence, left, bench, config.seed)
        strata = strata if kept else again_to_do(strata)
        found = estimate(strata, extent, pace_of(config, cpu_s)) if strata else None
    return Plan(
        dictionary=evidence.dictionary,
        outcomes=_outcomes(evidence, latents),
        recorded=len(recorded),
        extent=extent,
        estimate=found,
        spent_usd=spent_usd(),
        kept=kept,
        evidence_bytes=sum(file.stat().st_size for file in evidence.folder.rglob("*") if file.is_file()),
    )


def plan_lines(plan: Plan, config: RunConfig) -> list[str]:
    """Return a plan as aligned lines: each figure with its 95 % interval and the latents that it was measured on."""
    lines = [_row("latents", _latents(plan))]
    if plan.extent.floors:
        lines.append(_row("floors", f"four on {plan.extent.floors:,} latents"))
    if plan.extent.control:
        lines.append(_row("control", f"{plan.extent.control:,} random-weight latents, taken to be like the others"))
    if plan.extent.climbs:
        lines.append(
            _row(
                "cascade",
                f"{plan.extent.climbs:,} latents climb every rung and draw best-of-N, taken to cost {_times(plan.extent.draws)} as much",
            )
        )
    own = plan.estimate
    if own is None:
        why = "answers come in batches, within a day each round" if batched(config) else "nothing is left to be labeled"
        return [*lines, _row("cost", f"not measured: {why}")]
    return [
        *lines,
        _row("calls", _text(own.calls)),
        _row("input", _text(own.input_tokens, " tokens")),
        _row("output", _text(own.output_tokens, " tokens")),
        _row("cost", _cost(plan, config)),
        _row("time", f"{_duration(own.hours)}; what takes so long: {own.bound_by}"),
        _row("disk", _disk(plan, own)),
        _row("measured", _measured(plan, own)),
    ]


def question(plans: Sequence[Plan], config: RunConfig) -> str | None:
    """Return what to ask before going on, None where it is not much: as in `confirmed`."""
    fresh = [plan.estimate for plan in plans if plan.estimate is not None and not plan.recorded]
    usd, hours = sum(one.usd.high for one in fresh), sum(one.hours.high for one in fresh)
    budget = math.inf if config.models.no_budget else config.models.budget_usd
    usd = min(usd, math.inf if budget is None else budget)
    much = [f"{usd:,.2f} USD (models.confirm_usd = {config.models.confirm_usd:g})"] * (usd > config.models.confirm_usd)
    much += [f"{hours:,.1f} hours (label.confirm_hours = {config.label.confirm_hours:g})"] * (
        hours > config.label.confirm_hours
    )
    return f"this may take {' and '.join(much)}; go on?" if much else None


def confirmed(plans: Sequence[Plan], config: RunConfig, ask: Ask | None) -> bool:
    """Return whether to go on: not much is to come, nobody is to be asked (`ask` is None), or the answer is yes.

    Much is what the upper limit of the estimate says, but no more than the budget, which holds in any case. A run that has
    recorded latents was agreed to when it was begun.

    Raises:
        UserError: `ask` has nobody to ask.
    """
    asked = question(plans, config)
    return asked is None or ask is None or ask(asked)


def asking(yes: bool) -> Ask:
    """Return what asks on the terminal; with `yes` the answer is known."""

    def ask(asked: str) -> bool:
        if yes:
            return True
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise UserError(f"{asked} There is no terminal to answer on: give --yes, or raise the limit with --set")
        sys.stderr.write(f"{asked} [y/N] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    return ask


def batched(config: RunConfig) -> bool:
    """Return whether answers come in batches, so that a few of them take as long as all."""
    asked = (config.models.explainer, config.models.judge, *config.cascade.models.values())
    return any("-batch:" in str(spec) for spec in asked)


def plan(config: RunConfig) -> list[str]:
    """Return the plan of a run as lines. Nothing is written to the store but replies, into its journal.

    Raises:
        UserError: something in the configuration is wrong, a model cannot be asked, or there is nothing to label.
    """
    from exegete.agent.gathering import load_inputs
    from exegete.agent.progress import default_progress

    check_workbench(config)
    lines = [
        _row("store", config.store),
        _row(
            "explainer",
            f"{explainer_of(config.model_dump())}; judge: {config.label.judge}; {', '.join(config.label.evaluators)}",
        ),
        *_models(config),
    ]
    inputs = load_inputs(config, default_progress())
    found = _evidence(config, inputs)
    if not found:
        from exegete.agent.pass_rate import pass_lines

        if inputs is None:
            raise UserError(
                f"nothing to label: no [subject], [dictionary], [corpus], and no evidence in {config.store!r}"
            )
        later = "calls, tokens and USD are measured once the pass is done: the run says them before it labels"
        asked = config.models.explainer or config.models.judge
        rows = [*pass_lines(config, inputs), ("cost", later if asked else "none: no language model takes part")]
        return [*lines, *(_row(*row) for row in rows)]
    for evidence in found:
        lines += [_row("dictionary", f"{evidence.dictionary[:23]}…"), *_dry(config, inputs, evidence)]
    return lines


def _dry(config: RunConfig, inputs: Inputs | None, evidence: Evidence) -> list[str]:
    """Return the plan of labeling one dictionary, measured without a run."""
    from exegete.agent.identity import identity
    from exegete.agent.models import Models, budget_of
    from exegete.agent.ordering import chosen_latents, stratified_subset
    from exegete.agent.workbench import open_workbench
    from exegete.tools.llm import MemoryJournal
    from exegete.tools.store import id_of_run

    run_id = id_of_run(identity(config), config.seed, evidence.dictionary)
    latents = chosen_latents(evidence, config.label.limit, config.seed)
    with ExitStack() as stack:
        writer = _writer(config, stack)
        budget = budget_of(config.models)
        if budget is not None and writer is not None:
            budget.spent_usd, budget.spent_tokens = writer.spent_usd(run_id), writer.spent_tokens(run_id)
        journal: Callable[[], BatchJournal] = MemoryJournal
        recorded: Latents = np.zeros(0, dtype=np.int64)
        spent: Callable[[], float] = lambda: 0.0  # noqa: E731
        if writer is not None:
            journal = lambda: writer.journal.of_run(run_id)  # noqa: E731
            recorded = np.intersect1d(writer.labeled(run_id, evidence.dictionary), latents)
            spent = lambda: writer.spent_usd(run_id)  # noqa: E731

        async def measure() -> Plan:
            async with Models(config.models, journal, budget) as models:
                bench = open_workbench(config, inputs, evidence, latents, models)
                bench.first = stratified_subset(evidence, latents, config.label.first, config.seed)
                control = config.label.random_control
                return await plan_of(
                    config, evidence, latents, recorded, bench, spent, control=control, kept=writer is not None
                )

        return plan_lines(awaited(measure()), config)


def _writer(config: RunConfig, stack: ExitStack) -> Writer | None:
    """Return the store's writer, None where another process has it."""
    from exegete.tools.store.folder import BeingWritten

    try:
        return stack.enter_context(_store(config).writer())
    except BeingWritten:
        return None


def _store(config: RunConfig) -> Store:
    from exegete.tools.store import Store

    return Store.create_or_open(Path(config.store))


def _evidence(config: RunConfig, inputs: Inputs | None) -> list[Evidence]:
    """Return the evidence that there is of what the run would label."""
    if not Path(config.store).exists():
        return []
    if inputs is not None:
        folders = [_store(config).evidence_folder(inputs.dictionary.fingerprint)]
    else:
        folders = [marker.parent for marker in sorted(Path(config.store).glob("evidence/*/evidence.json"))]
    return [Evidence.open(folder) for folder in folders if (folder / "evidence.json").exists()]


def _models(config: RunConfig) -> list[str]:
    models = config.models
    named = {"explainer": models.explainer, "judge": models.judge, "scorer": models.scorer, **config.cascade.models}
    asked = models_text({role: spec for role, spec in named.items() if spec})
    if not asked:
        return [_row("models", "none; no language model takes part")]
    limits = [] if models.budget_usd is None or models.no_budget else [f"{models.budget_usd:g} USD"]
    limits += [] if models.budget_tokens is None else [f"{models.budget_tokens:,} tokens"]
    return [_row("models", f"{asked}; budget: {' and '.join(limits) or 'none'}")]


def _outcomes(evidence: Evidence, latents: Latents) -> dict[str, int]:
    found = {"live": evidence.live, **evidence.silent()}
    counts = {status: int(np.isin(latents, some).sum()) for status, some in found.items()}
    return {status: count for status, count in counts.items() if count}


def _latents(plan: Plan) -> str:
    counted = ", ".join(f"{count:,} {status}" for status, count in plan.outcomes.items())
    return f"{sum(plan.outcomes.values()):,}: {counted or 'none'}; {plan.recorded:,} labeled already"


def _cost(plan: Plan, config: RunConfig) -> str:
    own, models = plan.estimate, config.models
    assert own is not None
    if own.usd.high == 0 and plan.spent_usd == 0:
        return "none: these models are free, by the price table and on your own machines"
    digits = 2 if own.usd.value >= 1 else 4
    text = f"{_text(own.usd, ' USD', digits)} to come; {plan.spent_usd:.4f} USD spent"
    if models.budget_usd is None or models.no_budget:
        return text
    covers = max(0.0, models.budget_usd - plan.spent_usd)
    if own.usd.high <= covers:
        return f"{text}; the budget of {models.budget_usd:g} USD holds it"
    share = covers / own.usd.value if own.usd.value else 1.0
    return f"{text}; the budget of {models.budget_usd:g} USD holds about {min(1.0, share):.0%} of it"


def _disk(plan: Plan, own: Estimate) -> str:
    parts = [f"evidence {_bytes(plan.evidence_bytes)} (there)"]
    parts += [f"{name} {_bytes(one.value)} (up to {_bytes(one.high)})" for name, one in own.disk_bytes.items()]
    return ", ".join(parts)


def _measured(plan: Plan, own: Estimate) -> str:
    where = "in the run's journal, not paid for again" if plan.kept else "not kept: another process writes to the store"
    price = f" for {own.paid_usd:.4f} USD" if own.paid_usd else ""
    return f"on {own.n:,} latents{price} ({where}); [95 % interval], n latents"


def _times(draws: int) -> str:
    return "twice" if draws == 1 else f"{1 + draws} times"


def _row(name: str, text: str) -> str:
    return f"{name:<10} {text}"


def _text(figure: Figure, unit: str = "", digits: int = 0) -> str:
    if not math.isfinite(figure.high):
        return f"about {figure.value:,.{digits}f}{unit} (n = {figure.n}, too few for an interval)"
    interval = f"[{figure.low:,.{digits}f}, {figure.high:,.{digits}f}]"
    return f"{figure.value:,.{digits}f}{unit} {interval} (n = {figure.n})"


def _duration(hours: Figure) -> str:
    if hours.value >= 1:
        return _text(hours, " h", 1)
    if hours.value >= 1 / 60:
        return _text(hours.times(60), " min", 1)
    return _text(hours.times(3600), " s", 1)


def _bytes(count: float) -> str:
    if not math.isfinite(count):
        return "unknown"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1_000:
            return f"{count:.0f} {unit}"
        count /= 1_000
    return f"{count:.1f} TB"
