"""A labeling run, from its configuration to a published store. Read from the top:

1. check    names, options, keys, prices: what can be wrong is said first   (`workbench`, `models`)
2. gather   subject, dictionary, corpus → activation pass → evidence        (`gathering`)
3. plan     a few latents are measured; what is to come is said and asked    (`planning`, `estimating`)
4. pilot    how the judge's errors cluster, on a frozen subset             (`pilot`)
            what each rung of a cascade gains and costs, on another         (`cascade_control`, `routing`)
5. label    every latent through the graph: explain, score, record          (`graph`, `climbing`, `engine`)
            a stratified random subset first, then the rest in turn          (`ordering`)
            before it, where `label.random_control` asks for them, latents of a random-weight dictionary, as a run of their own
6. floors   other explanations on the same windows, for a random subset     (`floors`)
7. type     which latents are explained, which honestly are not             (`typed`, `exegete.evaluators.typing`)
8. publish  the snapshot that everybody reads                               (`exegete.tools.store`)

Steps 3 to 6 are in `stages`. While they go on, `watching` shows progress and keeps the event log, explanations are embedded
for `exegete search` (`embedding_run`), and what is there is published every few minutes.

Each stage asks the store what is done already, so the same call after a crash goes on where the last one ended, and ends in
the same tables; calls to language models that were answered are in its journal and are not paid for again, and latents about
which calls failed for good are taken up anew. A first interrupt (Ctrl-C) drains: what is in flight is finished and written; a
second one stops at once; `label.hours` and `label.until` drain as the first does. In a notebook, where an event loop runs
already, `run` works in a thread of its own and returns when it is done.

While a run goes on, investigations of the same process can use its subject (`sharing`): the forward passes of all of them are
batched together, and none waits for another's end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exegete.agent.awaiting import awaited
from exegete.agent.cascade_summary import cascade_figures
from exegete.agent.config import RunConfig
from exegete.agent.embedding_run import EmbeddingRun
from exegete.agent.gathering import Inputs, Interrupted, gather_control, gather_evidence, load_inputs
from exegete.agent.identity import identity
from exegete.agent.interrupts import stop_on_interrupt
from exegete.agent.limits import Deadline, deadline_of, stops
from exegete.agent.live import Live, inputs_of
from exegete.agent.models import budget_of
from exegete.agent.ordering import Latents, chosen_latents
from exegete.agent.planning import Ask
from exegete.agent.progress import Progress, default_progress
from exegete.agent.random_weight import control_latents
from exegete.agent.stages import Labeling, Session, publish, worked_through
from exegete.agent.summary import summarise
from exegete.agent.surviving_display import SurvivingDisplay
from exegete.agent.typed import control_scores, few_floors, too_few, typed_latents
from exegete.agent.watching import Watch, watched
from exegete.agent.workbench import check_workbench
from exegete.tools.errors import UserError
from exegete.tools.evidence import Evidence
from exegete.tools.seeds import generator
from exegete.tools.store import Store, Writer, id_of_run

if TYPE_CHECKING:
    from exegete.agent.investigation.shared_model import Sharing


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


def run(
    config: RunConfig, progress: Progress | None = None, confirm: Ask | None = None, sharing: Sharing | None = None
) -> Outcome:
    """Label what `config` names and publish the results; go on from where an earlier call of the same configuration ended.

    Args:
        config: as `exegete.agent.config.load_config` or `RunConfig` makes it.
        progress: where it is shown how far the run is; a live display on a terminal and in a notebook, else lines.
        confirm: asked before more than `models.confirm_usd` or `label.confirm_hours` is spent; nobody is asked where it is None.
        sharing: the live model that others of this process run as well, in place of one that the configuration would load; it
            must be what the configuration names. Scores that rest on running it are the same beyond rounding.

    Raises:
        UserError: something in the configuration, the inputs or the store is wrong; nothing was damaged.
    """
    with ExitStack() as closing:
        live = None if sharing is None else sharing.live()
        if live is not None:
            closing.callback(live.model.close)  # type: ignore[attr-defined]  # What still waits is of this run.
        return _run(config, progress, confirm, live)


def _run(config: RunConfig, progress: Progress | None, confirm: Ask | None, live: Live | None) -> Outcome:
    progress = SurvivingDisplay(progress or default_progress())
    folder = Path(config.store)
    if folder.exists():  # What is wrong with a store is said before a model is loaded, what is wrong with a model
        Store.create_or_open(folder)  # before a store is made.
    check_workbench(config)
    shared = None if live is None else lambda subject, dictionary, _: inputs_of(live, subject, dictionary)
    inputs = load_inputs(config, progress, shared)
    store = Store.create_or_open(folder)
    with store.writer() as writer, watched(store.folder, progress) as watch, stop_on_interrupt(progress) as asked:
        deadline, budget = deadline_of(config.label), budget_of(config.models)
        watch.vitals.pays_from(budget)
        with _embedding(config, writer, watch) as embedding:
            here = Session(config, inputs, writer, watch, stops(asked, deadline), budget, embedding, confirm)
            return _worked_on(here, store, deadline)


def _worked_on(here: Session, store: Store, deadline: Deadline | None) -> Outcome:
    figures: dict[str, Any] = {}
    missing: dict[str, int] = {}
    try:
        gathered, control = _gathered(here, store)
        _count_spent(here, gathered, control)
        for evidence in gathered:
            figures[evidence.dictionary], found = awaited(_label_dictionary(here, evidence, control))
            missing |= found
        if not here.embedding.finish(here.stop).complete:
            raise Interrupted
    except Interrupted:
        late = deadline is not None and deadline.reached()
        told = deadline.message() if late and deadline else "stopped; what is finished is kept"
        # A pass belongs to no run yet, which `resume` could find.
        way = f"exegete resume --store {here.config.store}" if here.begun else "the same command again"
        here.watch.say(f"{told}; go on from there: {way}")
        publish(here)
        here.watch.interrupted("deadline" if late else "signal")
        return Outcome(store.folder, False, figures, missing, here.begun)
    except BaseException:
        with suppress(UserError):  # Where publishing fails as well, what failed first is what there is to say.
            publish(here)
        raise
    publish(here)
    here.watch.finished(missing)
    return Outcome(store.folder, True, figures, missing, here.begun)


def _embedding(config: RunConfig, writer: Writer, watch: Watch) -> EmbeddingRun:
    """Return what embeds explanations as they are written: nothing, where no embedding model is configured."""
    from exegete.tools.embedders import SentenceEmbedder

    model = config.models.embedder if config.label.embed else None
    return EmbeddingRun(writer, model, lambda: SentenceEmbedder(model or "", device=config.models.device), watch.say)


def _gathered(here: Session, store: Store) -> tuple[list[Evidence], tuple[Inputs, Evidence] | None]:
    """Return the evidence to label, and that of the random-weight control where there is to be one."""
    config, inputs, writer, watch = here.config, here.inputs, here.writer, here.watch
    gathered = gather_evidence(config, inputs, store, writer, watch, here.stop)
    if not config.label.random_control or inputs is None:
        return gathered, None
    return gathered, gather_control(config, inputs, store, writer, watch, here.stop)


def _count_spent(here: Session, gathered: Sequence[Evidence], control: tuple[Inputs, Evidence] | None) -> None:
    """Take from the budget what these runs have cost before: all of them, before the first one spends more."""
    if here.budget is None:
        return
    config = here.config
    known_by = [(identity(config), evidence.dictionary) for evidence in gathered]
    if control is not None:
        known_by.append((identity(config, control=True), control[1].dictionary))
    for known, dictionary in known_by:
        run = id_of_run(known, config.seed, dictionary)
        here.budget.spent_usd += here.writer.spent_usd(run)
        here.budget.spent_tokens += here.writer.spent_tokens(run)


async def _label_dictionary(
    here: Session, evidence: Evidence, control: tuple[Inputs, Evidence] | None
) -> tuple[dict[str, Any], dict[str, int]]:
    """Label one dictionary; return its summary, and dictionary → about how many latents calls are missing."""
    config, writer = here.config, here.writer
    controls, missing = (None, {}) if control is None else await _label_control(here, *control, evidence)
    latents = chosen_latents(evidence, config.label.limit, config.seed)
    own = Labeling.of(here, identity(config), evidence, latents, inputs=here.inputs)
    bench = await worked_through(here, own)
    results = writer.results(own.run, evidence.dictionary)
    headlines = {evaluator.name: evaluator.headline for evaluator in bench.evaluators}
    typed = typed_latents(results, headlines, _silent(evidence, latents), controls)
    for name, count in few_floors(results, headlines).items():
        here.watch.say(
            f"{name}: types rest on {count} shuffled explanations, fewer than a 95th percentile takes; set label.floors to 19 or more"
        )
    writer.set_types(own.run, evidence.dictionary, typed)
    figures = summarise(results, headlines, generator(config.seed, "summary", evidence.dictionary), controls)
    if bench.cascade is not None:
        figures["cascade"] = cascade_figures(results, bench.cascade.rule, config.seed)
    writer.finish_run(own.run, "finished", figures)
    return figures, {**missing, evidence.dictionary: results.incomplete()}


async def _label_control(
    here: Session, inputs: Inputs, evidence: Evidence, like: Evidence
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Label latents of a random-weight dictionary; return evaluator → their scores, and what calls are missing."""
    config, writer, dictionary = here.config, here.writer, evidence.dictionary
    latents = np.array(control_latents(config, evidence, like), dtype=np.int64)
    own = Labeling.of(here, identity(config, control=True), evidence, latents, inputs=inputs, floors=False)
    bench = await worked_through(here, own)
    results = writer.results(own.run, dictionary)
    headlines = {evaluator.name: evaluator.headline for evaluator in bench.evaluators}
    found = control_scores(results, headlines)
    for name in too_few(found):
        here.watch.say(
            f"{name} has scores of {len(found[name])} random-weight latents, too few for a bar: it decides no type; "
            "set label.random_control higher"
        )
    figures = summarise(results, headlines, generator(config.seed, "summary", dictionary))
    writer.finish_run(own.run, "finished", figures)
    return found, {dictionary: results.incomplete()}


def _silent(evidence: Evidence, latents: Latents) -> dict[str, Latents]:
    """Return dead, rare and dense → the latents that are so."""
    return {status: np.intersect1d(found, latents) for status, found in evidence.silent().items()}
