"""A labeling run, from its configuration to a published store. Read from the top:

1. gather   subject, dictionary, corpus → activation pass → evidence        (`gathering`)
2. label    every latent through the graph: explain, score, record          (`graph`, `engine`)
3. floors   other explanations on the same windows, for a random subset     (`floors`)
4. type     which latents are explained, which honestly are not             (`exegete.evaluators.typing`)
5. publish  the snapshot that everybody reads                               (`exegete.tools.store`)

Each stage asks the store what is done already, so the same call after a crash goes on where the last one ended, and ends in
the same tables. A first interrupt (Ctrl-C) drains: what is in flight is finished and written; a second one stops at once.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from exegete.agent.config import RunConfig
from exegete.agent.engine import Batch, Stop, Write, evidence_in_ranges, label_latents
from exegete.agent.floors import floors_seed, plan_floors, score_all_floors
from exegete.agent.gathering import Interrupted, gather_evidence, load_inputs
from exegete.agent.graph import Workbench, label_graph
from exegete.agent.progress import Progress, default_progress
from exegete.agent.summary import summarise
from exegete.evaluators import make_evaluator, make_judge
from exegete.evaluators.typing import Scored, input_types
from exegete.tools.errors import UserError
from exegete.tools.evidence import Evidence
from exegete.tools.explainers import make_explainer
from exegete.tools.explainers.contract import Explainer
from exegete.tools.seeds import generator
from exegete.tools.store import LatentRecord, Store, Writer
from exegete.tools.store.results import RunResults


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    store: Path
    finished: bool
    """False where it was asked to stop; the same call goes on."""
    figures: dict[str, Any]
    """Dictionary → its summary (see `exegete.agent.summary`)."""


def run(config: RunConfig, progress: Progress | None = None) -> Outcome:
    """Label what `config` names and publish the results; go on from where an earlier call of the same configuration ended.

    Raises:
        UserError: something in the configuration, the inputs or the store is wrong; nothing was damaged.
    """
    progress = progress or default_progress()
    folder = Path(config.store)
    if folder.exists():  # What is wrong with a store is said before a model is loaded, what is wrong with a model
        Store.create_or_open(folder)  # before a store is made.
    _require_known_names(config)
    inputs = load_inputs(config, progress)
    store = Store.create_or_open(folder)
    figures: dict[str, Any] = {}
    with store.writer() as writer, _stop_on_interrupt(progress) as stop:
        try:
            for evidence in gather_evidence(config, inputs, store, writer, progress, stop):
                figures[evidence.dictionary] = _label_dictionary(config, evidence, writer, progress, stop)
        except Interrupted:
            progress.say("stopped; what is finished is kept, and the same command goes on from here")
            writer.publish()
            return Outcome(store.folder, False, figures)
        except BaseException:
            with suppress(UserError):  # Where publishing fails as well, what failed first is what there is to say.
                writer.publish()
            raise
        writer.publish()
    return Outcome(store.folder, True, figures)


def _label_dictionary(
    config: RunConfig, evidence: Evidence, writer: Writer, progress: Progress, stop: Stop
) -> dict[str, Any]:
    run_id = writer.begin_run(
        config=identity(config), seed=config.seed, code_version=_code_version(), dictionary=evidence.dictionary
    )
    writer.publish()  # From now on `status` and `resume` know the run, however it ends.
    latents = _chosen(config, evidence)
    bench = _workbench(config, evidence, latents)
    try:
        _label(config, evidence, latents, bench, run_id, writer, progress, stop)
        _floors(config, evidence, bench, run_id, writer, progress, stop)
    except BaseException:
        with suppress(UserError):  # As above; a run that is still marked as running is resumed all the same.
            writer.finish_run(run_id, "interrupted")
        raise
    results = writer.results(run_id, evidence.dictionary)
    statuses = evidence.statuses
    silent = {latent: str(statuses[latent]) for latent in latents if statuses[latent] != "live"}
    writer.set_types(run_id, evidence.dictionary, silent | _types(results))
    figures = summarise(results, generator(config.seed, "summary", evidence.dictionary))
    writer.finish_run(run_id, "finished", figures)
    return figures


def identity(config: RunConfig) -> dict[str, Any]:
    """Return what the results depend on: the configuration without store, concurrency, slices, batches and publishing."""
    return config.model_dump(
        mode="json",
        exclude={"store": True, "label": {"concurrency", "batch", "publish_seconds"}, "evidence": {"slices", "batch"}},
    )


def _chosen(config: RunConfig, evidence: Evidence) -> list[int]:
    """All latents, or `limit` of them drawn by the seed; ascending, so that evidence is read from front to back."""
    latents = list(evidence.statuses)
    if config.label.limit is None or config.label.limit >= len(latents):
        return latents
    drawn = generator(config.seed, "limit", evidence.dictionary).permutation(len(latents))[: config.label.limit]
    return sorted(latents[i] for i in drawn)


def _workbench(config: RunConfig, evidence: Evidence, latents: Sequence[int]) -> Workbench:
    return Workbench(
        dictionary=evidence.dictionary,
        explainer=_explainer(config, evidence, latents),
        judge=make_judge(config.label.judge),
        evaluators=[make_evaluator(name) for name in config.label.evaluators],
        seed=config.seed,
    )


def _require_known_names(config: RunConfig) -> None:
    """Raise UserError where nothing has the name of the explainer, the judge or an evaluator: after hours it is too late."""
    make_judge(config.label.judge)
    for name in config.label.evaluators:
        make_evaluator(name)
    if config.label.explainer != "lexical":  # It is made once there is evidence.
        make_explainer(config.label.explainer)


def _explainer(config: RunConfig, evidence: Evidence, latents: Sequence[int]) -> Explainer:
    if config.label.explainer != "lexical":
        return make_explainer(config.label.explainer)
    from exegete.tools.explainers.background import background

    drawn = generator(config.seed, "background", evidence.dictionary).permutation(len(latents))[:BACKGROUND_LATENTS]
    others = evidence.read([latents[i] for i in drawn], "explain")
    return make_explainer("lexical", background=background(others))


BACKGROUND_LATENTS = 256
"""Latents whose explain windows tell the lexical explainer what text is like apart from the latent it explains."""


def _label(
    config: RunConfig,
    evidence: Evidence,
    latents: Sequence[int],
    bench: Workbench,
    run_id: str,
    writer: Writer,
    progress: Progress,
    stop: Stop,
) -> None:
    done = set(writer.labeled(run_id, evidence.dictionary).tolist())
    missing = [latent for latent in latents if latent not in done]
    with progress.stage("labeling", len(latents), "latents", done=len(done)) as advance:
        write = _publishing(config, writer, lambda records: writer.record(run_id, records), advance)
        batch = Batch(write, config.label.batch)
        source = evidence_in_ranges(evidence, missing)
        complete = asyncio.run(label_latents(source, label_graph(bench), bench, config.label.concurrency, batch, stop))
    if not complete:
        raise Interrupted


def _floors(
    config: RunConfig,
    evidence: Evidence,
    bench: Workbench,
    run_id: str,
    writer: Writer,
    progress: Progress,
    stop: Stop,
) -> None:
    results = writer.results(run_id, evidence.dictionary)
    explained = results.explained()
    seed = floors_seed(config.seed, evidence.dictionary)
    floors = plan_floors(evidence, list(explained), config.label.floors, seed)
    done = set(writer.labeled(run_id, evidence.dictionary, floors=True).tolist())
    explanations = results.explanations([explained[latent] for latent in sorted(floors.lenders)])
    missing = [latent for latent in floors.subset if latent not in done]
    with progress.stage("floors", len(floors.subset), "latents", done=len(done)) as advance:
        write = _publishing(config, writer, lambda records: writer.record(run_id, records, floors=True), advance)
        batch = Batch(write, config.label.batch)
        source = evidence_in_ranges(evidence, missing)
        complete = asyncio.run(score_all_floors(source, explained, floors, explanations, bench, batch, stop))
    if not complete:
        raise Interrupted


def _types(results: RunResults) -> dict[int, str]:
    scores: dict[str, list[Scored]] = {}
    floors: dict[str, list[float]] = {}
    for latent, evaluator, baseline, value, low in results.balanced_accuracies():
        if baseline is None:
            scores.setdefault(evaluator, []).append(Scored(latent, value, low))
        elif baseline == "shuffled":
            floors.setdefault(evaluator, []).append(value)
    return input_types(scores, floors)


def _publishing(config: RunConfig, writer: Writer, record: Write, advance: Callable[[int], None]) -> Write:
    """Return a function that writes records, advances the progress, and republishes every `label.publish_seconds`."""
    published_at = time.monotonic()

    def write(records: Sequence[LatentRecord]) -> None:
        nonlocal published_at
        record(records)
        advance(len(records))
        if time.monotonic() - published_at > config.label.publish_seconds:
            writer.publish()
            published_at = time.monotonic()

    return write


@contextmanager
def _stop_on_interrupt(progress: Progress) -> Iterator[Stop]:
    """Turn the first SIGINT or SIGTERM into a request to drain; the second raises KeyboardInterrupt."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
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
