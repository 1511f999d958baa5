"""A labeling run, from its configuration to a published store. Read from the top:

1. check    names, options, keys, prices: what can be wrong is said first   (`workbench`, `models`)
2. gather   subject, dictionary, corpus → activation pass → evidence        (`gathering`)
3. pilot    how the judge's errors cluster, on a frozen subset             (`pilot`)
4. label    every latent through the graph: explain, score, record          (`graph`, `engine`)
            before it, where `label.random_control` asks for them, latents of a random-weight dictionary, as a run of their own
5. floors   other explanations on the same windows, for a random subset     (`floors`)
6. type     which latents are explained, which honestly are not             (`typed`, `exegete.evaluators.typing`)
7. publish  the snapshot that everybody reads                               (`exegete.tools.store`)

Each stage asks the store what is done already, so the same call after a crash goes on where the last one ended, and ends in
the same tables; calls to language models that were answered are in its journal and are not paid for again, and latents about
which calls failed for good are taken up anew. A first interrupt (Ctrl-C) drains: what is in flight is finished and written; a
second one stops at once.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from exegete.agent.cascade_control import Control, run_control, subset_of
from exegete.agent.config import RunConfig
from exegete.agent.engine import Batch, Stop, Write, evidence_in_ranges, label_latents
from exegete.agent.floors import floors_seed, plan_floors, score_all_floors
from exegete.agent.gathering import Inputs, Interrupted, gather_control, gather_evidence, load_inputs
from exegete.agent.graph import Workbench, label_graph
from exegete.agent.models import Models, budget_of
from exegete.agent.ordering import Latents, chosen_latents, in_order, stratified_subset
from exegete.agent.pilot import CASCADE, described, pilot_latents, piloted, restored, run_pilot
from exegete.agent.progress import Progress, default_progress
from exegete.agent.summary import summarise
from exegete.agent.typed import control_scores, few_floors, too_few, typed_latents
from exegete.agent.workbench import check_workbench, control_latents, open_workbench
from exegete.tools.errors import UserError
from exegete.tools.evidence import Evidence
from exegete.tools.seeds import generator
from exegete.tools.store import LatentRecord, Store, Writer, id_of_run

if TYPE_CHECKING:
    from exegete.tools.llm import Budget


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    store: Path
    finished: bool
    """False where it was asked to stop; the same call goes on."""
    figures: dict[str, Any]
    """Dictionary → its summary (see `exegete.agent.summary`)."""
    missing: Mapping[str, int] = field(default_factory=dict)
    """Dictionary → latents about which calls to a language model failed for good; the same call asks them again."""
    runs: Sequence[str] = ()
    """Ids of the runs that it began or took up: one a dictionary, and those of random-weight controls."""


def run(config: RunConfig, progress: Progress | None = None) -> Outcome:
    """Label what `config` names and publish the results; go on from where an earlier call of the same configuration ended.

    Raises:
        UserError: something in the configuration, the inputs or the store is wrong; nothing was damaged.
    """
    progress = progress or default_progress()
    folder = Path(config.store)
    if folder.exists():  # What is wrong with a store is said before a model is loaded, what is wrong with a model
        Store.create_or_open(folder)  # before a store is made.
    check_workbench(config)
    inputs = load_inputs(config, progress)
    store = Store.create_or_open(folder)
    with store.writer() as writer, _stop_on_interrupt(progress) as stop:
        here = _Run(config, inputs, writer, progress, stop, budget_of(config.models))
        figures: dict[str, Any] = {}
        missing: dict[str, int] = {}
        try:
            gathered = gather_evidence(config, inputs, store, writer, progress, stop)
            control: tuple[Inputs, Evidence] | None = None
            if config.label.random_control and inputs is not None:
                control = gather_control(config, inputs, store, writer, progress, stop)
            _count_spent(here, gathered, control)
            for evidence in gathered:
                labeled = asyncio.run(_label_dictionary(here, evidence, control))
                figures[evidence.dictionary], found = labeled
                missing |= found
        except Interrupted:
            progress.say("stopped; what is finished is kept, and the same command goes on from here")
            writer.publish()
            return Outcome(store.folder, False, figures, missing, here.begun)
        except BaseException:
            with suppress(UserError):  # Where publishing fails as well, what failed first is what there is to say.
                writer.publish()
            raise
        writer.publish()
    return Outcome(store.folder, True, figures, missing, here.begun)


@dataclass(frozen=True)
class _Run:
    """What every stage needs."""

    config: RunConfig
    inputs: Inputs | None
    writer: Writer
    progress: Progress
    stop: Stop
    budget: Budget | None
    begun: list[str] = field(default_factory=list)
    """Ids of runs."""


def _count_spent(here: _Run, gathered: Sequence[Evidence], control: tuple[Inputs, Evidence] | None) -> None:
    """Take from the budget what these runs have cost before: all of them, before the first one spends more."""
    if here.budget is None:
        return
    config = here.config
    known_by = [(identity(config), evidence.dictionary) for evidence in gathered]
    if control is not None:
        known_by.append((identity(config, control=True), control[1].dictionary))
    for known, dictionary in known_by:
        here.budget.spent_usd += here.writer.spent_usd(id_of_run(known, config.seed, dictionary))


async def _label_dictionary(
    here: _Run, evidence: Evidence, control: tuple[Inputs, Evidence] | None
) -> tuple[dict[str, Any], dict[str, int]]:
    """Label one dictionary; return its summary, and dictionary → about how many latents calls are missing."""
    config, writer = here.config, here.writer
    controls, missing = (None, {}) if control is None else await _label_control(here, *control, evidence)
    known_by = identity(config)
    run_id = id_of_run(known_by, config.seed, evidence.dictionary)
    latents = chosen_latents(evidence, config.label.limit, config.seed)
    bench = await _worked_through(here, here.inputs, evidence, latents, known_by)
    results = writer.results(run_id, evidence.dictionary)
    headlines = {evaluator.name: evaluator.headline for evaluator in bench.evaluators}
    typed = typed_latents(results, headlines, _silent(evidence, latents), controls)
    for name, count in few_floors(results, headlines).items():
        here.progress.say(
            f"{name}: types rest on {count} shuffled explanations, fewer than a 95th percentile takes; set label.floors to 19 or more"
        )
    writer.set_types(run_id, evidence.dictionary, typed)
    figures = summarise(results, headlines, generator(config.seed, "summary", evidence.dictionary), controls)
    writer.finish_run(run_id, "finished", figures)
    return figures, {**missing, evidence.dictionary: results.incomplete()}


async def _label_control(
    here: _Run, inputs: Inputs, evidence: Evidence, like: Evidence
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Label latents of a random-weight dictionary; return evaluator → their scores, and what calls are missing."""
    config, writer, dictionary = here.config, here.writer, evidence.dictionary
    latents = np.array(control_latents(config, evidence, like), dtype=np.int64)
    known_by = identity(config, control=True)
    run_id = id_of_run(known_by, config.seed, dictionary)
    bench = await _worked_through(here, inputs, evidence, latents, known_by, floors=False)
    results = writer.results(run_id, dictionary)
    headlines = {evaluator.name: evaluator.headline for evaluator in bench.evaluators}
    found = control_scores(results, headlines)
    for name in too_few(found):
        here.progress.say(
            f"{name} has scores of {len(found[name])} random-weight latents, too few for a bar: it decides no type; "
            "set label.random_control higher"
        )
    writer.finish_run(run_id, "finished", summarise(results, headlines, generator(config.seed, "summary", dictionary)))
    return found, {dictionary: results.incomplete()}


def _begin(here: _Run, evidence: Evidence, known_by: Mapping[str, Any]) -> None:
    config, writer = here.config, here.writer
    run_id = writer.begin_run(
        config=known_by,
        settings=config.model_dump(mode="json", exclude={"store"}),
        seed=config.seed,
        code_version=_code_version(),
        dictionary=evidence.dictionary,
    )
    here.begun.append(run_id)
    writer.publish()  # From now on `status` and `resume` know the run, however it ends.


async def _worked_through(
    here: _Run,
    inputs: Inputs | None,
    evidence: Evidence,
    latents: Latents,
    known_by: Mapping[str, Any],
    floors: bool = True,
) -> Workbench:
    """Pilot, label and score the floors of `latents`; return the instruments that did it."""
    run_id = id_of_run(known_by, here.config.seed, evidence.dictionary)
    models = Models(here.config.models, lambda: here.writer.journal.of_run(run_id), here.budget)
    try:
        async with models:
            bench = open_workbench(here.config, inputs, evidence, latents, models)
            _begin(here, evidence, known_by)
            bench.first = stratified_subset(evidence, latents, here.config.label.first, here.config.seed)
            whole = await _piloted(here, evidence, latents, bench, run_id)
            await _label(here, evidence, latents, bench, run_id)
            if not whole and not here.writer.results(run_id, evidence.dictionary).incomplete():
                # What the pilot lacked has been answered since, so it is made anew, and what rests on it: without a call.
                await _piloted(here, evidence, latents, bench, run_id)
                await _label(here, evidence, latents, bench, run_id)
            if floors:
                await _floors(here, evidence, bench, run_id)
    except BaseException:
        with suppress(UserError):  # As above; a run that is still marked as running is resumed all the same.
            here.writer.finish_run(run_id, "interrupted")
        raise
    return bench


def identity(config: RunConfig, control: bool = False) -> dict[str, Any]:
    """Return what the results depend on: the configuration without store, concurrency, slices, batches, publishing and money.

    `control`: of the random-weight control, which how many latents and floors the dictionary itself gets does not concern.
    """
    found = config.model_dump(mode="json", exclude=_NOT_IDENTITY)
    if control:
        found["label"] = {key: value for key, value in found["label"].items() if key not in ("limit", "floors")}
    return found


def takes_up(config: RunConfig, run: str, dictionary: str) -> bool:
    """Return whether `config` goes on with a stored run of a dictionary: not where a version with other keys began that."""
    return run in (id_of_run(identity(config, control), config.seed, dictionary) for control in (False, True))


_NOT_IDENTITY: Any = {
    "store": True,
    "label": {"concurrency", "batch", "publish_seconds", "hours", "until", "confirm_hours"},
    "evidence": {"slices", "batch", "workers"},
    "models": {
        *("budget_usd", "no_budget", "prices", "concurrency", "requests_per_minute", "tokens_per_minute"),
        *("timeout_s", "patience_s", "attempts", "batch_linger_s", "batch_poll_s", "forsake_batches"),
        *("budget_tokens", "confirm_usd"),
    },
}


def _silent(evidence: Evidence, latents: Latents) -> dict[int, str]:
    """Return the latents that are dead, rare or dense → which of these."""
    return {
        latent: status
        for status, found in evidence.silent().items()
        for latent in np.intersect1d(found, latents).tolist()
    }


async def _piloted(here: _Run, evidence: Evidence, latents: Latents, bench: Workbench, run_id: str) -> bool:
    """Let the pilot and the cascade's control subset show what all others rest on; return whether both are stored."""
    whole = await _pilot(here, evidence, latents, bench, run_id)
    return await _control(here, evidence, latents, bench, run_id) and whole


async def _control(here: _Run, evidence: Evidence, latents: Latents, bench: Workbench, run_id: str) -> bool:
    """Give the cascade what its control subset has shown; return whether it is stored, since no call was missing."""
    config, writer, dictionary, cascade = here.config, here.writer, evidence.dictionary, bench.cascade
    if cascade is None or not config.cascade.control:
        return True
    by_name = {evaluator.name: evaluator.clustering for evaluator in piloted(bench)}
    cascade.score.clustering = {name: by_name[name] for name in ("detection", "fuzzing") if by_name.get(name)}
    frozen = writer.pilot(run_id, dictionary)
    complete = CASCADE in frozen
    if complete:
        control = Control.restored(frozen[CASCADE])
    else:
        chosen = subset_of(evidence, latents, config.cascade.control, config.seed)
        here.progress.say(f"cascade: {len(chosen)} random latents climb every rung, and draw best-of-N at equal cost")
        with here.progress.stage("control", len(chosen), "latents") as advance:
            seen = _publishing(here, lambda records: None, advance)
            shown = await run_control(evidence, chosen, bench, config.label.concurrency, here.stop, seen)
        if shown is None:
            raise Interrupted
        control, complete = shown
        if complete:  # What is recorded rests on an earlier one about which calls were missing.
            writer.forget_incomplete(run_id, dictionary, all_of_it=True)
            writer.set_pilot(run_id, dictionary, {**frozen, CASCADE: control.described()})
        writer.set_control(run_id, dictionary, control.records)
    cascade.gains, cascade.screening = control.gains, control.screening
    return complete


async def _pilot(here: _Run, evidence: Evidence, latents: Latents, bench: Workbench, run_id: str) -> bool:
    """Give evaluators what the run's pilot has shown; return whether it is stored, since no call was missing."""
    writer, dictionary = here.writer, evidence.dictionary
    evaluators = piloted(bench)
    found = restored(writer.pilot(run_id, dictionary))
    complete = bool(found) or not evaluators
    if not complete:
        chosen = pilot_latents(evidence, latents, here.config.seed)
        here.progress.say(f"pilot: {len(chosen)} latents show how the judge's errors cluster")
        with here.progress.stage("pilot", len(chosen), "latents") as advance:
            seen = _publishing(here, lambda records: None, advance)
            shown = await run_pilot(evidence, chosen, bench, here.config.label.concurrency, here.stop, seen)
        if shown is None:
            raise Interrupted
        found, complete = shown
        if complete:  # What is recorded rests on an earlier one about which calls were missing.
            writer.forget_incomplete(run_id, dictionary, all_of_it=True)
            writer.set_pilot(run_id, dictionary, described(found))
    writer.forget_incomplete(run_id, dictionary)
    named = {evaluator.name for evaluator in evaluators}
    for evaluator in (*bench.evaluators, *bench.thorough):
        if evaluator.name in named:
            cast(Any, evaluator).clustering = found[evaluator.name]
    return complete


async def _label(here: _Run, evidence: Evidence, latents: Latents, bench: Workbench, run_id: str) -> None:
    writer, label = here.writer, here.config.label
    done = writer.labeled(run_id, evidence.dictionary)
    missing = in_order(np.setdiff1d(latents, done), bench.first)
    with here.progress.stage("labeling", len(latents), "latents", done=len(done)) as advance:
        write = _publishing(here, lambda records: writer.record(run_id, records), advance)
        batch = Batch(write, label.batch)
        source = evidence_in_ranges(evidence, missing)
        complete = await label_latents(source, label_graph(bench), bench, label.concurrency, batch, here.stop)
    if not complete:
        raise Interrupted


async def _floors(here: _Run, evidence: Evidence, bench: Workbench, run_id: str) -> None:
    writer, label = here.writer, here.config.label
    results = writer.results(run_id, evidence.dictionary)
    explained = results.explained()
    floors = plan_floors(evidence, list(explained), label.floors, floors_seed(here.config.seed, evidence.dictionary))
    done = set(writer.labeled(run_id, evidence.dictionary, floors=True).tolist())
    explanations = results.explanations([explained[latent] for latent in sorted(floors.lenders)])
    missing = [latent for latent in floors.subset if latent not in done]
    with here.progress.stage("floors", len(floors.subset), "latents", done=len(done)) as advance:
        write = _publishing(here, lambda records: writer.record(run_id, records, floors=True), advance)
        batch = Batch(write, label.batch)
        source = evidence_in_ranges(evidence, missing)
        complete = await score_all_floors(
            source, explained, floors, explanations, bench, label.concurrency, batch, here.stop
        )
    if not complete:
        raise Interrupted


def _publishing(here: _Run, record: Write, advance: Callable[[int], None]) -> Write:
    """Return a function that writes records, advances the progress, and republishes every `label.publish_seconds`."""
    published_at = time.monotonic()

    def write(records: Sequence[LatentRecord]) -> None:
        nonlocal published_at
        record(records)
        advance(len(records))
        if time.monotonic() - published_at > here.config.label.publish_seconds:
            here.writer.publish()
            published_at = time.monotonic()

    return write


@contextmanager
def _stop_on_interrupt(progress: Progress) -> Iterator[Stop]:
    """Turn the first SIGINT or SIGTERM into a request to drain; the second raises KeyboardInterrupt."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            progress.say(
                "stopping at once: calls in flight are given up; the same command goes on from what is written"
            )
            raise KeyboardInterrupt
        asked = True
        progress.say("stopping: finishing what is in flight (once more to stop at once)")

    try:
        former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # Signals reach the main thread only; a run in another thread is stopped by its owner.
        former = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _code_version() -> str:
    from importlib.metadata import version

    return version("exegete")
