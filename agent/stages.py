"""The stages of labeling one dictionary: plan, pilot, control subset, latents, floors. `run` says in which order.

Each asks the store what is done already. What a pilot or control subset has shown while calls were missing is used and not stored;
it is made anew once they have been answered, and what rested on it with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from exegete.agent.cascade_control import Control, run_control, subset_of
from exegete.agent.config import RunConfig
from exegete.agent.embedding_run import EmbeddingRun
from exegete.agent.engine import Batch, Stop, Write, evidence_in_ranges, label_latents
from exegete.agent.floors import floors_seed, plan_floors, score_all_floors
from exegete.agent.gathering import Inputs, Interrupted
from exegete.agent.graph import Workbench, label_graph
from exegete.agent.interrupts import lasting
from exegete.agent.models import Models
from exegete.agent.ordering import Latents, in_order, stratified_subset
from exegete.agent.pilot import CASCADE, described, pilot_latents, piloted, restored, run_pilot
from exegete.agent.planning import Ask, confirmed, plan_lines, plan_of
from exegete.agent.watching import Watch
from exegete.agent.workbench import open_workbench
from exegete.tools.errors import UserError
from exegete.tools.evidence import Evidence
from exegete.tools.store import LatentRecord, Writer, id_of_run

if TYPE_CHECKING:
    from exegete.tools.llm import Budget


@dataclass(frozen=True)
class Session:
    """What every stage needs: a configuration at work on a store, in this process."""

    config: RunConfig
    inputs: Inputs | None
    writer: Writer
    watch: Watch
    stop: Stop
    budget: Budget | None
    embedding: EmbeddingRun
    confirm: Ask | None = None
    """Asked before much is spent; nobody is asked where it is None."""
    begun: list[str] = field(default_factory=list)
    """Ids of runs."""


@dataclass(frozen=True)
class Labeling:
    """One dictionary's run."""

    run: str
    """Its id."""
    known_by: Mapping[str, Any]
    """What its results depend on."""
    evidence: Evidence
    latents: Latents
    """To be labeled, ascending."""
    inputs: Inputs | None
    floors: bool = True

    @classmethod
    def of(
        cls, here: Session, known_by: Mapping[str, Any], evidence: Evidence, latents: Latents, **more: Any
    ) -> Labeling:
        """Return the run that `known_by` makes of this evidence."""
        run = id_of_run(known_by, here.config.seed, evidence.dictionary)
        return cls(run, known_by, evidence, latents, **more)


async def worked_through(here: Session, own: Labeling) -> Workbench:
    """Do every stage of a run; return the instruments that did it.

    Raises:
        Interrupted: the run was asked to stop, or not agreed to.
        UserError: an instrument cannot be made, or no call can succeed any more (`Halted`).
    """
    models = Models(
        here.config.models,
        lambda: here.writer.journal.of_run(own.run),
        here.budget,
        here.watch.vitals,
        lasting(here.stop),
    )
    try:
        async with models:
            bench = open_workbench(here.config, own.inputs, own.evidence, own.latents, models)
            bench.first = stratified_subset(own.evidence, own.latents, here.config.label.first, here.config.seed)
            _begin(here, own, bench)
            await _plan(here, own, bench)
            whole = await _piloted(here, own, bench)
            await _label(here, own, bench)
            if not whole and not here.writer.results(own.run, own.evidence.dictionary).incomplete():
                # What the pilot lacked has been answered since, so it is made anew, and what rests on it: without a call.
                await _piloted(here, own, bench)
                await _label(here, own, bench)
            if own.floors:
                await _floors(here, own, bench)
    except BaseException:
        with suppress(
            UserError
        ):  # What failed first is what there is to say; a run marked as running is resumed all the same.
            here.writer.finish_run(own.run, "interrupted")
        raise
    return bench


def _begin(here: Session, own: Labeling, bench: Workbench) -> None:
    config, writer = here.config, here.writer
    known = any(one.run == own.run for one in writer.runs())
    writer.begin_run(
        config=own.known_by,
        settings=config.model_dump(mode="json", exclude={"store"}),
        seed=config.seed,
        code_version=_code_version(),
        dictionary=own.evidence.dictionary,
    )
    here.begun.append(own.run)
    headlines = {evaluator.name: evaluator.headline for evaluator in bench.evaluators}
    here.watch.run_begun(own.run, own.evidence.dictionary, len(own.latents), config, headlines)
    if known:
        writer.publish_soon(0.0)
    else:
        publish(here)  # From now on `status` and `resume` know the run, however it ends.


async def _plan(here: Session, own: Labeling, bench: Workbench) -> None:
    """Measure a few latents, say what is to come, and have it agreed to where it is much."""
    if not own.floors or not _asks_models(here.config):
        return
    recorded = here.writer.labeled(own.run, own.evidence.dictionary)
    if not len(np.setdiff1d(own.latents, recorded)):
        return
    if bench.cascade is not None and len(recorded):
        # What a latent costs depends on what is frozen: measuring without it would pay for calls that no latent needs.
        here.watch.say(
            f"{len(recorded):,} of {len(own.latents):,} latents are labeled already; going on with the others"
        )
        return
    here.watch.say("a few latents are labeled first, to see what is to come")
    plan = await plan_of(
        here.config,
        own.evidence,
        own.latents,
        recorded,
        bench,
        lambda: here.writer.spent_usd(own.run),
    )
    for line in plan_lines(plan, here.config):
        here.watch.say(line)
    if not confirmed([plan], here.config, here.confirm):
        here.watch.say("not agreed to: nothing more was started, and what was measured is in the journal")
        raise Interrupted


def _asks_models(config: RunConfig) -> bool:
    return bool(config.models.explainer or config.models.judge or config.cascade.models)


async def _piloted(here: Session, own: Labeling, bench: Workbench) -> bool:
    """Let the pilot and the cascade's control subset show what all others rest on; return whether both are stored."""
    whole = await _pilot(here, own, bench)
    return await _control(here, own, bench) and whole


async def _control(here: Session, own: Labeling, bench: Workbench) -> bool:
    """Give the cascade what its control subset has shown; return whether it is stored, since no call was missing."""
    config, writer, cascade = here.config, here.writer, bench.cascade
    run, dictionary = own.run, own.evidence.dictionary
    if cascade is None or not config.cascade.control:
        return True
    frozen = writer.pilot(run, dictionary)
    complete = CASCADE in frozen
    if complete:
        control = Control.restored(frozen[CASCADE])
    else:
        chosen = subset_of(own.evidence, own.latents, config.cascade.control, config.seed)
        here.watch.say(f"cascade: {len(chosen)} random latents climb every rung, and draw best-of-N at equal cost")
        with here.watch.stage("control", len(chosen), "latents") as advance:
            seen = _advancing(advance)
            shown = await run_control(own.evidence, chosen, bench, config.label.concurrency, here.stop, seen)
        if shown is None:
            raise Interrupted
        control, complete = shown
        if complete:  # What is recorded rests on an earlier one about which calls were missing.
            writer.forget_incomplete(run, dictionary, all_of_it=True)
        writer.set_control(run, dictionary, control.records)
        if complete:  # Last, since once it is frozen nothing of it is made again.
            writer.set_pilot(run, dictionary, {**frozen, CASCADE: control.described()})
    cascade.gains, cascade.screening, cascade.score.clustering = (
        control.gains,
        control.screening,
        dict(control.clustering),
    )
    return complete


async def _pilot(here: Session, own: Labeling, bench: Workbench) -> bool:
    """Give evaluators what the run's pilot has shown; return whether it is stored, since no call was missing."""
    writer, run, dictionary = here.writer, own.run, own.evidence.dictionary
    evaluators = piloted(bench)
    found = restored(writer.pilot(run, dictionary))
    complete = bool(found) or not evaluators
    if not complete:
        chosen = pilot_latents(own.evidence, own.latents, here.config.seed)
        here.watch.say(f"pilot: {len(chosen)} latents show how the judge's errors cluster")
        with here.watch.stage("pilot", len(chosen), "latents") as advance:
            seen = _advancing(advance)
            shown = await run_pilot(own.evidence, chosen, bench, here.config.label.concurrency, here.stop, seen)
        if shown is None:
            raise Interrupted
        found, complete = shown
        if complete:  # What is recorded rests on an earlier one about which calls were missing.
            writer.forget_incomplete(run, dictionary, all_of_it=True)
            writer.set_pilot(run, dictionary, described(found))
    writer.forget_incomplete(run, dictionary)
    named = {evaluator.name for evaluator in evaluators}
    for evaluator in (*bench.evaluators, *bench.thorough):
        if evaluator.name in named:
            cast(Any, evaluator).clustering = found[evaluator.name]
    return complete


async def _label(here: Session, own: Labeling, bench: Workbench) -> None:
    writer, label = here.writer, here.config.label
    done = writer.labeled(own.run, own.evidence.dictionary)
    missing = in_order(np.setdiff1d(own.latents, done), bench.first)
    with here.watch.stage("labeling", len(own.latents), "latents", done=len(done)) as advance:
        write = _publishing(here, lambda records: writer.record(own.run, records), advance)
        batch = Batch(write, label.batch)
        source = evidence_in_ranges(own.evidence, missing)
        complete = await label_latents(source, label_graph(bench), bench, label.concurrency, batch, here.stop)
    if not complete:
        raise Interrupted


async def _floors(here: Session, own: Labeling, bench: Workbench) -> None:
    writer, label = here.writer, here.config.label
    results = writer.results(own.run, own.evidence.dictionary)
    seed = floors_seed(here.config.seed, own.evidence.dictionary)
    floors = plan_floors(own.evidence, results.explained_latents(), label.floors, seed)
    chosen = results.chosen([*floors.subset, *floors.lenders])
    done = set(writer.labeled(own.run, own.evidence.dictionary, floors=True).tolist())
    explanations = results.explanations([chosen[latent] for latent in sorted(floors.lenders)])
    missing = [latent for latent in floors.subset if latent not in done]
    with here.watch.stage("floors", len(floors.subset), "latents", done=len(done)) as advance:
        write = _publishing(here, lambda records: writer.record(own.run, records, floors=True), advance)
        batch = Batch(write, label.batch)
        source = evidence_in_ranges(own.evidence, missing)
        complete = await score_all_floors(
            source, chosen, floors, explanations, bench, label.concurrency, batch, here.stop
        )
    if not complete:
        raise Interrupted


def _advancing(advance: Callable[[int], None]) -> Write:
    """Return a function that counts records which are not stored."""
    return lambda records: advance(len(records))


def _publishing(here: Session, record: Write, advance: Callable[[int], None]) -> Write:
    """Return a function that writes records, tells whoever watches, and republishes every `label.publish_seconds`."""

    def write(records: Sequence[LatentRecord]) -> None:
        record(records)
        here.watch.recorded(records)
        here.embedding.written(records)
        advance(len(records))
        here.writer.publish_soon(here.config.label.publish_seconds)

    return write


def publish(here: Session) -> None:
    """Publish what there is, and tell the watch."""
    begun = time.monotonic()
    here.writer.publish()
    here.watch.published(time.monotonic() - begun)


def _code_version() -> str:
    from importlib.metadata import version

    return version("exegete")
