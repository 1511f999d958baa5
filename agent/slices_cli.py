"""The command `exegete slice`: the slices of an activation pass without Ray, by any number of processes, as of a Slurm array.

1. `exegete slice CONFIG --prepare`, once: builds the corpus and begins the pass (and that of the random-weight control).
2. `exegete slice CONFIG --index I --of N`, for every I below N, anywhere that sees the store: does the slices I, I + N, … that
   are missing. Nobody holds the writer's lock, and a process that was killed is simply started again.
3. `exegete label CONFIG` finds the slices done, does what is still missing, and goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from exegete.tools.errors import UserError

if TYPE_CHECKING:
    from exegete.agent.config import RunConfig
    from exegete.agent.gathering import Inputs
    from exegete.agent.progress import Progress
    from exegete.tools.activations import PreparedPass
    from exegete.tools.store import Store

app = typer.Typer()
"""Its command is registered with the main application."""


@app.command()
def slice(
    config: Annotated[Path, typer.Argument(help="TOML file, the one that `exegete label` is to be given.")],
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Build the corpus and begin the pass: once, before all others.")
    ] = False,
    index: Annotated[int | None, typer.Option("--index", help="Which of the processes this is, from 0.")] = None,
    of: Annotated[int | None, typer.Option("--of", help="How many processes there are.")] = None,
    store: Annotated[Path | None, typer.Option("--store", help="Folder of the store, on shared storage.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of the configuration, e.g. evidence.slices=256.")
    ] = None,
) -> None:
    """Do a share of the activation pass's slices, on any machine that sees the store; `exegete label` then goes on."""
    from exegete.agent.config import load_config
    from exegete.agent.progress import default_progress

    settled = load_config(config, assignments or (), {"store": str(store) if store else None})
    if prepare:
        for name, slices in prepare_slices(settled, default_progress(), of or 1):
            typer.echo(f"{name}: {slices:,} slices; do them with `exegete slice {config} --index I --of N`")
        return
    if index is None or of is None:
        raise UserError("exegete slice: give --prepare, or --index I --of N for one of N processes")
    for done in do_slices(settled, index, of, default_progress()):
        typer.echo(f"{done.name}: {done.here:,} slices done here; {done.complete:,} of {done.slices:,} are complete")


@dataclass(frozen=True)
class Done:
    """What a process has done of one pass."""

    name: str
    """Of the dictionary."""
    here: int
    """Slices that it has done."""
    complete: int
    """Slices that are complete, whoever did them."""
    slices: int


def prepare_slices(config: RunConfig, progress: Progress, at_least: int = 1) -> list[tuple[str, int]]:
    """Build the corpus, begin the passes of `config`, and return the dictionary and the number of slices of each.

    `at_least`: so many slices, where `evidence.slices` does not say how many.

    Raises:
        UserError: no dictionary is configured, an input is wrong, or another process writes to the store.
    """
    from exegete.agent.gathering import open_corpus
    from exegete.tools.store import Store

    inputs = _inputs(config, progress)
    store = Store.create_or_open(Path(config.store))
    with store.writer():
        open_corpus(config, store, inputs.subject, progress)
        found = [(name, len(prepared.slices)) for name, prepared in _passes(config, inputs, store, at_least)]
    return found


def do_slices(config: RunConfig, index: int, of: int, progress: Progress) -> list[Done]:
    """Do the slices `index`, `index + of`, … of each pass of `config` that are missing.

    Raises:
        UserError: `index` is not below `of`, the passes are not prepared, or as `do_slice`.
    """
    from exegete.agent.gathering import corpus_folder
    from exegete.tools.activations import do_slice
    from exegete.tools.parts import is_complete
    from exegete.tools.store import Store

    if not 0 <= index < of:
        raise UserError(f"--index {index} --of {of}: the index must be at least 0 and below {of}")
    inputs, store = _inputs(config, progress), Store.open(Path(config.store))
    if not corpus_folder(config, store, inputs.subject).exists():
        raise _unprepared(store)
    found = []
    for name, prepared in _passes(config, inputs, store, None):
        own = range(index, len(prepared.slices), of)
        total = sum(prepared.slices[number].micro_batches for number in own)
        with progress.stage(f"slices of {name}", total, "micro-batches") as advance:
            here = sum(do_slice(prepared, number, advance) for number in own)
        complete = sum(is_complete(piece.part) for piece in prepared.slices)
        found.append(Done(name, here, complete, len(prepared.slices)))
    return found


def _inputs(config: RunConfig, progress: Progress) -> Inputs:
    from exegete.agent.gathering import load_inputs

    inputs = load_inputs(config, progress)
    if inputs is None:
        raise UserError("the configuration has no [subject]; a pass needs [subject], [dictionary] and [corpus]")
    return inputs


def _passes(
    config: RunConfig, inputs: Inputs, store: Store, at_least: int | None
) -> Iterator[tuple[str, PreparedPass]]:
    """Yield the name and the pass of the dictionary, then of its random-weight control, where one is configured.

    `at_least`: begin them, in so many slices; None: they must have been begun.
    """
    from exegete.agent.gathering import corpus_folder, pass_folder, random_inputs
    from exegete.tools.activations import prepare_pass
    from exegete.tools.corpus import Corpus

    assert config.dictionary is not None
    corpus = Corpus.open(corpus_folder(config, store, inputs.subject))
    wanted = [(config.dictionary.path, inputs)]
    if config.label.random_control:
        wanted.append((f"random control of {config.dictionary.path}", random_inputs(config, inputs, store, corpus)[0]))
    for name, given in wanted:
        folder = pass_folder(config, given, corpus, store)
        if at_least is None and not (folder / "manifest.json").exists():
            raise _unprepared(store)
        settings = config.evidence.settings(config.seed)
        yield (
            name,
            prepare_pass(
                given.subject,
                given.dictionary,
                corpus,
                folder,
                settings,
                begin=at_least is not None,
                slices_at_least=at_least or 1,
            ),
        )


def _unprepared(store: Store) -> UserError:
    return UserError(
        f"no pass of this configuration is prepared in the store {str(store.folder)!r}; run `exegete slice CONFIG --prepare` "
        "once, before all others"
    )
