"""From a configuration to evidence in the store: subject, dictionary, corpus, activation pass, merge.

Every step is found done when it was done before: the corpus by its inputs, the pass by its slices, the evidence by its marker.
Slices may be done by workers (`evidence.workers`) or by other processes (`exegete slice`): they take the pass up by `open_pass`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.agent.config import CorpusConfig, DictionaryConfig, RunConfig, SubjectConfig
from exegete.agent.progress import Progress
from exegete.tools.corpus_readers import require_source
from exegete.tools.errors import UserError
from exegete.tools.evidence import Evidence
from exegete.tools.seeds import digest
from exegete.tools.store import DictionaryRecord, Store, Writer

if TYPE_CHECKING:
    from exegete.tools.activations import Slicer
    from exegete.tools.corpus import Corpus
    from exegete.tools.dictionaries import Dictionary
    from exegete.tools.live_model import LiveModel
    from exegete.tools.subject import Subject

BUNDLED = "bundled"
BUNDLED_DOCUMENTS = 20_000
SLICES_PER_WORKER = 4
"""At least, so that none waits for long for the last one."""
WORKERS_ASSUMED = 16
"""Where it is not said how many there are."""


class Interrupted(Exception):
    """The run was asked to stop; what is finished is kept, and the same command goes on from there."""


@dataclass(frozen=True)
class Inputs:
    """What the evidence is made from, loaded."""

    subject: Subject
    dictionary: Dictionary
    model: LiveModel | None = None
    """With the dictionary attached, where somebody else runs it as well; None where the run makes its own."""


Open = Callable[[SubjectConfig, DictionaryConfig, Progress], Inputs]


def load_inputs(config: RunConfig, progress: Progress, shared: Open | None = None) -> Inputs | None:
    """Load subject and dictionary, and look whether the corpus is there; None where none of the three is configured.

    `shared` gives subject and dictionary that are there already, in place of those that would be loaded.

    Raises:
        UserError: one of them is missing, unfit or damaged, or is not what is shared. Nothing has been written then.
    """
    missing = [name for name in ("subject", "dictionary", "corpus") if getattr(config, name) is None]
    if len(missing) == 3:
        if config.evidence.workers is not None:
            raise UserError(
                f"evidence.workers = {config.evidence.workers!r} do activation passes, and there is none to do: the configuration "
                "has no [subject], [dictionary] and [corpus]; leave --workers out"
            )
        if shared is not None:
            raise UserError(
                "the configuration has no [subject], [dictionary] and [corpus]: nothing runs what is shared"
            )
        return None
    if config.subject is None or config.dictionary is None or config.corpus is None:
        raise UserError(f"the configuration has no [{missing[0]}]; a pass needs [subject], [dictionary] and [corpus]")
    if config.evidence.workers is not None:
        require_workers(config.evidence.workers)
    if config.corpus.source != BUNDLED:
        require_source(config.corpus.source)
    inputs = (shared or _loaded)(config.subject, config.dictionary, progress)
    if config.label.random_control:
        from exegete.tools.random_control import require_plain

        require_plain(inputs.dictionary)
    return inputs


def _loaded(subject: SubjectConfig, dictionary: DictionaryConfig, progress: Progress) -> Inputs:
    progress.say(f"loading subject {subject.name} and dictionary {dictionary.path}")
    opened = open_subject(subject)
    return Inputs(opened, open_dictionary(dictionary.path, opened))


def gather_evidence(
    config: RunConfig,
    inputs: Inputs | None,
    store: Store,
    writer: Writer,
    progress: Progress,
    stop: Callable[[], bool],
) -> list[Evidence]:
    """Return the evidence that the run is to label: of the configured dictionary, else all that the store holds.

    Raises:
        UserError: nothing is configured and the store holds no evidence; or the store's evidence of this dictionary comes
            from another corpus or other settings.
        Interrupted: `stop` answered True during the pass.
    """
    if inputs is None:
        return _evidence_in_store(store)
    corpus = open_corpus(config, store, inputs.subject, progress)
    return [_pass(config, inputs, corpus, store, writer, progress, stop)]


def gather_control(
    config: RunConfig,
    inputs: Inputs,
    store: Store,
    writer: Writer,
    progress: Progress,
    stop: Callable[[], bool],
) -> tuple[Inputs, Evidence]:
    """Return the random-weight control of the configured dictionary and its evidence over the same corpus.

    To be called after `gather_evidence`, which builds the corpus.

    Raises:
        UserError: the dictionary is none that has such a control (`require_plain`), or as `gather_evidence`.
        Interrupted: `stop` answered True during the pass.
    """
    from exegete.tools.corpus import Corpus

    corpus = Corpus.open(corpus_folder(config, store, inputs.subject))
    control, active = random_inputs(config, inputs, store, corpus)
    progress.say(f"random-weight control: {control.dictionary.latents:,} random directions, {active} active on a token")
    own = inputs.dictionary.fingerprint
    return control, _pass(config, control, corpus, store, writer, progress, stop, control_of=own)


def random_inputs(config: RunConfig, inputs: Inputs, store: Store, corpus: Corpus) -> tuple[Inputs, int]:
    """Return the random-weight control of `inputs`, calibrated once for all, and how many latents are active on a token."""
    from exegete.tools.random_control import random_control, require_plain, stored_calibration

    dictionary, subject = require_plain(inputs.dictionary), inputs.subject
    calibration = stored_calibration(store.controls, dictionary, subject, corpus, config.seed)
    return Inputs(subject, random_control(dictionary, subject, calibration, config.seed)), calibration.k


def _evidence_in_store(store: Store) -> list[Evidence]:
    found = [Evidence.open(marker.parent) for marker in sorted(store.folder.glob("evidence/*/evidence.json"))]
    if not found:
        raise UserError(
            f"store {str(store.folder)!r} holds no evidence and no [subject], [dictionary], [corpus] are configured; "
            "name a configuration or run `exegete evidence import` first"
        )
    return found


def require_workers(spec: str) -> None:
    """Raise UserError unless there can be such workers."""
    from importlib.util import find_spec

    from exegete.tools.workers import parse_workers

    parse_workers(spec)
    if find_spec("ray") is None:
        raise UserError(f"workers {spec!r} need Ray: pip install 'exegete[ray]'")


def open_subject(wanted: SubjectConfig) -> Subject:
    """Load the subject that a configuration names.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    from exegete.tools.subject import load_subject

    name = wanted.name
    if name == BUNDLED:
        from exegete.tools import bundled

        name = str(bundled.subject_path())
    subject = load_subject(
        name, device=wanted.device, dtype=wanted.dtype, revision=wanted.revision, processing=wanted.processing
    )
    # The bundled subject is known by its name, wherever the package is installed.
    subject.name = wanted.name
    return subject


def open_dictionary(path: str, subject: Subject) -> Dictionary:
    """Load the dictionary that a configuration names.

    Raises:
        UserError: there is none, it does not fit the subject, or it is damaged.
    """
    from exegete.tools import bundled
    from exegete.tools.dictionaries import PlainDictionary
    from exegete.tools.dictionary_loaders import load_dictionary

    wanted = path
    if path == f"{BUNDLED}:demo":
        path = str(bundled.dictionary_path("demo"))
    elif path == f"{BUNDLED}:tests":
        path = str(bundled.dictionary_path("tests"))
    dictionary = load_dictionary(path, subject)
    if path != wanted and isinstance(dictionary, PlainDictionary):
        # Known by its name, wherever the package is installed.
        return replace(dictionary, name=wanted)
    return dictionary


def is_bundled(subject: str) -> bool:
    """Return whether this is what the bundled subject is called, by its name or its folder."""
    from exegete.tools.bundled import subject_path

    return subject in (BUNDLED, str(subject_path()))


def bundled_texts(seed: int, count: int) -> list[str]:
    """Return requests of the bundled grammar, for what needs some text of the bundled subject's."""
    from exegete.tools.bundled import sample_texts

    return list(sample_texts(seed, count))


def open_corpus(config: RunConfig, store: Store, subject: Subject, progress: Progress) -> Corpus:
    """Return the configured corpus, which is built first unless it is there.

    Raises:
        UserError: the source is missing or not what it is said to be.
    """
    from exegete.tools.corpus import build_corpus

    assert config.corpus is not None
    wanted = config.corpus
    corpus = build_corpus(
        source_in(store.corpora, wanted, config.seed),
        subject,
        corpus_folder(config, store, subject),
        seed=config.seed,
        text_field=wanted.text_field,
        limit_documents=wanted.documents,
        limit_tokens=wanted.tokens,
    )
    progress.say(f"corpus: {corpus.contexts:,} contexts of {corpus.context_tokens} tokens; {_counted(corpus.counts)}")
    return corpus


def corpus_folder(config: RunConfig, store: Store, subject: Subject) -> Path:
    """Return where the configured corpus lies, or is to lie."""
    assert config.corpus is not None
    name = digest(config.corpus.model_dump_json(), subject.fingerprint, str(config.seed)).removeprefix("sha256:")[:16]
    return store.corpora / name


def source_in(folder: Path, wanted: CorpusConfig, seed: int, most: int | None = None) -> str:
    """Return the source of a corpus; text of the bundled grammar is written into `folder` first, `most` documents of it."""
    from exegete.tools import bundled

    if wanted.source != BUNDLED:
        return wanted.source
    documents = min(filter(None, (wanted.documents or BUNDLED_DOCUMENTS, most)))
    path = folder / f"bundled-{seed}-{documents}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        bundled.write_corpus(unfinished, seed, documents)
        unfinished.rename(path)
    return str(path)


def _counted(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in counts.items() if isinstance(value, int))


def _pass(
    config: RunConfig,
    inputs: Inputs,
    corpus: Corpus,
    store: Store,
    writer: Writer,
    progress: Progress,
    stop: Callable[[], bool],
    control_of: str | None = None,
) -> Evidence:
    from exegete.tools.activations import computing_with, run_pass, torch_threads
    from exegete.tools.merging import merge
    from exegete.tools.parts import read_manifest

    subject, dictionary = inputs.subject, inputs.dictionary
    settings = config.evidence.settings(config.seed)
    folder = store.evidence_folder(dictionary.fingerprint, control=control_of is not None)
    working = pass_folder(config, inputs, corpus, store)
    if (folder / "evidence.json").exists():
        evidence = merge(working, folder, subject, dictionary, corpus, settings)
    else:
        slicer, at_least = slicer_of(config, store, corpus, working, control_of is not None, progress)
        with closing(Stages(progress, "micro-batches")) as stages:
            if not run_pass(subject, dictionary, corpus, working, settings, stages, stop, slicer, at_least):
                raise Interrupted
        progress.say("merging the evidence")
        with computing_with(int(read_manifest(working).get("threads", torch_threads()))):
            evidence = merge(working, folder, subject, dictionary, corpus, settings)
    assert config.dictionary is not None
    name, provenance = config.dictionary.path, dict(evidence.provenance)
    if control_of is not None:
        name, provenance = f"random control of {name}", {**provenance, "control_of": control_of}
    writer.add_dictionary(
        DictionaryRecord(
            dictionary.fingerprint, name, dictionary.latents, subject.name, dictionary.hook_point, provenance
        )
    )
    return evidence


def pass_folder(config: RunConfig, inputs: Inputs, corpus: Corpus, store: Store) -> Path:
    """Return where the pass of `inputs` over `corpus` keeps its parts."""
    identity = repr(config.evidence.settings(config.seed).identity())
    return store.passes / digest(inputs.dictionary.fingerprint, corpus.fingerprint, identity)[7:23]


def slicer_of(
    config: RunConfig, store: Store, corpus: Corpus, folder: Path, control: bool, progress: Progress
) -> tuple[Slicer, int]:
    """Return who does the slices, and how many there are to be at least."""
    from exegete.tools.activations import do_every_slice
    from exegete.tools.workers import Job, parse_workers, slicer

    if config.evidence.workers is None:
        return do_every_slice, 1
    assert config.subject is not None
    workers = parse_workers(config.evidence.workers)
    gpu = config.subject.device.startswith("cuda")
    places = (_for_workers(config), str(store.folder), str(corpus.folder), str(folder), control)
    job = Job(slice_worker, places, what="slice", gpu=gpu)
    told = slicer(workers, job, lambda count: progress.say(f"slices go to {workers.spec}: workers {count}"))
    return told, SLICES_PER_WORKER * (workers.count or WORKERS_ASSUMED)


def _for_workers(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as a process with another working directory, and a GPU that is its own, understands it."""
    tree = config.model_dump(mode="json")
    for section, key in (("subject", "name"), ("dictionary", "path")):
        if Path(tree[section][key]).exists():
            tree[section][key] = str(Path(tree[section][key]).resolve())
    tree["subject"]["device"] = tree["subject"]["device"].partition(":")[0]
    return tree


def slice_worker(
    tree: Mapping[str, Any], store: str, corpus: str, folder: str, control: bool, token: str
) -> Callable[[int], bool]:
    """Make a worker ready for the slices of the pass in `folder`, and return what does the slice of a given number.

    Raises:
        UserError: this machine does not see the store's files, or loads something else than the one that began the pass.
    """
    from exegete.tools.activations import do_slice, prepare_pass
    from exegete.tools.corpus import Corpus
    from exegete.tools.workers import require_shared

    require_shared(Path(folder), token)
    config, text = RunConfig.model_validate(tree), Corpus.open(Path(corpus))
    assert config.subject is not None and config.dictionary is not None
    subject = open_subject(config.subject)
    inputs = Inputs(subject, open_dictionary(config.dictionary.path, subject))
    if control:
        inputs, _ = random_inputs(config, inputs, Store.open(Path(store)), text)
    settings = config.evidence.settings(config.seed)
    prepared = prepare_pass(inputs.subject, inputs.dictionary, text, Path(folder), settings, begin=False)
    return lambda index: do_slice(prepared, index)


class Stages:
    """Turns calls of (stage, done, total), as the pass makes them, into stages of a `Progress`."""

    def __init__(self, progress: Progress, unit: str) -> None:
        """Show on `progress`, counting in `unit`."""
        self._progress, self._unit = progress, unit
        self._stage: str | None = None
        self._done = 0
        self._open = ExitStack()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of `stage` are finished."""
        if stage != self._stage:
            self.close()
            self._stage, self._done = stage, 0
            self._advance = self._open.enter_context(self._progress.stage(stage, total, self._unit))
        self._advance(done - self._done)
        self._done = done

    def close(self) -> None:
        """End the stage that is open."""
        self._open.close()
